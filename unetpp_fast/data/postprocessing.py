"""Cleaning predicted masks: connected components and holes, by scipy."""

from __future__ import annotations

import numpy as np

from ..common.errors import InputError
from ..common.extras import need

EXTRA = "postprocess"


def postprocess(
    mask: np.ndarray, *, keep_largest: int | None = None, min_size: int = 0, fill_holes: bool = False
) -> np.ndarray:
    """A mask or label map without small parts and holes; of a label map each class but 0, the background, by itself.

    First components of fewer than `min_size` pixels go, and all but the `keep_largest` largest ones of the mask or class (of
    equal ones the first in memory order stays): they become background. Then holes are filled, background from which no path
    along the axes leads out of the class; other classes inside stay. Pixels that touch at a corner belong together.

    Args:
        mask: `[*S]`, bool, or whole numbers, the classes, which exclude one another.
        keep_largest: the number of components to keep, at least 1; None for all.
        min_size: in pixels or voxels, at least 0.
        fill_holes: whether to fill holes.

    Returns:
        A new array of the mask's type and shape. Components are counted in memory: 8 bytes a pixel on top.

    Raises:
        InputError: an argument does not fit, or scipy is missing (extra `postprocess`).
    """
    if keep_largest is not None and keep_largest < 1:
        raise InputError(f"keep_largest must be at least 1, not {keep_largest}")
    if min_size < 0:
        raise InputError(f"min_size must be at least 0, not {min_size}")
    mask = np.asarray(mask)
    if mask.dtype.kind not in "biu":
        raise InputError(f"expected a mask of truth values or of whole numbers, got {mask.dtype}: threshold it first")
    result = mask.copy()
    values = [True] if mask.dtype.kind == "b" else [value for value in np.unique(mask).tolist() if value]
    if keep_largest is not None or min_size > 1:
        for value in values:
            part = mask == value
            result[part & ~_components(part, keep_largest, min_size)] = 0
    if fill_holes:
        fill = need("scipy.ndimage", EXTRA).binary_fill_holes
        for value in values:
            result[fill(result == value) & (result == 0)] = value
    return result


def _components(mask: np.ndarray, most: int | None, least: int) -> np.ndarray:
    """The pixels of at most `most` components, the largest ones of at least `least` pixels."""
    labels, count = need("scipy.ndimage", EXTRA).label(mask, np.ones((3,) * mask.ndim, bool))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    order = np.argsort(-sizes, kind="stable")[: count if most is None else most]
    kept = np.zeros(count + 1, bool)
    kept[order] = sizes[order] >= max(least, 1)
    return kept[labels]
