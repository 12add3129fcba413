"""Convolutions of another library's encoder by the CPU kernels, each where it was measured to be faster than PyTorch's.

Modules and their weights stay where they are: on a copy of the encoder, only the `forward` of convolutions and activations
is replaced. A convolution that runs once, of 3 taps or of 1, is a layer that the kernels can compute; every other one whose
result an activation alone reads is a layer of PyTorch's. Both compute that activation too, in the kernel or in place.
Outside a pass that says which layers the kernels take (`running`), everything runs as it is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
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
MARK = "_unetpp_fast_activated"  # on a tensor: the activation that a layer applied, and the tensor's version then

Act = bool | str  # `act` of `naive.conv`
FUNCTIONS: dict[Act, Callable[..., Tensor]] = {True: F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
IDEMPOTENT = (True, "relu6")
MODULES: dict[type, Act] = {nn.ReLU: True, nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}


class Pass:
    """What computes each layer of one pass: the kernels those whose places are in `kernels`. `times`: seconds, by place."""

    def __init__(self, kernels: Collection[int]) -> None:
        self.kernels = frozenset(kernels)
        self.times: dict[int, float] = {}

    def compute(self, layer: Layer, x: Tensor) -> Tensor:
        began = time.perf_counter()
        with torch.inference_mode(False):  # whose tensors count their changes
            y = layer.by_kernels(x) if layer.place in self.kernels else layer.by_pytorch(x)
            if layer.act:
                setattr(y, MARK, (layer.act, y._version))
        if layer.place is not None:
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
    """The `forward` of a convolution. place: among its encoder's layers for the kernels, None where they do not know it.
    size: of its map of a small image, which tells layers of different encoders apart. act: what alone reads it. pads: it is
    of a class that copies its map with a border, where padding by half its taps gives the same."""

    def __init__(self, conv: nn.Module, place: int | None, size: Sequence[int], act: Act, pads: bool) -> None:
        self.conv, self.place, self.size, self.act, self.pads = conv, place, tuple(size), act, pads
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        one = _pass.get()
        if one is None or torch.compiler.is_compiling():
            return type(self.conv).forward(self.conv, x)
        return one.compute(self, x)

    def __str__(self) -> str:
        return f"{tuple(self.conv.weight.shape)} {self.size} {self.act}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}

    def by_pytorch(self, x: Tensor) -> Tensor:
        return self._activated(_padded(self.conv, x) if self.pads else type(self.conv).forward(self.conv, x))

    def _activated(self, y: Tensor) -> Tensor:
        return FUNCTIONS[self.act](y, inplace=True) if self.act else y

    def by_kernels(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x = x.to(compute_dtype(x)).contiguous(memory_format=layout)
        conv = self.conv
        taps, stride = conv.kernel_size[0], conv.stride[0]
        if any(size % stride for size in x.shape[2:]):
            return self.by_pytorch(x)
        if taps == 1 and x.dtype != torch.float32:  # PyTorch's products may be of that precision
            rows = F.linear(x.movedim(1, -1).flatten(0, -2), conv.weight.flatten(1), conv.bias)
            return self._activated(rows.unflatten(0, (x.shape[0], *x.shape[2:])).movedim(-1, 1))
        size = [length // stride for length in x.shape[2:]]
        y = torch.empty(x.shape[0], conv.out_channels, *size, dtype=x.dtype, memory_format=layout)
        bias = None if conv.bias is None else conv.bias.float()
        given = {"axes": x.ndim - 2, "taps": taps, "stride": stride, "bias": bias, "act": self.act}
        cpu_ops.conv(_last(y), _last(x), self._filters(), **given)
        return y

    def _filters(self) -> Tensor:
        """The weight as a view `[taps^axes, K, CO]`, the same tensor in every call: what is packed from it is kept."""
        weight = self.conv.weight.detach()
        if self._weight is None or self._weight.data_ptr() != weight.data_ptr():
            self._weight = weight.flatten(2).permute(2, 1, 0)
        return self._weight

    def forget(self) -> None:
        """Frees what was packed."""
        self._weight = None


class Activate:
    """The `forward` of an activation, which leaves alone what a layer has activated so and nothing has changed since."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        act = MODULES[type(self.module)]
        if not torch.compiler.is_compiling():
            mark = getattr(x, MARK, None)
            if mark is not None and mark == (act, x._version):
                return x
        return FUNCTIONS[act](x, inplace=self.module.inplace)


def _padded(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution that pads by half its taps, whatever its class does."""
    padding = [step * (taps // 2) for step, taps in zip(conv.dilation, conv.kernel_size, strict=True)]
    plain = F.conv2d if x.ndim == 4 else F.conv3d
    return plain(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


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
            convs, activated = _found(result, x)
            places = iter(range(len(convs)))
            for conv in [*convs, *(conv for conv in activated if conv not in convs and _is_plain(conv))]:
                place = next(places) if conv in convs and _has_kernel(conv) else None
                pads = conv in convs and type(conv) not in CONVOLUTIONS
                if place is not None or pads or conv in activated:
                    conv.forward = Layer(conv, place, convs.get(conv, ()), activated.get(conv, False), pads)
            for module in _activations(result):
                module.forward = Activate(module)
            with running(Pass(range(len(convs)))):
                same = are_close(encoder(x), result(x))
        for layer in layers_of(result):
            layer.forget()
    except Exception:  # whatever another library's module does, it runs as it is
        return encoder
    return result if same else encoder


def layers_of(encoder: nn.Module) -> list[Layer]:
    """The layers of an encoder that the kernels can compute, by their places."""
    found = [module.__dict__.get("forward") for module in encoder.modules()]
    return sorted((one for one in found if isinstance(one, Layer) and one.place is not None), key=lambda layer: layer.place)


def _activations(encoder: nn.Module) -> list[Any]:
    """The modules that are activations, unless somebody has replaced their `forward`."""
    return [module for module in encoder.modules() if type(module) in MODULES and "forward" not in module.__dict__]


def _found(encoder: nn.Module, x: Tensor) -> tuple[dict[nn.Module, tuple[int, ...]], dict[nn.Module, Act]]:
    """The convolutions that pad by half their taps with the sizes of their maps, and those that an activation alone
    reads. One that cannot be applied twice is that of a module, which sees what a layer did."""
    by_modules: set[Any] = set()
    with _looking(_activations(encoder), lambda module, inputs, y: by_modules.add(y.grad_fn)):
        recorded = Recorded(encoder, x)
    activated = {}
    for node in recorded.nodes:
        act = _activation(node)
        conv = recorded.convolution_before(node) if act in IDEMPOTENT or (act and node in by_modules) else None
        if conv is not None:
            activated[conv] = act
    convs = [conv for conv in encoder.modules() if recorded.runs[conv] == 1 and _pads_alike(conv)]
    sizes: dict[nn.Module, tuple[int, ...]] = {}

    def look(conv: nn.Module, inputs: tuple, y: Tensor) -> None:
        expected = _padded(conv, inputs[0])
        if expected.shape == y.shape and are_close([y], [expected]):
            sizes[conv] = tuple(y.shape)

    with _looking(convs, look):
        encoder(x)
    return sizes, activated


@contextmanager
def _looking(modules: Sequence[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """Inside, `look(module, inputs, result)` sees every call of these modules."""
    hooks = [module.register_forward_hook(look) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _activation(node: Any) -> Act:
    """What a node of autograd computes; False if it is no such activation."""
    name = type(node).__name__
    if name == "HardtanhBackward0":
        return "relu6" if (node._saved_min_val, node._saved_max_val) == (0, 6) else False
    acts: dict[str, Act] = {"ReluBackward0": True, "SiluBackward0": "silu", "HardswishBackward0": "hardswish"}
    return acts.get(name, False)


def _has_kernel(conv: nn.Module) -> bool:
    """Whether `Layer.by_kernels` may compute a convolution that pads by half its taps."""
    geometry = set(conv.kernel_size), set(conv.stride)
    return {*conv.dilation, conv.groups} == {1} and geometry in (({1}, {1}), ({3}, {1}), ({3}, {2}))


def _pads_alike(conv: nn.Module) -> bool:
    """Whether a convolution pads maps of all sizes alike; a class that pads by itself may not at strides over 1."""
    return isinstance(conv, CONVOLUTIONS) and _is_plain(conv) and (set(conv.stride) == {1} or type(conv) in CONVOLUTIONS)


def _is_plain(conv: nn.Module) -> bool:
    """Whether nobody has replaced the `forward` of a convolution, or looks at what it returns."""
    return "forward" not in conv.__dict__ and not conv._forward_hooks


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
