"""Where a run is logged beside `log.csv`: TensorBoard, Weights & Biases and MLflow, behind one small interface.

A logger is made when a run begins or goes on, called with the row of each epoch, and closed. Its keys are `train/loss`,
`val/iou` and so on, its steps the epochs. A resumed run goes on in the same run of the service, whose name is kept in
`loggers.json`.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..common.atomic_files import write_atomic
from ..common.errors import InputError, first_line
from ..common.extras import need

PROJECT = "unetpp_fast"
KEPT = "loggers.json"
LONGEST = 500  # characters of a setting that MLflow takes


class Logger(ABC):
    """A place for the scores of a run.

    Args:
        out: the folder of the run.
        settings: plain settings of the run.
        epochs: that are logged already; the next row is of the one after them.

    Raises:
        InputError: what it needs is not installed.
    """

    @abstractmethod
    def __init__(self, out: Path, settings: Mapping[str, Any], epochs: int): ...

    @abstractmethod
    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Logs the scores of an epoch."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Ends the run, or this part of it; `failed`: an error or an interruption ended it."""

    def __call__(self, row: Mapping[str, float]) -> None:
        """Logs a row of the log, without what is NaN."""
        values = {key.replace("_", "/", 1): value for key, value in row.items() if key != "epoch" and not math.isnan(value)}
        self.log(values, int(row["epoch"]))


class TensorBoard(Logger):
    """Events in the folder `tensorboard`; those of epochs that are trained again are replaced."""

    def __init__(self, out: Path, settings: Mapping[str, Any], epochs: int):
        need("tensorboard", "tensorboard")
        writer = need("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = writer(str(out / "tensorboard"), purge_step=epochs + 1)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, epoch)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, set up by its own variables: WANDB_PROJECT, WANDB_MODE=offline, and so on."""

    def __init__(self, out: Path, settings: Mapping[str, Any], epochs: int):
        wandb = need("wandb", "wandb")
        known = _kept(out).get("wandb") or uuid.uuid4().hex[:8]
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run = wandb.init(
            project=project, dir=str(out), id=known, resume="allow", name=out.name, config=dict(_plain(settings))
        )
        _keep(out, "wandb", known)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(values), step=epoch)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow(Logger):
    """A run of MLflow, set up by its own variables: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, and so on."""

    def __init__(self, out: Path, settings: Mapping[str, Any], epochs: int):
        self.mlflow = need("mlflow", "mlflow")
        known = _kept(out).get("mlflow")
        run = self.mlflow.start_run(run_id=known, run_name=None if known else out.name)
        if not known:  # settings cannot be logged twice
            self.mlflow.log_params({key: str(value)[:LONGEST] for key, value in _plain(settings).items()})
            _keep(out, "mlflow", run.info.run_id)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.mlflow.log_metrics(dict(values), step=epoch)

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def start(names: Iterable[str], out: Path, settings: Mapping[str, Any], epochs: int) -> list[Logger]:
    """The loggers of these names; see `Logger`.

    Raises:
        InputError: one of them cannot be started, or what it needs is not installed.
    """
    started: list[Logger] = []
    try:
        for name in names:
            started.append(LOGGERS[name](out, settings, epochs))
    except Exception as error:  # of the service's own kind
        for logger in started:
            logger.close(True)
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--log {name} cannot be started: {first_line(error)} (docs/training.md tells its variables)"
        ) from error
    return started


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def _kept(out: Path) -> dict[str, str]:
    """The names of this run in the services."""
    try:
        return json.loads((out / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _keep(out: Path, service: str, name: str) -> None:
    text = json.dumps({**_kept(out), service: name}, indent=1) + "\n"
    write_atomic(out / KEPT, lambda stream: stream.write(text.encode()))
