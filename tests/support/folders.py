"""Small data folders in the layout that `unetpp-fast train` reads, cut from the nuclei image in `examples/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from unetpp_fast.data.masks import read_labels
from unetpp_fast.experiments.demo import example

SIDE = 48


def write_nuclei(root: Path, count: int = 5, classes: tuple[str, ...] = ("nuclei",), colour: bool = False) -> Path:
    """`count` images of 48x48 pixels with one mask per class; all classes have the same masks."""
    picture = Image.open(example("nuclei/image.png"))
    labels = read_labels(example("nuclei/instances.png"))
    (root / "images").mkdir(parents=True)
    for index in range(count):
        top, left = 48 * (index // 4), 48 * (index % 4)
        tile = picture.crop((left, top, left + SIDE, top + SIDE))
        (tile.convert("RGB") if colour else tile).save(root / "images" / f"cell{index}.png")
        mask = (labels[top : top + SIDE, left : left + SIDE] > 0).astype(np.uint8) * 255
        for name in classes:
            (root / "masks" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "masks" / name / f"cell{index}.png")
    return root
