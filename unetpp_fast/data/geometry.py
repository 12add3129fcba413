"""Whether a mask lies on the grid of its volume, and the sides of patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..common.errors import InputError


def check_affines(
    image: np.ndarray | None, mask: np.ndarray | None, image_path: Path, mask_path: Path, what: str = "mask"
) -> None:
    """Raises InputError unless both have the same spacing, directions and origin.

    image, mask: matrices from voxels x, y, z to mm, `[4, 4]`; a file whose format has none, None, fits any. what: the second
    file is.
    """
    if image is None or mask is None:
        return
    pair = f"{what} {mask_path} and volume {image_path}"
    spacing, mask_spacing = (np.linalg.norm(affine[:3, :3], axis=0) for affine in (image, mask))
    if not np.allclose(spacing, mask_spacing, rtol=1e-3):
        raise InputError(f"{pair} differ in spacing: {times(mask_spacing)} and {times(spacing)} mm; resample the {what}")
    if np.abs(image - mask).max() > 0.1 * spacing.min():
        raise InputError(f"{pair} differ in affine: the {what} is turned or shifted; if it is not, copy the volume's header")


def times(sizes: Iterable[float]) -> str:
    """`0.7x0.8x2.5`."""
    return "x".join(f"{size:.4g}" for size in sizes)


def spacing_from(affine: np.ndarray | None) -> tuple[float, ...] | None:
    """Millimetres between voxels along z, y and x, of a matrix from voxels x, y, z to mm; None for None."""
    return None if affine is None else tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())


def sides_of(patch: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """The side of a patch along each of so many axes; one number is that of all.

    Raises:
        InputError: there are not as many sides as axes, or one is not positive.
    """
    sides = (patch,) * axes if isinstance(patch, int) else tuple(patch)
    if len(sides) != axes or min(sides) < 1:
        raise InputError(f"a patch has one side, or one for each of the {axes} axes, of at least 1, not {patch}")
    return sides
