"""Label maps from training to prediction, and the layouts that `unetpp-fast train` recognises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.command_line import run

from unetpp_fast.data.images import read_image
from unetpp_fast.data.masks import read_labels
from unetpp_fast.experiments.demo import example
from unetpp_fast.training.checkpoint import load_model

PALETTE = [0, 0, 0, 200, 30, 30, 30, 200, 30, 30, 30, 200]
SIDE = 64


def label_map(path: Path, labels: np.ndarray) -> None:
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(PALETTE + [255] * (768 - len(PALETTE)))  # Pillow would store 255 in two bits
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_four_classes(root: Path, ending: str = "jpg") -> Path:
    """16 tiles of the sample image. Classes: background, nuclei, and two made of the image: its nuclei shown brighter in one
    corner of a tile, darker in another. A border of ignored pixels."""
    image = np.rint(read_image(example("nuclei/image.png"))[0] * 255)
    nuclei = read_labels(example("nuclei/instances.png")) > 0
    (root / "images").mkdir(parents=True)
    for index in range(16):
        top, left = SIDE * (index // 4), SIDE * (index % 4)
        window = np.s_[top : top + SIDE, left : left + SIDE]
        tile, mask = image[window] * 0.3, nuclei[window]
        labels = mask.astype(int)
        tile[8:24, 8:24] += 90  # a square behind the nuclei
        labels[8:24, 8:24] = 2
        tile[36:54, 30:58] = 255 - 10 * (np.arange(28) % 3)  # a bright striped one
        labels[36:54, 30:58] = 3
        labels[:2] = 255
        Image.fromarray(np.clip(tile, 0, 255).astype(np.uint8)).save(root / f"images/{index:02d}.{ending}", quality=95)
        label_map(root / f"masks/{index:02d}.png", labels)
    return root


def test_four_classes_are_learned_and_predicted_as_a_label_map(tmp_path, capsys):
    torch.manual_seed(0)
    data = write_four_classes(tmp_path / "data")
    (tmp_path / "names.txt").write_text("sky\ncell\nsquare\nstripes\n")
    network = ("--features", "8,16", "--patch", "64", "--learning-rate", "1e-2")
    numbers = ("--epochs", "8", "--patches-per-image", "2", "--batch-size", "4")
    arguments = ("--classes", tmp_path / "names.txt", "--device", "cpu", *network, *numbers)
    assert run("train", "--data", data, "--out", tmp_path / "run", *arguments) == 0
    said = capsys.readouterr().out
    assert "found 16 images with label maps of 4 classes (sky, cell, square, stripes), 255 is ignored" in said
    assert "  cell: IoU 0." in said
    _, content = load_model(tmp_path / "run/best.pt")
    assert min(content["scores"]["class_iou"]) >= 0.6, content["scores"]["class_iou"]
    counted = np.array(content["scores"]["confusion"]).sum()
    assert counted == len(content["about"]["validation"]) * SIDE * (SIDE - 2)  # ignored rows do not count
    out = ("--out", tmp_path / "out", "--probabilities")
    assert run("predict", "--checkpoint", tmp_path / "run/best.pt", "--images", data / "images", *out) == 0
    name = content["about"]["validation"][0]
    with Image.open(tmp_path / f"out/masks/{name}.png") as predicted:
        assert predicted.mode == "P" and predicted.getpalette()[:12] == PALETTE
    labels, truth = (read_labels(folder / f"{name}.png") for folder in (tmp_path / "out/masks", data / "masks"))
    assert (labels == truth)[2:].mean() > 0.9
    files = [tmp_path / f"out/probabilities/{label}/{name}.png" for label in content["about"]["classes"]]
    shares = [np.asarray(Image.open(path)) / 65535 for path in files]
    assert np.allclose(np.sum(shares, axis=0), 1, atol=1e-4) and np.array_equal(np.argmax(shares, axis=0), labels)
    assert (tmp_path / f"out/overlays/{name}.png").exists()
