"""The file formats of images and volumes: `FORMATS`.

To add a format, add one entry. `predict` then reads and writes it, and training takes its files as images and masks.
"""

from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.errors import InputError, first_line
from ..common.extras import need
from . import dicom_seg, itk
from .decoding import read_picture
from .stored import Stored


@dataclass(frozen=True)
class FileFormat:
    """How one kind of file is read and written.

    Args:
        name: with its article, for error messages.
        endings: of the files, in lower case.
        read: reads a file.
        write: writes a mask (uint8) or probabilities (float32) in the format of a file that was read.
        written_as: ending of the files written; "" for that of the file read.
        foreground: value of the foreground in a mask.
        is_picture: whether the files are meant to be looked at; `predict` adds an overlay.
        images: whether the files are pictures, decoded by the rules of `decoding` and, if masks, of `masks`.
        read_mask: reads a mask or label map, if not as `read`.
        read_affine: reads where voxels lie, as in `Stored`, from the header; None if the format does not tell.
    """

    name: str
    endings: tuple[str, ...]
    read: Callable[[Path], Stored]
    write: Callable[[BinaryIO, np.ndarray, Stored], None]
    written_as: str = ""
    foreground: int = 1
    is_picture: bool = False
    images: bool = False
    read_mask: Callable[[Path], Stored] | None = None
    read_affine: Callable[[Path], np.ndarray | None] | None = None


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


def _read_npz(path: Path, wanted: tuple[str, ...] = ("image",)) -> Stored:
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip archive")
    with np.load(path, allow_pickle=False) as archive:
        names = archive.files
        chosen = [name for name in wanted if name in names] or names
        if len(chosen) != 1 and chosen is names:
            what = "the one to predict `image`" if "image" in wanted else "the mask `mask`, the image `image`"
            raise InputError(f"{path} holds {len(names)} arrays ({', '.join(names)}): call {what}")
        return Stored(path, archive[chosen[0]])


def _write_npz(stream: BinaryIO, values: np.ndarray, stored: Stored) -> None:
    np.savez_compressed(stream, **{"mask" if values.dtype == np.uint8 else "probabilities": values})  # type: ignore[arg-type]


def _read_nifti(path: Path) -> Stored:
    """Axes in the order of the file, as in training: `[x, y, z]` in NIfTI is `[Z, Y, X]` here."""
    image = need("nibabel", "nifti").load(path)
    values = image.dataobj.get_unscaled()
    slope, offset = float(image.dataobj.slope), float(image.dataobj.inter)
    return Stored(path, values.T, "CZYX"[-values.ndim :], image, slope, offset, affine=image.affine)


def _nifti_affine(path: Path) -> np.ndarray:
    return need("nibabel", "nifti").load(path).affine


def _write_nifti(stream: BinaryIO, values: np.ndarray, stored: Stored) -> None:
    header = stored.header.header.copy()
    header.set_data_dtype(values.dtype)
    image = type(stored.header)(values.T, stored.header.affine, header)
    if not stored.path.name.lower().endswith(".gz"):
        image.to_stream(stream)
        return
    with gzip.GzipFile(fileobj=stream, mode="wb", filename="", mtime=0) as packed:
        image.to_stream(packed)


def _by_itk(name: str, endings: tuple[str, ...], written_as: str) -> FileFormat:
    write = partial(itk.write, ending=written_as)
    return FileFormat(name, endings, itk.read, write, written_as, read_affine=itk.read_affine)


def _read_dicom_mask(path: Path) -> Stored:
    return dicom_seg.read(path) if dicom_seg.is_segmentation(path) else itk.read(path)


def _dicom_affine(path: Path) -> np.ndarray | None:
    """None for a segmentation, whose planes may be any of its volume."""
    return None if dicom_seg.is_segmentation(path) else itk.read_affine(path)


CHANNEL = re.compile(r"(.+)_(\d{4})")
MASK_ARRAYS = ("mask", "label", "labels")
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
    FileFormat("an array", (".npy",), _read_npy, _write_npy),
    FileFormat("an archive of arrays", (".npz",), _read_npz, _write_npz, read_mask=partial(_read_npz, wanted=MASK_ARRAYS)),
    FileFormat("NIfTI", (".nii", ".nii.gz"), _read_nifti, _write_nifti, read_affine=_nifti_affine),
    _by_itk("MetaImage", (".mha", ".mhd"), ".mha"),
    _by_itk("NRRD", (".nrrd", ".nhdr"), ".nrrd"),
    replace(_by_itk("DICOM", itk.DICOM_ENDINGS, ".nii.gz"), read_mask=_read_dicom_mask, read_affine=_dicom_affine),
)
# A folder of slices. DICOM has no plain masks, so they are written as NIfTI, with the grid of the series.
SERIES = FileFormat(
    "a DICOM series", (), itk.read_series, partial(itk.write, ending=".nii.gz"), ".nii.gz",
    read_affine=lambda folder: itk.read_series(folder).affine,
)  # fmt: skip


def all_endings() -> tuple[str, ...]:
    """The endings of all formats."""
    return tuple(ending for form in FORMATS for ending in form.endings)


def image_endings() -> tuple[str, ...]:
    """The endings of pictures."""
    return tuple(ending for form in FORMATS if form.images for ending in form.endings)


def volume_endings() -> tuple[str, ...]:
    """The endings of volumes and arrays."""
    return tuple(ending for form in FORMATS if not form.images for ending in form.endings)


def ending_of(path: Path, endings: tuple[str, ...]) -> str:
    """Which of these endings a file's name has, in any case; "" if none."""
    return next((ending for ending in endings if path.name.lower().endswith(ending)), "")


def id_of(path: Path) -> str:
    """The name of a file without the ending of its format."""
    return path.name[: len(path.name) - len(ending_of(path, all_endings()))]


def format_of(path: Path) -> FileFormat:
    """The format of a file, by its ending, or of a folder of DICOM slices.

    Raises:
        InputError: the ending is unknown.
    """
    if itk.is_series(path):
        return SERIES
    ending = ending_of(path, all_endings())
    if not ending:
        raise InputError(f"{path} has an unknown format: known are {', '.join(all_endings())}")
    return next(form for form in FORMATS if ending in form.endings)


def read_stored(path: Path, mask: bool = False) -> Stored:
    """A file of any format as its array; `mask`: it is a mask or label map.

    Raises:
        InputError: the file is missing, damaged, or of an unknown format.
    """
    form = _existing(path)
    return _tried(form, (form.read_mask if mask else None) or form.read, path)


def affine_of(path: Path) -> np.ndarray | None:
    """Where the voxels of a volume lie, as in `Stored`; of most formats only the header is read. Errors as `read_stored`."""
    form = _existing(path)
    return None if form.read_affine is None else _tried(form, form.read_affine, path)


def _existing(path: Path) -> FileFormat:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return format_of(path)


def _tried(form: FileFormat, read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise InputError(f"{path} cannot be read as {form.name} ({first_line(error)}): replace or remove it") from error


def holds_mask(path: Path) -> bool:
    """Whether a file is an archive of an image and its mask."""
    if not path.name.lower().endswith(".npz") or not zipfile.is_zipfile(path):
        return False
    with np.load(path, allow_pickle=False) as archive:
        return "image" in archive.files and any(name in archive.files for name in MASK_ARRAYS)


def files_by_id(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder with one of these endings, by id (the name without the ending), sorted.

    If the endings include DICOM's, folders of its slices count as files. Hidden files are ignored. Empty if there is no such
    folder.

    Raises:
        InputError: two files have the same id.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        ending = ending_of(path, endings)
        is_series = not ending and ".dcm" in endings and itk.is_series(path)
        if (ending or is_series) and not path.name.startswith("."):
            name = path.name[: len(path.name) - len(ending)]
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
        raise InputError(f"{folder} is not a folder of images{'' if folder.exists() else ': it does not exist'}")
    files = files_by_id(folder, endings)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(endings)})")
    return files


def channels_by_id(files: Mapping[str, Path]) -> dict[str, dict[int, Path]]:
    """nnU-Net's `<id>_0000`, `<id>_0001`, ..., a file per channel, by id and number; a file without one has -1."""
    images: dict[str, dict[int, Path]] = {}
    for name, path in files.items():
        match = CHANNEL.fullmatch(name)
        images.setdefault(match[1] if match else name, {})[int(match[2]) if match else -1] = path
    return images
