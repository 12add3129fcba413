"""Focal and Tversky loss and the weights of classes and heads, against sums in double precision and MONAI's losses."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from support.command_line import fails, run
from support.folders import write_nuclei
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, build, make_input
from torch import Tensor

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.training.checkpoint import load_checkpoint
from unetpp_fast.training.loss_table import choose_loss
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Trainer
from unetpp_fast.training.weighted_losses import balanced_weights

WEIGHTS = (0.5, 2.0, 4.0)
LOSSES = {
    "focal": partial(uf.FocalLoss, 1.5),
    "focal-alpha": partial(uf.FocalLoss, alpha=0.25, weights=WEIGHTS),
    "focal-root": partial(uf.FocalLoss, 0.5),
    "tversky": partial(uf.TverskyLoss, weights=WEIGHTS),
    "bce-dice": partial(uf.BCEDiceLoss, weights=WEIGHTS),
    "focal-softmax": partial(uf.FocalLoss, exclusive=True, weights=WEIGHTS),
    "focal-softmax-inside": partial(uf.FocalLoss, 1.0, exclusive=True, background=False),
    "tversky-softmax": partial(uf.TverskyLoss, 0.4, 0.6, exclusive=True, weights=WEIGHTS, background=False),
    "ce-dice": partial(uf.CrossEntropyDiceLoss, weights=WEIGHTS, background=False),
}


def pair(make, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3, 4, 5)) -> tuple[Tensor, Tensor]:
    """Logits of 3 classes and a target: overlapping, or one-hot with ignored pixels and an image without class 2."""
    logits, draws = make_input(*shape, dtype=dtype), torch.rand(shape, generator=torch.Generator().manual_seed(1))
    if not make().exclusive:
        return logits, (draws < 0.4).to(dtype)
    target = torch.nn.functional.one_hot(draws.argmax(dim=1), 3).movedim(-1, 1).to(dtype)
    target[0, :, 0] = 0
    target[1, 1] += target[1, 2]
    target[1, 2] = 0
    return logits, target


def formula(name: str, z: Tensor, y: Tensor) -> Tensor:
    """Pixel by pixel as the docstrings print it, of one image `[3, pixels]`."""
    loss = LOSSES[name]()
    w = torch.tensor(loss.weights or (1.0, 1.0, 1.0), dtype=z.dtype)
    inside = w * torch.tensor([loss.background, True, True]).to(z.dtype)
    counted = [k for k in range(z.shape[1]) if y[:, k].sum() > 0 or not loss.exclusive]
    p = z.softmax(dim=0) if loss.exclusive else z.sigmoid()
    if name.startswith("focal"):
        parts, total = [], []
        for k in counted:
            for c in range(3):
                right = p[c, k] if y[c, k] else 1 - p[c, k]
                share = (
                    y[c, k]
                    if loss.exclusive
                    else (1.0 if loss.alpha is None else (loss.alpha if y[c, k] else 1 - loss.alpha))
                )
                parts.append(inside[c] * share * -((1 - right) ** loss.gamma) * right.log())
                total.append(inside[c] * (share if loss.exclusive else 1.0))
        return sum(parts) / sum(total)
    if name.startswith("tversky"):
        p, y = p[:, counted], y[:, counted]
        index = [(p[c] * y[c]).sum() + loss.smooth for c in range(3)]
        index = [
            top / (top + loss.alpha * (p[c] * (1 - y[c])).sum() + loss.beta * ((1 - p[c]) * y[c]).sum())
            for c, top in enumerate(index)
        ]
        here = [c for c in range(3) if y[c].sum() or not loss.exclusive]
        return sum(inside[c] * (1 - index[c]) for c in here) / sum(inside[c] for c in here)
    if name == "bce-dice":
        entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean(dim=1)
        w = w / w.mean()
        both, total = (w * (p * y).sum(dim=1)).sum(), (w * (p + y).sum(dim=1)).sum()
        return 0.5 * (w * entropy).mean() + 1 - (2 * both + loss.smooth) / (total + loss.smooth)
    p, y = p[:, counted], y[:, counted]
    entropy = -(w[:, None] * y * p.log()).sum() / (w[:, None] * y).sum()
    dice = [(2 * (p[c] * y[c]).sum() + loss.smooth) / ((p[c] + y[c]).sum() + loss.smooth) for c in range(3)]
    here = [c for c in (1, 2) if y[c].sum()]
    return entropy + sum(w[c] * (1 - dice[c]) for c in here) / sum(w[c] for c in here)


@pytest.mark.parametrize("name", LOSSES)
def test_formulas_and_gradients_and_low_precision(name):
    make = LOSSES[name]
    logits, target = pair(make)
    wanted = sum(formula(name, z, y) for z, y in zip(logits.flatten(2), target.flatten(2), strict=True)) / 2
    assert_close_relative(make()(logits, target), wanted, FLOAT64)
    assert_close_relative(make()([logits, logits], target), wanted, FLOAT64)
    assert torch.autograd.gradcheck(lambda z: make()(z, target), logits.requires_grad_())
    half = logits.detach().bfloat16()
    assert_close_relative(make()(half, target), make()(half.double(), target), FLOAT32)
    if make().exclusive:
        make()(logits, target).backward()
        ignored = ~target.bool().any(dim=1, keepdim=True).expand_as(target)
        assert ignored.any() and (logits.grad[ignored] == 0).all() and logits.grad.isfinite().all()
        assert make()(logits, target * 0) == 0
    for extreme in (1e4, -1e4):
        z = torch.full_like(target, extreme).requires_grad_()
        make()(z, target).backward()
        assert z.grad.isfinite().all()


def test_what_others_compute():
    """MONAI's focal and Tversky loss: means over the classes too, and no rule for absent ones. Focal in float32."""
    losses = pytest.importorskip("monai.losses", reason="compares with MONAI")
    logits, target = pair(uf.FocalLoss)
    hot = torch.nn.functional.one_hot(logits.flip(1).argmax(dim=1), 3).movedim(-1, 1).double()
    assert hot.flatten(2).any(dim=2).all()
    for gamma in (0.0, 2.0, 3.5):
        assert_close_relative(uf.FocalLoss(gamma)(logits, target), losses.FocalLoss(gamma=gamma)(logits, target), FLOAT32)
        theirs = losses.FocalLoss(gamma=gamma, use_softmax=True)(logits, hot)
        assert_close_relative(uf.FocalLoss(gamma, exclusive=True)(logits, hot), 3 * theirs, FLOAT32)
    options = {"smooth_nr": 1e-5, "smooth_dr": 1e-5, "alpha": 0.3, "beta": 0.7}
    assert_close_relative(
        uf.TverskyLoss()(logits, target), losses.TverskyLoss(sigmoid=True, **options)(logits, target), FLOAT64
    )
    for background in (True, False):
        theirs = losses.TverskyLoss(softmax=True, include_background=background, **options)(logits, hot)
        assert_close_relative(uf.TverskyLoss(exclusive=True, background=background)(logits, hot), theirs, FLOAT64)
        theirs = losses.DiceLoss(softmax=True, include_background=background, smooth_nr=1e-5, smooth_dr=1e-5)(logits, hot)
        assert_close_relative(uf.CrossEntropyDiceLoss(0.0, background=background)(logits, hot), theirs, FLOAT64)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    theirs = [
        torch.nn.functional.cross_entropy(z, y, weight=weights)
        for z, y in zip(logits.split(1), hot.argmax(1).split(1), strict=True)
    ]
    assert_close_relative(uf.CrossEntropyDiceLoss(dice=0.0, weights=WEIGHTS)(logits, hot), sum(theirs) / 2, FLOAT64)
    mine = uf.DeepSupervision(losses.DiceCELoss(softmax=True), "halving")
    heads = [logits, logits * 2, logits / 3]
    singles = [losses.DiceCELoss(softmax=True)(head, hot) for head in heads]
    assert_close_relative(mine(heads, hot), (singles[0] + 2 * singles[1] + 4 * singles[2]) / 7, FLOAT64)
    assert_close_relative(uf.DeepSupervision(losses.DiceCELoss(softmax=True))(heads, hot), sum(singles) / 3, FLOAT64)


def test_names_and_what_does_not_fit():
    assert repr(choose_loss("focal", True, weights=(1, 2))) == "FocalLoss(exclusive=True, gamma=2.0, weights=(1.0, 2.0))"
    assert repr(choose_loss("tversky", False)) == "TverskyLoss(exclusive=False, alpha=0.3, beta=0.7, smooth=1e-05)"
    halving = choose_loss(None, True, head_weights="halving", background=False)
    assert halving.exclusive and "weights='halving'" in repr(halving) and "background=False" in repr(halving)
    assert balanced_weights([10, 30, 40], ["a", "b", "c"]) == pytest.approx((80 / 30, 80 / 90, 80 / 120))
    for wrong, says in (
        (lambda: uf.FocalLoss(-1), "gamma must be"),
        (lambda: uf.FocalLoss(alpha=0.5, exclusive=True), "exclusive ones take weights"),
        (lambda: uf.TverskyLoss(0, 0), "not both 0"),
        (lambda: uf.TverskyLoss(background=False), "overlapping ones have no background"),
        (lambda: uf.BCEDiceLoss(weights=(1, 0)), "must be positive"),
        (lambda: uf.DeepSupervision(uf.BCEDiceLoss(), "doubling"), "equal or halving"),
        (lambda: choose_loss("ce", True, background=False), "use ce-dice, focal"),
        (lambda: choose_loss(None, False, background=False), "is for label maps"),
        (lambda: balanced_weights([3], ["a"]), "there is one"),
        (lambda: balanced_weights([3, 0], ["a", "b"]), "no training image holds the class b"),
        (
            lambda: uf.BCEDiceLoss(weights=(1, 2))(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)),
            "2 weights of classes for 3",
        ),
        (lambda: uf.TverskyLoss()(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 255.0)), "a mask of 0 and 255"),
    ):
        with pytest.raises((InputError, ValueError), match=says):
            wrong()


def test_the_command_weighs_classes(tmp_path, capsys):
    data, out = write_nuclei(tmp_path / "data", classes=("a", "b")), tmp_path / "run"
    some = ("train", "--data", data, "--features", "2,4", "--patch", "16", "--epochs", "1", "--device", "cpu")
    options = ("--loss", "tversky", "--class-weights", "balanced", "--head-weights", "halving")
    assert run(*some, "--out", out, *options) == 0
    assert "weights of the classes: a 1, b 1" in capsys.readouterr().out
    assert "TverskyLoss" in load_checkpoint(out / "last.pt")["loss"]
    assert "3 numbers for 2 classes: a, b" in fails(capsys, *some, "--out", tmp_path / "x", "--class-weights", "1,2,3")
    assert "neither balanced nor a list" in fails(capsys, *some, "--out", tmp_path / "x", "--class-weights", "1,-2")
    assert "use bce-dice, focal or tversky" in fails(capsys, *some, "--out", tmp_path / "x", "--loss", "ce")
    assert "is for label maps" in fails(capsys, *some, "--out", tmp_path / "x", "--no-background")


def test_a_trainer_takes_any_loss(tmp_path):
    """Of lists as it is, of single logits by its mean over the heads; one that takes neither is named."""
    losses = pytest.importorskip("monai.losses", reason="trains with MONAI's loss")
    image = make_input(1, 16, 16).numpy()
    sample = ArraySample("a", image, np.concatenate([image > 0, image <= 0]))

    def trainer(loss):
        model = build(uf.UNetPlusPlus, 1, 2, features=(2, 3), deep_supervision=True)
        return Trainer(model, Patches([sample], 16, 2, 0), [sample], Recipe(epochs=1, batch_size=2), loss=loss)

    one = losses.DiceCELoss(softmax=True)
    one.exclusive = True
    wrapped = trainer(one)
    assert isinstance(wrapped.loss, uf.DeepSupervision) and wrapped.network.exclusive
    assert wrapped.fit(progress=False) == trainer(uf.DeepSupervision(one)).fit(progress=False)
    assert not trainer(uf.DeepSupervision(one, exclusive=False)).network.exclusive
    assert isinstance(trainer(torch.nn.BCEWithLogitsLoss()).loss, uf.DeepSupervision)

    class OfLists(torch.nn.Module):
        def forward(self, outputs, target):
            return sum(((output - target) ** 2).mean() for output in list(outputs)[::-1])

    assert isinstance(trainer(loss := OfLists()).loss, OfLists) and trainer(loss).fit(progress=False)
    with pytest.raises(InputError, match=r"the loss NLLLoss takes no logits and masks \[N, 2, \*S\], alone or in a list: "):
        trainer(torch.nn.NLLLoss())
