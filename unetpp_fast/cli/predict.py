"""`unetpp-fast predict`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from ..architecture.precision import autocast, choose_dtype
from ..common.devices import choose_device
from ..common.errors import InputError
from ..common.progress import progress_bar
from ..data import prediction_files
from ..data.images import scaled, standardise, write_png
from ..experiments import pictures
from ..models import tiled_prediction
from ..models.network import Network
from ..training import checkpoint
from .arguments import Commands, add_command, add_device, byte_count, tile_size


def add_parser(commands: Commands) -> None:
    """Adds `predict` to the commands."""
    predict = add_command(commands, "predict", run, "Write a mask per class and image, in the image's format.")
    add_device(predict)
    predict.add_argument("--checkpoint", type=Path, required=True, help="best.pt, or another UNet++'s weights")
    predict.add_argument("--images", type=Path, required=True, help="an image, volume or stack of planes, or a folder")
    predict.add_argument("--out", type=Path, required=True, help="folder for masks/<class>/<id>, overlays/<id>.png")
    predict.add_argument("--mode", choices=["accurate", "fast"], default="accurate", help="mean over the heads, or one head")
    predict.add_argument("--level", type=int, help="head to use (fast) or the last to use (accurate); default: the deepest")
    predict.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is foreground")
    predict.add_argument("--probabilities", action="store_true", help="write probabilities/<class>/<id> too")
    predict.add_argument("--tile", type=tile_size, help="predict in tiles of this size: 512, or 32x256x256 in 3D")
    predict.add_argument("--overlap", type=float, default=0.25, help="share of a tile that overlaps its neighbour")
    predict.add_argument(
        "--max-memory", type=byte_count, help="512M, 2G: choose tiles that need no more; default: one tile per image"
    )


def run(options: argparse.Namespace) -> None:
    """Writes `masks/<class>/<id>` and, if asked for, probabilities in the format of each file; overlays of pictures."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if not 0.0 <= options.threshold <= 1.0:
        raise InputError(f"--threshold must be between 0 and 1, not {options.threshold}")
    network, content = checkpoint.load_model(options.checkpoint, device)
    classes = class_names(network, content)
    prepare = (content.get("about") or {}).get("prepare", {})
    images = prediction_files.find(options.images)
    for name, path in progress_bar(images.items(), desc="predicting", unit="file", disable=None):
        source = prediction_files.read(path, network.topology.spatial_dims, network.topology.in_channels)
        try:
            with autocast(device, dtype):
                if "size" in prepare:
                    masks, probabilities = _predict_scaled(network, source, options, prepare["size"])
                else:
                    masks, probabilities = _predict_file(network, source, options, prepare)
        except ValueError as error:
            raise InputError(str(error)) from error
        for index, label in enumerate(classes):
            source.write(options.out / "masks" / label, name, masks[index])
            if options.probabilities:
                source.write(options.out / "probabilities" / label, name, probabilities[index])
        if source.is_picture:
            write_png(options.out / "overlays" / f"{name}.png", pictures.overlay(source.values, masks))
    overlays = f", {options.out / 'overlays'}" if source.is_picture else ""
    print(f"{len(images)} image(s): {options.out / 'masks'}{overlays}")


def class_names(network: Network, content: dict) -> list[str]:
    """The names of the classes in a checkpoint, or their numbers.

    Raises:
        InputError: a name cannot be that of a folder, or there are not as many as the network has outputs.
    """
    about = content.get("about") or {}
    classes = about.get("classes") or [str(index) for index in range(network.out_channels)]
    plain = isinstance(classes, list) and all(
        isinstance(name, str) and Path(name).name == name and name not in ("", "..") for name in classes
    )
    if not plain or len(classes) != network.out_channels:
        raise InputError(f"the checkpoint's classes are {classes!r}: expected {network.out_channels} plain name(s)")
    return classes


def _predict_file(
    network: Network, source: prediction_files.Source, options: argparse.Namespace, prepare: dict
) -> tuple[np.ndarray, np.ndarray | None]:
    """Masks, bool, and probabilities, float32 or None, `[classes, *S]`, of a file; both are memory-mapped."""
    chosen = {"mode": options.mode, "level": options.level}
    images = source.images()
    size, tile = images[0].shape[1:], options.tile
    if tile is None and options.max_memory is not None:
        tile = tiled_prediction.choose_tile(network, size, options.max_memory, chosen)
    grid = tiled_prediction.make_grid(network, size, tile[0] if tile and len(tile) == 1 else tile, options.overlap)
    network.topology.pruned(network.topology.heads[-1] if options.level is None else options.level)
    prepared = [prediction_files.Prepared(source, image, prepare) for image in images]
    shape = (network.out_channels, *source.shape)
    masks = prediction_files.spool(shape, np.bool_, options.out)
    probabilities = prediction_files.spool(shape, np.float32, options.out) if options.probabilities else None
    kept = source.parts(probabilities) if options.probabilities else [None] * len(images)
    bar = sys.stderr.isatty() and any(len(axis) > 1 for axis in grid)
    for image, mask, values in zip(prepared, source.parts(masks), kept, strict=True):
        for _, first, band in tiled_prediction.bands(network, image, grid, progress=bar, **chosen):
            rows = slice(first, first + band.shape[1])
            mask[:, rows] = (band > options.threshold).numpy()
            if values is not None:
                values[:, rows] = band.numpy()
    return masks, probabilities


def _predict_scaled(
    network: Network, source: prediction_files.Source, options: argparse.Namespace, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `_predict_file`, for a model that was trained on images scaled to `side` x `side` pixels."""
    device = next(network.parameters()).device
    probabilities = np.zeros((network.out_channels, *source.shape), np.float32)
    for image, part in zip(source.images(), source.parts(probabilities), strict=True):
        small = scaled(image.astype(np.float32), (side, side))
        x = torch.from_numpy(standardise(small))[None].to(device)
        prediction = network.predict(x, mode=options.mode, level=options.level)[0]
        part[:] = scaled(prediction.cpu().numpy(), image.shape[1:])
    return probabilities > options.threshold, probabilities
