"""`unetpp-fast train`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from ..architecture.input_checks import check_input
from ..architecture.options import NORMS, UPSAMPLES
from ..architecture.precision import choose_dtype
from ..common import atomic_files
from ..common.devices import choose_device
from ..common.errors import InputError
from ..common.version import __version__
from ..data.layouts import Folder, read_folder, read_names
from ..data.patches import Patches
from ..data.samples import check_samples, groups, split
from ..data.tasks import TASKS
from ..models.architectures import PAPER_FEATURES, parameter_count
from ..models.network import Network
from ..training import captured, checkpoint, memory_budget, processes, run_folder
from ..training.loss_table import LOSSES, choose_loss
from ..training.recipe import Recipe
from ..training.trainer import Interrupted, Trainer
from .arguments import (
    ENCODER_OPTIONS,
    Commands,
    add_command,
    add_device,
    add_task,
    build_network,
    byte_count,
    engine_options,
    label,
    width_list,
)


def add_parser(commands: Commands) -> None:
    """Adds `train` to the commands."""
    train = add_command(commands, "train", run, "Train on a folder of images with masks or label maps.")
    add_device(train)
    train.add_argument(
        "--data", type=Path, required=True, help="a folder with images/ and masks/ (docs/data.md), or the data of --task"
    )
    add_task(train)
    _add_classes(train)
    train.add_argument("--out", type=Path, required=True, help="folder for last.pt, best.pt, log.csv and curves.png")
    train.add_argument("--resume", action="store_true", help="continue the training in --out")
    train.add_argument("--init-from", type=Path, help="begin with the network of this checkpoint, or of another UNet++'s")
    _add_network(train)
    _add_encoder(train)
    train.add_argument("--epochs", type=int, default=100, help="the largest number of epochs")
    batch = train.add_mutually_exclusive_group()
    batch.add_argument("--batch-size", type=int, default=8, help="patches per step, over all processes together")
    batch.add_argument("--max-memory", type=byte_count, help="8G: choose the largest batch that needs no more per process")
    train.add_argument("--accumulate", type=int, default=1, help="micro-batches per batch; more of them save memory")
    train.add_argument("--recompute", action="store_true", help="recompute maps in the backward pass, to save memory")
    train.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, default=True,
        help="on a GPU: steps as CUDA graphs, one launch each (default: yes, without --max-memory)",
    )  # fmt: skip
    train.add_argument(
        "--reproducible", action="store_true", help="on a CPU: the same weights for any number of processes and threads"
    )
    train.add_argument("--learning-rate", type=float, default=3e-4, help="of Adam")
    train.add_argument("--patience", type=int, default=20, help="epochs without a better validation IoU before it stops")
    train.add_argument(
        "--patch", type=int, default=argparse.SUPPRESS, help="side of the random patches (default: 96, or the task's)"
    )
    train.add_argument(
        "--patches-per-image", type=int, default=argparse.SUPPRESS,
        help="patches per image and epoch (default: 4, or the task's)",
    )  # fmt: skip
    train.add_argument("--val-fraction", type=float, default=0.2, help="share of the images for validation")
    train.add_argument("--seed", type=int, default=0, help="of the weights, the patches and the validation images")
    train.add_argument("--workers", type=int, default=0, help="processes that read images ahead")
    train.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard too")


def _add_classes(train: argparse.ArgumentParser) -> None:
    """Adds the options of the loss and of label maps."""
    train.add_argument("--loss", choices=list(LOSSES), help="default: bce-dice for masks, ce-dice for label maps")
    train.add_argument("--classes", type=Path, help="names.txt or .json: the classes of label maps, that of 0 first")
    train.add_argument("--ignore-index", type=label, default=255, help="value of label maps that is left out, or none")


def _add_network(train: argparse.ArgumentParser) -> None:
    """Adds the options of the network. Those with SUPPRESS get their defaults from `with_defaults`."""
    train.add_argument("--arch", "--model", choices=list(PAPER_FEATURES), default="unet++", help="the network")
    train.add_argument(
        "--features", type=width_list, default=argparse.SUPPRESS,
        help="widths, finest level first (default: the paper's)",
    )  # fmt: skip
    train.add_argument(
        "--norm", choices=["none", *engine_options(NORMS)], default=argparse.SUPPRESS,
        help="norm after each convolution (default: batch; with --task: none)",
    )  # fmt: skip
    train.add_argument(
        "--upsample", choices=engine_options(UPSAMPLES), default=argparse.SUPPRESS,
        help="up-sampling (default: deconv; over an encoder nearest)",
    )  # fmt: skip
    train.add_argument("--dropout", type=float, default=argparse.SUPPRESS, help="probability (default: 0; with --task: 0.5)")
    train.add_argument(
        "--deep-supervision", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="a head at each depth of UNet++, needed to prune it (default: yes; with --task: no)",
    )  # fmt: skip


def _add_encoder(train: argparse.ArgumentParser) -> None:
    """Adds the options of a network over an encoder."""
    train.add_argument("--encoder", help="a name of timm, such as resnet34, in place of --features: UNet++ over it")
    train.add_argument("--encoder-weights", help="imagenet, or a file with its weights (default: none)")
    train.add_argument("--encoder-depth", type=int, help="the number of its maps (default: 5)")
    train.add_argument("--decoder-channels", type=width_list, help="widths, deepest first (default: 256,128,64,32,16)")
    train.add_argument("--freeze-encoder", action="store_true", help="train everything but the encoder")


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """The options of `train`, with the defaults that depend on --task and --arch."""
    nested = options.arch == "unet++"
    defaults = {"norm": "batch", "dropout": 0.0, "patch": 96, "patches_per_image": 4, "deep_supervision": nested}
    if options.task:
        task = TASKS[options.task]
        defaults = {"norm": "none", "dropout": 0.5, "patch": task.patch, "patches_per_image": task.per_image}
        defaults["deep_supervision"] = False
    defaults |= {"features": PAPER_FEATURES[options.arch], "upsample": "nearest" if options.encoder else "deconv"}
    return argparse.Namespace(**{**defaults, **vars(options)})


def run(options: argparse.Namespace) -> int:
    """Trains on a folder and prints where the result is; returns the exit code."""
    _check_encoder(options)
    options = with_defaults(options)
    with processes.joined(options.device) as name:
        device = choose_device(name)
        return _fit(_trainer(options, device, choose_dtype(options.dtype, device)), options)


def _trainer(options: argparse.Namespace, device: torch.device, dtype: str) -> Trainer:
    """The trainer of the options, resumed if they ask for it; prints what it trains."""
    last = options.out / "last.pt"
    if last.exists() and not options.resume:
        raise InputError(f"{options.out} already holds a training: add --resume to continue it, or choose another --out")
    if options.resume and not last.exists():
        raise InputError(f"there is nothing to resume: {last} does not exist")
    recipe = Recipe(
        epochs=options.epochs, batch_size=options.batch_size, learning_rate=options.learning_rate,
        patience=options.patience, seed=options.seed, dtype=dtype, workers=options.workers, accumulate=options.accumulate,
        reproducible=options.reproducible, capture=options.capture and options.max_memory is None,
    )  # fmt: skip
    folder, channels = _read_data(options)
    training, validation = folder.samples, folder.validation
    if validation is None:
        training, validation = split(folder.samples, options.val_fraction, options.seed)
    classes, task = folder.classes, TASKS.get(options.task)
    loss = choose_loss(options.loss, folder.exclusive)
    torch.manual_seed(options.seed)
    extra = {"dropout": options.dropout, "spatial_dims": task.spatial_dims if task else 2}
    if options.arch == "unet++":
        extra["deep_supervision"] = options.deep_supervision
    elif options.deep_supervision:
        raise InputError(f"--deep-supervision needs the nested nodes of unet++: {options.arch} has one head")
    if options.init_from:
        network = checkpoint.initial_network(options.init_from, channels, len(classes), extra["spatial_dims"]).to(device)
    else:
        if options.resume:
            options.encoder_weights = None  # those of the run are loaded
        network = build_network(options.arch, options, channels, len(classes), **extra).to(device)
    network.recompute = options.recompute
    if options.freeze_encoder:
        network.freeze_encoder()
    patches = Patches(training, options.patch, options.patches_per_image, options.seed)
    _check_patches(network, options)
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
    trainer = Trainer(network, patches, validation, recipe, options.out, about, loss)
    if options.resume:
        trainer.resume()
        _say(f"resuming after epoch {trainer.epoch}" + (f", batch {trainer.step}" if trainer.step else ""))
    if options.capture and not recipe.capture and device.type == captured.DEVICE:
        _say("--max-memory: steps are computed kernel by kernel, because CUDA graphs keep their memory between steps")
    name = f"{options.arch} over {options.encoder}" if options.encoder else options.arch
    together = f", {processes.size()} processes" if processes.size() > 1 else ""
    _say(
        f"{name}: {parameter_count(network):,} parameters, {len(training)} images to train, "
        f"{len(validation)} to validate, {channels} channel(s), classes {', '.join(classes)}, {device}, {dtype}{together}"
    )
    return trainer


def _read_data(options: argparse.Namespace) -> tuple[Folder, int]:
    """The samples that the options name, and the number of channels of the images; says what was found."""
    if options.task:
        if options.classes:
            raise InputError("--classes names the values of label maps: leave it out with --task")
        samples, classes, channels = TASKS[options.task].read(options.data)
        return Folder(samples, classes, ""), channels
    names = read_names(options.classes) if options.classes else None
    folder = read_folder(options.data, names, options.ignore_index)
    _say(folder.found)
    return folder, check_samples([*folder.samples, *(folder.validation or [])])


def _fit(trainer: Trainer, options: argparse.Namespace) -> int:
    """Runs a training and writes its folder; returns the exit code."""
    last, report = options.out / "last.pt", None
    if processes.is_first():
        report = run_folder.Report(options.out, trainer.history, options.tensorboard)
        if not (options.out / "config.json").exists():
            settings = {key: value for key, value in vars(options).items() if key not in ("run", "command", "resume")}
            about = {"version": __version__, "torch": torch.__version__, "processes": processes.size()}
            recipe = {**asdict(trainer.recipe), "device": str(trainer.device)}
            run_folder.write_config(options.out / "config.json", {**settings, **recipe, **about})
    try:
        trainer.fit(after_epoch=report)
    except Interrupted:
        if processes.is_first():
            print(f"stopped; its state is in {last}: the same command with --resume continues", file=sys.stderr)
        return 130
    finally:
        if report:
            report.close()
    _say(f"best validation IoU {trainer.best:.4f}: {options.out / 'best.pt'}; log: {options.out / 'log.csv'}")
    if processes.is_first() and "exclusive" in trainer.about and (options.out / "best.pt").exists():
        _say(_per_class(checkpoint.load_checkpoint(options.out / "best.pt")))
    return 0


def _per_class(content: dict) -> str:
    """The scores of the best epoch, a line per class; a class that occurs nowhere has none."""
    rows = zip(content["about"]["classes"], content["scores"]["class_iou"], content["scores"]["class_dice"], strict=True)
    return "\n".join(
        f"  {name}: " + (f"IoU {iou:.4f}, Dice {dice:.4f}" if iou == iou else "not in the validation images")
        for name, iou, dice in rows
    )


def _say(text: str) -> None:
    if processes.is_first():
        print(text, flush=True)


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
    size = (options.patch,) * network.topology.spatial_dims
    times = recipe.accumulate * processes.size()
    most = -(-len(patches) // times)
    fitting = memory_budget.largest_batch(network, size, options.max_memory, recipe.dtype, most, loss)
    batch_size = min(fitting * times, len(patches))
    _say(f"batches of {batch_size}: {fitting} image(s) at a time fit into {options.max_memory / 2**20:.0f}M")
    return replace(recipe, batch_size=batch_size)


def _check_encoder(options: argparse.Namespace) -> None:
    """Raises InputError for options that do not go with --encoder, or without it."""
    if options.encoder is None:
        given = [name for name in (*ENCODER_OPTIONS, "freeze_encoder") if getattr(options, name)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} needs --encoder")
    elif options.arch != "unet++" or hasattr(options, "features"):
        what = "--features" if hasattr(options, "features") else f"--arch {options.arch}"
        raise InputError(f"--encoder does not go with {what}: it makes a unet++ as wide as the encoder's maps")
    elif options.reproducible:
        raise InputError("--reproducible does not go with --encoder, whose layers are another library's")


def _check_patches(network: Network, options: argparse.Namespace) -> None:
    """Raises InputError unless --patch and --patches-per-image suit the network."""
    multiple = network.multiple
    if options.patch < 1 or options.patch % multiple:
        levels = f"the encoder {options.encoder}" if options.encoder else f"{len(options.features)} levels"
        raise InputError(f"--patch must be a positive multiple of {multiple} for {levels}, not {options.patch}")
    if options.patches_per_image < 1:
        raise InputError(f"--patches-per-image must be at least 1, not {options.patches_per_image}")


def _check_batches(network: Network, patches: Patches, recipe: Recipe) -> None:
    """Raises InputError if the smallest micro-batch, over all processes, has too few values for batch norm."""
    largest = min(recipe.batch_size, len(patches))
    batches = {largest, len(patches) % recipe.batch_size or largest}
    smallest = min(whole // recipe.micro_batch_count(whole, processes.size()) for whole in batches)
    shape = (smallest, network.topology.in_channels, *[patches.patch] * network.topology.spatial_dims)
    try:
        check_input(network, torch.empty(shape, device="meta"))
    except ValueError as error:
        raise InputError(str(error)) from error
