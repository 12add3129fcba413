"""Reading and writing images and masks, and preparing their values."""

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


def read_image(path: Path | BinaryIO) -> np.ndarray:
    """Reads an image file, or an open one, as float32 `[C, H, W]`, C = 1 (grey) or 3 (colour; alpha is dropped).

    8-bit values are divided by 255 and 16-bit values by 65535; floating-point values stay unchanged.

    Raises:
        InputError: the file is missing, is not an image, or holds NaN or infinity.
    """
    picture = _open(path)
    if picture.mode in ("1", "L", "LA"):
        values = np.asarray(picture.convert("L"), np.float32)[None] / 255
    elif picture.mode.startswith("I"):
        values = np.asarray(picture, np.float32)[None] / 65535
    elif picture.mode == "F":
        values = np.asarray(picture, np.float32)[None]
    else:
        values = np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    return np.ascontiguousarray(check_finite(values, path))


def read_labels(path: Path) -> np.ndarray:
    """The values of a mask or label file, `[H, W]`; for a colour file the maximum over its channels.

    A palette image is read by its colours: the order of the palette depends on the program that wrote it.
    """
    picture = _open(path)
    if picture.mode in ("1", "L", "F") or picture.mode.startswith("I"):
        return np.asarray(picture)
    return np.asarray(picture.convert("RGB")).max(axis=-1)


def read_mask(path: Path) -> np.ndarray:
    """A mask file as bool `[H, W]`: values above half of the file's maximum, so that 0/1 and 0/255 both work.

    Raises:
        InputError: as `read_image`.
    """
    values = check_finite(read_labels(path), f"mask {path}")
    return values > values.max(initial=0) / 2


def _open(path: Path | BinaryIO) -> Any:
    """The Pillow image of a file with one page, decoded."""
    image = need("PIL.Image", "commands")
    try:
        with image.open(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            picture.load()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
    if pages > 1:
        raise InputError(f"{path} holds {pages} pages: save each page as a separate file")
    return picture


def write_png(path: Path, values: np.ndarray) -> None:
    """Writes uint8 `[H, W]` (grey) or `[H, W, 3]` (colour), atomically."""
    image = need("PIL.Image", "commands")
    write_atomic(path, lambda stream: image.fromarray(values).save(stream, format="PNG"))


def check_finite(values: np.ndarray, what: Any) -> np.ndarray:
    """Returns `values`, or raises InputError naming `what` if there is NaN or infinity among them."""
    if not np.isfinite(values).all():
        raise InputError(f"{what} holds NaN or infinite values: fix or remove it")
    return values


def check_size(mask_path: Path, mask: np.ndarray, image_path: Path, image: np.ndarray) -> None:
    """Raises InputError unless the mask `[*S]` has the size of the image `[C, *S]`."""
    if mask.shape != image.shape[1:]:
        have, want = _size(mask.shape), _size(image.shape[1:])
        raise InputError(f"mask {mask_path} is {have} but its image {image_path} is {want}: they must have the same size")


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def standardise(image: np.ndarray) -> np.ndarray:
    """Scales each channel of `[C, *S]` to mean 0 and standard deviation 1 over its pixels; a constant channel to 0."""
    axes = tuple(range(1, image.ndim))
    mean = image.mean(axis=axes, keepdims=True, dtype=np.float64)
    std = image.std(axis=axes, keepdims=True, dtype=np.float64)
    return ((image - mean) / np.maximum(std, 1e-6)).astype(np.float32)


def rescale(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Clips values (Hounsfield units, for CT) to `window` and maps it to -1..1, as float32.

    Unlike `standardise`, the result is the same for a slice, a crop and a whole volume.
    """
    low, high = window
    return ((np.clip(image, low, high) - low) * (2 / (high - low)) - 1).astype(np.float32)


def scaled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 `[C, H, W]` resized by bilinear interpolation, with anti-aliasing when it shrinks."""
    return F.interpolate(torch.from_numpy(values)[None], size, mode="bilinear", antialias=True)[0].numpy()
