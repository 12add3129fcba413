"""Reading NIfTI volumes for training, and checking that masks fit them.

The axes keep the order and directions of the file: `[x, y, z]` in NIfTI is `[z, y, x]` here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError, first_line
from ..common.extras import need
from .geometry import check_affines, times
from .images import check_finite


def open_nifti(path: Path) -> Any:
    """The nibabel image of a 3D NIfTI file; only its header is read.

    Raises:
        InputError: the file cannot be read, or does not have three axes.
    """
    nibabel = need("nibabel", "nifti")
    try:
        volume = nibabel.load(path, mmap=False)  # a mapped file that shrinks would kill the process
    except Exception as error:  # a damaged header can fail in any way
        raise InputError(f"{path} cannot be read as NIfTI ({first_line(error)}): replace it") from error
    if len(volume.shape) != 3:
        raise InputError(f"{path} has {len(volume.shape)} axes {tuple(volume.shape)}: expected a volume with three")
    _check_length(path, volume)
    return volume


def _check_length(path: Path, volume: Any) -> None:
    """Raises InputError for a truncated uncompressed file, which otherwise would fail at a slice hours later."""
    stored = volume.dataobj
    expected = stored.offset + int(np.prod(volume.shape)) * stored.dtype.itemsize
    if path.suffix.lower() == ".nii" and path.stat().st_size < expected:
        raise InputError(f"{path} is truncated: {path.stat().st_size:,} bytes of {expected:,}; download it again")


def check_geometry(image: Any, mask: Any, image_path: Path, mask_path: Path) -> None:
    """Raises InputError unless both nibabel images have the same grid: shape, spacing, directions and origin."""
    pair = f"mask {mask_path} and volume {image_path}"
    if image.shape != mask.shape:
        raise InputError(f"{pair} differ in shape: {times(mask.shape)} and {times(image.shape)} voxels")
    check_affines(image.affine, mask.affine, image_path, mask_path)


def read_part(path: Path, volume: Any, window: tuple[slice, ...] = (slice(None),) * 3) -> np.ndarray:
    """A part of a nibabel image, scaled as its header says: float32 `[z, y, x]`.

    window: slices of the axes x, y, z.

    Raises:
        InputError: the file ends early, or holds NaN or infinity.
    """
    try:
        values = np.asarray(volume.dataobj[window], np.float32)
    except Exception as error:  # a damaged stream can fail in any way
        raise InputError(f"{path} cannot be read to its end ({first_line(error)}): replace it") from error
    return check_finite(values.T, path)


def to_labels(path: Path, values: np.ndarray) -> np.ndarray:
    """The values of a mask, of any type, as bool: 1 and above is foreground.

    Raises:
        InputError: a value is negative, or not a whole number, as after resampling a mask with interpolation.
    """
    wrong = values[(values < 0) | (np.abs(values - np.round(values)) > 1e-3)]
    if len(wrong):
        raise InputError(f"mask {path} holds {wrong[0]:.6g}: labels are 0, 1, 2, ...; round or threshold it")
    return values > 0.5
