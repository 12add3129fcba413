"""The files of a run for people to read: its settings, log and curves."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.atomic_files import write_atomic
from ..common.errors import first_line
from ..common.extras import need
from .loggers import Logger

COLUMNS = ("epoch", "train_loss", "train_iou", "val_loss", "val_iou", "val_dice")
DRAW_SECONDS = 30.0


def write_config(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes plain settings as JSON; paths become text, tuples lists."""
    text = json.dumps(dict(settings), indent=1, default=str, sort_keys=True)
    write_atomic(path, lambda stream: stream.write(text.encode() + b"\n"))


def write_log(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Writes one row per epoch as CSV, with the columns `COLUMNS`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomic(path, lambda stream: stream.write(text.getvalue().encode()))


def write_scores(folder: Path, classes: Sequence[str] | None, scores: Mapping[str, Any]) -> None:
    """Writes the scores of a validation as `scores.json`, NaN as null, and a confusion matrix as `confusion.csv`: a row for
    each true class, a column for each predicted one, numbers of pixels."""
    text = json.dumps({"classes": classes, **{key: _without_nan(value) for key, value in scores.items()}}, indent=1)
    write_atomic(folder / "scores.json", lambda stream: stream.write(text.encode() + b"\n"))
    if matrix := scores.get("confusion"):
        names = classes or [str(index) for index in range(len(matrix))]
        table = io.StringIO()
        rows = [[name, *counts] for name, counts in zip(names, matrix, strict=True)]
        csv.writer(table, lineterminator="\n").writerows([["true \\ predicted", *names], *rows])
        write_atomic(folder / "confusion.csv", lambda stream: stream.write(table.getvalue().encode()))


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(row: Mapping[str, float]) -> str:
    """A row of the log as text, without columns that are NaN."""
    values = [f"{key} {value:.4f}" for key, value in row.items() if key != "epoch" and value == value]
    return "  ".join([f"epoch {row['epoch']:3d}", *values])


def draw_curves(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draws loss and IoU of training and validation over the epochs, as PNG."""
    figure = need("matplotlib.figure", "demo").Figure(figsize=(8.0, 3.4), layout="constrained", facecolor="white")
    epochs = [row["epoch"] for row in history]
    for axis, name in zip(figure.subplots(1, 2), ("loss", "iou"), strict=True):
        for part, colour in (("train", "#9aa5b1"), ("val", "#d9483b")):
            axis.plot(epochs, [row[f"{part}_{name}"] for row in history], color=colour, label=part, marker=".")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title({"loss": "loss", "iou": "IoU"}[name], fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend()
    write_atomic(path, lambda stream: figure.savefig(stream, format="png", dpi=120, metadata={"Software": None}))


class Report:
    """Draws `curves.png` if matplotlib is installed, and calls the loggers; call it after each epoch.

    Args:
        out: the folder of the run.
        history: the rows of the run; the trainer appends to it.
        loggers: further places for the rows.
    """

    def __init__(self, out: Path, history: Sequence[Mapping[str, float]], loggers: Sequence[Logger] = ()):
        self.out, self.history, self.loggers = out, history, list(loggers)
        self.draws = importlib.util.find_spec("matplotlib") is not None
        self.drawn, self.last = 0, time.monotonic()

    def __call__(self, row: Mapping[str, float]) -> None:
        self._log(lambda logger: logger(row))
        if time.monotonic() - self.last > DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draws the curves if there are epochs that they do not show."""
        if self.draws and len(self.history) > self.drawn:
            draw_curves(self.out / "curves.png", self.history)
            self.drawn, self.last = len(self.history), time.monotonic()

    def close(self, failed: bool = False) -> None:
        """Draws the last epochs and closes the loggers; call it when the run ends or fails."""
        self.draw()
        self._log(lambda logger: logger.close(failed))

    def _log(self, work: Callable[[Logger], None]) -> None:
        """Lets every logger work; one that fails, such as a server that is gone, is left out and does not end the run."""
        for logger in [*self.loggers]:
            try:
                work(logger)
            except Exception as error:
                self.loggers.remove(logger)
                name = type(logger).__name__
                print(f"{name}: {first_line(error)}; the run is no longer logged there", file=sys.stderr, flush=True)
