"""Folders, images, masks, splits and patches, and what is said when they are not as they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.folders import SIDE, write_nuclei

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.images import read_image, read_mask
from unetpp_fast.data.patches import Patches, load_batches
from unetpp_fast.data.samples import ArraySample, check_samples, find_samples, split


@pytest.mark.parametrize(
    ("values", "channels", "largest"),
    [
        (np.array([[0, 255]], np.uint8), 1, 1.0),
        (np.array([[0, 65535]], np.uint16), 1, 1.0),
        (np.array([[False, True]]), 1, 1.0),
        (np.full((1, 2, 3), 51, np.uint8), 3, 0.2),
        (np.full((1, 2, 4), 51, np.uint8), 3, 0.2),
    ],
    ids=["8-bit", "16-bit", "1-bit", "colour", "alpha"],
)
def test_images_of_every_depth_are_scaled_to_one(tmp_path, values, channels, largest):
    Image.fromarray(values).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert image.shape == (channels, 1, 2) and image.dtype == np.float32
    assert image.max() == pytest.approx(largest)


@pytest.mark.parametrize("foreground", [1, 200, 255])
def test_masks_may_be_zero_one_or_zero_255(tmp_path, foreground):
    expected = np.eye(4, dtype=bool)
    Image.fromarray(expected.astype(np.uint8) * foreground).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), expected)


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "CMYK"])
def test_masks_of_every_kind_are_read_by_their_colours(tmp_path, mode):
    expected = np.eye(4, dtype=bool)
    Image.fromarray(expected.astype(np.uint8) * 255).convert(mode).save(tmp_path / "mask.tif")
    assert np.array_equal(read_mask(tmp_path / "mask.tif"), expected)


@pytest.mark.parametrize("colours", [(0, 0, 0, 128, 0, 0), (255, 255, 255, 0, 0, 0)], ids=["black_first", "white_first"])
def test_a_palette_may_have_any_order(tmp_path, colours):
    expected = np.eye(4, dtype=bool)
    picture = Image.new("P", (4, 4))
    picture.putdata((expected if colours[0] == 0 else ~expected).astype(np.uint8).ravel().tolist())
    picture.putpalette(colours)
    picture.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "P"
    assert np.array_equal(read_mask(tmp_path / "mask.png"), expected)


def test_an_empty_mask_has_no_foreground(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "mask.png")
    assert not read_mask(tmp_path / "mask.png").any()


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
        (double_image, r"cell1\.png and .*cell1\.tif have one id"),
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


def test_split_is_seeded_and_independent_of_the_order(tmp_path):
    samples, _ = find_samples(write_nuclei(tmp_path, count=8))
    train, validation = split(samples, 0.25, seed=3)
    assert (train, validation) == split(samples[::-1], 0.25, seed=3)
    assert len(validation) == 2 and sorted(train + validation, key=lambda s: s.name) == samples
    assert any(split(samples, 0.25, seed=seed)[1] != validation for seed in range(4))


@pytest.mark.parametrize(
    ("count", "fraction", "says"), [(1, 0.5, "at least 2 images"), (4, 0.0, "between 0 and 1"), (4, 1.0, "between")]
)
def test_a_split_that_cannot_be_is_refused(tmp_path, count, fraction, says):
    samples, _ = find_samples(write_nuclei(tmp_path, count=count))
    with pytest.raises(InputError, match=says):
        split(samples, fraction, seed=0)


def make_sample(height: int, width: int) -> ArraySample:
    """An image that names its own pixels, and the mask of those above the middle value."""
    image = np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    return ArraySample("ramp", image, image > image.mean())


def test_patches_depend_on_seed_epoch_and_draw_alone():
    sample = make_sample(20, 30)
    one, same, other = (Patches([sample], 8, 4, seed) for seed in (5, 5, 6))
    same[0, 1], same[2, 3]  # earlier draws leave no trace
    assert torch.equal(one[1, 2][0], same[1, 2][0])
    assert not torch.equal(one[1, 2][0], other[1, 2][0])
    assert not torch.equal(one[1, 2][0], one[2, 2][0])
    assert not torch.equal(one[1, 2][0], one[1, 3][0])


def test_image_and_mask_stay_together_through_flips_and_turns():
    patches = Patches([make_sample(20, 30)], 8, 64, seed=0)
    orientations = set()
    for draw in range(64):
        image, mask = patches[0, draw]
        assert torch.equal(mask, (image > 0).float())  # standardised: the mean is 0
        down, right = (image[0, 1, 0] - image[0, 0, 0]).item(), (image[0, 0, 1] - image[0, 0, 0]).item()
        orientations.add((np.sign(down), np.sign(right), abs(down) > abs(right)))
    assert len(orientations) == 8


def test_small_images_are_padded_to_the_patch():
    image, mask = Patches([make_sample(5, 40)], 16, 1, seed=0, augment=False)[0, 0]
    assert image.shape == mask.shape == (1, 16, 16)
    assert torch.equal(image[0, 0], image[0, 5]) and not torch.equal(image[0, 5], image[0, 6])


def test_batches_cover_every_draw_once_and_can_start_late():
    patches = Patches([make_sample(8, 8)] * 3, 8, per_image=3, seed=1)
    batches = patches.batches(epoch=4, batch_size=4)
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert sorted(draw for batch in batches for _, draw in batch) == list(range(9))
    assert patches.batches(4, 4, start=1) == batches[1:]
    assert patches.batches(5, 4) != batches


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_batches_or_the_random_state(workers):
    patches = Patches([make_sample(20, 30)], 8, 6, seed=0)
    batches = patches.batches(0, 4)
    before = torch.get_rng_state()
    loaded = list(load_batches(patches, batches, workers, pin=False))
    assert torch.equal(torch.get_rng_state(), before)
    for (image, mask), batch in zip(loaded, batches, strict=True):
        assert torch.equal(image, torch.stack([patches[item][0] for item in batch]))
        assert torch.equal(mask, torch.stack([patches[item][1] for item in batch]))
