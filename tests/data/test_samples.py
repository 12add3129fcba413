"""Folders of images and masks, damaged ones, and the split into training and validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.folders import SIDE, write_nuclei
from support.medical_files import write_liver

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.pairs import find_samples
from unetpp_fast.data.samples import check_samples, split
from unetpp_fast.data.tasks import TASKS


def test_samples_are_sorted_and_classes_are_folders(tmp_path):
    samples, classes = find_samples(write_nuclei(tmp_path, count=3, classes=("b", "a")))
    assert [sample.name for sample in samples] == ["cell0", "cell1", "cell2"]
    assert classes == ["a", "b"]
    (tmp_path / "masks/.ipynb_checkpoints").mkdir()
    assert find_samples(tmp_path) == (samples, classes)
    image, mask = samples[0].load()
    assert image.shape == (1, SIDE, SIDE) and mask.shape == (2, SIDE, SIDE)
    assert abs(image.mean()) < 1e-5 and image.std() == pytest.approx(1, abs=1e-4)


def break_image(root: Path) -> None:
    (root / "images/cell1.png").write_bytes(b"no image")


def truncate_image(root: Path) -> None:
    path = root / "images/cell1.png"
    path.write_bytes(path.read_bytes()[:200])


def drop_mask(root: Path) -> None:
    (root / "masks/nuclei/cell1.png").unlink()


def shrink_mask(root: Path) -> None:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(root / "masks/nuclei/cell1.png")


def put_nan(root: Path) -> None:
    values = np.full((SIDE, SIDE), np.nan, np.float32)
    (root / "images/cell1.png").unlink()
    Image.fromarray(values).save(root / "images/cell1.tif")


def mix_colours(root: Path) -> None:
    Image.open(root / "images/cell1.png").convert("RGB").save(root / "images/cell1.png")


def double_image(root: Path) -> None:
    Image.open(root / "images/cell1.png").save(root / "images/cell1.tif")


def stack_images(root: Path) -> None:
    page = Image.open(root / "images/cell1.png")
    (root / "images/cell1.png").unlink()
    page.save(root / "images/cell1.tif", save_all=True, append_images=[page, page])


def drop_masks(root: Path) -> None:
    (root / "masks").rename(root / "labels")


def drop_images(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_image, r"images/cell1\.png cannot be read as an image"),
        (truncate_image, r"images/cell1\.png cannot be read as an image"),
        (drop_mask, r"cell1\.png has no mask .*masks/nuclei/cell1\.png"),
        (shrink_mask, r"masks/nuclei/cell1\.png is 4x5 but its image .* is 48x48"),
        (put_nan, r"images/cell1\.tif holds NaN"),
        (mix_colours, r"has 1 channel.* but .*cell1\.png has 3"),
        (double_image, r"cell1\.png and .*cell1\.tif have the same id"),
        (stack_images, r"images/cell1\.tif holds 3 pages"),
        (drop_masks, r"holds no folder of masks"),
        (drop_images, r"images holds no image"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_folders_are_named(tmp_path, damage, says):
    damage(write_nuclei(tmp_path, count=3))
    with pytest.raises(InputError, match=says):
        samples, _ = find_samples(tmp_path)
        check_samples(samples)


def test_the_split_is_seeded_and_does_not_depend_on_the_order(tmp_path):
    samples, _ = find_samples(write_nuclei(tmp_path, count=8))
    train, validation = split(samples, 0.25, seed=3)
    assert (train, validation) == split(samples[::-1], 0.25, seed=3)
    assert len(validation) == 2 and sorted(train + validation, key=lambda s: s.name) == samples
    assert any(split(samples, 0.25, seed=seed)[1] != validation for seed in range(4))


@pytest.mark.parametrize(
    ("count", "fraction", "says"), [(1, 0.5, "at least 2 images"), (4, 0.0, "between 0 and 1"), (4, 1.0, "between")]
)
def test_an_impossible_split_is_refused(tmp_path, count, fraction, says):
    samples, _ = find_samples(write_nuclei(tmp_path, count=count))
    with pytest.raises(InputError, match=says):
        split(samples, fraction, seed=0)


def test_one_patient_is_not_enough(tmp_path):
    with pytest.raises(InputError, match="at least 2 images"):
        split(TASKS["liver"].read(write_liver(tmp_path, count=1))[0], 0.5, 0)
