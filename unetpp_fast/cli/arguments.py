"""Arguments that several commands share, the types that parse them, and the network that they describe."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..architecture.options import ENGINES, Entry
from ..architecture.precision import TRAINED
from ..common.errors import InputError
from ..data.class_names import read_names
from ..data.tasks import TASKS
from ..models.architectures import UNet, UNetPlusPlus
from ..models.encoder_network import EncodedNetwork
from ..models.network import Network
from ..models.tiled_prediction import parse_bytes
from ..training.losses import checked_weights

Commands = argparse._SubParsersAction
Run = Callable[[argparse.Namespace], int | None]
ENCODER_OPTIONS = ("encoder", "encoder_weights", "encoder_depth", "decoder_channels")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option, unless it has none or the help gives it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_command(
    commands: Commands, name: str, run: Run, text: str, usage: str = "", config: bool = True
) -> argparse.ArgumentParser:
    """The parser of a command that `run` runs.

    Args:
        text: what the command does.
        usage: its usual arguments.
        config: whether its options may stand in a file.
    """
    command = commands.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
    command.usage = f"{command.prog} {usage} [options]".replace("  ", " ")
    command.set_defaults(run=run, parser=command)
    if config:
        command.add_argument("--config", type=Path, metavar="FILE", help="YAML with options; the command line wins")
    talk = command.add_mutually_exclusive_group()
    talk.add_argument("-q", "--quiet", action="store_true", help="print results and errors alone")
    talk.add_argument("-v", "--verbose", action="store_true", help="print settings too, and the whole trace of an error")
    return command


def add_device(command: argparse.ArgumentParser) -> None:
    """Adds --device and --dtype."""
    device = command.add_argument_group("device")
    device.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps")
    device.add_argument(
        "--dtype", default="auto", choices=["auto", *TRAINED], help="auto: bfloat16 on a GPU that supports it, else float32"
    )


def add_task(command: argparse._ActionsContainer) -> None:
    """Adds --task."""
    command.add_argument(
        "--task", choices=list(TASKS),
        help="a data set of the paper as its provider ships it, with the paper's network and patch size",
    )  # fmt: skip


def add_label_maps(command: argparse._ActionsContainer) -> None:
    """Adds --classes and --ignore-index."""
    command.add_argument("--classes", type=Path, help="names.txt or .json: the classes of label maps, that of 0 first")
    command.add_argument("--ignore-index", type=label, default=255, help="value of label maps that is left out, or none")


def label_options(options: argparse.Namespace) -> tuple[list[str] | None, int | None]:
    """The names of the classes and the ignored value that `read_folder` takes.

    Raises:
        InputError: the file cannot be read, or stands beside --task.
    """
    if options.classes and options.task:
        raise InputError("--classes names the values of label maps: leave it out with --task")
    return read_names(options.classes) if options.classes else None, options.ignore_index


def engine_options(table: Mapping[str, Entry]) -> list[str]:
    """The names in a table of `architecture.options` that commands offer: those that more than the reference computes."""

    def supported(entry: Entry) -> bool:
        return any(not entry.unsupported(backend, entry.keywords) for backend in ENGINES)

    return [name for name, entry in table.items() if supported(entry)]


def tile_size(text: str) -> tuple[int, ...]:
    """`512` as (512,), `32,256,256` or `32x256x256` as (32, 256, 256)."""
    return _integers(text.replace("x", ","), ",", "a size such as 512 or 32,256,256")


def patch_size(text: str) -> int | tuple[int, ...]:
    """`64` as 64, `32,128,128` as (32, 128, 128)."""
    sides = tile_size(text)
    return sides[0] if len(sides) == 1 else sides


def spacing(text: str) -> str | tuple[float, ...]:
    """`median`, or `1` as (1.0, 1.0, 1.0), `2.5,0.8,0.8` as (2.5, 0.8, 0.8)."""
    if text == "median":
        return text
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    if len(sizes) != 3 or not all(0 < size < math.inf for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is neither median nor sizes of a voxel in mm such as 2.5,0.8,0.8")
    return sizes


def overlap(text: str) -> float | tuple[float, ...]:
    """`0.25` as 0.25, `0.5,0.25,0.25` as (0.5, 0.25, 0.25)."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.25, or 0.5,0.25,0.25") from None
    return shares[0] if len(shares) == 1 else shares


def image_size(text: str) -> tuple[int, ...]:
    """`512` as (512, 512), `64x64x64` as (64, 64, 64)."""
    size = _integers(text.replace(",", "x"), "x", "a size such as 512, 512x384 or 64x64x64")
    return size * 2 if len(size) == 1 else size


def seed_list(text: str) -> tuple[int, ...]:
    """`0,1,2` as (0, 1, 2), without repetitions."""
    return tuple(dict.fromkeys(_integers(text, ",", "a list of seeds such as 0,1,2")))


def width_list(text: str) -> tuple[int, ...]:
    """`32,64` as (32, 64)."""
    return _integers(text, ",", "a list of widths such as 32,64,128,256,512")


def class_weights(text: str) -> str | tuple[float, ...]:
    """`balanced`, or `1,2.5` as (1.0, 2.5)."""
    if text == "balanced":
        return text
    try:
        return checked_weights([float(part) for part in text.split(",")])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither balanced nor a list of positive weights such as 1,2,4"
        ) from None


def label(text: str) -> int | None:
    """`255` as 255, `none` as None."""
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a value of a label map such as 255, or none")
    return int(text)


def augmentation(text: str) -> str | Path:
    """none, light and strong as they are, all else as a path."""
    return text if text in ("none", "light", "strong") else Path(text)


def byte_count(text: str) -> int:
    """`512M` as 512 * 2^20."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cache_bytes(text: str) -> int:
    """As `byte_count`, but `0` for none."""
    return 0 if text == "0" else byte_count(text)


def _integers(text: str, separator: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(separator))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def build_network(arch: str, options: argparse.Namespace, channels: int, classes: int, **extra) -> Network | EncodedNetwork:
    """The network that --features or --encoder, --norm and --upsample describe; `extra`: further keywords of the network.

    Raises:
        InputError: a value is out of range.
    """
    encoder = {} if getattr(options, "encoder", None) is None else encoder_options(options)
    keywords = {
        **(encoder or {"features": options.features}),
        "norm": None if options.norm == "none" else options.norm,
        "upsample": options.upsample,
        **extra,
    }
    try:
        return (UNetPlusPlus if arch == "unet++" else UNet)(channels, classes, **keywords)
    except ValueError as error:
        raise InputError(str(error)) from error


def encoder_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords of a network over an encoder."""
    found = {keyword: getattr(options, keyword) for keyword in ENCODER_OPTIONS}
    return {keyword: value for keyword, value in found.items() if value is not None}
