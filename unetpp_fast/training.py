"""The training recipe: Adam, the paper's loss, early stopping, checkpoints from which a run goes on exactly.

Adam at 3e-4 and early stopping on the validation set are the paper's (sec. 3). An interrupted run, even a killed one,
continues from `last.pt` with the same log and weights that an unbroken one has on the same CPU; a GPU may add in
another order from run to run.
"""

from __future__ import annotations

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import ArraySample, Patches, Sample, load_batches
from .files import InputError, load_checkpoint, need, save_checkpoint, write_atomic
from .inference import evaluating, mean_probabilities, outputs_of_any_size
from .losses import BCEDiceLoss
from .metrics import dice_score, iou_score
from .models import Network

COLUMNS = ("epoch", "train_loss", "train_iou", "val_loss", "val_iou", "val_dice")
CHECK_EVERY = 10  # steps between two looks at the loss, each of which waits for the device
SAVE_SECONDS = 300.0


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM); its state is saved."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Everything but `epochs`, `patience` and `workers` must stay as it is when a run is resumed."""

    epochs: int = 100
    batch_size: int = 8
    learning_rate: float = 3e-4
    patience: int = 20
    seed: int = 0
    dtype: str = "float32"
    workers: int = 0

    MAY_CHANGE = ("epochs", "patience", "workers")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, not {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and below 2^63, not {self.seed}")
        if self.workers < 0:
            raise InputError(f"workers must be at least 0, not {self.workers}")
        autocast_dtype(self.dtype)


def autocast_dtype(name: str) -> torch.dtype | None:
    """None for "float32" (no autocast), else the half-precision dtype."""
    try:
        return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    except KeyError:
        raise InputError(f"dtype must be float32, bfloat16 or float16, not {name!r}") from None


def autocast(device: torch.device, dtype: str):
    """The context for a forward pass in `dtype`."""
    half = autocast_dtype(dtype)
    return torch.autocast(device.type, half) if half else nullcontext()


def evaluate(
    network: Network,
    samples: Sequence[Sample | ArraySample],
    *,
    dtype: str = "float32",
    loss: nn.Module | None = None,
) -> dict[str, float]:
    """Mean IoU and Dice (and loss) of the accurate mode over whole images, each padded to the size it needs."""
    device = next(network.parameters()).device
    sums = {"loss": 0.0, "iou": 0.0, "dice": 0.0}
    with evaluating(network):
        for sample in samples:
            image, mask = (torch.from_numpy(values)[None].to(device) for values in sample.load())
            with autocast(device, dtype):
                outputs = outputs_of_any_size(network, image)
            probabilities = mean_probabilities(outputs)
            sums["loss"] += float(loss(outputs, mask.float())) if loss else 0.0
            sums["iou"] += float(iou_score(probabilities, mask))
            sums["dice"] += float(dice_score(probabilities, mask))
    return {key: value / len(samples) for key, value in sums.items() if loss or key != "loss"}


class Trainer:
    """Trains a network on patches and keeps `last.pt`, `best.pt` and `log.csv` in a folder.

    Args:
        network: on the device to train on.
        patches: what to draw batches from.
        validation: whole images for early stopping and for the choice of the best epoch, by IoU; without any,
            every epoch runs and there is no `best.pt`.
        recipe: see `Recipe`.
        out: the folder, or None to keep nothing.
        about: plain data that goes into every checkpoint; a run is resumed only where it is the same.
    """

    def __init__(
        self,
        network: Network,
        patches: Patches,
        validation: Sequence[Sample | ArraySample],
        recipe: Recipe,
        out: Path | None = None,
        about: dict[str, Any] | None = None,
    ):
        self.network, self.patches, self.validation = network, patches, validation
        self.recipe, self.out, self.about = recipe, out, about or {}
        self.device = next(network.parameters()).device
        self.loss = BCEDiceLoss()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.dtype == "float16")
        self.epoch, self.step = 0, 0  # finished epochs; finished steps of the running one
        self.sums = torch.zeros(3, dtype=torch.float64)  # loss, IoU, images, over the running epoch
        self.best, self.stale = -1.0, 0
        self.history: list[dict[str, float]] = []
        self._stop = False

    def fit(self, progress: bool = True) -> list[dict[str, float]]:
        """Trains to the last epoch or until `patience` epochs bring no better validation IoU.

        Returns:
            One row an epoch, keys `COLUMNS`.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            InputError: the loss or a weight became NaN or infinite.
        """
        with self._signals():
            while self.epoch < self.recipe.epochs and self.stale < self.recipe.patience:
                row = self._run_epoch(progress)
                if progress:
                    print(_line(row), flush=True)
        return self.history

    def _run_epoch(self, progress: bool) -> dict[str, float]:
        self.network.train()
        batches = self.patches.batches(self.epoch, self.recipe.batch_size, self.step)
        total = self.step + len(batches)
        saved = time.monotonic()
        bar = need("tqdm", "commands").tqdm(
            total=total, initial=self.step, desc=f"epoch {self.epoch + 1}/{self.recipe.epochs}",
            disable=None if progress else True, leave=False, unit="batch",
        )  # fmt: skip
        sums = self.sums.to(torch.float32 if self.device.type == "mps" else torch.float64).to(self.device)
        with bar:
            loader = load_batches(self.patches, batches, self.recipe.workers, self.device.type == "cuda")
            for image, mask in loader:
                sums += self._train_step(image, mask)
                self.step += 1
                bar.update()
                due = self.step % CHECK_EVERY == 0 or self.step == total
                stopping = self._stop and self.step < total
                if due or stopping:
                    self.sums = sums.cpu().double()
                    loss, iou = self._means()
                    bar.set_postfix(loss=f"{loss:.4f}", iou=f"{iou:.4f}")
                if stopping or (due and self.out and time.monotonic() - saved > SAVE_SECONDS):
                    saved = time.monotonic()
                    self._check_weights()
                    self._save("last.pt", resumable=True)
                if stopping:
                    raise Interrupted
        return self._finish_epoch()

    def _check_weights(self) -> None:
        """Raises InputError if the last step, whose effect no loss has shown yet, left a weight that is not finite."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.network.parameters()):
            raise self._diverged("a weight became infinite or NaN")

    def _train_step(self, image: Tensor, mask: Tensor) -> Tensor:
        """One optimizer step; returns (loss, IoU of the last head, 1), each times the number of images."""
        image = image.to(self.device, non_blocking=True)
        mask = mask.to(self.device, non_blocking=True)
        with autocast(self.device, self.recipe.dtype):
            outputs = self.network(image)
        loss = self.loss(outputs, mask)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            last = outputs[-1] if isinstance(outputs, list) else outputs
            iou = iou_score(last > 0, mask)
            return torch.stack([loss.detach(), iou, torch.ones_like(iou)]) * len(image)

    def _means(self) -> tuple[float, float]:
        """Mean loss and IoU of the running epoch so far.

        Raises:
            InputError: the loss is not finite.
        """
        loss, iou = (self.sums[:2] / self.sums[2]).tolist()
        if not torch.isfinite(self.sums).all():
            raise self._diverged(f"the loss became {loss}")
        return loss, iou

    def _diverged(self, what: str) -> InputError:
        kept = f"; {self.out / 'last.pt'} holds the last good state" if self.out and (self.out / "last.pt").exists() else ""
        return InputError(f"{what} in epoch {self.epoch + 1}: lower the learning rate, or use float32{kept}")

    def _finish_epoch(self) -> dict[str, float]:
        train_loss, train_iou = self._means()
        self._check_weights()
        scores = evaluate(self.network, self.validation, dtype=self.recipe.dtype, loss=self.loss) if self.validation else {}
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = torch.zeros_like(self.sums)
        values = (self.epoch, train_loss, train_iou, *(scores.get(key, float("nan")) for key in ("loss", "iou", "dice")))
        row = dict(zip(COLUMNS, values, strict=True))
        self.history.append(row)
        if self.validation:
            better = row["val_iou"] > self.best
            self.best, self.stale = (row["val_iou"], 0) if better else (self.best, self.stale + 1)
            if better:
                self._save("best.pt", resumable=False)
        self._save("last.pt", resumable=True)
        self._write_log()
        return row

    def _write_log(self) -> None:
        if self.out:
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            write_atomic(self.out / "log.csv", lambda stream: stream.write(text.getvalue().encode()))

    def _save(self, name: str, resumable: bool) -> None:
        if not self.out:
            return
        content = {"config": self.network.config, "model": self.network.state_dict(), "about": self.about}
        content |= {"epoch": self.epoch, "best": self.best}
        if resumable:
            cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            content |= {
                "recipe": asdict(self.recipe),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
                "progress": {"step": self.step, "sums": self.sums.tolist(), "stale": self.stale},
                "history": self.history,
            }
        save_checkpoint(self.out / name, content)

    def resume(self) -> None:
        """Takes up the run that `last.pt` in the folder holds.

        Raises:
            InputError: there is none, it cannot be read, or it was made with other settings; the message names them.
        """
        path = self.out / "last.pt"
        content = load_checkpoint(path)
        if "optimizer" not in content:
            raise InputError(f"{path} holds a model but not the state of a training: it cannot be resumed")
        now = {**asdict(self.recipe), **self.about, "model": self.network.config}
        then = {**content["recipe"], **content["about"], "model": content["config"]}
        changed = [key for key in now if key not in Recipe.MAY_CHANGE and _plain(now[key]) != _plain(then.get(key))]
        if changed:
            key, values = changed[0], f"{then.get(changed[0])!r}, now {now[changed[0]]!r}"
            shown = f"{key}={values}" if len(values) < 80 else f"{key} set" if key in self.about else key
            raise InputError(f"{path} was made with another {shown}: resume with the same, or choose another folder")
        self.network.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"]["cpu"])
        if self.device.type == "cuda" and content["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["random"]["cuda"], self.device)
        self.epoch, self.best, self.history = content["epoch"], content["best"], content["history"]
        self.step, self.stale = content["progress"]["step"], content["progress"]["stale"]
        self.sums = torch.tensor(content["progress"]["sums"], dtype=torch.float64)
        self._write_log()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM let the running step finish, save and raise `Interrupted`; a second acts at once."""
        if threading.current_thread() is not threading.main_thread() or not self.out:
            yield
            return

        def stop(number, frame) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _plain(value: Any) -> Any:
    """Tuples as lists, as a checkpoint may give them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _line(row: dict[str, float]) -> str:
    """A row of the log as text, without the columns that have no value."""
    values = [f"{key} {value:.4f}" for key, value in row.items() if key != "epoch" and value == value]
    return "  ".join([f"epoch {row['epoch']:3d}", *values])
