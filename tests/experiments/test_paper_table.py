"""`unetpp-fast compare`: four networks trained by one recipe, their table, and that finished runs are not repeated."""

from __future__ import annotations

import csv
import itertools
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from support.folders import write_nuclei
from support.medical_files import write_picture, write_stage1

import unetpp_fast as uf
from unetpp_fast.cli import parser
from unetpp_fast.data import tasks
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.tasks import TASKS
from unetpp_fast.experiments import demo, paper_table
from unetpp_fast.training.trainer import Interrupted, Trainer

SMALL = ("compare", "--sample", "--width", "0.0625", "--epochs", "1", "--device", "cpu")


def run(*arguments: str | Path) -> int:
    return parser.main([str(argument) for argument in arguments])


def read(out: Path) -> list[dict]:
    with open(out / "compare.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 1)


def test_the_table_shows_the_four_rows_with_the_spread_of_the_seeds(tmp_path, capsys):
    assert run(*SMALL, "--seeds", "0,3", "--out", tmp_path) == 0
    lines = capsys.readouterr().out.split("\n")
    rows = read(tmp_path)
    assert [(row["model"], row["seed"]) for row in rows[:5]] == [
        ("U-Net", "0"), ("wide U-Net", "0"), ("UNet++", "0"), ("UNet++ with deep supervision", "0"), ("U-Net", "3"),
    ]  # fmt: skip
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][7]["iou"] == float(rows[7]["iou"])
    ious = {name: [float(row["iou"]) for row in rows if row["model"] == name] for name in {row["model"] for row in rows}}
    for line, contender in zip(lines[1:5], paper_table.CONTENDERS, strict=True):
        assert line.startswith(contender.name)
        mine = ious[contender.name]
        assert f"{statistics.mean(mine):.4f} ± {statistics.stdev(mine):.4f} ({min(mine):.4f} to {max(mine):.4f})" in line
        gains = [a - b for a, b in zip(mine, ious["U-Net"], strict=True)]
        assert line.endswith(paper_table.spread(gains, "+")) == (contender.name != "U-Net")
    assert lines[5].startswith("seeds 0, 3: ")


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_a_task_compares_the_networks_of_the_paper(tmp_path, width):
    material = paper_table.from_folder(write_stage1(tmp_path, count=6), TASKS["nuclei"], None, "float32")
    networks = [paper_table.build(contender, material, width) for contender in paper_table.CONTENDERS]
    paper = [uf.from_paper(one.arch, 3, 1, deep_supervision=one.deep_supervision) for one in paper_table.CONTENDERS]
    same = [mine.config == theirs.config for mine, theirs in zip(networks, paper, strict=True)]
    assert same == [width == 1] * 4
    assert networks[1].topology[0, 0].width == round(35 * width)
    parts = [{sample.name for sample in part} for part in (material.training, material.validation, material.test)]
    assert all(not a & b for a, b in itertools.combinations(parts, 2)) and len(set().union(*parts)) == 6
    assert material.recipe.learning_rate == 3e-4


def test_every_network_of_a_seed_sees_the_same_batches(tmp_path, monkeypatch):
    seen: dict[int, list[torch.Tensor]] = {}
    draw = Patches.__getitem__

    def record(self, item):
        image, mask = draw(self, item)
        seen.setdefault(self.seed, []).append(image)
        return image, mask

    monkeypatch.setattr(Patches, "__getitem__", record)
    assert run(*SMALL, "--seeds", "0,1", "--out", tmp_path) == 0
    batches = {seed: [torch.stack(images[first : first + 8]) for first in range(0, 32, 8)] for seed, images in seen.items()}
    assert [len(images) for images in seen.values()] == [32, 32]  # one batch of 8 per network
    assert all(torch.equal(batch, same[0]) for same in batches.values() for batch in same)
    assert not torch.equal(batches[0][0], batches[1][0])


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    fit = Trainer.fit

    def interrupt(self, *arguments, **options):
        if self.out.name == "unetpp-0":
            self._stop = True
        return fit(self, *arguments, **options)

    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 2)
    monkeypatch.setattr(Trainer, "fit", interrupt)
    assert run(*SMALL, "--seeds", "0", "--out", tmp_path / "broken") == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [row["model"] for row in read(tmp_path / "broken")] == ["U-Net", "wide U-Net"]
    started = []

    def record(self, *arguments, **options):
        started.append((self.out.name, self.step))
        return fit(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "fit", record)
    assert run(*SMALL, "--seeds", "0", "--out", tmp_path / "broken") == 0
    assert started == [("unetpp-0", 1), ("unetpp_ds-0", 0)]  # the interrupted one resumes within its epoch
    assert run(*SMALL, "--seeds", "0", "--out", tmp_path / "whole") == 0
    scores = [[(row["model"], row["iou"]) for row in read(tmp_path / name)] for name in ("broken", "whole")]
    assert scores[0] == scores[1]


def test_other_settings_need_another_folder(tmp_path, capsys):
    assert run(*SMALL, "--seeds", "0", "--out", tmp_path) == 0
    assert run(*SMALL, "--seeds", "0", "--out", tmp_path, "--epochs", "2") == 2
    assert "compare.json was made with another epochs=1, now 2" in capsys.readouterr().err
    (tmp_path / "compare.json").write_text("{")
    assert run(*SMALL, "--seeds", "0", "--out", tmp_path) == 2
    assert "compare.json cannot be read" in capsys.readouterr().err


def test_the_best_epoch_is_tested_on_held_out_images(tmp_path, monkeypatch):
    material = paper_table.from_folder(write_stage1(tmp_path / "data", count=5), TASKS["nuclei"], 2, "float32")
    seen = []
    monkeypatch.setattr(
        paper_table, "evaluate", lambda network, samples, **_: seen.append(samples) or {"iou": 0.5, "dice": 0.6}
    )
    monkeypatch.setattr(paper_table, "CONTENDERS", paper_table.CONTENDERS[:1])
    loaded = []
    load = paper_table.load_model
    monkeypatch.setattr(paper_table, "load_model", lambda path, device: loaded.append(path) or load(path, device))
    (row,) = paper_table.run(material, [4], 0.0625, tmp_path / "out", torch.device("cpu"), {})
    assert seen == [material.test] and loaded == [tmp_path / "out/unet-4/best.pt"]
    assert row["iou"] == 0.5 and row["epochs"] == 2 and row["seed"] == 4


@pytest.mark.parametrize("kind", ["labels", "classes", "volumes"])
def test_every_layout_is_compared_with_the_split_it_comes_with(kind, tmp_path, monkeypatch, capsys):
    """Label maps are scored per class, and volumes take networks in 3D."""
    data, line = write_layout(tmp_path / "data", kind)
    monkeypatch.setattr(paper_table, "CONTENDERS", paper_table.CONTENDERS[:1])
    monkeypatch.setitem(tasks.PATCH, 3, 16)
    tested = []
    evaluate = paper_table.evaluate

    def record(network, samples, **options):
        tested.append((network, [sample.name for sample in samples], evaluate(network, samples, **options)))
        return tested[0][2]

    monkeypatch.setattr(paper_table, "evaluate", record)
    arguments = ("--data", data, "--out", tmp_path / "out", "--width", "0.03", "--epochs", "1", "--seeds", "0")
    assert run("compare", *arguments, "--device", "cpu") == 0
    assert line in capsys.readouterr().out
    ((network, names, scores),) = tested
    assert names == ["test/c"] if kind == "labels" else len(names) == 1
    assert network.topology.spatial_dims == (3 if kind == "volumes" else 2)
    assert (len(scores["class_iou"]) == 4) if kind == "labels" else network.out_channels == (2 if kind == "classes" else 1)
    assert float(read(tmp_path / "out")[0]["iou"]) == scores["iou"]
    assert run("compare", *arguments, "--task", "nuclei", "--classes", "x") == 2
    assert "leave it out with --task" in capsys.readouterr().err


def write_layout(root: Path, kind: str) -> tuple[Path, str]:
    """A data set and the line that says what it is."""
    if kind == "classes":
        return write_nuclei(root, count=4, classes=("a", "b")), "found 4 images with masks of 2 classes (a, b)"
    if kind == "volumes":
        for key in "abcd":
            for folder in ("images", "masks"):
                (root / folder).mkdir(parents=True, exist_ok=True)
                volume = np.random.default_rng(ord(key)).normal(size=(8, 16, 16))
                np.save(root / folder / f"{key}.npy", volume if folder == "images" else (volume > 0).astype(np.uint8))
        return root, "found 4 volumes with masks of 1 class"
    labels = (np.arange(48 * 48) // 576).reshape(48, 48).astype(np.uint8)
    for key, part in zip("abc", ("train", "val", "test"), strict=True):
        write_picture(root / part / f"images/{key}.png", labels * 60)
        write_picture(root / part / f"labels/{key}.png", labels)
    found = "found 3 images with label maps of 4 classes (background, 1, 2, 3), 1 of them for validation, 1 for testing"
    return root, found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sample", "--task", "liver"), "--task describes --data"),
        (("--sample", "--width", "0"), "--width must be above 0"),
        (("--sample", "--epochs", "0"), "epochs must be at least 1"),
        ((), r"one of the arguments --data --sample is required"),
        (("--sample", "--seeds", "one"), "is not a list of seeds"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, says):
    try:
        code = run("compare", *arguments)
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr().err
    assert code == 2 and text.count("\n") == 1 and re.search(says, text)


def test_one_seed_has_no_spread():
    assert paper_table.spread([0.5], "+") == "+0.5000"
    assert paper_table.spread([0.5, 0.7]) == "0.6000 ± 0.1414 (0.5000 to 0.7000)"


def test_an_interrupted_comparison_raises(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise Interrupted

    monkeypatch.setattr(Trainer, "fit", stop)
    with pytest.raises(Interrupted):
        paper_table.run(paper_table.from_sample(1, "float32"), [0], 0.0625, tmp_path, torch.device("cpu"), {})
