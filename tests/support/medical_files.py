"""Small data sets in the formats and layouts of the paper's tasks, and ways to damage them."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage, generate_uid

LabelMapSegmentationStorage = "1.2.840.10008.5.1.4.1.1.66.7"  # which older versions of pydicom do not name


def write_picture(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def cut(path: Path, share: float) -> None:
    """Keeps the first `share` of a file's bytes."""
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def truncate(path: Path) -> None:
    """Keeps the first 60 bytes of a file."""
    path.write_bytes(path.read_bytes()[:60])


def disc(height: int, width: int, centre: tuple[int, int], radius: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2


def write_stage1(root: Path, count: int = 3, side: int = 48) -> Path:
    """The layout of the Data Science Bowl: one folder per RGBA image, one mask file per nucleus."""
    random = np.random.default_rng(0)
    for index in range(count):
        folder = root / "stage1_train" / f"cell{index}"
        nuclei = [disc(side, side, tuple(random.integers(10, side - 10, 2)), 6) for _ in range(3)]
        light = 40 + 150 * np.any(nuclei, axis=0) + random.integers(0, 20, (side, side))
        rgba = np.stack([light] * 3 + [np.full_like(light, 255)], axis=-1).astype(np.uint8)
        write_picture(folder / "images" / f"{folder.name}.png", rgba)
        for number, nucleus in enumerate(nuclei):
            write_picture(folder / "masks" / f"{number}.png", nucleus.astype(np.uint8) * 255)
    return root


def write_frames(
    root: Path, count: int = 3, ending: str = "tif", names: tuple[str, str] = ("Original", "Ground Truth")
) -> Path:
    """Colour frames of 36x52 pixels with one polyp each, and their masks."""
    random = np.random.default_rng(1)
    for index in range(count):
        polyp = disc(36, 52, tuple(random.integers(12, 24, 2)), 8)
        frame = np.stack([90 + 100 * polyp, 60 + 20 * polyp, 50 + 0 * polyp], axis=-1) + random.integers(0, 9, (36, 52, 3))
        write_picture(root / names[0] / f"{index + 1}.{ending}", frame.astype(np.uint8))
        write_picture(root / names[1] / f"{index + 1}.{ending}", polyp.astype(np.uint8) * 255)
    return root


AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, slope: float = 1.0, inter: float = 0.0) -> Path:
    """Writes `[x, y, z]`; the file stores (values - inter) / slope."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, inter)
    nibabel.save(image, path)
    return path


def write_itk(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Writes `[z, y, x]` through SimpleITK; affine: as in NIfTI, without turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(np.diag(affine)[:3].tolist())
    image.SetDirection(np.diag([-1.0, -1.0, 1.0]).ravel().tolist())
    image.SetOrigin((affine[:3, 3] * (-1, -1, 1)).tolist())
    sitk.WriteImage(image, str(path))
    return path


def write_series(folder: Path, shape: tuple[int, int, int], start: int = 0) -> np.ndarray:
    """A CT series whose files are not in slice order; returns its Hounsfield units, `[z, y, x]`."""
    pixels = np.random.default_rng(start).integers(-900, 900, shape)
    series = generate_uid()
    for index, plane in enumerate(pixels):
        write_slice(folder / f"{start + shape[0] - index}.dcm", plane, 2.5 * index, series, "p")
    return pixels


def write_liver(root: Path, count: int = 3, shape: tuple[int, int, int] = (40, 32, 4), ending: str = "nii") -> Path:
    """LiTS: int16 volumes in Hounsfield units and masks of 0, 1 (liver) and 2 (lesion); the first slice has no liver."""
    random = np.random.default_rng(2)
    for index in range(count):
        labels = np.zeros(shape, np.uint8)
        for z in range(1, shape[2]):
            labels[..., z] = disc(*shape[:2], (20, 16), 6 + z)
        labels[18:21, 14:17, 2] = 2
        values = (np.where(labels > 0, 110, -90) + random.integers(-20, 20, shape)).astype(np.int16)
        write_nifti(root / f"volume-{index}.{ending}", values)
        write_nifti(root / f"segmentation-{index}.{ending}", labels)
    return root


def write_slice(path: Path, pixels: np.ndarray, z: float, series: str, patient: str, modality: str = "CT") -> str:
    """A DICOM file of one slice, stored as Hounsfield units + 1024 as most scanners do; returns its identifier."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID, dataset.PatientID, dataset.Modality = series, patient, modality
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.ImagePositionPatient = [0, 0, z]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [0.7, 0.7], 2.5
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = (pixels + 1024).astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return dataset.SOPInstanceUID


def square(left: int, top: int, right: int, bottom: int) -> list[tuple[int, int]]:
    """The pixels (x, y) along the border of a box, corners included; the first one is repeated, as in the annotations."""
    upper = [(x, top) for x in range(left, right)] + [(right, y) for y in range(top, bottom)]
    lower = [(x, bottom) for x in range(right, left, -1)] + [(left, y) for y in range(bottom, top, -1)]
    return [*upper, *lower, (left, top)]


def write_annotation(path: Path, series: str, readers: list[list[list[tuple[str, bool, list[tuple[int, int]]]]]]) -> Path:
    """An annotation file of LIDC. For each reader the nodules, and for each nodule its (slice, whether included, points)."""

    def roi(uid: str, inclusion: bool, points: list[tuple[int, int]]) -> str:
        edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
        flag = "TRUE" if inclusion else "FALSE"
        return f"<roi><imageSOP_UID>{escape(uid)} </imageSOP_UID><inclusion>{flag}</inclusion>{edges}</roi>"

    sessions = ""
    for nodules in readers:
        drawn = ["".join(roi(*outline) for outline in nodule) for nodule in nodules]
        name = "<noduleID>Nodule {}</noduleID>".format
        marked = "".join(f"<unblindedReadNodule>{name(k)}{rois}</unblindedReadNodule>" for k, rois in enumerate(drawn))
        sessions += f"<readingSession><annotationVersion>3.12</annotationVersion>{marked}</readingSession>"
    header = f"<ResponseHeader><Version>1.7</Version><SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov">{header}{sessions}</LidcReadMessage>')
    return path


def write_scan(root: Path, patient: str = "LIDC-IDRI-0001", slices: int = 6, side: int = 72, box: int = 10) -> Path:
    """A series whose files are not in slice order. Slices 2 to 4 hold a bright box: of four readers, two outlined it
    exactly, one a pixel too wide on every side, and one not at all."""
    series, folder = generate_uid(), root / patient / "study" / "series"
    uids = []
    for z in range(slices):
        pixels = np.full((side, side), -800)
        if 2 <= z <= 4:
            pixels[30 : 30 + box, 40 : 40 + box] = 50
        uids.append(write_slice(folder / f"1-{slices - z:03d}.dcm", pixels, -100 + 2.5 * z, series, patient))
    exact, wide = ([(uids[z], True, square(39 - m, 29 - m, 40 + box + m, 30 + box + m)) for z in (2, 3, 4)] for m in (0, 1))
    dot = [(uids[0], True, [(5, 5)])]  # a nodule under 3 mm
    write_annotation(folder / "069.xml", series, [[exact, dot], [exact], [wide], []])
    return folder


def write_segmentation(
    path: Path, labels: np.ndarray, kind: str = "BINARY", origin: tuple[float, float, float] = (0, 0, 0), shared: bool = True
) -> Path:
    """A DICOM segmentation on the grid of `write_series`: for each segment the slices `[y, x]` of `labels` `[z, y, x]` that
    have it, last first. shared: whether what frames have in common is said once."""

    def item(**values: object) -> pydicom.Sequence:
        content = pydicom.Dataset()
        content.update({name: value for name, value in values.items()})
        return pydicom.Sequence([content])

    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.PatientID, data.Modality = generate_uid(), "p", "SEG"
    numbers = [number for number in np.unique(labels).tolist() if number]
    if kind == "LABELMAP":  # all segments of a slice in one frame
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = LabelMapSegmentationStorage
        places = [(0, z) for z in np.flatnonzero(labels.any(axis=(1, 2)))[::-1].tolist()]
    else:
        places = [
            (number, z) for number in numbers for z in np.flatnonzero((labels == number).any(axis=(1, 2)))[::-1].tolist()
        ]
    grid = pydicom.Dataset()
    grid.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    grid.PixelMeasuresSequence = item(PixelSpacing=[0.7, 0.7], SliceThickness=2.5)
    data.SharedFunctionalGroupsSequence = pydicom.Sequence([grid if shared else pydicom.Dataset()])
    frames = []
    for number, z in places:
        frame = pydicom.Dataset()
        frame.update({} if shared else grid)
        if number:
            frame.SegmentIdentificationSequence = item(ReferencedSegmentNumber=number)
        frame.PlanePositionSequence = item(ImagePositionPatient=[origin[0], origin[1], origin[2] + 2.5 * z])
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    data.SegmentSequence = pydicom.Sequence([item(SegmentNumber=n, SegmentLabel=f"s{n}")[0] for n in numbers])
    data.Rows, data.Columns, data.NumberOfFrames = *labels.shape[1:], len(places)
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    marked = np.stack([labels[z] == number if number else labels[z] for number, z in places])
    bits = 1 if kind == "BINARY" else 8
    data.SegmentationType, data.BitsAllocated, data.BitsStored, data.HighBit = kind, bits, bits, bits - 1
    packed = (
        np.packbits(marked.ravel(), bitorder="little")
        if bits == 1
        else (marked * (200 if kind == "FRACTIONAL" else 1)).astype(np.uint8)
    )
    data.MaximumFractionalValue = 200
    data.PixelData = packed.tobytes() + b"\0" * (packed.size % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path
