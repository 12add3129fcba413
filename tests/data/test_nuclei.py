"""The 2018 Data Science Bowl as distributed, and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.folders import write_nuclei
from support.medical_files import truncate, write_picture, write_stage1

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.tasks import TASKS

NUCLEI = TASKS["nuclei"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_mask_is_the_union_of_the_nuclei(tmp_path, inside):
    write_stage1(tmp_path)
    samples, classes, channels = NUCLEI.read(tmp_path / "stage1_train" if inside else tmp_path)
    assert [sample.name for sample in samples] == ["cell0", "cell1", "cell2"]
    assert classes == ["nuclei"] and channels == 3  # four-channel files: alpha is dropped
    image, mask = samples[1].load()
    files = sorted((tmp_path / "stage1_train/cell1/masks").iterdir())
    expected = np.any([np.asarray(Image.open(path)) > 0 for path in files], axis=0)
    assert len(files) == 3 and np.array_equal(mask, expected[None])
    assert image.shape == (3, 48, 48) and image[0][mask[0]].mean() > 1 > image[0][~mask[0]].mean()


def test_nuclei_are_read_from_folders_of_images_and_masks_too(tmp_path):
    samples, classes, channels = NUCLEI.read(write_nuclei(tmp_path, count=2))
    assert len(samples) == 2 and classes == ["nuclei"] and channels == 1


def test_a_16_bit_image_keeps_its_depth_and_a_float_mask_of_two_values_is_read(tmp_path):
    write_stage1(tmp_path, count=2)
    for name in ("cell0", "cell1"):
        folder = tmp_path / "stage1_train" / name
        ramp = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
        write_picture(folder / "images" / f"{name}.png", ramp)
        for path in (folder / "masks").iterdir():
            path.unlink()
        write_picture(folder / "masks" / "0.tif", np.linspace(0, 1, 48 * 48, dtype=np.float32).round().reshape(48, 48))
    samples, _, channels = NUCLEI.read(tmp_path)
    image, mask = samples[0].load()
    assert channels == 1 and len(np.unique(image)) == 48 * 48
    assert mask.mean() == pytest.approx(0.5, abs=1e-3)


def empty_masks(root: Path, names: list[str]) -> None:
    for name in names:
        for path in (root / "stage1_train" / name / "masks").iterdir():
            write_picture(path, np.zeros((48, 48), np.uint8))


def test_an_image_may_be_all_background_but_not_all_images(tmp_path):
    write_stage1(tmp_path)
    empty_masks(tmp_path, ["cell0"])
    samples, _, _ = NUCLEI.read(tmp_path)
    assert not samples[0].load()[1].any() and samples[1].load()[1].any()
    empty_masks(tmp_path, ["cell1", "cell2"])
    with pytest.raises(InputError, match=r"all 3 masks are empty, that of .*cell0\.png first"):
        NUCLEI.read(tmp_path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda cell: truncate(cell / "images/cell1.png"), r"images/cell1\.png cannot be read as an image"),
        (lambda cell: truncate(cell / "masks/0.png"), r"cell1/masks/0\.png cannot be read as an image"),
        (lambda cell: write_picture(cell / "masks/9.tif", np.full((48, 48), np.nan, np.float32)), r"9\.tif holds NaN"),
        (
            lambda cell: write_picture(cell / "masks/2.png", np.zeros((9, 7), np.uint8)),
            r"2\.png is 9x7 but its image .*48x48",
        ),
        (lambda cell: write_picture(cell / "images/b.png", np.zeros((9, 7), np.uint8)), r"cell1/images holds 2 images"),
        (lambda cell: (cell / "masks").rename(cell / "rest"), r"cell1 has no folder masks/: is it from the test set"),
        (lambda cell: [path.unlink() for path in (cell / "masks").iterdir()], r"cell1/masks holds no image"),
        (lambda cell: write_picture(cell / "images/cell1.png", np.ones((48, 48), np.uint8)), r"has 3 channel.* has 1"),
    ],
    ids=["image", "mask", "nan", "size", "two", "test_set", "no_nuclei", "grey"],
)
def test_damaged_nuclei_are_named(tmp_path, damage, says):
    damage(write_stage1(tmp_path) / "stage1_train" / "cell1")
    with pytest.raises(InputError, match=says):
        NUCLEI.read(tmp_path)
