"""MetaImage, NRRD and DICOM through SimpleITK.

The axes keep the order and directions of the file: `[x, y, z]` in ITK is `[z, y, x]` here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.errors import InputError, first_line
from ..common.extras import need
from .stored import Stored

SERIES, POSITION, DIRECTIONS = "0020|000e", "0020|0032", "0020|0037"  # DICOM's tags
DICOM_ENDINGS = (".dcm", ".ima")
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's x and y point to the left and back, NIfTI's to the right and front


@dataclass(frozen=True)
class Grid:
    """Where the voxels lie: per axis x, y, z, in mm."""

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def affine(self) -> np.ndarray | None:
        """The matrix from voxels x, y, z to mm as in NIfTI, `[4, 4]`; None for images."""
        count = len(self.spacing)
        if count < 3:
            return None
        matrix = np.eye(4)
        matrix[:3, :3] = np.reshape(self.direction, (count, count))[:3, :3] * np.array(self.spacing[:3])
        matrix[:3, 3] = self.origin[:3]
        return RAS @ matrix


def read(path: Path) -> Stored:
    """A file that SimpleITK reads; several values per voxel are channels. ITK turns white-is-zero DICOM over."""
    sitk = need("SimpleITK", "volumes")
    with _quiet(sitk):
        return _stored(sitk, path, sitk.ReadImage(str(path)))


def read_affine(path: Path) -> np.ndarray | None:
    """Where the voxels of a file lie, as in `Stored`, from its header alone."""
    sitk = need("SimpleITK", "volumes")
    with _quiet(sitk):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return Grid(reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection()).affine


def write(stream: BinaryIO, values: np.ndarray, stored: Stored, ending: str) -> None:
    """Writes `[z, y, x]` or `[y, x]` with the grid of a file that was read, in the format of this ending."""
    sitk = need("SimpleITK", "volumes")
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    grid, count = stored.header, values.ndim
    image.SetSpacing(grid.spacing[:count])
    image.SetOrigin(grid.origin[:count])
    whole = len(grid.spacing)
    image.SetDirection(np.reshape(grid.direction, (whole, whole))[:count, :count].ravel().tolist())
    with tempfile.TemporaryDirectory() as folder:  # SimpleITK writes to paths only
        path = Path(folder) / f"volume{ending}"
        sitk.WriteImage(image, str(path), useCompression=True)
        stream.write(path.read_bytes())


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its ending or its first bytes."""
    named = path.suffix.lower() in DICOM_ENDINGS
    if (
        path.suffix and not named and not path.suffix[1:].isdecimal()
    ):  # scanners write names without an ending, or with numbers
        return False
    if named or not path.is_file():
        return path.is_file()
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _slices(folder: Path) -> Iterator[Path]:
    """The DICOM files directly in a folder, in any order. Endings are looked at first: folders of pictures may be large."""
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.name.upper() != "DICOMDIR" and is_dicom(path):
            yield path


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files."""
    return folder.is_dir() and next(_slices(folder), None) is not None


def read_series(folder: Path) -> Stored:
    """The DICOM series in a folder, its slices ordered by their positions.

    Raises:
        InputError: a file is damaged, there are several series, or a slice is missing or there twice.
    """
    sitk = need("SimpleITK", "volumes")
    files = sorted(_slices(folder))
    with _quiet(sitk):
        if len(files) == 1:
            return _stored(sitk, folder, _read_slice(sitk, files[0]).Execute())
        headers = [_read_slice(sitk, path) for path in files]
        series = {_tag(reader, SERIES) for reader in headers}
        if len(series) > 1:
            raise InputError(f"{folder} holds slices of {len(series)} series: use one folder per series")
        sizes = {reader.GetSize() for reader in headers}
        if len(sizes) > 1:
            shown = " and ".join("x".join(map(str, size[:2])) for size in sorted(sizes)[:2])
            raise InputError(f"{folder} holds slices of {shown} pixels: remove those of another series")
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(path) for path in _ordered(folder, files, headers)])
        return _stored(sitk, folder, reader.Execute())


def _read_slice(sitk: Any, path: Path) -> Any:
    """A reader of a DICOM file that has read its header."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as DICOM ({first_line(error)}): replace or remove it") from error
    return reader


def _tag(reader: Any, tag: str) -> str:
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def _ordered(folder: Path, files: Sequence[Path], headers: Sequence[Any]) -> list[Path]:
    """The files from the lowest slice to the highest."""
    try:
        axes = np.array(_tag(headers[0], DIRECTIONS).split("\\"), float).reshape(2, 3)
        places = np.array([_tag(reader, POSITION).split("\\") for reader in headers], float).reshape(-1, 3)
    except ValueError as error:
        raise InputError(f"{folder} holds slices without a position: they are no volume, predict them one by one") from error
    heights = places @ np.cross(*axes)
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    if not np.allclose(steps, np.median(steps), rtol=0.1, atol=1e-3):
        gaps = f"{steps.min():.3g} to {steps.max():.3g} mm apart"
        raise InputError(f"{folder} lacks a slice, or holds one twice: its slices are {gaps}; download the series again")
    return [files[index] for index in order]


def _stored(sitk: Any, path: Path, image: Any) -> Stored:
    count = image.GetDimension()
    values = sitk.GetArrayFromImage(image)
    axes = "CZYX"[-count:] + ("C" if image.GetNumberOfComponentsPerPixel() > 1 else "")
    if count > 4 or axes.count("C") > 1:
        raise InputError(f"{path} has the shape {values.shape}: save each volume as a separate file")
    grid = Grid(image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    return Stored(path, values, axes, grid, affine=grid.affine)


@contextmanager
def _quiet(sitk: Any) -> Iterator[None]:
    """Inside, ITK's warnings, of several lines each, are not printed."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
