"""LiTS: CT scans of the abdomen with masks of the liver, one sample per axial slice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ...models.normalisation import Normalisation
from ..images import rescale
from ..nifti import check_geometry, open_nifti, read_part, to_labels
from ..samples import Dataset

LIVER_WINDOW = (-200.0, 250.0)  # Hounsfield units: soft tissue


@dataclass(frozen=True)
class SliceSample:
    """An axial slice of a CT volume with the mask of the liver, lesions included; read when needed."""

    name: str
    group: str
    image: Path
    mask: Path
    index: int

    normalisation = Normalisation("window", window=LIVER_WINDOW)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Windowed slice, float32 `[1, H, W]` in -1..1, and mask, bool `[1, H, W]`; errors as `read_part`."""
        window = (slice(None), slice(None), slice(self.index, self.index + 1))
        values, labels = (read_part(path, open_nifti(path), window) for path in (self.image, self.mask))
        return rescale(values, LIVER_WINDOW), to_labels(self.mask, labels)


def liver_volumes(root: Path) -> Dataset | None:
    """`volume-N.nii` with `segmentation-N.nii` (or `.nii.gz`), anywhere below the root; one sample per slice.

    Slices without liver are included. A compressed file is decompressed again for each of its slices until they are
    cached: `gunzip` large ones.
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
    """The files `<kind>-N.nii` and `<kind>-N.nii.gz` below the root, by N."""
    files: dict[str, Path] = {}
    for path in sorted(root.rglob(f"{kind}-*.nii*")):
        match = re.fullmatch(rf"{kind}-(\d+)\.nii(\.gz)?", path.name)
        if match:
            if match[1] in files:
                raise InputError(f"{files[match[1]]} and {path} have the same number: keep one of them")
            files[match[1]] = path
    return files
