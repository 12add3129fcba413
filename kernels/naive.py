"""Every op of the engine in plain PyTorch: the contract of the kernels, and the reference of their tests.

Maps are channels-last, `[N, D, H, W, C]` with D = 1 in 2D and stride 1 along C; they may be slices of level buffers.
`axes` is 2 or 3. A map is stored raw unless its norm was folded into weights: then `affine = (scale, shift)`, each
`[1, C]` (batch norm) or `[N, C]` (instance norm), and a reader sees `act(scale x + shift)`. Without `affine` the map
holds what its readers see. `act` is leaky ReLU with `slope`; 0 is ReLU. Results are written to `out`, which the caller
allocates. Sums are in float32 for half-precision maps and in the map's own precision otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Affine = tuple[Tensor, Tensor]
Averages = Callable[[Tensor, int], Tensor]
MOST_CLASSES = 64  # of a head, in the kernels
FURTHER_ACTIVATIONS = {"relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}  # of convolutions by the CPU's ops


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums over maps of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 if PyTorch's own convolutions would use it, else ieee. Reads the newer of PyTorch's two switches: reading the
    older one raises if both were set."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def activate(x: Tensor, slope: float, act: bool | str = True) -> Tensor:
    """Leaky ReLU with `slope`, or one of `FURTHER_ACTIVATIONS`."""
    if isinstance(act, str):
        return FURTHER_ACTIVATIONS[act](x)
    return torch.where(x >= 0, x, x * slope) if slope else x.relu()


def per_image(values: Tensor) -> Tensor:
    """`[1 or N, C]` as `[1 or N, 1, 1, 1, C]`."""
    return values[:, None, None, None, :]


def read(x: Tensor, affine: Affine | None, slope: float, plain: int = 0) -> Tensor:
    """What a reader of a map sees, rounded to the map's precision; of the first `plain` channels, the map itself."""
    if affine is None:
        return x
    scale, shift = (per_image(values) for values in affine)
    values = activate(x.to(accumulator(x.dtype)) * scale + shift, slope).to(x.dtype)
    return torch.cat((x[..., :plain], values[..., plain:]), dim=-1) if plain else values


def _axes(axes: int) -> tuple[bool, bool, bool]:
    """Which of D, H, W are convolved."""
    return axes == 3, True, True


def phases(axes: int, phased: bool) -> list[tuple[int, int, int]]:
    """(pz, py, px) in the order of the weights' first axis."""
    return list(itertools.product(*((0, 1) if on and phased else (0,) for on in _axes(axes))))  # type: ignore[arg-type]


def sampled(x: Tensor, taps: int, stride: int, phase: tuple[int, int, int], units: tuple, axes: int) -> Iterator[Tensor]:
    """Per tap, in row-major order, `[N, *units, C]`: x at stride * unit + phase - 1 + tap, zero outside; a single tap lies
    on its pixel."""
    reach = taps + stride
    pad = [0, 0]
    for on in reversed(_axes(axes)):
        pad += [reach, reach] if on else [0, 0]
    x = F.pad(x, pad)
    ranges = [range(taps) if on else (None,) for on in _axes(axes)]
    for tap in itertools.product(*ranges):
        window = [slice(None)]
        for t, p, count in zip(tap, phase, units, strict=True):
            first = 0 if t is None else reach + p - (taps > 1) + t
            step = 1 if t is None else stride
            window.append(slice(first, first + step * (count - 1) + 1, step))
        yield x[tuple(window)]


def placed(out: Tensor, phase: tuple[int, int, int], phased: bool, axes: int) -> Tensor:
    """The pixels of `out` that belong to a phase."""
    if not phased:
        return out
    return out[(slice(None), *(slice(p, None, 2) if on else slice(None) for p, on in zip(phase, _axes(axes), strict=True)))]


def conv(
    out: Tensor,
    a: Tensor,
    wa: Tensor,
    *,
    axes: int,
    taps: int = 3,
    stride: int = 1,
    phased: bool = False,
    affine_a: Affine | None = None,
    b: Tensor | None = None,
    wb: Tensor | None = None,
    affine_b: Affine | None = None,
    linear: bool | None = None,
    slope: float = 0.0,
    plain: int = 0,
    bias: Tensor | None = None,
    border: Tensor | None = None,
    act: bool | str = False,
    add: bool = False,
    stats: bool = False,
) -> Tensor | None:
    """out = epilogue(conv(a) + conv(b)); see `conv.py` for the geometry of its uses.

    Args:
        out: `[N, *S, CO]`, written, or with `add` added to.
        a: the first operand, `[N, *Sa, KA]`; wa: `[taps^axes, KA, CO]`. KA may be 0 beside `b`.
        plain: the first channels of `a` that are read as they are, although there is `affine_a`; their rows in it are not
            used.
        taps: 1 (of the CPU's ops, without `b`, `border` and `stats`), 3, or 4 at stride 2.
        stride: 2 if `a` is twice the size of the unit grid along each axis; with `phased`, so is `out`.
        b: the low source `[N, *S/2, KB]`, wb: `[2^axes phases, 2^axes taps, KB, CO]` with `phased`;
            else an operand of the size of `out`, wb: `[1, 3^axes, KB, CO]`.
        linear: b is a low source `[N, *S/2, KB]` that is up-sampled linearly as it is read, True: so that corners meet
            (`align_corners`); only ops of `fused.ops.reads_linear` know it.
        bias: `[CO]`; border: `[3^axes, CO]`, added by border class (0 first, 1 inner, 2 last pixel of each axis).
        act: activate before storing; by one of `FURTHER_ACTIVATIONS`, if named (the CPU's ops). stats: return
            `[N, T, 3, CO]`, the count, mean and sum of squared deviations of each of T parts of every image, over the values
            as stored.
    """
    acc_dtype = accumulator(a.dtype)
    active = _axes(axes)
    units = tuple(size // 2 if on and phased else size for size, on in zip(out.shape[1:4], active, strict=True))
    a = read(a, affine_a, slope, plain).to(acc_dtype)
    b = None if b is None else read(b, affine_b, slope)
    b = b if linear is None else upsample(b, axes, linear)
    b = None if b is None else b.to(acc_dtype)
    for index, phase in enumerate(phases(axes, phased)):
        total = torch.zeros(a.shape[0], *units, out.shape[-1], dtype=acc_dtype, device=a.device)
        for tap, x in enumerate(sampled(a, taps, stride, phase, units, axes)):
            total += x @ wa[tap].to(acc_dtype)
        if b is not None:
            for tap, x in enumerate(sampled(b, 2 if phased else 3, 1, phase, units, axes)):
                total += x @ wb[index, tap].to(acc_dtype)
        if bias is not None:
            total += bias
        if border is not None:
            rows = placed(border_classes(out.shape[1:4], axes, out.device)[None], phase, phased, axes)[0]
            total += border[rows]
        if act:
            total = activate(total, slope, act)
        target = placed(out, phase, phased, axes)
        target.copy_(target + total if add else total)
    return statistics(out) if stats else None


def upsample(x: Tensor, axes: int, align_corners: bool) -> Tensor:
    """A map `[N, D, H, W, C]` of twice the size along each axis, by linear interpolation."""
    x = x.movedim(-1, 1)
    if axes == 3:
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=align_corners).movedim(1, -1)
    x = F.interpolate(x.squeeze(2), scale_factor=2, mode="bilinear", align_corners=align_corners)
    return x.unsqueeze(2).movedim(1, -1)


def border_classes(size: tuple[int, ...], axes: int, device: torch.device) -> Tensor:
    """`[D, H, W]`: the row of a border table for each pixel."""
    total = torch.zeros(tuple(size), dtype=torch.long, device=device)
    for axis, on in enumerate(_axes(axes)):
        if on:
            place = torch.ones(size[axis], dtype=torch.long, device=device)
            place[0], place[-1] = 0, 2
            total = 3 * total + place.view([-1 if k == axis else 1 for k in range(3)])
    return total


def border_sums(dy: Tensor, axes: int) -> Tensor:
    """`[3^axes, C]`: the gradient of a border table, the sums of dy over each class of pixels."""
    total = dy.new_zeros(3**axes, dy.shape[-1], dtype=accumulator(dy.dtype))
    rows = border_classes(dy.shape[1:4], axes, dy.device).flatten()
    return total.index_add_(0, rows.repeat(dy.shape[0]), dy.reshape(-1, dy.shape[-1]).to(total.dtype))


def conv_wgrad(
    a: Tensor,
    dy: Tensor,
    *,
    axes: int,
    phased: bool = False,
    affine: Affine | None = None,
    slope: float = 0.0,
    plain: int = 0,
) -> Tensor:
    """The gradient of a convolution's weights.

    For an operand of the size of dy: `[1, 3^axes, K, CO]`. With `phased`, for the low source of half the size:
    `[2^axes, 2^axes, K, CO]`. `plain`: as in `conv`. Sums run in a fixed order.
    """
    acc_dtype = accumulator(a.dtype)
    a = read(a, affine, slope, plain).to(acc_dtype)
    taps = 2 if phased else 3
    result = a.new_empty(len(phases(axes, phased)), taps**axes, a.shape[-1], dy.shape[-1])
    for index, phase in enumerate(phases(axes, phased)):
        part = placed(dy, phase, phased, axes).to(acc_dtype)
        for tap, x in enumerate(sampled(a, taps, 1, phase, a.shape[1:4], axes)):
            result[index, tap] = torch.einsum("ndhwk,ndhwc->kc", x, part)
    return result


def statistics(x: Tensor) -> Tensor:
    """`[N, 1, 3, C]`: pixels, mean and sum of squared deviations of each image and channel."""
    x = x.to(accumulator(x.dtype)).flatten(1, 3)
    mean = x.mean(dim=1, keepdim=True)
    return torch.stack([torch.full_like(mean, x.shape[1]), mean, (x - mean).square().sum(dim=1, keepdim=True)], dim=2)


def norm_finalise(stats: Tensor, weight: Tensor, bias: Tensor, eps: float, instance: bool) -> Tensor:
    """Combines the parts of `[N, T, 3, C]` in a fixed order.

    Returns:
        `[5, 1, C]`, or `[5, N, C]` with `instance`: mean, 1 / sqrt(variance + eps), scale, shift, biased variance.
    """
    parts = stats if instance else stats.flatten(0, 1)[None]
    count, mean, squares = parts.unbind(dim=2)
    total = count.sum(dim=1).clamp(min=1)
    centre = (count * mean).sum(dim=1) / total
    variance = (squares + count * (mean - centre[:, None]).square()).sum(dim=1) / total
    inverse = (variance + eps).rsqrt()
    scale = weight * inverse
    return torch.stack((centre, inverse, scale, bias - centre * scale, variance))


def norm_table(
    table: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float, instance: bool, moments: Tensor | None = None
) -> None:
    """`norm_finalise` into the slots of a node.

    Args:
        table: `[4, 1 or N, C]`, written: mean, 1 / sqrt(variance + eps), scale, shift.
        moments: `[2, C]`, written if given: mean and unbiased variance of the batch, as running statistics take them.
    """
    rows = norm_finalise(stats, weight, bias, eps, instance)
    table.copy_(rows[:4])
    if moments is not None:
        count = stats[:, :, 0].sum((0, 1))
        moments[0] = rows[0, 0]
        moments[1] = rows[4, 0] * (count / (count - 1).clamp(min=1))


def norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    affine: Affine,
    slope: float,
    frozen: bool,
    averages: Averages | None = None,
) -> tuple[Tensor, Tensor]:
    """Through activation and norm, in place: g becomes the gradient of the raw map x.

    With h = g act'(scale x + shift) and z = (x - mean) inverse, over the pixels of a statistic::

        g <- scale (h - mean(h) - z mean(h z))        or scale h where the statistics are `frozen`

    averages: returns (mean(h), mean(h z)) `[2, C]` from their sums over these pixels and the number of pixels, if the
    statistics are those of several processes.

    Returns:
        sum(h z) and sum(h), `[C]`: the gradients of the norm's weight and bias.
    """
    dtype = accumulator(x.dtype)
    scale, shift = (per_image(values) for values in affine)
    x, grad = x.to(dtype), g.to(dtype)
    h = torch.where(x * scale + shift > 0, grad, grad * slope)
    z = (x - per_image(mean)) * per_image(inverse)
    if frozen:
        g.copy_(scale * h)
    elif averages is not None:
        sums = torch.stack((h.sum((0, 1, 2, 3)), (h * z).sum((0, 1, 2, 3))))
        mean_h, mean_hz = averages(sums, g[..., 0].numel())
        g.copy_(scale * (h - mean_h - z * mean_hz))
    else:
        over = (1, 2, 3) if mean.shape[0] == x.shape[0] and mean.shape[0] > 1 else (0, 1, 2, 3)
        g.copy_(scale * (h - h.mean(over, keepdim=True) - z * (h * z).mean(over, keepdim=True)))
    return (h * z).sum((0, 1, 2, 3)), h.sum((0, 1, 2, 3))


def act_backward(g: Tensor, out: Tensor, slope: float) -> Tensor:
    """Through an activation whose output was stored, in place; returns the sums over pixels, `[C]`."""
    g.copy_(torch.where(out > 0, g, g * slope))
    return g.to(accumulator(g.dtype)).sum((0, 1, 2, 3))


def _windows(x: Tensor, axes: int) -> Tensor:
    """`[N, *S/2, 2^axes, C]`: the pixels of each pooling window in row-major order."""
    return torch.stack([placed(x, phase, True, axes) for phase in phases(axes, True)], dim=-2)


def pool(out: Tensor, x: Tensor, *, axes: int, affine: Affine | None = None, slope: float = 0.0) -> None:
    """2x2 (2x2x2) maximum of what readers of x see."""
    out.copy_(_windows(read(x, affine, slope), axes).amax(dim=-2))


def pool_backward(
    gx: Tensor, g: Tensor, x: Tensor, *, axes: int, affine: Affine | None = None, slope: float = 0.0, add: bool = False
) -> None:
    """The gradient goes to the first pixel of each window that holds the maximum; others get zero."""
    first = _windows(read(x, affine, slope), axes).argmax(dim=-2)
    for index, phase in enumerate(phases(axes, True)):
        target = placed(gx, phase, True, axes)
        part = torch.where(first == index, g, torch.zeros_like(g))
        target.copy_(target + part if add else part)


def head(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, affine: Affine | None = None, slope: float = 0.0) -> None:
    """1x1 convolution: out `[N, classes, D, H, W]` (channels first) from x `[N, D, H, W, K]`, weight `[classes, K]`."""
    dtype = accumulator(x.dtype)
    result = read(x, affine, slope).to(dtype) @ weight.to(dtype).T + bias
    out.copy_(result.movedim(-1, 1))


def head_backward(
    gx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, *, affine: Affine | None = None, slope: float = 0.0, add: bool = False
) -> tuple[Tensor, Tensor]:
    """gx `[N, D, H, W, K]` from dy `[N, classes, D, H, W]`; returns the gradients of weight and bias."""
    dtype = accumulator(x.dtype)
    dy = dy.movedim(1, -1).to(dtype)
    part = dy @ weight.to(dtype)
    gx.copy_(gx + part if add else part)
    values = read(x, affine, slope).to(dtype)
    return _pixel_products(dy.flatten(0, 3), values.flatten(0, 3)), dy.sum((0, 1, 2, 3))


def _pixel_products(a: Tensor, b: Tensor, at_once: int = 256) -> Tensor:
    """`a.T @ b` of `[pixels, M]` and `[pixels, N]`. Sums of some pixels are added up: the bits of a single product would
    depend on the number of threads, with some libraries."""
    whole = a.shape[0] // at_once * at_once
    parts = [x[:whole].unflatten(0, (-1, at_once)) for x in (a, b)]
    return torch.matmul(parts[0].mT, parts[1]).sum(0) + a[whole:].T @ b[whole:]
