"""The files that `unetpp-fast predict` reads and writes, in any format of `file_formats`.

A file, or the files of an image's channels, become an array with one letter per axis: C channels, Z planes, Y rows, X
columns. A model for volumes takes Z, Y and X together; one for images takes the planes one by one. Inputs are mapped into
memory if their format allows it, and predictions are collected in a mapped temporary file, so that neither has to fit into
memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..common.atomic_files import write_atomic
from ..common.errors import InputError
from ..models.normalisation import CHUNK_BYTES, Normalisation
from .file_formats import (
    FileFormat,
    all_endings,
    channels_by_id,
    ending_of,
    files_by_id,
    find_images,
    format_of,
    id_of,
    read_stored,
)
from .geometry import check_affines, spacing_from
from .images import check_finite, write_palette_png
from .itk import is_series
from .pairs import single_files
from .resampling import checked_spacing, size_at
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

    def size_at(self, spacing: Sequence[float] | None) -> tuple[int, ...]:
        """The size `[*S]` of `images` if their voxels were of `spacing` mm; as it is for None.

        Raises:
            InputError: the file does not tell the size of its voxels.
        """
        size = self.images()[0].shape[1:]
        if spacing is None:
            return size
        own = checked_spacing(spacing_from(self.stored.affine), self.spatial_dims, self.stored.path)
        return size_at(size, own, spacing)

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


def find(place: Path, channel_files: int = 0) -> dict[str, tuple[Path, ...]]:
    """The file or DICOM series `place`, or those in this folder, by id (the name without its ending).

    channel_files: if not 0, an image is as many files, `<id>_0000`, `<id>_0001`, ...; `place` may then be the first of them.

    Raises:
        InputError: as `file_formats.find_images`.
    """
    if place.is_file() and channel_files:
        beside = channels_by_id(files_by_id(place.parent, all_endings()))
        images = {key: files for key, files in beside.items() if place in files.values()}
    elif place.is_file() or is_series(place):
        return {id_of(place): (place,)}
    else:
        found = find_images(place, all_endings())
        if not channel_files:
            return single_files(found)
        images = channels_by_id(found)
    return {key: _channels(key, files, channel_files) for key, files in images.items()}


def _channels(key: str, files: Mapping[int, Path], count: int) -> tuple[Path, ...]:
    """The files of an image, of which some may not exist; or its only file, if that has no number."""
    if list(files) == [-1]:
        return (files[-1],)
    one = next(iter(files.values()))
    ending = ending_of(one, all_endings())
    return tuple(files.get(number, one.with_name(f"{key}_{number:04d}{ending}")) for number in range(count))


def read(files: Path | Sequence[Path], spatial_dims: int, channels: int) -> Source:
    """A file, or those of an image's channels, for a model with `spatial_dims` spatial axes and `channels` input channels.

    Raises:
        InputError: the file cannot be read, or its axes or channels do not fit the model.
    """
    paths = [files] if isinstance(files, Path) else list(files)
    parts = [_read_one(path, spatial_dims, channels if len(paths) == 1 else 1) for path in paths]
    path, form = paths[0], format_of(paths[0])
    stored, axes = parts[0] if len(parts) == 1 else _together(paths, parts)
    have = stored.values.shape[axes.index("C")] if "C" in axes else 1
    if have != channels:
        raise InputError(f"{path} has {have} channel(s), the model takes {channels}: convert the image")
    return Source(stored, axes, spatial_dims, form)


def _read_one(path: Path, spatial_dims: int, channels: int) -> tuple[Stored, str]:
    """A file and its axes."""
    if not path.is_file() and not is_series(path):
        raise InputError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    stored = read_stored(path)
    values = stored.values
    if values.dtype.kind not in "biuf" or not values.size:
        raise InputError(f"{path} holds no image: {values.dtype} values of shape {values.shape}")
    axes = stored.axes or _guess_axes(path, values.shape, spatial_dims, channels)
    spatial = len(axes.replace("C", ""))
    if spatial < spatial_dims or spatial > 3:
        raise InputError(f"{path} has the axes {axes}, the model takes {'images' if spatial_dims == 2 else 'volumes'}")
    return stored, axes


def _together(paths: Sequence[Path], parts: Sequence[tuple[Stored, str]]) -> tuple[Stored, str]:
    """One array of the files of an image, with what they stand for as its values.

    Raises:
        InputError: they differ in size or grid.
    """
    first, axes = parts[0]
    spatial = axes.replace("C", "")
    arrays = []
    for path, (stored, letters) in zip(paths, parts, strict=True):
        values = stored.real(stored.values)
        values = np.moveaxis(values, letters.index("C"), 0) if "C" in letters else values[None]
        if letters.replace("C", "") != spatial or (arrays and values.shape[1:] != arrays[0].shape[1:]):
            raise InputError(f"{path} and {paths[0]} differ in shape: {stored.values.shape} and {first.values.shape}")
        check_affines(first.affine, stored.affine, paths[0], path, what="channel")
        arrays.append(values)
    return replace(first, values=np.concatenate(arrays), axes="C" + spatial, slope=1.0, offset=0.0, scale=1.0), "C" + spatial


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
