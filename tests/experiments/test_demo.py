"""A short demo from end to end: its table, its pictures, and that the seed decides everything but the times."""

from __future__ import annotations

import functools
import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from unetpp_fast.cli import parser
from unetpp_fast.common.errors import InputError
from unetpp_fast.experiments import demo, pictures
from unetpp_fast.training.evaluation import evaluate


def test_the_halves_do_not_overlap_and_form_the_whole():
    left, right = demo.halves()
    whole = np.asarray(Image.open(demo.example("nuclei/image.png")), np.float32)[None] / 255
    assert np.array_equal(np.concatenate([left.image, right.image], axis=-1), whole)
    assert left.mask.shape == right.mask.shape == (1, 512, 256)
    share = np.concatenate([left.mask, right.mask], axis=-1).mean()
    assert share == pytest.approx(0.199, abs=5e-4)  # the share of nuclei according to the data's README


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two short demos of small networks with one seed, each as (folder, rows)."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FEATURES", (4, 6, 8, 10, 12))
        patch.setattr(demo, "STEPS_PER_EPOCH", 4)
        patch.setattr(demo, "milliseconds", functools.partial(demo.milliseconds, rounds=1))
        for name in ("one", "two"):
            out = tmp_path_factory.mktemp(name)
            runs.append((out, demo.run(out, epochs=1, seed=3)))
    return runs


def test_the_real_demo_segments_the_other_half(monkeypatch, tmp_path):
    """Three of its ten epochs reach the accuracy that the README states for all ten. U-Net trains for a step per epoch."""
    trained = demo.trained

    def train(name, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            if name == "U-Net":
                patch.setattr(demo, "STEPS_PER_EPOCH", 1)
            return trained(name, *arguments, **options)

    monkeypatch.setattr(demo, "trained", train)
    monkeypatch.setattr(demo, "milliseconds", lambda models, *_: [1.0] * len(models))
    rows = {row["name"]: row for row in demo.run(tmp_path, epochs=3)}
    assert rows["UNet++ accurate"]["iou"] >= 0.80
    assert rows["UNet++ L4"]["parameters"] == 2_265_249


def test_the_table_has_each_model_and_level(rows, capsys):
    (_, one), _ = rows
    names = ["U-Net", "UNet++ accurate", "UNet++ L1", "UNet++ L2", "UNet++ L3", "UNet++ L4"]
    assert [row["name"] for row in one] == names
    lines = demo.table(one).split("\n")
    assert len(lines) == 7 and all(len(line) == len(lines[0]) for line in lines)
    levels = one[2:]
    for small, large in itertools.pairwise(levels):
        assert small["gflop"] < large["gflop"] and small["parameters"] < large["parameters"]
    assert all(0 <= row["iou"] <= row["dice"] <= 1 for row in one)


def test_one_seed_gives_one_result(rows):
    (_, one), (_, two) = rows
    for a, b in zip(one, two, strict=True):
        assert {**a, "ms": 0} == {**b, "ms": 0}


def test_pictures_are_not_blank(rows):
    (out, _), (again, _) = rows
    assert (out / "qualitative.png").read_bytes() == (again / "qualitative.png").read_bytes()
    for name in ("qualitative.png", "speed_accuracy.png"):
        picture = np.asarray(Image.open(out / name).convert("RGB"))
        assert picture.shape[0] > 300 and picture.shape[1] > 500
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_the_picture_shows_the_masks_of_the_table(monkeypatch, tmp_path):
    """In half precision too, the drawn masks are those that were scored."""
    monkeypatch.setattr(demo, "FEATURES", (4, 6, 8))
    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 2)
    monkeypatch.setattr(demo, "milliseconds", lambda models, *_: [1.0] * len(models))
    drawn = []
    monkeypatch.setattr(pictures, "qualitative", lambda path, image, truth, masks: drawn.append((truth, masks)))
    rows = demo.run(tmp_path, epochs=1, dtype="bfloat16")
    ((truth, masks),) = drawn
    for (mask, iou), row in zip(masks.values(), rows[:2], strict=True):
        assert iou == row["iou"] == pytest.approx((mask & truth).sum() / (mask | truth).sum(), rel=1e-6)


def test_without_matplotlib_it_stops_before_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(demo, "trained", lambda *_, **__: pytest.fail("it trained first"))
    with pytest.raises(InputError, match=r"matplotlib is missing: pip install 'unetpp_fast\[demo\]'"):
        demo.run(tmp_path, epochs=1)


def test_timed_runs_are_interleaved():
    calls = []

    class Recorder(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.weight, self.multiple = name, torch.nn.Parameter(torch.zeros(1)), 16

        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            calls.append(self.name)

    _, right = demo.halves()
    times = demo.milliseconds([Recorder("a"), Recorder("b")], right, rounds=2)
    assert calls == list("aabb") + list("ab") * 2 and len(times) == 2 and all(time >= 0 for time in times)


def test_evaluate_scores_the_accurate_mode():
    network = demo.UNetPlusPlus(1, 1, features=(4, 8), deep_supervision=True).eval()
    left, _ = demo.halves()
    probabilities = network.predict(torch.from_numpy(left.load()[0])[None])
    inter = ((probabilities.numpy()[0] > 0.5) & left.mask).sum()
    union = ((probabilities.numpy()[0] > 0.5) | left.mask).sum()
    assert evaluate(network, [left])["iou"] == pytest.approx(inter / union, rel=1e-6)


def test_the_command_runs_the_demo(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(demo, "run", lambda out, **options: given.update(options, out=out))
    assert parser.main(["demo", "--out", str(tmp_path), "--seed", "7", "--device", "cpu", "--reproducible"]) == 0
    expected = {"out": tmp_path, "seed": 7, "epochs": 10, "device": "cpu", "dtype": "float32", "reproducible": True}
    assert given == expected


def test_an_overlay_tints_only_the_mask():
    image = np.full((1, 9, 9), 0.5, np.float32)
    image[0, 0, 0], image[0, 8, 8] = 0, 1
    masks = np.zeros((2, 9, 9), bool)
    masks[0, 2:7, 2:7] = True
    picture = pictures.overlay(image, masks)
    grey = pictures.stretch(image)
    assert np.array_equal(picture[~masks[0]], grey[~masks[0]])
    assert (picture[2, 2] == pictures.COLOURS[0]).all() and (picture[4, 4] != grey[4, 4]).any()
    assert not (picture[4, 4] == pictures.COLOURS[0]).all()
