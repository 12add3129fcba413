"""`unetpp-fast train`."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architecture.input_checks import check_input
from ..architecture.precision import choose_dtype
from ..common import atomic_files, messages
from ..common.devices import choose_device
from ..common.errors import InputError
from ..common.version import __version__
from ..data.augmentation import STRONG, Augmentation, read_spec
from ..data.geometry import sides_of, times
from ..data.layouts import read_folder
from ..data.pairs import Folder
from ..data.patches import Patches
from ..data.samples import (
    check_samples,
    class_pixels,
    dataset_normalisation,
    dataset_spacing,
    groups,
    split,
    with_normalisation,
    with_spacing,
)
from ..data.tasks import PATCH, TASKS
from ..models.architectures import parameter_count
from ..models.network import Network
from ..reports import training_run
from ..training import captured, checkpoint, evaluation, loggers, memory_budget, processes, run_folder
from ..training.loss_table import choose_loss
from ..training.recipe import Recipe
from ..training.trainer import Interrupted, Trainer
from ..training.weighted_losses import balanced_weights
from . import config, cross_validation
from .arguments import Commands, add_command, build_network, label_options
from .training_options import BATCH, add_options, check_encoder, with_defaults


def add_parser(commands: Commands) -> None:
    """Adds `train` to the commands."""
    text = "Train on a folder of images with masks or label maps."
    train = add_command(commands, "train", run, text, usage="--data DATA --out RUN")
    add_options(train)


def run(options: argparse.Namespace) -> int:
    """Trains on a folder and prints where the result is; returns the exit code."""
    check_encoder(options)
    cross_validation.check(options)
    options = with_defaults(options)
    if options.config and "out" not in options.given and not options.resume:
        options.out = _free_folder(options.out)
    with processes.joined(options.device) as name:
        device = choose_device(name)
        recipe = _recipe(options, choose_dtype(options.dtype, device))
        if options.folds is None:
            _check_out(options)
        folder, channels = _read_data(options)
        cross_validation.check_data(options, folder)
        if options.patch is None:
            options.patch = PATCH[folder.spatial_dims]
        if options.batch_size is None and not options.task:
            recipe = replace(recipe, batch_size=BATCH[folder.spatial_dims])

        def train(job: argparse.Namespace, part: Folder) -> int:
            return _fit(_trainer(job, recipe, part, channels, device), job)

        if options.folds is not None:
            return cross_validation.run(options, _prepared(folder, options), _check_out, train, _say)
        return train(options, folder)


def _free_folder(out: Path) -> Path:
    """`out`, or if it holds a training the first of `out-2`, `out-3`, … that does not: a file of options is repeated."""
    names = (out.with_name(f"{out.name}-{number}") if number > 1 else out for number in itertools.count(1))
    taken = ("last.pt", cross_validation.FILE)
    return next(folder for folder in names if not any((folder / name).exists() for name in taken))


def _check_out(options: argparse.Namespace) -> None:
    """Raises InputError if --out holds a training that is not to be resumed, or none that is."""
    last = options.out / "last.pt"
    if last.exists() and not options.resume:
        raise InputError(f"{options.out} already holds a training: add --resume to continue it, or choose another --out")
    if options.resume and not last.exists():
        raise InputError(f"there is nothing to resume: {last} does not exist")


def _recipe(options: argparse.Namespace, dtype: str) -> Recipe:
    """The recipe of the options. Errors as `Recipe`."""
    batch_size = BATCH[2] if options.batch_size is None else options.batch_size
    return Recipe(
        epochs=options.epochs, batch_size=batch_size, learning_rate=options.learning_rate,
        patience=options.patience, seed=options.seed, dtype=dtype, workers=options.workers, accumulate=options.accumulate,
        reproducible=options.reproducible, capture=options.capture and options.max_memory is None,
        optimizer=options.optimizer, weight_decay=options.weight_decay, schedule=options.schedule, warm_up=options.warm_up,
        clip=options.clip, ema=options.ema, monitor=options.monitor,
    )  # fmt: skip


def _loss(options: argparse.Namespace, folder: Folder) -> nn.Module:
    """The loss of the options, its class weights taken from the training images if they ask for it.

    Raises:
        InputError: an option does not fit the data.
    """
    weights = options.class_weights
    if weights == "balanced":
        weights = balanced_weights(class_pixels(folder.samples), folder.classes)
        shown = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(folder.classes, weights, strict=True))
        _say(f"weights of the classes: {shown}")
    elif weights is not None and len(weights) != len(folder.classes):
        names = ", ".join(folder.classes)
        raise InputError(f"--class-weights gives {len(weights)} numbers for {len(folder.classes)} classes: {names}")
    settings = {"background": options.background, "head_weights": options.head_weights}
    return choose_loss(options.loss, folder.exclusive, weights=weights, **settings)


def _trainer(options: argparse.Namespace, recipe: Recipe, folder: Folder, channels: int, device: torch.device) -> Trainer:
    """The trainer of the options, resumed if they ask for it; prints what it trains."""
    if folder.validation is None:
        training, validation = split(folder.samples, options.val_fraction, options.seed)
        folder = replace(folder, samples=training, validation=validation)
    if options.folds is None:
        folder = _prepared(folder, options)
    training, validation = folder.samples, folder.validation
    classes, task = folder.classes, TASKS.get(options.task)
    loss = _loss(options, folder)
    torch.manual_seed(options.seed)
    extra = {"dropout": options.dropout, "spatial_dims": folder.spatial_dims}
    if options.arch == "unet++":
        extra["deep_supervision"] = options.deep_supervision
    elif options.deep_supervision:
        raise InputError(f"--deep-supervision needs the nested nodes of unet++: {options.arch} has one head")
    network: Any
    if options.init_from:
        network = checkpoint.initial_network(options.init_from, channels, len(classes), extra["spatial_dims"]).to(device)
    else:
        if options.resume:
            options.encoder_weights = None  # those of the run are loaded
        network = build_network(options.arch, options, channels, len(classes), **extra).to(device)
    network.recompute = options.recompute
    if options.freeze_encoder:
        network.freeze_encoder()
    _check_patches(network, options)
    patches = _patches(training, folder, network.topology.spatial_dims, options)
    recipe = _with_batch_size(recipe, network, patches, options, loss)
    _check_batches(network, patches, recipe)
    atomic_files.check_folder(options.out)
    about = {
        "classes": classes,
        "patch": options.patch,
        "patches_per_image": options.patches_per_image,
        "training": groups(training),
        "validation": groups(validation),
        "prepare": task.prepare if task else {},
    }
    if folder.exclusive:
        about |= {"exclusive": True, "palette": folder.palette, "ignore": folder.ignore}
    about |= _augmented(patches)
    if folder.channel_files:
        about["channel_files"] = folder.channel_files
    validating = {"max_memory": options.max_memory or evaluation.MEMORY, "surface": options.surface}
    trainer = Trainer(network, patches, validation, recipe, options.out, about, loss, **validating)
    if options.resume:
        trainer.resume()
        _say(f"resuming after epoch {trainer.epoch}" + (f", batch {trainer.step}" if trainer.step else ""))
    if options.capture and not recipe.capture and device.type == captured.DEVICE:
        _say("--max-memory: steps are computed kernel by kernel, because CUDA graphs keep their memory between steps")
    name = f"{options.arch} over {options.encoder}" if options.encoder else options.arch
    together = f"{device}, {recipe.dtype}" + (f", {processes.size()} processes" if processes.size() > 1 else "")
    what = "volumes" if folder.spatial_dims == 3 else "images"
    _say(
        f"{name}: {parameter_count(network):,} parameters, {len(training)} {what} to train, "
        f"{len(validation)} to validate, {channels} channel(s), classes {', '.join(classes)}, {together}"
    )
    return trainer


def _prepared(folder: Folder, options: argparse.Namespace) -> Folder:
    """The folder with its images prepared as --normalise and --spacing say, by those to train on: all folds alike, as in
    nnU-Net."""
    parts = folder.samples, folder.validation
    if options.normalise == "dataset":
        normalisation = dataset_normalisation(folder.samples)
        parts = tuple(part and with_normalisation(part, normalisation) for part in parts)
    if options.spacing is not None:
        spacing = dataset_spacing(folder.samples) if options.spacing == "median" else options.spacing
        parts = tuple(part and with_spacing(part, spacing) for part in parts)
        _say(f"volumes are resampled to voxels of {times(spacing)} mm")
    return replace(folder, samples=parts[0], validation=parts[1])


def _patches(training: list, folder: Folder, spatial_dims: int, options: argparse.Namespace) -> Patches:
    """The patches of the options, which change at random as --augment says."""
    transform = None
    if options.augment not in ("none", "light"):
        spec = STRONG[spatial_dims] if options.augment == "strong" else read_spec(options.augment)
        transform = Augmentation(spec, spatial_dims, options.patch)
    return Patches(
        training, options.patch, options.patches_per_image, options.seed, augment=options.augment in ("light", "strong"),
        transform=transform, foreground=options.foreground, background=0 if folder.exclusive else None,
        outside=0 if folder.exclusive and folder.ignore is None else None, cache=options.cache_memory,
    )  # fmt: skip


def _augmented(patches: Patches) -> dict[str, Any]:
    """What a checkpoint says of the patches, so that a run is resumed with the same: nothing if they are the usual ones."""
    about: dict[str, Any] = {} if patches.augment else {"flips": False}
    if patches.transform:
        about["transforms"] = patches.transform.spec
    return about | ({"foreground": patches.foreground} if patches.foreground else {})


def _read_data(options: argparse.Namespace) -> tuple[Folder, int]:
    """The samples that the options name, and the number of channels of the images; says what was found."""
    names, ignore = label_options(options)
    if options.task and options.spacing:
        raise InputError("--spacing does not go with --task, whose volumes are read as the paper did")
    if options.task:
        samples, classes, channels = TASKS[options.task].read(options.data)
        return Folder(samples, classes, "", spatial_dims=TASKS[options.task].spatial_dims), channels
    folder = read_folder(options.data, names, ignore, 0 if options.folds else options.fold or 0)
    _say(folder.found)
    if options.spacing and folder.spatial_dims != 3:
        raise InputError(f"--spacing resamples volumes, and {options.data} holds images: leave it out")
    return folder, check_samples([*folder.samples, *(folder.validation or [])])


def _fit(trainer: Trainer, options: argparse.Namespace) -> int:
    """Runs a training and writes its folder; returns the exit code."""
    last, report = options.out / "last.pt", None
    if processes.is_first():
        settings = config.settings(options, **_instead(options, trainer))
        wanted = dict.fromkeys([*options.log, *(["tensorboard"] if options.tensorboard else [])])
        started = loggers.start(wanted, options.out, settings, len(trainer.history))
        report = run_folder.Report(options.out, trainer.history, started)
        if not (options.out / "config.json").exists():
            about = {"version": __version__, "torch": torch.__version__, "processes": processes.size()}
            recipe = {**asdict(trainer.recipe), "device": str(trainer.device)}
            run_folder.write_config(options.out / "config.json", {**config.settings(options), **recipe, **about})
            config.write(options.out / "run.yaml", options, **_instead(options, trainer))
    failed = True
    try:
        trainer.fit(progress=messages.shown(), after_epoch=report)
        failed = False
    except Interrupted:
        if processes.is_first():
            print(f"stopped; its state is in {last}: the same command with --resume continues", file=sys.stderr)
            training_run.write_if_possible(trainer, settings, stopped=True)
        return 130
    finally:
        if report:
            report.close(failed)
    score = {"iou": "IoU", "dice": "Dice"}.get(trainer.recipe.monitor, trainer.recipe.monitor)
    _say(f"best validation {score} {trainer.best:.4f}: {options.out / 'best.pt'}; log: {options.out / 'log.csv'}")
    if processes.is_first():
        _say(f"report: {training_run.write_if_possible(trainer, settings)}")
    if processes.is_first() and len(trainer.about["classes"]) > 1 and (options.out / "best.pt").exists():
        _say(_per_class(checkpoint.load_checkpoint(options.out / "best.pt")))
    return 0


def _instead(options: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    """What stands in `run.yaml`, by which --config repeats the training, in place of the options: None for nothing."""
    instead: dict[str, Any] = {"batch_size": trainer.recipe.batch_size, "max_memory": None}
    instead |= {"out": options.out.parent} if options.folds else {}
    instead |= {"spacing": trainer.network.spacing} if options.spacing else {}
    return {**instead, "features": None} if options.encoder or options.init_from else instead


def _per_class(content: dict) -> str:
    """The scores of the best epoch, a line per class; a class that occurs nowhere has none, nor have runs of before."""
    scores = content.get("scores", {"class_iou": [], "class_dice": []})
    rows = zip(content["about"]["classes"], scores["class_iou"], scores["class_dice"], strict="scores" in content)
    return "\n".join(
        f"  {name}: " + (f"IoU {iou:.4f}, Dice {dice:.4f}" if iou == iou else "not in the validation images")
        for name, iou, dice in rows
    )


def _say(text: str) -> None:
    if processes.is_first():
        messages.say(text)


def _with_batch_size(
    recipe: Recipe, network: Network, patches: Patches, options: argparse.Namespace, loss: nn.Module
) -> Recipe:
    """The recipe with the largest batch that --max-memory, per process, allows; a resumed run keeps its batch size."""
    if options.max_memory is None:
        return recipe
    if options.reproducible:
        raise InputError("--max-memory chooses a batch by the number of processes: give --batch-size with --reproducible")
    if options.resume:
        before = checkpoint.load_checkpoint(options.out / "last.pt").get("recipe", {})
        return replace(recipe, batch_size=before.get("batch_size", recipe.batch_size))
    size = sides_of(options.patch, network.topology.spatial_dims)
    times = recipe.accumulate * processes.size()
    most = -(-len(patches) // times)
    average = sum(tensor.nbytes for tensor in network.state_dict().values()) if recipe.ema else 0
    fitting = memory_budget.largest_batch(network, size, options.max_memory - average, recipe.dtype, most, loss)
    batch_size = min(fitting * times, len(patches))
    _say(f"batches of {batch_size}: {fitting} image(s) at a time fit into {options.max_memory / 2**20:.0f}M")
    return replace(recipe, batch_size=batch_size)


def _check_patches(network: Network, options: argparse.Namespace) -> None:
    """Raises InputError unless --patch and --patches-per-image suit the network."""
    patch, dims = options.patch, network.topology.spatial_dims
    if not isinstance(patch, int) and len(patch) != dims:
        raise InputError(f"--patch gives {len(patch)} sides, but the data is {dims}D: give one, or {dims} of them")
    sides, multiples = ((number,) * dims if isinstance(number, int) else number for number in (patch, network.multiples))
    if any(side < 1 or side % step for side, step in zip(sides, multiples, strict=True)):
        levels = f"the encoder {options.encoder}" if options.encoder else f"{len(options.features)} levels"
        levels = f"the network of {options.init_from}" if options.init_from else levels
        steps, given = (",".join(map(str, dict.fromkeys(s) if len(set(s)) == 1 else s)) for s in (multiples, sides))
        raise InputError(f"--patch must be a positive multiple of {steps} for {levels}, not {given}")
    if options.patches_per_image < 1:
        raise InputError(f"--patches-per-image must be at least 1, not {options.patches_per_image}")


def _check_batches(network: Network, patches: Patches, recipe: Recipe) -> None:
    """Raises InputError if the smallest micro-batch, over all processes, has too few values for batch norm."""
    largest = min(recipe.batch_size, len(patches))
    batches = {largest, len(patches) % recipe.batch_size or largest}
    smallest = min(whole // recipe.micro_batch_count(whole, processes.size()) for whole in batches)
    shape = (smallest, network.topology.in_channels, *sides_of(patches.patch, network.topology.spatial_dims))
    try:
        check_input(network, torch.empty(shape, device="meta"))
    except ValueError as error:
        raise InputError(str(error)) from error
