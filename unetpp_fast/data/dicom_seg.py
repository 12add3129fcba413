"""DICOM segmentations (SEG) as masks and label maps: a file holds those slices alone on which something is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError
from ..common.extras import need
from .itk import RAS
from .stored import Stored

EXTRA = "dicom"
KINDS = (b"1.2.840.10008.5.1.4.1.1.66.4", b"1.2.840.10008.5.1.4.1.1.66.7")  # (Label Map) Segmentation Storage
AT_MOST = 255  # segments
HEAD = 2048  # bytes in which a file says what it is


def is_segmentation(path: Path) -> bool:
    """Whether a file is a DICOM segmentation, by its first bytes."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD)
    return head[128:132] == b"DICM" and any(kind + b"\x02\x00" in head for kind in KINDS)  # then an element of group 2


def read(path: Path) -> Stored:
    """The planes of a segmentation, uint8 `[P, Y, X]`: the number of the segment of each pixel, 0 for none.

    `affine` is that of the first plane with slices of 1 mm, and `places` tells where each plane begins.

    Raises:
        InputError: segments overlap, there are more than 255, or the file does not say where its planes lie.
    """
    pydicom = need("pydicom", EXTRA)
    data = pydicom.dcmread(path)
    kind = str(data.get("SegmentationType", ""))
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise InputError(f"segmentation {path} is of the type {kind or 'none'}: save it as BINARY")
    frames = np.asarray(data.pixel_array).reshape(-1, int(data.Rows), int(data.Columns))
    shared = data.SharedFunctionalGroupsSequence[0]
    most = int(data.get("MaximumFractionalValue", 255)) if kind == "FRACTIONAL" else 1
    labels, places, axes = [], [], []
    for frame, own in zip(frames, data.PerFrameFunctionalGroupsSequence, strict=True):
        if kind != "LABELMAP":
            number = int(_of(path, "SegmentIdentificationSequence", own, shared).ReferencedSegmentNumber)
            frame = number * (2 * frame.astype(int) > most)
        if not 0 <= frame.min() <= frame.max() <= AT_MOST:
            raise InputError(f"segmentation {path} has a segment {frame.max()}: label maps hold 1 to {AT_MOST}")
        place = np.array(_of(path, "PlanePositionSequence", own, shared).ImagePositionPatient, float)
        along = np.array(_of(path, "PlaneOrientationSequence", own, shared).ImageOrientationPatient, float).reshape(2, 3)
        spacing = np.array(_of(path, "PixelMeasuresSequence", own, shared).PixelSpacing, float)  # of rows, of columns
        labels.append(frame.astype(np.uint8))
        places.append(place)
        axes.append(np.stack([along[0] * spacing[1], along[1] * spacing[0], np.cross(*along)], axis=1))
    if not np.allclose(axes, axes[0], atol=1e-4):
        raise InputError(f"segmentation {path} has frames of unlike directions or spacings: save one file for each")
    values, order = _planes(path, labels, np.array(places), axes[0][:, 2])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes[0], order[0]
    return Stored(path, values, "ZYX", affine=RAS @ affine, places=order @ RAS[:3, :3])


def _of(path: Path, name: str, own: Any, shared: Any) -> Any:
    """The only item of a sequence, of a frame or of all."""
    found = own.get(name) or shared.get(name)
    if not found:
        raise InputError(f"segmentation {path} has a frame without {name}: export it again")
    return found[0]


def _planes(path: Path, labels: list[np.ndarray], places: np.ndarray, across: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frames put together, those of one place into one plane: `[P, Y, X]` and where each begins, `[P, 3]`."""
    heights = np.round(places @ across, 3)
    _, first, which = np.unique(heights, return_index=True, return_inverse=True)
    values = np.zeros((len(first), *labels[0].shape), np.uint8)
    for frame, plane in zip(labels, which.ravel(), strict=True):
        if (both := (values[plane] > 0) & (frame > 0)).any():
            pair = f"segments {values[plane][both][0]} and {frame[both][0]}"
            raise InputError(f"{pair} of {path} overlap: save each class as masks/<class>/<id>.dcm")
        values[plane] += frame
    return values, places[first]
