"""Optimizers, schedules of the learning rate and averaged weights, all of PyTorch, by the names that a recipe gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    PolynomialLR,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..common.errors import InputError

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {}),
    "adamw": (AdamW, {}),
    "sgd": (SGD, {"momentum": 0.9, "nesterov": True}),
}
LEARNING_RATES = {"adam": 3e-4, "adamw": 3e-4, "sgd": 1e-2}  # Adam's is the paper's, SGD's that of nnU-Net
# From the optimizer and the number of steps after warm-up.
SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, factor=1.0, total_iters=0),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    "poly": lambda optimizer, steps: PolynomialLR(optimizer, total_iters=steps, power=0.9),  # as in nnU-Net
}


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> Optimizer:
    """The optimizer of that name.

    Raises:
        InputError: there is none.
    """
    kind: Any
    kind, settings = OPTIMIZERS[known("optimizer", name, OPTIMIZERS)]
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay, **settings)


def make_schedule(name: str, optimizer: Optimizer, warm_up: int, steps: int) -> LRScheduler | None:
    """A schedule that is stepped once per step of the optimizer, or None if the learning rate stays the same.

    Args:
        name: of the schedule.
        optimizer: whose learning rate is the largest one.
        warm_up: the number of first steps over which the rate rises linearly to that.
        steps: of the whole run.

    Raises:
        InputError: there is no such schedule.
    """
    after = SCHEDULES[known("schedule", name, SCHEDULES)]
    if warm_up < 1:
        return None if name == "constant" else after(optimizer, max(steps, 1))
    rising = LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    return SequentialLR(optimizer, [rising, after(optimizer, max(steps - warm_up, 1))], milestones=[warm_up])


class MovingAverage(AveragedModel):
    """Exponential moving average of the weights and buffers of a network.

    Update n keeps min(decay, (1 + n) / (10 + n)) of the average, so that a short run is not held back by its first weights.

    Args:
        network: which is copied.
        decay: below 1.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay
        self.n_averaged = self.n_averaged.cpu()  # read at every step: a GPU would have to be waited for

    def update_parameters(self, model: nn.Module) -> None:
        """Takes the weights after a step into the average."""
        count = int(self.n_averaged)
        self.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + count) / (10 + count)))
        super().update_parameters(model)


def known(what: str, name: str, table: Iterable[str]) -> str:
    """The name, if the table has it.

    Raises:
        InputError: it does not.
    """
    if name not in table:
        raise InputError(f"{what} must be one of {', '.join(table)}, not {name!r}")
    return name
