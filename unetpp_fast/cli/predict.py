"""`unetpp-fast predict`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..architecture.precision import autocast, choose_dtype
from ..common import messages
from ..common.devices import choose_device
from ..common.errors import InputError
from ..common.progress import progress_bar
from ..data import prediction_files
from ..data.images import STANDARD, scaled, standardise, write_png
from ..data.postprocessing import postprocess
from ..data.resampling import planes, resampled
from ..experiments import pictures
from ..models import tiled_prediction
from ..models.architectures import AnyNetwork
from ..models.ensemble import Ensemble
from ..training import checkpoint
from ..training.classes import class_names, palette
from .arguments import Commands, add_command, add_device, byte_count, overlap, tile_size

FAILED = 2


def add_parser(commands: Commands) -> None:
    """Adds `predict` to the commands."""
    text = "Write masks or a label map of each image, in its format."
    command = add_command(commands, "predict", run, text, usage="--checkpoint RUN/best.pt --images IMAGES --out OUT")
    predict = command.add_argument_group("data and results")
    predict.add_argument(
        "--checkpoint", type=Path, nargs="+", required=True,
        help="best.pt, or another UNet++'s weights; several, or the folder of a cross-validation, predict together",
    )  # fmt: skip
    predict.add_argument("--images", type=Path, required=True, help="an image, volume or stack of planes, or a folder")
    predict.add_argument("--out", type=Path, required=True, help="folder for masks/<class>/<id>, overlays/<id>.png")
    predict.add_argument("--probabilities", action="store_true", help="write probabilities/<class>/<id> too")
    predict = command.add_argument_group("prediction")
    predict.add_argument("--mode", choices=["accurate", "fast"], default="accurate", help="mean over the heads, or one head")
    predict.add_argument("--level", type=int, help="head to use (fast) or the last to use (accurate); default: the deepest")
    predict.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is foreground")
    predict.add_argument("--flips", action="store_true", help="mean over the mirror images too: 4 passes, of a volume 8")
    predict = command.add_argument_group("cleaning, of each mask or class")
    predict.add_argument("--min-size", type=int, default=0, help="drop connected parts of fewer pixels or voxels")
    predict.add_argument(
        "--keep-largest", type=int, help="keep only so many connected parts, the largest ones (default: all)"
    )
    predict.add_argument("--fill-holes", action="store_true", help="fill the holes")
    predict = command.add_argument_group("large images")
    predict.add_argument("--tile", type=tile_size, help="predict in tiles of this size: 512, or 32,256,256 in 3D")
    predict.add_argument(
        "--overlap", type=overlap, default=0.25,
        help="share of a tile that overlaps its neighbour: 0.25, or 0.5,0.25,0.25, one per axis",
    )  # fmt: skip
    predict.add_argument(
        "--max-memory", type=byte_count, help="512M, 2G: choose tiles that need no more; default: one tile per image"
    )
    add_device(command)


@dataclass(frozen=True)
class Job:
    """What all files share. size: side in pixels to which images are scaled, or None. palette: of exclusive classes, which
    are written as label maps; otherwise None."""

    network: AnyNetwork | Ensemble
    options: argparse.Namespace
    classes: list[str]
    size: int | None
    palette: list[list[int]] | None


def run(options: argparse.Namespace) -> int:
    """Writes `masks/<class>/<id>` (label maps: `masks/<id>`) and, if asked for, probabilities in the format of each file;
    overlays of pictures. A file that cannot be used is reported at the end; the exit code is then not 0."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if not 0.0 <= options.threshold <= 1.0:
        raise InputError(f"--threshold must be between 0 and 1, not {options.threshold}")
    if _cleaning(options):
        postprocess(np.zeros((1, 1), bool), **_cleaning(options))  # raises before anything is predicted
    network, content = checkpoint.load_ensemble(options.checkpoint, device)
    about = content.get("about") or {}
    size = (about.get("prepare") or {}).get("size")
    job = Job(network, options, class_names(network, content), size, palette(network, about))
    images = prediction_files.find(options.images, about.get("channel_files", 0))
    refused: list[InputError] = []
    drawn = False
    for name, files in progress_bar(images.items(), desc="predicting", unit="file", disable=None):
        try:
            with autocast(device, dtype):
                drawn |= _predict_one(job, name, files)
        except InputError as error:
            if len(images) == 1 or isinstance(error, OSError):  # nothing can be written
                raise
            refused.append(error)
        except ValueError as error:  # an option does not fit
            raise InputError(str(error)) from error
    overlays = f", {options.out / 'overlays'}" if drawn else ""
    messages.say(f"{len(images) - len(refused)} image(s): {options.out / 'masks'}{overlays}")
    for one in refused:
        print(f"unetpp-fast predict: error: {one}", file=sys.stderr)
    return FAILED if refused else 0


def _predict_one(job: Job, name: str, files: Sequence[Path]) -> bool:
    """Predicts and writes an image; returns whether it has an overlay."""
    options, out = job.options, job.options.out
    source = prediction_files.read(files, job.network.topology.spatial_dims, job.network.topology.in_channels)
    if job.size:
        masks, probabilities = _predict_scaled(job.network, source, options, job.size)
    else:
        masks, probabilities = _predict_file(job, source)
    if cleaning := _cleaning(options):
        for part in source.parts(masks):
            for mask in part:
                mask[...] = postprocess(mask, **cleaning)
    if job.palette:
        source.write_labels(out / "masks", name, masks[0], job.palette)
    for index, label in enumerate(job.classes):
        if not job.palette:
            source.write(out / "masks" / label, name, masks[index])
        if options.probabilities:
            source.write(out / "probabilities" / label, name, probabilities[index])
    if source.is_picture:
        shown, colours = masks, pictures.COLOURS
        if job.palette:
            colours = pictures.class_colours(job.palette)
            shown = masks[0] == np.arange(1, len(job.classes)).reshape(-1, 1, 1)
        picture = pictures.overlay(source.stored.real(source.images()[0]), shown, colours)
        write_png(out / "overlays" / f"{name}.png", picture)
    return source.is_picture


def _cleaning(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `postprocess` that the options give."""
    found = {"keep_largest": options.keep_largest, "min_size": options.min_size, "fill_holes": options.fill_holes}
    return found if options.keep_largest is not None or options.min_size or options.fill_holes else {}


def _predict_file(job: Job, source: prediction_files.Source) -> tuple[np.ndarray, np.ndarray | None]:
    """Masks, bool `[classes, *S]`, or labels, uint8 `[1, *S]`, of a file, and probabilities, float32
    `[classes, *S]`, or None; memory-mapped."""
    network, options, exclusive = job.network, job.options, job.palette is not None
    chosen = {"mode": options.mode, "level": options.level, "flips": options.flips}
    chosen["activation"] = "softmax" if exclusive else "sigmoid"
    images = source.images()
    size, tile = source.size_at(network.spacing), options.tile
    if tile is None and options.max_memory is not None:
        tile = tiled_prediction.choose_tile(network, size, options.max_memory, chosen)
    grid = tiled_prediction.make_grid(network, size, tile[0] if tile and len(tile) == 1 else tile, options.overlap)
    network.topology.pruned(network.topology.heads[-1] if options.level is None else options.level)
    normalisation = network.normalisation or STANDARD  # also for another library's weights, which carry none
    prepared = [prediction_files.Prepared(source, image, normalisation) for image in images]
    shape = (network.out_channels, *source.shape)
    masks = prediction_files.spool(
        (1, *source.shape) if exclusive else shape, np.uint8 if exclusive else np.bool_, options.out
    )
    probabilities = prediction_files.spool(shape, np.float32, options.out) if options.probabilities else None
    kept = source.parts(probabilities) if options.probabilities else [None] * len(images)
    bar = messages.shown() and sys.stderr.isatty() and any(len(axis) > 1 for axis in grid)
    for image, mask, values in zip(prepared, source.parts(masks), kept, strict=True):
        for first, band in _bands(job, image, size, grid, progress=bar, **chosen):
            rows = slice(first, first + band.shape[1])
            mask[:, rows] = band.argmax(axis=0, keepdims=True) if exclusive else band > options.threshold
            if values is not None:
                values[:, rows] = band
    return masks, probabilities


def _bands(
    job: Job, image: prediction_files.Prepared, size: Sequence[int], grid: Sequence[tiled_prediction.Axis], **chosen: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """As `tiled_prediction.bands`, first row and rows of one image, which the network sees in the size `size`; resampled
    volumes lie in temporary files."""
    given, network, out = image.shape[2:], job.network, job.options.out
    source: Any = image
    if size != given:
        source = resampled(image, size, prediction_files.spool((image.shape[1], *size), np.float32, out))[None]
    found = tiled_prediction.bands(network, source, grid, **chosen)
    if size == given:
        yield from ((first, band.numpy()) for _, first, band in found)
        return
    whole = prediction_files.spool((network.out_channels, *size), np.float32, out)
    for _, first, band in found:
        whole[:, first : first + band.shape[1]] = band.numpy()
    yield from ((index, plane[:, None]) for index, plane in enumerate(planes(whole[None], given)))


def _predict_scaled(
    network: AnyNetwork | Ensemble, source: prediction_files.Source, options: argparse.Namespace, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `_predict_file`, for a model that was trained on images scaled to `side` x `side` pixels."""
    device = next(network.parameters()).device
    probabilities = np.zeros((network.out_channels, *source.shape), np.float32)
    for image, part in zip(source.images(), source.parts(probabilities), strict=True):
        small = scaled(source.stored.real(image).astype(np.float32), (side, side))
        x = torch.from_numpy(standardise(small))[None].to(device)
        prediction = network.predict(x, mode=options.mode, level=options.level, flips=options.flips)[0]
        part[:] = scaled(prediction.cpu().numpy(), image.shape[1:])
    return probabilities > options.threshold, probabilities
