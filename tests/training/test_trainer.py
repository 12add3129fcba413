"""The training loop: the files of a run, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_line import run
from support.folders import write_nuclei
from torch import nn

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.pairs import find_samples
from unetpp_fast.data.patches import Patches
from unetpp_fast.training import evaluation
from unetpp_fast.training import trainer as trainer_module
from unetpp_fast.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from unetpp_fast.training.trainer import Interrupted, Recipe, Trainer

EPOCHS = 8  # of runs that are killed after two
COMMAND = ("train", "--features", "4,8", "--patch", "32", "--batch-size", "2", "--dropout", "0.2", "--device", "cpu")


EVERYTHING = (
    "--augment", "strong" if find_spec("monai") else "light", "--foreground", "0.5", "--normalise", "dataset", "--optimizer",
    "adamw", "--schedule", "cosine", "--warm-up", "1.5", "--clip", "0.5", "--ema", "0.9", "--accumulate", "2", "--monitor",
    "loss",
)  # fmt: skip


class WeightedEntropy(nn.Module):
    """A loss with a buffer: cross-entropy in which foreground counts `weight` times, the mean over the heads."""

    def __init__(self, weight: float = 3.0):
        super().__init__()
        self.weight = weight
        self.entropy = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weight))

    def forward(self, outputs: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.entropy(logits, target) for logits in outputs]).mean()

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


def make_trainer(
    folder: Path, out: Path | None, width: int = 4, validate: bool = True, about: dict | None = None,
    loss: nn.Module | None = None, **recipe,
) -> Trainer:  # fmt: skip
    """A trainer of a tiny UNet++ on four images, with dropout, so that the random state matters, unless reproducible."""
    torch.manual_seed(0)
    dropout = 0.0 if recipe.get("reproducible") else 0.2
    network = uf.UNetPlusPlus(1, 1, features=(width, 8), dropout=dropout, deep_supervision=True)
    samples, _ = find_samples(folder)
    patches = Patches(samples[:-1], 32, per_image=2, seed=0)
    recipe = Recipe(**{"epochs": 3, "batch_size": 2, **recipe})
    return Trainer(network, patches, samples[-1:] if validate else [], recipe, out, about, loss)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_nuclei(tmp_path_factory.mktemp("nuclei"), count=5)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def assert_same_run(one: Path, other: Path) -> None:
    """Two folders hold the same log, weights and optimizer state to the last bit."""
    assert (one / "log.csv").read_text() == (other / "log.csv").read_text()
    for name in ("last.pt", "best.pt"):
        a, b = weights(one / name), weights(other / name)
        assert all(torch.equal(a[key], b[key]) for key in a | b)
    a, b = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    assert a["progress"] == b["progress"] and a["best"] == b["best"] and a["history"] == b["history"]
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"]) and a.get("schedule") == b.get("schedule")
    assert all(torch.equal(value, b["ema"][key]) for key, value in a.get("ema", {}).items())
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[name], b["optimizer"]["state"][key][name]) for name in state)


def test_a_run_learns_and_logs_every_epoch(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, epochs=6, learning_rate=3e-3)
    history = trainer.fit(progress=False)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    with open(tmp_path / "log.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == history
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "log.csv", "scores.json"]


def test_best_is_the_epoch_with_the_highest_validation_iou(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, epochs=5, learning_rate=3e-3)
    history = trainer.fit(progress=False)
    ious = [row["val_iou"] for row in history]
    network, content = load_model(tmp_path / "best.pt")
    assert content["epoch"] == 1 + int(np.argmax(ious)) and content["best"] == max(ious)
    assert evaluation.evaluate(network, trainer.validation)["iou"] == max(ious)
    assert not network.training


def test_training_stops_early_when_validation_does_not_improve(folder, tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.6, 0.4, 0.9])
    monkeypatch.setattr(
        trainer_module.evaluation, "evaluate", lambda *_, **__: {"loss": 1.0, "iou": next(scores), "dice": 0.0}
    )
    trainer = make_trainer(folder, tmp_path, epochs=5, patience=2)
    assert len(trainer.fit(progress=False)) == 4
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 2


def test_without_validation_every_epoch_runs(folder):
    history = make_trainer(folder, None, validate=False, patience=1).fit(progress=False)
    assert len(history) == 3 and np.isnan(history[0]["val_iou"])


def test_a_form_that_does_not_return_logits_is_refused():
    network = uf.UNetPlusPlus(1, 1, features=(4, 8))
    network.form = "sigmoid"
    with pytest.raises(InputError, match='form = "plain" to train'):
        Trainer(network, Patches([], 32, per_image=1, seed=0), [], Recipe())


def test_the_seed_determines_the_run(folder):
    losses = [make_trainer(folder, None, validate=False, epochs=1).fit(progress=False)[0]["train_loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    other = make_trainer(folder, None, validate=False, epochs=1)
    other.patches.seed = 1
    assert other.fit(progress=False)[0]["train_loss"] != losses[0]


def test_the_loss_of_the_log_is_the_mean_over_images(folder, monkeypatch):
    trainer = make_trainer(folder, None, validate=False, epochs=1, batch_size=3)  # 8 patches: batches of 3, 3 and 2
    seen = []
    forward = trainer.loss.forward
    monkeypatch.setattr(trainer.loss, "forward", lambda out, y: seen.append((forward(out, y), len(y))) or seen[-1][0])
    (row,) = trainer.fit(progress=False)
    assert [count for _, count in seen] == [3, 3, 2]
    expected = sum(loss.item() * count for loss, count in seen) / 8
    assert row["train_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("step", [1, 3])
def test_a_run_stopped_within_an_epoch_resumes_exactly(folder, tmp_path, monkeypatch, epoch, step):
    make_trainer(folder, tmp_path / "whole").fit(progress=False)
    broken = make_trainer(folder, tmp_path / "broken")
    run_step = broken.train_step.run

    def stop_at(*batch):
        broken._stop = (broken.epoch, broken.step + 1) == (epoch, step)
        return run_step(*batch)

    monkeypatch.setattr(broken.train_step, "run", stop_at)
    with pytest.raises(Interrupted):
        broken.fit(progress=False)
    assert load_checkpoint(tmp_path / "broken/last.pt")["progress"]["step"] == step
    resumed = make_trainer(folder, tmp_path / "broken")
    torch.manual_seed(99)
    resumed.resume()
    resumed.fit(progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_fails_in_its_first_validation_resumes_exactly(folder, tmp_path, monkeypatch):
    make_trainer(folder, tmp_path / "whole").fit(progress=False)

    def fails(*_, **__):
        raise torch.OutOfMemoryError("validating")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(trainer_module.evaluation, "evaluate", fails)
        make_trainer(folder, tmp_path / "broken").fit(progress=False)
    content = load_checkpoint(tmp_path / "broken/last.pt")
    assert content["epoch"] == 0 and content["progress"]["step"] == 4
    resumed = make_trainer(folder, tmp_path / "broken")
    torch.manual_seed(99)
    resumed.resume()
    resumed.fit(progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def arguments(folder: Path, out: Path) -> list[str]:
    """A training long enough to be killed in its first epochs."""
    settings = ["--epochs", str(EPOCHS), "--patches-per-image", "6", "--patience", str(EPOCHS)]
    return [*COMMAND, "--data", str(folder), "--out", str(out), *settings, *EVERYTHING]


def start(folder: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "unetpp_fast", *arguments(folder, out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread)


def wait_for_epochs(process: subprocess.Popen, out: Path, count: int) -> None:
    """Until the log of a running training has `count` rows."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.csv").exists() and (out / "log.csv").read_text().count("\n") > count:
            return
        time.sleep(0.01)
    pytest.fail(f"the training ended or hung before epoch {count}: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert run(*arguments(folder, out)) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_run_resumes_to_the_same_log_and_weights(folder, whole, tmp_path, capsys, number):
    broken = start(folder, tmp_path)
    wait_for_epochs(broken, tmp_path, 2)
    os.kill(broken.pid, number)
    text, _ = broken.communicate(timeout=120)
    assert broken.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), text
    rows = (tmp_path / "log.csv").read_text().count("\n") - 1
    assert 2 <= rows < EPOCHS
    assert run(*arguments(folder, tmp_path), "--resume") == 0
    assert "resuming after epoch" in capsys.readouterr().out
    assert_same_run(whole, tmp_path)


def test_a_finished_run_can_be_extended(folder, tmp_path):
    make_trainer(folder, tmp_path / "whole", epochs=3).fit(progress=False)
    make_trainer(folder, tmp_path / "resumed", epochs=2).fit(progress=False)
    longer = make_trainer(folder, tmp_path / "resumed", epochs=3)
    longer.resume()
    longer.fit(progress=False)
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "resumed/log.csv").read_text()


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("make_loss", [lambda: uf.BCEDiceLoss(smooth=1.0), WeightedEntropy], ids=["smooth", "entropy"])
def test_another_loss_trains_and_resumes(folder, tmp_path, make_loss, reproducible):
    recipe = {"epochs": 2, "learning_rate": 3e-3, "reproducible": reproducible}
    history = make_trainer(folder, tmp_path / "whole", loss=make_loss(), **recipe).fit(progress=False)
    usual = make_trainer(folder, None, **recipe).fit(progress=False)
    for key in ("train_loss", "val_loss"):
        assert history[1][key] < history[0][key] and history[0][key] != usual[0][key]
    make_trainer(folder, tmp_path / "resumed", loss=make_loss(), **{**recipe, "epochs": 1}).fit(progress=False)
    resumed = make_trainer(folder, tmp_path / "resumed", loss=make_loss(), **recipe)
    resumed.resume()
    resumed.fit(progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_a_checkpoint_without_a_loss_has_the_default_one(folder, tmp_path):
    make_trainer(folder, tmp_path, epochs=1).fit(progress=False)
    content = load_checkpoint(tmp_path / "last.pt")
    assert content.pop("loss") == "BCEDiceLoss(smooth=1e-05)"
    del content["unetpp_fast"]
    save_checkpoint(tmp_path / "last.pt", content)
    make_trainer(folder, tmp_path).resume()
    with pytest.raises(InputError, match=r"another loss='BCEDiceLoss\(smooth=1e-05\)', now 'BCEDiceLoss\(smooth=1.0\)'"):
        make_trainer(folder, tmp_path, loss=uf.BCEDiceLoss(1.0)).resume()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 1}, r"last\.pt was made with another batch_size=2, now 1"),
        ({"learning_rate": 1.0}, r"another learning_rate=0\.0003, now 1\.0"),
        ({"width": 5}, r"another model"),
        ({"about": {"classes": ["b"]}}, r"another classes=\['a'\], now \['b'\]"),
        ({"about": {"classes": ["x" * 99]}}, r"another classes set"),
        ({"loss": uf.BCEDiceLoss(1.0)}, r"another loss='BCEDiceLoss\(smooth=1e-05\)', now 'BCEDiceLoss\(smooth=1\.0\)'"),
        ({"loss": WeightedEntropy()}, r"another loss: resume with the same"),
    ],
)
def test_resuming_with_other_settings_names_them(folder, tmp_path, change, says):
    make_trainer(folder, tmp_path, epochs=1, about={"classes": ["a"]}).fit(progress=False)
    other = make_trainer(folder, tmp_path, **{"about": {"classes": ["a"]}, **change})
    with pytest.raises(InputError, match=says):
        other.resume()


def test_a_best_model_cannot_be_resumed(folder, tmp_path):
    make_trainer(folder, tmp_path, epochs=1).fit(progress=False)
    (tmp_path / "best.pt").rename(tmp_path / "last.pt")
    with pytest.raises(InputError, match="not the state of a training run"):
        make_trainer(folder, tmp_path).resume()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, epochs=1)
    trainer.fit(progress=False)
    before = (tmp_path / "last.pt").read_bytes()
    broken = make_trainer(folder, tmp_path, epochs=2)
    broken.resume()
    with torch.no_grad():
        next(iter(broken.network.heads.values())).bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"loss became nan in epoch 2: lower the learning rate.*last\.pt"):
        broken.fit(progress=False)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_step_that_breaks_the_weights_is_not_saved(folder, tmp_path):
    """In the last step of an epoch, whose effect no loss of that epoch shows."""
    make_trainer(folder, tmp_path, epochs=1, batch_size=8).fit(progress=False)  # one step per epoch
    before = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "best.pt", "log.csv")}
    broken = make_trainer(folder, tmp_path, epochs=2, batch_size=8)
    broken.resume()
    for group in broken.train_step.optimizer.param_groups:
        group["lr"] = float("inf")
    with pytest.raises(InputError, match=r"a weight became infinite or NaN in epoch 2: lower the learning rate.*last\.pt"):
        broken.fit(progress=False)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"config": {}, "value": 1})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "a.pt", {"config": {}, "value": (number for number in ())})
    assert load_checkpoint(tmp_path / "a.pt")["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_truncated_checkpoints_are_named(folder, tmp_path, fraction):
    make_trainer(folder, tmp_path, epochs=1).fit(progress=False)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(InputError, match=r"last\.pt is not a readable checkpoint \(truncated"):
        load_model(tmp_path / "last.pt")


def test_checkpoints_of_others_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="is not a checkpoint of `unetpp-fast train`"):
        load_model(tmp_path / "other.pt")
    network = uf.UNet(1, 1, features=(4, 8))
    save_checkpoint(tmp_path / "mixed.pt", {"config": network.config, "model": {}, "about": {}})
    with pytest.raises(InputError, match="does not hold the weights of the network it describes"):
        load_model(tmp_path / "mixed.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    torch.save({"unetpp_fast": 1, "config": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match="not a readable checkpoint: it holds Python objects, which could run code"):
        load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"dtype": "int8"}, {"seed": 2**63}]
)
def test_a_recipe_that_cannot_train_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Recipe(**wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_resumes(folder, tmp_path, dtype):
    """With float16 the loss scale is resumed too. Gradients are clipped after it is divided out."""
    more = {"dtype": dtype, "clip": 0.5, "ema": 0.9, "warm_up": 0.5}
    history = make_trainer(folder, tmp_path / "whole", **more).fit(progress=False)
    assert all(np.isfinite(row["train_loss"]) for row in history)
    make_trainer(folder, tmp_path / "resumed", epochs=1, **more).fit(progress=False)
    resumed = make_trainer(folder, tmp_path / "resumed", **more)
    resumed.resume()
    resumed.fit(progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    one, other = (load_checkpoint(tmp_path / name / "last.pt")["scaler"] for name in ("whole", "resumed"))
    assert one == other and bool(one) == (dtype == "float16")
