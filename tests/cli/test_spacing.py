"""`train --spacing`: one spacing to train and evaluate on, which the network carries to `predict` on files of any other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import run
from support.medical_files import write_itk, write_nifti

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.file_formats import read_stored
from unetpp_fast.training.checkpoint import load_checkpoint, load_model

SIDES = (32.0, 36.0, 32.0)  # mm
NETWORK = ("--features", "4,8", "--device", "cpu", "--patch", "8,16,16", "--norm", "none", "--learning-rate", "2e-2")
TRAINED = (*NETWORK, "--epochs", "25", "--patches-per-image", "6", "--batch-size", "4", "--foreground", "0.5")
SPACINGS = [(2.0, 1.0, 1.0), (2.0, 1.5, 1.2), (4.0, 1.0, 1.0), (1.0, 2.0, 2.0)]


def write(folder: Path, name: str, spacing: tuple[float, ...], radius: float, ending: str) -> None:
    """A bright ball in noise and its label map, as nnU-Net has them."""
    random = np.random.default_rng(int(radius * 10))
    axes = [(np.arange(round(side / size)) + 0.5) * size - side / 2 for side, size in zip(SIDES, spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    ball = z**2 + y**2 + x**2 < radius**2
    image = (ball * 600 + random.normal(0, 50, ball.shape)).astype(np.int16)
    turn = np.diag([-spacing[2], spacing[1], -spacing[0], 1.0]) if ending == ".nii.gz" else np.diag([*spacing[::-1], 1.0])
    turn[:3, 3] = (-30.5, 12.0, 7.25)
    for path, values in ((f"imagesTr/{name}_0000{ending}", image), (f"labelsTr/{name}{ending}", ball.astype(np.uint8))):
        if ending == ".nii.gz":
            write_nifti(folder / path, values.T, turn)
        else:
            write_itk(folder / path, values, turn)


@pytest.fixture(scope="module", params=[".nii.gz", ".mha"])
def data(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number, spacing in enumerate(SPACINGS):
        write(root, f"v{number}", spacing, 9.0 + number / 2, request.param)
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "ball": 1}, "file_ending": request.param}
    (root / "dataset.json").write_text(json.dumps(about))
    write(root / "new", "n", (3.0, 0.8, 1.6), 10.2, request.param)
    return root


def test_a_network_predicts_volumes_of_any_spacing_on_their_own_grid(data, tmp_path, capsys):
    arguments = ("train", "--data", data, "--out", tmp_path / "run", *TRAINED, "--spacing", "2,1.25,1.25")
    assert run(*arguments) == 0
    assert "volumes are resampled to voxels of 2x1.25x1.25 mm" in capsys.readouterr().out
    network, content = load_model(tmp_path / "run/best.pt")
    assert network.spacing == (2.0, 1.25, 1.25) and content["best"] > 0.6
    assert "spacing: [2.0, 1.25, 1.25]" in (tmp_path / "run/run.yaml").read_text()
    assert "2.0, 1.25, 1.25" in (tmp_path / "run/report.html").read_text()
    for tiles in ((), ("--tile", "8,16,16", "--overlap", "0.5")):
        arguments = ("--checkpoint", tmp_path / "run", "--images", data / "new/imagesTr", "--out", tmp_path / "out", *tiles)
        assert run("predict", *arguments, "--probabilities") == 0
        (file,) = (tmp_path / "out/masks").iterdir()
        found, truth = read_stored(file), read_stored(data / f"new/labelsTr/{file.name}")
        assert np.array_equal(found.affine, truth.affine) and found.values.shape == truth.values.shape
        assert abs(found.values.sum() * 3.0 * 0.8 * 1.6 / (4 / 3 * math.pi * 10.2**3) - 1) < 0.15
        assert (found.values & truth.values).sum() > 0.85 * (found.values | truth.values).sum()
        shares = [read_stored(tmp_path / f"out/probabilities/{name}/{file.name}") for name in ("background", "ball")]
        assert np.allclose(sum(share.values for share in shares), 1, atol=1e-5)
        assert np.array_equal(shares[0].affine, truth.affine) and np.array_equal(shares[1].values > 0.5, found.values == 1)
    assert not list((tmp_path / "out").glob("tmp*"))
    network.prune(1).save_pretrained(tmp_path / "saved", run=tmp_path / "run")
    assert uf.from_pretrained(tmp_path / "saved").spacing == network.spacing
    assert "Its voxels are 2 x 1.25 x 1.25 mm" in (tmp_path / "saved/README.md").read_text()
    other, _ = load_model(tmp_path / "run/best.pt")
    other.spacing = None
    with pytest.raises(InputError, match="different sizes of voxels"):
        uf.Ensemble([network, other])
    np.save(tmp_path / "x.npy", np.zeros((8, 16, 16), np.int16))
    capsys.readouterr()
    lost = ("--checkpoint", tmp_path / "run/best.pt", "--images", tmp_path / "x.npy", "--out", tmp_path / "lost")
    assert run("predict", *lost) == 2
    assert "x.npy does not tell the size of its voxels, and cannot be resampled" in capsys.readouterr().err


def test_the_median_is_that_of_the_training_images_and_a_run_with_it_resumes(data, tmp_path, capsys):
    one = (*NETWORK, "--patches-per-image", "1", "--spacing", "median", "--normalise", "dataset")
    for out, epochs, more in (("whole", "2", ()), ("parts", "1", ()), ("parts", "2", ("--resume",))):
        assert run("train", "--data", data, "--out", tmp_path / out, *one, "--epochs", epochs, *more) == 0
    first, second = (load_checkpoint(tmp_path / out / "last.pt") for out in ("whole", "parts"))
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    names = first["about"]["training"]
    chosen = [SPACINGS[int(name[1:])] for name in names]
    assert np.allclose(first["config"]["spacing"], np.median(chosen, axis=0), rtol=1e-3)
    capsys.readouterr()
    changed = ("train", "--data", data, "--out", tmp_path / "parts", *one, "--spacing", "2", "--epochs", "3", "--resume")
    assert run(*changed) == 2
    assert "was made with another model" in capsys.readouterr().err
    folds = ("train", "--data", data, "--out", tmp_path / "cv", *one, "--epochs", "1", "--folds", "2")
    assert run(*folds) == 0
    spacings = [load_checkpoint(tmp_path / f"cv/fold{fold}/best.pt")["config"]["spacing"] for fold in range(2)]
    assert spacings[0] == spacings[1] and np.allclose(spacings[0], np.median(SPACINGS, axis=0), rtol=1e-3)
    arguments = ("--checkpoint", tmp_path / "cv", "--images", data / "new/imagesTr", "--out", tmp_path / "out")
    assert run("predict", *arguments) == 0


@pytest.mark.parametrize("text", ["0,1,1", "1,1", "nan", "thin", "-1", "1,1,inf"])
def test_a_spacing_is_three_sizes(tmp_path, capsys, text):
    assert run("train", "--data", tmp_path, "--out", tmp_path / "no", f"--spacing={text}") == 2
    assert f"'{text}' is neither median nor sizes of a voxel in mm such as 2.5,0.8,0.8" in capsys.readouterr().err


def test_only_volumes_are_resampled(tmp_path, capsys):
    for key in "ab":
        for folder, values in (("images", np.full((16, 16, 3), 40)), ("masks", np.eye(16) * 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / folder / f"{key}.png")
    common = ("train", "--data", tmp_path, "--out", tmp_path / "no", "--spacing", "median")
    assert run(*common) == 2
    assert f"--spacing resamples volumes, and {tmp_path} holds images: leave it out" in capsys.readouterr().err
    assert run(*common, "--task", "nodule") == 2
    assert "--spacing does not go with --task" in capsys.readouterr().err
    for key in "ab":
        for folder in ("images", "masks"):
            (tmp_path / "v" / folder).mkdir(exist_ok=True, parents=True)
            np.save(tmp_path / "v" / folder / f"{key}.npy", np.eye(16, dtype=np.uint8)[None].repeat(9, 0))
    assert run("train", "--data", tmp_path / "v", "--out", tmp_path / "no", "--spacing", "1") == 2
    assert ".npy does not tell the size of its voxels, and cannot be resampled: save it as" in capsys.readouterr().err


@pytest.mark.parametrize("spacing", [[2.0, 0.0, 1.0], ["thin"], 3, [1.0, math.inf, 1.0], []])
def test_a_checkpoint_with_no_spacing_of_voxels_is_one_error(spacing):
    network = uf.UNetPlusPlus(1, 1, features=(2, 4), spatial_dims=3)
    network.spacing = (2.0, 1.0, 1.0)
    config = network.config
    assert config["spacing"] == [2.0, 1.0, 1.0] and uf.UNetPlusPlus.from_config(config).spacing == network.spacing
    with pytest.raises(InputError, match="is no spacing of voxels: expected positive numbers"):
        uf.UNetPlusPlus.from_config({**config, "spacing": spacing})
