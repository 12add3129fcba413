"""NIfTI volumes: opening, checking and reading them.

Axes are those of the file, in both directions: `[x, y, z]` in NIfTI becomes `[z, y, x]` here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import InputError
from ...common.extras import need


def open_nifti(path: Path) -> Any:
    """The nibabel image of a 3D NIfTI file, nothing but its header read.

    Raises:
        InputError: it cannot be read, or has other than three axes.
    """
    nibabel = need("nibabel", "nifti")
    try:
        volume = nibabel.load(path, mmap=False)  # a mapped file that shrinks would kill the process
    except Exception as error:  # a damaged header can fail in any way
        raise InputError(f"{path} cannot be read as NIfTI ({first_line(error)}): replace it") from error
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
        raise InputError(f"{path} cannot be read to its end ({first_line(error)}): replace it") from error
    return check_finite(path, values.T)


def to_labels(path: Path, values: np.ndarray) -> np.ndarray:
    """Values of a mask of any type as bool: 1 and more is foreground.

    Raises:
        InputError: a value is no whole number, as after resampling a mask with interpolation, or negative.
    """
    wrong = values[(values < 0) | (np.abs(values - np.round(values)) > 1e-3)]
    if len(wrong):
        raise InputError(f"mask {path} holds {wrong[0]:.6g}: labels are 0, 1, 2, ...; round or threshold it")
    return values > 0.5


def check_finite(path: Path, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise InputError(f"{path} holds NaN or infinite values: mend or remove it")
    return values


def _times(sizes: Iterable[float]) -> str:
    return "x".join(f"{size:.4g}" for size in sizes)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
