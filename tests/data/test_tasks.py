"""`unetpp-fast train --task ...`: the paper's networks and settings, on small data sets in the providers' layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.medical_files import write_frames, write_liver, write_scan, write_stage1

import unetpp_fast as uf
from unetpp_fast.cli import parser, train
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.tasks import TASKS
from unetpp_fast.training.checkpoint import load_checkpoint, load_model


def run(*arguments: str | Path) -> int:
    return parser.main([str(argument) for argument in arguments])


def write_scans(root: Path) -> Path:
    for number in (1, 2):
        write_scan(root, f"LIDC-IDRI-000{number}")
    return root


KINDS = {
    "nuclei": (write_stage1, (3, 2), {}, "32"),
    "polyp": (write_frames, (3, 2), {"size": 224}, "32"),
    "liver": (write_liver, (1, 2), {"window": (-200.0, 250.0)}, "32"),
    "nodule": (write_scans, (1, 3), {"window": (-1000.0, 400.0)}, "16"),
}


@pytest.mark.parametrize("task", KINDS)
def test_every_task_trains_from_its_files(tmp_path, task, capsys):
    write, (channels, dims), prepare, patch = KINDS[task]
    root, out = write(tmp_path / "data"), tmp_path / "run"
    common = (
        "train",
        "--task",
        task,
        "--data",
        root,
        "--out",
        out,
        "--features",
        "2,4",
        "--patch",
        patch,
        "--device",
        "cpu",
    )
    assert run(*common, "--epochs", "1") == 0
    network, content = load_model(out / "best.pt")
    assert network.topology.in_channels == channels and network.topology.spatial_dims == dims
    assert content["about"]["prepare"] == prepare
    assert set(content["about"]["training"]).isdisjoint(content["about"]["validation"])
    assert run(*common, "--epochs", "2", "--resume") == 0
    assert [row["epoch"] for row in load_checkpoint(out / "last.pt")["history"]] == [1, 2]


def test_prediction_scales_frames_as_training_did(tmp_path):
    root, out = write_frames(tmp_path / "data", ending="png"), tmp_path / "run"
    common = ("--task", "polyp", "--features", "2,4", "--patch", "32", "--device", "cpu", "--epochs", "1")
    assert run("train", "--data", root, "--out", out, *common) == 0
    frames = root / "Original"
    assert run("predict", "--checkpoint", out / "best.pt", "--images", frames, "--out", tmp_path, "--device", "cpu") == 0
    network, _ = load_model(out / "best.pt")
    for sample in TASKS["polyp"].read(root)[0]:
        mask = np.asarray(Image.open(tmp_path / "masks/polyp" / f"{sample.name}.png"))
        probabilities = network.predict(torch.from_numpy(sample.load()[0])[None])
        expected = torch.nn.functional.interpolate(probabilities, (36, 52), mode="bilinear", antialias=True) > 0.5
        assert np.array_equal(mask, expected[0, 0].numpy() * np.uint8(255))


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("arguments", "name", "deep"),
    [
        (("--arch", "unet"), "unet", False),
        (("--arch", "wide_unet"), "wide_unet", False),
        ((), "unet++", False),
        (("--arch", "unet++", "--deep-supervision"), "unet++", True),
    ],
    ids=["unet", "wide", "nested", "deep"],
)
def test_a_task_selects_the_networks_and_the_recipe_of_the_paper(tmp_path, monkeypatch, arguments, name, deep):
    seen = {}

    def stop(network, patches, validation, recipe, *_, **__):
        seen.update(network=network, patches=patches, recipe=recipe)
        raise Stop

    monkeypatch.setattr(train, "Trainer", stop)
    with pytest.raises(Stop):
        run(
            "train",
            "--task",
            "nuclei",
            "--data",
            write_stage1(tmp_path),
            "--out",
            tmp_path / "run",
            "--device",
            "cpu",
            *arguments,
        )
    assert seen["network"].config == uf.from_paper(name, 3, 1, deep_supervision=deep).config
    assert seen["recipe"].learning_rate == 3e-4 and seen["patches"].patch == 96


def test_a_unet_has_no_deep_supervision(tmp_path, capsys):
    root = write_stage1(tmp_path)
    assert (
        run("train", "--data", root, "--task", "nuclei", "--out", tmp_path / "run", "--arch", "unet", "--deep-supervision")
        == 2
    )
    assert "--deep-supervision needs the nested nodes of unet++: unet has one head" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_missing_data_are_named_with_their_source(tmp_path, task):
    for root, what in ((tmp_path, "holds no data of the task"), (tmp_path / "nowhere", "is not a folder")):
        with pytest.raises(InputError) as caught:
            task.read(root)
        text = str(caught.value)
        assert text.startswith(f"{root} {what}") and "expected" in text and "; get it from " in text and "https://" in text
        assert "\n" not in text
