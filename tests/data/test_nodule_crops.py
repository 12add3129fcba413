"""Crops of CT scans as NIfTI and NumPy volumes, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.medical_files import cut, write_nifti

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.images import rescale
from unetpp_fast.data.readers.nodule_crops import LUNG_WINDOW
from unetpp_fast.data.tasks import TASKS

NODULE = TASKS["nodule"]


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
    expected = rescale(np.where(mask, np.float32(30), np.float32(-850)), LUNG_WINDOW)
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
        ("npy", lambda root: cut(root / "images/crop1.npy", 0.5), r"crop1\.npy cannot be read as an array"),
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
