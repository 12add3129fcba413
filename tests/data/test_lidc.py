"""LIDC-IDRI: small DICOM series with the outlines of several readers, and damaged or incomplete ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from support.medical_files import cut, square, write_annotation, write_scan, write_slice

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.images import rescale
from unetpp_fast.data.readers.lidc import CROP, Outline, rasterise
from unetpp_fast.data.readers.nodule_crops import LUNG_WINDOW
from unetpp_fast.data.samples import groups, split
from unetpp_fast.data.tasks import TASKS

NODULE = TASKS["nodule"]


def test_the_outline_itself_is_outside():
    mask = rasterise(Outline("", False, tuple(square(3, 2, 9, 6))), (1, 1), (8, 12))
    expected = np.zeros((8, 12), bool)
    expected[2:5, 3:8] = True  # inside 3..9 and 2..6, relative to the start of the window
    assert np.array_equal(mask, expected)


def test_a_sample_is_a_crop_with_the_voxels_that_half_of_the_readers_included(tmp_path):
    write_scan(tmp_path)
    samples, classes, channels = NODULE.read(tmp_path)
    (sample,) = samples
    assert classes == ["nodule"] and channels == 1 and sample.group == "LIDC-IDRI-0001"
    image, mask = sample.load()
    assert image.shape == mask.shape == (1, 6, CROP, CROP)  # the scan has six slices
    z, y, x = sample.start
    assert z == 0 and 0 <= y <= 72 - CROP and 0 <= x <= 72 - CROP
    expected = np.zeros((6, 72, 72), bool)
    expected[2:5, 30:40, 40:50] = True  # two of four readers; the wider outline by one reader does not count
    window = (slice(None), slice(y, y + CROP), slice(x, x + CROP))
    assert np.array_equal(mask[0], expected[window])
    assert np.array_equal(image[0], rescale(np.where(expected, np.float32(50), np.float32(-800)), LUNG_WINDOW)[window])


def annotate(folder: Path, readers) -> None:
    """Replaces the annotation; `readers` maps the identifiers of the slices, lowest first, to the outlines."""
    headers = sorted((pydicom.dcmread(path) for path in folder.glob("*.dcm")), key=lambda h: h.ImagePositionPatient[2])
    uids = [header.SOPInstanceUID for header in headers]
    write_annotation(folder / "069.xml", headers[0].SeriesInstanceUID, readers(uids))


def test_holes_are_excluded_and_nodules_are_separate(tmp_path):
    folder = write_scan(tmp_path)

    def readers(uids):
        ring = [(uids[1], False, square(42, 32, 46, 36)), (uids[1], True, square(39, 29, 50, 40))]
        other = [(uids[5], True, square(10, 10, 16, 16))]
        rare = [(uids[3], True, square(60, 60, 66, 66))]
        return [[ring, other], [ring, other], [rare]]

    annotate(folder, readers)
    samples, _, _ = NODULE.read(tmp_path)
    assert len(samples) == 2  # the nodule that one of three readers saw does not count
    _, mask = samples[0].load()
    z, y, x = samples[0].start
    assert mask[0, 1 - z].sum() == 10 * 10 - 3 * 3 and not mask[0, 1 - z, 34 - y, 44 - x]
    assert mask[0, 5 - z].sum() == 5 * 5 and not mask[0, 3 - z].any()


def test_scans_are_grouped_by_patient_and_other_files_are_ignored(tmp_path):
    for number in (1, 2):
        write_scan(tmp_path, f"LIDC-IDRI-000{number}")
    write_slice(tmp_path / "LIDC-IDRI-0001/xray/1-1.dcm", np.zeros((8, 8), int), 0, "1.2.3", "LIDC-IDRI-0001", "DX")
    write_slice(tmp_path / "LIDC-IDRI-0003/scan/1-1.dcm", np.zeros((8, 8), int), 0, "1.2.4", "LIDC-IDRI-0003")
    write_annotation(tmp_path / "tcia-lidc-xml/157/158.xml", "1.2.5", [[]])
    (tmp_path / "notes.xml").write_text("<other/>")
    samples, _, _ = NODULE.read(tmp_path)
    assert groups(samples) == ["LIDC-IDRI-0001", "LIDC-IDRI-0002"]
    train, validation = split(samples, 0.5, 0)
    assert len(train) == len(validation) == 1


def test_a_scan_with_a_missing_slice_is_left_out_with_a_line_on_stderr(tmp_path, capsys):
    write_scan(tmp_path, "LIDC-IDRI-0001")
    incomplete = write_scan(tmp_path, "LIDC-IDRI-0002")
    (incomplete / "1-003.dcm").unlink()
    samples, _, _ = NODULE.read(tmp_path)
    assert groups(samples) == ["LIDC-IDRI-0001"]
    assert f"left out: {incomplete}, a slice is missing or repeated (2.5 to 5 mm apart)" in capsys.readouterr().err


def alter(path: Path, **tags) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def shrink(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    alter(path, Rows=36, PixelData=dataset.PixelData[: len(dataset.PixelData) // 2])


def forget(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    del dataset.ImagePositionPatient
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: cut(folder / "1-003.dcm", 0.6), r"1-003\.dcm cannot be read"),
        (lambda folder: (folder / "1-003.dcm").write_bytes(b"no scan"), r"1-003\.dcm cannot be read as DICOM"),
        (lambda folder: shrink(folder / "1-003.dcm"), r"1-003\.dcm is 36x72 pixels but 1-001\.dcm of its series is 72x72"),
        (lambda folder: forget(folder / "1-003.dcm"), r"1-003\.dcm lacks ImagePositionPatient"),
        (lambda folder: alter(folder / "1-003.dcm", SeriesInstanceUID="1.2.3"), r"two series, 1-003\.dcm is from another"),
        (lambda folder: cut(folder / "069.xml", 0.8), r"069\.xml is not a complete XML file"),
        (lambda folder: (folder / "069.xml").unlink(), r"holds no annotation .*LIDC-XML-only\.zip"),
        (
            lambda folder: annotate(folder, lambda uids: [[[("1.2", True, square(3, 3, 9, 9))]]]),
            r"outlines slice 1\.2, which is not in",
        ),
        (lambda folder: annotate(folder, lambda uids: [[[(uids[0], True, [("a", 1)] * 4)]]]), r"'Nodule 0' is damaged"),
        (lambda folder: annotate(folder, lambda uids: [[], []]), r"has a nodule with outlines"),
        (lambda folder: [path.unlink() for path in folder.glob("*.dcm")], r"holds no DICOM series"),
    ],
    ids=["cut", "no_dicom", "size", "tag", "series", "xml", "no_xml", "slice", "point", "no_nodule", "no_series"],
)
def test_damaged_scans_are_named(tmp_path, damage, says):
    damage(write_scan(tmp_path))
    with pytest.raises(InputError, match=says):
        NODULE.read(tmp_path)
