"""What every reader of a file returns: the array as it is stored, and what its values stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stored:
    """The array in a file.

    values: as stored, mapped into memory if the format allows it; they stand for slope * value + offset.
    axes: one letter per axis: C channels, Z planes, Y rows, X columns; None if the file does not name its axes.
    header: what the format needs to write such a file again.
    scale: a further factor for models of pictures, so that 8-bit and 16-bit values lie in 0..1; models of physical values
        (a window of Hounsfield units) take values without it.
    affine: where the voxels of a volume lie: the matrix from voxels x, y, z to mm to the right, front and top, `[4, 4]`;
        None if the format has none.
    places: of a segmentation that holds some planes of its volume, where each begins in these mm, `[P, 3]`.
    """

    path: Any
    values: np.ndarray
    axes: str | None = None
    header: Any = None
    slope: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    affine: np.ndarray | None = None
    places: np.ndarray | None = None

    def real(self, values: np.ndarray, physical: bool = False) -> np.ndarray:
        """What a part of `values` stands for, float64."""
        scale = 1.0 if physical else self.scale
        return values.astype(np.float64) * (self.slope * scale) + self.offset * scale


def path_of(file: Any) -> str:
    """How an error names a file, or an open stream."""
    return str(file) if isinstance(file, (str, Path)) else "the image"
