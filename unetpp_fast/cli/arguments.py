"""What several commands share: types of arguments, and the network that they describe."""

from __future__ import annotations

import argparse

from ..common.errors import InputError
from ..models.architectures import UNet, UNetPlusPlus
from ..models.network import Network
from ..models.tiled_prediction import parse_bytes


def add_command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(run=run)
    command.add_argument("--device", default="auto", help="auto (the best there is), cpu, cuda, cuda:1, mps")
    command.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 on a GPU that has it, else float32",
    )  # fmt: skip
    return command


def add_task(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--task", choices=["nuclei", "polyp", "liver", "nodule"],
        help="a data set of the paper as its provider ships it, with the paper's network and patch size",
    )  # fmt: skip


def sizes_argument(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512, 512x384 or 64x64x64") from None
    return sizes * 2 if len(sizes) == 1 else sizes


def tile_argument(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512 or 32x256x256") from None


def memory_argument(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seeds_argument(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds such as 0,1,2") from None


def widths_argument(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of widths such as 32,64,128,256,512") from None


def build_network(model: str, options: argparse.Namespace, channels: int, classes: int, **extra) -> Network:
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
