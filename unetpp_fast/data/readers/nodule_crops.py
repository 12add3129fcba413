"""Ready-made 3D crops of CT scans, from NIfTI and NumPy files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ..images import check_size, rescale
from ..samples import Found
from .nifti import check_finite, check_geometry, first_line, open_nifti, read_part, to_labels

LUNG_WINDOW = (-1000.0, 400.0)
ENDINGS = (".nii", ".nii.gz", ".npy")


@dataclass(frozen=True)
class CropSample:
    """A small volume of CT in a file, and its masks, one file a class."""

    name: str
    image: Path
    masks: tuple[Path, ...]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Windowed volume, float32 `[1, D, H, W]` in -1..1, and mask, bool `[classes, D, H, W]`.

        Raises:
            InputError: a file cannot be read, sizes differ, or the values are no Hounsfield units.
        """
        values = _read_volume(self.image)[None]
        if np.abs(values).max() <= 1:
            raise InputError(f"{self.image} holds values within -1..1: expected Hounsfield units, before any scaling")
        masks = []
        for path in self.masks:
            if not path.suffix == self.image.suffix == ".npy":
                check_geometry(open_nifti(self.image), open_nifti(path), self.image, path)
            mask = to_labels(path, _read_volume(path))
            check_size(path, mask, self.image, values)
            masks.append(mask)
        return rescale(values, LUNG_WINDOW), np.stack(masks)


def crop_folders(root: Path) -> Found | None:
    """`images/<id>.nii.gz` with `masks/<class>/<id>.nii.gz`, or `.nii`, or `.npy` of axes `[z, y, x]`."""
    images = _by_id((root / "images").glob("*"))
    if not images:
        return None
    classes = sorted(path.name for path in (root / "masks").glob("*") if path.is_dir())
    if not classes:
        raise InputError(f"{root / 'masks'} holds no folder of masks: expected {root / 'masks'}/<class>/<id>.nii.gz")
    masks = {name: _by_id((root / "masks" / name).glob("*")) for name in classes}
    for name in classes:
        for key, path in images.items():
            mask = masks[name].get(key)
            if mask is None:
                raise InputError(f"volume {path} has no mask {root / 'masks' / name / path.name}")
            if (mask.suffix == ".npy") != (path.suffix == ".npy"):
                raise InputError(f"mask {mask} and volume {path} are of two formats: convert one")
    return [CropSample(key, path, tuple(masks[name][key] for name in classes)) for key, path in images.items()], classes


def _by_id(paths: Iterable[Path]) -> dict[str, Path]:
    return {path.name.split(".nii")[0].removesuffix(".npy"): path for path in sorted(paths) if path.name.endswith(ENDINGS)}


def _read_volume(path: Path) -> np.ndarray:
    """`[z, y, x]`, float32."""
    if path.suffix != ".npy":
        return read_part(path, open_nifti(path))
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a NumPy array ({first_line(error)}): replace it") from error
    if values.ndim != 3:
        raise InputError(f"{path} has {values.ndim} axes {values.shape}: expected a volume of three")
    return check_finite(path, values.astype(np.float32))
