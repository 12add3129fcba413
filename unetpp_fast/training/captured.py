"""Training steps as replays of CUDA graphs, for sizes at which launching kernels one by one takes longer than they do.

Forward pass, loss and backward pass of a size are captured after two real steps and replayed as one launch from then on.
What the host decides at every step stays outside: the optimizer with its schedule, clipping, the update of the loss scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common import cuda_graphs
from ..common.devices import wait
from ..common.errors import first_line
from . import processes
from .layer_state import LayerState

WARM_UP = 2  # real steps of a size before it is captured: kernels are compiled, and choices made
KEPT_SIZES = 4
IDLE_STEPS = 50  # after so many steps without it a size gives its place to another one
DEVICE = "cuda"  # the type of devices whose work can be captured
Run = Callable[..., Tensor]


@dataclass
class _Size:
    """Steps of one size: how many there were, the last one's number, and why it cannot be captured or its graph.

    inputs, gradients (one per parameter) and result are the tensors that the graph reads and writes.
    """

    steps: int = 0
    last: int = 0
    failure: str = ""
    graph: Any = None  # a torch.cuda.CUDAGraph
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    result: Any = None  # a tensor


class StepGraphs:
    """The graphs of training steps, one for each size.

    Args:
        modules: whose parameters get gradients; all on one device. A change of their layers, attributes or tensors is
            noticed: steps are then captured anew. What else a step reads from Python (a global number, a list's elements) is
            that of its capture.
        kept: the number of sizes that are captured.
    """

    def __init__(self, modules: Sequence[nn.Module], kept: int = KEPT_SIZES):
        self.modules, self.kept = modules, kept
        self._steps = self._changes = 0  # all steps; changes of the layers since the last replay
        self._obstacle = self._crowded = ""
        self._layers: Any = None  # a LayerState after the first step
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # one a device: memory stays with its stream
        self._sizes: dict[tuple, _Size] = {}
        self.forget()

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return next(parameter for module in self.modules for parameter in module.parameters()).device

    @property
    def reason(self) -> str:
        """Why steps are computed kernel by kernel, a line for each cause; "" if they are captured, or will be at the third
        step of their size."""
        if self._obstacle:
            return self._obstacle
        changed = "layers, their attributes or tensors change between steps: they are captured when these stay as they are"
        lines = [changed if self._changes > 1 else "", self._crowded, *(size.failure for size in self._sizes.values())]
        return "\n".join(dict.fromkeys(filter(None, lines)))

    def forget(self) -> None:
        """Drops all graphs: the next steps are captured anew."""
        self._finish()
        self._sizes.clear()
        self._layers, self._crowded = None, ""
        self._lent: list[Tensor | None] = []  # the gradients, of a graph, that the last replay left in `.grad`

    def _finish(self) -> None:
        """Waits for graphs that may be running, before any is dropped."""
        for device in {size.inputs[0].device for size in self._sizes.values() if size.graph}:
            wait(device)

    def run(self, step: Run, inputs: Sequence[Tensor], key: tuple = ()) -> Tensor:
        """`step(*inputs)`, on the device: adds gradients to `.grad` and returns a tensor without a gradient.

        Args:
            step: launches everything on the current stream, and reads nothing back.
            inputs: on any device, the first axis of each of the images; from pinned memory they are copied without waiting.
            key: tells apart steps that differ in more than their inputs' sizes and types.
        """
        if self._is_apart(inputs):
            return step(*self._moved(inputs))
        self._steps += 1
        layouts = [_layout(x) for x in inputs]
        kinds = [(x.shape, x.dtype, layout) for x, layout in zip(inputs, layouts, strict=True)]
        size = self._sizes.setdefault((*key, *_settings(self.device), *kinds), _Size())
        size.steps, size.last = size.steps + 1, self._steps
        if size.failure or (size.steps > WARM_UP and not self._has_room(size)):
            return step(*self._moved(inputs))
        with torch.cuda.device(self.device), _without_kept_casts():
            if size.steps <= WARM_UP:
                moved = [x.contiguous(memory_format=one) for x, one in zip(self._moved(inputs), layouts, strict=True)]
                return cuda_graphs.on_side_stream(self._side_stream(), lambda: step(*moved))
            return self._replayed(size, step, inputs, layouts)

    def _is_apart(self, inputs: Sequence[Tensor]) -> bool:
        """Whether this step is computed kernel by kernel, whatever its size; notes why, and changes of the layers."""
        self._obstacle = self._why_never(inputs)
        if self._obstacle:
            return True
        if self._layers is None or not self._layers.holds():
            self._changes += self._layers is not None
            self.forget()
            self._layers = LayerState(self.modules)
        self._obstacle = self._layers.obstacle()
        return bool(self._obstacle) or not all(map(len, inputs)) or torch.cuda.is_current_stream_capturing()

    def _why_never(self, inputs: Sequence[Tensor]) -> str:
        if self.device.type != DEVICE:
            return f"the model is on {self.device}: only a GPU's work is captured"
        if processes.size() > 1:
            return "several processes train together: they exchange gradients by hooks, which a replay would not call"
        if any(x.requires_grad for x in inputs):
            return "an input needs a gradient, which a replay would not give it"
        return ""

    def _moved(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(self.device, non_blocking=True) for x in inputs]

    def _side_stream(self) -> torch.cuda.Stream:
        if self.device not in self._streams:
            self._streams[self.device] = torch.cuda.Stream(self.device)
        return self._streams[self.device]

    def _has_room(self, size: _Size) -> bool:
        """Whether a size has a graph or may have one; one that was not used for long is dropped for it."""
        captured = {key: other for key, other in self._sizes.items() if other.graph}
        if size.graph or len(captured) < self.kept:
            return True
        oldest = min(captured, key=lambda key: captured[key].last)
        if self._steps - captured[oldest].last <= IDLE_STEPS:
            self._crowded = f"steps of more than {self.kept} sizes take turns: only {self.kept} of them are captured"
            return False
        self._finish()
        del self._sizes[oldest]
        self._crowded = ""
        return True

    def _replayed(self, size: _Size, step: Run, inputs: Sequence[Tensor], layouts: Sequence[torch.memory_format]) -> Tensor:
        lent = set(map(id, self._lent))  # the replay may write to these: what was summed there goes elsewhere
        gradients = [parameter.grad for parameter in self._layers.parameters]
        before = [one.clone() if one is not None and id(one) in lent else one for one in gradients]
        if size.graph is None and not self._is_captured(size, step, inputs, layouts, before):
            return step(*self._moved(inputs))
        for room, x in zip(size.inputs, inputs, strict=True):
            room.copy_(x, non_blocking=True)
        size.graph.replay()
        self._changes, self._lent = 0, size.gradients
        torch.autograd.graph.increment_version(self._layers.buffers)  # running statistics, which the graph has written
        summed = [(old, new) for old, new in zip(before, size.gradients, strict=True) if old is not None and new is not None]
        if summed:
            with torch.no_grad():
                torch._foreach_add_(*map(list, zip(*summed, strict=True)))
        self._give([new if old is None else old for old, new in zip(before, size.gradients, strict=True)])
        return size.result.clone()

    def _is_captured(self, size: _Size, step: Run, inputs: Sequence[Tensor], layouts: Sequence, before: Sequence) -> bool:
        """Captures a size, or notes why that fails; afterwards gradients are as `before`."""
        pool = next((other.graph.pool() for other in self._sizes.values() if other.graph), None)
        self._give([None] * len(before))  # so that the backward pass makes gradients that stay
        try:
            rooms = [cuda_graphs.room_for(x, self.device, layout) for x, layout in zip(inputs, layouts, strict=True)]
            graph, result = cuda_graphs.capture(lambda: step(*rooms), self._side_stream(), pool)
            gradients = [parameter.grad for parameter in self._layers.parameters]
            size.graph, size.inputs, size.gradients, size.result = graph, rooms, gradients, result
        except Exception as error:  # of Triton's own kind or torch's
            shape = "x".join(map(str, inputs[0].shape))
            size.failure = f"{shape} is not captured: {type(error).__name__}: {first_line(error)}"
        finally:
            self._give(before)
        return not size.failure

    def _give(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._layers.parameters, gradients, strict=True):
            parameter.grad = gradient


def _settings(device: torch.device) -> tuple:
    """What is set outside of the modules and changes the kernels of a step."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precisions = convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return autocast, *precisions, torch.are_deterministic_algorithms_enabled()


def _layout(x: Tensor) -> torch.memory_format:
    """Channels-last if the tensor is laid out so and not contiguous, else contiguous."""
    last: Any = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    wanted = last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return last if wanted else torch.contiguous_format


@contextmanager
def _without_kept_casts() -> Iterator[None]:
    """Inside, autocast casts a weight at every use: a graph would go on reading what was cast before it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class CapturedStep:
    """What `capture` returns."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], scaler: torch.amp.GradScaler | None, kept: int):
        self.model, self.loss, self.scaler = model, loss, scaler
        self.graphs = StepGraphs([model, *([loss] if isinstance(loss, nn.Module) else [])], kept)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the gradients of `loss(model(x), y)` to `.grad`; returns that loss.

        Args:
            x: `[N, C, *S]`, the model's input. y: the loss's target. Both on any device; from pinned memory they are copied
                without waiting, so do not write to them before the step has run.

        Returns:
            The loss, without a gradient, on the model's device.
        """
        return self.graphs.run(self._step, (x, y))

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.loss(self.model(x), y)
        with torch.autocast(x.device.type, enabled=False):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    @property
    def reason(self) -> str:
        """Why steps are computed kernel by kernel, a line for each cause; "" if they are captured, or will be at the third
        step of their size."""
        return self.graphs.reason

    def forget(self) -> None:
        """Drops what was captured: call it after a change that no attribute of a layer, of model or loss, shows."""
        self.graphs.forget()


def capture(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
    kept: int = KEPT_SIZES,
) -> CapturedStep:
    """A training step whose forward pass, loss and backward pass are one launch on a GPU, a replayed CUDA graph.

    >>> step = capture(model, BCEDiceLoss())  # doctest: +SKIP
    >>> for x, y in batches:  # doctest: +SKIP
    ...     optimizer.zero_grad()
    ...     with torch.autocast("cuda", torch.bfloat16):
    ...         value = step(x, y)  # as loss(model(x), y).backward()
    ...     optimizer.step()

    The first two calls of a size run kernel by kernel, the third is captured; sizes are told apart by shape, dtype, layout,
    autocast and precision. Gradients are added to `.grad`, as `backward` does; clipping, schedules and optimizers are used
    as ever. A tensor that a call left in `.grad` is written again by the next one: clone it to keep it. Where capturing is
    not possible the step computes the same kernel by kernel, and `step.reason` says why.

    Args:
        model: on the device to train on.
        loss: takes the model's outputs and the target; a module, or a function whose Python numbers never change.
        scaler: scales the loss before the backward pass, for float16.
        kept: the number of sizes that are captured, at least 1; their memory stays taken.

    Raises:
        TypeError: the model is no module. ValueError: `kept` is less than 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture takes a module, not {type(model).__name__}")
    if kept < 1:
        raise ValueError(f"kept must be at least 1, not {kept}")
    return CapturedStep(model, loss, scaler, kept)
