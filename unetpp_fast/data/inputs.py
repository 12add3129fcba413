"""What training reads from files of any format: masks, label maps, and images of one file or one per channel.

Pictures follow the rules of `decoding` and `masks`. Volumes and arrays hold the same values: 0 and one other for a mask,
whole numbers for a label map. A volume of a single plane is an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..common.errors import InputError
from .file_formats import affine_of, format_of, read_stored
from .geometry import check_affines, spacing_from, times
from .images import check_finite, check_size, read_values
from .masks import read_label_map, read_mask, two_valued, whole_numbers
from .stored import Stored

OFF_GRID = 0.1  # voxels by which a plane of a segmentation may lie off its volume's


@dataclass(frozen=True)
class Drawn:
    """A mask, bool `[*S]`, or a label map, whole numbers `[*S]`.

    palette: uint8 `[entries, 3]`, or None. affine, places: as in `Stored`; with places the values are planes of a volume.
    """

    path: Path
    values: np.ndarray
    palette: np.ndarray | None = None
    affine: np.ndarray | None = None
    places: np.ndarray | None = None

    def on_grid_of(self, path: Path) -> Drawn:
        """The whole mask of the volume `path`, if this is some of its planes; else the mask as it is.

        Raises:
            InputError: the volume cannot be read, or the planes do not lie on its slices.
        """
        if self.places is None or self.affine is None:
            return self
        stored = read_stored(path)
        if stored.affine is None:
            raise InputError(f"{path} does not tell where its voxels lie, as the segmentation {self.path} needs")
        shape = [size for size, axis in zip(stored.values.shape, stored.axes or "ZYX", strict=False) if axis != "C"]
        corner = np.array([*self.values.shape[:0:-1], 0.0])  # beyond the last pixel of a plane: x, y
        ends = np.concatenate([self.places, self.places + self.affine[:3, :3] @ corner])
        at = (np.linalg.inv(stored.affine) @ np.c_[ends, np.ones(len(ends))].T).T[:, :3].reshape(2, -1, 3)  # in voxels
        z = np.round(at[0, :, 2]).astype(int)
        wanted = np.stack([np.c_[0 * z, 0 * z, z], np.c_[0 * z, 0 * z, z] + corner])
        fits = self.values.shape[1:] == tuple(shape[1:]) and z.min() >= 0 and z.max() < shape[0]
        if not fits or np.abs(at - wanted).max() > OFF_GRID:
            raise InputError(f"segmentation {self.path} does not lie on the slices of {path}: give the series that it is of")
        values = np.zeros(shape, self.values.dtype)
        values[z] = self.values
        return replace(self, values=values, affine=stored.affine, places=None)


def read_drawn_mask(path: Path) -> Drawn:
    """A mask of one class in any format.

    Raises:
        InputError: the file cannot be read, or holds more than 0 and one other value.
    """
    if format_of(path).images:
        return Drawn(path, read_mask(path))
    drawn = read_drawn_values(path)
    return replace(drawn, values=two_valued(drawn.values, drawn.values.dtype == np.uint8, path))


def read_drawn_labels(path: Path) -> Drawn:
    """A label map in any format.

    Raises:
        InputError: the file cannot be read, or holds other values than 0, 1, 2, ...
    """
    if format_of(path).images:
        return Drawn(path, *read_label_map(path))
    drawn = read_drawn_values(path)
    return replace(drawn, values=whole_numbers(drawn.values, path))


def read_drawn_values(path: Path) -> Drawn:
    """The values of a file that is no picture, `[*S]`.

    Raises:
        InputError: the file cannot be read, holds several values for each pixel, or NaN or infinity.
    """
    stored = read_stored(path, mask=True)
    values = stored.values
    if stored.axes and "C" in stored.axes:
        channels = values.shape[stored.axes.index("C")]
        if channels != 1:
            raise InputError(f"mask {stored.path} has {channels} values for each pixel: save one file per class")
        values = values.squeeze(stored.axes.index("C"))
    if values.ndim not in (2, 3) or not values.size or values.dtype.kind not in "biuf":
        raise InputError(f"mask {stored.path} has the shape {values.shape} of {values.dtype}: expected an image or a volume")
    values = stored.real(values) if (stored.slope, stored.offset) != (1.0, 0.0) else np.asarray(values)
    values = values.view(np.uint8) if values.dtype == bool else values
    check_finite(values, f"mask {path}")
    single = values.ndim == 3 and len(values) == 1 and stored.places is None
    return Drawn(path, values[0] if single else values, affine=stored.affine, places=stored.places)


def spacing_of(*paths: Path) -> tuple[float, ...] | None:
    """Millimetres between neighbours along z, y and x, by the first of these volumes whose format tells; else None."""
    return next((spacing for path in paths if (spacing := spacing_from(affine_of(path)))), None)


def stack_masks(masks: Sequence[Drawn]) -> np.ndarray:
    """Masks of several classes, bool `[classes, *S]`.

    Raises:
        InputError: they differ in size or grid.
    """
    first = masks[0]
    for mask in masks[1:]:
        check_affines(first.affine, mask.affine, first.path, mask.path)
        if mask.values.shape != first.values.shape:
            sizes = " and ".join(times(drawn.values.shape) for drawn in (first, mask))
            raise InputError(f"masks {first.path} and {mask.path} are {sizes}: they must have the same size")
    return np.stack([mask.values for mask in masks])


def read_inputs(files: Sequence[Path], drawn: Drawn) -> np.ndarray:
    """An image that fits a mask or label map `[*S]`, before it is prepared: float64 `[C, *S]`.

    files: of the image, whose channels follow one another.

    Raises:
        InputError: a file cannot be read, or does not have the size or the grid of the mask.
    """
    parts = [_channels(path, drawn) for path in files]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_real_volume(path: Path, drawn: Drawn) -> np.ndarray:
    """The values that a file stands for, float64 `[C, *S]`; errors as `read_inputs`."""
    stored = read_stored(path)
    if not stored.values.size or stored.values.dtype.kind not in "biuf":
        raise InputError(f"{path} holds no image: {stored.values.dtype} values of shape {stored.values.shape}")
    check_affines(stored.affine, drawn.affine, path, drawn.path)
    values = _channels_first(stored, drawn)
    if drawn.values.ndim == 2 and values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    check_size(drawn.path, drawn.values, path, values)
    return check_finite(stored.real(values), path)


def _channels(path: Path, drawn: Drawn) -> np.ndarray:
    if not format_of(path).images:
        return read_real_volume(path, drawn)
    values = read_values(path)
    check_size(drawn.path, drawn.values, path, values)
    return values


def _channels_first(stored: Stored, drawn: Drawn) -> np.ndarray:
    """The array with its channels in front. If the file does not name its axes, the mask tells them."""
    values, shape = stored.values, drawn.values.shape
    if stored.axes:
        return np.moveaxis(values, stored.axes.index("C"), 0) if "C" in stored.axes else values[None]
    if values.ndim == len(shape) + 1:
        if values.shape[1:] != shape and values.shape[:-1] == shape:
            return np.moveaxis(values, -1, 0)
        return values
    if values.ndim != len(shape):
        have = f"{values.ndim} axes {values.shape}"
        raise InputError(f"{stored.path} has {have}, its mask {drawn.path} has {len(shape)}: expected [*S] or [C, *S]")
    return values[None]
