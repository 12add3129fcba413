"""How a network is trained: the numbers of a run, and its precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..architecture.precision import autocast_dtype
from ..common.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How to train. A run is resumed only if everything but `MAY_CHANGE` is the same.

    Args:
        batch_size: images per step, over all processes together.
        accumulate: micro-batches per batch, for gradient accumulation; batch norm takes its statistics per micro-batch.
        workers: processes that load images ahead, for each process that trains.
        capture: on a GPU, in one process, compute steps as replays of CUDA graphs (`captured.py`).
        reproducible: on a CPU, the same weights for every number of processes and threads (`reproducible.py`); slower.
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
        autocast_dtype(self.dtype)

    def micro_batch_count(self, batch: int, world_size: int) -> int:
        """The number of micro-batches of a batch of `batch` images; every one has an image in some process."""
        return min(self.accumulate, batch if self.reproducible else math.ceil(batch / world_size))

    def micro_batches(self, batch: int, rank: int, world_size: int) -> list[list[int]]:
        """The images of one process in each micro-batch of a batch of `batch` images, by their index in the batch."""
        whole = torch.arange(batch).tensor_split(self.micro_batch_count(batch, world_size))
        return [indices.tolist()[rank::world_size] for indices in whole]
