"""Masks of one class and label maps: read by stated rules, or refused with what they hold."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.masks import read_label_map, read_labels, read_mask

EYE = np.eye(16, dtype=bool)


def put(path, values: np.ndarray, mode: str | None = None, colours: tuple[int, ...] = ()):
    picture = Image.fromarray(values)
    if colours:
        picture = Image.new("P", values.shape[::-1])
        picture.putdata(values.ravel().tolist())
        picture.putpalette(colours)
    (picture.convert(mode) if mode else picture).save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))
    return path


def rgba(colour_in: int, colour_out: int, alpha: np.ndarray) -> np.ndarray:
    colours = np.where(EYE, colour_in, colour_out).astype(np.uint8)
    return np.dstack([colours] * 3 + [alpha.astype(np.uint8)])


BLOCK = np.repeat(np.repeat(EYE, 8, axis=0), 8, axis=1)
READ = {
    "0-1.png": (EYE.astype(np.uint8), EYE),
    "0-200.png": (EYE * np.uint8(200), EYE),
    "0-255.tif": (EYE * np.uint8(255), EYE),
    "0-1 of 16 bits.png": (EYE.astype(np.uint16), EYE),
    "bool.png": (EYE, EYE),
    "empty.png": (EYE * np.uint8(0), EYE & False),
    "full.png": (EYE * np.uint8(0) + 1, EYE | True),
    "red on black.png": (np.dstack([EYE * np.uint8(200), EYE * np.uint8(0), EYE * np.uint8(0)]), EYE),
    "alpha only.png": (rgba(0, 0, EYE * 255), EYE),
    "alpha and colour.png": (rgba(255, 0, EYE * 255), EYE),
    "opaque.png": (rgba(255, 0, EYE * 0 + 255), EYE),
    "grey alpha.png": (np.dstack([EYE * np.uint8(0), EYE * np.uint8(255)]), EYE),
    "lossy.jpg": (BLOCK * np.uint8(255), BLOCK),
}


@pytest.mark.parametrize("name", READ)
def test_masks_that_the_rules_cover(name, tmp_path):
    values, expected = READ[name]
    assert np.array_equal(read_mask(put(tmp_path / name, values)), expected)


LABELS = (np.arange(256) % 4).reshape(16, 16).astype(np.uint8)
SOFT = np.linspace(0, 255, 256).reshape(16, 16).astype(np.uint8)
REFUSED = {
    "three values.png": (np.where(EYE, 255, LABELS % 2).astype(np.uint8), "holds the values 0, 1, 255: a mask of one class"),
    "labels.png": (LABELS, "holds the values 0, 1, 2, 3: .*label map, masks/<id>.png"),
    "a stray.png": (EYE * np.uint8(2), "holds the values 0, 2"),
    "soft.png": (SOFT, r"holds the values 0, 1, 2, 3, 4, 5, \.\.\."),
    "colours.png": (np.dstack([LABELS, LABELS * 2, LABELS * 0]), r"holds the colours \(0, 0, 0\), \(1, 2, 0\)"),
    "contrary.png": (rgba(0, 255, EYE * 255), "colours and its transparency differ"),
    "soft alpha.png": (rgba(0, 0, SOFT), "holds the transparency values"),
    "dark.jpg": (BLOCK * np.uint8(3), "is a JPEG of grey values up to"),
    "photo.jpg": (SOFT, "is a JPEG of grey values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_the_rules_do_not_cover(name, tmp_path):
    values, says = REFUSED[name]
    with pytest.raises(InputError, match=says):
        read_mask(put(tmp_path / name, values))


VOC = (0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0)


def test_palettes_are_colours_of_masks_and_numbers_of_label_maps(tmp_path):
    path = put(tmp_path / "voc.png", LABELS, colours=VOC)
    with pytest.raises(InputError, match="holds the colours"):
        read_mask(path)
    labels, palette = read_label_map(path)
    assert np.array_equal(labels, LABELS) and palette[:4].ravel().tolist() == list(VOC)
    for colours in (VOC, (255, 255, 255, 0, 0, 0)):
        expected = EYE if colours == VOC else ~EYE
        assert np.array_equal(read_mask(put(tmp_path / "two.png", EYE.astype(np.uint8), colours=colours)), expected)


def test_label_maps(tmp_path):
    assert np.array_equal(read_labels(put(tmp_path / "l.png", LABELS)), LABELS)
    assert np.array_equal(read_labels(put(tmp_path / "rgb.png", np.dstack([LABELS] * 3))), LABELS)
    assert read_labels(put(tmp_path / "d.png", LABELS.astype(np.uint16) * 300)).max() == 900
    for name, values, says in (
        ("l.jpg", LABELS, "is a JPEG, which changes values"),
        ("c.png", np.dstack([LABELS, LABELS * 2, LABELS]), "holds colours: save it with a palette"),
        ("f.tif", LABELS / np.float32(2), "holds 0.5: labels are 0, 1, 2"),
        ("n.tif", LABELS.astype(np.float32) - 1, "holds -1: labels are 0, 1, 2"),
    ):
        with pytest.raises(InputError, match=says):
            read_labels(put(tmp_path / name, values))
