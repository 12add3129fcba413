"""How a network is trained: the numbers of a run, and its precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..architecture.precision import autocast_dtype
from ..common.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How to train. Everything but `epochs`, `patience` and `workers` must stay as it is when a run is resumed.

    Args:
        batch_size: images of a step, over all processes together.
        accumulate: parts that a batch is worked off in, one after another; batch norm takes its statistics of a part.
        workers: processes that read images ahead, for each process that trains.
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

    MAY_CHANGE = ("epochs", "patience", "workers")

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

    def parts(self, whole: int, processes: int) -> int:
        """Into how many parts a batch of `whole` images is divided, none of them empty for all processes."""
        return min(self.accumulate, whole if self.reproducible else math.ceil(whole / processes))

    def shares(self, whole: int, rank: int, processes: int) -> list[list[int]]:
        """The images that one process works off in each part of a batch, by their place in it."""
        return [part.tolist()[rank::processes] for part in torch.arange(whole).tensor_split(self.parts(whole, processes))]
