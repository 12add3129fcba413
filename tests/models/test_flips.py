"""Prediction over mirror images, in Python and by the command, with the cleaning of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.command_line import fails, run
from support.encoders import encoded
from support.folders import write_nuclei
from support.helpers import FLOAT32, assert_close_relative, build, make_input

import unetpp_fast as uf
from unetpp_fast.data.images import read_normalised
from unetpp_fast.data.masks import read_mask
from unetpp_fast.models import tiled_prediction
from unetpp_fast.training.checkpoint import load_model


@pytest.mark.parametrize("axes", [2, 3])
def test_the_mean_over_all_mirror_images(axes):
    model = build(uf.UNetPlusPlus, 1, 2, spatial_dims=axes, features=(3, 4), deep_supervision=True).eval()
    x = make_input(2, 1, *(9, 6, 5)[:axes])
    options = {"mode": "fast", "activation": "softmax"}
    images = [(x, ())]
    for axis in range(2, axes + 2):
        images += [(image.flip(axis), (*turned, axis)) for image, turned in images]
    assert len(images) == 2**axes
    wanted = sum(model.predict(image, **options).flip(turned) for image, turned in images) / len(images)
    found = model.predict(x, flips=True, **options)
    assert_close_relative(found, wanted, FLOAT32)
    assert (found - model.predict(x, **options)).abs().max() > 1e-4
    assert_close_relative(model.predict(x.flip(-1), flips=True, **options).flip(-1), found, FLOAT32)
    assert_close_relative(uf.predict_tiled(model, x, flips=True, **options), found, FLOAT32)
    fast = uf.optimize(model, mode="fast")
    assert_close_relative(fast.predict(x, "softmax", flips=True), found, FLOAT32)
    sizes = [(64,) * axes] * 2
    assert tiled_prediction.memory(model, *sizes, {"flips": True}) > tiled_prediction.memory(model, *sizes)


def test_networks_over_an_encoder_and_whole_numbers():
    model = encoded(deep_supervision=True).eval()
    model.normalisation = uf.Normalisation()
    x = torch.randint(0, 255, (1, 3, 20, 24), dtype=torch.uint8)
    found = model.predict(x, flips=True)
    assert_close_relative(found, model.predict(x.flip(3), flips=True).flip(3), FLOAT32)
    assert_close_relative(uf.optimize(model).predict(x, flips=True), found, 10 * FLOAT32)


def test_the_command_flips_and_cleans(tmp_path, capsys):
    pytest.importorskip("scipy", reason="cleans by scipy")
    data = write_nuclei(tmp_path / "data")
    options = ("--features", "4,8", "--patch", "16", "--epochs", "1", "--device", "cpu")
    assert run("train", "--data", data, "--out", tmp_path / "run", *options) == 0
    model, _ = load_model(tmp_path / "run/best.pt")
    picture, one = data / "images/cell1.png", ("predict", "--checkpoint", tmp_path / "run/best.pt", "--device", "cpu")
    cleaning = ("--min-size", "4", "--keep-largest", "2", "--fill-holes")
    assert run(*one, "--images", picture, "--out", tmp_path / "out", "--flips", "--tile", "32", *cleaning) == 0
    x = torch.from_numpy(read_normalised(picture))[None]
    plain = uf.predict_tiled(model, x, tile=32, flips=True)[0, 0].numpy() > 0.5
    wanted = uf.postprocess(plain, min_size=4, keep_largest=2, fill_holes=True)
    assert np.array_equal(read_mask(tmp_path / "out/masks/nuclei/cell1.png"), wanted) and not np.array_equal(wanted, plain)
    assert "keep_largest must be at least 1" in fails(
        capsys, *one, "--images", picture, "--out", tmp_path, "--keep-largest", "0"
    )
