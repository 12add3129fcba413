"""What is measured, and what an implementation makes of it: something ready to run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..architecture.precision import PRECISIONS, autocast
from ..common.extras import need
from ..models.network import Network

LAUNCH_BOUND = 128 * 128  # pixels per batch; with fewer, launches take longer than kernels, so runs are CUDA graphs


class Unavailable(Exception):
    """An implementation cannot run a case on this machine; the message gives the reason."""


@dataclass(frozen=True)
class Case:
    """What is measured, by the names of a row's fields (`records.FIELDS`)."""

    bench: str
    model: str
    level: int
    mode: str | None
    size: tuple[int, ...]
    batch: int
    dtype: str
    memory_of: str | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        parts = [self.bench, self.model, f"L{self.level}", self.mode, size, f"batch{self.batch}", self.dtype, self.memory_of]
        return "-".join(part for part in parts if part)

    @property
    def training(self) -> bool:
        return "training" in (self.bench, self.memory_of)

    @property
    def torch_dtype(self) -> torch.dtype:
        return PRECISIONS[self.dtype].dtype


@dataclass
class Prepared:
    """An implementation that is ready to run.

    forward: from `x` to logits `[N, classes, *S]`, one tensor per head.
    parameters: what training updates; empty if it cannot train.
    capturable: whether a CUDA graph can capture it.
    ours: whether `parameters` are those of the reference, in the same order.
    """

    forward: Callable[[Tensor], Tensor | Sequence[Tensor]]
    x: Tensor
    parameters: list[Tensor] = field(default_factory=list)
    capturable: bool = True
    ours: bool = True


Builder = Callable[[Network, Tensor, Case], Prepared]


def prepare(model: Any, x: Tensor, case: Case, channels_last: bool = False) -> Prepared:
    """A module as PyTorch runs it, under autocast in half precision."""
    model.train(case.training)
    if channels_last:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    return Prepared(under_autocast(model, x.device, case), x, list(model.parameters()))


def under_autocast(model: Callable, device: torch.device, case: Case) -> Callable:
    """`model` in the precision of the case."""

    def forward(x: Tensor):
        with autocast(device, case.dtype):
            return model(x)

    return forward


def with_backend(network: Network, backend: str) -> Network:
    """An independent copy that runs on one backend."""
    network = copy.deepcopy(network)
    network.backend = backend
    return network


def captured(case: Case, device: torch.device) -> bool:
    """Whether the runs of a case are replays of CUDA graphs."""
    pixels = case.batch * functools.reduce(int.__mul__, case.size)
    return device.type == "cuda" and pixels <= LAUNCH_BOUND


def load(module: str, extra: str | None = None) -> ModuleType:
    """Imports what an implementation needs, as `extras.need`.

    Raises:
        Unavailable: it is not installed, or its import fails.
    """
    try:
        return need(module, extra)
    except Exception as error:  # an installed library may fail to import with any error
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise Unavailable(f"{module} cannot be imported: {cause}") from error
