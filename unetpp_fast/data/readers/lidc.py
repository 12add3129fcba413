"""LIDC-IDRI as its provider ships it: CT scans as DICOM series, the outlines of up to four readers as XML.

The rules, as the XML files leave them open:

- A sample is a crop of 64x64x64 voxels around a nodule that at least half of the readers of its scan outlined. Outlines
  whose boxes overlap are of one nodule. A mark of a single point (a nodule under 3 mm) is no outline.
- A voxel is nodule where at least half of the readers say so. The drawn pixels themselves are the first ones outside.
- Voxels are used as they are, without resampling. A scan whose slices lie unevenly, or twice, is left out, and said so.
- Scans without annotation and annotations without scan are passed over, chest radiographs too.
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
from .. import images
from ..samples import Found
from .nodule_crops import LUNG_WINDOW

CROP = 64
HEADER = (
    "SeriesInstanceUID", "SOPInstanceUID", "PatientID", "Modality", "Rows", "Columns", "ImagePositionPatient",
    "ImageOrientationPatient",
)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """What one reader drew in one slice: pixels `[K, 2]` (x, y) just outside the nodule, or just outside a hole in it."""

    slice_uid: str
    hole: bool
    points: tuple[tuple[int, int], ...]


Nodule = tuple[Outline, ...]


@dataclass(frozen=True)
class Scan:
    """A CT series, its files and the identifiers of its slices from the feet up."""

    patient: str
    files: tuple[Path, ...]
    slice_uids: tuple[str, ...]
    size: tuple[int, int]  # rows, columns

    @property
    def folder(self) -> Path:
        return self.files[0].parent


@dataclass(frozen=True)
class NoduleSample:
    """A crop of a scan around a nodule, with the outlines of each reader of the scan; read when asked for."""

    name: str
    group: str
    image: Path
    scan: Scan
    start: tuple[int, int, int]  # z, y, x
    readers: tuple[tuple[Nodule, ...], ...]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Windowed crop, float32 `[1, D, H, W]` in -1..1, and mask, bool `[1, D, H, W]`; axes 64, shorter in a small scan.

        Raises:
            InputError: a DICOM file cannot be read.
        """
        z, y, x = self.start
        planes = [_read_plane(path, self.scan.size) for path in self.scan.files[z : z + CROP]]
        values = np.stack(planes)[None, :, y : y + CROP, x : x + CROP]
        where = {uid: k for k, uid in enumerate(self.scan.slice_uids[z : z + CROP])}
        votes = sum(self._drawn(nodules, where, values.shape[1:]).astype(int) for nodules in self.readers)
        return images.rescale(values, LUNG_WINDOW), (2 * votes >= len(self.readers))[None]

    def _drawn(self, nodules: Sequence[Nodule], where: dict[str, int], shape: tuple[int, ...]) -> np.ndarray:
        """What one reader calls nodule, bool `[D, H, W]`."""
        mask = np.zeros(shape, bool)
        for nodule in nodules:
            own = np.zeros(shape, bool)
            for outline in sorted(nodule, key=lambda outline: outline.hole):  # holes last
                if outline.slice_uid in where:
                    plane = own[where[outline.slice_uid]]
                    plane[_inside(outline, self.start[1:], plane.shape)] = not outline.hole
            mask |= own
        return mask


def _inside(outline: Outline, start: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels within an outline, without those drawn, bool `[H, W]` of the window at `start` (y, x)."""
    image, drawing = need("PIL.Image", "commands"), need("PIL.ImageDraw", "commands")
    picture = image.new("L", (shape[1], shape[0]), 0)
    points = [(px - start[1], py - start[0]) for px, py in outline.points]
    drawing.Draw(picture).polygon(points, fill=1, outline=0)
    return np.asarray(picture, bool)


def lidc_series(root: Path) -> Found | None:
    """DICOM series and annotation files anywhere below the root, matched by the identifier of the series."""
    annotations = {uid: (path, readers) for path in sorted(root.rglob("*.xml")) for uid, readers in _annotation(path)}
    folders = sorted({path.parent for path in root.rglob("*.dcm")})
    if not annotations and not folders:
        return None
    if not annotations or not folders:
        missing = "annotation (*.xml; LIDC-XML-only.zip)" if folders else "DICOM series (*.dcm)"
        raise InputError(f"{root} holds no {missing}: the scans and the annotations are two downloads, and both are needed")
    samples: list[NoduleSample] = []
    tqdm = need("tqdm", "commands").tqdm
    for folder in tqdm(folders, desc="reading DICOM headers", unit="series", disable=None, leave=False):
        headers = _headers(folder)
        if headers and headers[0][1].SeriesInstanceUID in annotations:
            path, readers = annotations[headers[0][1].SeriesInstanceUID]
            scan = _scan(folder, headers)
            samples += _crops(scan, path, readers) if scan else []
    if not samples:
        raise InputError(f"no series under {root} has a nodule with outlines in an annotation: is a download incomplete?")
    return samples, ["nodule"]


def _annotation(path: Path) -> Iterator[tuple[str, tuple[tuple[Nodule, ...], ...]]]:
    """The series that a file annotates and the nodules of each of its readers; nothing for other XML files."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # an unknown encoding is a LookupError
        raise InputError(f"{path} is no complete XML file ({error}): download it again") from error
    series = root.findtext(".//{*}SeriesInstanceUid")
    sessions = root.findall("{*}readingSession")
    if series and sessions:
        yield series.strip(), tuple(_nodules(path, session) for session in sessions)


def _nodules(path: Path, session: ElementTree.Element) -> tuple[Nodule, ...]:
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
    """(file, header) of each slice of a folder; empty where it holds no CT."""
    headers: list[tuple[Path, Any]] = []
    for path in sorted(folder.glob("*.dcm")):
        header = _read_dicom(path, stop_before_pixels=True, specific_tags=list(HEADER))
        if header.get("Modality") != "CT":
            return []
        missing = [tag for tag in HEADER if tag not in header]
        if missing:
            raise InputError(f"{path} lacks {missing[0]}: it is no slice of a CT series")
        headers.append((path, header))
        first = headers[0][1]
        if header.SeriesInstanceUID != first.SeriesInstanceUID:
            raise InputError(f"{folder} holds slices of two series, {path.name} is of another: one folder a series")
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            have, want = f"{header.Rows}x{header.Columns}", f"{first.Rows}x{first.Columns}"
            raise InputError(f"{path} is {have} pixels but {headers[0][0].name} of its series is {want}")
    return headers


def _scan(folder: Path, headers: list[tuple[Path, Any]]) -> Scan | None:
    """The series in the order of its slices, or None, and a line on stderr, if they are not evenly spaced."""
    row, column = np.array(headers[0][1].ImageOrientationPatient, float).reshape(2, 3)
    along = np.cross(row, column)
    heights = np.array([along @ np.array(header.ImagePositionPatient, float) for _, header in headers])
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    if len(steps) and not np.allclose(steps, np.median(steps), rtol=0.1, atol=1e-3):
        gaps = f"{steps.min():.3g} to {steps.max():.3g} mm apart"
        print(f"left out: {folder}, a slice is missing or there twice ({gaps})", file=sys.stderr)
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
    """A sample for each nodule that half of the readers outlined."""
    where = {uid: k for k, uid in enumerate(scan.slice_uids)}
    groups: list[list[tuple[int, np.ndarray]]] = []  # of (reader, box), one a nodule
    for reader, nodules in enumerate(readers):
        for nodule in nodules:
            unknown = [outline.slice_uid for outline in nodule if outline.slice_uid not in where]
            if unknown:
                raise InputError(f"{path} outlines slice {unknown[0]}, which {scan.folder} lacks: download the series again")
            box = _box(nodule, where)
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


def _box(nodule: Nodule, where: dict[str, int]) -> np.ndarray:
    """The lowest and the highest (z, y, x) of a nodule's outlines, `[2, 3]`."""
    corners = [(where[outline.slice_uid], y, x) for outline in nodule for x, y in outline.points]
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
    except Exception as error:  # as above
        raise InputError(f"the pixels of {path} cannot be read ({str(error).strip()}): download it again") from error
    if values.shape != size:
        raise InputError(f"{path} holds pixels of shape {values.shape}, its header says {size}: download it again")
    return values * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
