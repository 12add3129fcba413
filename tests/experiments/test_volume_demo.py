"""The demo in 3D, short and with a small network: its held-out planes, its table and its picture."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from support.fused_cases import run_fused
from support.helpers import FLOAT64, assert_close_relative, build

import unetpp_fast as uf
from unetpp_fast.cli import parser
from unetpp_fast.data.patches import Patches
from unetpp_fast.execution import reference
from unetpp_fast.experiments import demo, volume_demo


def test_the_parts_do_not_overlap_and_form_the_stack():
    lower, upper = volume_demo.parts()
    with np.load(demo.example("nuclei/volume.npz")) as stack:
        assert np.array_equal(np.concatenate([lower.image, upper.image], axis=1)[0], stack["image"])
        assert np.array_equal(np.concatenate([lower.mask, upper.mask], axis=1)[0], stack["instances"] > 0)
    assert lower.mask.shape == (1, 20, 61, 57) and upper.mask.shape == (1, 11, 61, 57)


def test_it_segments_planes_it_has_not_seen_and_draws_them(monkeypatch, tmp_path):
    """A smaller network and two short epochs reach the accuracy stated for the demo."""
    monkeypatch.setattr(volume_demo, "FEATURES", (8, 12))
    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 12)
    monkeypatch.setattr(demo, "milliseconds", functools.partial(demo.milliseconds, rounds=1))
    rows = volume_demo.run(tmp_path, epochs=2)
    assert [row["name"] for row in rows] == ["U-Net", "UNet++ accurate", "UNet++ L1"]
    assert rows[1]["iou"] >= 0.6
    picture = np.asarray(Image.open(tmp_path / "planes.png").convert("RGB"))
    assert picture.shape[0] > 600 and picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert (tmp_path / "speed_accuracy.png").stat().st_size > 0


def test_the_picture_shows_the_planes_of_the_masks_that_were_scored(monkeypatch, tmp_path):
    monkeypatch.setattr(volume_demo, "FEATURES", (3, 4))
    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 1)
    monkeypatch.setattr(demo, "milliseconds", lambda models, *_: [1.0] * len(models))
    drawn = []
    monkeypatch.setattr(volume_demo.pictures, "planes", lambda *arguments: drawn.append(arguments))
    rows = volume_demo.run(tmp_path, epochs=1, seed=5)
    ((_, _, truth, masks, shown),) = drawn
    for (mask, iou), row in zip(masks.values(), rows[:2], strict=True):
        assert iou == row["iou"] == pytest.approx((mask & truth).sum() / (mask | truth).sum(), rel=1e-6)
    assert all(0 <= plane < len(truth) for plane in shown)
    again = volume_demo.run(tmp_path, epochs=1, seed=5)
    assert [row["iou"] for row in again] == [row["iou"] for row in rows]


def test_the_command_runs_it(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(volume_demo, "run", lambda out, **options: given.update(options, out=out))
    assert parser.main(["demo", "--task", "volume", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert given == {"out": tmp_path, "seed": 0, "epochs": 10, "device": "cpu", "dtype": "float32", "reproducible": False}


@pytest.mark.parametrize("norm", ["batch", "instance", None])
def test_a_cube_trains_a_step_through_the_engine_as_through_the_reference(norm):
    lower, _ = volume_demo.parts()
    image, mask = (values[None].double() for values in Patches([lower], 8, 1, seed=0)[0, 0])
    options = {"spatial_dims": 3, "features": (2, 3, 4), "norm": norm, "deep_supervision": True}
    one = build(uf.UNetPlusPlus, 1, 1, **options).double().train()
    other = copy.deepcopy(one)
    losses = []
    for network, forward in ((one, reference.forward), (other, run_fused("naive"))):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        loss = uf.BCEDiceLoss()(forward(network, image), mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert_close_relative(losses[1], losses[0], FLOAT64)
    assert_close_relative(list(other.parameters()), list(one.parameters()), FLOAT64, floor=1.0)
    before = build(uf.UNetPlusPlus, 1, 1, **options).double()
    pairs = zip(one.parameters(), before.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)  # the bias before a norm has no gradient
