"""The files that `unetpp-fast predict` reads and writes, in any format of `file_formats`.

A file becomes an array with one letter per axis: C channels, Z planes, Y rows, X columns. A model for volumes takes Z, Y
and X together; one for images takes the planes one by one. Inputs are mapped into memory if their format allows it, and
predictions are collected in a mapped temporary file, so that neither has to fit into memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.atomic_files import write_atomic
from ..common.errors import InputError, first_line
from ..models.normalisation import CHUNK_BYTES, Normalisation
from .file_formats import FileFormat, all_endings, ending_of, find_images, format_of
from .images import check_finite, write_palette_png
from .stored import Stored

# By the number of axes of the model and of the array: the axes that an array without names may have; the first that fits.
LAYOUTS = {
    (2, 2): ("YX",), (2, 3): ("CYX", "YXC", "ZYX"), (2, 4): ("ZCYX", "ZYXC"), (3, 3): ("ZYX",), (3, 4): ("CZYX", "ZYXC"),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A file to predict: its array, one letter per axis, and the format in which the predictions are written."""

    stored: Stored
    axes: str
    spatial_dims: int
    format: FileFormat

    @property
    def values(self) -> np.ndarray:
        """The array as stored."""
        return self.stored.values

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes, in the file's order: the shape of a mask."""
        return tuple(size for size, axis in zip(self.values.shape, self.axes, strict=True) if axis != "C")

    @property
    def is_stack(self) -> bool:
        """Whether it holds planes for a model that takes images."""
        return len(self.shape) > self.spatial_dims

    @property
    def is_picture(self) -> bool:
        """Whether the file is meant to be looked at, such as PNG and JPEG."""
        return self.format.is_picture

    def images(self) -> list[np.ndarray]:
        """Views `[C, *S]` of the volume or image, or of each plane of a stack."""
        values, axes = self.values, self.axes
        if "C" not in axes:
            values, axes = values[None], "C" + axes
        values = np.moveaxis(values, axes.index("C"), 0)
        return list(np.moveaxis(values, self._stack_axis + 1, 0)) if self.is_stack else [values]

    def parts(self, results: np.ndarray) -> list[np.ndarray]:
        """Views of results `[classes, *shape]`, one for each of `images`."""
        return list(np.moveaxis(results, self._stack_axis + 1, 0)) if self.is_stack else [results]

    @property
    def _stack_axis(self) -> int:
        return self.axes.replace("C", "").index("Z")

    def write(self, folder: Path, name: str, values: np.ndarray) -> None:
        """Writes `<folder>/<name>` in this file's format, atomically.

        values: `[*shape]`, bool (a mask; foreground is 1, in pictures and TIFF 255) or float32 in [0, 1] (in pictures 1 is
            stored as 65535).
        """
        ending = self.format.written_as or ending_of(self.stored.path, self.format.endings)
        if values.dtype == bool:
            values = values.view(np.uint8) if self.format.foreground == 1 else values * np.uint8(self.format.foreground)
        write_atomic(folder / f"{name}{ending}", lambda stream: self.format.write(stream, values, self.stored))

    def write_labels(self, folder: Path, name: str, labels: np.ndarray, palette: Sequence[Sequence[int]]) -> None:
        """Writes a label map, uint8 `[*shape]`, as `<folder>/<name>`: pictures with the palette, other formats without."""
        if self.is_picture:
            write_palette_png(folder / f"{name}.png", labels, palette)
            return
        self.write(folder, name, labels)


class Prepared:
    """An image of a source, `[1, C, *S]`, prepared as in training; slicing it computes the slice. Unlike `NormalisedImages`
    it knows what the file says its values stand for.

    Args:
        source: the file.
        values: one of `source.images()`.
        normalisation: of the network.

    Raises:
        InputError: the image holds NaN or infinity, or the normalisation is for other channels.
    """

    def __init__(self, source: Source, values: np.ndarray, normalisation: Normalisation):
        self.values, self.shape, self.stored = values, (1, *values.shape), source.stored
        self.physical = normalisation.kind == "window"
        normalisation.check_channels(len(values))
        for chunk in self._chunks():
            check_finite(chunk, source.stored.path)
        self.prepare = normalisation.fitted(self._chunks)

    def _chunks(self) -> Iterator[np.ndarray]:
        row = 8 * self.values[:, :1].size
        rows = max(1, CHUNK_BYTES // row)
        for first in range(0, self.values.shape[1], rows):
            yield self._real(self.values[:, first : first + rows])

    def _real(self, values: np.ndarray) -> np.ndarray:
        return self.stored.real(values, self.physical)

    def __getitem__(self, where: tuple[int | slice, ...]) -> np.ndarray:
        """float32 `[C, *tile]` at (0, slice, ...)."""
        return self.prepare(self._real(self.values[where[1:]]))


def find(place: Path) -> dict[str, Path]:
    """The file `place`, or the files in this folder, by id (the name without its ending).

    Raises:
        InputError: as `file_formats.find_images`.
    """
    if not place.is_file():
        return find_images(place, all_endings())
    ending = ending_of(place, all_endings())
    return {place.name[: len(place.name) - len(ending)]: place}


def read(path: Path, spatial_dims: int, channels: int) -> Source:
    """A file for a model with `spatial_dims` spatial axes and `channels` input channels.

    Raises:
        InputError: the file cannot be read, or its axes or channels do not fit the model.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    form = format_of(path)
    try:
        stored = form.read(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise InputError(f"{path} cannot be read as {form.name} ({first_line(error)}): replace or remove it") from error
    values = stored.values
    if values.dtype.kind not in "biuf" or not values.size:
        raise InputError(f"{path} holds no image: {values.dtype} values of shape {values.shape}")
    axes = stored.axes or _guess_axes(path, values.shape, spatial_dims, channels)
    spatial = len(axes.replace("C", ""))
    if spatial < spatial_dims or spatial > 3:
        raise InputError(f"{path} has the axes {axes}, the model takes {'images' if spatial_dims == 2 else 'volumes'}")
    have = values.shape[axes.index("C")] if "C" in axes else 1
    if have != channels:
        raise InputError(f"{path} has {have} channel(s), the model takes {channels}: convert the image")
    return Source(stored, axes, spatial_dims, form)


def _guess_axes(path: Path, shape: tuple[int, ...], spatial_dims: int, channels: int) -> str:
    for axes in LAYOUTS.get((spatial_dims, len(shape)), ()):
        colour = axes == "ZYX" and spatial_dims == 2 and shape[-1] <= 4  # an image with channels rather than planes
        if not colour and (shape[axes.index("C")] if "C" in axes else 1) == channels:
            return axes
    model = f"a {spatial_dims}D model of {channels} channel(s)"
    raise InputError(f"{path} has the shape {shape}, which {model} does not take: [C, *S], [*S] or planes of them")


def spool(shape: Sequence[int], dtype: type, folder: Path) -> np.ndarray:
    """An array of zeros in an unnamed temporary file in `folder`, which is freed with the array."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.truncate(count)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, but a crash once the file is mapped
            os.posix_fallocate(stream.fileno(), 0, count)
        return np.memmap(stream, dtype, "r+", shape=tuple(shape))
