"""The 2018 Data Science Bowl: microscopy images with one mask file per nucleus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ..file_formats import find_images
from ..images import check_size, read_normalised
from ..masks import read_mask
from ..pairs import find_samples
from ..samples import Dataset, Sample

STAGES = ("", "stage1_train")


@dataclass(frozen=True)
class InstanceSample(Sample):
    """An image with one mask file per object; their union is the mask of its single class."""

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image, float32 `[C, H, W]`, and mask, bool `[1, H, W]`; errors as `Sample.load`."""
        image = read_normalised(self.image, self.normalisation)
        union = np.zeros(image.shape[1:], bool)
        for path in self.masks:
            mask = read_mask(path)
            check_size(path, mask, self.image, image)
            union |= mask
        return image, union[None]


def nuclei_folders(root: Path) -> Dataset | None:
    """`images/<id>.png` with `masks/<class>/<id>.png`, the layout of pytorch-nested-unet."""
    return find_samples(root) if (root / "images").is_dir() else None


def nuclei_stage1(root: Path) -> Dataset | None:
    """`stage1_train/<id>/images/<id>.png` with `stage1_train/<id>/masks/*.png`, one file per nucleus; the root may be
    `stage1_train` itself."""
    for stage in STAGES:
        folders = sorted(path for path in (root / stage).glob("*") if (path / "images").is_dir())
        if folders:
            return [_instances(folder) for folder in folders], ["nuclei"]
    return None


def _instances(folder: Path) -> InstanceSample:
    images = find_images(folder / "images")
    if len(images) > 1:
        raise InputError(f"{folder / 'images'} holds {len(images)} images, expected one: keep {folder.name}.png")
    if not (folder / "masks").is_dir():
        raise InputError(f"{folder} has no folder masks/: is it from the test set? Only stage1_train has masks")
    masks = find_images(folder / "masks")
    return InstanceSample(folder.name, next(iter(images.values())), tuple(masks.values()))
