"""Long runs: errors name their cause and keep the last good state; micro-batches; memory budgets; the folder of a run."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.folders import write_nuclei
from support.helpers import FLOAT64, assert_gradients_close, build, gradients, make_input
from support.measured import forget

import unetpp_fast as uf
from unetpp_fast.cli import parser, train
from unetpp_fast.common import atomic_files
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.pairs import find_samples
from unetpp_fast.data.patches import BatchLoader, Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.execution import reference
from unetpp_fast.execution.fused import verdicts
from unetpp_fast.training import checkpoint, memory_budget, processes, run_folder
from unetpp_fast.training.checkpoint import load_checkpoint
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Trainer

SMALL = ("--features", "4,8", "--patch", "32", "--epochs", "2", "--device", "cpu")


def make_trainer(folder: Path, out: Path | None, norm: str | None = "batch", **recipe) -> Trainer:
    samples, _ = find_samples(folder)
    patches = Patches(samples, 32, per_image=2, seed=0)
    network = build(uf.UNetPlusPlus, 1, 1, features=(4, 8), norm=norm, deep_supervision=True)
    return Trainer(network, patches, [], Recipe(**{"epochs": 1, "batch_size": 2, **recipe}), out)


def run(*arguments: str | Path) -> int:
    return parser.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_nuclei(tmp_path_factory.mktemp("nuclei"), count=5)


def test_the_batch_that_breaks_the_loss_is_named_and_kept(folder, tmp_path):
    """Several batches after the last check of the loss: the batch that broke it is named, not the last one."""
    trainer = make_trainer(folder, tmp_path)
    wrong = trainer.patches.batches(0, 2)[2]
    run_step = trainer.train_step.run
    factor = {2: float("nan")}
    trainer.train_step.run = lambda image, mask, batch: run_step(image * factor.get(trainer.step, 1.0), mask, batch)
    names = [trainer.patches.samples[draw % 5].name for _, draw in wrong]
    with pytest.raises(
        InputError, match=rf"loss became nan in epoch 1: .*batch 3, of {', '.join(names)}, kept in .*bad-batch"
    ):
        trainer.fit(progress=False)
    kept = torch.load(tmp_path / "bad-batch.pt", weights_only=True)
    assert kept["names"] == names and (kept["epoch"], kept["batch"]) == (1, 3)
    assert torch.equal(kept["image"], torch.stack([trainer.patches[item][0] for item in wrong]))
    assert torch.equal(kept["mask"], torch.stack([trainer.patches[item][1] for item in wrong]))
    assert not (tmp_path / "last.pt").exists()


def test_float16_may_skip_a_step_but_not_every_step(folder, monkeypatch):
    trainer = make_trainer(folder, None, dtype="float16")
    backward, overflows = trainer.train_step._backward, [1]

    def overflow(*batch):
        totals = backward(*batch)
        if overflows.pop() if overflows else False:
            trainer.network.heads["x0_1"].bias.grad.fill_(float("inf"))
        return totals

    trainer.train_step._backward = overflow
    trainer.fit(progress=False)
    assert trainer.train_step.scaler.get_scale() == 2.0**15
    again = make_trainer(folder, None, dtype="float16", epochs=9)
    trainer, backward, overflows = again, again.train_step._backward, [1] * 99
    again.train_step._backward = overflow
    with pytest.raises(InputError, match="step after step overflowed float16 in epoch 4"):
        again.fit(progress=False)


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("norm", [None, "instance"])
def test_micro_batches_give_the_gradients_of_the_batch(folder, norm, count):
    """Also if their sizes differ, or there are fewer images than `accumulate`."""
    results = []
    for accumulate in (1, count):
        trainer = make_trainer(folder, None, norm, accumulate=accumulate)
        trainer.network.double()
        sizes, forward = [], trainer.network.forward
        trainer.network.forward = lambda x, forward=forward, sizes=sizes: sizes.append(len(x)) or forward(x)
        x = make_input(4, 1, 16, 16, dtype=torch.float64)
        totals = trainer.train_step.run(x, (x > 0).double(), 4)
        results.append((sizes, gradients(trainer.network), totals))
    (_, expected, expected_totals), (sizes, accumulated, totals) = results
    assert sizes == {2: [2, 2], 3: [2, 1, 1], 9: [1, 1, 1, 1]}[count]
    assert_gradients_close(accumulated, expected, FLOAT64)
    assert totals.tolist() == pytest.approx(expected_totals.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("patches", "batch", "accumulate", "size", "fits"),
    [
        (5, 5, 1, 1, True), (6, 5, 1, 1, False), (5, 5, 3, 1, False), (5, 9, 3, 1, False), (6, 6, 3, 1, True),
        (9, 5, 3, 2, False),  # one micro-batch of the first batch has one image; those of the last batch have two
        (8, 4, 2, 2, True),
    ],
)  # fmt: skip
def test_no_micro_batch_is_too_small_for_batch_norm(monkeypatch, patches, batch, accumulate, size, fits):
    """In a network whose lowest map has one pixel."""
    model = build(uf.UNetPlusPlus, 1, 1, features=(3, 4))
    array = np.zeros((1, 8, 8), np.float32)
    drawn = Patches([ArraySample("one", array, array > 0)], 2, per_image=patches, seed=0)
    monkeypatch.setattr(processes, "size", lambda: size)
    recipe = Recipe(batch_size=batch, accumulate=accumulate)
    if fits:
        train._check_batches(model, drawn, recipe)
        return
    with pytest.raises(InputError, match="more than one value"):
        train._check_batches(model, drawn, recipe)


@pytest.fixture
def full_disk(monkeypatch):
    """A function after whose call the disk is full."""

    class Full:
        def __init__(self, stream):
            self.stream, self.left = stream, 1000

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, values):
            self.left -= len(values)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(values)

    fdopen = os.fdopen
    return lambda: monkeypatch.setattr(atomic_files.os, "fdopen", lambda *rest: Full(fdopen(*rest)))


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(folder, tmp_path, full_disk):
    make_trainer(folder, tmp_path).fit(progress=False)
    before = (tmp_path / "last.pt").read_bytes()
    trainer = make_trainer(folder, tmp_path, epochs=2)
    trainer.resume()
    full_disk()
    with pytest.raises(
        InputError, match=r"cannot write .*last\.pt \(No space left on device\): free some space; the earlier file"
    ):
        trainer.fit(progress=False)
    assert (tmp_path / "last.pt").read_bytes() == before and load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "log.csv"]


def test_a_disk_that_fills_at_the_last_moment(tmp_path, monkeypatch):
    """When the system flushes its buffers."""
    atomic_files.write_atomic(tmp_path / "a", lambda stream: stream.write(b"old"))
    monkeypatch.setattr(
        atomic_files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded"))
    )
    with pytest.raises(OSError, match=r"Disk quota exceeded.*the earlier file is unchanged"):
        atomic_files.write_atomic(tmp_path / "a", lambda stream: stream.write(b"new"))
    with pytest.raises(InputError, match=r"free some space$"):
        atomic_files.write_atomic(tmp_path / "b", lambda stream: stream.write(b"new"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


class Dies(Patches):
    """Patches of which the fifth kills the process that reads it."""

    def __getitem__(self, item):
        if item[1] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)


def test_a_worker_process_that_dies_is_one_line(folder):
    samples, _ = find_samples(folder)
    patches = Dies(samples, 32, per_image=1, seed=0)
    batches = [[(0, draw)] for draw in range(5)]
    with pytest.raises(InputError, match=r"^a process that reads images ahead died \(.*\): use fewer --workers") as caught:
        list(BatchLoader(patches, 1, pin=False).load(batches))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line(tmp_path, workers):
    folder = write_nuclei(tmp_path, count=2)
    samples, _ = find_samples(folder)
    Image.new("L", (8, 8)).save(samples[1].masks[0])
    patches = Patches(samples, 32, per_image=1, seed=0)
    with pytest.raises(InputError, match=r"^mask .*cell1\.png is 8x8 but its image .* have the same size$"):
        list(BatchLoader(patches, workers, pin=False).load([[(0, 0)], [(0, 1)]]))


def test_a_step_s_memory_is_counted_from_its_tensors():
    """A step takes at least what autograd keeps per image, and four times the parameters."""
    model = build(uf.UNetPlusPlus, 1, 1, features=(8, 16, 32), deep_supervision=True)
    model.to("meta")
    kept = []
    for count in (4, 5):
        storages = {}
        x = torch.empty(count, 1, 64, 64, device="meta")
        hooks = lambda tensor, own=storages: own.setdefault(tensor.untyped_storage()._cdata, tensor) is None or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(hooks, lambda tensor: tensor):
            reference.forward(model, x)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
    per_image = memory_budget.step_bytes(model, (64, 64), 5) - memory_budget.step_bytes(model, (64, 64), 4)
    assert kept[1] - kept[0] <= per_image <= 1.5 * (kept[1] - kept[0])
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert memory_budget.step_bytes(model, (64, 64), 4) >= 4 * per_image + 3 * parameters
    model.recompute = True
    assert memory_budget.step_bytes(model, (64, 64), 8) < 0.7 * (8 * per_image + 4 * parameters)
    assert memory_budget.step_bytes(model, (64, 64), 8, "bfloat16") < memory_budget.step_bytes(model, (64, 64), 8)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_batch_fits_and_one_more_does_not(recompute):
    model = build(uf.UNetPlusPlus, 1, 1, features=(4, 8, 16))
    model.recompute = recompute
    limit = 40 * 2**20
    count = memory_budget.largest_batch(model, (64, 64), limit)
    assert count >= 2 and memory_budget.step_bytes(model, (64, 64), count) <= limit
    assert memory_budget.step_bytes(model, (64, 64), count + 1) > limit
    assert memory_budget.largest_batch(model, (64, 64), limit, most=1) == 1
    with pytest.raises(InputError, match=r"--max-memory is too small: a batch of one patch of 64x64 takes \d+M"):
        memory_budget.largest_batch(model, (64, 64), 2**20)


def test_the_loss_s_memory_is_counted():
    class Squares(torch.nn.Module):
        """Keeps more for the backward pass than the default loss."""

        def forward(self, outputs, target):
            maps = torch.cat([(head - target).square().exp() for head in outputs for _ in range(40)])
            return maps.square().mean()

    model = build(uf.UNetPlusPlus, 1, 1, features=(4, 8))
    usual, larger = (memory_budget.step_bytes(model, (64, 64), 4, loss=loss) for loss in (uf.BCEDiceLoss(), Squares()))
    assert memory_budget.step_bytes(model, (64, 64), 4) == usual
    assert larger - usual > 40 * 4 * 64 * 64 * 4
    counts = [memory_budget.largest_batch(model, (64, 64), 2 * usual, loss=loss) for loss in (None, Squares())]
    assert counts[0] > counts[1]


def test_a_run_s_folder(folder, tmp_path, capsys):
    """The batch size that fits is printed and saved; the same command with --resume keeps it."""
    memory = ("--max-memory", "5M", "--accumulate", "2", "--recompute")
    command = ("train", "--data", folder, "--out", tmp_path, *SMALL, *memory)
    assert run(*command) == 0
    expected = ["best.pt", "config.json", "curves.png", "last.pt", "log.csv", "report.html", "run.yaml", "scores.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    batch = load_checkpoint(tmp_path / "last.pt")["recipe"]["batch_size"]
    assert f"batches of {batch}: {batch // 2} image(s) at a time fit into 5M" in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"batch_size": batch, "accumulate": 2, "epochs": 2, "recompute": True, "dtype": "float32", "features": [4, 8]}
    assert expected.items() <= config.items() and config["version"] == uf.__version__
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 600
    before = (tmp_path / "curves.png").read_bytes()
    assert run(*command, "--epochs", "3", "--resume") == 0
    with open(tmp_path / "log.csv", newline="") as stream:
        assert [int(row["epoch"]) for row in csv.DictReader(stream)] == [1, 2, 3]
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert (tmp_path / "curves.png").read_bytes() != before


def test_a_memory_too_small_for_one_image_is_one_line(folder, tmp_path, capsys):
    assert run("train", "--data", folder, "--out", tmp_path / "out", *SMALL, "--max-memory", "10K") == 2
    text = capsys.readouterr().err
    assert "--max-memory is too small" in text and text.count("\n") == 1 and not (tmp_path / "out").exists()


def test_tensorboard_s_events_hold_every_epoch(folder, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("train", "--data", folder, "--out", tmp_path, *SMALL, "--tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    with open(tmp_path / "log.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for name in run_folder.COLUMNS[1:]:
        values = [(event.step, event.value) for event in events.Scalars(name.replace("_", "/"))]
        assert values == [(int(row["epoch"]), pytest.approx(float(row[name]), rel=1e-6)) for row in rows]


def test_without_tensorboard_the_extra_is_named(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run("train", "--data", folder, "--out", tmp_path, *SMALL, "--tensorboard") == 2
    assert "tensorboard is missing: pip install 'unetpp_fast[tensorboard]'" in capsys.readouterr().err


def test_an_older_checkpoint_resumes(folder, tmp_path):
    """One from before micro-batches."""
    make_trainer(folder, tmp_path).fit(progress=False)
    content = load_checkpoint(tmp_path / "last.pt")
    del content["recipe"]["accumulate"], content["unetpp_fast"]
    checkpoint.save_checkpoint(tmp_path / "last.pt", content)
    trainer = make_trainer(folder, tmp_path)
    trainer.resume()
    assert trainer.epoch == 1
    with pytest.raises(InputError, match="another accumulate=1, now 2"):
        make_trainer(folder, tmp_path, accumulate=2).resume()


def test_a_resumed_run_takes_the_backends_that_the_run_took(folder, tmp_path, monkeypatch):
    """Whatever was measured since, or was lost."""
    monkeypatch.setenv("UNETPP_FAST_CACHE", str(tmp_path / "cache"))
    first = make_trainer(folder, tmp_path / "run", epochs=1)
    key, verdict = (
        f"{first.network.structure.key} torch.float32 training 2x32x32",
        {"backend": "cpu", "right": True, "ratio": 2.0},
    )
    cpu = torch.device("cpu")
    verdicts.keep(cpu, key, verdict)
    verdicts.keep(cpu, "another network's torch.float32 training 2x32x32", verdict)
    first.fit(progress=False)
    assert list(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["measured"][verdicts.setting(cpu)]) == [key]
    verdicts.keep(cpu, key, {**verdict, "ratio": 0.5})
    make_trainer(folder, tmp_path / "run", epochs=2).resume()
    assert verdicts.recall(cpu, key) == (verdict, False)
    forget()
