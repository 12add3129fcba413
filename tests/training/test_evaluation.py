"""Scores of whole images in a fixed amount of memory: tiles whose logits are blended."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.encoders import encoded
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from support.resident import peak_of

import unetpp_fast as uf
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.models import tiled_prediction
from unetpp_fast.training import evaluation
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Trainer

PEAK = """
import numpy as np, unetpp_fast as uf
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.training.evaluation import evaluate

side, budget = int(sys.argv[1]), sys.argv[2]
model = uf.UNetPlusPlus(1, 1, features=(8, 16, 24), deep_supervision=True, backend="reference")
image = np.random.default_rng(0).random((1, side, side), np.float32)
samples = [ArraySample("a", image, image > 0.5)]
evaluate(model, [ArraySample("b", image[:, :16, :16], image[:, :16, :16] > 0.5)], loss=uf.BCEDiceLoss())
before = begin()
evaluate(model, samples, loss=uf.BCEDiceLoss(), max_memory=budget)
"""


def network(**options) -> uf.UNetPlusPlus:
    return build(uf.UNetPlusPlus, 1, 2, features=(3, 4, 5), deep_supervision=True, **options).eval()


def sample(*size: int) -> ArraySample:
    image = make_input(1, *size).numpy()
    return ArraySample("a", image, np.concatenate([image > 0, image <= 0]))


@pytest.mark.parametrize("make", [network, lambda: encoded(deep_supervision=True, channels=1)], ids=["plain", "encoder"])
def test_tiles_are_blended_logits_of_every_head(make, monkeypatch):
    """Against `predict_tiled` of networks that give one head's logits as their prediction."""
    model, one = make().eval(), sample(90, 61)
    monkeypatch.setattr(evaluation, "TILES", {2: 32})
    tile = evaluation.tile_within(model, (90, 61), "17.6M")
    assert min(tile) < 61
    x = torch.from_numpy(one.load()[0])[None]
    heads = []
    for number in range(len(model.topology.heads)):
        single = copy.copy(model)
        object.__setattr__(single, "predict", lambda part, k=number: evaluation.logits_of_any_size(model, part)[k])
        heads.append(uf.predict_tiled(single, x, tile=tile))
    found = evaluation.logits(model, one.load()[0], "float32", "17.6M")
    assert len(found) == len(heads) > 1
    for mine, wanted in zip(found, heads, strict=True):
        assert_close_relative(mine, wanted, FLOAT32)
    mask = torch.from_numpy(one.mask)[None]
    scores = evaluation.evaluate(model, [one], loss=uf.BCEDiceLoss(), max_memory="17.6M")
    assert scores["loss"] == pytest.approx(float(uf.BCEDiceLoss()(heads, mask.float())), rel=1e-5)
    assert scores["iou"] == pytest.approx(
        float(uf.iou_score(sum(head.sigmoid() for head in heads) / len(heads), mask)), rel=1e-5
    )
    exclusive = evaluation.evaluate(model, [one], loss=uf.CrossEntropyDiceLoss(), max_memory="17.6M")
    assert exclusive["loss"] == pytest.approx(float(uf.CrossEntropyDiceLoss()(heads, mask)), rel=1e-5)
    assert sum(map(sum, exclusive["confusion"])) == 90 * 61


def test_what_fits_is_one_pass():
    model, one = network(), sample(30, 21)
    whole = evaluation.logits_of_any_size(model, torch.from_numpy(one.load()[0])[None])
    assert all(map(torch.equal, evaluation.logits(model, one.load()[0], "float32", evaluation.MEMORY), whole))
    assert evaluation.tile_within(model, (30, 21), evaluation.MEMORY) == (32, 24)
    least = 4 * tiled_prediction.SMALLEST_TILE
    assert evaluation.tile_within(model, (300, 210), "1K") == (least, least)  # never refused: the logits have to be held
    volume = build(uf.UNetPlusPlus, 1, 1, spatial_dims=3, features=(3, 4), deep_supervision=True).eval()
    assert evaluation.logits(volume, make_input(1, 9, 10, 11).numpy(), "float32", "1K")[0].shape == (1, 1, 9, 10, 11)


def test_the_true_peak_stays_within_the_budget():
    side, budget = 1000, "96M"  # large enough for what malloc keeps not to matter
    model = uf.UNetPlusPlus(1, 1, features=(8, 16, 24), deep_supervision=True)
    limit = tiled_prediction.parse_bytes(budget)
    assert tiled_prediction.memory(model, [side] * 2, [side] * 2) > 1.3 * limit
    peak = peak_of(PEAK, side, budget)
    assert limit // 10 < peak <= limit, f"{peak / 2**20:.1f} MiB"


def test_a_training_validates_within_its_budget(tmp_path):
    one, model = sample(60, 50), network()
    seen = []
    model.nodes["x0_0"].register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0][0].shape[2:])))
    trainer = Trainer(model, Patches([one], 16, 2, 0), [one], Recipe(epochs=1, batch_size=2), tmp_path, max_memory="1K")
    trainer.fit(progress=False)
    assert set(seen) == {(16, 16), (8, 8)} and trainer.history[0]["val_iou"] == trainer.best > 0
