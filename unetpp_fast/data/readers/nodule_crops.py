"""Crops of CT scans around lung nodules, prepared by the user as volumes in any format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ...models.normalisation import Normalisation
from ..file_formats import files_by_id, format_of, volume_endings
from ..images import rescale
from ..inputs import read_drawn_values, read_real_volume, stack_masks
from ..nifti import to_labels
from ..samples import Dataset

LUNG_WINDOW = (-1000.0, 400.0)  # Hounsfield units


@dataclass(frozen=True)
class CropSample:
    """A small CT volume and its masks, one file per class; read when needed."""

    name: str
    image: Path
    masks: tuple[Path, ...]

    normalisation = Normalisation("window", window=LUNG_WINDOW)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Windowed volume, float32 `[1, D, H, W]` in -1..1, and mask, bool `[classes, D, H, W]`.

        Raises:
            InputError: a file cannot be read, sizes differ, or the values are not Hounsfield units.
        """
        drawn = [read_drawn_values(path) for path in self.masks]
        masks = [replace(mask, values=to_labels(mask.path, mask.values)) for mask in drawn]
        values = read_real_volume(self.image, masks[0])
        if np.abs(values).max() <= 1:
            raise InputError(f"{self.image} holds values within -1..1: expected Hounsfield units, before any scaling")
        return rescale(values.astype(np.float32), LUNG_WINDOW), stack_masks(masks)


def crop_folders(root: Path) -> Dataset | None:
    """`images/<id>.nii.gz` with `masks/<class>/<id>.nii.gz`, or `.nii`, or `.npy` with axes `[z, y, x]`."""
    images = files_by_id(root / "images", volume_endings())
    if not images:
        return None
    folder = root / "masks"
    classes = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if not classes:
        raise InputError(f"{folder} holds no folder of masks: expected {folder}/<class>/<id>.nii.gz")
    masks = {name: files_by_id(folder / name, volume_endings()) for name in classes}
    for name in classes:
        for key, path in images.items():
            mask = masks[name].get(key)
            if mask is None:
                raise InputError(f"volume {path} has no mask {folder / name / path.name}")
            if format_of(mask) is not format_of(path):
                raise InputError(f"mask {mask} and volume {path} have different formats: convert one of them")
    return [CropSample(key, path, tuple(masks[name][key] for name in classes)) for key, path in images.items()], classes
