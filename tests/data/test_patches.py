"""Patches: what they depend on, flips, padding and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.resident import peak_of

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.patches import BatchLoader, Patches
from unetpp_fast.data.samples import ArraySample


def make_sample(height: int, width: int) -> ArraySample:
    """An image in which every pixel has another value, and the mask of those above the mean."""
    image = np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    return ArraySample("ramp", image, image > image.mean())


def test_patches_depend_only_on_seed_epoch_and_draw():
    sample = make_sample(20, 30)
    one, same, other = (Patches([sample], 8, 4, seed) for seed in (5, 5, 6))
    same[0, 1], same[2, 3]  # earlier draws have no effect
    assert torch.equal(one[1, 2][0], same[1, 2][0])
    assert not torch.equal(one[1, 2][0], other[1, 2][0])
    assert not torch.equal(one[1, 2][0], one[2, 2][0])
    assert not torch.equal(one[1, 2][0], one[1, 3][0])


def test_image_and_mask_are_flipped_and_rotated_together():
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


def test_cubes_are_drawn_from_volumes_with_all_flips():
    volume = np.arange(12 * 10 * 11, dtype=np.float32).reshape(1, 12, 10, 11)
    patches = Patches([ArraySample("ramp", volume, volume > volume.mean())], 8, 96, seed=0)
    signs = set()
    for draw in range(96):
        image, mask = patches[0, draw]
        assert image.shape == mask.shape == (1, 8, 8, 8) and torch.equal(mask, (image > 0).float())
        steps = [
            image[0, 1, 0, 0] - image[0, 0, 0, 0],
            image[0, 0, 1, 0] - image[0, 0, 0, 0],
            image[0, 0, 0, 1] - image[0, 0, 0, 0],
        ]
        signs.add((*(np.sign(step.item()) for step in steps), bool(abs(steps[1]) > abs(steps[2]))))
    assert len(signs) == 16  # two along the depth, times eight flips and rotations of each plane


def test_volumes_smaller_than_the_cube_are_padded():
    volume = np.random.default_rng(0).normal(size=(1, 5, 20, 3)).astype(np.float32)
    image, _ = Patches([ArraySample("small", volume, volume > 0)], 8, 1, seed=0, augment=False)[0, 0]
    assert image.shape == (1, 8, 8, 8) and torch.equal(image[:, 0], image[:, 1])


def test_batches_hold_every_draw_once_and_can_start_late():
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
    loaded = list(BatchLoader(patches, workers, pin=False).load(batches))
    assert torch.equal(torch.get_rng_state(), before)
    for (image, mask), batch in zip(loaded, batches, strict=True):
        assert torch.equal(image, torch.stack([patches[item][0] for item in batch]))
        assert torch.equal(mask, torch.stack([patches[item][1] for item in batch]))


class CountedSample(ArraySample):
    """Notes in a file that it was read, by whichever process."""

    def load(self):
        with open(self.name, "a") as stream:
            stream.write("read\n")
        return super().load()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_read_once_over_all_epochs(workers, tmp_path):
    ramp = make_sample(20, 30)
    names = [str(tmp_path / name) for name in "ab"]
    patches = Patches([CountedSample(name, ramp.image, ramp.mask) for name in names], 8, 2, seed=0)
    loader = BatchLoader(patches, workers, pin=False)
    for epoch in range(3):
        batches = patches.batches(epoch, 2)
        for (image, _), batch in zip(loader.load(batches), batches, strict=True):
            assert torch.equal(image, torch.stack([Patches([ramp, ramp], 8, 2, seed=0)[item][0] for item in batch]))
    assert [Path(name).read_text() for name in names] == ["read\n"] * 2
    unfinished = loader.load(patches.batches(3, 2))
    next(unfinished)
    unfinished.close()  # an interrupted epoch leaves nothing to the next
    batches = patches.batches(4, 2)
    assert torch.equal(next(iter(loader.load(batches)))[0], torch.stack([patches[item][0] for item in batches[0]]))
    loader.close()


def test_sides_of_a_patch_may_differ_and_then_it_is_turned_by_180_degrees_alone():
    volume = np.arange(12 * 10 * 20, dtype=np.float32).reshape(1, 12, 10, 20)
    sample = ArraySample("ramp", volume, volume > volume.mean())
    patches = Patches([sample], (4, 8, 16), 64, seed=0, foreground=0.5)
    signs = set()
    for draw in range(64):
        image, mask = patches[0, draw]
        assert image.shape == mask.shape == (1, 4, 8, 16) and torch.equal(mask, (image > 0).float())
        steps = [image[0, 1, 0, 0] - image[0, 0, 0, 0], image[0, 0, 1, 0] - image[0, 0, 0, 0]]
        across = image[0, 0, 0, 1] - image[0, 0, 0, 0]
        signs.add((*(np.sign(step.item()) for step in (*steps, across)), bool(abs(steps[1]) > abs(across))))
    assert len(signs) == 8 and all(along for *_, along in signs)  # rows stay rows
    turned = {bool(abs(image[0, 0, 1, 0] - image[0, 0, 0, 0]) > abs(image[0, 0, 0, 1] - image[0, 0, 0, 0]))
              for image, _ in (Patches([sample], (4, 8, 8), 16, seed=0)[0, draw] for draw in range(16))}  # fmt: skip
    assert turned == {True, False}  # as before where the last two sides are equal
    same, cube = (Patches([sample], patch, 8, seed=3)[1, 5][0] for patch in ((8, 8, 8), 8))
    assert torch.equal(same, cube)


def test_a_patch_of_unlike_sides_pads_where_the_volume_is_smaller():
    volume = np.random.default_rng(0).normal(size=(1, 3, 20, 5)).astype(np.float32)
    patches = Patches([ArraySample("thin", volume, volume > 0)], (4, 16, 8), 4, seed=0, augment=False)
    assert patches[0, 1][0].shape == (1, 4, 16, 8) and torch.equal(patches[0, 1][0][:, 3], patches[0, 1][0][:, 2])


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 0), (8,), 0])
def test_a_patch_that_does_not_fit_the_axes_is_one_error(patch):
    with pytest.raises(InputError, match="a patch has one side, or one for each of the 2 axes"):
        Patches([make_sample(20, 30)], patch, 1, seed=0)[0, 0]


def test_ten_thousand_images_train_within_the_cache():
    """10,000 images of 1 MB, with masks and places of foreground: the memory that it takes is the cache and little more."""
    program = """
import numpy as np
from unetpp_fast.data.patches import Patches

class Made:
    name = "made"
    def load(self):
        image = np.full((1, 512, 512), 1.5, np.float32)
        mask = np.zeros((1, 512, 512), bool)
        mask[0, 100:140, 100:140] = True
        return image, mask

patches = Patches([Made()] * 10_000, 32, 1, seed=0, foreground=0.5, cache=40 * 2**20)
patches[0, 0]
before = begin()
for batch in patches.batches(0, 8):
    for item in batch:
        patches[item]
assert len(patches._cache) == 31 and patches._kept <= patches.cache
"""
    assert peak_of(program) < 52 * 2**20


@pytest.mark.parametrize("cache", [0, 5000, 2**31])
def test_a_cache_changes_no_patch_and_workers_share_it(cache, tmp_path):
    ramp = make_sample(20, 30)  # 2400 bytes and a mask of 600
    names = [str(tmp_path / name) for name in "abc"]
    samples = [CountedSample(name, ramp.image, ramp.mask) for name in names]
    patches = Patches(samples, 8, 4, seed=0, foreground=0.5, cache=cache)
    loader = BatchLoader(patches, 2, pin=False)
    for epoch in range(2):
        batches = patches.batches(epoch, 2)
        for (image, _), batch in zip(loader.load(batches), batches, strict=True):
            plain = Patches([ramp] * 3, 8, 4, seed=0, foreground=0.5)
            assert torch.equal(image, torch.stack([plain[item][0] for item in batch]))
    loader.close()
    reads = sum(Path(name).read_text().count("read") for name in names)
    assert reads == 24 if cache < 6000 else reads <= 6  # 2500 bytes for each worker hold no sample
    with pytest.raises(InputError, match="at least 0 bytes, not -1"):
        Patches(samples, 8, 4, seed=0, cache=-1)
