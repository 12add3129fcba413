"""The loss against equation 2, summed pixel by pixel in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, make_input
from torch import Tensor

import unetpp_fast as uf

SHAPES = [(1, 1, 4, 6), (3, 1, 8, 8), (2, 4, 5, 3), (2, 1, 2, 3, 4), (2, 3, 3, 2, 5), (1, 1, 1, 1), (4, 2)]


def pair(*shape: int, dtype: torch.dtype = torch.float32, foreground: float = 0.4) -> tuple[Tensor, Tensor]:
    """Logits and a mask of zeros and ones."""
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return make_input(*shape, dtype=dtype), (draws < foreground).float()


def formula(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> float:
    """Equation 2 with the full cross-entropy and 1 added, pixel by pixel and image by image."""
    losses = []
    for image, mask in zip(logits.double(), target.double(), strict=True):
        entropy = both = total = 0.0
        for z, y in zip(image.flatten().tolist(), mask.flatten().tolist(), strict=True):
            p = 1 / (1 + math.exp(-z))
            entropy -= y * math.log(p) + (1 - y) * math.log(1 - p)
            both += p * y
            total += p + y
        losses.append(0.5 * entropy / image.numel() + 1 - (2 * both + smooth) / (total + smooth))
    return sum(losses) / len(losses)


def as_tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("smooth", [1e-5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equation_2(shape: tuple[int, ...], smooth: float) -> None:
    for dtype, bound in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        logits, target = pair(*shape, dtype=dtype)
        loss = uf.BCEDiceLoss(smooth)(logits, target)
        assert loss.ndim == 0 and loss.dtype == dtype
        assert_close_relative(loss, as_tensor(formula(logits, target, smooth)), bound)


def test_images_are_averaged_and_not_pooled() -> None:
    """An image with a small object counts as much as one with a large one."""
    logits, target = pair(2, 1, 8, 8, dtype=torch.float64)
    target[0] = 0
    target[0, 0, 0, 0] = 1
    loss = uf.BCEDiceLoss()
    single = torch.stack([loss(logits[k : k + 1], target[k : k + 1]) for k in range(2)])
    assert_close_relative(loss(logits, target), single.mean(), FLOAT64)
    pooled = loss(logits.view(1, 2, 8, 8), target.view(1, 2, 8, 8))
    assert not torch.isclose(loss(logits, target), pooled)


def test_soft_targets() -> None:
    logits, _ = pair(2, 2, 4, 4)
    target = make_input(2, 2, 4, 4, seed=3).sigmoid()
    assert_close_relative(uf.BCEDiceLoss()(logits, target), as_tensor(formula(logits, target)), FLOAT32)


def test_a_list_is_the_mean_over_the_heads() -> None:
    _, target = pair(2, 3, 8, 8)
    heads = [make_input(2, 3, 8, 8, seed=k) for k in range(4)]
    expected = sum(formula(head, target) for head in heads) / 4
    assert_close_relative(uf.BCEDiceLoss()(heads, target), as_tensor(expected), FLOAT32)
    assert_close_relative(uf.BCEDiceLoss()(tuple(heads), target), as_tensor(expected), FLOAT32)
    assert_close_relative(uf.BCEDiceLoss()(heads[:1], target), uf.BCEDiceLoss()(heads[0], target), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """A sum over 300x300 pixels exceeds the range of float16; the gradient has the dtype of the input."""
    logits, target = pair(1, 1, 300, 300, dtype=dtype, foreground=0.9)
    logits.requires_grad_()
    loss = uf.BCEDiceLoss()(logits, target.to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close_relative(loss, as_tensor(formula(logits.detach(), target)), FLOAT32)
    assert logits.grad.dtype == dtype and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.float16])
def test_targets_of_any_type(dtype: torch.dtype) -> None:
    logits, target = pair(2, 1, 6, 6)
    assert torch.equal(uf.BCEDiceLoss()(logits, target.to(dtype)), uf.BCEDiceLoss()(logits, target))


@pytest.mark.parametrize("layout", ["offset", "strided", "transposed", "channels_last", "expanded"])
def test_memory_layouts(layout: str) -> None:
    logits, target = make_input(2, 3, 4, 6, layout=layout), pair(2, 3, 4, 6)[1]
    before = logits.clone()
    assert_close_relative(uf.BCEDiceLoss()(logits, target), as_tensor(formula(before, target)), FLOAT32)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("foreground", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 3, 2, 2), (1, 2, 2, 2, 2)], ids=str)
def test_gradcheck(shape: tuple[int, ...], foreground: float) -> None:
    logits, target = pair(*shape, dtype=torch.float64, foreground=foreground)
    heads = [logits.requires_grad_(), make_input(*shape, seed=5, dtype=torch.float64).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *z: uf.BCEDiceLoss()(list(z), target.double()), heads)


def test_no_foreground() -> None:
    """The dice term is nearly 1 for every prediction: only the cross-entropy has gradients, and nothing is NaN."""
    logits, target = make_input(2, 1, 4, 4).requires_grad_(), torch.zeros(2, 1, 4, 4)
    loss = uf.BCEDiceLoss()(logits, target)
    loss.backward()
    assert_close_relative(loss, as_tensor(formula(logits.detach(), target)), FLOAT32)
    assert torch.isfinite(logits.grad).all() and (logits.grad > 0).all()


@pytest.mark.parametrize("mask", [0.0, 1.0])
@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_extreme_logits(size: float, mask: float) -> None:
    """Confident right predictions cost nothing; wrong ones have a finite loss and a gradient that corrects them."""
    target = torch.full((1, 1, 4, 4), mask)
    toward = 2 * mask - 1
    right = uf.BCEDiceLoss()(target.new_full(target.shape, toward * size), target)
    assert abs(right.item()) < FLOAT32
    logits = target.new_full(target.shape, -toward * size).requires_grad_()
    wrong = uf.BCEDiceLoss()(logits, target)
    wrong.backward()
    assert_close_relative(wrong, as_tensor(0.5 * size + 1), FLOAT32)
    assert_close_relative(logits.grad, torch.full_like(logits, -toward * 0.5 / 16), FLOAT32)


def test_wrong_arguments() -> None:
    loss = uf.BCEDiceLoss()
    with pytest.raises(ValueError, match=r"outputs \(2, 1, 4, 4\) and target \(2, 4, 4\) must have the same shape"):
        loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"outputs \(2, 1, 4, 4\) and target \(1, 1, 4, 4\)"):
        loss([torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 4)], torch.zeros(1, 1, 4, 4))
    for shape in ((0, 1, 4, 4), (2, 1, 0, 4), (3,)):
        with pytest.raises(ValueError, match="hold no image: an empty batch has no mean"):
            loss(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="list of outputs is empty"):
        loss([], torch.zeros(1, 1, 4, 4))
    assert repr(uf.BCEDiceLoss(0.5)) == "BCEDiceLoss(smooth=0.5)"


@pytest.mark.parametrize("values", [(0.0, 255.0), (-1.0, 1.0), (0, 2)], ids=str)
def test_targets_that_are_no_shares_are_refused(values: tuple[float, float]) -> None:
    target = torch.tensor(values).repeat(8).view(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"the target has values from .* not in \[0, 1\]: a mask of 0 and 255"):
        uf.BCEDiceLoss()(torch.zeros(1, 1, 4, 4), target)
    compiled = torch.compile(uf.BCEDiceLoss(), fullgraph=True, backend="aot_eager")
    logits = torch.zeros(1, 1, 4, 4)
    assert compiled(logits, target.float()).isnan()  # no graph can raise
    assert_close_relative(compiled(logits, (target > 0).float()), uf.BCEDiceLoss()(logits, (target > 0).float()), FLOAT32)
