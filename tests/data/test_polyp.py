"""Colonoscopy frames as distributed, and damaged."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.medical_files import disc, truncate, write_frames, write_picture

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.tasks import TASKS

POLYP = TASKS["polyp"]


@pytest.mark.parametrize(
    ("ending", "names"),
    [("tif", ("Original", "Ground Truth")), ("png", ("images", "masks")), ("bmp", ("frames", "GT"))],
)
def test_frames_are_scaled_and_their_masks_with_them(tmp_path, ending, names):
    samples, classes, channels = POLYP.read(write_frames(tmp_path, ending=ending, names=names))
    assert [sample.name for sample in samples] == ["1", "2", "3"] and classes == ["polyp"] and channels == 3
    image, mask = samples[0].load()
    assert image.shape == (3, 224, 224) and mask.shape == (1, 224, 224) and mask.dtype == bool
    small = np.asarray(Image.open(tmp_path / names[1] / f"1.{ending}")) > 0
    assert mask.mean() == pytest.approx(small.mean(), rel=0.02)
    assert image[0][mask[0]].min() > image[0][~mask[0]].mean()


def test_frames_of_one_video_are_one_group(tmp_path):
    for video in ("video1", "video2"):
        write_frames(tmp_path / video, count=2, names=("frames", "GT"))
    samples, _, _ = POLYP.read(tmp_path)
    assert [(sample.name, sample.group) for sample in samples] == [
        ("video1/1", "video1"), ("video1/2", "video1"), ("video2/1", "video2"), ("video2/2", "video2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / "Ground Truth/2.tif").unlink(), r"Original/2\.tif has no mask in .*Ground Truth"),
        (lambda root: truncate(root / "Original/2.tif"), r"Original/2\.tif cannot be read as TIFF"),
        (lambda root: write_picture(root / "Ground Truth/2.tif", disc(9, 9, (4, 4), 3)), r"2\.tif is 9x9 but .* 36x52"),
        (lambda root: write_picture(root / "Original/2.tif", np.ones((36, 52), np.uint8)), r"Original/2\.tif is grey"),
    ],
    ids=["no_mask", "truncated", "size", "grey"],
)
def test_damaged_frames_are_named(tmp_path, damage, says):
    damage(write_frames(tmp_path))
    with pytest.raises(InputError, match=says):
        POLYP.read(tmp_path)
