"""DICOM segmentations as masks and label maps of their series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.command_line import run
from support.medical_files import cut, write_segmentation, write_series

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.layouts import read_folder
from unetpp_fast.data.samples import check_samples, with_spacing
from unetpp_fast.training.checkpoint import load_checkpoint

SHAPE = (8, 16, 17)


def labels(classes: int = 2) -> np.ndarray:
    """Some slices are empty, between marked ones too."""
    found = np.zeros(SHAPE, np.uint8)
    found[2, 3:9, 4:12], found[6, 5:8, 2:9] = 1, 1
    if classes > 1:
        found[2:4, 10:15, 5:14] = 2
    return found


def folder(root: Path, values: np.ndarray | None = None, **options) -> Path:
    """Two series and their segmentations."""
    for key in "ab":
        write_series(root / "images" / key, SHAPE)
        write_segmentation(root / "masks" / f"{key}.dcm", labels() if values is None else values, **options)
    return root


@pytest.mark.parametrize("options", [{}, {"kind": "FRACTIONAL"}, {"kind": "LABELMAP"}, {"shared": False}])
def test_segments_are_the_values_of_a_label_map_on_the_grid_of_the_series(tmp_path, options):
    found = read_folder(folder(tmp_path, **options))
    assert found.spatial_dims == 3 and found.exclusive and found.classes == ["background", "1", "2"]
    assert check_samples(found.samples) == 1
    image, one_hot = found.samples[0].load()
    assert image.shape == (1, *SHAPE) and np.array_equal(one_hot.argmax(axis=0), labels())
    assert np.allclose(found.samples[0].spacing(), (2.5, 0.7, 0.7))
    (sample,) = with_spacing(found.samples[:1], (1.25, 0.7, 0.7))
    assert sample.load()[1].shape == (3, 16, *SHAPE[1:])


def test_one_segment_is_a_mask_and_classes_may_have_folders(tmp_path, capsys):
    found = read_folder(folder(tmp_path, labels(1)))
    assert not found.exclusive and np.array_equal(found.samples[0].load()[1][0], labels(1) > 0)
    arguments = ("--features", "2,4", "--patch", "4,8,8", "--device", "cpu", "--epochs", "1")
    assert run("train", "--data", tmp_path, "--out", tmp_path / "run", *arguments) == 0
    assert "found 2 volumes with masks of 1 class" in capsys.readouterr().out
    assert len(load_checkpoint(tmp_path / "run/last.pt")["history"]) == 1
    both = tmp_path / "both"
    for key in "ab":
        write_series(both / "images" / key, SHAPE)
        write_segmentation(both / "masks/tumour" / f"{key}.dcm", labels(1))
        write_segmentation(both / "masks/organ" / f"{key}.dcm", np.ones(SHAPE, np.uint8))  # which overlaps the tumour
    found = read_folder(both)
    assert found.classes == ["organ", "tumour"]
    assert np.array_equal(found.samples[0].load()[1], [np.ones(SHAPE), labels(1) > 0])


def test_segmentations_that_do_not_fit_are_one_error(tmp_path):
    root = folder(tmp_path)
    file = root / "masks/a.dcm"
    (sample,) = (one for one in read_folder(root).samples if one.name == "a")
    off = "a.dcm does not lie on the slices of .*images/a: give the series that it is of"
    for options in ({"origin": (0, 0, 1.0)}, {"origin": (0.2, 0, 0)}, {"origin": (0, 0, 7.5)}, {"origin": (0, 0, -10)}):
        write_segmentation(file, labels(), **options)
        with pytest.raises(InputError, match=off):
            sample.load()
    write_segmentation(file, np.pad(labels(), ((0, 0), (0, 0), (0, 1))))
    with pytest.raises(InputError, match=off):
        sample.load()
    write_segmentation(file, labels(), kind="SURFACE")
    with pytest.raises(InputError, match=r"a.dcm is of the type SURFACE: save it as BINARY"):
        sample.load()
    write_segmentation(file, labels())
    cut(file, 0.97)
    with pytest.raises(InputError, match=r"a.dcm cannot be read as DICOM"):
        sample.load()


def test_overlapping_segments_are_one_error(tmp_path):
    root = folder(tmp_path)
    (sample,) = (one for one in read_folder(root).samples if one.name == "a")

    class Both(np.ndarray):
        """Every marked voxel belongs to each segment."""

        def __eq__(self, number):
            return np.asarray(self) > 0

    write_segmentation(root / "masks/a.dcm", labels().view(Both))
    with pytest.raises(InputError, match=r"segments 1 and 2 of .*a.dcm overlap: save each class as masks/<class>/<id>.dcm"):
        sample.load()
