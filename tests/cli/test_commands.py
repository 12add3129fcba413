"""The commands as a user runs them: what they write, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import fails, run
from support.folders import SIDE, write_nuclei

import unetpp_fast as uf
from unetpp_fast import info
from unetpp_fast.architecture.precision import TRAINED
from unetpp_fast.cli import predict
from unetpp_fast.common.errors import InputError
from unetpp_fast.data import images
from unetpp_fast.data.images import read_image
from unetpp_fast.experiments import demo
from unetpp_fast.training.checkpoint import load_model, save_checkpoint

SMALL = ("--features", "4,8", "--patch", "32", "--epochs", "2", "--batch-size", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_nuclei(tmp_path_factory.mktemp("nuclei"), count=4, classes=("a", "b"), colour=True)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert run("train", "--data", folder, "--out", out, *SMALL) == 0
    return out


def test_train_then_predict(folder, trained, tmp_path, capsys):
    assert run("predict", "--checkpoint", trained / "best.pt", "--images", folder / "images", "--out", tmp_path) == 0
    assert "4 image(s)" in capsys.readouterr().out
    network, content = load_model(trained / "best.pt")
    assert content["about"]["classes"] == ["a", "b"] and network.topology.in_channels == 3
    for path in sorted((folder / "images").iterdir()):
        image = torch.from_numpy(images.standardise(read_image(path)))[None]
        expected = (network.predict(image)[0] > 0.5).numpy()
        for index, name in enumerate(("a", "b")):
            mask = np.asarray(Image.open(tmp_path / "masks" / name / path.name))
            assert np.array_equal(mask, expected[index] * np.uint8(255))
        assert Image.open(tmp_path / "overlays" / path.name).size == (SIDE, SIDE)


def test_predict_one_file_fast_of_odd_size(folder, trained, tmp_path):
    Image.open(folder / "images/cell0.png").crop((0, 0, 31, 45)).save(tmp_path / "odd.png")
    arguments = ("--checkpoint", trained / "last.pt", "--images", tmp_path / "odd.png", "--out", tmp_path / "out")
    assert run("predict", *arguments, "--mode", "fast", "--level", "1", "--threshold", "0") == 0
    mask = np.asarray(Image.open(tmp_path / "out/masks/a/odd.png"))
    assert mask.shape == (45, 31) and (mask == 255).all()


@pytest.mark.parametrize(
    "model", [("--model", "unet"), ("--no-deep-supervision",), ("--norm", "none", "--upsample", "nearest")]
)
def test_every_kind_of_model_trains(folder, tmp_path, model):
    assert run("train", "--data", folder, "--out", tmp_path, *SMALL, *model, "--epochs", "1") == 0
    network, _ = load_model(tmp_path / "last.pt")
    assert network.deep_supervision == (model[0] == "--norm")


def test_a_folder_with_a_run_is_not_overwritten(folder, trained, tmp_path, capsys):
    before = (trained / "last.pt").read_bytes()
    assert "add --resume" in fails(capsys, "train", "--data", folder, "--out", trained, *SMALL)
    assert (trained / "last.pt").read_bytes() == before
    assert "nothing to resume" in fails(capsys, "train", "--data", folder, "--out", tmp_path, *SMALL, "--resume")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required"),
        (("fly",), "invalid choice: 'fly'"),
        (("train", "--out", "x"), "--data"),
        (
            ("train", "--data", "DATA", "--out", "OUT", "--patch-size", "32", "--zz"),
            "train: error: unrecognized arguments: --patch-size 32 --zz; did you mean --batch-size or --patch",
        ),
        (("bench", "--zzzz"), "bench: error: unrecognized arguments: --zzzz (see unetpp-fast bench --help)"),
        (("--zz", "info"), "unetpp-fast: error: unrecognized arguments: --zz"),
        (("train", "--data", "nowhere", "--out", "x"), "nowhere is not a folder"),
        (("train", "--data", "DATA", "--out", "OUT", "--features", "4,x"), "'4,x' is not a list of widths"),
        (("train", "--data", "DATA", "--out", "OUT", "--features", "4"), "features must be 2 to 7"),
        (("train", "--data", "DATA", "--out", "OUT", "--patch", "30"), "--patch must be a positive multiple of 16"),
        (("train", "--data", "DATA", "--out", "OUT", "--patches-per-image", "0"), "--patches-per-image must be at least 1"),
        (("train", "--data", "DATA", "--out", "OUT", "--loss", "ce", *SMALL), "--loss ce does not fit masks"),
        (("train", "--data", "DATA", "--out", "OUT", "--classes", "none.txt"), "none.txt cannot be read as names"),
        (("train", "--data", "DATA", "--out", "OUT", "--ignore-index", "x"), "'x' is not a value of a label map"),
        (("train", "--data", "DATA", "--out", "OUT", "--epochs", "0"), "epochs must be at least 1"),
        (("train", "--data", "DATA", "--out", "OUT", "--dropout", "1"), "dropout must be in"),
        (("train", "--data", "DATA", "--out", "OUT", "--val-fraction", "2"), "between 0 and 1"),
        (("train", "--data", "DATA", "--out", "OUT", "--device", "tpu9"), "device 'tpu9' cannot be used"),
        (("train", "--data", "DATA", "--out", "OUT", "--device", "meta"), "device 'meta' cannot be used"),
        (("train", "--data", "DATA", "--out", "OUT", "--workers", "-1"), "workers must be at least 0, not -1"),
        (("train", "--data", "DATA", "--out", "OUT", "--seed", "-1"), "seed must be at least 0 and below 2^63, not -1"),
        (("train", "--data", "DATA", "--out", "OUT", "--learning-rate", "inf"), "learning_rate must be positive and finite"),
        (("train", "--data", "DATA", "--out", "GREY", *SMALL), "cannot write to the folder"),
        (("train", "--data", "DATA", "--out", "OUT", *SMALL, "--patch", "2", "--batch-size", "11"), "shape (1, 3, 2, 2)"),
        (("demo", "--seed", "-1"), "seed must be at least 0"),
        (("train", "--data", "DATA", "--out", "OUT", "--features", "8", "16"), "lists of numbers take commas"),
        (("demo", "--out", "GREY"), "cannot write to the folder"),
        (("predict", "--checkpoint", "DATA", "--images", "DATA/images", "--out", "OUT"), "holds no best.pt"),
        (("predict", "--checkpoint", "RUN/best.pt", "--images", "GREY", "--out", "OUT", "--threshold", "1.1"), "between 0"),
        (("predict", "--checkpoint", "RUN/best.pt", "--images", "GREY", "--out", "OUT", "--threshold", "nan"), "between 0"),
        (("predict", "--checkpoint", "none.pt", "--images", "DATA/images", "--out", "OUT"), "none.pt does not exist"),
        (("predict", "--checkpoint", "RUN/log.csv", "--images", "DATA/images", "--out", "OUT"), "not a readable checkpoint"),
        (
            ("predict", "--checkpoint", "RUN/best.pt", "--images", "DATA/none", "--out", "OUT"),
            "none is not a folder of images: it does not exist",
        ),
        (("predict", "--checkpoint", "RUN/best.pt", "--images", "GREY", "--out", "OUT"), "1 channel(s), the model takes 3"),
        (("predict", "--checkpoint", "RUN/best.pt", "--images", "DATA/images", "--out", "OUT", "--level", "3"), "heads at"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, trained, tmp_path, capsys, arguments, says):
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    places = {"DATA": folder, "RUN": trained, "OUT": tmp_path / "out", "GREY": tmp_path / "grey.png"}
    named = []
    for argument in arguments:
        head, _, tail = argument.partition("/")
        named.append(str(places[head] / tail) if head in places and tail else str(places.get(head, argument)))
    if "--features" in arguments or "--patch" in arguments:
        named += ["--device", "cpu"]
    assert says in fails(capsys, *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory: x")])
def test_out_of_memory_is_one_line(monkeypatch, tmp_path, capsys, error):
    monkeypatch.setattr(demo, "run", lambda *_, **__: (_ for _ in ()).throw(error))
    assert "out of memory: use a smaller batch" in fails(capsys, "demo", "--out", tmp_path)
    monkeypatch.setattr(demo, "run", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("demo", "--out", tmp_path)


def test_a_model_without_class_names_still_predicts(tmp_path, folder):
    network = uf.UNet(3, 2, features=(4, 8))
    save_checkpoint(tmp_path / "m.pt", {"config": network.config, "model": network.state_dict(), "about": {}})
    assert run("predict", "--checkpoint", tmp_path / "m.pt", "--images", folder / "images", "--out", tmp_path / "o") == 0
    assert sorted(path.name for path in (tmp_path / "o/masks").iterdir()) == ["0", "1"]


@pytest.mark.parametrize("command", ["demo", "train", "predict"])
def test_help_shows_every_flag(capsys, command):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "--device" in text and "--dtype" in text and "--out" in text


def test_help_shows_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in ("demo", "train", "compare", "predict", "bench", "info", "completion"))


def test_choices_are_those_of_the_tables(capsys):
    choices = {
        "norm": "{none,batch,instance}",
        "upsample": "{deconv,nearest,linear,pixelshuffle}",
        "dtype": f"{{auto,{','.join(TRAINED)}}}",
    }
    for command in ("train", "bench"):
        assert run(command, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(f"--{name} {shown}" in text for name, shown in choices.items())
    assert run("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--task {nuclei,polyp,liver,nodule}" in text and "{unet,wide_unet,unet++}" in text


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["-m", "unetpp_fast", "--version"], uf.__version__),
        (["-m", "unetpp_fast.info"], "reference"),
        (["-m", "unetpp_fast", "info"], "reference"),
    ],
    ids=["version", "info", "info-command"],
)
def test_the_package_runs_as_a_module(command, says):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and says in done.stdout


def test_info_prints_what_is_installed():
    facts = dict(line.split(maxsplit=1) for line in info.lines() if len(line.split(maxsplit=1)) == 2)
    assert facts["torch"] == torch.__version__ and facts["unetpp_fast"] == uf.__version__
    assert facts["AMD"] == "GPUs                 the Triton kernels compile for gfx942; they have not run there"


def test_a_missing_extra_is_named(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    text = fails(capsys, "train", "--data", folder, "--out", tmp_path / "out", *SMALL)
    assert "PIL is missing: pip install 'unetpp_fast[commands]'" in text


@pytest.mark.parametrize("classes", [["../outside"], ["/tmp"], [".."], ["a", "b"], [1], "a", ["a/b"]], ids=str)
def test_classes_of_a_checkpoint_name_no_other_folder(classes):
    with pytest.raises(InputError, match="plain name"):
        predict.class_names(uf.UNet(1, 1, features=(3, 4)), {"about": {"classes": classes}})
    assert predict.class_names(uf.UNet(1, 2, features=(3, 4)), {}) == ["0", "1"]
