"""Training on label maps: a run that was stopped within an epoch, and two processes, give the weights of an unbroken one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import FLOAT64, assert_close_relative, build
from support.medical_files import write_picture
from support.processes import run_processes

import unetpp_fast as uf
from unetpp_fast.data.layouts import read_folder
from unetpp_fast.data.patches import Patches
from unetpp_fast.training.checkpoint import load_checkpoint
from unetpp_fast.training.evaluation import evaluate
from unetpp_fast.training.trainer import Interrupted, Recipe, Trainer


class Doubles(Patches):
    """Patches in float64."""

    def __getitem__(self, item):
        image, mask = super().__getitem__(item)
        return image.double(), mask.double()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six images of three classes; one image lacks a class, some pixels are ignored, those of one image nearly all."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for index in range(6):
        labels = random.integers(0, 3 if index else 2, (4, 5)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        values = labels * 60 + random.integers(0, 50, labels.shape)
        labels[: 30 if index == 1 else 3] = 255
        write_picture(root / f"{'val' if index > 3 else 'train'}/images/{index}.png", values.astype(np.uint8))
        write_picture(root / f"{'val' if index > 3 else 'train'}/labels/{index}.png", labels)
    return root


def make_trainer(data: Path, out: Path | None, kind: type[Patches] = Patches, **recipe) -> Trainer:
    """Batches of 3, 3, 3 and 1 patches: of the last one process gets none."""
    folder = read_folder(data)
    network = build(uf.UNetPlusPlus, 1, len(folder.classes), features=(4, 6), deep_supervision=True)
    wide = kind is Doubles
    patches = kind(folder.samples[: 2 if wide else None], 16, per_image=5 if wide else 3, seed=1)
    settings = Recipe(**{"batch_size": 3, "epochs": 2, "learning_rate": 1e-2, **recipe})
    validation = [] if wide else folder.validation
    return Trainer(network.double() if wide else network, patches, validation, settings, out, loss=uf.CrossEntropyDiceLoss())


def stop(trainer: Trainer, epoch: int, step: int) -> None:
    """Asks a run to stop after a step."""
    run = trainer.train_step.run

    def stop_at(*batch):
        trainer._stop = (trainer.epoch, trainer.step + 1) == (epoch, step)
        return run(*batch)

    trainer.train_step.run = stop_at
    with pytest.raises(Interrupted):
        trainer.fit(progress=False)


@pytest.mark.parametrize(("epoch", "step"), [(0, 2), (1, 3)])
def test_a_run_stopped_within_an_epoch_resumes_exactly(data, tmp_path, epoch, step):
    make_trainer(data, tmp_path / "whole").fit(progress=False)
    stop(make_trainer(data, tmp_path / "broken"), epoch, step)
    trainer = make_trainer(data, tmp_path / "broken")
    trainer.resume()
    trainer.fit(progress=False)
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "broken/log.csv").read_text()
    for name in ("last.pt", "best.pt"):
        whole, broken = (load_checkpoint(tmp_path / run / name) for run in ("whole", "broken"))
        assert all(torch.equal(broken["model"][key], value) for key, value in whole["model"].items())
        assert whole["scores"]["confusion"] == broken["scores"]["confusion"]


def everything(rank: int, data: str, out: str) -> dict:
    """Everything that needs two processes: they start only once."""
    trainer = make_trainer(Path(data), None, Doubles)
    history = trainer.fit(progress=False)
    scores = evaluate(*judged(Path(data)), loss=uf.CrossEntropyDiceLoss())
    make_trainer(Path(data), Path(out) / "half", epochs=1).fit(progress=False)
    torch.distributed.barrier()  # the first process writes the file that both read
    resumed = make_trainer(Path(data), Path(out) / "half")
    resumed.resume()
    resumed.fit(progress=False)
    whole = make_trainer(Path(data), Path(out) / "whole")
    whole.fit(progress=False)
    weights = [dict(one.network.state_dict()) for one in (trainer, resumed, whole)]
    return {"weights": weights, "history": history, "scores": scores}


def judged(data: Path) -> tuple:
    folder = read_folder(data)
    return build(uf.UNetPlusPlus, 1, 3, features=(4, 6), deep_supervision=True), [*folder.samples, *folder.validation]


def test_two_processes_train_score_and_resume_as_one(data, tmp_path):
    (tmp_path / "group").mkdir()
    two = run_processes(everything, tmp_path / "group", str(data), str(tmp_path))
    trainer = make_trainer(data, None, Doubles)
    history = trainer.fit(progress=False)
    scores = evaluate(*judged(data), loss=uf.CrossEntropyDiceLoss())
    for found in two:
        for name, weight in trainer.network.state_dict().items():
            assert_close_relative(found["weights"][0][name], weight, FLOAT64, floor=1.0)
        assert [row["train_loss"] for row in found["history"]] == pytest.approx([row["train_loss"] for row in history])
        assert found["scores"]["confusion"] == scores["confusion"]
        assert found["scores"]["loss"] == pytest.approx(scores["loss"], rel=1e-5)
        _, resumed, whole = found["weights"]
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    assert all(torch.equal(two[0]["weights"][1][name], weight) for name, weight in two[1]["weights"][1].items())
