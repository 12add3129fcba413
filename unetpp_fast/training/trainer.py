"""The training loop: early stopping, a log, and checkpoints from which a run resumes exactly.

The defaults, Adam at 3e-4 and early stopping on the validation set, are the paper's (sec. 3). An interrupted run, even a
killed one, resumes from `last.pt` with the log and weights of an uninterrupted run on the same CPU; a GPU may sum in another
order from run to run. With several processes (`processes.py`) each takes its share of every batch; on a CPU the weights can
be made independent of their number (`reproducible.py`). `step.py` holds the optimizer step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.network_spec import NetworkSpec
from ..common.errors import InputError
from ..common.extras import need
from ..data.patches import BatchLoader, Patches
from ..data.samples import ArraySample, Sample
from ..execution import dispatch
from ..models.network import Network
from . import captured, evaluation, processes, run_folder
from .checkpoint import load_checkpoint, save_checkpoint
from .loss_table import is_exclusive, taking_lists
from .losses import BCEDiceLoss
from .recipe import Recipe
from .step import make_step

CHECK_EVERY = 10  # steps between two checks of the loss, each of which waits for the device and the other processes
SAVE_SECONDS = 300.0


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM); its state is saved."""


class Trainer:
    """Trains a network on patches and writes `last.pt`, `best.pt` and `log.csv` to a folder.

    With several processes (torchrun) every process makes a trainer with the same arguments; the first writes the files.

    Args:
        network: on the device to train on; with several processes its batch norms take statistics over all of them.
        patches: the source of the batches.
        validation: whole images for early stopping and for the choice of the best epoch, by the recipe's `monitor`; if
            empty, every epoch runs and there is no `best.pt`.
        recipe: see `Recipe`.
        out: the folder, or None to write nothing.
        about: plain data that goes into every checkpoint; a run is resumed only if it is the same.
        loss: a module that takes a list of logits `[N, classes, *S]`, one per head, and masks of that shape, float32, and
            returns the mean over the N images; default `BCEDiceLoss()`. One that takes only single logits, as those of
            MONAI, becomes its mean over the heads (`DeepSupervision`). Its own parameters are not trained. Its `repr` must
            show its settings: a run is resumed only if it is the same. If its attribute `exclusive` is true, masks are
            one-hot, and the largest logit is chosen. `best.pt` holds the scores of each of several classes ("scores").

        max_memory: for the maps of a validation image, which is computed in tiles if it takes more (`evaluation`).
        surface: whether validation measures distances between surfaces too (`evaluation`).

    The network is told whether its classes are exclusive, and how the samples are prepared (their `normalisation`
    and `resampled_to`).

    Raises:
        InputError: the network returns something other than logits, the loss does not take them, or the network cannot be
            trained reproducibly as the recipe asks.
    """

    def __init__(
        self,
        network: Network,
        patches: Patches,
        validation: Sequence[Sample | ArraySample],
        recipe: Recipe,
        out: Path | None = None,
        about: dict[str, Any] | None = None,
        loss: nn.Module | None = None,
        max_memory: int | str = evaluation.MEMORY,
        surface: bool = False,
    ):
        self.network, self.patches, self.validation = network, patches, validation
        self.recipe, self.out, self.about, self.max_memory = recipe, out, about or {}, max_memory
        self.surface = surface
        if network.form not in ("plain", "always_list"):
            raise InputError(f'set network.form = "plain" to train: the form {network.form!r} does not return logits')
        self.device = next(network.parameters()).device
        loss = (loss or BCEDiceLoss()).to(self.device)
        self.loss = taking_lists(loss, network.out_channels, next(network.parameters()), network.topology.spatial_dims)
        network.exclusive = is_exclusive(self.loss)
        network.normalisation = _of_all(patches, "normalisation")
        network.spacing = _of_all(patches, "resampled_to")
        self.train_step = make_step(network, recipe, self.loss, -(-len(patches) // recipe.batch_size))
        self.epoch, self.step = 0, 0  # finished epochs; finished steps of the running epoch
        self.sums = torch.zeros(3, dtype=torch.float64)  # loss, IoU, images, over the running epoch and all processes
        self.best, self.stale = recipe.worst, 0
        self.history: list[dict[str, float]] = []
        self.scores: dict[str, Any] = {}  # of the last validation
        self._stop, self._told = False, ""
        self._loader = BatchLoader(patches, recipe.workers, self.device.type == "cuda")

    @property
    def unfinished(self) -> bool:
        """Whether there are epochs left and the monitored score has improved within the last `patience` epochs."""
        return self.epoch < self.recipe.epochs and self.stale < self.recipe.patience

    def fit(
        self, progress: bool = True, after_epoch: Callable[[dict[str, float]], object] | None = None
    ) -> list[dict[str, float]]:
        """Trains to the last epoch, or until the monitored score has not improved for `patience` epochs.

        Args:
            progress: show a bar, and a line per epoch, in the first process.
            after_epoch: called with the row of each epoch, in every process.

        Returns:
            One row per epoch, keys `run_folder.COLUMNS`.

        Raises:
            Interrupted: SIGINT or SIGTERM reached some process; the state is saved.
            InputError: the loss or a weight became NaN or infinite; the message names the batch, `bad-batch.pt` holds it.
            processes.Lost: another process ended; `last.pt` holds the last saved state.
        """
        progress = progress and processes.is_first()
        with closing(self._loader), self._signals(), processes.watching():
            while self.unfinished:
                row = self._run_epoch(progress)
                if after_epoch:
                    after_epoch(row)
                if progress:
                    print(run_folder.line(row), flush=True)
                if any(processes.any_of(self._stop)) and self.unfinished:
                    raise Interrupted
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
        recent: list[Tensor] = []  # results of the steps since the last check
        with bar:
            for batch, (image, mask) in zip(batches, self._load(batches), strict=True):
                if processes.size() > 1:
                    processes.seed_step(self.recipe.seed, self.epoch, self.step)
                recent.append(self.train_step.run(image, mask, len(batch)))
                self.step += 1
                bar.update()
                due = self.step % CHECK_EVERY == 0 or self.step == total
                if not due and (processes.size() > 1 or not self._stop):
                    continue
                self._check_losses(recent)
                recent = []
                loss, iou = self._means()
                bar.set_postfix(loss=f"{loss:.4f}", iou=f"{iou:.4f}")
                if progress:
                    self._tell_what_is_not_captured(bar.write)
                stop, save = processes.any_of(self._stop, time.monotonic() - saved > SAVE_SECONDS)
                if self.step < total and (stop or save):
                    saved = time.monotonic()
                    self._check_weights()
                    self._save("last.pt", resumable=True)
                    if stop:
                        raise Interrupted
        return self._finish_epoch()

    def _tell_what_is_not_captured(self, say: Callable[[str], object]) -> None:
        """On a GPU, the reasons why steps are computed kernel by kernel, each time they change."""
        reason = self.train_step.reason
        if self.recipe.capture and self.device.type == captured.DEVICE and reason not in ("", self._told):
            self._told = reason
            say(f"training steps are computed kernel by kernel, not as CUDA graphs: {reason}")

    def _load(self, batches: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images `[N, C, *S]` and masks `[N, classes, *S]` of each batch; N is 0 if it gets none."""
        rank, size = processes.rank(), processes.size()
        mine = []
        for batch in batches:
            micro_batches = self.recipe.micro_batches(len(batch), rank, size)
            mine.append([batch[index] for indices in micro_batches for index in indices])
        # A loader cannot stack an empty batch: it gets one image, which is dropped again.
        read = [items or batch[:1] for items, batch in zip(mine, batches, strict=True)]
        for items, (image, mask) in zip(mine, self._loader.load(read), strict=True):
            yield image[: len(items)], mask[: len(items)]

    def _check_losses(self, recent: list[Tensor]) -> None:
        """Adds the results of the last steps, over all processes, to the sums of the epoch.

        Raises:
            InputError: a loss is not finite, or float16 cannot hold the gradients.
        """
        for index, totals in enumerate(processes.summed(torch.stack(recent).cpu().double())):
            if not torch.isfinite(totals).all():
                raise self._diverged(f"the loss became {float(totals[0])}", self.step - len(recent) + index)
            self.sums += totals
        if self.train_step.overflows:
            raise self._diverged("step after step overflowed float16", self.step - 1)

    def _check_weights(self) -> None:
        """Raises InputError if a weight is not finite after the last step, whose effect no loss has shown yet."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.network.parameters()):
            raise self._diverged("a weight became infinite or NaN", self.step - 1)

    def _means(self) -> tuple[float, float]:
        """Mean loss and IoU of the running epoch so far."""
        loss, iou = (self.sums[:2] / self.sums[2]).tolist()
        return loss, iou

    def _diverged(self, what: str, step: int) -> InputError:
        """The error for a batch of the running epoch; the batch is written to `bad-batch.pt`."""
        (batch, *_) = self.patches.batches(self.epoch, self.recipe.batch_size, step)
        names = [self.patches.samples[draw % len(self.patches.samples)].name for _, draw in batch]
        text = f"{what} in epoch {self.epoch + 1}: lower the learning rate, or use float32; it was batch {step + 1}, of "
        text += f"{', '.join(dict.fromkeys(names))}"
        if not self.out:
            return InputError(text)
        if processes.is_first():
            image, mask = (torch.stack(values) for values in zip(*(self.patches[item] for item in batch), strict=True))
            content = {"image": image, "mask": mask, "names": names, "epoch": self.epoch + 1, "batch": step + 1}
            save_checkpoint(self.out / "bad-batch.pt", content)
        kept = f"; {self.out / 'last.pt'} holds the last good state" if (self.out / "last.pt").exists() else ""
        return InputError(f"{text}, kept in {self.out / 'bad-batch.pt'}{kept}")

    def _finish_epoch(self) -> dict[str, float]:
        train_loss, train_iou = self._means()
        self._check_weights()
        if self.validation:
            self._save("last.pt", resumable=True)  # validating may fail
        settings: dict[str, Any] = {"dtype": self.recipe.dtype, "loss": self.loss, "max_memory": self.max_memory}
        settings |= {"surface": True} if self.surface else {}
        self.scores = {}
        if self.validation:
            with self.train_step.evaluating():
                self.scores = evaluation.evaluate(self.train_step.validated, self.validation, **settings)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = torch.zeros_like(self.sums)
        values = (
            self.epoch,
            train_loss,
            train_iou,
            *(self.scores.get(key, float("nan")) for key in ("loss", "iou", "dice")),
        )
        row = dict(zip(run_folder.COLUMNS, values, strict=True))
        self.history.append(row)
        if self.validation:
            score = row[f"val_{self.recipe.monitor}"]
            better = self.recipe.is_better(score, self.best)
            self.best, self.stale = (score, 0) if better else (self.best, self.stale + 1)
            if better:
                self._save("best.pt", resumable=False)
                self._write_scores()
        self._save("last.pt", resumable=True)
        self._write_log()
        return row

    def _write_scores(self) -> None:
        """Those of the best epoch."""
        if self.out and processes.is_first():
            run_folder.write_scores(self.out, self.about.get("classes"), {"epoch": self.epoch, **self.scores})

    def _write_log(self) -> None:
        if self.out and processes.is_first():
            run_folder.write_log(self.out / "log.csv", self.history)

    def _save(self, name: str, resumable: bool) -> None:
        if not self.out or not processes.is_first():
            return
        network = self.network if resumable else self.train_step.validated
        content: dict[str, Any] = {"config": self.network.config, "model": network.state_dict(), "about": self.about}
        content |= {"epoch": self.epoch, "best": self.best}
        content |= {"scores": self.scores} if "class_iou" in self.scores else {}
        if resumable:
            cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            content |= {
                "recipe": asdict(self.recipe),
                "loss": repr(self.loss),
                **self.train_step.state_dict(),
                "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
                "progress": {"step": self.step, "sums": self.sums.tolist(), "stale": self.stale},
                "history": self.history,
                "measured": dispatch.measured(_engine_part(self.network)),
            }
        save_checkpoint(self.out / name, content)

    def resume(self) -> None:
        """Continues the run in the folder from `last.pt`.

        Raises:
            InputError: the file is missing or unreadable, or was made with another setting, which the message names.
        """
        path = self.out / "last.pt"
        content = load_checkpoint(path)
        if "optimizer" not in content:
            raise InputError(f"{path} holds a model but not the state of a training run: it cannot be resumed")
        now = {**asdict(self.recipe), **self.about, "model": self.network.config, "loss": repr(self.loss)}
        then = {**asdict(Recipe()), **content["recipe"], **content["about"]}
        added = {key: value for key, value in now["model"].items() if key == "normalisation"}  # older networks carry none
        then["model"] = {**added, **content["config"]}
        then["loss"] = content.get("loss", repr(BCEDiceLoss()))  # older checkpoints name no loss
        keys = [key for key in (*now, *content["about"]) if key not in self.recipe.may_change]
        changed = [key for key in keys if _plain(now.get(key)) != _plain(then.get(key))]
        if changed:
            key, values = changed[0], f"{then.get(changed[0])!r}, now {now.get(changed[0])!r}"
            long = f"{key} set" if key in self.about or key in content["about"] else key
            shown = f"{key}={values}" if len(values) < 80 else long
            raise InputError(f"{path} was made with another {shown}: resume with the same, or choose another folder")
        self.network.load_state_dict(content["model"])
        self.train_step.load_state_dict(content)
        dispatch.adopt(_engine_part(self.network), content.get("measured", {}))  # another backend would give other bits
        torch.set_rng_state(content["random"]["cpu"])
        if self.device.type == "cuda" and content["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["random"]["cuda"], self.device)
        self.epoch, self.best, self.history = content["epoch"], content["best"], content["history"]
        self.step, self.stale = content["progress"]["step"], content["progress"]["stale"]
        self.sums = torch.tensor(content["progress"]["sums"], dtype=torch.float64)
        self._write_log()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM let the running step finish, then save and raise `Interrupted`; a second one interrupts
        at once."""
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
        except processes.Lost:  # torchrun now sends SIGTERM to the others: leave time to print why
            before[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _engine_part(network: Any) -> NetworkSpec:
    """What the engine runs of a network: over an encoder, the nest."""
    return getattr(network, "nest", network)


def _of_all(patches: Patches, name: str) -> Any:
    """What all samples have under this name; None if they do not tell, or differ."""
    found = {getattr(sample, name, None) for sample in patches.samples}
    return found.pop() if len(found) == 1 else None


def _plain(value: Any) -> Any:
    """The value with tuples as lists, which a checkpoint may turn them into."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
