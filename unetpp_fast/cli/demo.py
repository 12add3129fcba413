"""`unetpp-fast demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..architecture.precision import choose_dtype
from ..common.devices import choose_device
from ..experiments import demo, volume_demo
from ..training import processes
from .arguments import Commands, add_command, add_device

EXPERIMENTS = {"image": demo, "volume": volume_demo}


def add_parser(commands: Commands) -> None:
    """Adds `demo` to the commands."""
    text = "Train U-Net and UNet++ on part of the sample data, evaluate them on the rest, prune, draw."
    parser = add_command(commands, "demo", run, text)
    command = parser.add_argument_group("demo")
    command.add_argument(
        "--task", choices=list(EXPERIMENTS), default="image", help="one half of a real image, or planes of a stack in 3D"
    )
    command.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    command.add_argument("--epochs", type=int, default=10, help="epochs of 160 patches for each model")
    command.add_argument("--seed", type=int, default=0, help="of the weights and the patches")
    command.add_argument(
        "--reproducible", action="store_true", help="on a CPU: the same weights for any number of processes and threads"
    )
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Runs the demo; with torchrun, on several processes."""
    with processes.joined(options.device) as name:
        device = choose_device(name)
        dtype = choose_dtype(options.dtype, device)
        experiment = EXPERIMENTS[options.task]
        experiment.run(
            options.out,
            epochs=options.epochs,
            seed=options.seed,
            device=str(device),
            dtype=dtype,
            reproducible=options.reproducible,
        )
