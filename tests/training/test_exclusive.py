"""The loss and the scores of exclusive classes, against sums pixel by pixel in double precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, make_input
from torch import Tensor

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.training.exclusive import class_scores, confusion, exclusive_iou
from unetpp_fast.training.loss_table import choose_loss


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and a one-hot target of classes 0 to K - 2, the last is absent; a sixth of the pixels has no class."""
    draws = torch.randint(0, 6 * (shape[1] - 1), (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    classes = torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    target = (draws % (shape[1] - 1)).unsqueeze(1).eq(classes) & (draws >= shape[1] - 1).unsqueeze(1)
    return make_input(*shape, dtype=dtype), target


def formula(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> float:
    losses = []
    for image, mask in zip(logits.double().flatten(2), target.flatten(2), strict=True):
        count, (classes, pixels) = 0, image.shape
        entropy, both, total, sizes = 0.0, [0.0] * classes, [0.0] * classes, [0] * classes
        for pixel in range(pixels):
            if not mask[:, pixel].any():
                continue
            count += 1
            powers = [math.exp(z) for z in image[:, pixel].tolist()]
            for k, power in enumerate(powers):
                p, y = power / sum(powers), int(mask[k, pixel])
                entropy -= y * math.log(p)
                both[k] += p * y
                total[k] += p + y
                sizes[k] += y
        present = [k for k in range(classes) if sizes[k]]
        dice = [(2 * both[k] + smooth) / (total[k] + smooth) for k in present]
        losses.append(entropy / count + 1 - sum(dice) / len(dice) if count else 0.0)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 2, 3, 4), (2, 3, 2, 3, 4), (1, 3, 1, 1)], ids=str)
def test_the_formula(shape):
    for dtype, bound in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        logits, target = pair(*shape, dtype=dtype)
        target[0, :, 0] = False
        wanted = torch.tensor(formula(logits, target), dtype=torch.float64)
        loss = uf.CrossEntropyDiceLoss()([logits, logits], target)
        assert loss.dtype == dtype
        assert_close_relative(loss + 1, wanted + 1, bound)


def test_gradients_and_half_precision_and_ignored_pixels():
    logits, target = pair(2, 3, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: uf.CrossEntropyDiceLoss()(z, target), logits.requires_grad_())
    loss = uf.CrossEntropyDiceLoss()
    loss(logits, target).backward()
    ignored = ~target.any(dim=1, keepdim=True).expand_as(target)
    assert ignored.any() and (logits.grad[ignored] == 0).all() and (logits.grad[~ignored] != 0).all()
    half = logits.detach().bfloat16()
    assert_close_relative(loss(half, target), loss(half.double(), target), FLOAT32)
    nothing = torch.zeros_like(target)
    assert loss(logits, nothing) == 0 and torch.isfinite(torch.autograd.grad(loss(logits, nothing), logits)[0]).all()


def test_scores_of_classes():
    truth = torch.tensor([[0, 0, 1, 1, 2, 9]])
    chosen = torch.tensor([[0, 1, 1, 1, 0, 3]])
    target, scores = ((labels.unsqueeze(1) == torch.arange(5).view(1, 5, 1)) for labels in (truth, chosen))
    matrix = confusion(scores.float(), target)
    assert matrix.tolist() == [[1, 1, 0, 0, 0], [0, 2, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    found = class_scores(matrix)
    assert found["iou"][:3] == pytest.approx([1 / 3, 2 / 3, 0]) and found["dice"][:3] == pytest.approx([1 / 2, 4 / 5, 0])
    assert all(math.isnan(value) for name in found for value in found[name][3:])  # neither in truth nor in prediction
    assert exclusive_iou(scores.float(), target).item() == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert exclusive_iou(scores.float(), target & False).item() == 1


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="need 2 channels or more"):
        uf.CrossEntropyDiceLoss()(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="must have the same shape"):
        uf.CrossEntropyDiceLoss()(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(InputError, match=r"--loss bce-dice does not fit label maps.*use ce-dice, ce, focal or tversky"):
        choose_loss("bce-dice", exclusive=True)
    with pytest.raises(InputError, match=r"--loss ce does not fit masks.*use bce-dice, focal or tversky"):
        choose_loss("ce", exclusive=False)
    assert repr(choose_loss("ce", exclusive=True)) == "CrossEntropyDiceLoss(entropy=1.0, dice=0.0, smooth=1e-05)"


def test_a_network_predicts_by_the_classes_that_it_was_trained_on(tmp_path):
    """Through its parts, copies, config and optimized form; an activation that is asked for wins."""
    network, x = uf.UNetPlusPlus(1, 3, features=(2, 3, 4), deep_supervision=True).eval(), make_input(1, 1, 9, 8)
    assert "exclusive" not in network.config
    overlapping = network.predict(x)
    network.exclusive = True
    exclusive = network.predict(x)
    assert_close_relative(exclusive.sum(dim=1), torch.ones(1, 9, 8), FLOAT32)
    assert not torch.equal(exclusive, overlapping) and torch.equal(network.predict(x, activation="sigmoid"), overlapping)
    again = uf.Network.from_config(network.config)
    again.load_state_dict(network.state_dict())
    for other in (again, copy.deepcopy(network), uf.optimize(network)):
        assert_close_relative(other.predict(x), exclusive, FLOAT32)
    assert_close_relative(network.prune(1).predict(x), network.predict(x, mode="fast", level=1), FLOAT32)
    assert network.prune(1).exclusive and not uf.UNet(1, 3).exclusive
