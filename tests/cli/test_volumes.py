"""Volumes from the command: a network in 3D is trained, and predictions have the format and the grid of what was read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.command_line import run
from support.medical_files import write_itk, write_series

import unetpp_fast as uf
from unetpp_fast.data.file_formats import read_stored
from unetpp_fast.training.checkpoint import load_checkpoint, load_model

SHAPE = (10, 24, 20)
NETWORK = ("--features", "4,8", "--device", "cpu", "--patch", "8", "--learning-rate", "2e-2")
GRID = np.array([[0.7, 0, 0, 5], [0, 0.8, 0, -3], [0, 0, 2.5, 9], [0, 0, 0, 1]])


def write_nnunet(root: Path, count: int = 4) -> Path:
    """Volumes of two channels with a bright ball (2) in a body (1); the ball is bright in the second channel only."""
    random = np.random.default_rng(0)
    z, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    for index in range(count):
        centre = random.integers((3, 8, 7), (7, 15, 13))
        labels = ((np.abs(y - 12) < 9) & (np.abs(x - 10) < 8)).astype(np.uint8)
        labels[(z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 40] = 2
        first, second = ((labels > 0) * 500.0, (labels > 1) * 700.0)
        for channel, values in enumerate((first, second)):
            noisy = (values + random.normal(0, 60, SHAPE)).astype(np.int16)
            write_itk(root / f"imagesTr/v{index}_{channel:04d}.nrrd", noisy, GRID)
        write_itk(root / f"labelsTr/v{index}.nrrd", labels, GRID)
    names = '"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "body": 1, "ball": 2}'
    (root / "dataset.json").write_text(f'{{{names}, "file_ending": ".nrrd"}}')
    (root / "splits_final.json").write_text('[{"train": ["v0", "v1", "v2"], "val": ["v3"]}]')
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_nnunet(tmp_path_factory.mktemp("data"))


def test_nnunet_volumes_are_trained_on_and_predicted(data, tmp_path, capsys):
    steps = ("--epochs", "12", "--patches-per-image", "8", "--batch-size", "4", "--norm", "none")
    assert run("train", "--data", data, "--out", tmp_path / "run", *NETWORK, *steps) == 0
    said = capsys.readouterr().out
    assert (
        "found 4 volumes with label maps of 3 classes (background, body, ball), 1 of them for validation, "
        "2 channels (T1, T2), split by splits_final.json, fold 0 of 1"
    ) in said
    assert "3 volumes to train, 1 to validate, 2 channel(s)" in said
    network, content = load_model(tmp_path / "run/best.pt")
    assert network.topology.spatial_dims == 3 and content["about"]["validation"] == ["v3"]
    assert min(content["scores"]["class_iou"]) > 0.6, content["scores"]["class_iou"]
    images = ("--images", data / "imagesTr", "--out", tmp_path / "out", "--probabilities")
    assert run("predict", "--checkpoint", tmp_path / "run/best.pt", *images) == 0
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == [f"v{k}.nrrd" for k in range(4)]
    mask, truth = (read_stored(folder / "v3.nrrd") for folder in (tmp_path / "out/masks", data / "labelsTr"))
    assert mask.values.dtype == np.uint8 and np.allclose(mask.affine, GRID) and np.allclose(truth.affine, GRID)
    assert (mask.values == truth.values).mean() > 0.95
    shares = [read_stored(tmp_path / f"out/probabilities/{name}/v3.nrrd") for name in ("background", "body", "ball")]
    assert np.allclose(sum(share.values for share in shares), 1, atol=1e-5) and np.allclose(shares[0].affine, GRID)
    one = ("--images", data / "imagesTr/v3_0000.nrrd", "--out", tmp_path / "one")
    assert run("predict", "--checkpoint", tmp_path / "run/best.pt", *one) == 0
    assert np.array_equal(read_stored(tmp_path / "one/masks/v3.nrrd").values, mask.values)
    shutil.copytree(data / "imagesTr", tmp_path / "less")
    (tmp_path / "less/v1_0001.nrrd").unlink()
    write_itk(tmp_path / "less/v2_0001.nrrd", np.zeros((10, 24, 21), np.int16), GRID)
    write_itk(tmp_path / "less/v3_0001.nrrd", np.zeros(SHAPE, np.int16), np.diag([0.7, 0.8, 2, 1]))
    capsys.readouterr()
    arguments = ("--checkpoint", tmp_path / "run/best.pt", "--images", tmp_path / "less", "--out", tmp_path / "less/out")
    assert run("predict", *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    for line, says in zip(lines, ("v1_0001.nrrd does not exist", "differ in shape", "differ in spacing"), strict=True):
        assert says in line
    assert [path.name for path in (tmp_path / "less/out/masks").iterdir()] == ["v0.nrrd"]


def test_dicom_series_are_trained_on_and_predicted(tmp_path, capsys):
    """Masks of a series are NIfTI files on its grid."""
    for key in "ab":
        pixels = write_series(tmp_path / f"data/images/{key}", (8, 16, 16))
        mask = sitk.GetImageFromArray((pixels > 0).astype(np.uint8))
        mask.CopyInformation(sitk.ReadImage(sorted(map(str, (tmp_path / f"data/images/{key}").iterdir()), reverse=True)))
        (tmp_path / "data/labels").mkdir(exist_ok=True)
        sitk.WriteImage(mask, str(tmp_path / f"data/labels/{key}.nii.gz"))
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "run", *NETWORK, "--epochs", "1")
    assert run("train", *arguments) == 0
    assert "found 2 volumes with masks of 1 class" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run/last.pt")["recipe"]["batch_size"] == 2
    for images, out in ((tmp_path / "data/images", "all"), (tmp_path / "data/images/b", "one")):
        arguments = ("--checkpoint", tmp_path / "run/best.pt", "--images", images, "--out", tmp_path / out)
        assert run("predict", *arguments) == 0
    masks = [read_stored(tmp_path / f"{out}/masks/foreground/b.nii.gz") for out in ("all", "one")]
    series = read_stored(tmp_path / "data/images/b")
    assert np.array_equal(masks[0].values, masks[1].values) and masks[0].values.shape == series.values.shape
    assert all(np.allclose(mask.affine, series.affine, atol=1e-5) for mask in masks)


def test_patches_of_unlike_sides_train_resume_and_repeat(data, tmp_path, capsys):
    """The same run in one go and in two, one with its patch from a file of options, ends with the same weights."""
    network = (*NETWORK[:4], "--patch", "4,16,8", "--patches-per-image", "2", "--max-memory", "200M")
    for out, epochs, more in (("whole", "2", ()), ("parts", "1", ()), ("parts", "2", ("--resume",))):
        assert run("train", "--data", data, "--out", tmp_path / out, *network, "--epochs", epochs, *more) == 0
    one, two = (load_checkpoint(tmp_path / out / "last.pt") for out in ("whole", "parts"))
    assert list(one["about"]["patch"]) == [4, 16, 8]
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert "patch: [4, 16, 8]" in (tmp_path / "whole/run.yaml").read_text()
    assert "4, 16, 8" in (tmp_path / "whole/report.html").read_text()
    assert run("train", "--config", tmp_path / "whole/run.yaml") == 0
    again = load_checkpoint(tmp_path / "whole-2/last.pt")
    assert all(torch.equal(value, again["model"][key]) for key, value in one["model"].items())
    capsys.readouterr()
    common = ("train", "--data", data, "--out", tmp_path / "no", *NETWORK[:4])
    for patch, says in {
        "4,15,8": "--patch must be a positive multiple of 2 for 2 levels, not 4,15,8",
        "4,8": "--patch gives 2 sides, but the data is 3D: give one, or 3 of them",
        "4,b,8": "'4,b,8' is not a size such as 512 or 32,256,256",
        "0": "--patch must be a positive multiple of 2 for 2 levels, not 0",
    }.items():
        assert run(*common, "--patch", patch) == 2
        assert says in capsys.readouterr().err
    assert run("train", "--data", data, "--out", tmp_path / "parts", *network[:-4], "--patch", "8", "--resume") == 2
    assert "was made with another" in capsys.readouterr().err


def test_tiles_of_unlike_sides_predict_as_one_pass_does(data, tmp_path):
    """Where no tile ends within the reach of the network; here every tile holds the whole of two axes."""
    arguments = ("train", "--data", data, "--out", tmp_path / "run", *NETWORK[:4], "--patch", "4,16,8", "--epochs", "1")
    assert run(*arguments, "--norm", "none") == 0
    network, _ = load_model(tmp_path / "run/best.pt")
    x = torch.randn(1, 2, 40, 12, 10)
    tiled = uf.predict_tiled(network, x, tile=(24, 12, 10), overlap=(0.9, 0, 0))
    assert (tiled - network.predict(x)).abs().max() < 0.05


def test_a_run_with_another_cache_is_the_same_run(data, tmp_path, capsys):
    """No cache, and one that is changed between two parts of a run."""
    common = ("train", "--data", data, *NETWORK[:4], "--patch", "8", "--patches-per-image", "2", "--foreground", "0.5")
    parts = (("whole", "2", "0"), ("parts", "1", "1G"), ("parts", "2", "50K"))
    for out, epochs, cache in parts:
        resume = ("--resume",) if (tmp_path / out).exists() else ()
        assert run(*common, "--out", tmp_path / out, "--epochs", epochs, "--cache-memory", cache, *resume) == 0
    one, two = (load_checkpoint(tmp_path / out / "last.pt") for out in ("whole", "parts"))
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert "cache_memory: 0" in (tmp_path / "whole/run.yaml").read_text()
    capsys.readouterr()
    assert run(*common, "--out", tmp_path / "no", "--cache-memory", "much") == 2
    assert "'much' is not an amount of memory such as 512M" in capsys.readouterr().err
