"""Reading and writing images, and preparing their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.nn import functional as F

from ..common.atomic_files import write_atomic
from ..common.errors import InputError
from ..common.extras import need
from ..models.normalisation import Normalisation
from ..models.normalisation import rescale as rescale
from ..models.normalisation import standardise as standardise
from .decoding import read_picture
from .stored import path_of

STANDARD = Normalisation()


def read_image(path: Path | BinaryIO) -> np.ndarray:
    """Reads an image file, or an open one, as float32 `[C, H, W]`, upright; transparency is dropped.

    8-bit values are divided by 255 and unsigned 16-bit values by 65535; others stay as they are (`decoding.py`).

    Raises:
        InputError: the file is missing, is not an image, holds a stack, or holds NaN or infinity.
    """
    return read_values(path).astype(np.float32)


def read_normalised(path: Path | BinaryIO, normalisation: Normalisation = STANDARD) -> np.ndarray:
    """An image file prepared for a network, float32 `[C, H, W]`; computed before values are rounded to float32.

    Raises:
        InputError: as `read_image`, or the normalisation is for other channels.
    """
    return normalisation(read_values(path))


def read_values(path: Path | BinaryIO) -> np.ndarray:
    """As `read_image`, float64, before values are rounded."""
    stored = read_picture(path)
    if "Z" in stored.axes:
        pages = stored.values.shape[stored.axes.index("Z")]
        raise InputError(f"{path_of(path)} holds {pages} pages: save each page as a separate file")
    values = stored.values[None] if "C" not in stored.axes else np.moveaxis(stored.values, stored.axes.index("C"), 0)
    return np.ascontiguousarray(check_finite(stored.real(values), path_of(path)))


def write_png(path: Path, values: np.ndarray) -> None:
    """Writes uint8 `[H, W]` (grey) or `[H, W, 3]` (colour), atomically."""
    image = need("PIL.Image", "commands")
    write_atomic(path, lambda stream: image.fromarray(values).save(stream, format="PNG"))


def write_palette_png(path: Path, labels: np.ndarray, palette: Sequence[Sequence[int]]) -> None:
    """Writes uint8 `[H, W]` as indices of a palette of three bytes a colour, atomically."""
    picture = need("PIL.Image", "commands").fromarray(np.ascontiguousarray(labels))
    picture.putpalette([byte for colour in palette for byte in colour])
    write_atomic(path, lambda stream: picture.save(stream, format="PNG"))


def check_finite(values: np.ndarray, what: Any) -> np.ndarray:
    """Returns `values`, or raises InputError naming `what` if there is NaN or infinity among them."""
    if not np.isfinite(values).all():
        raise InputError(f"{what} holds NaN or infinite values: fix or remove it")
    return values


def check_size(mask_path: Path, mask: np.ndarray, image_path: Path, image: np.ndarray) -> None:
    """Raises InputError unless the mask `[*S]` has the size of the image `[C, *S]`."""
    if mask.shape != image.shape[1:]:
        have, want = _size(mask.shape), _size(image.shape[1:])
        turned = mask.ndim == 2 and mask.shape == image.shape[1:][::-1]
        hint = "draw it on the upright image, turned by its orientation tag" if turned else "they must have the same size"
        raise InputError(f"mask {mask_path} is {have} but its image {image_path} is {want}: {hint}")


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def scaled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 `[C, H, W]` resized by bilinear interpolation, with anti-aliasing when it shrinks."""
    return F.interpolate(torch.from_numpy(values)[None], size, mode="bilinear", antialias=True)[0].numpy()
