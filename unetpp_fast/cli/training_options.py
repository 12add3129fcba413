"""The options of `unetpp-fast train`, in groups, and their defaults that depend on one another."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..architecture.options import NORMS, UPSAMPLES
from ..common.errors import InputError
from ..data.tasks import TASKS
from ..models.architectures import PAPER_FEATURES
from ..training.loggers import LOGGERS
from ..training.loss_table import LOSSES
from ..training.optimizers import LEARNING_RATES, OPTIMIZERS, SCHEDULES
from ..training.recipe import MONITORS
from ..training.weighted_losses import HEAD_WEIGHTS
from .arguments import (
    ENCODER_OPTIONS,
    add_device,
    add_label_maps,
    add_task,
    augmentation,
    byte_count,
    cache_bytes,
    class_weights,
    engine_options,
    patch_size,
    spacing,
    width_list,
)

BATCH = {2: 8, 3: 2}  # patches per step, by the number of axes


def add_options(train: argparse.ArgumentParser) -> None:
    """Adds all options of `train`."""
    _add_data(train)
    _add_patches(train)
    _add_classes(train)
    _add_network(train)
    _add_encoder(train)
    _add_recipe(train)
    _add_machine(train)
    add_device(train)


def _add_data(command: argparse.ArgumentParser) -> None:
    train = command.add_argument_group("data and results")
    train.add_argument(
        "--data", type=Path, required=True, help="a folder with images/ and masks/ (docs/data.md), or the data of --task"
    )
    add_task(train)
    train.add_argument(
        "--out", type=Path, required=True, help="folder for last.pt, best.pt, log.csv, curves.png and report.html"
    )
    train.add_argument("--resume", action="store_true", help="continue the training in --out")
    train.add_argument("--init-from", type=Path, help="begin with the network of this checkpoint, or of another UNet++'s")
    train.add_argument("--val-fraction", type=float, default=0.2, help="share of the images for validation")
    train.add_argument(
        "--folds", type=int, metavar="K", help="train K networks, each validated on another part of the images"
    )
    train.add_argument(
        "--fold", type=int, metavar="NUMBER", help="train only this one of the folds, or of those of the data"
    )
    train.add_argument(
        "--log", nargs="+", choices=list(LOGGERS), default=[], help="log to these too (default: to log.csv alone)"
    )
    train.add_argument("--tensorboard", action="store_true", help="the same as --log tensorboard")


def _add_patches(command: argparse.ArgumentParser) -> None:
    """Adds the options of the patches that a network is trained on."""
    train = command.add_argument_group("patches and augmentation")
    train.add_argument(
        "--patch",
        type=patch_size,
        metavar="SIZE",
        default=argparse.SUPPRESS,
        help="side of the random patches, or one per axis: 32,128,128 (default: 96, of volumes 64, or the task's)",
    )
    train.add_argument(
        "--patches-per-image", type=int, default=argparse.SUPPRESS,
        help="patches per image and epoch (default: 4, or the task's)",
    )  # fmt: skip
    train.add_argument(
        "--augment", type=augmentation, metavar="NAME", default="light",
        help="none, light (flips and 90-degree turns), strong (turns, scale, elastic, contrast, noise), or a YAML file",
    )  # fmt: skip
    train.add_argument(
        "--foreground", type=float, metavar="SHARE", default=0.0,
        help="share of the patches, such as 0.33, that are sure to hold foreground (default: 0)",
    )  # fmt: skip
    train.add_argument(
        "--normalise", choices=["image", "dataset"], default="image",
        help="by mean and standard deviation of each image, or of all images to train on together",
    )  # fmt: skip
    train.add_argument(
        "--spacing", type=spacing, metavar="MM",
        help="resample volumes to voxels of 2.5,0.8,0.8 mm (z, y, x), or the median of those to train on; so does predict",
    )  # fmt: skip


def _add_recipe(command: argparse.ArgumentParser) -> None:
    train = command.add_argument_group("recipe")
    train.add_argument("--epochs", type=int, default=100, help="the largest number of epochs")
    batch = train.add_mutually_exclusive_group()
    batch.add_argument("--batch-size", type=int, help="patches per step, of all processes (default: 8, of own volumes 2)")
    batch.add_argument("--max-memory", type=byte_count, help="8G: choose the largest batch that needs no more per process")
    train.add_argument("--accumulate", type=int, default=1, help="micro-batches per batch; more of them save memory")
    train.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adam", help="sgd has a Nesterov momentum of 0.9")
    train.add_argument(
        "--learning-rate", type=float, metavar="RATE", default=argparse.SUPPRESS,
        help="the largest one (default: 3e-4; with sgd 0.01)",
    )  # fmt: skip
    train.add_argument("--weight-decay", type=float, metavar="FACTOR", default=0.0, help="of the optimizer")
    train.add_argument(
        "--schedule", choices=list(SCHEDULES), default="constant",
        help="how the learning rate falls to 0 over all epochs: as a cosine, or as (1 - t)^0.9 (poly)",
    )  # fmt: skip
    train.add_argument(
        "--warm-up", type=float, metavar="EPOCHS", default=0.0, help="epochs over which the learning rate rises linearly"
    )
    train.add_argument(
        "--clip", type=float, metavar="NORM", default=0.0, help="the largest norm of the gradient; 0 for any (default: 0)"
    )
    train.add_argument(
        "--ema", type=float, metavar="DECAY", default=0.0,
        help="validate and keep a moving average of the weights, such as 0.999 (default: 0, the weights themselves)",
    )  # fmt: skip
    train.add_argument(
        "--monitor", choices=list(MONITORS), default="iou", help="the validation score that chooses the best epoch"
    )
    train.add_argument("--patience", type=int, default=20, help="epochs without a better score before it stops")
    train.add_argument("--seed", type=int, default=0, help="of the weights, the patches and the validation images")


def _add_machine(command: argparse.ArgumentParser) -> None:
    train = command.add_argument_group("the machine")
    train.add_argument("--workers", type=int, default=0, help="processes that read images ahead")
    train.add_argument(
        "--cache-memory", type=cache_bytes, metavar="BYTES", default="2G",
        help="8G: what images kept in memory may take, of all workers together; the others are read for each patch; 0: none",
    )  # fmt: skip
    train.add_argument("--recompute", action="store_true", help="recompute maps in the backward pass, to save memory")
    train.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, default=True,
        help="on a GPU: steps as CUDA graphs, one launch each (default: yes, without --max-memory)",
    )  # fmt: skip
    train.add_argument(
        "--reproducible", action="store_true", help="on a CPU: the same weights for any number of processes and threads"
    )


def _add_classes(command: argparse.ArgumentParser) -> None:
    """Adds the options of the loss and of label maps."""
    train = command.add_argument_group("loss and label maps")
    train.add_argument("--loss", choices=list(LOSSES), help="default: bce-dice for masks, ce-dice for label maps")
    train.add_argument(
        "--class-weights", type=class_weights, help="balanced (by their pixels in the training images), or numbers: 1,2,4"
    )
    train.add_argument(
        "--background", action=argparse.BooleanOptionalAction, default=True,
        help="whether the loss counts the class 0 of label maps (default: yes; ce-dice: in its Dice)",
    )  # fmt: skip
    train.add_argument(
        "--head-weights", choices=list(HEAD_WEIGHTS), default="equal",
        help="of the heads of deep supervision: halving counts each half as much as the next deeper one",
    )  # fmt: skip
    train.add_argument(
        "--surface", action="store_true", help="validation measures distances between surfaces too, in mm or pixels"
    )
    add_label_maps(train)


def _add_network(command: argparse.ArgumentParser) -> None:
    """Adds the options of the network. Those with SUPPRESS get their defaults from `with_defaults`."""
    train = command.add_argument_group("network")
    train.add_argument("--arch", "--model", choices=list(PAPER_FEATURES), default="unet++", help="the network")
    train.add_argument(
        "--features", type=width_list, default=argparse.SUPPRESS,
        help="widths, finest level first, such as 32,64,128 (default: the paper's)",
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


def _add_encoder(command: argparse.ArgumentParser) -> None:
    """Adds the options of a network over an encoder."""
    train = command.add_argument_group("network over an encoder")
    train.add_argument("--encoder", help="a name of timm, such as resnet34, in place of --features: UNet++ over it")
    train.add_argument("--encoder-weights", help="imagenet, or a file with its weights (default: none)")
    train.add_argument("--encoder-depth", type=int, help="the number of its maps (default: 5)")
    train.add_argument("--decoder-channels", type=width_list, help="widths, deepest first (default: 256,128,64,32,16)")
    train.add_argument("--freeze-encoder", action="store_true", help="train everything but the encoder")


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """The options of `train`, with the defaults that depend on --task and --arch; a patch of None is `PATCH`."""
    nested = options.arch == "unet++"
    defaults = {"norm": "batch", "dropout": 0.0, "patch": None, "patches_per_image": 4, "deep_supervision": nested}
    if options.task:
        task = TASKS[options.task]
        defaults = {"norm": "none", "dropout": 0.5, "patch": task.patch, "patches_per_image": task.per_image}
        defaults["deep_supervision"] = False
    defaults["learning_rate"] = LEARNING_RATES[options.optimizer]
    defaults |= {"features": PAPER_FEATURES[options.arch], "upsample": "nearest" if options.encoder else "deconv"}
    return argparse.Namespace(**{**defaults, **vars(options)})


def check_encoder(options: argparse.Namespace) -> None:
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
