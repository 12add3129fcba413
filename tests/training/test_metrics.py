"""Intersection over union and Dice against sets of pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from torch import Tensor

import unetpp_fast as uf
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.training.evaluation import evaluate

Pixels = set[tuple[int, ...]]


def iou_of_sets(a: Pixels, b: Pixels) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def dice_of_sets(a: Pixels, b: Pixels) -> float:
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


SCORES = [(uf.iou_score, iou_of_sets), (uf.dice_score, dice_of_sets)]
both_scores = pytest.mark.parametrize("score, of_sets", SCORES, ids=["iou", "dice"])


def foreground(image: Tensor) -> Pixels:
    places = itertools.product(*map(range, image.shape))
    return {place for place in places if image[place].item() > 0.5}


def brute_force(of_sets: Callable[[Pixels, Pixels], float], probabilities: Tensor, target: Tensor) -> Tensor:
    scores = [of_sets(foreground(p), foreground(y)) for p, y in zip(probabilities, target, strict=True)]
    return torch.tensor(sum(scores) / len(scores), dtype=torch.float64)


@both_scores
@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed"])
@pytest.mark.parametrize("shape", [(1, 1, 6, 7), (3, 1, 5, 5), (2, 3, 4, 4), (2, 2, 3, 2, 4), (4, 5)], ids=str)
def test_sets(shape: tuple[int, ...], layout: str, score, of_sets) -> None:
    """Images with all, some and none of the foreground."""
    probabilities = make_input(*shape, layout=layout).sigmoid()
    target = (make_input(*shape, seed=1) > 0).float()
    for level in (-1.0, 0.0, 0.3, 1.0):
        shift = level * torch.linspace(0, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
        shifted = (probabilities + shift).clamp(0, 1)
        value = score(shifted, target)
        assert value.ndim == 0 and value.dtype == torch.float32
        assert_close_relative(value, brute_force(of_sets, shifted, target), FLOAT32)


@both_scores
def test_empty_masks(score, of_sets) -> None:
    """Two empty masks agree; an empty and a full one do not."""
    empty, full = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert score(empty, empty).item() == 1.0
    assert score(full, full).item() == 1.0
    assert score(full, empty).item() == 0.0
    assert score(empty, full).item() == 0.0
    assert score(torch.cat([empty, full, empty]), torch.cat([empty, empty, full])).item() == pytest.approx(1 / 3)


@both_scores
def test_hard_at_one_half(score, of_sets) -> None:
    """0.5 itself is background, in the prediction and in the target."""
    at, above = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.5001)
    assert score(at, torch.zeros(1, 1, 2, 2)).item() == 1.0
    assert score(above, torch.ones(1, 1, 2, 2)).item() == 1.0
    assert score(above, at).item() == 0.0
    assert score(torch.full((1, 1, 2, 2), 0.9), torch.full((1, 1, 2, 2), 0.6)).item() == 1.0


@both_scores
def test_images_are_averaged_and_not_pooled(score, of_sets) -> None:
    """A missed small object counts as much as a found large one."""
    probabilities, target = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    probabilities[0], target[0] = 1, 1
    target[1, 0, 0, 0] = 1
    assert score(probabilities, target).item() == 0.5
    pooled = score(probabilities.view(1, 2, 8, 8), target.view(1, 2, 8, 8)).item()
    assert pooled > 0.9


@both_scores
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_types(dtype: torch.dtype, score, of_sets) -> None:
    probabilities, target = make_input(2, 1, 5, 5).sigmoid(), (make_input(2, 1, 5, 5, seed=1) > 0).float()
    assert torch.equal(score(probabilities, target.to(dtype)), score(probabilities, target))
    mask = (probabilities > 0.5).to(dtype)
    assert torch.equal(score(mask, target), score(probabilities, target))


@both_scores
def test_more_pixels_than_float16_or_uint8_hold(score, of_sets) -> None:
    half = torch.ones(1, 1, 300, 300, dtype=torch.float16)
    half[..., 150:, :] = 0
    expected = 0.5 if score is uf.iou_score else 2 / 3
    assert score(half, torch.ones(1, 1, 300, 300, dtype=torch.uint8)).item() == pytest.approx(expected)


@both_scores
def test_wrong_arguments(score, of_sets) -> None:
    with pytest.raises(ValueError, match=r"probabilities \(2, 1, 4, 4\) and target \(2, 4, 4\) must have the same shape"):
        score(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))
    for shape in ((0, 1, 4, 4), (1, 1, 4, 0), (4,)):
        with pytest.raises(ValueError, match="hold no image"):
            score(torch.zeros(shape), torch.zeros(shape))


@both_scores
def test_logits_and_masks_of_other_values_are_refused(score, of_sets) -> None:
    mask = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"the first argument has values from -3 to 2, .*logits\.sigmoid\(\)"):
        score(torch.tensor([-3.0, 2.0]).repeat(8).view(1, 1, 4, 4), mask)
    with pytest.raises(ValueError, match=r"the target has values from 0 to 255, .*mask > 0"):
        score(mask, torch.tensor([0, 255], dtype=torch.uint8).repeat(8).view(1, 1, 4, 4))


@pytest.mark.parametrize("shape", [(12, 13), (4, 6, 5)])
def test_several_classes_are_scored_one_by_one(shape):
    """Over all pixels of all images; a class that is nowhere has no score."""
    network = build(uf.UNetPlusPlus, 1, 3, features=(3, 4), spatial_dims=len(shape)).eval()
    (head,) = network.heads.values()
    with torch.no_grad():
        head.bias[2] = -99.0  # never predicted
    random = np.random.default_rng(0)
    samples = []
    for name in "ab":
        image, mask = random.normal(size=(1, *shape)).astype(np.float32), random.random((3, *shape)) > 0.5
        mask[2] = False
        samples.append(ArraySample(name, image, mask))
    found = evaluate(network, samples)
    images = [torch.from_numpy(sample.load()[0])[None] for sample in samples]
    masks = [(network.predict(image)[0] > 0.5).numpy() for image in images]
    for label in range(2):
        both = sum((mask[label] & sample.mask[label]).sum() for mask, sample in zip(masks, samples, strict=True))
        total = sum(mask[label].sum() + sample.mask[label].sum() for mask, sample in zip(masks, samples, strict=True))
        assert found["class_iou"][label] == pytest.approx(both / (total - both))
        assert found["class_dice"][label] == pytest.approx(2 * both / total)
    assert math.isnan(found["class_iou"][2]) and math.isnan(found["class_dice"][2]) and len(found["class_iou"]) == 3
    single = build(uf.UNetPlusPlus, 1, 1, spatial_dims=len(shape), features=(3, 4))
    assert "class_iou" not in evaluate(single, [ArraySample("a", image, mask[:1])])
