"""What `unetpp-fast predict` reads and writes: pictures, TIFF, NumPy's files and NIfTI, with 2 or 3 axes and channels.

Every file becomes an array with a letter for each axis: C channels, Z planes, Y rows, X columns. A model for volumes takes
all of Z, Y, X; one for images takes the planes one by one. Files are mapped into memory where their format allows it, and
what is predicted is collected in a mapped file without a name, so that neither has to fit into memory.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..common import atomic_files
from ..common.errors import InputError
from ..common.extras import need
from . import images

CHUNK_BYTES = 2**22
# What an array without names for its axes can be, by the axes of the model and its own; the first that fits.
LAYOUTS = {
    (2, 2): ("YX",), (2, 3): ("CYX", "YXC", "ZYX"), (2, 4): ("ZCYX", "ZYXC"), (3, 3): ("ZYX",), (3, 4): ("CZYX", "ZYXC"),
}  # fmt: skip


class Stored(NamedTuple):
    """What a reader gives: values, a letter for each axis (None: to be told from the shape), and what `Source` has more."""

    values: np.ndarray
    axes: str | None = None
    header: Any = None
    slope: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Source:
    """A file to predict: its values as stored, a letter for each axis, and what writing such a file again needs.

    What the values mean is slope * value + offset.
    """

    path: Path
    values: np.ndarray
    axes: str
    spatial_dims: int
    format: Format
    header: Any = None
    slope: float = 1.0
    offset: float = 0.0

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
        """Whether people look at it: PNG, JPEG, BMP."""
        return self.format is PICTURE

    def images(self) -> list[np.ndarray]:
        """Views `[C, *S]` of the volume or image, or of each plane of a stack."""
        values, axes = self.values, self.axes
        if "C" not in axes:
            values, axes = values[None], "C" + axes
        values = np.moveaxis(values, axes.index("C"), 0)
        return list(np.moveaxis(values, self._stack_axis + 1, 0)) if self.is_stack else [values]

    def parts(self, results: np.ndarray) -> list[np.ndarray]:
        """Views of results `[classes, *shape]` that belong to `images`."""
        return list(np.moveaxis(results, self._stack_axis + 1, 0)) if self.is_stack else [results]

    @property
    def _stack_axis(self) -> int:
        return self.axes.replace("C", "").index("Z")

    def write(self, folder: Path, name: str, values: np.ndarray) -> None:
        """Writes `<folder>/<name>` in this file's format, atomically.

        values: bool (a mask; 1, in pictures and TIFF 255, is foreground) or float32 in [0, 1] (in pictures 65535 is 1).
        """
        path = folder / f"{name}{self.format.ending}"
        if values.dtype == bool:
            values = values.view(np.uint8) if self.format.foreground == 1 else values * np.uint8(self.format.foreground)
        atomic_files.write_atomic(path, lambda stream: self.format.write(stream, values, self))


class Prepared:
    """`[1, C, *S]`: an image of a source as training prepared it, computed for what is sliced out of it.

    prepare: what the checkpoint says of it (`tasks.Task`): a "window" as in `data.rescale`; else `data.standardise`.

    Raises:
        InputError: the image holds NaN or infinity.
    """

    def __init__(self, source: Source, values: np.ndarray, prepare: Mapping[str, Any]):
        self.values, self.shape, self.window = values, (1, *values.shape), prepare.get("window")
        self.slope, self.offset = source.slope, source.offset
        axes, count = tuple(range(1, values.ndim)), values[0].size
        self.mean = sum(chunk.sum(axis=axes, keepdims=True) for chunk in self._chunks()) / count
        squares = sum(((chunk - self.mean) ** 2).sum(axis=axes, keepdims=True) for chunk in self._chunks())
        self.std = np.maximum(np.sqrt(squares / count), 1e-6)
        if not np.isfinite(self.std).all():
            raise InputError(f"{source.path} holds NaN or infinite values: mend or remove this image")

    def _chunks(self) -> Iterator[np.ndarray]:
        row = 8 * self.values[:, :1].size
        rows = max(1, CHUNK_BYTES // row)
        for first in range(0, self.values.shape[1], rows):
            yield self._real(self.values[:, first : first + rows])

    def _real(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.float64) * self.slope + self.offset

    def __getitem__(self, where: tuple[int | slice, ...]) -> np.ndarray:
        """float32 `[C, *tile]` for (0, slice, ...)."""
        values = self._real(self.values[where[1:]])
        if self.window:
            return images.rescale(values, self.window)
        return ((values - self.mean) / self.std).astype(np.float32)


def read(path: Path, spatial_dims: int, channels: int) -> Source:
    """A file for a model of `spatial_dims` that takes `channels`.

    Raises:
        InputError: the file cannot be read, or its axes or channels are not what the model takes.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    form = _format(path)
    try:
        stored = form.read(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make a reader fail in any way
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{path} cannot be read as {form.name} ({first}): replace or remove it") from error
    values = stored.values
    if values.dtype.kind not in "biuf" or not values.size:
        raise InputError(f"{path} holds no image: {values.dtype} values of shape {values.shape}")
    axes = stored.axes or _guess(path, values.shape, spatial_dims, channels)
    spatial = len(axes.replace("C", ""))
    if spatial < spatial_dims or spatial > 3:
        raise InputError(f"{path} has the axes {axes}, the model takes {'images' if spatial_dims == 2 else 'volumes'}")
    have = values.shape[axes.index("C")] if "C" in axes else 1
    if have != channels:
        raise InputError(f"{path} has {have} channel(s), the model takes {channels}: convert the image")
    return Source(path, values, axes, spatial_dims, form, *stored[2:])


def _guess(path: Path, shape: tuple[int, ...], spatial_dims: int, channels: int) -> str:
    for axes in LAYOUTS.get((spatial_dims, len(shape)), ()):
        colour = axes == "ZYX" and spatial_dims == 2 and shape[-1] <= 4  # rather an image with channels than planes
        if not colour and (shape[axes.index("C")] if "C" in axes else 1) == channels:
            return axes
    takes = f"a {spatial_dims}D model of {channels} channel(s)"
    raise InputError(f"{path} has the shape {shape}, which {takes} does not take: [C, *S], [*S] or planes of them")


def spool(shape: Sequence[int], dtype: type, folder: Path) -> np.ndarray:
    """An array of zeros in a file of `folder` that has no name and goes with the array."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.truncate(count)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash once the file is mapped
            os.posix_fallocate(stream.fileno(), 0, count)
        return np.memmap(stream, dtype, "r+", shape=tuple(shape))


def _read_picture(path: Path) -> Stored:
    return Stored(images.read_image(path), "CYX")


def _write_picture(stream: BinaryIO, values: np.ndarray, source: Source) -> None:
    if values.dtype != np.uint8:
        values = np.rint(values * 65535).astype(np.uint16)
    need("PIL.Image", "commands").fromarray(values).save(stream, format="PNG")


def _read_tiff(path: Path) -> Stored:
    tifffile = need("tifffile", "tiff")
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.series) != 1:
            raise InputError(f"{path} holds {len(tiff.series)} images of different kinds: save each as a file of its own")
        series = tiff.series[0]
        if tiff.pages[0].compression not in (1, 8, 32946):  # what tifffile decodes without it: none and deflate
            need("imagecodecs", "tiff")
        mapped = series.dataoffset is not None  # else its pages are decoded into a file of their own, one by one
        values = tifffile.memmap(path, mode="r", series=0) if mapped else series.asarray(out="memmap", maxworkers=1)
        axes = "".join({"S": "C", "Y": "Y", "X": "X", "C": "C"}.get(axis, "Z") for axis in series.axes)
        if len(set(axes)) != len(axes):
            raise InputError(f"{path} has the axes {series.axes}: save each volume as a file of its own")
        alpha = len(tiff.pages[0].extrasamples) if series.axes.endswith("S") else 0
        return Stored(values[..., : values.shape[-1] - alpha], axes, series.axes.replace("S", "").replace("C", ""))


def _write_tiff(stream: BinaryIO, values: np.ndarray, source: Source) -> None:
    tifffile = need("tifffile", "tiff")
    handle = tifffile.FileHandle(stream, name=source.path.name)  # it asks a stream for its name, and ours has none
    tifffile.imwrite(handle, values, photometric="minisblack", metadata={"axes": source.header})


def _read_npy(path: Path) -> Stored:
    return Stored(np.load(path, mmap_mode="r", allow_pickle=False))


def _write_npy(stream: BinaryIO, values: np.ndarray, source: Source) -> None:
    np.save(stream, values, allow_pickle=False)


def _read_npz(path: Path) -> Stored:
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip archive")
    with np.load(path, allow_pickle=False) as archive:
        names = archive.files
        if len(names) != 1 and "image" not in names:
            raise InputError(f"{path} holds {len(names)} arrays ({', '.join(names)}): call the one to predict `image`")
        return Stored(archive["image" if "image" in names else names[0]])


def _write_npz(stream: BinaryIO, values: np.ndarray, source: Source) -> None:
    np.savez_compressed(stream, **{"mask" if values.dtype == np.uint8 else "probabilities": values})


def _read_nifti(path: Path) -> Stored:
    """In the order in which the file holds them: `[x, y, z]` of NIfTI is `[Z, Y, X]` here, as training has it."""
    image = need("nibabel", "nifti").load(path)
    values = image.dataobj.get_unscaled()
    return Stored(values.T, "CZYX"[-values.ndim :], image, float(image.dataobj.slope), float(image.dataobj.inter))


def _write_nifti(stream: BinaryIO, values: np.ndarray, source: Source) -> None:
    header = source.header.header.copy()
    header.set_data_dtype(values.dtype)
    image = type(source.header)(values.T, source.header.affine, header)
    if source.format.ending == ".nii":
        image.to_stream(stream)
        return
    with gzip.GzipFile(fileobj=stream, mode="wb", filename="", mtime=0) as packed:
        image.to_stream(packed)


@dataclass(frozen=True)
class Format:
    """How files of a kind are read and written; `ending` is that of what is written."""

    name: str
    ending: str
    read: Callable[[Path], Stored]
    write: Callable[[BinaryIO, np.ndarray, Source], None]
    foreground: int = 1


PICTURE = Format("an image", ".png", _read_picture, _write_picture, 255)
FORMATS = {
    **dict.fromkeys((suffix for suffix in images.SUFFIXES if not suffix.startswith(".tif")), PICTURE),
    ".tif": Format("TIFF", ".tif", _read_tiff, _write_tiff, 255),
    ".tiff": Format("TIFF", ".tiff", _read_tiff, _write_tiff, 255),
    ".npy": Format("an array", ".npy", _read_npy, _write_npy),
    ".npz": Format("an archive of arrays", ".npz", _read_npz, _write_npz),
    ".nii": Format("NIfTI", ".nii", _read_nifti, _write_nifti),
    ".nii.gz": Format("NIfTI", ".nii.gz", _read_nifti, _write_nifti),
}


def _format(path: Path) -> Format:
    for ending, form in FORMATS.items():
        if path.name.lower().endswith(ending):
            return form
    raise InputError(f"{path} is of no format that is known: {', '.join(FORMATS)}")


def find(place: Path) -> dict[str, Path]:
    """The file `place`, or the files in this folder, by id (the name without its ending)."""
    if not place.is_file():
        return images.find_images(place, tuple(FORMATS))
    ending = next((ending for ending in FORMATS if place.name.lower().endswith(ending)), "")
    return {place.name[: len(place.name) - len(ending)]: place}
