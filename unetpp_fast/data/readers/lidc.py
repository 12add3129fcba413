"""LIDC-IDRI as distributed: chest CT scans as DICOM series, lung nodules outlined by up to four readers as XML.

The XML files leave these rules open:

- A sample is a crop of 64x64x64 voxels around a nodule that at least half of the readers of its scan outlined. Outlines
  whose boxes overlap belong to the same nodule. A single point (a nodule under 3 mm) is not an outline.
- A voxel is nodule if at least half of the readers say so. The outline itself is the first pixel outside the nodule.
- Voxels are not resampled. A scan with unevenly spaced or repeated slices is left out, with a line on stderr.
- Scans without an annotation, annotations without a scan, and chest radiographs are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ...common.errors import InputError
from ...common.extras import need
from ...common.progress import progress_bar
from ...models.normalisation import Normalisation
from ..images import rescale
from ..samples import Dataset
from .nodule_crops import LUNG_WINDOW

CROP = 64
HEADER = (
    "SeriesInstanceUID", "SOPInstanceUID", "PatientID", "Modality", "Rows", "Columns", "ImagePositionPatient",
    "ImageOrientationPatient",
)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """What one reader drew in one slice: points (x, y) just outside the nodule; if `hole`, along a hole in it."""

    slice_uid: str
    hole: bool
    points: tuple[tuple[int, int], ...]


Nodule = tuple[Outline, ...]


@dataclass(frozen=True)
class Scan:
    """A CT series: its files and the identifiers of its slices, from the feet up."""

    patient: str
    files: tuple[Path, ...]
    slice_uids: tuple[str, ...]
    size: tuple[int, int]  # rows, columns

    @property
    def folder(self) -> Path:
        return self.files[0].parent


@dataclass(frozen=True)
class NoduleSample:
    """A crop of a scan around a nodule, with the outlines by each reader of the scan; read when needed."""

    name: str
    group: str
    image: Path
    scan: Scan
    start: tuple[int, int, int]  # z, y, x
    readers: tuple[tuple[Nodule, ...], ...]

    normalisation = Normalisation("window", window=LUNG_WINDOW)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Windowed crop, float32 `[1, D, H, W]` in -1..1, and mask, bool `[1, D, H, W]`; sides of 64, less in a small scan.

        Raises:
            InputError: a DICOM file cannot be read.
        """
        z, y, x = self.start
        slices = [_read_plane(path, self.scan.size) for path in self.scan.files[z : z + CROP]]
        values = np.stack(slices)[None, :, y : y + CROP, x : x + CROP]
        planes = {uid: k for k, uid in enumerate(self.scan.slice_uids[z : z + CROP])}
        votes = sum(self._drawn(nodules, planes, values.shape[1:]).astype(int) for nodules in self.readers)
        return rescale(values, LUNG_WINDOW), np.expand_dims(2 * votes >= len(self.readers), 0)

    def _drawn(self, nodules: Sequence[Nodule], planes: dict[str, int], shape: tuple[int, ...]) -> np.ndarray:
        """What one reader calls nodule, bool `[D, H, W]`."""
        mask = np.zeros(shape, bool)
        for nodule in nodules:
            inside = np.zeros(shape, bool)
            for outline in sorted(nodule, key=lambda outline: outline.hole):  # holes last
                if outline.slice_uid in planes:
                    plane = inside[planes[outline.slice_uid]]
                    plane[rasterise(outline, self.start[1:], plane.shape)] = not outline.hole
            mask |= inside
        return mask


def rasterise(outline: Outline, start: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels inside an outline, without the outline itself: bool `[H, W]` in the window at `start` (y, x)."""
    image, drawing = need("PIL.Image", "commands"), need("PIL.ImageDraw", "commands")
    picture = image.new("L", (shape[1], shape[0]), 0)
    points = [(px - start[1], py - start[0]) for px, py in outline.points]
    drawing.Draw(picture).polygon(points, fill=1, outline=0)
    return np.asarray(picture, bool)


def lidc_series(root: Path) -> Dataset | None:
    """DICOM series and annotation files anywhere below the root, matched by the series identifier."""
    annotations = {uid: (path, readers) for path in sorted(root.rglob("*.xml")) for uid, readers in _annotation(path)}
    folders = sorted({path.parent for path in root.rglob("*.dcm")})
    if not annotations and not folders:
        return None
    if not annotations or not folders:
        missing = "annotation (*.xml; LIDC-XML-only.zip)" if folders else "DICOM series (*.dcm)"
        raise InputError(f"{root} holds no {missing}: scans and annotations are separate downloads, both are needed")
    samples: list[NoduleSample] = []
    for folder in progress_bar(folders, desc="reading DICOM headers", unit="series", disable=None, leave=False):
        headers = _headers(folder)
        if headers and headers[0][1].SeriesInstanceUID in annotations:
            path, readers = annotations[headers[0][1].SeriesInstanceUID]
            scan = _scan(folder, headers)
            samples += _crops(scan, path, readers) if scan else []
    if not samples:
        raise InputError(f"no series under {root} has a nodule with outlines in its annotation: is a download incomplete?")
    return samples, ["nodule"]


def _annotation(path: Path) -> Iterator[tuple[str, tuple[tuple[Nodule, ...], ...]]]:
    """The series that a file annotates and the nodules by each reader; nothing for other XML files."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # an unknown encoding is a LookupError
        raise InputError(f"{path} is not a complete XML file ({error}): download it again") from error
    series = root.findtext(".//{*}SeriesInstanceUid")
    sessions = root.findall("{*}readingSession")
    if series and sessions:
        yield series.strip(), tuple(_nodules(path, session) for session in sessions)


def _nodules(path: Path, session: ElementTree.Element) -> tuple[Nodule, ...]:
    """The outlined nodules of one reader."""
    nodules = []
    for marked in session.findall("{*}unblindedReadNodule"):
        try:
            outlines = tuple(_outline(roi) for roi in marked.findall("{*}roi"))
        except (TypeError, ValueError, AttributeError) as error:
            name = marked.findtext("{*}noduleID")
            raise InputError(f"{path}: an outline of nodule {name!r} is damaged ({error}): download it again") from error
        drawn = tuple(outline for outline in outlines if len(outline.points) > 2)
        nodules += [drawn] if drawn else []
    return tuple(nodules)


def _outline(roi: ElementTree.Element) -> Outline:
    points = ((int(edge.findtext("{*}xCoord")), int(edge.findtext("{*}yCoord"))) for edge in roi.findall("{*}edgeMap"))
    inclusion = roi.findtext("{*}inclusion", "TRUE").strip().upper()
    return Outline(roi.findtext("{*}imageSOP_UID").strip(), inclusion == "FALSE", tuple(points))


def _headers(folder: Path) -> list[tuple[Path, Any]]:
    """(file, header) of each slice in a folder; empty if it holds no CT."""
    headers: list[tuple[Path, Any]] = []
    for path in sorted(folder.glob("*.dcm")):
        header = _read_dicom(path, stop_before_pixels=True, specific_tags=list(HEADER))
        if header.get("Modality") != "CT":
            return []
        missing = [tag for tag in HEADER if tag not in header]
        if missing:
            raise InputError(f"{path} lacks {missing[0]}: it is not a slice of a CT series")
        headers.append((path, header))
        first = headers[0][1]
        if header.SeriesInstanceUID != first.SeriesInstanceUID:
            raise InputError(f"{folder} holds slices of two series, {path.name} is from another: use one folder per series")
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            have, want = f"{header.Rows}x{header.Columns}", f"{first.Rows}x{first.Columns}"
            raise InputError(f"{path} is {have} pixels but {headers[0][0].name} of its series is {want}")
    return headers


def _scan(folder: Path, headers: list[tuple[Path, Any]]) -> Scan | None:
    """The series with its slices in order; None, with a line on stderr, if they are not evenly spaced."""
    row, column = np.array(headers[0][1].ImageOrientationPatient, float).reshape(2, 3)
    along = np.cross(row, column)
    heights = np.array([along @ np.array(header.ImagePositionPatient, float) for _, header in headers])
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    if len(steps) and not np.allclose(steps, np.median(steps), rtol=0.1, atol=1e-3):
        gaps = f"{steps.min():.3g} to {steps.max():.3g} mm apart"
        print(f"left out: {folder}, a slice is missing or repeated ({gaps})", file=sys.stderr)
        return None
    ordered = [headers[index] for index in order]
    first = ordered[0][1]
    return Scan(
        str(first.PatientID),
        tuple(path for path, _ in ordered),
        tuple(str(header.SOPInstanceUID) for _, header in ordered),
        (int(first.Rows), int(first.Columns)),
    )


def _crops(scan: Scan, path: Path, readers: tuple[tuple[Nodule, ...], ...]) -> Iterator[NoduleSample]:
    """A sample for each nodule that at least half of the readers outlined."""
    planes = {uid: k for k, uid in enumerate(scan.slice_uids)}
    groups: list[list[tuple[int, np.ndarray]]] = []  # (reader, box) pairs per nodule
    for reader, nodules in enumerate(readers):
        for nodule in nodules:
            unknown = [outline.slice_uid for outline in nodule if outline.slice_uid not in planes]
            if unknown:
                raise InputError(
                    f"{path} outlines slice {unknown[0]}, which is not in {scan.folder}: download the series again"
                )
            box = _box(nodule, planes)
            group = next((group for group in groups if any(_overlap(box, other) for _, other in group)), None)
            if group is None:
                groups.append([(reader, box)])
            else:
                group.append((reader, box))
    size = np.array((len(scan.files), *scan.size))
    for index, group in enumerate(groups):
        if 2 * len({reader for reader, _ in group}) >= len(readers):
            centre = np.mean([box.mean(axis=0) for _, box in group], axis=0)
            start = np.clip(np.round(centre).astype(int) - CROP // 2, 0, np.maximum(size - CROP, 0))
            name = f"{scan.patient}/{scan.folder.name}/{index}"
            yield NoduleSample(name, scan.patient, scan.folder, scan, tuple(start.tolist()), readers)


def _box(nodule: Nodule, planes: dict[str, int]) -> np.ndarray:
    """The lowest and the highest (z, y, x) of a nodule's outlines, `[2, 3]`."""
    corners = [(planes[outline.slice_uid], y, x) for outline in nodule for x, y in outline.points]
    return np.array([np.min(corners, axis=0), np.max(corners, axis=0)])


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.maximum(one[0], other[0]) <= np.minimum(one[1], other[1])).all())


def _read_dicom(path: Path, **options: Any) -> Any:
    pydicom = need("pydicom", "dicom")
    try:
        return pydicom.dcmread(path, **options)
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} cannot be read as DICOM ({error}): download it again") from error


def _read_plane(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Hounsfield units of a slice, float32 `[rows, columns]`."""
    dataset = _read_dicom(path)
    try:
        values = dataset.pixel_array.astype(np.float32)
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"the pixels of {path} cannot be read ({str(error).strip()}): download it again") from error
    if values.shape != size:
        raise InputError(f"{path} holds pixels of shape {values.shape}, its header says {size}: download it again")
    return values * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
