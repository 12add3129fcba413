"""Loggers beside the CSV: what they call, that a resumed run goes on where it was, and the services' own offline modes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.command_line import fails, run
from support.folders import write_nuclei

from unetpp_fast.training.loggers import LOGGERS

ROWS = [
    {"epoch": 1, "train_loss": 0.9, "val_iou": 0.25, "val_loss": float("nan")},
    {"epoch": 2, "train_loss": 0.5, "val_iou": 0.5, "val_loss": 0.125},
]


@pytest.fixture
def stubs(monkeypatch) -> list:
    """What is called of wandb and of MLflow, in order: the name, the arguments."""
    calls: list = []

    def note(name, result=None):
        return lambda *args, **keywords: calls.append((name, *args, keywords)) or result

    current = SimpleNamespace(log=note("log"), finish=note("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=note("init", current)))
    started = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    names = ("log_params", "log_metrics", "end_run")
    functions = {name: note(name) for name in names} | {"start_run": note("start_run", started)}
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(**functions))
    return calls


def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(stubs, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for row in ROWS:  # stopped after the first
        logger = LOGGERS["wandb"](tmp_path, {"epochs": 2, "data": Path("x")}, row["epoch"] - 1)
        logger(row)
        logger.close(failed=row["epoch"] == 1)
    assert [call[0] for call in stubs] == ["init", "log", "finish"] * 2
    first, second = (call[-1] for call in stubs if call[0] == "init")
    assert first == second and first["id"] == json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    assert first["config"] == {"epochs": 2, "data": "x"} and first["project"] == "unetpp_fast" and first["resume"] == "allow"
    assert stubs[1] == ("log", {"train/loss": 0.9, "val/iou": 0.25}, {"step": 1})
    assert stubs[4] == ("log", {"train/loss": 0.5, "val/iou": 0.5, "val/loss": 0.125}, {"step": 2})
    assert [call[-1] for call in stubs if call[0] == "finish"] == [{"exit_code": 1}, {"exit_code": 0}]


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(stubs, tmp_path):
    for row in ROWS:
        logger = LOGGERS["mlflow"](tmp_path, {"epochs": 2, "long": "x" * 900}, row["epoch"] - 1)
        logger(row)
        logger.close(failed=row["epoch"] == 1)
    names = [call[0] for call in stubs]
    assert names == ["start_run", "log_params", "log_metrics", "end_run", "start_run", "log_metrics", "end_run"]
    assert stubs[0][-1] == {"run_id": None, "run_name": tmp_path.name}
    assert stubs[4][-1] == {"run_id": "abc", "run_name": None}
    assert stubs[1][1] == {"epochs": "2", "long": "x" * 500}
    assert stubs[5][1:] == ({"train/loss": 0.5, "val/iou": 0.5, "val/loss": 0.125}, {"step": 2})
    assert [call[1] for call in stubs if call[0] == "end_run"] == ["FAILED", "FINISHED"]


SMALL = ("--features", "4,8", "--patch", "32", "--patches-per-image", "1", "--device", "cpu")


def test_the_command_logs_to_all_that_are_named(stubs, tmp_path):
    folder = write_nuclei(tmp_path / "data", count=3)
    command = ("train", "--data", folder, "--out", tmp_path / "run", *SMALL, "--log", "wandb", "mlflow")
    assert run(*command, "--epochs", "1") == 0
    assert run(*command, "--epochs", "2", "--resume") == 0
    assert [call[-1]["step"] for call in stubs if call[0] in ("log", "log_metrics")] == [1, 1, 2, 2]
    assert {call[0] for call in stubs} >= {"finish", "end_run"}


def test_a_service_that_fails_does_not_end_the_run(stubs, tmp_path, capsys):
    """At an epoch it is left out, at the start it is one error."""
    folder = write_nuclei(tmp_path / "data", count=3)
    command = ("train", "--data", folder, *SMALL, "--epochs", "2", "--log", "wandb", "mlflow")

    def fails_once(*_, **__):
        raise ConnectionError("the server is gone\nand more")

    sys.modules["mlflow"].log_metrics = fails_once
    assert run(*command, "--out", tmp_path / "run") == 0
    text = capsys.readouterr().err
    assert text.count("MLflow: the server is gone; the run is no longer logged there") == 1
    assert [call[-1]["step"] for call in stubs if call[0] == "log"] == [1, 2] and "end_run" not in {
        call[0] for call in stubs
    }
    sys.modules["mlflow"].start_run = fails_once
    assert "--log mlflow cannot be started: the server is gone" in fails(capsys, *command, "--out", tmp_path / "other")
    assert stubs[-1] == ("finish", {"exit_code": 1})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_missing_names_its_extra(name, monkeypatch, tmp_path, capsys):
    folder = write_nuclei(tmp_path / "data", count=3)
    monkeypatch.setitem(sys.modules, name, None)
    text = fails(capsys, "train", "--data", folder, "--out", tmp_path / "run", *SMALL, "--log", name)
    assert f"{name} is missing: pip install 'unetpp_fast[{name}]'" in text


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra 'wandb' is not installed")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for row in ROWS:
        logger = LOGGERS["wandb"](tmp_path, {"epochs": 2}, row["epoch"] - 1)
        logger(row)
        logger.close(False)
    name = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert written and all(path.stat().st_size for path in written)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="the extra 'mlflow' is not installed")
def test_mlflow_s_file_store_holds_every_epoch(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer versions ask for
    for row in ROWS:
        logger = LOGGERS["mlflow"](tmp_path, {"epochs": 2}, row["epoch"] - 1)
        logger(row)
        logger.close(False)
    from mlflow import MlflowClient

    name = json.loads((tmp_path / "loggers.json").read_text())["mlflow"]
    client = MlflowClient()
    found = [(metric.step, metric.value) for metric in client.get_metric_history(name, "val/iou")]
    assert found == [(1, 0.25), (2, 0.5)]
    assert client.get_run(name).data.params == {"epochs": "2"} and client.get_run(name).info.status == "FINISHED"
