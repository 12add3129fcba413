"""The weights of all convolutions of a network in the form in which the kernels take them, in one kernel or two; and back.

A pass needs each weight taps first, in training also flipped for the data gradient, in inference times the scale of the
batch norm that is folded into it, and composed with its up-sampling (`execution/plan/weight_composition.py`, which tests
hold these kernels against). Node by node that is several hundred small operators. Here all parameters lie in one flat
tensor, all operands in another, and a kernel's program takes a tile of one convolution, which it finds in a table of jobs.
Products are in float32 (`PRODUCTS`).

Jobs are rows of int64: offsets into the flat tensors, sizes, and the tile's place; the last column is the offset of the
scales `[CO]` of the convolution's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import kernel
from .maps import PRODUCTS, device_of

BLOCK = 32  # of channels, on each side of a tile
INNER = tl.constexpr(16)  # channels that a step multiplies
COLUMNS = 16  # of a job, of which the kernels read less


@triton.jit
def _sizes(job_ptr):
    """KS, K, CO, C and the place, of a job. A tensor of weights has fewer than 2^31 values, all of them together may not."""
    return (
        tl.load(job_ptr + 3).to(tl.int32), tl.load(job_ptr + 4).to(tl.int32), tl.load(job_ptr + 5).to(tl.int32),
        tl.load(job_ptr + 6).to(tl.int32), tl.load(job_ptr + 7).to(tl.int32),
    )  # fmt: skip


@triton.jit
def _tile(job_ptr, rows, columns, BLOCK: tl.constexpr):
    """Channels of a job's tile along both sides, `[BLOCK, 1]` and `[1, BLOCK]`, and which of them there are."""
    row = tl.load(job_ptr + 8).to(tl.int32) + tl.arange(0, BLOCK)[:, None]
    column = tl.load(job_ptr + 9).to(tl.int32) + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _axis(index, axis: tl.constexpr, SIZE: tl.constexpr, AXES: tl.constexpr):
    """Coordinate `axis` of a row-major index into a cube of SIZE on each of AXES axes."""
    for _ in tl.static_range(AXES - 1 - axis):
        index = index // SIZE
    return index % SIZE


@triton.jit
def _at_taps(place, element, AXES: tl.constexpr):
    """The tap that an element of an up-sampling meets at a place (see `weight_composition`), and whether there is one."""
    tap, inside = 0, place >= 0
    for axis in tl.static_range(AXES):
        t = _axis(place, axis, 4, AXES) - 1 + _axis(element, axis, 2, AXES)
        tap, inside = tap * 3 + t, inside & (t >= 0) & (t <= 2)
    return tap, inside


@triton.jit
def _at_place(tap, element, AXES: tl.constexpr):
    """The place at which an element of an up-sampling meets a tap, and where it lies among the phase weights."""
    phase, of_phase = 0, 0
    for axis in tl.static_range(AXES):
        place = _axis(tap, axis, 3, AXES) + 1 - _axis(element, axis, 2, AXES)
        phase, of_phase = phase * 2 + place % 2, of_phase * 2 + place // 2
    return phase * (1 << AXES) + of_phase


@triton.jit
def _is_inside(tap, border, AXES: tl.constexpr):
    """Whether a tap lies inside the map at pixels of a border class: not tap 0 at the first pixel, nor tap 2 at the last."""
    inside = tap >= 0
    for axis in tl.static_range(AXES):
        t, b = _axis(tap, axis, 3, AXES), _axis(border, axis, 3, AXES)
        inside = inside & ((t != 0) | (b != 0)) & ((t != 2) | (b != 2))
    return inside


@triton.jit
def _scaled(value, scales_ptr, job_ptr, co, CO, COLUMNS: tl.constexpr):
    """Values whose last axis is that of outputs, times the scales of these, if there are any."""
    if scales_ptr is not None:
        value *= tl.load(scales_ptr + tl.load(job_ptr + COLUMNS - 1) + co, mask=co < CO, other=0.0)
    return value


@triton.jit
def _border_rows(
    parameters_ptr, borders_ptr, scales_ptr, job_ptr, weight, KS, C, co, CO,
    AXES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a border table `[3^AXES, CO]`: by class, the sum over the taps inside of weight times up-sampling's bias."""
    TAPS: tl.constexpr = 27 if AXES == 3 else 9
    bias, border = tl.load(job_ptr + 11), tl.load(job_ptr + 12)
    row = tl.arange(0, 32 if AXES == 3 else 16)[:, None]
    total = tl.zeros((32 if AXES == 3 else 16, BLOCK), tl.float32)
    for tap in range(TAPS):
        by_tap = tl.zeros((INNER, BLOCK), tl.float32)
        for first in range(0, C, INNER):
            c = first + tl.arange(0, INNER)[:, None]
            value = tl.load(parameters_ptr + bias + c, mask=c < C, other=0.0)
            w = tl.load(parameters_ptr + weight + ((co * KS + c) * TAPS + tap), mask=(c < C) & (co < CO), other=0.0)
            by_tap += w * value
        total += tl.where(_is_inside(tap, row, AXES), tl.sum(by_tap, axis=0)[None, :], 0.0)
    total = _scaled(total, scales_ptr, job_ptr, co, CO, COLUMNS)
    tl.store(borders_ptr + border + (row * CO + co), total, mask=(row < TAPS) & (co < CO))


@kernel
def _arrange_kernel(
    parameters_ptr, operands_ptr, flipped_ptr, borders_ptr, scales_ptr, jobs_ptr,
    AXES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights `[CO, KS, 3..]` of a parameter to `[3^AXES, K, CO]`, times any scales, and, if there is room for them, flipped
    for the data gradient, `[3^AXES, CO, K]`; and border tables.

    Job: parameter, operand, flipped operand, KS, K, CO, C, place, first k, first co; KS >= K are the parameter's inputs. At
    a place of -1 it is a border table's, as of `_phases_kernel`.
    """
    TAPS: tl.constexpr = 27 if AXES == 3 else 9
    job_ptr = jobs_ptr + tl.program_id(0) * COLUMNS
    parameter, operand, flipped = tl.load(job_ptr), tl.load(job_ptr + 1), tl.load(job_ptr + 2)
    KS, K, CO, C, place = _sizes(job_ptr)
    k, co, mask = _tile(job_ptr, K, CO, BLOCK)
    if place < 0:
        _border_rows(parameters_ptr, borders_ptr, scales_ptr, job_ptr, parameter, KS, C, co, CO, AXES, COLUMNS, BLOCK)
    else:
        for tap in range(TAPS):
            value = tl.load(parameters_ptr + parameter + ((co * KS + k) * TAPS + tap), mask=mask)
            value = _scaled(value, scales_ptr, job_ptr, co, CO, COLUMNS).to(operands_ptr.dtype.element_ty)
            tl.store(operands_ptr + operand + ((tap * K + k) * CO + co), value, mask=mask)
            if flipped_ptr is not None:
                tl.store(flipped_ptr + flipped + (((TAPS - 1 - tap) * CO + co) * K + k), value, mask=mask)


@kernel
def _arrange_back_kernel(gradients_ptr, out_ptr, jobs_ptr, AXES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """From gradients `[3^AXES, K, CO]` to those of parameters; jobs as in `_arrange_kernel`."""
    TAPS: tl.constexpr = 27 if AXES == 3 else 9
    job_ptr = jobs_ptr + tl.program_id(0) * COLUMNS
    parameter, gradient = tl.load(job_ptr), tl.load(job_ptr + 1)
    KS, K, CO, _, _ = _sizes(job_ptr)
    k, co, mask = _tile(job_ptr, K, CO, BLOCK)
    for tap in range(TAPS):
        value = tl.load(gradients_ptr + gradient + ((tap * K + k) * CO + co), mask=mask)
        tl.store(out_ptr + parameter + ((co * KS + k) * TAPS + tap), value, mask=mask)


@kernel
def _phases_kernel(
    parameters_ptr, operands_ptr, flipped_ptr, scales_ptr, jobs_ptr,
    UP: tl.constexpr, AXES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase weights `[2^AXES, 2^AXES, K, CO]`, times any scales, and, if there is room for them, those of the data gradient
    `[4^AXES, CO, K]`.

    Job: weight (of the part that reads the low source), phases, gathered, KS, K, CO, C, place, first k, first co, up, up's
    bias, border table (-1 without a bias). Weights are `[CO, KS, 3..]`. UP: "none" for nearest
    neighbour, "project" with a 1x1 convolution `[C, K]` before it, "deconv" for elements `[K, C, 2..]`.
    """
    job_ptr = jobs_ptr + tl.program_id(0) * COLUMNS
    weight, phases, gathered = tl.load(job_ptr), tl.load(job_ptr + 1), tl.load(job_ptr + 2)
    KS, K, CO, C, place = _sizes(job_ptr)
    up = tl.load(job_ptr + 10)
    k, co, mask = _tile(job_ptr, K, CO, BLOCK)
    TAPS: tl.constexpr = 27 if AXES == 3 else 9
    ELEMENTS: tl.constexpr = 1 << AXES
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for element in range(ELEMENTS):
        tap, inside = _at_taps(place, element, AXES)
        if inside:
            if UP == "none":
                acc += tl.load(parameters_ptr + weight + (co * KS + k) * TAPS + tap, mask=mask, other=0.0)
            else:
                for first in range(0, C, INNER):
                    c = first + tl.arange(0, INNER)
                    in_up = (k * C + c[None, :]) * ELEMENTS + element if UP == "deconv" else c[None, :] * K + k
                    u = tl.load(parameters_ptr + up + in_up, mask=(k < K) & (c < C)[None, :], other=0.0)
                    in_w = (co * KS + c[:, None]) * TAPS + tap
                    w = tl.load(parameters_ptr + weight + in_w, mask=(co < CO) & (c < C)[:, None], other=0.0)
                    acc = tl.dot(u, w, acc, input_precision=PRODUCTS)
    value = _scaled(acc, scales_ptr, job_ptr, co, CO, COLUMNS).to(operands_ptr.dtype.element_ty)
    phase, of_phase = 0, 0
    for axis in tl.static_range(AXES):
        p = _axis(place, axis, 4, AXES)
        phase, of_phase = phase * 2 + p % 2, of_phase * 2 + p // 2
    tl.store(operands_ptr + phases + ((phase * ELEMENTS + of_phase) * K + k) * CO + co, value, mask=mask)
    if flipped_ptr is not None:
        last = (1 << (2 * AXES)) - 1 - place
        tl.store(flipped_ptr + gathered + (last * CO + co) * K + k, value, mask=mask)


@triton.jit
def _taps_of_border(gradients_ptr, border, tap, co, CO, AXES: tl.constexpr):
    """`[1, BLOCK]`: the gradient of a border table `[3^AXES, CO]`, summed over the classes that have `tap` inside."""
    total = tl.zeros(co.shape, tl.float32)
    for row in range(27 if AXES == 3 else 9):
        value = tl.load(gradients_ptr + border + row * CO + co, mask=co < CO, other=0.0)
        total += tl.where(_is_inside(tap, row, AXES), value, 0.0)
    return total


@kernel
def _phases_weight_kernel(
    parameters_ptr, gradients_ptr, out_ptr, jobs_ptr,
    UP: tl.constexpr, AXES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a weight's part that reads the low source, from those of phase weights and border table.

    Job as in `_phases_kernel`, with `phases` and `border table` in the gradients, `gathered` the weight in `out`, `place`
    the tap and `first k` the first c.
    """
    job_ptr = jobs_ptr + tl.program_id(0) * COLUMNS
    phases, weight = tl.load(job_ptr + 1), tl.load(job_ptr + 2)
    KS, K, CO, C, tap = _sizes(job_ptr)
    up = tl.load(job_ptr + 10)
    c, co, mask = _tile(job_ptr, C, CO, BLOCK)
    TAPS: tl.constexpr = 27 if AXES == 3 else 9
    ELEMENTS: tl.constexpr = 1 << AXES
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for element in range(ELEMENTS):
        g_ptr = gradients_ptr + phases + _at_place(tap, element, AXES) * K * CO
        if UP == "none":
            acc += tl.load(g_ptr + c * CO + co, mask=mask, other=0.0)
        else:
            for first in range(0, K, INNER):
                k = first + tl.arange(0, INNER)
                in_up = (k[None, :] * C + c) * ELEMENTS + element if UP == "deconv" else c * K + k[None, :]
                u = tl.load(parameters_ptr + up + in_up, mask=(c < C) & (k < K)[None, :], other=0.0)
                g = tl.load(g_ptr + k[:, None] * CO + co, mask=(co < CO) & (k < K)[:, None], other=0.0)
                acc = tl.dot(u, g, acc, input_precision=PRODUCTS)
    if UP != "none":
        border = tl.load(job_ptr + 12)
        if border >= 0:
            bias = tl.load(parameters_ptr + tl.load(job_ptr + 11) + c, mask=c < C, other=0.0)
            acc += bias * _taps_of_border(gradients_ptr, border, tap, co, CO, AXES)
    tl.store(out_ptr + weight + (co * KS + c) * TAPS + tap, acc, mask=mask)


@kernel
def _phases_up_kernel(
    parameters_ptr, gradients_ptr, out_ptr, jobs_ptr,
    UP: tl.constexpr, AXES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of an up-sampling's weight and bias.

    Job as in `_phases_weight_kernel`, with `place` the element, `first co` the first c, and in the last columns the
    gradients' places in `out`: of the weight, of the bias. Programs of the first element and k write the bias's.
    """
    job_ptr = jobs_ptr + tl.program_id(0) * COLUMNS
    weight, phases = tl.load(job_ptr), tl.load(job_ptr + 1)
    KS, K, CO, C, first_element = _sizes(job_ptr)
    k, c, mask = _tile(job_ptr, K, C, BLOCK)
    border = tl.load(job_ptr + 12)
    has_bias = (tl.load(job_ptr + 8) == 0) & (first_element == 0)
    if UP == "deconv":  # a projection always has one
        has_bias &= border >= 0
    TAPS: tl.constexpr = 27 if AXES == 3 else 9
    ELEMENTS: tl.constexpr = 1 << AXES
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    of_bias = tl.zeros((1, BLOCK), tl.float32)
    for tap in range(TAPS):
        for first in range(0, CO, INNER):
            co = first + tl.arange(0, INNER)
            in_w = (co[:, None] * KS + c) * TAPS + tap
            w = tl.load(parameters_ptr + weight + in_w, mask=(c < C) & (co < CO)[:, None], other=0.0)
            # A 1x1 convolution has one element, which meets every place.
            for step in range(1 if UP == "deconv" else ELEMENTS):
                place = _at_place(tap, first_element + step, AXES)
                in_g = (place * K + k) * CO + co[None, :]
                g = tl.load(gradients_ptr + phases + in_g, mask=(k < K) & (co < CO)[None, :], other=0.0)
                acc = tl.dot(g, w, acc, input_precision=PRODUCTS)
            if has_bias:
                by_tap = _taps_of_border(gradients_ptr, border, tap, co[:, None], CO, AXES)
                of_bias += tl.sum(by_tap * w, axis=0)[None, :]
    in_up = (k * C + c) * ELEMENTS + first_element if UP == "deconv" else c * K + k
    tl.store(out_ptr + tl.load(job_ptr + 13) + in_up, acc, mask=mask)
    if has_bias:
        tl.store(out_ptr + tl.load(job_ptr + 14) + c, of_bias, mask=c < C)


def table(jobs: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """Jobs as a kernel takes them; None if there are none."""
    rows = [[*job, *[0] * (COLUMNS - len(job))] for job in jobs]
    return torch.tensor(rows, dtype=torch.int64, device=device) if rows else None


def tiles(rows: int, columns: int) -> list[tuple[int, int]]:
    """The first row and column of each tile."""
    return [(row, column) for row in range(0, rows, BLOCK) for column in range(0, columns, BLOCK)]


def compose(
    parameters: Tensor,
    operands: Tensor,
    flipped: Tensor | None,
    borders: Tensor,
    scales: Tensor | None,
    arrange: Tensor | None,
    phases: Tensor | None,
    axes: int,
    up: str,
) -> None:
    """All operands from all parameters, by `_arrange_kernel` and `_phases_kernel`, whose jobs `arrange` and `phases` are.

    parameters, borders, and scales of the outputs of all convolutions: float32; operands, and flipped, those of the data
    gradients: in the maps' precision; all flat.
    up: as UP in `_phases_kernel`.
    """
    shared = {"AXES": axes, "COLUMNS": COLUMNS, "BLOCK": BLOCK}
    with device_of(parameters):
        if arrange is not None:
            _arrange_kernel[(arrange.shape[0],)](parameters, operands, flipped, borders, scales, arrange, **shared)
        if phases is not None:
            _phases_kernel[(phases.shape[0],)](parameters, operands, flipped, scales, phases, UP=up, **shared)


def compose_backward(
    parameters: Tensor,
    gradients: Tensor,
    out: Tensor,
    arrange: Tensor | None,
    phases: Sequence[Tensor | None],
    axes: int,
    up: str,
) -> None:
    """The gradients of all parameters from those of all operands; all flat, float32.

    phases: the jobs of `_phases_weight_kernel`, and of `_phases_up_kernel` for an up-sampling that has weights.
    """
    shared = {"AXES": axes, "COLUMNS": COLUMNS, "BLOCK": BLOCK}
    with device_of(parameters):
        if arrange is not None:
            _arrange_back_kernel[(arrange.shape[0],)](gradients, out, arrange, **shared)
        for kernel, jobs in zip((_phases_weight_kernel, _phases_up_kernel), phases, strict=True):
            if jobs is not None:
                kernel[(jobs.shape[0],)](parameters, gradients, out, jobs, UP=up, **shared)
