"""Volumes of unlike spacing on one, by linear interpolation; of masks the class with the largest share is taken.

Both grids cover the same length along every axis, so that what was resampled can be brought back onto the grid of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..common.errors import InputError

TIE = 1e-3  # by which the share of the nearest voxel's class counts more
UNLIKE = 3.0  # times the other axes' spacing: thick slices, as in nnU-Net
FINEST = 10  # percentile of the spacing across thick slices that stands for the data set


def size_at(size: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """The number of voxels along each axis when voxels of `spacing` become those of `wanted`, in mm."""
    return tuple(max(1, round(count * own / new)) for count, own, new in zip(size, spacing, wanted, strict=True))


def planes(volume: Any, size: Sequence[int]) -> Iterator[np.ndarray]:
    """The planes `[C, H, W]`, float32, of a volume in another size `(D, H, W)`, by trilinear interpolation.

    volume: `[1, C, D, H, W]`, anything that returns arrays for slices. Two of its planes are held at a time.
    """
    whole, length = slice(None), volume.shape[2]
    for index in range(size[0]):
        at = min(max((index + 0.5) * length / size[0] - 0.5, 0.0), length - 1.0)
        low = min(int(at), max(length - 2, 0))
        pair = np.asarray(volume[(0, whole, slice(low, low + 2), whole, whole)], np.float32)
        plane = pair[:, 0] + (pair[:, -1] - pair[:, 0]) * np.float32(at - low)
        yield F.interpolate(torch.from_numpy(plane)[None], tuple(size[1:]), mode="bilinear")[0].numpy()


def resampled(volume: Any, size: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
    """A volume `[1, C, *S]` in another size: float32 `[C, *size]`, a new array or `out`."""
    out = np.empty((volume.shape[1], *size), np.float32) if out is None else out
    for index, plane in enumerate(planes(volume, size)):
        out[:, index] = plane
    return out


def resampled_mask(mask: np.ndarray, size: Sequence[int], exclusive: bool) -> np.ndarray:
    """A mask, bool `[classes, *S]`, in another size: bool `[classes, *size]`.

    A voxel belongs to the classes with more than half of it, of exclusive ones to that with the largest share, where "none"
    is one too. Where shares are equal, as at half the resolution, the nearest voxel decides, or else objects would shrink.
    """
    out = np.empty((len(mask), *size), bool)
    numbers = np.arange(len(mask)).reshape(-1, 1, 1)
    z, y, x = (((np.arange(new) + 0.5) * (old / new)).astype(int) for new, old in zip(size, mask.shape[1:], strict=True))
    for index, share in enumerate(planes(mask[None], size)):
        share += TIE * mask[:, z[index]][:, y][:, :, x]
        if exclusive:
            out[:, index] = (numbers == share.argmax(axis=0)) & (share.max(axis=0) > 1 + TIE - share.sum(axis=0))
        else:
            out[:, index] = share > 0.5 + TIE / 2
    return out


def at_spacing(
    image: np.ndarray,
    mask: np.ndarray,
    spacing: Callable[[], Sequence[float] | None],
    wanted: Sequence[float] | None,
    name: Any,
    exclusive: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """An image, float32 `[C, *S]`, and its mask `[classes, *S]` with voxels of `wanted` mm; as they are for None.

    spacing: reads that of the volume `name`.

    Raises:
        InputError: the spacing is not known, or is for other axes than those wanted.
    """
    if wanted is None:
        return image, mask
    size = size_at(image.shape[1:], checked_spacing(spacing(), len(wanted), name), wanted)
    if size == image.shape[1:]:
        return image, mask
    return resampled(image[None], size), resampled_mask(mask, size, exclusive)


def checked_spacing(spacing: Sequence[float] | None, axes: int, name: Any) -> Sequence[float]:
    """The spacing of the volume `name`; raises InputError if it is not known along so many axes."""
    if spacing is None or len(spacing) != axes:
        what = "the size of its voxels, and cannot be resampled"
        raise InputError(f"{name} does not tell {what}: save it as NIfTI, MetaImage, NRRD or DICOM")
    return spacing


def common_spacing(found: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The spacing for a data set, as in nnU-Net: the median along each axis, and across slices more than three times as
    thick as the other axes' voxels the 10th percentile, for there finer volumes would lose most.

    found: of each volume, in mm.
    """
    spacing = np.median(np.array(found), axis=0)
    thick = int(spacing.argmax())
    others = float(np.delete(spacing, thick).max())
    if spacing[thick] > UNLIKE * others:
        spacing[thick] = max(float(np.percentile([one[thick] for one in found], FINEST)), others)
    return tuple(round(float(value), 6) for value in spacing)
