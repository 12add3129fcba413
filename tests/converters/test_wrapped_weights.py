"""Weights behind prefixes and inside the dictionaries that trainers save, from memory and from files."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import fails, run
from support.convert_cases import assert_same_outputs
from support.folders import write_nuclei
from support.helpers import build, make_input
from support.peer_models import NestedUNet
from torch import nn

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.images import read_image, standardise
from unetpp_fast.training.checkpoint import load_model, save_checkpoint

IMAGE = make_input(1, 2, 32, 64)
PREFIXES = [
    "", "module.", "_orig_mod.", "model.", "net.", "network.", "module.model.", "model._orig_mod.", "_forward_module.",
    "student.", "ema_model.module.", "network._orig_mod.", "_forward_module.model.module.",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> NestedUNet:
    return build(NestedUNet, 2, 2).eval()


def named(theirs: nn.Module, prefix: str) -> dict:
    return {prefix + name: value for name, value in theirs.state_dict().items()}


WRAPPED = {
    "Lightning": lambda s: {"epoch": 3, "state_dict": s, "optimizer_states": [{"state": {0: {"m": torch.ones(2)}}}]},
    "MONAI": lambda s: {"net": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}},
    "nnU-Net": lambda s: {"network_weights": s, "init_args": {"fold": 0}, "grad_scaler_state": None},
    "timm": lambda s: {"model_ema": s, "arch": "x"},
    "params": lambda s: {"params": s},
    "weights": lambda s: {"weights": s, "meta": {"mean": torch.zeros(3)}},
    "nested": lambda s: {"checkpoint": {"model": s, "step": 1}},
    "counter": lambda s: {"n_averaged": torch.tensor(3), **s},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers(theirs: NestedUNet, prefix: str) -> None:
    assert_same_outputs(theirs, uf.convert(named(theirs, prefix)).eval(), IMAGE)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WRAPPED)
def test_dictionaries_of_trainers(theirs: NestedUNet, name: str, tmp_path: Path) -> None:
    content = WRAPPED[name](named(theirs, "model." if name in ("Lightning", "counter") else ""))
    assert_same_outputs(theirs, uf.convert(content).eval(), IMAGE)
    torch.save(content, tmp_path / "some.ckpt")
    assert_same_outputs(theirs, uf.convert(tmp_path / "some.ckpt").eval(), IMAGE)


def test_what_is_left_out_is_said_and_a_choice_is_asked_for(theirs: NestedUNet) -> None:
    state = named(theirs, "model.")
    with pytest.warns(UserWarning, match=r"left out, beside the network's weights: loss\.pos_weight"):
        assert_same_outputs(theirs, uf.convert({**state, "loss.pos_weight": torch.ones(1)}).eval(), IMAGE)
    both = {"state_dict": {**state, **named(theirs, "ema.module.")}}
    with pytest.raises(ValueError, match=r"several networks in it .*'ema\.module\.'.*'model\.'.*: give only"):
        uf.convert(both)
    with pytest.raises(ValueError, match=r"several networks in it \(\['model'\]; \['model_ema'\]\)"):
        uf.convert({"model": named(theirs, ""), "model_ema": named(theirs, "")})


def test_weights_of_this_package(tmp_path: Path) -> None:
    mine = build(uf.UNetPlusPlus, 2, 3, features=(3, 4), act=("leaky_relu", {"negative_slope": 0.2})).eval()
    save_checkpoint(tmp_path / "best.pt", {"config": mine.config, "model": mine.state_dict(), "about": {}})
    assert_same_outputs(mine, uf.convert(tmp_path / "best.pt").eval(), IMAGE, 0.0)
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert_same_outputs(mine, uf.convert(content).eval(), IMAGE, 0.0)
    for state in (mine.state_dict(), {f"module.{name}": value for name, value in mine.state_dict().items()}):
        with pytest.raises(ValueError, match=r"weights of this package's network, without its settings: build the network"):
            uf.convert(state)
    with pytest.raises(ValueError, match="load_optimized reads those"):
        uf.convert(dict(uf.optimize(mine).state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="not of a known"):
            uf.convert({"model": {"layer1.weight": torch.ones(2, 2)}}["model"])


def test_predict_takes_the_checkpoint_of_another_implementation(tmp_path: Path, capsys) -> None:
    rgb = build(NestedUNet, 1, 3).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images/a.png")
    torch.save({"state_dict": {f"model.{name}": value for name, value in rgb.state_dict().items()}}, tmp_path / "p.ckpt")
    arguments = ("--images", tmp_path / "images", "--out", tmp_path / "out", "--device", "cpu")
    assert run("predict", "--checkpoint", tmp_path / "p.ckpt", *arguments) == 0
    x = torch.from_numpy(standardise(read_image(tmp_path / "images/a.png")))[None]
    with torch.no_grad():
        padded = nn.functional.pad(x, (0, -50 % 16, 0, -40 % 16), mode="replicate")
        expected = rgb(padded)[0, 0, :40, :50] > 0
    mask = np.asarray(Image.open(next((tmp_path / "out/masks").rglob("a.png")))) > 0
    assert (mask == expected.numpy()).mean() > 0.999
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.ckpt")
    assert "is not a checkpoint of `unetpp-fast train`, and cannot be converted" in fails(
        capsys, "predict", "--checkpoint", tmp_path / "other.ckpt", *arguments
    )


def test_train_begins_with_the_weights_of_another_implementation(tmp_path: Path, capsys) -> None:
    data = write_nuclei(tmp_path / "data", count=4, classes=("a",), colour=True)
    rgb = build(NestedUNet, 1, 3, zoo=True).eval()
    torch.save({f"module.{name}": value for name, value in rgb.state_dict().items()}, tmp_path / "p.pth")
    arguments = ("--data", data, "--out", tmp_path / "out", "--init-from", tmp_path / "p.pth", "--patch", "32")
    small = ("--epochs", "1", "--batch-size", "4", "--device", "cpu", "--learning-rate", "1e-12")
    assert run("train", *arguments, *small) == 0
    trained, _ = load_model(tmp_path / "out/last.pt")
    own = uf.convert(rgb).state_dict()
    assert all(torch.allclose(value, own[name], atol=1e-6) for name, value in trained.state_dict().items() if "conv" in name)
    grey = build(NestedUNet, 1, 2).state_dict()
    torch.save(grey, tmp_path / "p.pth")
    assert "2 channel(s), 1 class(es) and 2D images; the data has 3 channel(s)" in fails(
        capsys, "train", "--data", data, "--out", tmp_path / "other", "--init-from", tmp_path / "p.pth", "--patch", "32"
    )


@pytest.mark.parametrize("damage", ["objects", "truncated", "text", "empty"])
def test_a_damaged_or_hostile_file_says_what_to_do_instead(damage: str, tmp_path: Path) -> None:
    path, state = tmp_path / "some.pt", uf.UNet(1, 1, features=(3, 4)).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)} if damage == "objects" else state, path)
    whole = path.read_bytes()
    if damage != "objects":
        path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage])
    for read in (uf.load_optimized, uf.convert):
        with pytest.raises(InputError, match="is not a readable") as raised:
            read(path)
        assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
        if damage == "objects":
            assert "save the weights alone: torch.save(model.state_dict(), path)" in str(raised.value)
    with pytest.raises(InputError, match="does not exist"):
        uf.convert(tmp_path / "none.pt")
