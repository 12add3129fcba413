"""The demo in 3D: U-Net and UNet++ trained on the lower planes of a stack of nuclei, tested on the upper ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from ..common import messages
from ..data.samples import ArraySample
from ..training import processes
from . import demo, pictures

FEATURES = (8, 16, 32, 64)
PATCH = 16
TRAINED = 20  # planes of 31; the other 11 are held out
SHOWN = (2, 5, 8)  # of the held-out planes


def parts() -> tuple[ArraySample, ArraySample]:
    """The lower 20 and the upper 11 planes, 61x57 voxels each, of the stack of nuclei with its mask."""
    with np.load(demo.example("nuclei/volume.npz")) as stack:
        image, mask = stack["image"].astype(np.float32)[None], stack["instances"][None] > 0
    lower, upper = np.s_[:, :TRAINED], np.s_[:, TRAINED:]
    return ArraySample("lower", image[lower], mask[lower]), ArraySample("upper", image[upper], mask[upper])


def run(
    out: Path,
    *,
    epochs: int = 10,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    reproducible: bool = False,
    loss: nn.Module | None = None,
) -> list[dict]:
    """Trains, tests and prunes; prints the table, writes `planes.png` and `speed_accuracy.png` to `out`.

    Args:
        reproducible: as in `Recipe`. loss: as in `Trainer`.

    Returns:
        The rows of the table, as `demo.run`.
    """
    lower, upper = parts()
    recipe = demo.make_recipe(epochs, seed, dtype, reproducible)
    options = {"features": FEATURES, "spatial_dims": 3}
    rows, masks = demo.compare(lower, upper, recipe, out, device, patch=PATCH, loss=loss, **options)
    if processes.is_first():
        pictures.planes(out / "planes.png", upper.image[0], upper.mask[0], masks, SHOWN)
        messages.say(f"pictures: {out / 'planes.png'}, {out / 'speed_accuracy.png'}")
    return rows
