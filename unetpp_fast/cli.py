"""The command `unetpp-fast`: demo, train, predict. A mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from . import __version__
from .files import InputError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (InputError, OSError) as error:
        print(f"unetpp-fast {options.command}: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        print(f"unetpp-fast {options.command}: error: out of memory: use a smaller batch, patch or network", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"unetpp-fast {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _is_lack_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(prog="unetpp-fast", description="UNet++: train it, use it, prune it.")
    parser.add_argument("--version", action="version", version=f"unetpp_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,train,predict}")
    _add_demo(commands)
    _add_train(commands)
    _add_predict(commands)
    return parser


def _add_command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(run=run)
    command.add_argument("--device", default="auto", help="auto (the best there is), cpu, cuda, cuda:1, mps")
    command.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 on a GPU that has it, else float32",
    )  # fmt: skip
    return command


def _add_demo(commands) -> None:
    demo = _add_command(commands, "demo", _demo, "Train U-Net and UNet++ on half of a real image, judge, prune, draw.")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    demo.add_argument("--epochs", type=int, default=10, help="epochs of 160 patches for each model")
    demo.add_argument("--seed", type=int, default=0)


def _add_train(commands) -> None:
    train = _add_command(commands, "train", _train, "Train on a folder with images/<id>.png and masks/<class>/<id>.png.")
    train.add_argument("--data", type=Path, required=True, help="the folder with images/ and masks/")
    train.add_argument("--out", type=Path, required=True, help="folder for last.pt, best.pt and log.csv")
    train.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    train.add_argument("--model", choices=["unet++", "unet"], default="unet++")
    train.add_argument("--features", type=_widths, default=(32, 64, 128, 256, 512), help="widths, finest level first")
    train.add_argument("--norm", choices=["none", "batch", "instance"], default="batch")
    train.add_argument("--upsample", choices=["deconv", "nearest", "linear"], default="deconv")
    train.add_argument("--dropout", type=float, default=0.0, help="the paper's own is 0.5, with --norm none")
    train.add_argument("--no-deep-supervision", action="store_true", help="one head only; such a model cannot be pruned")
    train.add_argument("--epochs", type=int, default=100)
    train.add_argument("--batch-size", type=int, default=8)
    train.add_argument("--learning-rate", type=float, default=3e-4)
    train.add_argument("--patience", type=int, default=20, help="epochs without a better validation IoU before it stops")
    train.add_argument("--patch", type=int, default=96, help="side of the random patches, in pixels")
    train.add_argument("--patches-per-image", type=int, default=4, help="patches drawn from each image an epoch")
    train.add_argument("--val-fraction", type=float, default=0.2, help="share of the images for validation")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--workers", type=int, default=0, help="processes that read images ahead")


def _add_predict(commands) -> None:
    predict = _add_command(commands, "predict", _predict, "Write a mask for each class and an overlay for each image.")
    predict.add_argument("--checkpoint", type=Path, required=True, help="best.pt or last.pt of a training")
    predict.add_argument("--images", type=Path, required=True, help="an image, or a folder of images")
    predict.add_argument("--out", type=Path, required=True, help="folder for masks/<class>/<id>.png and overlays/<id>.png")
    predict.add_argument("--mode", choices=["accurate", "fast"], default="accurate", help="mean over the heads, or one head")
    predict.add_argument("--level", type=int, help="head to use (fast) or to stop at (accurate); default the deepest")
    predict.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is foreground")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of widths such as 32,64,128,256,512") from None


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU that works, else the CPU.

    Raises:
        InputError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0].split(". ")[0]
        raise InputError(f"device {name!r} cannot be used: {first}; --device cpu always can") from error
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    """`name`, or for "auto" bfloat16 on a GPU that has it and float32 elsewhere."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    device = choose_device(options.device)
    demo.run(
        options.out, epochs=options.epochs, seed=options.seed, device=str(device), dtype=choose_dtype(options.dtype, device)
    )


def _train(options: argparse.Namespace) -> int:
    from . import commands

    device = choose_device(options.device)
    return commands.train(options, device, choose_dtype(options.dtype, device))


def _predict(options: argparse.Namespace) -> None:
    from . import commands

    device = choose_device(options.device)
    commands.predict(options, device, choose_dtype(options.dtype, device))
