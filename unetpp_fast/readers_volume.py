"""Volumes: the CT scans of LiTS slice by slice, and ready-made 3D crops, from NIfTI and NumPy files.

Axes are those of the file, in both directions: `[x, y, z]` in NIfTI becomes `[z, y, x]` here. Values are Hounsfield units
and go through a fixed window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import data
from .files import InputError, need
from .readers import Found

LIVER_WINDOW = (-200.0, 250.0)  # Hounsfield units: soft tissue
LUNG_WINDOW = (-1000.0, 400.0)
ENDINGS = (".nii", ".nii.gz", ".npy")


def open_nifti(path: Path) -> Any:
    """The nibabel image of a 3D NIfTI file, nothing but its header read.

    Raises:
        InputError: it cannot be read, or has other than three axes.
    """
    nibabel = need("nibabel", "nifti")
    try:
        volume = nibabel.load(path, mmap=False)  # a mapped file that shrinks would kill the process
    except Exception as error:  # a damaged header can fail in any way
        raise InputError(f"{path} cannot be read as NIfTI ({_first_line(error)}): replace it") from error
    if len(volume.shape) != 3:
        raise InputError(f"{path} has {len(volume.shape)} axes {tuple(volume.shape)}: expected a volume of three")
    _check_length(path, volume)
    return volume


def _check_length(path: Path, volume: Any) -> None:
    """Raises InputError for an uncompressed file that ends early, which else a slice would show hours later."""
    stored = volume.dataobj
    expected = stored.offset + int(np.prod(volume.shape)) * stored.dtype.itemsize
    if path.suffix == ".nii" and path.stat().st_size < expected:
        raise InputError(f"{path} is truncated: {path.stat().st_size:,} bytes of {expected:,}; download it again")


def check_geometry(image: Any, mask: Any, image_path: Path, mask_path: Path) -> None:
    """Raises InputError unless both nibabel images lie on one grid: shape, spacing, directions and origin."""
    pair = f"mask {mask_path} and volume {image_path}"
    if image.shape != mask.shape:
        raise InputError(f"{pair} differ in shape: {_times(mask.shape)} and {_times(image.shape)} voxels")
    spacing, masks_spacing = (np.array(one.header.get_zooms()[:3], float) for one in (image, mask))
    if not np.allclose(spacing, masks_spacing, rtol=1e-3):
        raise InputError(f"{pair} differ in spacing: {_times(masks_spacing)} and {_times(spacing)} mm; resample the mask")
    if np.abs(image.affine - mask.affine).max() > 0.1 * spacing.min():
        raise InputError(f"{pair} differ in affine: the mask is turned or shifted; copy the volume's header if it is not")


def read_part(path: Path, volume: Any, window: tuple[slice, ...] = (slice(None),) * 3) -> np.ndarray:
    """The values of a part of a nibabel image, scaled as its header says, `[z, y, x]` in the file's order.

    Raises:
        InputError: the file ends early, or holds NaN or infinity.
    """
    try:
        values = np.asarray(volume.dataobj[window], np.float32)
    except Exception as error:  # a damaged stream can fail in any way
        raise InputError(f"{path} cannot be read to its end ({_first_line(error)}): replace it") from error
    return _finite(path, values.T)


def to_labels(path: Path, values: np.ndarray) -> np.ndarray:
    """Values of a mask of any type as bool: 1 and more is foreground.

    Raises:
        InputError: a value is no whole number, as after resampling a mask with interpolation, or negative.
    """
    wrong = values[(values < 0) | (np.abs(values - np.round(values)) > 1e-3)]
    if len(wrong):
        raise InputError(f"mask {path} holds {wrong[0]:.6g}: labels are 0, 1, 2, ...; round or threshold it")
    return values > 0.5


@dataclass(frozen=True)
class SliceSample:
    """One axial slice of a CT volume with the mask of the liver, lesions included; read when asked for."""

    name: str
    group: str
    image: Path
    mask: Path
    index: int

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Windowed slice, float32 `[1, H, W]` in -1..1, and mask, bool `[1, H, W]`; errors as `read_part`."""
        window = (slice(None), slice(None), slice(self.index, self.index + 1))
        values, labels = (read_part(path, open_nifti(path), window) for path in (self.image, self.mask))
        return data.rescale(values, LIVER_WINDOW), to_labels(self.mask, labels)


def liver_volumes(root: Path) -> Found | None:
    """`volume-N.nii` with `segmentation-N.nii`, anywhere below the root, `.nii.gz` too; one sample a slice.

    Every slice counts, those without liver too. A compressed file is decompressed anew for each of its slices until it
    is in memory: `gunzip` large ones.
    """
    volumes, masks = (_numbered(root, kind) for kind in ("volume", "segmentation"))
    if not volumes:
        return None
    samples = []
    for key, path in volumes.items():
        if key not in masks:
            raise InputError(f"volume {path} has no segmentation-{key}.nii: only the training batches have one")
        image = open_nifti(path)
        check_geometry(image, open_nifti(masks[key]), path, masks[key])
        name = f"volume-{int(key):03d}"
        samples += [SliceSample(f"{name}/{k:04d}", name, path, masks[key], k) for k in range(image.shape[2])]
    return samples, ["liver"]


def _numbered(root: Path, kind: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(root.rglob(f"{kind}-*.nii*")):
        match = re.fullmatch(rf"{kind}-(\d+)\.nii(\.gz)?", path.name)
        if match:
            if match[1] in found:
                raise InputError(f"{found[match[1]]} and {path} have one number: keep one of them")
            found[match[1]] = path
    return found


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
            data.check_size(path, mask, self.image, values)
            masks.append(mask)
        return data.rescale(values, LUNG_WINDOW), np.stack(masks)


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
        raise InputError(f"{path} cannot be read as a NumPy array ({_first_line(error)}): replace it") from error
    if values.ndim != 3:
        raise InputError(f"{path} has {values.ndim} axes {values.shape}: expected a volume of three")
    return _finite(path, values.astype(np.float32))


def _finite(path: Path, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise InputError(f"{path} holds NaN or infinite values: mend or remove it")
    return values


def _times(sizes: Iterable[float]) -> str:
    return "x".join(f"{size:.4g}" for size in sizes)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
