"""Distances between surfaces, on boxes whose distances are known, and the scores that a training writes."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from support.helpers import build

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample, Sample
from unetpp_fast.training import evaluation
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.surface import surface_distances, surface_means, surface_sums
from unetpp_fast.training.trainer import Trainer


def box(*corner: int) -> torch.Tensor:
    """A box of 3x4x4 voxels at a corner of `[12, 12, 12]`."""
    mask = torch.zeros(12, 12, 12)
    mask[tuple(slice(first, first + side) for first, side in zip(corner, (3, 4, 4), strict=True))] = 1
    return mask


def test_boxes_apart_and_absent_ones():
    pytest.importorskip("scipy", reason="MONAI measures by scipy")
    nothing = torch.zeros(12, 12, 12)
    predicted = torch.stack([box(1, 1, 1), box(1, 1, 1), box(2, 2, 2), nothing, nothing])
    target = torch.stack([box(1, 1, 1), box(3, 1, 1), box(2, 2, 3), box(0, 0, 0), nothing])
    found = surface_distances(predicted, target, spacing=(2.5, 1.0, 0.5))
    assert found["hd95"][:3] == pytest.approx([0, 5, 0.5])  # 2 voxels of 2.5 mm; 1 of 0.5 mm
    assert found["asd"][0] == 0 and 0 < found["asd"][1] < 5 and 0 < found["asd"][2] < 0.5
    assert found["asd"][3] == found["hd95"][3] == math.inf and math.isnan(found["asd"][4])
    assert surface_distances(predicted[1:2], target[1:2])["hd95"] == pytest.approx([2])  # voxels
    sums = surface_sums(found) + surface_sums(surface_distances(predicted.flip(0), predicted.flip(0)))
    means = surface_means(sums)
    assert means["class_hd95"][1] == pytest.approx(5) and means["class_hd95"][2] == pytest.approx(0.25)
    assert means["class_alone"] == [0, 0, 0, 1, 0] and math.isnan(surface_means(surface_sums(found))["class_asd"][3])
    with pytest.raises(ValueError, match="3 numbers, one per axis, not 2"):
        surface_distances(predicted, target, spacing=(1, 1))


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_validation_measures_in_the_samples_spacing(exclusive):
    pytest.importorskip("scipy", reason="MONAI measures by scipy")

    class Volume(ArraySample):
        def spacing(self):
            return 2.0, 1.0, 1.0

    model = build(uf.UNetPlusPlus, 1, 2, spatial_dims=3, features=(2, 3), deep_supervision=True).eval()
    image = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    sample = Volume("a", image, np.concatenate([image > 0, image <= 0]))
    loss = uf.CrossEntropyDiceLoss() if exclusive else uf.BCEDiceLoss()
    scores = evaluation.evaluate(model, [sample, sample], loss=loss, surface=True)
    probabilities = model.predict(
        torch.from_numpy(sample.load()[0])[None], activation="softmax" if exclusive else "sigmoid"
    )[0]
    chosen = torch.nn.functional.one_hot(probabilities.argmax(0), 2).movedim(-1, 0) if exclusive else probabilities > 0.5
    wanted = surface_distances(chosen, torch.from_numpy(sample.mask), (2.0, 1.0, 1.0))
    assert scores["class_asd"] == pytest.approx(wanted["asd"], nan_ok=True) and all(map(math.isfinite, wanted["hd95"]))
    assert scores["class_hd95"] == pytest.approx(wanted["hd95"])


def test_volumes_tell_their_spacing(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="writes a volume")
    volume = nibabel.Nifti1Image(np.ones((5, 6, 7), np.uint8), np.diag([0.5, 0.75, 3.0, 1.0]))
    nibabel.save(volume, tmp_path / "a.nii.gz")
    assert Sample("a", tmp_path / "a.nii.gz", (tmp_path / "a.nii.gz",)).spacing() == pytest.approx((3.0, 0.75, 0.5))


def test_the_best_epoch_leaves_its_scores(tmp_path):
    """As JSON, NaN as null, and the confusion matrix as a table."""
    image = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    sample = ArraySample("a", image, np.concatenate([image > 0, image <= 0, image > 99]))
    model = build(uf.UNetPlusPlus, 1, 3, features=(2, 3))
    with torch.no_grad():
        model.heads["x0_1"].bias[2] = -99.0  # never predicted, nowhere in the masks
    about = {"classes": ["sky", "cell", "none"]}
    recipe = Recipe(epochs=1, batch_size=2)
    Trainer(model, Patches([sample], 16, 2, 0), [sample], recipe, tmp_path, about, uf.CrossEntropyDiceLoss()).fit(
        progress=False
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["classes"] == about["classes"] and scores["epoch"] == 1 and scores["class_iou"][2] is None
    table = list(csv.reader((tmp_path / "confusion.csv").open()))
    assert table[0] == ["true \\ predicted", "sky", "cell", "none"] and [row[0] for row in table[1:]] == about["classes"]
    assert [[int(value) for value in row[1:]] for row in table[1:]] == scores["confusion"]
    assert sum(map(sum, scores["confusion"])) == 256


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "monai.metrics", None)
    with pytest.raises(InputError, match=r"'unetpp_fast\[metrics\]'"):
        surface_distances(torch.ones(1, 4, 4), torch.ones(1, 4, 4))
