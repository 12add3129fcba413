"""One optimizer step, in two ways: the usual one for every device and precision, and the reproducible one for CPUs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..architecture.layers import NodeModule
from ..architecture.precision import autocast
from ..execution.built import changed
from ..models.network import Network
from . import optimizers, processes, reproducible
from .captured import StepGraphs
from .exclusive import exclusive_iou
from .loss_table import is_exclusive
from .metrics import iou_score
from .recipe import Recipe

SMALLEST_SCALE = 1.0  # the loss scale of float16 starts at 2^16 and is halved by every step whose gradients overflow


class Step(ABC):
    """An optimizer's step on a batch that all processes share, in micro-batches whose gradients are accumulated.

    Args:
        network: on the device to train on.
        recipe: see `Recipe`.
        loss: see `Trainer`.
        steps: per epoch.
    """

    def __init__(self, network: Network, recipe: Recipe, loss: nn.Module, steps: int):
        self.network, self.recipe, self.loss = network, recipe, loss
        self.model: nn.Module = network  # called for the outputs
        self.device = next(network.parameters()).device
        self.optimizer = optimizers.make_optimizer(
            recipe.optimizer, network.parameters(), recipe.learning_rate, recipe.weight_decay
        )
        warm_up, run = round(recipe.warm_up * steps), recipe.epochs * steps
        self.schedule = optimizers.make_schedule(recipe.schedule, self.optimizer, warm_up, run)
        self.average = optimizers.MovingAverage(network, recipe.ema) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.dtype == "float16")
        self._cancelled = _biases_before_norms(network)

    def run(self, image: Tensor, mask: Tensor, batch: int) -> Tensor:
        """Updates the weights by one step on this process's images of a batch.

        Args:
            image: `[N, C, *S]`, in the order of `Recipe.micro_batches`; N may be 0.
            mask: `[N, classes, *S]`.
            batch: number of images of the batch, over all processes together.

        Returns:
            `[3]`: loss, IoU of the last head, and 1, each times N.
        """
        sizes = [len(indices) for indices in self.recipe.micro_batches(batch, processes.rank(), processes.size())]
        totals = torch.zeros(3, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with self._computing():
            for number, micro_batch in enumerate(zip(image.split(sizes), mask.split(sizes), strict=True), start=1):
                with self._accumulating(last=number == len(sizes)):
                    totals = totals + self._pass(*micro_batch, batch)
            for bias in self._cancelled:
                bias.grad = None
            if self.recipe.clip:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._follow()
        return totals

    def _follow(self) -> None:
        """What a step of the optimizer moves on: the learning rate and the average of the weights."""
        if self.schedule:
            with warnings.catch_warnings():  # of a first step that overflowed float16 and was left out
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.schedule.step()
        if self.average:
            self.average.update_parameters(self.network)

    @property
    def validated(self) -> Network:
        """The network to validate and to keep: with averaged weights, if the recipe asks for them."""
        averaged: Any = self.average.module if self.average else self.network
        return averaged

    def _pass(self, image: Tensor, mask: Tensor, batch: int) -> Tensor:
        """`_backward` of a micro-batch that may lie on another device."""
        image, mask = (part.to(self.device, non_blocking=True) for part in (image, mask))
        return self._backward(image, mask, batch)

    def _backward(self, image: Tensor, mask: Tensor, batch: int) -> Tensor:
        """Adds the gradients of a micro-batch; returns the result of `run` for its images."""
        with autocast(self.device, self.recipe.dtype):
            outputs = self.model(image)
        heads = outputs if isinstance(outputs, list) else [outputs]
        loss = self._add_gradients(heads, mask, batch)
        if not len(image):
            return torch.zeros(3, device=self.device)
        with torch.no_grad():
            last = heads[-1]
            iou = exclusive_iou(last, mask) if is_exclusive(self.loss) else iou_score(last > 0, mask)
            return torch.stack([loss.detach().to(iou.dtype), iou, torch.ones_like(iou)]) * len(image)

    @abstractmethod
    def _add_gradients(self, heads: list[Tensor], mask: Tensor, batch: int) -> Tensor:
        """Runs the backward pass of a micro-batch; returns the mean loss of its images, or any scalar if there are none."""

    def _computing(self) -> AbstractContextManager:
        """A context for all computations of a step."""
        return nullcontext()

    def _accumulating(self, last: bool) -> AbstractContextManager:
        """A context for the passes of a micro-batch."""
        return nullcontext()

    def evaluating(self) -> AbstractContextManager:
        """A context for the computation of validation scores."""
        return nullcontext()

    @property
    def reason(self) -> str:
        """Why steps are not replays of CUDA graphs, a line for each cause; "" if they are, or will be after two steps."""
        return "not asked for"

    @property
    def overflows(self) -> bool:
        """Whether one step after another was skipped because its gradients overflowed float16."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, its schedule, the loss scale and the average of the weights, for checkpoints."""
        return {key: part.state_dict() for key, part in self._stateful().items()}

    def _stateful(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "scaler": self.scaler, "schedule": self.schedule, "ema": self.average}
        return {key: part for key, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; other entries are ignored."""
        for key, part in self._stateful().items():
            part.load_state_dict(state[key])


class UsualStep(Step):
    """In the recipe's precision, on any device. With several processes `DistributedDataParallel` averages the gradients, and
    batch norms take their statistics over all processes. With one, on a GPU, micro-batches are replays of CUDA graphs."""

    def __init__(self, network: Network, recipe: Recipe, loss: nn.Module, steps: int):
        super().__init__(network, recipe, loss, steps)
        self.graphs = StepGraphs([network, loss])
        if processes.size() > 1:
            self.model = processes.parallel(processes.sync_batch_norm(network))

    def _pass(self, image: Tensor, mask: Tensor, batch: int) -> Tensor:
        if not self.recipe.capture:
            return super()._pass(image, mask, batch)
        return self.graphs.run(lambda image, mask: self._backward(image, mask, batch), (image, mask), (batch,))

    @property
    def reason(self) -> str:
        return self.graphs.reason if self.recipe.capture else super().reason

    def _add_gradients(self, heads: list[Tensor], mask: Tensor, batch: int) -> Tensor:
        count = len(mask)
        loss: Any = self.loss(heads, mask) if count else sum(head.sum() for head in heads)
        # Gradients are averaged over processes and summed over micro-batches: together that is the mean over all images.
        self.scaler.scale(loss * (count * processes.size() / batch)).backward()
        return loss

    def _accumulating(self, last: bool) -> AbstractContextManager:
        waits = not last and isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if waits else nullcontext()


class ReproducibleStep(Step):
    """On a CPU in float32, image by image: the weights do not depend on the number of processes or threads.

    Raises:
        InputError: the network cannot be trained in this way.
    """

    def __init__(self, network: Network, recipe: Recipe, loss: nn.Module, steps: int):
        reproducible.check(network, next(network.parameters()).device, recipe.dtype)
        reproducible.same_weights(network)
        super().__init__(network, recipe, loss, steps)

    def _add_gradients(self, heads: list[Tensor], mask: Tensor, batch: int) -> Tensor:
        total = reproducible.sum_over_images(self.loss, heads, mask)
        (total / batch).backward()
        return total / max(len(mask), 1)

    def _computing(self) -> AbstractContextManager:
        return reproducible.each_image(self.network)

    def evaluating(self) -> AbstractContextManager:
        return reproducible.one_thread()


def make_step(network: Network, recipe: Recipe, loss: nn.Module, steps: int) -> Step:
    """The step that a recipe asks for; see `Step`.

    Raises:
        InputError: the recipe is reproducible and the network cannot be trained reproducibly.
    """
    return (ReproducibleStep if recipe.reproducible else UsualStep)(network, recipe, loss, steps)


def _biases_before_norms(network: Network) -> list[nn.Parameter]:
    """Biases that the following norm subtracts again.

    Their gradients are rounding errors, which differ with the number of processes and threads; Adam would make whole steps
    of them.
    """
    if changed(getattr(network, "nest", network)):  # then nobody knows
        return []
    nodes = [module for module in network.modules() if isinstance(module, NodeModule)]
    pairs = [pair for node in nodes for pair in ((node.conv1, node.norm1), (node.conv2, node.norm2))]
    return [conv.bias for conv, norm in pairs if conv.bias is not None and not isinstance(norm, nn.Identity)]
