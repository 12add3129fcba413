"""NIfTI and NumPy volumes: slices of LiTS and ready-made crops, and what is said when they do not fit their masks."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from support.medical_files import AFFINE, disc, write_liver, write_nifti

from unetpp_fast.common.errors import InputError
from unetpp_fast.data import images
from unetpp_fast.data.readers.liver import LIVER_WINDOW
from unetpp_fast.data.readers.nodule_crops import LUNG_WINDOW
from unetpp_fast.data.samples import groups, split
from unetpp_fast.data.tasks import TASKS

LIVER, NODULE = TASKS["liver"], TASKS["nodule"]


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_every_slice_is_a_sample_in_hounsfield_units(tmp_path, ending):
    samples, classes, channels = LIVER.read(write_liver(tmp_path / "Training Batch 1", ending=ending).parent)
    assert len(samples) == 3 * 4 and classes == ["liver"] and channels == 1
    assert samples[6].name == "volume-001/0002" and groups(samples) == ["volume-000", "volume-001", "volume-002"]
    image, mask = samples[6].load()
    volume = nibabel.load(tmp_path / "Training Batch 1" / f"volume-1.{ending}").get_fdata()[..., 2].T
    assert image.shape == mask.shape == (1, 32, 40) and image.dtype == np.float32
    low, high = LIVER_WINDOW
    assert np.allclose(image[0], (np.clip(volume, low, high) - low) / (high - low) * 2 - 1, atol=1e-6)
    assert np.array_equal(mask[0], disc(40, 32, (20, 16), 8).T)  # the lesion is liver too
    assert not samples[0].load()[1].any()  # a slice of background alone


def test_a_volume_stays_on_one_side_of_the_split(tmp_path):
    samples, _, _ = LIVER.read(write_liver(tmp_path))
    for seed in range(3):
        train, validation = split(samples, 0.2, seed)
        assert len(train) == 8 and len(validation) == 4 and len(groups(validation)) == 1
    with pytest.raises(InputError, match="of two patients or videos: all 4 are of volume-000"):
        split(samples[:4], 0.2, 0)


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
    assert np.abs(read - images.rescale(nibabel.load(stored).get_fdata(), LIVER_WINDOW)).max() < 1e-6


def change_mask(root: Path, change, affine: np.ndarray = AFFINE) -> None:
    labels = nibabel.load(root / "segmentation-1.nii", mmap=False).dataobj[...]
    write_nifti(root / "segmentation-1.nii", change(labels), affine)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


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
        (lambda root: (root / "segmentation-1.nii").unlink(), r"volume-1\.nii has no segmentation-1\.nii"),
        (lambda root: write_nifti(root / "more/volume-1.nii", np.zeros((4, 4, 4))), r"volume-1\.nii have one number"),
        (lambda root: write_nifti(root / "volume-1.nii", np.zeros((40, 32, 4, 2))), r"volume-1\.nii has 4 axes"),
    ],
    ids=["shape", "spacing", "turned", "shifted", "float", "nan", "truncated", "header", "no_mask", "double", "4d"],
)
def test_volumes_that_do_not_fit_their_masks_are_named(tmp_path, damage, says):
    damage(write_liver(tmp_path))
    with pytest.raises(InputError, match=says):
        for sample in LIVER.read(tmp_path)[0]:
            sample.load()


def test_a_float_mask_of_whole_labels_is_read(tmp_path):
    change_mask(write_liver(tmp_path), lambda m: m.astype(np.float64))
    assert LIVER.read(tmp_path)[0][6].load()[1].any()


def test_a_compressed_file_that_ends_early_is_named_when_it_is_read(tmp_path):
    cut(write_liver(tmp_path, ending="nii.gz") / "volume-1.nii.gz", 0.6)
    samples, _, _ = LIVER.read(tmp_path)
    with pytest.raises(InputError, match=r"volume-1\.nii\.gz cannot be read to its end"):
        for sample in samples[4:8]:
            sample.load()


def write_crops(root: Path, ending: str, count: int = 2) -> Path:
    """Crops `[z, y, x]` of 8x9x10 voxels with a nodule, in Hounsfield units."""
    for index in range(count):
        mask = np.zeros((8, 9, 10), np.uint8)
        mask[2:5, 3:7, 4:8] = 1
        values = np.where(mask > 0, 30, -850).astype(np.int16)
        for folder, content in (("images", values), ("masks/nodule", mask)):
            path = root / folder / f"crop{index}.{ending}"
            if ending == "npy":
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, content)
            else:
                write_nifti(path, content.T)
    return root


@pytest.mark.parametrize("ending", ["npy", "nii", "nii.gz"])
def test_crops_are_volumes_with_one_order_of_axes(tmp_path, ending):
    samples, classes, channels = NODULE.read(write_crops(tmp_path, ending))
    assert [sample.name for sample in samples] == ["crop0", "crop1"] and classes == ["nodule"] and channels == 1
    image, mask = samples[0].load()
    assert image.shape == mask.shape == (1, 8, 9, 10) and mask[0, 2:5, 3:7, 4:8].all() and mask.sum() == 48
    expected = images.rescale(np.where(mask, np.float32(30), np.float32(-850)), LUNG_WINDOW)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize(
    ("ending", "damage", "says"),
    [
        (
            "npy",
            lambda root: np.save(root / "masks/nodule/crop1.npy", np.ones((8, 9, 9))),
            r"crop1\.npy is 8x9x9 but .*8x9x10",
        ),
        (
            "npy",
            lambda root: np.save(root / "images/crop1.npy", np.ones((8, 9, 10))),
            r"crop1\.npy holds values within -1..1",
        ),
        ("npy", lambda root: np.save(root / "images/crop1.npy", np.ones((8, 9))), r"crop1\.npy has 2 axes"),
        ("npy", lambda root: cut(root / "images/crop1.npy", 0.5), r"crop1\.npy cannot be read as a NumPy array"),
        (
            "npy",
            lambda root: np.save(root / "images/crop1.npy", np.array([{}]), allow_pickle=True),
            r"crop1\.npy cannot be read",
        ),
        (
            "npy",
            lambda root: (root / "masks/nodule/crop1.npy").unlink(),
            r"crop1\.npy has no mask .*masks/nodule/crop1\.npy",
        ),
        ("npy", lambda root: (root / "masks").rename(root / "m"), r"masks holds no folder of masks"),
        (
            "nii",
            lambda root: write_nifti(root / "masks/nodule/crop1.nii", np.ones((10, 9, 8)), np.eye(4)),
            r"masks/nodule/crop1\.nii .*differ in spacing",
        ),
        ("nii", lambda root: (root / "masks/nodule/crop1.nii").unlink(), r"crop1\.nii has no mask"),
    ],
    ids=["size", "scaled", "2d", "truncated", "pickled", "no_mask", "no_class", "spacing", "no_nifti"],
)
def test_damaged_crops_are_named(tmp_path, ending, damage, says):
    damage(write_crops(tmp_path, ending))
    with pytest.raises(InputError, match=says):
        NODULE.read(tmp_path)
