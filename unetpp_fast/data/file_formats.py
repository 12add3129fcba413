"""The file formats of images and volumes: `FORMATS`.

To add a format, add one entry. `predict` then reads and writes it; training takes its files as images and masks if
`images` is set, and as volumes if there is a `read_volume`.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..common.errors import InputError, first_line
from ..common.extras import need
from . import nifti
from .decoding import read_picture
from .images import check_finite
from .stored import Stored


@dataclass(frozen=True)
class FileFormat:
    """How one kind of file is read and written.

    Args:
        name: with its article, for error messages.
        endings: of the files, in lower case.
        read: reads a file for prediction.
        write: writes a mask (uint8) or probabilities (float32) in the format of a file that was read.
        written_as: ending of the files written; "" for that of the file read.
        foreground: value of the foreground in a mask.
        is_picture: whether the files are meant to be looked at; `predict` adds an overlay.
        images: whether training takes the files as images and masks.
        read_volume: for training: a file as float32 `[z, y, x]`, all of it checked. None: training takes no such volumes.
        check_grid: raises InputError unless a volume and its mask, two paths, have the same grid.
    """

    name: str
    endings: tuple[str, ...]
    read: Callable[[Path], Stored]
    write: Callable[[BinaryIO, np.ndarray, Stored], None]
    written_as: str = ""
    foreground: int = 1
    is_picture: bool = False
    images: bool = False
    read_volume: Callable[[Path], np.ndarray] | None = None
    check_grid: Callable[[Path, Path], None] = lambda image, mask: None


def _write_picture(stream: BinaryIO, values: np.ndarray, stored: Stored) -> None:
    if values.dtype != np.uint8:
        values = np.rint(values * 65535).astype(np.uint16)
    need("PIL.Image", "commands").fromarray(values).save(stream, format="PNG")


def _write_tiff(stream: BinaryIO, values: np.ndarray, stored: Stored) -> None:
    tifffile = need("tifffile", "tiff")
    handle = tifffile.FileHandle(stream, name=stored.path.name)  # tifffile needs a name, and this stream has none
    tifffile.imwrite(handle, values, photometric="minisblack", metadata={"axes": stored.header})


def _read_npy(path: Path) -> Stored:
    return Stored(path, np.load(path, mmap_mode="r", allow_pickle=False))


def _write_npy(stream: BinaryIO, values: np.ndarray, stored: Stored) -> None:
    np.save(stream, values, allow_pickle=False)


def _read_npy_volume(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a NumPy array ({first_line(error)}): replace it") from error
    if values.ndim != 3:
        raise InputError(f"{path} has {values.ndim} axes {values.shape}: expected a volume with three")
    return check_finite(values.astype(np.float32), path)


def _read_npz(path: Path) -> Stored:
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip archive")
    with np.load(path, allow_pickle=False) as archive:
        names = archive.files
        if len(names) != 1 and "image" not in names:
            raise InputError(f"{path} holds {len(names)} arrays ({', '.join(names)}): call the one to predict `image`")
        return Stored(path, archive["image" if "image" in names else names[0]])


def _write_npz(stream: BinaryIO, values: np.ndarray, stored: Stored) -> None:
    np.savez_compressed(stream, **{"mask" if values.dtype == np.uint8 else "probabilities": values})


def _read_nifti(path: Path) -> Stored:
    """Axes in the order of the file, as in training: `[x, y, z]` in NIfTI is `[Z, Y, X]` here."""
    image = need("nibabel", "nifti").load(path)
    values = image.dataobj.get_unscaled()
    slope, offset = float(image.dataobj.slope), float(image.dataobj.inter)
    return Stored(path, values.T, "CZYX"[-values.ndim :], image, slope, offset)


def _write_nifti(stream: BinaryIO, values: np.ndarray, stored: Stored) -> None:
    header = stored.header.header.copy()
    header.set_data_dtype(values.dtype)
    image = type(stored.header)(values.T, stored.header.affine, header)
    if not stored.path.name.lower().endswith(".gz"):
        image.to_stream(stream)
        return
    with gzip.GzipFile(fileobj=stream, mode="wb", filename="", mtime=0) as packed:
        image.to_stream(packed)


FORMATS: tuple[FileFormat, ...] = (
    FileFormat(
        "an image",
        (".png", ".jpg", ".jpeg", ".bmp"),
        read_picture,
        _write_picture,
        written_as=".png",
        foreground=255,
        is_picture=True,
        images=True,
    ),
    FileFormat("TIFF", (".tif", ".tiff"), read_picture, _write_tiff, foreground=255, images=True),
    FileFormat("an array", (".npy",), _read_npy, _write_npy, read_volume=_read_npy_volume),
    FileFormat("an archive of arrays", (".npz",), _read_npz, _write_npz),
    FileFormat(
        "NIfTI",
        (".nii", ".nii.gz"),
        _read_nifti,
        _write_nifti,
        read_volume=nifti.read_volume,
        check_grid=nifti.check_grid,
    ),
)


def all_endings() -> tuple[str, ...]:
    """The endings of all formats."""
    return tuple(ending for form in FORMATS for ending in form.endings)


def image_endings() -> tuple[str, ...]:
    """The endings of the formats in which training takes images and masks."""
    return tuple(ending for form in FORMATS if form.images for ending in form.endings)


def volume_endings() -> tuple[str, ...]:
    """The endings of the formats in which training takes volumes."""
    return tuple(ending for form in FORMATS if form.read_volume for ending in form.endings)


def ending_of(path: Path, endings: tuple[str, ...]) -> str:
    """Which of these endings a file's name has, in any case; "" if none."""
    return next((ending for ending in endings if path.name.lower().endswith(ending)), "")


def format_of(path: Path) -> FileFormat:
    """The format of a file, by its ending.

    Raises:
        InputError: the ending is unknown.
    """
    ending = ending_of(path, all_endings())
    if not ending:
        raise InputError(f"{path} has an unknown format: known are {', '.join(all_endings())}")
    return next(form for form in FORMATS if ending in form.endings)


def files_by_id(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder with one of these endings, by id (the name without the ending), sorted.

    Hidden files are ignored. Empty if there is no such folder.

    Raises:
        InputError: two files have the same id.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        ending = ending_of(path, endings)
        if ending and not path.name.startswith("."):
            name = path.name[: -len(ending)]
            if name in files:
                raise InputError(f"{files[name]} and {path} have the same id: keep one of them")
            files[name] = path
    return files


def find_images(folder: Path, endings: tuple[str, ...] | None = None) -> dict[str, Path]:
    """`files_by_id` of a folder that must hold some; by default those that training takes as images.

    Raises:
        InputError: the folder does not exist or holds no such file, or two files have the same id.
    """
    endings = image_endings() if endings is None else endings
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of images")
    files = files_by_id(folder, endings)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(endings)})")
    return files
