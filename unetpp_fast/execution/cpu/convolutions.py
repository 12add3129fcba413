"""Convolutions on a CPU that write into memory given to them: oneDNN's own operators, or PyTorch's where those are missing.

Maps are channels-last and dense, `[N, C, *S]` with stride 1 along C. What is convolved may carry a row of zeros, or of
the neighbouring strip, on each side of the first axis of S: it is not padded there.
`torch.ops.mkldnn` is no public interface: `internal_reason` tries it against PyTorch's operators before it is used, and
a weight says by its layout which of the two computes with it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

_HINT = (66, 128, 128)  # a size to lay weights out for; the layout does not depend on it much


def channels_last(axes: int) -> torch.memory_format:
    return torch.channels_last if axes == 2 else torch.channels_last_3d


def _same(axes: int, neighbours: bool = True) -> list[int]:
    """The padding of a 3x3 convolution; its rows may bring their neighbours with them."""
    return [0 if neighbours else 1] + [1] * (axes - 1)


def _doubled(axes: int, neighbours: bool = True) -> list[int]:
    """The padding of a transposed 4x4 convolution with stride 2."""
    return [3 if neighbours else 1] + [1] * (axes - 1)


def pack_conv(weight: Tensor) -> Tensor:
    """A 3x3 convolution's weight `[CO, K, 3..]` as oneDNN wants it, or as it is where its operators cannot be used."""
    axes = weight.ndim - 2
    weight = weight.contiguous()
    if internal_reason(axes, weight.dtype):
        return weight.contiguous(memory_format=channels_last(axes))
    one, size = [1] * axes, [1, weight.shape[1], *_HINT[:axes]]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, _same(axes), one, one, 1, size)


def pack_up(weight: Tensor) -> Tensor:
    """A transposed convolution's weight `[K, CO, 4..]`, as `pack_conv`."""
    axes = weight.ndim - 2
    weight = weight.contiguous()
    if internal_reason(axes, weight.dtype):
        return weight
    one, size = [1] * axes, [1, weight.shape[0], *_HINT[:axes]]
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, _doubled(axes), [0] * axes, [2] * axes, one, 1, size
    )


def add_conv(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> None:
    """out += conv(x) + bias, then ReLU if asked for: out `[N, CO, R, ..]` from x `[N, K, R, ..]` or `[N, K, R + 2, ..]`."""
    axes = x.ndim - 2
    padding = _same(axes, neighbours=x.shape[2] > out.shape[2])
    if weight.is_mkldnn:
        one = [1] * axes
        torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, weight, bias, padding, one, one, 1, "add", 1.0, "relu" if relu else None, [], None
        )
        return
    out += (F.conv2d if axes == 2 else F.conv3d)(x, weight, bias, padding=padding)
    if relu:
        out.relu_()


def convolved_up(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: bool) -> Tensor:
    """`[N, CO, 2R, ..]` from x `[N, K, R, ..]`, `[N, K, R + 2, ..]` with `neighbours`: a transposed 4x4 convolution with
    stride 2."""
    axes = x.ndim - 2
    padding = _doubled(axes, neighbours)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, weight, bias, padding, [0] * axes, [2] * axes, [1] * axes, 1, "none", [], ""
        )
    transposed = F.conv_transpose2d if axes == 2 else F.conv_transpose3d
    return transposed(x, weight, bias, stride=2, padding=padding)


@lru_cache
def internal_reason(axes: int, dtype: torch.dtype) -> str:
    """Why oneDNN's operators are not used for maps of `axes` axes in `dtype`; "" where they are.

    They are tried once a process on small maps: an operator that is missing, fails, writes elsewhere or gives another
    result than PyTorch's convolution is not used.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this PyTorch has no oneDNN"
    try:
        with torch.inference_mode(False), torch.no_grad():
            wrong = _trial(axes, dtype)
    except Exception as error:  # an internal operator may fail in any way
        return f"oneDNN's operators fail here: {str(error).strip().splitlines()[0]}"
    return "oneDNN's operators give another result than PyTorch's convolution here" if wrong else ""


def _trial(axes: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    one, size = [1] * axes, (6, 5, 4)[:axes]
    x, bias = random(1, 3, *size).contiguous(memory_format=channels_last(axes)), random(8)
    start = random(1, 8, 4, *size[1:]).contiguous(memory_format=channels_last(axes))
    weight, up = random(8, 3, *[3] * axes), random(3, 8, *[4] * axes)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, _same(axes), one, one, 1, list(x.shape))
    arguments = (_doubled(axes), [0] * axes, [2] * axes, one, 1)
    packed_up = torch.ops.mkldnn._reorder_convolution_transpose_weight(up, *arguments, list(x.shape))
    if not (packed.is_mkldnn and packed_up.is_mkldnn):
        return True
    pairs = []
    for relu in (False, True):
        around = torch.zeros(1, 8, 6, *size[1:], dtype=dtype).contiguous(memory_format=channels_last(axes))
        out = around[:, :, 1:-1]
        out.copy_(start)
        add_conv(out, x, packed, bias, relu)
        expected = (F.conv2d if axes == 2 else F.conv3d)(x.double(), weight.double(), bias.double(), padding=_same(axes))
        expected = start.double() + expected
        pairs.append((around[:, :, 1:-1], expected.relu() if relu else expected))
        pairs.append((around[:, :, ::5], torch.zeros_like(around[:, :, ::5])))
    transposed = F.conv_transpose2d if axes == 2 else F.conv_transpose3d
    expected = transposed(x.double(), up.double(), bias.double(), stride=2, padding=_doubled(axes))
    pairs.append((convolved_up(x, packed_up, bias, True), expected))
    bound = 64 * torch.finfo(dtype).eps
    return any(bool((found.double() - wanted).abs().max() > bound * wanted.abs().max()) for found, wanted in pairs)
