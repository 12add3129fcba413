"""Cleaning masks, on ones drawn by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError

pytest.importorskip("scipy", reason="cleans by scipy")
DRAWN = """
111...2
1.1..2.
111....
...1...
22222..
2...2.3
2.1.2.3
22222..
"""  # a ring with a hole and a corner that touches it; a diagonal pair; a ring around a pixel of another class; a pair


def drawn(text: str) -> np.ndarray:
    return np.array([[int(value) for value in line.replace(".", "0")] for line in text.split()], np.uint8)


def test_each_class_of_a_label_map():
    labels = drawn(DRAWN)
    before = labels.copy()
    large = uf.postprocess(labels, min_size=3)
    gone = np.zeros(labels.shape, bool)
    gone[:2, 5:] = gone[4:, 6] = gone[6, 2] = True
    assert np.array_equal(large, np.where(gone, 0, labels))
    assert np.array_equal(uf.postprocess(labels, keep_largest=1), np.where(labels == 3, 3, large))
    filled = uf.postprocess(labels, fill_holes=True)
    assert filled[1, 1] == 1 and filled[6, 2] == 1 and (filled[5:7, 1:4] == 2).sum() == 5
    assert np.array_equal(filled[:5], np.where(np.arange(35).reshape(5, 7) == 8, 1, labels[:5]))
    both = uf.postprocess(labels, keep_largest=1, fill_holes=True)
    assert (both[5:7, 1:4] == 2).all()  # the pixel inside went first, and what it leaves is a hole
    assert np.array_equal(labels, before) and both.dtype == np.uint8
    assert np.array_equal(uf.postprocess(labels), labels) and np.array_equal(uf.postprocess(labels, min_size=1), labels)


def test_masks_and_volumes_and_ties():
    mask = drawn(DRAWN) == 1
    assert uf.postprocess(mask, min_size=9).sum() == 9 and uf.postprocess(mask, min_size=10).sum() == 0
    assert uf.postprocess(mask, keep_largest=2).sum() == 10 and uf.postprocess(mask, keep_largest=99).sum() == 10
    assert uf.postprocess(mask, keep_largest=1, fill_holes=True)[:3, :3].all()
    two = np.zeros((3, 5, 5), bool)
    two[0, 0, :2] = two[2, 4, 3:] = True
    kept = uf.postprocess(two, keep_largest=1)
    assert kept[0, 0, :2].all() and kept.sum() == 2
    box = np.ones((3, 3, 3), bool)
    box[1, 1, 1] = False
    assert uf.postprocess(box, fill_holes=True).all()
    assert not uf.postprocess(np.zeros((4, 4), bool), keep_largest=1, min_size=2, fill_holes=True).any()
    assert uf.postprocess(np.zeros((0, 4), np.uint8), keep_largest=1, fill_holes=True).shape == (0, 4)


def test_what_does_not_fit(monkeypatch):
    mask = np.ones((2, 2), bool)
    for options, says in (({"keep_largest": 0}, "at least 1"), ({"min_size": -1}, "at least 0")):
        with pytest.raises(InputError, match=says):
            uf.postprocess(mask, **options)
    with pytest.raises(InputError, match="got float32: threshold it first"):
        uf.postprocess(np.ones((2, 2), np.float32))
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(InputError, match=r"pip install 'unetpp_fast\[postprocess\]'"):
        uf.postprocess(mask, fill_holes=True)
