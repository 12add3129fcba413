"""Reading masks by stated rules; what they do not cover is refused, never guessed.

A **mask of one class** has at most two kinds of pixels:

- 0 and one other value: 1, 255, 65535, or any from 128 on in 8 bits. 0 is background.
- Black and one other colour (RGB or palette; a palette is read by its colours, whose order depends on the program).
- If the transparency varies and the colours do not, opaque is foreground. If both vary, they must agree.
- JPEG changes values: above 127 is foreground, if no more than a tenth of the pixels is neither dark nor bright.

A **label map** holds one number per pixel: a grey file its values, a palette file its indices.

Both are turned upright by their own orientation tag, like images; without one they are taken as drawn on the upright image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..common.errors import InputError
from .decoding import Decoded, check_one, decode

SHOWN = 6  # values that an error lists
PRESENT = (1, 255, 65535)
BRIGHT = 128


def read_mask(path: Path) -> np.ndarray:
    """A mask of one class as bool `[H, W]`, by the rules above.

    Raises:
        InputError: the file cannot be read, or is no mask by these rules; the message lists the values that it holds.
    """
    decoded = decode(path)
    check_one(decoded, path)
    colours = _colours(decoded, path)
    if decoded.alpha is None or _constant(decoded.alpha[None]):
        return _by_colours(colours, decoded, path)
    opaque = two_valued(decoded.alpha, decoded.alpha.dtype == np.uint8, path, "transparency ")
    if _constant(colours):
        return opaque
    mask = _by_colours(colours, decoded, path)
    if not np.array_equal(mask, opaque):
        raise InputError(f"mask {path}: its colours and its transparency differ; save it without transparency")
    return mask


def read_labels(path: Path) -> np.ndarray:
    """A label map, whole numbers from 0 on, `[H, W]`: uint8, or int32 if there are values above 255.

    Raises:
        InputError: the file cannot be read, is a JPEG or a picture in colours, or holds other values.
    """
    return read_label_map(path)[0]


def read_label_map(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`read_labels`, and the palette of the file, uint8 `[entries, 3]`, or None."""
    decoded = decode(path)
    check_one(decoded, path)
    if decoded.lossy:
        raise InputError(f"label map {path} is a JPEG, which changes values: save it as PNG from the original labels")
    if decoded.palette is not None:
        return whole_numbers(decoded.values, path), decoded.palette
    planes = _colours(decoded, path)
    if not (planes == planes[0]).all():
        raise InputError(f"label map {path} holds colours: save it with a palette, or as grey values 0, 1, 2, ...")
    return whole_numbers(planes[0], path), None


def whole_numbers(values: np.ndarray, path: Path) -> np.ndarray:
    """The values of a label map as uint8, or int32 if there are any above 255.

    Raises:
        InputError: a value is negative, no whole number, or does not fit into 31 bits.
    """
    fits = values.dtype.kind in "bu" and values.dtype.itemsize < 4
    wrong = [] if fits else values[(values < 0) | (values != np.floor(values)) | (values >= 2**31)]
    if len(wrong):
        raise InputError(f"label map {path} holds {wrong[0]:.6g}: labels are 0, 1, 2, ...; 255 is ignored")
    return values.astype(np.uint8 if values.max(initial=0) < 256 else np.int32)


def _colours(decoded: Decoded, path: Path) -> np.ndarray:
    """What the file shows, `[channels, H, W]`, as stored but with white-is-zero undone.

    Raises:
        InputError: NaN or infinity.
    """
    values, axes = decoded.values, decoded.axes
    if decoded.palette is not None:
        values, axes = decoded.palette[values], axes + "C"
    planes = np.moveaxis(values, axes.index("C"), 0) if "C" in axes else values[None]
    if planes.dtype.kind == "f" and not np.isfinite(planes).all():
        raise InputError(f"mask {path} holds NaN or infinite values: fix or remove it")
    if decoded.slope != 1.0:
        planes = planes.astype(np.float64) * decoded.slope + decoded.offset
    return planes


def _constant(planes: np.ndarray) -> bool:
    """Whether every channel has one value."""
    return bool((planes == planes[:, :1, :1]).all())


def _by_colours(planes: np.ndarray, decoded: Decoded, path: Path) -> np.ndarray:
    if decoded.lossy:
        return _of_jpeg(planes.max(axis=0), path)
    if (planes == planes[0]).all():
        return two_valued(planes[0], decoded.values.dtype == np.uint8, path)
    mask = (planes != 0).any(axis=0)
    colours = planes[:, mask]
    if not (colours == colours[:, :1]).all():
        seen = np.unique(planes.reshape(len(planes), -1), axis=1).T[:SHOWN].tolist()
        shown = ", ".join(str(tuple(colour)) for colour in seen)
        raise InputError(f"mask {path} holds the colours {shown}: {_advice('black and one other colour')}")
    return mask


def two_valued(values: np.ndarray, is_byte: bool, path: Path, what: str = "") -> np.ndarray:
    """Where the values of a mask are not 0.

    Raises:
        InputError: they are more than 0 and one other value, by the rules above.
    """
    largest = values.max(initial=0)
    present = largest in (0, *PRESENT) or (is_byte and largest >= BRIGHT)
    if not present or ((values != 0) & (values != largest)).any():
        seen = np.unique(values)
        more = ", ..." if len(seen) > SHOWN else ""
        shown = ", ".join(f"{value:g}" for value in seen[:SHOWN].tolist())
        raise InputError(f"mask {path} holds the {what}values {shown}{more}: {_advice('0 and 1, or 0 and 255')}")
    return values != 0


def _of_jpeg(values: np.ndarray, path: Path) -> np.ndarray:
    largest = float(values.max(initial=0))
    between = float(((values >= BRIGHT // 2) & (values < 3 * BRIGHT // 2)).mean()) if values.size else 0.0
    if 0 < largest < BRIGHT or between > 0.1:
        raise InputError(f"mask {path} is a JPEG of grey values up to {largest:g}: {_advice('black and white')}")
    return values >= BRIGHT


def _advice(two: str) -> str:
    return f"a mask of one class has {two}; several classes in one file are a label map, masks/<id>.png (docs/data.md)"
