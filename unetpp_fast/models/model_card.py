"""The README of a saved network: what it is, how to use it, and how it was trained, from the files of its run."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from ..common.errors import InputError

# What a card tells of a run: figures of its log, and those of its settings that say nothing about the author's machine.
FIGURES = {"val_iou": "validation IoU", "val_dice": "validation Dice", "val_loss": "validation loss", "train_loss": "loss"}
SETTINGS = (
    "task", "epochs", "batch_size", "learning_rate", "patience", "patch", "patches_per_image", "val_fraction", "seed",
    "dtype", "dropout", "deep_supervision", "version", "torch",
)  # fmt: skip

CARD = """\
---
library_name: unetpp_fast
pipeline_tag: image-segmentation
tags:
- image-segmentation
- unet++
---

# {name}

{what}

```python
import unetpp_fast as uf

model = uf.from_pretrained("{name}")
probabilities = model.predict(image)  # [N, {channels}, {sides}] of any size to [N, {classes}, {sides}]
```
"""


def model_card(network: nn.Module, name: str, run: Path | None = None) -> str:
    """The text, Markdown with the Hub's header.

    Args:
        network: with a `topology`, `out_channels`, `options`, `normalisation` and `spacing`.
        name: of the folder or of the repository on the Hub.
        run: the folder of `unetpp-fast train`; without it the card says nothing about training.

    Raises:
        InputError: `run` has no log of a training.
    """
    topology = network.topology
    count = sum(parameter.numel() for parameter in network.parameters())
    heads = ", ".join(f"X(0,{column})" for column in topology.heads)
    what = (
        f"A segmentation network for {topology.spatial_dims}D images, of {topology.depth + 1} levels and {count:,}"
        f" parameters, with heads on {heads}. It takes {topology.in_channels} channel(s) and gives"
        f" {network.out_channels} class(es). Its norm is {network.options['norm']!r}, its activation"
        f" {network.options['act']!r}, its up-sampling {network.options['upsample']!r}."
    )
    if network.normalisation is not None:
        what += f" Give images as whole numbers, or prepared as in training: {network.normalisation.in_words}."
    if network.spacing is not None:
        what += f" Its voxels are {' x '.join(f'{size:g}' for size in network.spacing)} mm: resample volumes to that."
    sides = "H, W" if topology.spatial_dims == 2 else "D, H, W"
    text = CARD.format(name=name, what=what, channels=topology.in_channels, classes=network.out_channels, sides=sides)
    return text if run is None else f"{text}\n{_training(Path(run))}"


def _training(run: Path) -> str:
    """The section about a run: the figures of its best epoch, which are those of best.pt, and its settings."""
    try:
        with open(run / "log.csv", encoding="utf-8", newline="") as stream:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{run} has no readable log.csv: give the folder of a run of `unetpp-fast train`") from error
    if not rows:
        raise InputError(f"{run / 'log.csv'} has no epoch yet: train first")
    judged = [row for row in rows if not math.isnan(row.get("val_iou", math.nan))]
    best = max(judged, key=lambda row: row["val_iou"]) if judged else rows[-1]
    epoch = f"epoch {int(best['epoch'])} of {len(rows)}"
    intro = f"The best {epoch}, by validation IoU:" if judged else f"The last {epoch}, without validation images:"
    figures = {what: f"{best[key]:.4f}" for key, what in FIGURES.items() if not math.isnan(best.get(key, math.nan))}
    settings = _settings(run / "config.json")
    parts = ["## Training", intro, _table(figures)]
    if settings:
        parts += ["Settings:", _table({key: settings[key] for key in SETTINGS if settings.get(key) is not None})]
    return "\n\n".join(parts) + "\n"


def _settings(path: Path) -> dict[str, Any]:
    """The settings of a run; nothing if it has no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])
