"""Training by two processes (Gloo, CPU): the weights of one process, files written once, an error when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support.folders import write_nuclei
from support.helpers import FLOAT64, assert_close_relative, build
from support.processes import run_processes

import unetpp_fast as uf
from unetpp_fast.cli import parser
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.execution.fused import ops
from unetpp_fast.experiments import demo
from unetpp_fast.training import processes, run_folder
from unetpp_fast.training.checkpoint import load_checkpoint
from unetpp_fast.training.evaluation import evaluate
from unetpp_fast.training.trainer import Interrupted, Recipe, Trainer

# Relative differences of weights. A gradient that is as small as its rounding error still makes a whole step of Adam, so in
# float32 the weights are compared after one epoch; float64 shows whether two processes do the same as one.
CLOSE = {torch.float32: 1e-5, torch.float64: FLOAT64}
FEATURES = (4, 6, 8)
NETWORKS = {
    "demo": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, deep_supervision=True),
    "nested": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, deep_supervision=True),
    "one head": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, norm=None),
    "unet": lambda: build(uf.UNet, 1, 1, features=FEATURES),
    "pruned": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, deep_supervision=True).prune(1),
    "accumulated": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, norm="instance"),
    "recomputed": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, deep_supervision=True),
    "kernels": lambda: build(uf.UNetPlusPlus, 1, 1, features=(3, 4), deep_supervision=True, backend="triton"),
    "reproducible": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, deep_supervision=True),
    "reproducible, small": lambda: build(uf.UNetPlusPlus, 1, 1, features=(3, 3, 3), norm="instance"),
    "reproducible, one pixel": lambda: build(uf.UNetPlusPlus, 1, 1, features=(4, 4, 4)),
    "dropout": lambda: build(uf.UNetPlusPlus, 1, 1, features=FEATURES, dropout=0.3),
}
CASES = [name for name in NETWORKS if name != "dropout"]
if not (ops.HAS_TRITON and ops.INTERPRETED):
    CASES.remove("kernels")


class Doubles(Patches):
    """Patches in float64."""

    def __getitem__(self, item):
        image, mask = super().__getitem__(item)
        return image.double(), mask.double()


EVERYTHING = {"optimizer": "adamw", "schedule": "cosine", "warm_up": 0.5, "clip": 0.5, "ema": 0.9}


def validation() -> list[ArraySample]:
    _, right = demo.halves()
    return [ArraySample(str(i), right.image[..., 40 * i :][..., :40, :40], right.mask[..., :40, :40]) for i in range(3)]


def make_trainer(name: str, out: Path | None = None, **recipe) -> Trainer:
    """A trainer on the left half of the demo's image, with batches of 4, 4 and 1 patches; the last one leaves one process
    without an image.

    It runs two epochs in float64. In float32 it runs one epoch of the demo, one batch of 3 for the kernels, or two epochs of
    reproducible training, in which no bit may differ.
    """
    network, (left, _) = NETWORKS[name](), demo.halves()
    network.recompute = name == "recomputed"
    side = {"kernels": 8, "reproducible, small": 12, "reproducible, one pixel": 4}.get(name, 32)
    draws, batch = (3, 3) if name == "kernels" else (9, {32: 4, 12: 5, 4: 3}[side])
    same = name.startswith("reproducible")
    if same and processes.rank():  # the weights of rank 0 are used
        network.nodes["x0_0"].conv1.weight.data.add_(1)
    wide = name not in ("demo", "kernels", "dropout") and not same
    patches = (Doubles if wide else Patches)([left], side, per_image=draws, seed=1)
    recipe = {"batch_size": batch, "accumulate": {"accumulated": 3, "reproducible": 2}.get(name, 1), "epochs": 2, **recipe}
    recipe |= EVERYTHING if name in ("accumulated", "reproducible") else {}
    recipe |= {"learning_rate": 1e-3} if wide else {"reproducible": same}
    recipe |= {"epochs": 1} if name in ("demo", "kernels") else {}
    samples = validation() if name in ("demo", "dropout") else []
    return Trainer(network.double() if wide else network, patches, samples, Recipe(**recipe), out)


def all_weights(trainer: Trainer) -> dict:
    averaged = {f"average of {key}": value for key, value in trainer.train_step.validated.state_dict().items()}
    return {**trainer.network.state_dict(), **averaged}


def trained(name: str) -> dict:
    trainer = make_trainer(name)
    history = trainer.fit(progress=False)
    return {"weights": all_weights(trainer), "history": history}


def demo_weights() -> dict:
    """UNet++ after five steps of the demo: its widths, patches, batches and learning rate, in float32."""
    (left, _), recipe = demo.halves(), demo.make_recipe(epochs=1, reproducible=True)
    options = {"features": demo.FEATURES, "deep_supervision": True}
    with patch.object(demo, "STEPS_PER_EPOCH", 5):
        return dict(demo.trained("UNet++", uf.UNetPlusPlus, left, recipe, "cpu", demo.PATCH, **options).state_dict())


def resumed_with_dropout(out: Path) -> list[dict]:
    """The weights of an uninterrupted run, and of a run that was resumed after its first epoch."""
    whole = make_trainer("dropout", out / "whole")
    whole.fit(progress=False)
    make_trainer("dropout", out / "resumed", epochs=1).fit(progress=False)
    resumed = make_trainer("dropout", out / "resumed")
    torch.manual_seed(99)
    resumed.resume()
    resumed.fit(progress=False)
    return [dict(trainer.network.state_dict()) for trainer in (whole, resumed)]


def diverged(out: Path) -> str:
    """The error of a run in which a mask of the first batch is not finite."""
    trainer = make_trainer("demo", out)
    trainer.patches.load = lambda index, load=trainer.patches.load: (load(index)[0], load(index)[1] * float("nan"))
    try:
        trainer.fit(progress=False)
    except InputError as error:
        return str(error)
    return ""


def stopped(rank: int, out: Path) -> list[int]:
    """Epochs and steps of a run in which only the second process is asked to stop."""
    trainer = make_trainer("nested", out)
    trainer._stop = rank == 1
    try:
        trainer.fit(progress=False)
    except Interrupted:
        return [trainer.epoch, trainer.step]
    return []


def everything(rank: int, out: str) -> dict:
    """Everything that needs two processes: they start only once."""
    folder = Path(out)
    make_trainer("nested", folder / "half", epochs=1).fit(progress=False)
    return {
        "trained": {name: trained(name) for name in CASES},
        "scores": evaluate(NETWORKS["demo"](), validation()),
        "demo": demo_weights(),
        "resumed": resumed_with_dropout(folder / "dropout"),
        "diverged": diverged(folder / "diverged"),
        "stopped": stopped(rank, folder / "stopped"),
        "first": processes.is_first(),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(tmp_path_factory, place) -> list[dict]:
    return run_processes(everything, tmp_path_factory.mktemp("two"), str(place))


def assert_same_weights(weights: dict, expected: dict) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        try:
            bound = CLOSE[weight.dtype] if weight.is_floating_point() else 0
            assert_close_relative(weights[name], weight, bound, floor=1.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_to_the_weights_of_one(two, name):
    one = trained(name)
    results = [of_process["trained"][name] for of_process in two]
    for result in results:
        assert_same_weights(result["weights"], one["weights"])
        for row, expected in zip(result["history"], one["history"], strict=True):
            for key, value in expected.items():
                assert row[key] == pytest.approx(value, abs=CLOSE[torch.float32], nan_ok=True), key
        if name.startswith("reproducible"):
            assert all(torch.equal(result["weights"][key], value) for key, value in one["weights"].items())
    first, second = (result["weights"] for result in results)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["reproducible", "reproducible, small"])
def test_two_threads_train_to_the_weights_of_one(two, threads, name):
    threads(2)
    one, weights = trained(name), two[0]["trained"][name]["weights"]
    assert all(torch.equal(weights[key], value) for key, value in one["weights"].items())


def test_two_processes_train_the_demo_to_the_weights_of_one(two, threads):
    """At the size of the demo, where one bit that differs changes the weights within a few steps; the one process computes
    two images at a time."""
    threads(2)
    one = demo_weights()
    for of_process in two:
        assert [name for name, weight in one.items() if not torch.equal(of_process["demo"][name], weight)] == []


def test_sharded_validation_gives_the_same_numbers(two):
    expected = evaluate(NETWORKS["demo"](), validation())
    assert [of_process["scores"] for of_process in two] == [expected, expected]


def test_one_process_resumes_a_run_of_two(two, place):
    trainer = make_trainer("nested", place / "half")
    trainer.resume()
    assert trainer.epoch == 1
    trainer.fit(progress=False)
    assert_same_weights(all_weights(trainer), trained("nested")["weights"])


def test_dropout_resumes_exactly_with_the_same_number_of_processes(two):
    for of_process in two:
        whole, resumed = of_process["resumed"]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_all_processes_raise_the_same_error_and_write_the_batch_once(two, place):
    first, second = (of_process["diverged"] for of_process in two)
    assert first == second and "loss became nan in epoch 1" in first and "batch 1, of left" in first
    kept = torch.load(place / "diverged/bad-batch.pt", weights_only=True)
    assert kept["image"].shape == (4, 1, 32, 32) and kept["mask"].isnan().all()


def test_all_processes_stop_when_one_is_asked_to(two, place):
    assert [of_process["stopped"] for of_process in two] == [[1, 0], [1, 0]]
    assert load_checkpoint(place / "stopped/last.pt")["epoch"] == 1
    assert [of_process["first"] for of_process in two] == [True, False]
    assert sorted(path.name for path in (place / "stopped").iterdir()) == ["last.pt", "log.csv"]


def torchrun(folder: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "unetpp_fast", *arguments(folder, out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def arguments(folder: Path, out: Path) -> list[str]:
    small = ["--features", "4,8", "--patch", "32", "--batch-size", "3", "--patience", "900", "--device", "cpu"]
    return ["train", *small, "--data", str(folder), "--out", str(out)]


def second_process(parent: int) -> int:
    """The process ID of rank 1 among the children of torchrun."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("torchrun did not start a second process")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes of torchrun in /proc")
def test_a_killed_process_ends_the_run_with_a_message_and_it_can_be_resumed(tmp_path):
    folder, out = write_nuclei(tmp_path / "data", count=4), tmp_path / "out"
    run = torchrun(folder, out, "--epochs", "900")
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and run.poll() is None:
            if (out / "log.csv").exists() and (out / "log.csv").read_text().count("\n") > 2:
                break
            time.sleep(0.02)
        os.kill(second_process(run.pid), signal.SIGKILL)
        text, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode != 0 and "another process of this training ended" in text and "--resume continues" in text, text
    done = load_checkpoint(out / "last.pt")["epoch"]
    assert 2 <= done < 900
    assert parser.main([*arguments(folder, out), "--epochs", str(done + 1), "--resume"]) == 0
    rows = (out / "log.csv").read_text().splitlines()
    assert rows[0] == ",".join(run_folder.COLUMNS)
    assert [int(row.split(",")[0]) for row in rows[1:]] == [*range(1, done + 2)]


def test_each_process_needs_a_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="not on 'mps'"), processes.joined("mps"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(InputError, match="process 99 has no GPU, there are"), processes.joined("cuda"):
        pass
