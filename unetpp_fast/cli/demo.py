"""`unetpp-fast demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..architecture.precision import choose_dtype
from ..common.devices import choose_device
from ..experiments import demo, volume_demo
from ..training import processes
from .arguments import add_command


def add_parser(commands) -> None:
    command = add_command(commands, "demo", run, "Train U-Net and UNet++ on part of the sample data, judge, prune, draw.")
    command.add_argument(
        "--task", choices=["image", "volume"], default="image", help="half of a real image, or planes of a stack in 3D"
    )
    command.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    command.add_argument("--epochs", type=int, default=10, help="epochs of 160 patches for each model")
    command.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    experiment = demo if options.task == "image" else volume_demo
    with processes.joined(options.device) as name:
        device = choose_device(name)
        dtype = choose_dtype(options.dtype, device)
        experiment.run(options.out, epochs=options.epochs, seed=options.seed, device=str(device), dtype=dtype)
