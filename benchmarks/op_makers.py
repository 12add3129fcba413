"""Every op of the engine at the shapes of the paper's network, against PyTorch's equivalent (on a GPU: cuDNN).

An op is built from one image, repeated to the batch, so float64 computes only one. Its work and traffic are the least
possible: the taps of the phases, every operand read once, every result written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from unetpp_fast.benchmarking.harness import Case
from unetpp_fast.execution.fused import buffers
from unetpp_fast.execution.plan import weight_composition
from unetpp_fast.execution.plan.operands import cast
from unetpp_fast.kernels import naive
from unetpp_fast.models.architectures import PAPER_FEATURES

WIDTHS = PAPER_FEATURES["unet++"]
Results = list[Tensor]


@dataclass
class Op:
    """`ours(ops)` and `eager()` do the same work; `read_ours` and `read_eager` bring their results into the same form.

    flop, moved: floating-point operations, and bytes read and written.
    sums: which results are sums over the batch.
    reset: called before a result is checked; restores the operands of an op that works in place.
    """

    ours: Callable[[ModuleType], object]
    eager: Callable[[], object]
    read_ours: Callable[[object], Results]
    read_eager: Callable[[object], Results]
    flop: float
    moved: int
    sums: tuple[bool, ...] = (False,)
    reset: Callable[[], object] = lambda: None


class Maps:
    """Makes the operands of an op: seeded, one image repeated, channels-last inside a level's buffer as in the engine."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, batch: int) -> None:
        self.axes, self.size, self.level = len(case.size), case.size, case.level
        self.device, self.dtype, self.batch = device, dtype, batch
        self.width, self.columns = WIDTHS[case.level], len(WIDTHS) - case.level
        self.sum_dtype = naive.accumulator(dtype)
        self.taps = 3**self.axes

    def values(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(*shape, generator=generator)

    def pixels(self, half: bool = False) -> int:
        return self.batch * math.prod(self.size) // (2**self.axes if half else 1)

    def map(self, channels: int, half: bool = False, seed: int = 0, room: int = 0) -> Tensor:
        """`[N, D, H, W, channels]`, a slice of a buffer with `room` more channels per pixel."""
        size = [axis // 2 if half else axis for axis in ([1] * (3 - self.axes) + list(self.size))]
        if half and self.axes == 2:
            size[0] = 1
        buffer = torch.empty(self.batch, *size, channels + room, device=self.device, dtype=self.dtype)
        view = buffer[..., :channels]
        view.copy_(self.values(1, *size, channels, seed=seed).to(self.device))
        return view

    def weight(self, out: int, channels: int, taps: int = 3, seed: int = 9) -> Tensor:
        """`[out, channels, 3, ...]` in float32 or float64: it is rounded after it is composed."""
        values = self.values(out, channels, *[taps] * self.axes, seed=seed, scale=(channels * taps**self.axes) ** -0.5)
        return values.to(self.device, self.sum_dtype)

    def vector(self, channels: int, seed: int) -> Tensor:
        return (1 + 0.3 * self.values(channels, seed=seed)).to(self.device, self.sum_dtype)

    def rounded(self, weight: Tensor) -> Tensor:
        return cast(weight, self.dtype)

    def torch_map(self, x: Tensor) -> Tensor:
        """`[N, C, *S]` for PyTorch: channels-last and contiguous, not a slice."""
        return buffers.from_maps(x.contiguous(), self.axes)

    def torch_weight(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).contiguous(
            memory_format=torch.channels_last if self.axes == 2 else torch.channels_last_3d
        )

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        padding = weight.shape[-1] // 2
        return (F.conv2d if self.axes == 2 else F.conv3d)(x, weight, bias, padding=padding)

    def conv_backward(self, dy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]):
        ones, padding = [1] * self.axes, [weight.shape[-1] // 2] * self.axes
        sizes = [weight.shape[0]] if mask[2] else None
        return torch.ops.aten.convolution_backward(
            dy, x, weight, sizes, ones, padding, ones, False, [0] * self.axes, 1, list(mask)
        )

    def last(self, x: Tensor) -> Results:
        """The last image of a channels-first map."""
        return [x[-1]]

    def ours_last(self, x: Tensor) -> Results:
        return [buffers.from_maps(x[-1:], self.axes)[0]]

    def bytes(self, *tensors: Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def conv(m: Maps) -> Op:
    """A node's second convolution."""
    x, out, weight = m.map(m.width), m.map(m.width, room=m.width), m.weight(m.width, m.width)
    wa, torch_x, torch_w = m.rounded(weight_composition.taps_first(weight)), m.torch_map(x), m.torch_weight(weight)
    return Op(
        lambda ops: ops.conv(out, x, wa, axes=m.axes), lambda: m.conv(torch_x, torch_w),
        lambda _: m.ours_last(out), m.last, 2 * m.pixels() * m.taps * m.width**2, m.bytes(x, out, wa),
    )  # fmt: skip


def conv_norm(m: Maps) -> Op:
    """The same in training: norm and activation of the input, statistics of the output."""
    x, out, weight = m.map(m.width), m.map(m.width, room=m.width), m.weight(m.width, m.width)
    wa, torch_x, torch_w = m.rounded(weight_composition.taps_first(weight)), m.torch_map(x), m.torch_weight(weight)
    scale, shift = m.vector(m.width, 3), m.vector(m.width, 4) - 1
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)

    def eager() -> tuple[Tensor, Tensor]:
        y = m.conv(F.batch_norm(torch_x, zeros, ones, scale, shift, eps=0.0).relu(), torch_w)
        mean, inverse = torch.ops.aten.native_batch_norm(y, ones, zeros, None, None, True, 0.1, 1e-5)[1:]
        return y, torch.stack((mean, inverse))

    return Op(
        lambda ops: ops.conv(out, x, wa, axes=m.axes, affine_a=(scale[None], shift[None]), stats=True), eager,
        lambda stats: [*m.ours_last(out), naive.norm_finalise(stats, ones, zeros, 1e-5, False)[:2, 0]],
        lambda results: [results[0][-1], results[1]],
        2 * m.pixels() * m.taps * m.width**2, m.bytes(x, out, wa), (False, False),
    )  # fmt: skip


def conv_phases(m: Maps) -> Op:
    """The first convolution of the level's deepest node: prefix and low source, without concatenating or up-sampling."""
    prefix, low_width = m.width * (m.columns - 1), 2 * m.width
    a, low, out = m.map(prefix, room=m.width), m.map(low_width, half=True, seed=1), m.map(m.width)
    weight = m.weight(m.width, prefix + low_width)
    operands = weight_composition.first_operands(weight, None, prefix, "phases")
    wa, wb = m.rounded(operands.wa), m.rounded(operands.wb)
    torch_a, torch_low, torch_w = m.torch_map(a), m.torch_map(low), m.torch_weight(weight)
    flop = 2 * m.pixels() * m.width * (m.taps * prefix + 2**m.axes * low_width)
    return Op(
        lambda ops: ops.conv(out, a, wa, axes=m.axes, stride=2, phased=True, b=low, wb=wb),
        lambda: m.conv(torch.cat((torch_a, F.interpolate(torch_low, scale_factor=2)), 1), torch_w),
        lambda _: m.ours_last(out), m.last, flop, m.bytes(a, low, out, wa, wb),
    )  # fmt: skip


def conv_dgrad(m: Maps) -> Op:
    """The data gradient of the whole prefix of the level's deepest node at once."""
    prefix = m.width * max(m.columns - 1, 1)
    dy, out, weight = m.map(m.width), m.map(prefix, room=m.width), m.weight(m.width, prefix)
    flipped = m.rounded(weight_composition.flipped(weight_composition.taps_first(weight)))
    torch_dy, torch_x, torch_w = m.torch_map(dy), m.torch_map(out), m.torch_weight(weight)
    return Op(
        lambda ops: ops.conv(out, dy, flipped, axes=m.axes),
        lambda: m.conv_backward(torch_dy, torch_x, torch_w, (True, False, False))[0],
        lambda _: m.ours_last(out), m.last, 2 * m.pixels() * m.taps * m.width * prefix, m.bytes(dy, out, flipped),
    )  # fmt: skip


def conv_dgrad_low(m: Maps) -> Op:
    """The data gradient of the low source, at its own resolution."""
    low_width = 2 * m.width
    dy, out, weight = m.map(m.width), m.map(low_width, half=True, room=low_width), m.weight(m.width, low_width)
    gathered = m.rounded(weight_composition.gathered(weight_composition.phase_weights(weight, None), m.axes))
    torch_dy, torch_w = m.torch_map(dy), m.torch_weight(weight)
    torch_up = m.torch_map(m.map(low_width))
    through_up = torch.ops.aten.upsample_nearest2d_backward if m.axes == 2 else torch.ops.aten.upsample_nearest3d_backward
    low_shape = [m.batch, low_width, *(axis // 2 for axis in m.size)]

    def eager() -> Tensor:
        return through_up(m.conv_backward(torch_dy, torch_up, torch_w, (True, False, False))[0], list(m.size), low_shape)

    return Op(
        lambda ops: ops.conv(out, dy, gathered, axes=m.axes, taps=4, stride=2),
        eager,
        lambda _: m.ours_last(out), m.last, 2 * m.pixels() * 2**m.axes * m.width * low_width, m.bytes(dy, out, gathered),
    )  # fmt: skip


def conv_wgrad(m: Maps) -> Op:
    """The weight gradient for the whole prefix of the level's deepest node."""
    prefix = m.width * max(m.columns - 1, 1)
    a, dy = m.map(prefix, room=m.width), m.map(m.width, seed=1)
    torch_a, torch_dy, torch_w = m.torch_map(a), m.torch_map(dy), m.torch_weight(m.weight(m.width, prefix))
    return Op(
        lambda ops: ops.conv_wgrad(a, dy, axes=m.axes),
        lambda: m.conv_backward(torch_dy, torch_a, torch_w, (False, True, False))[1],
        lambda results: [weight_composition.taps_last(results[0], m.axes)], lambda results: [results],
        2 * m.pixels() * m.taps * m.width * prefix, m.bytes(a, dy), (True,),
    )  # fmt: skip


def conv_wgrad_phases(m: Maps) -> Op:
    """The weight gradient for the low source."""
    low_width = 2 * m.width
    low, dy, weight = m.map(low_width, half=True), m.map(m.width, seed=1), m.weight(m.width, low_width)
    torch_low, torch_dy, torch_w = m.torch_map(low), m.torch_map(dy), m.torch_weight(weight)

    def eager() -> Tensor:
        up = F.interpolate(torch_low, scale_factor=2)
        return m.conv_backward(torch_dy, up, torch_w, (False, True, False))[1]

    return Op(
        lambda ops: ops.conv_wgrad(low, dy, axes=m.axes, phased=True), eager,
        lambda results: [weight_composition.phase_weights_backward(results, weight, None)[0]], lambda results: [results],
        2 * m.pixels() * 2**m.axes * m.width * low_width, m.bytes(low, dy), (True,),
    )  # fmt: skip


def norm_finalise(m: Maps) -> Op:
    """Statistics of 256 parts of every image into scale and shift."""
    parts = m.values(1, 256, 3, m.width, seed=2).abs().to(m.device, m.sum_dtype).repeat(m.batch, 1, 1, 1)
    weight, bias = m.vector(m.width, 3), m.vector(m.width, 4)

    def run(ops: ModuleType) -> Tensor:
        table = parts.new_empty(4, 1, m.width)
        ops.norm_table(table, parts, weight, bias, 1e-5, False)
        return table

    return Op(run, lambda: run(naive), lambda table: [table], lambda table: [table], 8 * parts.numel(), m.bytes(parts))


def norm_backward(m: Maps) -> Op:
    """The gradient through activation and batch norm."""
    x, g = m.map(m.width, room=m.width), m.map(m.width, seed=1)
    original, weight, bias = g.clone(), m.vector(m.width, 3), m.vector(m.width, 4) - 1
    mean, inverse, scale, shift, _ = naive.norm_finalise(naive.statistics(x), weight, bias, 1e-5, False)
    torch_x, torch_g = m.torch_map(x), m.torch_map(g).clone(memory_format=torch.preserve_format)
    zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
    y = F.batch_norm(torch_x, zeros.clone(), ones.clone(), weight, bias, True).relu()

    def eager() -> tuple[Tensor, ...]:
        h = torch.ops.aten.threshold_backward(torch_g, y, 0)
        return torch.ops.aten.native_batch_norm_backward(
            h, torch_x, weight, zeros, ones, mean[0], inverse[0], True, 1e-5, [True, True, True]
        )

    return Op(
        lambda ops: ops.norm_backward(g, x, mean, inverse, (scale, shift), 0.0, False), eager,
        lambda sums: [*m.ours_last(g), *sums], lambda results: [results[0][-1], *results[1:]],
        10 * x.numel(), 3 * m.bytes(x), (False, True, True), lambda: g.copy_(original),
    )  # fmt: skip


def act_backward(m: Maps) -> Op:
    """The gradient through an activation, and that of the bias."""
    out, g = m.map(m.width, room=m.width), m.map(m.width, seed=1)
    original, torch_out, torch_g = g.clone(), m.torch_map(out), m.torch_map(g).clone(memory_format=torch.preserve_format)

    def eager() -> tuple[Tensor, Tensor]:
        h = torch.ops.aten.threshold_backward(torch_g, torch_out, 0)
        return h, h.sum([axis for axis in range(h.ndim) if axis != 1], dtype=m.sum_dtype)

    return Op(
        lambda ops: ops.act_backward(g, out, 0.0), eager, lambda total: [*m.ours_last(g), total],
        lambda results: [results[0][-1], results[1]],
        2 * g.numel(), 3 * m.bytes(g), (False, True), lambda: g.copy_(original),
    )  # fmt: skip


def pool(m: Maps) -> Op:
    """Max-pooling."""
    x, out = m.map(m.width, room=m.width), m.map(m.width, half=True)
    torch_x, run = m.torch_map(x), F.max_pool2d if m.axes == 2 else F.max_pool3d
    return Op(
        lambda ops: ops.pool(out, x, axes=m.axes), lambda: run(torch_x, 2), lambda _: m.ours_last(out), m.last,
        x.numel(), m.bytes(x, out),
    )  # fmt: skip


def pool_backward(m: Maps) -> Op:
    """The gradient through max-pooling."""
    x, g, gx = m.map(m.width, room=m.width), m.map(m.width, half=True, seed=1), m.map(m.width, room=m.width)
    torch_x, torch_g = m.torch_map(x), m.torch_map(g)
    forward, name = (F.max_pool2d, "max_pool2d") if m.axes == 2 else (F.max_pool3d, "max_pool3d")
    _, indices = forward(torch_x, 2, return_indices=True)
    twos, zeros, ones = ([value] * m.axes for value in (2, 0, 1))
    backward = getattr(torch.ops.aten, f"{name}_with_indices_backward")
    return Op(
        lambda ops: ops.pool_backward(gx, g, x, axes=m.axes),
        lambda: backward(torch_g, torch_x, twos, twos, zeros, ones, False, indices),
        lambda _: m.ours_last(gx), m.last, x.numel(), m.bytes(x, g, gx),
    )  # fmt: skip


def head(m: Maps) -> Op:
    """The 1x1 convolution to one class."""
    x, weight, bias = m.map(m.width, room=m.width), m.weight(1, m.width, taps=1), m.vector(1, 5)
    out = torch.empty(m.batch, 1, *x.shape[1:4], dtype=m.dtype, device=m.device)
    flat, torch_x = weight.flatten(1).to(m.dtype), m.torch_map(x)
    torch_w, torch_bias = m.torch_weight(weight), bias.to(m.dtype)
    return Op(
        lambda ops: ops.head(out, x, flat, bias), lambda: m.conv(torch_x, torch_w, torch_bias),
        lambda _: [out.squeeze(2)[-1] if m.axes == 2 else out[-1]], m.last, 2 * x.numel(), m.bytes(x, out),
    )  # fmt: skip


def head_backward(m: Maps) -> Op:
    """Gradients of the head's input, weight and bias."""
    x, gx, weight = m.map(m.width, room=m.width), m.map(m.width, room=m.width), m.weight(1, m.width, taps=1)
    dy = m.map(1, seed=1).movedim(-1, 1).contiguous()
    flat, torch_x, torch_w = weight.flatten(1).to(m.dtype), m.torch_map(x), m.torch_weight(weight)
    torch_dy = dy.squeeze(2) if m.axes == 2 else dy
    return Op(
        lambda ops: ops.head_backward(gx, dy, x, flat),
        lambda: m.conv_backward(torch_dy, torch_x, torch_w, (True, True, True)),
        lambda sums: [*m.ours_last(gx), *(part.flatten() for part in sums)],
        lambda results: [results[0][-1], *(part.flatten() for part in results[1:])],
        4 * x.numel(), m.bytes(x, gx, dy), (False, True, True),
    )  # fmt: skip


def border_sums(m: Maps) -> Op:
    """The gradient of a border table."""
    dy = m.map(m.width)
    return Op(
        lambda ops: ops.border_sums(dy, m.axes), lambda: naive.border_sums(dy, m.axes), lambda results: [results],
        lambda results: [results], dy.numel(), m.bytes(dy), (True,),
    )  # fmt: skip
