"""The command `unetpp-fast`: demo, train, compare, predict, bench. A mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from . import __version__, processes
from .files import InputError

INTERRUPTED = 130
LOST = 1


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
    except processes.Lost as error:
        print(f"unetpp-fast {options.command}: {error}: the same command with --resume goes on", file=sys.stderr)
        return LOST
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,train,compare,predict,bench}")
    _add_demo(commands)
    _add_train(commands)
    _add_compare(commands)
    _add_predict(commands)
    _add_bench(commands)
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
    demo = _add_command(commands, "demo", _demo, "Train U-Net and UNet++ on part of the sample data, judge, prune, draw.")
    demo.add_argument(
        "--task", choices=["image", "volume"], default="image", help="half of a real image, or planes of a stack in 3D"
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    demo.add_argument("--epochs", type=int, default=10, help="epochs of 160 patches for each model")
    demo.add_argument("--seed", type=int, default=0)


def _add_train(commands) -> None:
    train = _add_command(commands, "train", _train, "Train on a folder with images/<id>.png and masks/<class>/<id>.png.")
    train.add_argument("--data", type=Path, required=True, help="the folder with images/ and masks/, or the data of --task")
    _add_task(train)
    train.add_argument("--out", type=Path, required=True, help="folder for last.pt, best.pt, log.csv and curves.png")
    train.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    train.add_argument("--arch", "--model", choices=["unet++", "unet", "wide_unet"], default="unet++")
    # Left out of the options where not given: what then holds depends on --task, see `_filled_in`.
    given = argparse.SUPPRESS
    train.add_argument("--features", type=_widths, default=given, help="widths, finest level first (default: the paper's)")
    train.add_argument(
        "--norm", choices=["none", "batch", "instance"], default=given, help="(default: batch; of a task: none)"
    )
    train.add_argument("--upsample", choices=["deconv", "nearest", "linear"], default="deconv")
    train.add_argument("--dropout", type=float, default=given, help="(default: 0; of a task: 0.5)")
    train.add_argument(
        "--deep-supervision", action=argparse.BooleanOptionalAction, default=given,
        help="a head at each depth of UNet++, needed to prune it (default: yes; of a task: no)",
    )  # fmt: skip
    train.add_argument("--epochs", type=int, default=100)
    batch = train.add_mutually_exclusive_group()
    batch.add_argument("--batch-size", type=int, default=8, help="patches of a step, over all processes together")
    batch.add_argument("--max-memory", type=_memory, help="8G: choose the largest batch that a process holds in it")
    train.add_argument("--accumulate", type=int, default=1, help="parts that a batch is worked off in, to save memory")
    train.add_argument("--recompute", action="store_true", help="compute maps again in backward passes, to save memory")
    train.add_argument(
        "--reproducible", action="store_true", help="on a CPU: the same weights on any number of processes and threads"
    )
    train.add_argument("--learning-rate", type=float, default=3e-4)
    train.add_argument("--patience", type=int, default=20, help="epochs without a better validation IoU before it stops")
    train.add_argument("--patch", type=int, default=given, help="side of the random patches (default: 96, or the task's)")
    train.add_argument(
        "--patches-per-image", type=int, default=given, help="patches of each image an epoch (default: 4, or the task's)"
    )
    train.add_argument("--val-fraction", type=float, default=0.2, help="share of the images for validation")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--workers", type=int, default=0, help="processes that read images ahead")
    train.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard too")


def _add_task(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--task", choices=["nuclei", "polyp", "liver", "nodule"],
        help="a data set of the paper as its provider ships it, with the paper's network and patch size",
    )  # fmt: skip


def _filled_in(options: argparse.Namespace) -> argparse.Namespace:
    """The options of `train`, with what was not given as the task, the architecture or this package has it."""
    from .models import PAPER_FEATURES
    from .tasks import TASKS

    nested = options.arch == "unet++"
    defaults = {"norm": "batch", "dropout": 0.0, "patch": 96, "patches_per_image": 4, "deep_supervision": nested}
    if options.task:
        task = TASKS[options.task]
        defaults = {"norm": "none", "dropout": 0.5, "patch": task.patch, "patches_per_image": task.per_image}
        defaults["deep_supervision"] = False
    defaults["features"] = PAPER_FEATURES[options.arch]
    return argparse.Namespace(**{**defaults, **vars(options)})


def _add_predict(commands) -> None:
    predict = _add_command(commands, "predict", _predict, "Write a mask for each class and image, in the image's format.")
    predict.add_argument("--checkpoint", type=Path, required=True, help="best.pt or last.pt of a training")
    predict.add_argument("--images", type=Path, required=True, help="an image, volume or stack of planes, or a folder")
    predict.add_argument("--out", type=Path, required=True, help="folder for masks/<class>/<id>, overlays/<id>.png")
    predict.add_argument("--mode", choices=["accurate", "fast"], default="accurate", help="mean over the heads, or one head")
    predict.add_argument("--level", type=int, help="head to use (fast) or to stop at (accurate); default the deepest")
    predict.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is foreground")
    predict.add_argument("--probabilities", action="store_true", help="write probabilities/<class>/<id> too")
    predict.add_argument("--tile", type=_tile, help="predict by tiles of so many pixels: 512, or 32x256x256 in 3D")
    predict.add_argument("--overlap", type=float, default=0.25, help="share of a tile that lies in its neighbour too")
    predict.add_argument("--max-memory", type=_memory, help="512M, 2G: choose tiles that need no more; default one pass")


def _add_bench(commands) -> None:
    bench = _add_command(commands, "bench", _bench, "Time this package against PyTorch on this machine, for one network.")
    bench.add_argument(
        "--checkpoint", type=Path, help="a training's best.pt, in place of the options from --arch to --upsample"
    )
    bench.add_argument("--arch", choices=["unet++", "unet"], default="unet++")
    bench.add_argument("--features", type=_widths, default=(32, 64, 128, 256, 512), help="widths, finest level first")
    bench.add_argument("--norm", choices=["none", "batch", "instance"], default="batch")
    bench.add_argument("--upsample", choices=["deconv", "nearest", "linear"], default="deconv")
    bench.add_argument("--level", type=int, help="prune UNet++ to this level; default not")
    bench.add_argument("--size", type=_sizes, default=(512, 512), help="512, 512x384, or 64x64x64 for a network in 3D")
    bench.add_argument("--batch", type=int, default=1, help="images in a batch")
    bench.add_argument("--seconds", type=float, default=5.0, help="how long each comparison is timed, at least 7 rounds")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512, 512x384 or 64x64x64") from None
    return sizes * 2 if len(sizes) == 1 else sizes


def _tile(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512 or 32x256x256") from None


def _memory(text: str) -> int:
    from .tiles import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_compare(commands) -> None:
    compare = _add_command(
        commands, "compare", _compare, "Train U-Net, wide U-Net and UNet++ alike and print the paper's table 3 of them."
    )
    source = compare.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="the folder with images/ and masks/, or the data of --task")
    source.add_argument("--sample", action="store_true", help="half of the nuclei image, judged on the other half")
    _add_task(compare)
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for the runs and compare.csv")
    compare.add_argument("--seeds", type=_seeds, default=(0, 1, 2), help="numbers such as 0,1,2; a run each")
    compare.add_argument("--width", type=float, default=1.0, help="times the paper's channels, 0.25 for a CPU")
    compare.add_argument(
        "--epochs", type=int, default=argparse.SUPPRESS, help="(default: 100 with early stopping; of the sample 10)"
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds such as 0,1,2") from None


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
    from . import demo, demo_volume

    run = demo.run if options.task == "image" else demo_volume.run
    with processes.joined(options.device) as name:
        device = choose_device(name)
        dtype = choose_dtype(options.dtype, device)
        run(options.out, epochs=options.epochs, seed=options.seed, device=str(device), dtype=dtype)


def _train(options: argparse.Namespace) -> int:
    from . import commands

    with processes.joined(options.device) as name:
        device = choose_device(name)
        return commands.train(_filled_in(options), device, choose_dtype(options.dtype, device))


def _predict(options: argparse.Namespace) -> None:
    from . import commands

    device = choose_device(options.device)
    commands.predict(options, device, choose_dtype(options.dtype, device))


def _bench(options: argparse.Namespace) -> None:
    from . import commands

    device = choose_device(options.device)
    commands.bench(options, device, choose_dtype(options.dtype, device))


def _compare(options: argparse.Namespace) -> int:
    from . import compare

    device = choose_device(options.device)
    return compare.command(options, device, choose_dtype(options.dtype, device))
