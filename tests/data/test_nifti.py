"""NIfTI volumes and masks: scaling, geometry, labels, and damaged files."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from support.medical_files import AFFINE, cut, write_liver, write_nifti

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.images import rescale
from unetpp_fast.data.readers.liver import LIVER_WINDOW
from unetpp_fast.data.tasks import TASKS

LIVER = TASKS["liver"]


def test_values_are_scaled_as_the_header_says(tmp_path):
    write_liver(tmp_path)
    values = np.linspace(-150.0, 200.0, 40 * 32 * 4).reshape(40, 32, 4)
    stored = write_nifti(tmp_path / "volume-0.nii", values, slope=0.5, inter=-1024)
    image = nibabel.load(stored)
    raw = np.round((values + 1024) / 0.5).astype(np.int16)
    header = image.header.copy()
    header.set_data_dtype(np.int16)
    scaled = nibabel.Nifti1Image(raw, AFFINE, header)
    scaled.header.set_slope_inter(0.5, -1024)
    nibabel.save(scaled, stored)
    read = np.stack([sample.load()[0][0].T for sample in LIVER.read(tmp_path)[0][:4]], axis=-1)
    assert np.abs(read - rescale(nibabel.load(stored).get_fdata(), LIVER_WINDOW)).max() < 1e-6


def change_mask(root: Path, change, affine: np.ndarray = AFFINE) -> None:
    labels = nibabel.load(root / "segmentation-1.nii", mmap=False).dataobj[...]
    write_nifti(root / "segmentation-1.nii", change(labels), affine)


TURNED = AFFINE @ np.diag([-1.0, 1.0, 1.0, 1.0])

SHIFTED = AFFINE + np.array([[0, 0, 0, 5.0]] + [[0] * 4] * 3)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: change_mask(root, lambda m: m[:, :, 1:]), r"segmentation-1\.nii .*shape: 40x32x3 and 40x32x4 voxels"),
        (
            lambda root: change_mask(root, lambda m: m, np.diag([0.7, 0.8, 5, 1])),
            r"spacing: 0\.7x0\.8x5 and 0\.7x0\.8x2\.5 mm",
        ),
        (lambda root: change_mask(root, lambda m: m, TURNED), r"segmentation-1\.nii .*differ in affine"),
        (lambda root: change_mask(root, lambda m: m, SHIFTED), r"segmentation-1\.nii .*differ in affine"),
        (lambda root: change_mask(root, lambda m: m * np.float32(0.4)), r"mask .*segmentation-1\.nii holds 0\.4"),
        (lambda root: change_mask(root, lambda m: m * np.float32("nan")), r"segmentation-1\.nii holds NaN"),
        (lambda root: cut(root / "volume-1.nii", 0.7), r"volume-1\.nii is truncated"),
        (lambda root: cut(root / "volume-1.nii", 0.01), r"volume-1\.nii cannot be read as NIfTI"),
        (lambda root: write_nifti(root / "volume-1.nii", np.zeros((40, 32, 4, 2))), r"volume-1\.nii has 4 axes"),
    ],
    ids=["shape", "spacing", "turned", "shifted", "float", "nan", "truncated", "header", "4d"],
)
def test_volumes_that_do_not_fit_their_masks_are_named(tmp_path, damage, says):
    damage(write_liver(tmp_path))
    with pytest.raises(InputError, match=says):
        for sample in LIVER.read(tmp_path)[0]:
            sample.load()


def test_a_float_mask_of_whole_labels_is_read(tmp_path):
    change_mask(write_liver(tmp_path), lambda m: m.astype(np.float64))
    assert LIVER.read(tmp_path)[0][6].load()[1].any()


def test_a_truncated_compressed_file_is_named_when_it_is_read(tmp_path):
    cut(write_liver(tmp_path, ending="nii.gz") / "volume-1.nii.gz", 0.6)
    samples, _, _ = LIVER.read(tmp_path)
    with pytest.raises(InputError, match=r"volume-1\.nii\.gz cannot be read to its end"):
        for sample in samples[4:8]:
            sample.load()
