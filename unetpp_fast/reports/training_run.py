"""`report.html` of a training: its curves, its best and worst validation images, scores per class, settings."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.devices import device_name
from ..common.errors import first_line
from ..common.version import __version__
from ..models.architectures import parameter_count
from ..training.checkpoint import load_model
from ..training.recipe import MONITORS
from ..training.trainer import Trainer
from . import examples, page
from .charts import Line, line_chart

FILE = "report.html"
SECONDS, SECONDS_STOPPED = 60.0, 10.0  # for predicting validation images
SHOWN = 3  # images, of the best and of the worst each
CURVES = {  # columns of the log in one chart, with their colours
    "Loss": {"train_loss": "var(--other)", "val_loss": "var(--ours)"},
    "IoU and Dice": {"train_iou": "var(--other)", "val_iou": "var(--ours)", "val_dice": "var(--third)"},
}
NAMES = {
    "train_loss": "training", "val_loss": "validation", "train_iou": "training IoU", "val_iou": "validation IoU",
    "val_dice": "validation Dice",
}  # fmt: skip
KEYS = {"correct": examples.CORRECT, "missed": examples.MISSED, "false": examples.EXTRA, "another class": examples.OTHER}


def write(trainer: Trainer, settings: Mapping[str, Any], stopped: bool = False) -> Path:
    """Writes the page to the folder of a training, first without pictures and then, where there are validation images and a
    best epoch, with them.

    Args:
        settings: the options of the run, to be shown.
        stopped: whether it was interrupted, so that little time may be left.

    Returns:
        The path of the page.

    Raises:
        WriteError: it cannot be written.
    """
    path = trainer.out / FILE
    page.write(path, _text(trainer, settings, stopped, None))
    if trainer.validation and (trainer.out / "best.pt").exists():
        page.write(path, _text(trainer, settings, stopped, _Best(trainer, SECONDS_STOPPED if stopped else SECONDS)))
    return path


class _Best:
    """The network of the best epoch, which is a copy, and how it predicts validation images."""

    def __init__(self, trainer: Trainer, seconds: float):
        self.network, content = load_model(trainer.out / "best.pt", trainer.device)
        self.about, self.dtype = content["about"], trainer.recipe.dtype
        self.scores, self.samples = content.get("scores") or {}, trainer.validation
        self.looked = examples.look(self.network, self.samples, self.dtype, self.exclusive, seconds)

    @property
    def exclusive(self) -> bool:
        return bool(self.about.get("exclusive"))

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return self.about.get("classes") or [str(index) for index in range(self.network.out_channels)]

    def per_class(self) -> str:
        """IoU, and Dice if it is known, of each class."""
        names = self.names
        if "class_iou" in self.scores:
            scores = zip(names, self.scores["class_iou"], self.scores["class_dice"], strict=True)
            head = ("class, over all pixels", "IoU", "Dice")
            return page.table(head, [(name, _number(iou), _number(dice)) for name, iou, dice in scores])
        rows = []
        for name, values in zip(names, zip(*(one.classes for one in self.looked), strict=True), strict=True):
            rows.append((name, _number(sum(values) / len(values)), _number(min(values)), _number(max(values))))
        return page.table(("class, mean over the images", "IoU", "least", "most"), rows)

    def confusion(self) -> str:
        """The confusion matrix, if the training kept one."""
        counts = self.scores.get("confusion")
        return page.matrix(self.names, counts) if counts else ""

    def pictures(self, worst: bool) -> str:
        """The worst or the best images; no image is among both."""
        ranked = sorted(self.looked, key=lambda one: one.iou)
        count = min(SHOWN, (len(ranked) + 1) // 2) if worst else min(SHOWN, len(ranked) // 2)
        chosen = ranked[:count] if worst else ranked[::-1][:count]
        parts = []
        for one in chosen:
            sample = self.samples[one.index]
            shown = examples.panels(self.network, sample, self.about, self.dtype)
            parts.append(page.example(f"{sample.name}: IoU {one.iou:.3f}", shown))
        return "".join(parts)

    def legend(self) -> str:
        """What the colours of the last panel mean, and how many images were looked at."""
        several = self.network.out_channels > (2 if self.exclusive else 1)
        colours = {n: examples.hexadecimal(c) for n, c in KEYS.items() if several or n != "another class"}
        names = self.names[1:] if self.exclusive else self.names
        tints = dict(zip(names, map(examples.hexadecimal, examples.tints(self.about)), strict=False))
        classes = f"<p>{page.keys(tints, square=True)}</p>" if len(tints) > 1 else ""
        count = f"{len(self.looked)} of {len(self.samples)} validation images were predicted, by the best epoch's network."
        return f"<p class='soft'>{count}</p>{classes}<p>Differences: {page.keys(colours, square=True)}</p>"


def _text(trainer: Trainer, settings: Mapping[str, Any], stopped: bool, best: _Best | None) -> str:
    sections = [("", _figures(trainer)), ("Curves", _curves(trainer))]
    if best:
        sections += [
            ("Classes", f"<div class='pair'>{best.per_class()}{best.confusion()}</div>"),
            ("Worst images", best.legend() + best.pictures(worst=True)),
            ("Best images", best.pictures(worst=False)),
        ]
    sections += [("Settings", page.facts(_shown(settings))), ("Environment", page.facts(_environment(trainer)))]
    return page.page(trainer.out.resolve().name, f"{_what(trainer)} {_state(trainer, stopped)}", sections)


def _what(trainer: Trainer) -> str:
    network = trainer.network
    kind = type(network).__name__.replace("PlusPlus", "++")
    return (
        f"{kind}, {parameter_count(network):,} parameters, trained on {len(trainer.patches.samples)} images,"
        f" validated on {len(trainer.validation)}."
    )


def _state(trainer: Trainer, stopped: bool) -> str:
    of = f"{trainer.epoch} of {trainer.recipe.epochs} epochs"
    if stopped:
        return f"Stopped after {of}; --resume continues it."
    if trainer.epoch < trainer.recipe.epochs and trainer.validation:
        return f"Ended after {of}: no better validation {_monitor(trainer)} for {trainer.stale} epochs."
    return f"Finished, {of}." if trainer.epoch >= trainer.recipe.epochs else f"After {of}."


def _monitor(trainer: Trainer) -> str:
    """The score that chooses the best epoch."""
    return {"iou": "IoU", "dice": "Dice"}.get(trainer.recipe.monitor, trainer.recipe.monitor)


def _best_row(trainer: Trainer) -> Mapping[str, float] | None:
    key = f"val_{trainer.recipe.monitor}"
    judged = [row for row in trainer.history if math.isfinite(row.get(key, math.nan))]
    return MONITORS[trainer.recipe.monitor](judged, key=lambda row: row[key]) if judged else None


def _figures(trainer: Trainer) -> str:
    """The figures of the best epoch, or of the last one without validation."""
    if not trainer.history:
        return "<p>No epoch is finished yet.</p>"
    row = _best_row(trainer)
    if row is None:
        last = trainer.history[-1]
        return page.tiles({"training loss": _number(last["train_loss"]), "training IoU": _number(last["train_iou"])})
    values = {"validation IoU": row["val_iou"], "validation Dice": row["val_dice"], "validation loss": row["val_loss"]}
    return page.tiles({**{name: _number(value) for name, value in values.items()}, "best epoch": f"{row['epoch']:g}"})


def _curves(trainer: Trainer) -> str:
    """Loss and scores over the epochs, and every other column of the log in a chart of its own."""
    history = trainer.history
    if not history:
        return ""
    best = _best_row(trainer)
    groups = dict(CURVES)
    known = {column for columns in CURVES.values() for column in columns}
    for column in history[-1]:
        if column != "epoch" and column not in known:
            groups[column.replace("_", " ").capitalize()] = {column: "var(--fourth)"}
    charts = []
    for title, columns in groups.items():
        lines = [
            Line(NAMES.get(column, column), colour, [(row["epoch"], row.get(column, math.nan)) for row in history])
            for column, colour in columns.items()
        ]
        charts.append(line_chart(title, lines, mark=best["epoch"] if best else None))
    note = f"<p class='soft'>The dashed line is the best epoch, {best['epoch']:g}.</p>" if best else ""
    return f"{note}<div class='pair'>{''.join(charts)}</div>"


def _shown(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if value is not None:
            found[key.replace("_", " ")] = str(value)
    return found


def _environment(trainer: Trainer) -> dict[str, str]:
    return {
        "unetpp_fast": __version__,
        "torch": torch.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": device_name(trainer.device),
        "precision": trainer.recipe.dtype,
        "folder": os.fspath(trainer.out.resolve()),
    }


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "none"


def write_if_possible(trainer: Trainer, settings: Mapping[str, Any], stopped: bool = False) -> str:
    """As `write`; returns the page's path, or why it is not whole: a training does not fail by its report."""
    try:
        return str(write(trainer, settings, stopped))
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        return f"none with pictures, {first_line(error)}"
