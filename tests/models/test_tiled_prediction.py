"""Tiled prediction: equal to one pass where it can be, in any case a proper mean, and within its memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support.encoders import encoded
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from support.resident import peak_of
from torch import nn

import unetpp_fast as uf
from unetpp_fast.models import tiled_prediction

RADIUS = 10  # what a pixel of a two-level network depends on is nearer: 2 + 2 * 2 + 2 convolutions, pooling and phases
PEAK = """
import unetpp_fast as uf

dims, side, budget, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
model = uf.UNetPlusPlus(1, 2, spatial_dims=dims, features=(8, 16, 24), deep_supervision=True, backend=backend).eval()
image, out = torch.rand(1, 1, *[side] * dims), torch.zeros(1, 2, *[side] * dims)
model.predict(torch.rand(1, 1, *[16] * dims))  # the libraries' own code and tables
before = begin()
uf.predict_tiled(model, image, max_memory=budget, out=out)
"""


def network(spatial_dims: int = 2, **options) -> uf.UNetPlusPlus:
    return build(uf.UNetPlusPlus, 1, 2, spatial_dims=spatial_dims, **{"features": (3, 4, 5), **options}).eval()


@pytest.mark.parametrize("size", [(24, 40), (13, 31), (5, 9, 14)], ids=str)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_one_tile_is_one_pass(size, norm):
    model = network(len(size), norm=norm, deep_supervision=True)
    x = make_input(1, 1, *size)
    for options in ({}, {"mode": "fast", "level": 1}, {"level": 1}, {"activation": "softmax"}):
        expected = model.predict(x, **options)
        for tile in ({}, {"tile": 64}):
            assert torch.equal(uf.predict_tiled(model, x, **tile, **options), expected)


@pytest.mark.parametrize(
    "size, tile, overlap", [((118, 96), 48, 0.5), ((131, 77), (40, 48), (0.25, 0.5)), ((50, 48, 30), 32, 0.5)]
)
def test_the_middle_of_tiles_is_one_pass(size, tile, overlap):
    """Also of a size that is not a multiple of 2: the last tile is padded as one pass pads."""
    model = network(len(size), features=(3, 4))
    x = make_input(1, 1, *size)
    expected, found = model.predict(x)[0], uf.predict_tiled(model, x, tile=tile, overlap=overlap)[0]
    clean = torch.ones(size, dtype=torch.bool)
    for axis, places in enumerate(tiled_prediction.make_grid(model, size, tile, overlap)):
        far = torch.ones(size[axis], dtype=torch.bool)
        for where, _ in places:
            if where.start:
                far[where.start : where.start + RADIUS] = False
            if where.stop < size[axis]:
                far[where.stop - RADIUS : where.stop] = False
        clean &= far.view(-1, *[1] * (len(size) - axis - 1))
    assert 0.03 < clean.double().mean() < 0.9
    assert_close_relative(found[:, clean], expected[:, clean], FLOAT32)
    assert (found - expected).abs().max() > 1e-3  # elsewhere it is not: the bound above says something


@pytest.mark.parametrize("blend", tiled_prediction.BLENDS)
@pytest.mark.parametrize("multiple", [2, 8])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.5, 0.9])
def test_tiles_cover_an_axis_and_weights_add_up_to_one(multiple, overlap, blend):
    for size, length in itertools.product((1, 7, 8, 63, 64, 65, 129), (16, 40, 64)):
        axis = tiled_prediction._axis(size, length, overlap, multiple, blend)
        total = torch.zeros(size, dtype=torch.float64)
        for where, weights in axis:
            assert where.start % multiple == 0 and where.stop <= size and (weights > 0).all()
            total[where] += weights
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)
        for (one, _), (other, _) in itertools.pairwise(axis):
            assert one.stop - other.start >= overlap * length - multiple
            assert other.start > one.start


@pytest.mark.parametrize("size", [(70, 45), (20, 33, 17)], ids=str)
@pytest.mark.parametrize("blend", tiled_prediction.BLENDS)
def test_a_constant_map_stays_constant(size, blend):
    model = network(len(size))
    for head in model.heads.values():
        nn.init.zeros_(head.weight)
    found = uf.predict_tiled(model, make_input(1, 1, *size), tile=16, overlap=0.4, blend=blend)
    expected = model.heads["x0_2"].bias.detach().sigmoid().view(1, -1, *[1] * len(size)).expand_as(found)
    assert_close_relative(found, expected, FLOAT32)


class Sliced:
    """Something with a shape that gives arrays for slices, and remembers the largest."""

    def __init__(self, values: np.ndarray):
        self.values, self.shape, self.largest = values, values.shape, 0

    def __getitem__(self, where):
        part = self.values[where]
        self.largest = max(self.largest, part.size)
        return part


def test_arrays_files_and_tensors_in_and_out(tmp_path):
    model = network()
    x = make_input(2, 1, 50, 70)
    expected = uf.predict_tiled(model, x, tile=16)
    np.save(tmp_path / "x.npy", x.numpy())
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    sliced = Sliced(stored)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, tuple(expected.shape))
    assert uf.predict_tiled(model, sliced, tile=16, out=out) is out
    assert sliced.largest == 16 * 16
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected.numpy())
    half = uf.predict_tiled(model, stored, tile=16, out=np.zeros(expected.shape, np.float16))
    assert np.array_equal(half, expected.numpy().astype(np.float16))
    assert torch.equal(uf.predict_tiled(model, x, tile=16, out=torch.empty_like(expected)), expected)
    with pytest.raises(TypeError, match="whole numbers"):  # what they mean is known to a trained network only
        uf.predict_tiled(model, (100 * x).int().numpy(), tile=16)
    double = uf.predict_tiled(model.double(), x.double(), tile=16)
    assert double.dtype == torch.float64
    assert_close_relative(double, expected, FLOAT32)
    assert uf.predict_tiled(model, x[:0].double()).shape == (0, 2, 50, 70)


def test_what_optimize_gives_is_taken():
    model = network(deep_supervision=True)
    x = make_input(1, 1, 60, 40)
    expected = uf.predict_tiled(model, x, tile=24)
    assert_close_relative(uf.predict_tiled(uf.optimize(model), x, tile=24), expected, FLOAT32)
    assert_close_relative(uf.predict_tiled(uf.optimize(model), x, max_memory="20M"), model.predict(x), FLOAT32)


def test_the_bar_is_shown_only_when_asked(capfd):
    model = network()
    uf.predict_tiled(model, make_input(1, 1, 40, 40), tile=16)
    assert capfd.readouterr().err == ""
    uf.predict_tiled(model, make_input(1, 1, 40, 40), tile=16, progress=True)
    assert "tiles" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tile": 30}, ValueError, "positive multiple of 4"),
        ({"tile": (16, 16, 16)}, ValueError, "or 2 of them"),
        ({"tile": 0}, ValueError, "positive multiple of 4"),
        ({"overlap": 1.0}, ValueError, "overlap must be 0 or more and below 1"),
        ({"overlap": math.nan}, ValueError, "overlap must be"),
        ({"overlap": (0.5, 0.5, 0.5)}, ValueError, "or 2 such numbers"),
        ({"overlap": (0.5, 1.0)}, ValueError, "overlap must be"),
        ({"blend": "linear"}, ValueError, "blend must be one of"),
        ({"max_memory": "lots"}, ValueError, "'lots' is not an amount of memory"),
        ({"max_memory": 0}, ValueError, "0 is not an amount of memory"),
        ({"max_memory": "1K"}, ValueError, "max_memory 1K is too small for tiles of 8x8: they need"),
        ({"out": np.zeros((1, 2, 39, 40), np.float32)}, ValueError, "out must have the shape (1, 2, 40, 40)"),
        ({"out": np.zeros((1, 2, 40, 40), np.uint8)}, TypeError, "floating-point type to hold probabilities, not uint8"),
        ({"level": 1}, ValueError, "no head at level 1"),
        ({"tile": 16, "mode": "slow"}, ValueError, "mode must be one of"),
        ({"image": np.zeros((1, 3, 40, 40))}, ValueError, "expected 1 channels, got 3"),
        ({"image": np.zeros((40, 40))}, ValueError, "expected 4 axes"),
        ({"image": np.full((1, 1, 40, 40), np.nan)}, ValueError, "NaN"),
    ],
)
def test_a_mistake_is_said_clearly(options, error, says):
    with pytest.raises(error) as caught:
        uf.predict_tiled(network(), **{"image": np.zeros((1, 1, 40, 40)), **options})
    assert says in str(caught.value)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "in an ensemble"])
def test_what_cannot_be_counted_asks_for_the_tile(together):
    model = uf.Ensemble([network(), encoded(channels=1)]) if together else encoded(channels=1)
    with pytest.raises(ValueError, match="give tile= instead of max_memory="):
        uf.predict_tiled(model, make_input(1, 1, 32, 32))


def test_an_ensemble_counts_its_largest_member():
    small, large = network(), network(features=(16, 16, 16))
    counted = [tiled_prediction.memory(uf.Ensemble(order), (64, 64), (64, 64)) for order in ([small, large], [large, small])]
    assert counted[0] == counted[1] > tiled_prediction.memory(large, (64, 64), (64, 64))


def test_the_largest_tile_that_fits_is_chosen():
    model = network(deep_supervision=True)
    for budget in ("16.3M", "17M", "21M"):
        tile = tiled_prediction.choose_tile(model, (500, 40), budget)
        assert tile[1] <= 40 and tiled_prediction.memory(model, tile, (500, 40)) <= tiled_prediction.parse_bytes(budget)
        larger = (tile[0] + 4, min(40, tile[0] + 4))
        assert tiled_prediction.memory(model, larger, (500, 40)) > tiled_prediction.parse_bytes(budget)
    assert tiled_prediction.choose_tile(model, (501, 41), "1G") == (504, 44)
    shape = (64, 64), (64, 64)
    fast, accurate = (tiled_prediction.memory(model, *shape, {"mode": mode, "level": 1}) for mode in ("fast", "accurate"))
    assert fast <= accurate < tiled_prediction.memory(model, *shape) < tiled_prediction.memory(model.double(), *shape)
    assert [tiled_prediction.parse_bytes(text) for text in ("1.5k", "2GiB", " 3 MB", 7)] == [1536, 2**31, 3 * 2**20, 7]


@pytest.mark.parametrize(
    "dims, side, budget, backend", [(2, 700, "64M", "reference"), (2, 700, "32M", "auto"), (3, 60, "128M", "reference")]
)
def test_the_true_peak_stays_within_the_budget(dims, side, budget, backend):
    peak, limit = peak_of(PEAK, dims, side, budget, backend), tiled_prediction.parse_bytes(budget)
    model = uf.UNetPlusPlus(1, 2, spatial_dims=dims, features=(8, 16, 24), deep_supervision=True)
    assert limit // 10 < peak <= limit, f"{peak / 2**20:.1f} MiB"
    assert tiled_prediction.memory(model, [side] * dims, [side] * dims) > 1.3 * limit


@pytest.mark.parametrize("size, tile", [((96, 64), (32, 32)), ((32, 48, 16), (16, 16, 16))], ids=str)
@pytest.mark.parametrize("deep", [False, True])
def test_monai_takes_our_models_and_agrees(size, tile, deep):
    """MONAI blends what a model returns, a list too. Its Gaussian has a floor at 1/1000; without it both are the same."""
    inferers = pytest.importorskip("monai.inferers", reason="compares with MONAI")
    model = network(len(size), deep_supervision=deep)
    x = make_input(1, 1, *size)
    curve = torch.exp(-0.5 * ((torch.arange(16 if len(size) == 3 else 32) - (tile[0] - 1) / 2) / (tile[0] / 8)) ** 2)
    weights = curve[:, None] * curve if len(size) == 2 else curve[:, None, None] * curve[:, None] * curve
    for blend, options in (("constant", {"mode": "constant"}), ("gaussian", {"roi_weight_map": weights})):
        with torch.no_grad():
            theirs = inferers.sliding_window_inference(x, tile, 2, model, overlap=0.5, **options)
            blended = inferers.sliding_window_inference(x, tile, 2, model.predict, overlap=0.5, **options)
        assert_close_relative(uf.predict_tiled(model, x, tile=tile, overlap=0.5, blend=blend), blended, FLOAT32)
        heads = [*theirs] if deep else [theirs]
        assert len(heads) == (2 if deep else 1)
        for number, head in enumerate(heads):
            logits = network(len(size), deep_supervision=deep)
            logits.predict = lambda part, run=logits, k=number: run(part)[k] if deep else run(part)
            assert_close_relative(uf.predict_tiled(logits, x, tile=tile, overlap=0.5, blend=blend), head, FLOAT32)
