"""`unetpp-fast bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..architecture.input_checks import check_input
from ..architecture.options import NORMS, UPSAMPLES
from ..architecture.precision import choose_dtype
from ..benchmarking.report import report
from ..common.devices import choose_device
from ..common.errors import InputError
from ..models.architectures import PAPER_FEATURES
from ..training import checkpoint
from .arguments import Commands, add_command, add_device, build_network, engine_options, image_size, width_list


def add_parser(commands: Commands) -> None:
    """Adds `bench` to the commands."""
    command = add_command(commands, "bench", run, "Time this package against PyTorch on this machine, for one network.")
    bench = command.add_argument_group("network")
    bench.add_argument(
        "--checkpoint", type=Path, help="best.pt of a training, in place of the options from --arch to --upsample"
    )
    bench.add_argument("--arch", choices=["unet++", "unet"], default="unet++", help="the network")
    widths = ",".join(map(str, PAPER_FEATURES["unet++"]))
    bench.add_argument("--features", type=width_list, default=widths, help="widths, finest level first")
    bench.add_argument(
        "--norm", choices=["none", *engine_options(NORMS)], default="batch", help="norm after each convolution"
    )
    bench.add_argument("--upsample", choices=engine_options(UPSAMPLES), default="deconv", help="up-sampling")
    bench.add_argument("--level", type=int, help="prune UNet++ to this level (default: not pruned)")
    bench = command.add_argument_group("measurement")
    bench.add_argument("--size", type=image_size, default="512", help="512, 512x384, or 64x64x64 for a network in 3D")
    bench.add_argument("--batch", type=int, default=1, help="images per batch")
    bench.add_argument("--seconds", type=float, default=5.0, help="time for each comparison, which has at least 7 rounds")
    add_device(command)


def run(options: argparse.Namespace) -> None:
    """Prints time, memory and the largest batch of PyTorch, PyTorch compiled and this package, for one network."""
    device = choose_device(options.device)
    if options.batch < 1:
        raise InputError(f"--batch must be at least 1, not {options.batch}")
    if not 0 < options.seconds < float("inf"):
        raise InputError(f"--seconds must be positive and finite, not {options.seconds}")
    network = _network(options)
    shape = (options.batch, network.topology.in_channels, *options.size)
    try:
        check_input(network.train(), torch.empty(shape, device="meta"))
    except ValueError as error:
        raise InputError(str(error)) from error
    dtype = choose_dtype(options.dtype, device)
    for line in report(network, options.size, options.batch, dtype, device, options.seconds):
        print(line)


def _network(options: argparse.Namespace) -> Any:
    """The network of the checkpoint or of the options, pruned if --level is given."""
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
