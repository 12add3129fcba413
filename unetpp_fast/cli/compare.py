"""`unetpp-fast compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..architecture.precision import choose_dtype
from ..common import messages
from ..common.atomic_files import check_folder
from ..common.devices import choose_device
from ..common.errors import InputError
from ..data.tasks import TASKS
from ..experiments import paper_table
from ..reports import comparison
from ..training.trainer import Interrupted
from . import config
from .arguments import Commands, add_command, add_device, add_label_maps, add_task, label_options, seed_list


def add_parser(commands: Commands) -> None:
    """Adds `compare` to the commands."""
    text = "Train U-Net, wide U-Net and UNet++ with one recipe and print the paper's table 3 of them."
    command = add_command(commands, "compare", run, text, usage="--data DATA | --sample")
    compare = command.add_argument_group("data and results")
    source = compare.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="a folder with images/ and masks/ (docs/data.md), or the data of --task")
    source.add_argument("--sample", action="store_true", help="train on half of the nuclei image, test on the other half")
    add_task(compare)
    add_label_maps(compare)
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for the runs and compare.csv")
    compare = command.add_argument_group("recipe")
    compare.add_argument("--seeds", type=seed_list, default="0,1,2", help="such as 0,1,2: one run per seed and network")
    compare.add_argument("--width", type=float, default=1.0, help="factor on the paper's channels; 0.25 suits a CPU")
    compare.add_argument(
        "--epochs",
        type=int,
        default=argparse.SUPPRESS,
        help="the largest number of epochs (default: 100; with --sample exactly 10)",
    )
    add_device(command)


def run(options: argparse.Namespace) -> int:
    """Trains every network with every seed and prints the table; returns the exit code."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.task and options.sample:
        raise InputError("--task describes --data: leave it out with --sample")
    if not 0 < options.width <= 4:
        raise InputError(f"--width must be above 0 and at most 4, not {options.width}")
    epochs = getattr(options, "epochs", None)
    if options.sample:
        material = paper_table.from_sample(epochs, dtype)
    else:
        names, ignore = label_options(options)
        material = paper_table.from_folder(options.data, TASKS.get(options.task), epochs, dtype, names, ignore)
        if material.found:
            messages.say(material.found)
    check_folder(options.out)
    if not (options.out / "run.yaml").exists():  # a comparison with other settings is refused below
        config.write(options.out / "run.yaml", options)
    settings = {"data": "sample" if options.sample else str(options.data.resolve()), "task": options.task}
    if not options.sample and (names, ignore) != (None, 255):
        settings |= {"classes": names, "ignore": ignore}
    try:
        rows = paper_table.run(material, options.seeds, options.width, options.out, device, settings)
    except Interrupted:
        print(f"stopped; finished runs are in {options.out}: the same command continues", file=sys.stderr)
        return 130
    print(paper_table.table(rows))
    page = comparison.write(options.out, rows, config.settings(options))
    messages.say(f"all runs: {options.out / 'compare.csv'}, {options.out / 'compare.json'}; report: {page}")
    return 0
