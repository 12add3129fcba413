"""Optimizers, schedules, clipping and averaged weights: their numbers, and that a resumed run equals an unbroken one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.command_line import fails, run
from support.folders import write_nuclei
from support.helpers import build
from torch import nn

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.pairs import find_samples
from unetpp_fast.data.patches import Patches
from unetpp_fast.training import evaluation, optimizers
from unetpp_fast.training.checkpoint import load_checkpoint, load_model
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Interrupted, Trainer

FULL = {
    "optimizer": "adamw", "weight_decay": 0.01, "schedule": "cosine", "warm_up": 0.75, "clip": 0.5, "ema": 0.9,
    "accumulate": 2, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_nuclei(tmp_path_factory.mktemp("nuclei"), count=5)


def make_trainer(folder: Path, out: Path | None, **recipe) -> Trainer:
    torch.manual_seed(0)
    dropout = 0.0 if recipe.get("reproducible") else 0.2
    network = uf.UNetPlusPlus(1, 1, features=(4, 8), dropout=dropout, deep_supervision=True)
    samples, _ = find_samples(folder)
    patches = Patches(samples[:-1], 32, per_image=2, seed=0)  # 4 steps an epoch
    return Trainer(network, patches, samples[-1:], Recipe(**{"epochs": 3, "batch_size": 2, **recipe}), out)


def same(one, other) -> bool:
    """Whether nested plain data and tensors are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other or (one != one and other != other)


def rates(name: str, warm_up: int, steps: int) -> list[float]:
    """The learning rate of each step, of a largest one of 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = optimizers.make_schedule(name, optimizer, warm_up, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return found


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("constant", lambda t: 1.0),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("poly", lambda t: (1 - t) ** 0.9),
    ],
)
def test_the_learning_rate_rises_linearly_and_falls_by_its_formula(name, curve, warm_up):
    steps = 12
    rising = [2.0 * (step + 1) / (warm_up + 1) for step in range(warm_up)]
    after = steps - warm_up
    assert rates(name, warm_up, steps) == pytest.approx(rising + [2.0 * curve(step / after) for step in range(after)])


@pytest.mark.parametrize(
    ("number", "extra"),
    [(1, {}), (6, {"optimizer": "sgd", "schedule": "poly", "monitor": "loss"}), (6, {"reproducible": True})],
)
def test_a_resumed_run_with_everything_equals_an_unbroken_one(folder, tmp_path, number, extra):
    """Stopped within an epoch, in the warm-up and after it."""
    recipe = {**FULL, **extra}
    make_trainer(folder, tmp_path / "whole", **recipe).fit(progress=False)
    broken = make_trainer(folder, tmp_path / "broken", **recipe)
    run_step, steps = broken.train_step.run, []

    def stop_at(*batch):
        steps.append(batch)
        broken._stop = len(steps) == number
        return run_step(*batch)

    broken.train_step.run = stop_at
    with pytest.raises(Interrupted):
        broken.fit(progress=False)
    resumed = make_trainer(folder, tmp_path / "broken", **recipe)
    torch.manual_seed(99)
    resumed.resume()
    resumed.fit(progress=False)
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / run / name) for run in ("whole", "broken"))
        assert same(one, other), name
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "broken/log.csv").read_text()


def test_averaged_weights_are_validated_and_kept(folder, tmp_path):
    """By the formula, in float64, from the weights after each step."""
    trainer = make_trainer(folder, tmp_path, epochs=2, ema=0.4, learning_rate=1e-2)
    run_step, seen = trainer.train_step.run, []

    def noting(*batch):
        totals = run_step(*batch)
        seen.append({key: value.double().clone() for key, value in trainer.network.state_dict().items()})
        return totals

    trainer.train_step.run = noting
    history = trainer.fit(progress=False)
    expected = seen[0]
    for count, weights in enumerate(seen[1:], start=1):
        decay = min(0.4, (1 + count) / (10 + count))
        expected = {key: decay * expected[key] + (1 - decay) * weights[key] for key in expected}
    averaged = trainer.train_step.validated.state_dict()
    floating = [key for key, value in averaged.items() if value.is_floating_point()]
    for key in floating:
        torch.testing.assert_close(averaged[key].double(), expected[key], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(averaged[key], trainer.network.state_dict()[key]) for key in floating)
    for name in ("last.pt", "best.pt"):
        network, content = load_model(tmp_path / name)
        if content["epoch"] == 2:
            assert all(torch.equal(network.state_dict()[key], averaged[key]) for key in averaged)
        assert evaluation.evaluate(network, trainer.validation)["iou"] == history[content["epoch"] - 1]["val_iou"]
    raw = load_checkpoint(tmp_path / "last.pt")["model"]
    assert all(torch.equal(raw[key], value) for key, value in trainer.network.state_dict().items())


def test_gradients_are_clipped_to_the_norm(folder):
    norms = []
    for clip in (0.0, 1e-3):
        trainer = make_trainer(folder, None, clip=clip)
        step = trainer.train_step
        image, mask = next(iter(trainer._load(trainer.patches.batches(0, 2))))
        step.run(image, mask, 2)
        gradients = [parameter.grad.flatten() for parameter in step.network.parameters() if parameter.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_each_optimizer_takes_its_own_step():
    """One step on the same gradient, by the textbook."""
    found = {}
    for name in optimizers.OPTIMIZERS:
        weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        optimizer = optimizers.make_optimizer(name, [weight], 0.1, 0.5)
        for _ in range(2):
            weight.grad = torch.tensor([4.0], dtype=torch.float64)
            optimizer.step()
        found[name] = float(weight.detach())
    first = 2 - 0.1 * (1.9 * (4 + 0.5 * 2))  # Nesterov: gradient + 0.9 momentum, which is the gradient at first
    momentum = 0.9 * 5 + (4 + 0.5 * first)
    assert found["sgd"] == pytest.approx(first - 0.1 * ((4 + 0.5 * first) + 0.9 * momentum))
    assert found["adamw"] == pytest.approx((2 * 0.95 - 0.1) * 0.95 - 0.1, rel=1e-6)
    assert found["adam"] == pytest.approx(1.8, rel=1e-3) and found["adam"] != found["adamw"]


@pytest.mark.parametrize(("monitor", "best"), [("iou", 2), ("dice", 3), ("loss", 1)])
def test_the_monitored_score_chooses_the_best_epoch_and_stops(folder, tmp_path, monkeypatch, monitor, best):
    rows = [(1.0, 0.5, 0.1), (1.5, 0.6, float("nan")), (1.2, 0.6, 0.2), (2.0, 0.2, 0.1), (2.0, 0.2, 0.1), (2.0, 0.2, 0.1)]
    scores = iter(dict(zip(("loss", "iou", "dice"), row, strict=True)) for row in rows)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: next(scores))
    trainer = make_trainer(folder, tmp_path, epochs=6, patience=2, monitor=monitor)
    assert len(trainer.fit(progress=False)) == best + 2
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == best


def test_the_epochs_of_a_schedule_cannot_change(folder, tmp_path):
    make_trainer(folder, tmp_path, schedule="poly", epochs=1).fit(progress=False)
    with pytest.raises(InputError, match="another epochs=1, now 2: resume with the same"):
        make_trainer(folder, tmp_path, schedule="poly", epochs=2).resume()
    with pytest.raises(InputError, match=r"another ema=0\.0, now 0\.9"):
        make_trainer(folder, tmp_path, schedule="poly", epochs=1, ema=0.9).resume()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, sgd, not 'lion'"),
        ({"schedule": "step"}, "schedule must be one of constant, cosine, poly"),
        ({"monitor": "f1"}, "monitor must be one of iou, dice, loss"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0"),
        ({"clip": math.nan}, "clip must be finite and at least 0"),
        ({"ema": 1.0}, "ema must be a decay such as 0.999"),
        ({"warm_up": 3.0, "epochs": 3}, "warm_up must be at least 0 and below the 3 epochs"),
    ],
)
def test_a_setting_out_of_range_says_what_it_may_be(wrong, says):
    with pytest.raises(InputError, match=says):
        Recipe(**wrong)


def test_the_command_trains_by_its_options(folder, tmp_path, capsys):
    command = ("train", "--data", folder, "--features", "4,8", "--patch", "32", "--device", "cpu", "--epochs", "2")
    options = ("--optimizer", "sgd", "--schedule", "poly", "--warm-up", "0.5", "--clip", "1", "--ema", "0.9")
    assert run(*command, "--out", tmp_path / "run", *options, "--monitor", "dice", "--weight-decay", "1e-4") == 0
    assert "best validation Dice" in capsys.readouterr().out
    recipe = load_checkpoint(tmp_path / "run/last.pt")["recipe"]
    wanted = {"optimizer": "sgd", "learning_rate": 0.01, "schedule": "poly", "warm_up": 0.5, "clip": 1.0, "ema": 0.9}
    assert {**wanted, "monitor": "dice", "weight_decay": 1e-4}.items() <= recipe.items()
    assert "ema must be a decay" in fails(capsys, *command, "--out", tmp_path / "other", "--ema", "1")


def test_averages_of_a_network_in_half_precision_buffers_stay_integers():
    network = build(uf.UNetPlusPlus, 1, 1, features=(2, 4))
    average = optimizers.MovingAverage(network, 0.9)
    for _ in range(3):
        average.update_parameters(network)
    counts = [value for key, value in average.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counts and all(value.dtype == torch.int64 for value in counts) and int(average.n_averaged) == 3
