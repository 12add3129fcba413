"""How a network is trained: the numbers of a run, and its precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..architecture.precision import autocast_dtype
from ..common.errors import InputError
from .optimizers import OPTIMIZERS, SCHEDULES, known

MONITORS = {"iou": max, "dice": max, "loss": min}  # validation scores, and which value of one is the best


@dataclass(frozen=True)
class Recipe:
    """How to train. A run is resumed only if everything but `MAY_CHANGE` is the same.

    Args:
        batch_size: images per step, over all processes together.
        accumulate: micro-batches per batch, for gradient accumulation; batch norm takes its statistics per micro-batch.
        workers: processes that load images ahead, for each process that trains.
        capture: on a GPU, in one process, compute steps as replays of CUDA graphs (`captured.py`).
        reproducible: on a CPU, the same weights for every number of processes and threads (`reproducible.py`); slower.
        optimizer: a name of `optimizers.OPTIMIZERS`.
        weight_decay: of the optimizer.
        schedule: of the learning rate over the steps of the run, a name of `optimizers.SCHEDULES`.
        warm_up: epochs, or a part of one, over which the learning rate rises linearly to its largest value.
        clip: the largest norm of the gradient of all weights together; a larger one is scaled to it. 0 for none.
        ema: decay of the moving average of the weights, below 1, which is then validated and kept as the best; 0 for none.
        monitor: the validation score that decides which epoch is the best and when to stop: a name of `MONITORS`.
    """

    epochs: int = 100
    batch_size: int = 8
    learning_rate: float = 3e-4
    patience: int = 20
    seed: int = 0
    dtype: str = "float32"
    workers: int = 0
    accumulate: int = 1
    reproducible: bool = False
    capture: bool = True
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "constant"
    warm_up: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    monitor: str = "iou"

    MAY_CHANGE = ("epochs", "patience", "workers", "capture")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, not {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and below 2^63, not {self.seed}")
        if self.workers < 0:
            raise InputError(f"workers must be at least 0, not {self.workers}")
        known("optimizer", self.optimizer, OPTIMIZERS)
        known("schedule", self.schedule, SCHEDULES)
        known("monitor", self.monitor, MONITORS)
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be finite and at least 0, not {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be a decay such as 0.999, at least 0 and below 1, not {self.ema}")
        if not 0 <= self.warm_up < self.epochs:
            raise InputError(f"warm_up must be at least 0 and below the {self.epochs} epochs, not {self.warm_up}")
        autocast_dtype(self.dtype)

    @property
    def may_change(self) -> tuple[str, ...]:
        """What may differ when a run is resumed: `MAY_CHANGE`, but not the epochs that a schedule is spread over."""
        return tuple(name for name in self.MAY_CHANGE if name != "epochs" or self.schedule == "constant")

    @property
    def worst(self) -> float:
        """A value of the monitored score that every other is better than."""
        return -math.inf if MONITORS[self.monitor] is max else math.inf

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value of the monitored score is better than another; NaN is not."""
        return value == value and value != than and MONITORS[self.monitor](value, than) == value

    def micro_batch_count(self, batch: int, world_size: int) -> int:
        """The number of micro-batches of a batch of `batch` images; every one has an image in some process."""
        return min(self.accumulate, batch if self.reproducible else math.ceil(batch / world_size))

    def micro_batches(self, batch: int, rank: int, world_size: int) -> list[list[int]]:
        """The images of one process in each micro-batch of a batch of `batch` images, by their index in the batch."""
        whole = torch.arange(batch).tensor_split(self.micro_batch_count(batch, world_size))
        return [indices.tolist()[rank::world_size] for indices in whole]
