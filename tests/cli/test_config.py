"""Options in a file: what the file gives, what the command line keeps, and mistakes in it as one line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import fails, run
from support.folders import write_nuclei

from unetpp_fast.cli import completion, config, demo, train
from unetpp_fast.cli.parser import build_parser
from unetpp_fast.common import messages
from unetpp_fast.common.errors import InputError
from unetpp_fast.training.checkpoint import load_checkpoint

SMALL = ("--features", "4,8", "--patch", "32", "--epochs", "1", "--batch-size", "4", "--device", "cpu")


def parsed(*arguments: object) -> argparse.Namespace:
    return build_parser().parse_args([str(argument) for argument in arguments])


def written(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_nuclei(tmp_path_factory.mktemp("nuclei"), count=3)


def test_the_file_gives_what_the_command_line_leaves_out(tmp_path):
    file = written(
        tmp_path,
        "data: d\nout: o\nepochs: 7\nlearning-rate: 1e-3\nfeatures: [4, 8]\ncapture: false\nrecompute: true\n"
        "ignore_index: none\nmodel: unet\nmax_memory: 8G\nloss:\n",
    )
    options = parsed("train", "--config", file, "--epochs", "9", "--seed", "3")
    assert (options.data, options.out, options.features) == (Path("d"), Path("o"), (4, 8))
    assert (options.epochs, options.seed, options.learning_rate, options.arch) == (9, 3, 1e-3, "unet")
    assert (options.capture, options.recompute, options.ignore_index, options.loss) == (False, True, None, None)
    assert options.max_memory == 8 * 2**30 and options.patience == 20 and not hasattr(options, "patch")
    other = parsed("train", "--config", file, "--batch-size", "2", "--capture")
    assert other.max_memory is None and other.batch_size == 2 and other.capture
    file = written(tmp_path, "checkpoint: a\nimages: b\nout: c\ntile: [8, 16]\noverlap: [0.5, 0.25]")
    options = parsed("predict", "--config", file)
    assert (options.tile, options.overlap) == ((8, 16), (0.5, 0.25))
    assert parsed("compare", "--config", written(tmp_path, "sample: true\nseeds: [4, 5]")).seeds == (4, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 3", "no option 'learning_rat'; did you mean learning_rate?"),
        ("qqqq: 3", "no option 'qqqq' (see unetpp-fast train --help)"),
        ("epochs: many", "invalid int value: 'many', for epochs"),
        ("norm: no", "expected a value, not False, for norm"),
        ("arch: vgg", "invalid choice: 'vgg'"),
        ("recompute: 1", "expected true or false, not 1"),
        ("features: {a: 1}", "expected a value, not {'a': 1}"),
        ("epochs: [1", "line 1 is not YAML"),
        ("- 1", "holds no options: expected lines such as"),
        ("no_capture: true", "no option 'no_capture'"),
        ("config: x", "no option 'config'"),
        ("epochs: 3", "required: --data, --out"),
        ("\udcff", "is not text"),
        (None, "cannot be read"),
    ],
    ids=str,
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, capsys, text, says):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    assert says in fails(capsys, "train", "--config", file)


def test_a_training_is_repeated_by_the_file_in_its_folder(data, tmp_path, capsys):
    out = tmp_path / "first"
    arguments = ("--norm", "none", "--learning-rate", "1e-5", "--ignore-index", "none", "--max-memory", "100M")
    assert run("train", "--data", data, "--out", out, *SMALL[:6], *SMALL[8:], *arguments) == 0
    text = (out / "run.yaml").read_text()
    assert f"data: {data}" in text and "\n# network\n" in text and "max_memory" not in text
    assert "ignore_index: none" in text and "features: [4, 8]" in text
    assert run("train", "--config", out / "run.yaml") == 0
    again = tmp_path / "first-2"
    first, second = (load_checkpoint(folder / "last.pt") for folder in (out, again))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert first["recipe"] == {**second["recipe"], "capture": False} and first["history"] == second["history"]
    before, after = ((folder / "run.yaml").read_text() for folder in (again, out))
    assert before.replace("first-2", "first") == after
    capsys.readouterr()
    assert run("train", "--config", again / "run.yaml", "--resume", "--epochs", "2", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert len(load_checkpoint(again / "last.pt")["history"]) == 2 and (again / "run.yaml").read_text() == before


def test_an_encoder_of_the_file_goes_with_what_is_written(tmp_path):
    options = parsed("train", "--data", "d", "--out", tmp_path, "--encoder", "resnet18", "--decoder-channels", "8,4")
    config.write(tmp_path / "run.yaml", train.with_defaults(options), features=None)
    again = parsed("train", "--config", tmp_path / "run.yaml")
    assert not hasattr(again, "features") and again.decoder_channels == (8, 4) and again.norm == "batch"


def test_quiet_shows_results_and_verbose_the_settings(tmp_path, monkeypatch, capsys):
    def experiment(*_, **__):
        messages.say("on the way")
        if messages.verbose():
            raise InputError("a mistake")

    monkeypatch.setattr(demo.EXPERIMENTS["image"], "run", experiment)
    for flag, shown in (("--seed=0", "on the way\n"), ("--quiet", "")):
        assert run("demo", "--out", tmp_path, flag) == 0
        assert capsys.readouterr().out == shown
    assert run("demo", "--out", tmp_path, "--verbose") == 2
    error = capsys.readouterr().err
    assert '"epochs": 10' in error and "Traceback" in error and error.endswith("demo: error: a mistake\n")
    assert "not allowed with" in fails(capsys, "demo", "--quiet", "--verbose")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_completes_every_option(capsys, shell):
    pytest.importorskip("shtab")
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("patches-per-image", "no-capture", "predict", "pixelshuffle"))
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


def test_completion_names_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'unetpp_fast[completion]'" in fails(capsys, "completion", "zsh")


def test_values_survive_being_written(tmp_path):
    names = {"out": Path("a b"), "data": Path("/x:y"), "seed": 2**40, "learning_rate": 1e-12, "encoder": "no"}
    options = parsed("train", "--data", "d", "--out", "o")
    config.write(tmp_path / "run.yaml", options, **names)
    again = parsed("train", "--config", tmp_path / "run.yaml")
    assert {name: getattr(again, name) for name in names} == {**names, "out": Path("a b").resolve()}
    assert json.dumps(config.settings(again), default=str)
