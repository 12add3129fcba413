"""`unetpp-fast compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..architecture.precision import choose_dtype
from ..common.devices import choose_device
from ..experiments import paper_table
from .arguments import add_command, add_task, seeds_argument


def add_parser(commands) -> None:
    compare = add_command(
        commands, "compare", run, "Train U-Net, wide U-Net and UNet++ alike and print the paper's table 3 of them."
    )
    source = compare.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="the folder with images/ and masks/, or the data of --task")
    source.add_argument("--sample", action="store_true", help="half of the nuclei image, judged on the other half")
    add_task(compare)
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for the runs and compare.csv")
    compare.add_argument("--seeds", type=seeds_argument, default=(0, 1, 2), help="numbers such as 0,1,2; a run each")
    compare.add_argument("--width", type=float, default=1.0, help="times the paper's channels, 0.25 for a CPU")
    compare.add_argument(
        "--epochs", type=int, default=argparse.SUPPRESS, help="(default: 100 with early stopping; of the sample 10)"
    )


def run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    return paper_table.command(options, device, choose_dtype(options.dtype, device))
