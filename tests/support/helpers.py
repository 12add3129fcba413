"""What the tests share: one tolerance rule, seeded inputs in awkward layouts, models whose every parameter counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Bounds on max|a - b| / max|b|.
FLOAT64 = 1e-11  # two orders of summation in double precision, through ten normalised layers
FLOAT32 = 1e-5  # the same operations by another route in single precision
COMPILED = 1e-4  # a compiler's or another runtime's single precision

LAYOUTS = ("contiguous", "offset", "strided", "transposed", "channels_last", "expanded")


def assert_close_relative(
    actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], bound: float, floor: float = 0.0
) -> None:
    """max|actual - expected| <= bound * max(max|expected|, floor), of equal shapes and nothing infinite; lists pairwise."""
    if not isinstance(expected, Tensor):
        assert len(actual) == len(expected), f"{len(actual)} tensors, expected {len(expected)}"
        for a, b in zip(actual, expected, strict=True):
            assert_close_relative(a, b, bound, floor)
        return
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all(), "not finite"
    scale = max(expected.double().abs().max().item(), floor)
    error = max_error(actual, expected)
    assert error <= bound * scale, f"error {error:.3e} is {error / (scale or math.nan):.3e} of {scale:.3e}, over {bound:.0e}"


def assert_gradients_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """The rule above for every named gradient, a layer's weight and bias taken as one.

    Together, because the bias of a convolution before a norm has a gradient of zero but for rounding: only beside
    its weight's is there a size to be relative to.
    """
    assert set(actual) == set(expected)
    largest: dict[str, float] = {}
    for name, gradient in expected.items():
        layer = name.rpartition(".")[0]
        largest[layer] = max(largest.get(layer, 0.0), gradient.abs().max().item())
    for name, gradient in expected.items():
        try:
            assert_close_relative(actual[name], gradient, bound, floor=largest[name.rpartition(".")[0]])
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


def max_error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that a backward pass left in `model`, by parameter name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def weighted_sum(outputs: Tensor | Sequence[Tensor], seed: int = 7) -> Tensor:
    """A scalar whose gradient differs from place to place and from head to head."""
    heads = [outputs] if isinstance(outputs, Tensor) else outputs
    return sum((head * make_input(*head.shape, seed=seed + k, dtype=head.dtype)).sum() for k, head in enumerate(heads))


def make_input(*shape: int, seed: int = 0, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random values, the same for every layout of one seed; what surrounds them in memory is NaN.

    Layouts: contiguous; offset: the inside of a larger tensor; strided: every second element of one; transposed: the
    last two axes swapped in memory; channels_last; expanded: one image repeated with stride 0.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "contiguous":
        return values
    if layout == "expanded":
        return values[:1].expand(shape)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    step = {"offset": 1, "strided": 2}[layout]
    around = torch.full([step * size + 3 for size in shape], math.nan, dtype=dtype)
    view = around[tuple(slice(1, 1 + step * size, step) for size in shape)]
    view.copy_(values)
    return view


def build(maker: Callable[..., nn.Module], *args, seed: int = 0, **options) -> nn.Module:
    """`maker(*args, **options)` with seeded weights and no bias, scale, shift or running statistic at its default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(maker(*args, **options), seed)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives biases, norm scales and shifts and running statistics random values; convolutions keep theirs."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        kind = name.rpartition(".")[2]
        if kind == "running_var" or (kind == "weight" and value.ndim == 1):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif kind in ("bias", "running_mean"):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


class Recorder(TorchDispatchMode):
    """Lists what really runs: the operations, the shapes they give, and each convolution's weight and output shape."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()
        self.convolutions: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        if func is torch.ops.aten.convolution.default:
            self.convolutions[tuple(args[1].shape), tuple(result.shape)] += 1
        return result
