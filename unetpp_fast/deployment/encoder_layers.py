"""Convolutions of another library's encoder by the CPU kernels, each where it was measured to be faster than PyTorch's.

Modules and their weights stay where they are: on a copy of the encoder, only the `forward` of convolutions and ReLUs is
replaced. A convolution that runs once, of 3 taps at stride 1 or of 1 tap, is such a layer; it also computes the ReLU that
alone reads it. Outside a pass that says which layers the kernels take (`running`), everything runs in PyTorch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture.precision import compute_dtype
from ..common.waiting import computed_and_waited, share_waited
from ..execution.fused import tuning, verdicts
from ..kernels import cpu_ops
from .folding import CLOSE, CONVOLUTIONS, Recorded, are_close

ROUNDS = 4  # of measuring the layers of a pass, each with and without the kernels
CLEARLY = 1.03  # as many times as fast a layer must be to leave PyTorch's
BOUNDS = {torch.float32: CLOSE, torch.bfloat16: 0.1}  # of the largest value, by which a map may differ from PyTorch's
MARK = "_unetpp_fast_rectified"  # on a tensor: its version when a ReLU was applied


class Pass:
    """What computes each layer of one pass: the kernels those whose places are in `kernels`. `times`: seconds, by place."""

    def __init__(self, kernels: Collection[int]) -> None:
        self.kernels = frozenset(kernels)
        self.times: dict[int, float] = {}

    def compute(self, layer: Layer, x: Tensor) -> Tensor:
        began = time.perf_counter()
        with torch.inference_mode(False):  # whose tensors count their changes
            y = layer.by_kernels(x) if layer.place in self.kernels else layer.by_pytorch(x)
            if layer.rectified:
                setattr(y, MARK, y._version)
        self.times[layer.place] = time.perf_counter() - began
        return y


_pass: ContextVar[Pass | None] = ContextVar("pass of an encoder", default=None)


@contextmanager
def running(one: Pass | None) -> Iterator[None]:
    """Inside, layers are computed as this pass says; without one, by PyTorch."""
    token = _pass.set(one)
    try:
        yield
    finally:
        _pass.reset(token)


class Layer:
    """The `forward` of a convolution. place: among its encoder's layers. size: of its map of a small image, which tells
    layers of different encoders apart. rectified: whether a ReLU alone reads it."""

    def __init__(self, conv: nn.Module, place: int, size: Sequence[int], rectified: bool) -> None:
        self.conv, self.place, self.size, self.rectified = conv, place, tuple(size), rectified
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        one = _pass.get()
        if one is None or torch.compiler.is_compiling():
            return type(self.conv).forward(self.conv, x)
        return one.compute(self, x)

    def __str__(self) -> str:
        return f"{tuple(self.conv.weight.shape)} {self.size} {self.rectified}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}

    def by_pytorch(self, x: Tensor) -> Tensor:
        y = type(self.conv).forward(self.conv, x)
        return y.relu_() if self.rectified else y

    def by_kernels(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x = x.to(compute_dtype(x)).contiguous(memory_format=layout)
        conv = self.conv
        if conv.kernel_size[0] == 1:
            rows, bias = x.movedim(1, -1).flatten(0, -2), conv.bias
            y = F.linear(rows, conv.weight.flatten(1), bias).unflatten(0, (x.shape[0], *x.shape[2:])).movedim(-1, 1)
            return y.relu_() if self.rectified else y
        y = torch.empty(x.shape[0], conv.out_channels, *x.shape[2:], dtype=x.dtype, memory_format=layout)
        bias = None if conv.bias is None else conv.bias.float()
        axes = x.ndim - 2
        cpu_ops.conv(_last(y), _last(x), self._filters(), axes=axes, bias=bias, act=self.rectified)
        return y

    def _filters(self) -> Tensor:
        """The weight as a view `[3^axes, K, CO]`, the same tensor in every call, so that what is packed from it is kept."""
        weight = self.conv.weight.detach()
        if self._weight is None or self._weight.data_ptr() != weight.data_ptr():
            self._weight = weight.flatten(2).permute(2, 1, 0)
        return self._weight

    def forget(self) -> None:
        """Frees what was packed."""
        self._weight = None


class Rectify:
    """The `forward` of a ReLU, which leaves alone what a layer has rectified and nothing has changed since."""

    def __init__(self, relu: nn.ReLU) -> None:
        self.relu = relu

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            version = getattr(x, MARK, None)
            if version is not None and version == x._version:
                return x
        return F.relu(x, inplace=self.relu.inplace)


def _last(x: Tensor) -> Tensor:
    """A map as the kernels take it, `[N, D, H, W, C]`."""
    x = x.movedim(1, -1)
    return x if x.ndim == 5 else x[:, None]


@torch.no_grad()
def with_layers(encoder: nn.Module, x: Tensor) -> nn.Module:
    """A copy of an encoder in eval mode with layers, for images of the kind of `x`; itself if they would change its maps."""
    try:
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            result = copy.deepcopy(encoder)
            convs, rectified = _found(result, x)
            for place, (conv, size) in enumerate(convs.items()):
                conv.forward = Layer(conv, place, size, conv in rectified)
            for relu in result.modules():
                if type(relu) is nn.ReLU and "forward" not in relu.__dict__:
                    relu.forward = Rectify(relu)  # type: ignore[method-assign, assignment]
            with running(Pass(range(len(convs)))):
                same = are_close(encoder(x), result(x))
        for layer in layers_of(result):
            layer.forget()
    except Exception:  # whatever another library's module does, it runs as it is
        return encoder
    return result if same else encoder


def layers_of(encoder: nn.Module) -> list[Layer]:
    """The layers of an encoder, by their places."""
    found = [module.__dict__.get("forward") for module in encoder.modules()]
    return sorted((one for one in found if isinstance(one, Layer)), key=lambda layer: layer.place)


def _found(encoder: nn.Module, x: Tensor) -> tuple[dict[nn.Module, tuple[int, ...]], set[nn.Module | None]]:
    """The convolutions that can be layers with the sizes of their maps, and those that a ReLU alone reads."""
    recorded = Recorded(encoder, x)
    rectified = {recorded.convolution_before(node) for node in recorded.nodes if type(node).__name__ == "ReluBackward0"}
    convs = [conv for conv in encoder.modules() if recorded.runs[conv] == 1 and _has_kernel(conv)]
    sizes: dict[nn.Module, tuple[int, ...]] = {}

    def look(conv: nn.Module, inputs: tuple, y: Tensor) -> None:
        """A convolution may be of a class that pads in its own way."""
        plain = F.conv2d if y.ndim == 4 else F.conv3d
        expected = plain(inputs[0], conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
        if expected.shape == y.shape and are_close([y], [expected]):
            sizes[conv] = tuple(y.shape)

    hooks = [conv.register_forward_hook(look) for conv in convs]
    try:
        encoder(x)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes, rectified


def _has_kernel(conv: nn.Module) -> bool:
    """Whether a convolution may be computed by `Layer.by_kernels`; one whose `forward` somebody replaced may not."""
    return (
        isinstance(conv, CONVOLUTIONS)
        and set(conv.kernel_size) in ({1}, {3})
        and {*conv.stride, *conv.dilation, conv.groups} == {1}
        and "forward" not in conv.__dict__
        and not conv._forward_hooks
    )


def fastest(encoder: nn.Module, x: Tensor, multiple: int) -> tuple[int, ...]:
    """The places of the layers that the kernels compute faster in a pass over `x`, measured once on this device and size.

    All layers are timed in whole passes of the encoder, with and without the kernels in turn, as they then run: after
    others have used the cache.
    """
    layers, dtype = layers_of(encoder), compute_dtype(x)
    if not layers or x.device.type != "cpu" or dtype not in BOUNDS or not x.numel():
        return ()
    digest = sha256("\n".join(map(str, layers)).encode()).hexdigest()[:16]
    key = f"encoder {digest} {dtype} {tuning.sizes_of(x)}"
    verdict = tuning.recall(x, key)
    if verdict is None and tuning.may_measure(x):
        (part,) = tuning.measured_part([x], multiple)
        verdict = verdicts.remember(x.device, key, _measured(encoder, layers, part, BOUNDS[dtype]))
        for layer in layers:
            if layer.place not in verdict["layers"]:
                layer.forget()
    return tuple(verdict["layers"]) if verdict else ()


@torch.no_grad()
def _measured(encoder: nn.Module, layers: Sequence[Layer], x: Tensor, bound: float) -> dict[str, Any]:
    began = computed_and_waited()

    def run(kernels: Collection[int]) -> list[Tensor]:
        with running(Pass(kernels)):
            return list(encoder(x))

    def seconds(kernels: Collection[int]) -> dict[int, float]:
        with running(timed := Pass(kernels)):
            encoder(x)
        return timed.times

    every = range(len(layers))
    if not are_close(run(()), run(every), bound):
        return {"layers": []}
    rounds = [(seconds(()), seconds(every)) for _ in range(ROUNDS)]
    if share_waited(began) > verdicts.BUSY:
        rounds += [(seconds(()), seconds(every)) for _ in range(ROUNDS)]
    theirs, ours = ([min(times[kind][place] for times in rounds) for place in every] for kind in (0, 1))
    faster = [place for place in every if ours[place] * CLEARLY < theirs[place]]
    return {"layers": faster, "waited": round(share_waited(began), 3)}
