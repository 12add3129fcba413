"""`report.html` of `unetpp-fast compare`: the IoU of every run, the gain over U-Net, the course of the trainings."""

from __future__ import annotations

import csv
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.version import __version__
from ..experiments.paper_table import BASELINE, CONTENDERS, spread
from . import page
from .charts import Line, dot_chart, line_chart

FILE = "report.html"
COLOURS = dict(
    zip(
        [contender.name for contender in CONTENDERS],
        ("var(--other)", "var(--third)", "var(--fourth)", "var(--ours)"),
        strict=True,
    )
)


def write(out: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """Writes the page to the folder of a comparison.

    Args:
        rows: as `paper_table.run` returns them.
        settings: the options, to be shown.

    Returns:
        The path of the page.

    Raises:
        WriteError: it cannot be written.
    """
    ious = {name: _by_seed(rows, name) for name in COLOURS}
    ious = {name: values for name, values in ious.items() if values}
    seeds = sorted({row["seed"] for row in rows})
    best = max(ious, key=lambda name: statistics.mean(ious[name].values()))
    what = f"{len(ious)} networks, one recipe, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    figures = {f"mean IoU of {name}": f"{statistics.mean(values.values()):.4f}" for name, values in ious.items()}
    chart = dot_chart(
        "A dot for each seed, a bar at their mean",
        {name: list(values.values()) for name, values in ious.items()}, COLOURS, "IoU on the test images",
    )  # fmt: skip
    curves = "".join(_curve(out, rows, title, column) for column, title in _COLUMNS.items())
    note = f"Highest mean: {best}. " + (
        "One seed says nothing about the spread."
        if len(seeds) == 1
        else "Gains are seed by seed: mean ± standard deviation."
    )
    sections = [
        ("", page.tiles(figures)),
        ("Runs", f"<div class='pair'>{chart}{curves}</div>"),
        ("Table", f"<p class='soft'>{page.escape(note)}</p>{_table(rows, ious)}"),
        ("Settings", page.facts({key.replace("_", " "): _plain(value) for key, value in settings.items()})),
        ("Environment", page.facts(_environment())),
    ]
    page.write(out / FILE, page.page("U-Net against UNet++", what, sections))
    return out / FILE


_COLUMNS = {"train_loss": "Training loss, a line for each run", "val_iou": "Validation IoU, a line for each run"}


def _by_seed(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    return {row["seed"]: row["iou"] for row in rows if row["model"] == name}


def _table(rows: Sequence[Mapping[str, Any]], ious: Mapping[str, Mapping[int, float]]) -> str:
    """A row per network."""
    lines = []
    for name, mine in ious.items():
        runs = [row for row in rows if row["model"] == name]
        both = sorted(set(mine) & set(ious.get(BASELINE, {})))
        gain = "" if name == BASELINE or not both else spread([mine[seed] - ious[BASELINE][seed] for seed in both], "+")
        dice, epochs, seconds = (statistics.mean(row[key] for row in runs) for key in ("dice", "epochs", "seconds"))
        parameters = f"{runs[0]['parameters']:,}"
        lines.append((name, parameters, spread(list(mine.values())), gain, f"{dice:.4f}", f"{epochs:.3g}", f"{seconds:.0f}"))
    head = ("network", "parameters", "IoU", f"gain over {BASELINE}", "Dice", "epochs", "seconds a run")
    return page.table(head, lines)


def _curve(out: Path, rows: Sequence[Mapping[str, Any]], title: str, column: str) -> str:
    """A column of the logs of all runs."""
    lines = []
    for contender in CONTENDERS:
        for row in rows:
            path = out / f"{contender.folder}-{row['seed']}" / "log.csv"
            if row["model"] == contender.name and path.is_file():
                points = _column(path, column)
                lines.append(Line(contender.name, COLOURS[contender.name], points))
    return line_chart(title, lines)


def _column(path: Path, column: str) -> list[tuple[float, float]]:
    with open(path, encoding="utf-8", newline="") as stream:
        found = [(float(row["epoch"]), float(row.get(column) or math.nan)) for row in csv.DictReader(stream)]
    return found


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value in (None, False) else str(value)


def _environment() -> dict[str, str]:
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return {"unetpp_fast": __version__, "torch": torch.__version__, "Python": where}
