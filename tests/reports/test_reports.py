"""The pages that trainings and comparisons leave: whole HTML without anything from elsewhere, and what they show."""

from __future__ import annotations

import base64
import io
import math
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import run
from support.folders import write_nuclei

import unetpp_fast as uf
from unetpp_fast.data import label_maps
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.experiments import demo, pictures
from unetpp_fast.reports import charts, examples, page, training_run
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Interrupted, Trainer

SMALL = ("--features", "4,8", "--patch", "32", "--epochs", "2", "--batch-size", "4", "--device", "cpu")
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails if tags are not closed in order, or if anything is from elsewhere."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        text = path.read_text()
        self.feed(text)
        assert not self.open and not re.search(r"https?://|url\(|@import|<script", text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def pictures(self) -> dict[str, np.ndarray]:
        found = {}
        for attributes in (attributes for tag, attributes in self.tags if tag == "img"):
            data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
            found[attributes["alt"]] = np.asarray(Image.open(io.BytesIO(data)))
        return found


def test_a_training_of_masks_leaves_a_page(tmp_path, capsys):
    data = write_nuclei(tmp_path / "data", count=6, classes=("a<b", "c"))
    out = tmp_path / "run"
    assert run("train", "--data", data, "--out", out, *SMALL, "--val-fraction", "0.7") == 0
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    shown = Page(out / "report.html")
    assert (
        "UNet++, 1,714 parameters" in shown.text
        and "trained on 2 images, validated on 4. Finished, 2 of 2 epochs." in shown.text
    )
    for words in ("a<b", "class, over all pixels", "4 of 4 validation images were predicted", "learning rate", "torch"):
        assert words in shown.text
    titles = [tag[1]["aria-label"] for tag in shown.tags if tag[0] == "svg"]
    assert titles == ["Loss", "IoU and Dice"]
    pictures = shown.pictures()
    assert len(pictures) == 4 * 4 and all(values.shape == (48, 48, 3) for values in pictures.values())
    ranked = [float(number) for number in re.findall(r"cell\d: IoU ([\d.]+)", shown.text)]
    assert len(ranked) == 4 and max(ranked[:2]) <= min(ranked[2:])


def test_label_maps_have_a_confusion_matrix_and_their_colours(tmp_path):
    data = write_nuclei(tmp_path / "data", count=4)
    (data / "masks/nuclei").rename(data / "labels")
    (data / "masks").rmdir()
    (data / "labels").rename(data / "masks")
    for path in (data / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) > 0) * np.uint8(2)).save(path)
    (tmp_path / "names.txt").write_text("back\nnone\nnuclei\n")
    assert run("train", "--data", data, "--out", tmp_path / "run", *SMALL, "--classes", tmp_path / "names.txt") == 0
    shown = Page(tmp_path / "run/report.html")
    assert "truth ↓ predicted → back none nuclei" in shown.text and "class, over all pixels IoU Dice" in shown.text
    pixels = [int(tag[1]["title"].split()[0].replace(",", "")) for tag in shown.tags if "pixels" in tag[1].get("title", "")]
    assert len(pixels) == 9 and sum(pixels) == 48 * 48
    assert "another class" in shown.text


def small_trainer(out: Path, validation: int = 2, spatial_dims: int = 2) -> Trainer:
    torch.manual_seed(0)
    side = (16,) * spatial_dims
    random = np.random.default_rng(0)
    samples = [
        ArraySample(f"s{i}", random.random((1, *side), np.float32), random.random((1, *side)) > 0.5) for i in range(5)
    ]
    network = uf.UNetPlusPlus(1, 1, features=(2, 4), deep_supervision=True, spatial_dims=spatial_dims)
    recipe = Recipe(epochs=3, batch_size=2)
    return Trainer(network, Patches(samples[:3], 8, 1, 0), samples[5 - validation :], recipe, out)


def test_an_interrupted_training_says_so_and_goes_on(tmp_path):
    trainer = small_trainer(tmp_path)
    with pytest.raises(Interrupted):
        trainer.fit(progress=False, after_epoch=lambda _: signal.raise_signal(signal.SIGINT))
    training_run.write(trainer, {"seed": 0}, stopped=True)
    assert "Stopped after 1 of 3 epochs; --resume continues it." in Page(tmp_path / "report.html").text
    again = small_trainer(tmp_path)
    again.resume()
    again.fit(progress=False)
    training_run.write(again, {"seed": 0})
    shown = Page(tmp_path / "report.html")
    assert "Finished, 3 of 3 epochs." in shown.text and len(shown.pictures()) == 8


def test_without_validation_and_in_3d(tmp_path):
    trainer = small_trainer(tmp_path / "a", validation=0)
    trainer.fit(progress=False)
    training_run.write(trainer, {})
    shown = Page(tmp_path / "a/report.html")
    assert "training IoU" in shown.text and not shown.pictures()
    trainer = small_trainer(tmp_path / "b", spatial_dims=3)
    trainer.fit(progress=False)
    training_run.write(trainer, {})
    assert all(values.shape == (16, 16, 3) for values in Page(tmp_path / "b/report.html").pictures().values())


def test_a_report_that_fails_does_not_end_the_training(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path)
    trainer.fit(progress=False)
    monkeypatch.setattr(examples, "look", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory\nmore")))
    assert training_run.write_if_possible(trainer, {}) == "none with pictures, out of memory"
    assert "Finished" in Page(tmp_path / "report.html").text  # the page without pictures


def test_a_comparison_leaves_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 1)
    command = ("compare", "--sample", "--width", "0.0625", "--epochs", "1", "--device", "cpu", "--seeds", "0,3")
    assert run(*command, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    shown = Page(tmp_path / "report.html")
    for line in printed.split("\n")[1:5]:
        assert re.search(r"\d\.\d{4} ± \d\.\d{4} \(.+?\)", line)[0] in shown.text
    assert [tag[1]["aria-label"] for tag in shown.tags if tag[0] == "svg"] == [
        "A dot for each seed, a bar at their mean", "Training loss, a line for each run",
    ]  # fmt: skip
    assert sum(tag[0] == "circle" for tag in shown.tags) == 8 + 8
    assert run("compare", "--config", tmp_path / "run.yaml") == 0
    before = (tmp_path / "run.yaml").read_text()
    assert run("compare", "--config", tmp_path / "run.yaml", "--epochs", "2") == 2
    assert (tmp_path / "run.yaml").read_text() == before


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.32), (-3, 900), (5, 5), (0, 0), (1e-9, 2e-9), (0.9, 1)])
def test_ticks_enclose_the_values(low, high):
    places = charts.ticks(low, high)
    assert places[0] <= low + 1e-12 and places[-1] >= high - 1e-12 and 2 <= len(places) <= 8
    whole = charts.ticks(low, high, whole=True)
    assert all(place == int(place) for place in whole)


def test_a_line_without_a_finite_point_is_left_out():
    assert charts.line_chart("t", [charts.Line("a", "red", [(1, math.nan)])]) == ""
    text = charts.line_chart("t", [charts.Line("<a>", "red", [(1, 0.5), (2, math.inf), (3, 0.7)])], mark=3)
    assert text.count("<circle") == 2 and "&lt;a&gt;" in text and "stroke-dasharray" in text and "inf" not in text


def test_differences_have_their_colours_and_ignored_pixels_none():
    truth, found = np.array([[0, 1, 1, 0, 2, 0]]), np.array([[0, 1, 0, 1, 1, 1]])
    counted = np.array([[True, True, True, True, True, False]])
    picture = examples._differences(truth, found, counted)[0].tolist()
    assert picture[1:5] == [list(colour) for colour in (examples.CORRECT, examples.MISSED, examples.EXTRA, examples.OTHER)]
    assert picture[0] == picture[5] == [0, 0, 0]
    assert sorted(examples._spread(11)) == list(range(11)) and examples._spread(8)[:4] == [0, 4, 2, 6]
    assert page.picture(np.zeros((2000, 10, 3), np.uint8), "x").count("base64") == 1


def test_classes_without_colours_of_their_own_are_drawn_in_colours_that_differ():
    assert np.array_equal(pictures.class_colours(label_maps.voc_palette(3)), pictures.COLOURS[:2])
    own = [[0, 0, 0], [1, 2, 3], [128, 0, 0]]
    assert pictures.class_colours(own).tolist() == own[1:]
    many = label_maps.voc_palette(21)
    assert np.array_equal(pictures.class_colours(many), many[1:])
