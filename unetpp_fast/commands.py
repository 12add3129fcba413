"""What `unetpp-fast train`, `unetpp-fast predict` and `unetpp-fast bench` do."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from . import __version__, budget, data, files, pictures, processes, readers, runs, tiles, volumes
from .checks import check_input
from .data import Patches
from .files import InputError
from .models import Network, UNet, UNetPlusPlus, parameter_count
from .recipe import Recipe, autocast
from .tasks import FOLDER, TASKS
from .training import Interrupted, Trainer


def train(options: argparse.Namespace, device: torch.device, dtype: str) -> int:
    """Trains on a folder and prints where the result is; returns the exit code."""
    last = options.out / "last.pt"
    if last.exists() and not options.resume:
        raise InputError(f"{options.out} already holds a training: add --resume to go on with it, or choose another --out")
    if options.resume and not last.exists():
        raise InputError(f"there is nothing to resume: {last} does not exist")
    recipe = Recipe(
        epochs=options.epochs, batch_size=options.batch_size, learning_rate=options.learning_rate,
        patience=options.patience, seed=options.seed, dtype=dtype, workers=options.workers, accumulate=options.accumulate,
        reproducible=options.reproducible,
    )  # fmt: skip
    task = TASKS[options.task] if options.task else FOLDER
    samples, classes, channels = task.read(options.data)
    training, validation = data.split(samples, options.val_fraction, options.seed)
    torch.manual_seed(options.seed)
    extra = {"dropout": options.dropout, "spatial_dims": task.spatial_dims}
    if options.arch == "unet++":
        extra["deep_supervision"] = options.deep_supervision
    elif options.deep_supervision:
        raise InputError(f"--deep-supervision needs the nested nodes of unet++: {options.arch} has one head")
    network = _build(options.arch, options, channels, len(classes), **extra).to(device)
    network.recompute = options.recompute
    patches = Patches(training, options.patch, options.patches_per_image, options.seed)
    _check_patches(network, patches, options)
    recipe = _sized(recipe, network, patches, options)
    _check_batches(network, patches, recipe)
    files.check_folder(options.out)
    about = {
        "classes": classes,
        "patch": options.patch,
        "patches_per_image": options.patches_per_image,
        "training": data.groups(training),
        "validation": data.groups(validation),
        "prepare": task.prepare,
    }
    trainer = Trainer(network, patches, validation, recipe, options.out, about)
    if options.resume:
        trainer.resume()
        _say(f"resuming after epoch {trainer.epoch}" + (f", batch {trainer.step}" if trainer.step else ""))
    together = f", {processes.size()} processes" if processes.size() > 1 else ""
    _say(
        f"{options.arch}: {parameter_count(network):,} parameters, {len(training)} images to train, "
        f"{len(validation)} to validate, {channels} channel(s), classes {', '.join(classes)}, {device}, {dtype}{together}"
    )
    return _fit(trainer, options)


def _fit(trainer: Trainer, options: argparse.Namespace) -> int:
    """Runs a training and keeps its folder; returns the exit code."""
    last, report = options.out / "last.pt", None
    if processes.is_first():
        report = runs.Report(options.out, trainer.history, options.tensorboard)
        if not (options.out / "config.json").exists():
            settings = {key: value for key, value in vars(options).items() if key not in ("run", "command", "resume")}
            about = {"version": __version__, "torch": torch.__version__, "processes": processes.size()}
            recipe = {**asdict(trainer.recipe), "device": str(trainer.device)}
            runs.write_config(options.out / "config.json", {**settings, **recipe, **about})
    try:
        trainer.fit(after_epoch=report)
    except Interrupted:
        if processes.is_first():
            print(f"stopped; everything is in {last}: the same command with --resume goes on", file=sys.stderr)
        return 130
    finally:
        if report:
            report.close()
    _say(f"best validation IoU {trainer.best:.4f}: {options.out / 'best.pt'}; log: {options.out / 'log.csv'}")
    return 0


def _say(text: str) -> None:
    if processes.is_first():
        print(text, flush=True)


def _sized(recipe: Recipe, network: Network, patches: Patches, options: argparse.Namespace) -> Recipe:
    """The recipe with the batch that `--max-memory`, of each process, allows; a run that is resumed keeps its own."""
    if options.max_memory is None:
        return recipe
    if options.reproducible:
        raise InputError("--max-memory chooses another batch for other processes: give --batch-size with --reproducible")
    if options.resume:
        before = files.load_checkpoint(options.out / "last.pt").get("recipe", {})
        return replace(recipe, batch_size=before.get("batch_size", recipe.batch_size))
    size = (options.patch,) * network.topology.spatial_dims
    times = recipe.accumulate * processes.size()
    most = -(-len(patches) // times)
    fitting = budget.largest_batch(network, size, options.max_memory, recipe.dtype, most)
    found = min(fitting * times, len(patches))
    _say(f"batches of {found}: {fitting} image(s) at a time fit into {options.max_memory / 2**20:.0f}M")
    return replace(recipe, batch_size=found)


def _build(model: str, options: argparse.Namespace, channels: int, classes: int, **extra) -> Network:
    arguments = {
        "features": options.features,
        "norm": None if options.norm == "none" else options.norm,
        "upsample": options.upsample,
        **extra,
    }
    try:
        return (UNetPlusPlus if model == "unet++" else UNet)(channels, classes, **arguments)
    except ValueError as error:
        raise InputError(str(error)) from error


def _check_patches(network: Network, patches: Patches, options: argparse.Namespace) -> None:
    multiple = network.topology.multiple
    if options.patch < 1 or options.patch % multiple:
        raise InputError(
            f"--patch must be a positive multiple of {multiple} for {len(options.features)} levels, not {options.patch}"
        )
    if options.patches_per_image < 1:
        raise InputError(f"--patches-per-image must be at least 1, not {options.patches_per_image}")


def _check_batches(network: Network, patches: Patches, recipe: Recipe) -> None:
    """Raises InputError if batch norm has too little of the smallest part of a batch, over all processes."""
    largest = min(recipe.batch_size, len(patches))
    batches = {largest, len(patches) % recipe.batch_size or largest}
    smallest = min(whole // recipe.parts(whole, processes.size()) for whole in batches)
    shape = (smallest, network.topology.in_channels, *[patches.patch] * network.topology.spatial_dims)
    try:
        check_input(network, torch.empty(shape, device="meta"))
    except ValueError as error:
        raise InputError(str(error)) from error


def predict(options: argparse.Namespace, device: torch.device, dtype: str) -> None:
    """Writes `masks/<class>/<id>`, with --probabilities those too, in each file's format, and overlays of pictures."""
    if not 0.0 <= options.threshold <= 1.0:
        raise InputError(f"--threshold must lie between 0 and 1, not {options.threshold}")
    network, content = files.load_model(options.checkpoint, device)
    classes = _classes(network, content)
    prepare = (content.get("about") or {}).get("prepare", {})
    images = volumes.find(options.images)
    tqdm = files.need("tqdm", "commands").tqdm
    for name, path in tqdm(images.items(), desc="predicting", unit="file", disable=None):
        source = volumes.read(path, network.topology.spatial_dims, network.topology.in_channels)
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
            files.write_png(options.out / "overlays" / f"{name}.png", pictures.overlay(source.values, masks))
    overlays = f", {options.out / 'overlays'}" if source.is_picture else ""
    print(f"{len(images)} image(s): {options.out / 'masks'}{overlays}")


def _classes(network: Network, content: dict) -> list[str]:
    """The names of the classes, which become names of folders."""
    about = content.get("about") or {}
    classes = about.get("classes") or [str(index) for index in range(network.out_channels)]
    plain = isinstance(classes, list) and all(
        isinstance(name, str) and Path(name).name == name and name not in ("", "..") for name in classes
    )
    if not plain or len(classes) != network.out_channels:
        raise InputError(f"the checkpoint's classes are {classes!r}: expected {network.out_channels} plain name(s)")
    return classes


def _predict_file(
    network: Network, source: volumes.Source, options: argparse.Namespace, prepare: dict
) -> tuple[np.ndarray, np.ndarray | None]:
    """Masks, bool, and probabilities, float32, `[classes, *S]`, of a file, in memory-mapped files."""
    chosen = {"mode": options.mode, "level": options.level}
    images = source.images()
    size, tile = images[0].shape[1:], options.tile
    if tile is None and options.max_memory is not None:
        tile = tiles.choose_tile(network, size, options.max_memory, chosen)
    grid = tiles.make_grid(network, size, tile[0] if tile and len(tile) == 1 else tile, options.overlap)
    network.topology.pruned(network.topology.heads[-1] if options.level is None else options.level)
    prepared = [volumes.Prepared(source, image, prepare) for image in images]
    shape = (network.out_channels, *source.shape)
    masks = volumes.spool(shape, np.bool_, options.out)
    probabilities = volumes.spool(shape, np.float32, options.out) if options.probabilities else None
    kept = source.parts(probabilities) if options.probabilities else [None] * len(images)
    bar = sys.stderr.isatty() and any(len(axis) > 1 for axis in grid)
    for image, mask, values in zip(prepared, source.parts(masks), kept, strict=True):
        for _, first, band in tiles.bands(network, image, grid, progress=bar, **chosen):
            rows = slice(first, first + band.shape[1])
            mask[:, rows] = (band > options.threshold).numpy()
            if values is not None:
                values[:, rows] = band.numpy()
    return masks, probabilities


def _predict_scaled(
    network: Network, source: volumes.Source, options: argparse.Namespace, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `_predict_file` for a model trained on images scaled to `side` x `side` pixels: scaled likewise, and back again."""
    device = next(network.parameters()).device
    probabilities = np.zeros((network.out_channels, *source.shape), np.float32)
    for image, part in zip(source.images(), source.parts(probabilities), strict=True):
        small = readers.scaled(image.astype(np.float32), (side, side))
        x = torch.from_numpy(data.standardise(small))[None].to(device)
        found = network.predict(x, mode=options.mode, level=options.level)[0]
        part[:] = readers.scaled(found.cpu().numpy(), image.shape[1:])
    return probabilities > options.threshold, probabilities


def bench(options: argparse.Namespace, device: torch.device, dtype: str) -> None:
    """Prints time, memory and the largest batch of PyTorch, PyTorch compiled and this package, for one network."""
    from . import bench_report

    if options.batch < 1:
        raise InputError(f"--batch must be at least 1, not {options.batch}")
    if not 0 < options.seconds < float("inf"):
        raise InputError(f"--seconds must be positive and finite, not {options.seconds}")
    network = _benched(options)
    shape = (options.batch, network.topology.in_channels, *options.size)
    try:
        check_input(network.train(), torch.empty(shape, device="meta"))
    except ValueError as error:
        raise InputError(str(error)) from error
    for line in bench_report.report(network, options.size, options.batch, dtype, device, options.seconds):
        print(line)


def _benched(options: argparse.Namespace) -> Network:
    """The network of a checkpoint or of the options, pruned if that is asked for."""
    if options.checkpoint:
        network, _ = files.load_model(options.checkpoint)
    else:
        extra = {"spatial_dims": len(options.size)}
        if options.arch == "unet++":
            extra["deep_supervision"] = True
        network = _build(options.arch, options, 1, 1, **extra)
    try:
        return network if options.level is None else network.prune(options.level)
    except ValueError as error:
        raise InputError(str(error)) from error
