"""`unetpp-fast bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..architecture.input_checks import check_input
from ..architecture.precision import choose_dtype
from ..benchmarking import report
from ..common.devices import choose_device
from ..common.errors import InputError
from ..models.network import Network
from ..training import checkpoint
from .arguments import add_command, build_network, sizes_argument, widths_argument


def add_parser(commands) -> None:
    bench = add_command(commands, "bench", run, "Time this package against PyTorch on this machine, for one network.")
    bench.add_argument(
        "--checkpoint", type=Path, help="a training's best.pt, in place of the options from --arch to --upsample"
    )
    bench.add_argument("--arch", choices=["unet++", "unet"], default="unet++")
    bench.add_argument(
        "--features", type=widths_argument, default=(32, 64, 128, 256, 512), help="widths, finest level first"
    )
    bench.add_argument("--norm", choices=["none", "batch", "instance"], default="batch")
    bench.add_argument("--upsample", choices=["deconv", "nearest", "linear"], default="deconv")
    bench.add_argument("--level", type=int, help="prune UNet++ to this level; default not")
    bench.add_argument(
        "--size", type=sizes_argument, default=(512, 512), help="512, 512x384, or 64x64x64 for a network in 3D"
    )
    bench.add_argument("--batch", type=int, default=1, help="images in a batch")
    bench.add_argument("--seconds", type=float, default=5.0, help="how long each comparison is timed, at least 7 rounds")


def run(options: argparse.Namespace) -> None:
    device = choose_device(options.device)
    bench(options, device, choose_dtype(options.dtype, device))


def bench(options: argparse.Namespace, device: torch.device, dtype: str) -> None:
    """Prints time, memory and the largest batch of PyTorch, PyTorch compiled and this package, for one network."""
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
    for line in report.report(network, options.size, options.batch, dtype, device, options.seconds):
        print(line)


def _benched(options: argparse.Namespace) -> Network:
    """The network of a checkpoint or of the options, pruned if that is asked for."""
    if options.checkpoint:
        network, _ = checkpoint.load_model(options.checkpoint)
    else:
        extra = {"spatial_dims": len(options.size)}
        if options.arch == "unet++":
            extra["deep_supervision"] = True
        network = build_network(options.arch, options, 1, 1, **extra)
    try:
        return network if options.level is None else network.prune(options.level)
    except ValueError as error:
        raise InputError(str(error)) from error
