"""Images and masks of every kind that Pillow reads."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from unetpp_fast.data.images import read_image
from unetpp_fast.data.masks import read_mask


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
