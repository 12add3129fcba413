"""The configurations of convolutions that could run, CUDA's and Triton's, ranked by their bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bounds import Work
from compiled_cuda import PHASES, conv, counts, kernels, work
from recording import DTYPE, of_conv, recorded

from unetpp_fast.kernels import cuda_ops, triton_ops
from unetpp_fast.kernels.conv_configs import Config, configs

CHANNELS = ((32, 32), (192, 32), (64, 64), (128, 128))  # read and written, of the table


@dataclass(frozen=True)
class Candidate:
    """A configuration: whose kernels, its shape in words, what it asks of a GPU, and notes on its instructions."""

    engine: str
    shape: str
    work: Work
    notes: str = ""


def candidates(k: int, co: int, size: int, images: int, normed: bool = False) -> list[Candidate]:
    """Those of a 3x3 convolution k → co of square maps, by engine in the order in which the package offers them.

    normed: reads through norm and activation, and takes statistics; else bias and activation follow.
    """
    out, a = (torch.empty(images, 1, size, size, width, dtype=DTYPE, device="meta") for width in (co, k))
    weights, row = torch.empty(9, k, co, dtype=DTYPE, device="meta"), torch.empty(1, k, device="meta")
    call = cuda_ops.ConvCall(
        out, a, weights, axes=2, taps=3, stride=1, phased=False, affine_a=(row, row) if normed else None, b=None, wb=None,
        affine_b=None, slope=0.0, plain=0, bias=torch.empty(co, device="meta"), border=None, act=not normed, add=False,
        stats=normed,
    )  # fmt: skip
    runs = cuda_ops.can_run_conv(out, a)[0]
    found = [_cuda(call, config) for config in (cuda_ops.configs(co, False) if runs else ())]
    offered = configs(tuple(out.shape[1:4]), images, co, 2, False, DTYPE, 227 * 1024, normed)
    return found + [_triton(call, config) for config in offered]


def table(images: int, size: int) -> list[str]:
    """The candidates of a few convolutions, the best bound first."""
    columns = "bound    registers  instructions of a warp by phase, while loading a copy"
    lines = [f"{'convolution':<18} {'configuration':<38} {'TFLOP/s':>8}  {columns}"]
    for normed in (False, True):
        for k, co in CHANNELS:
            name = f"{k}→{co}{' norm stats' * normed}"
            for one in sorted(candidates(k, co, size, images, normed), key=lambda one: one.work.seconds):
                figures = f"{one.work.tflops:>8.0f}  {one.work.binding:<8} {one.notes}"
                lines.append(f"{name:<18} {one.engine + ' ' + one.shape:<38} {figures}".rstrip())
    return lines


def _cuda(call: cuda_ops.ConvCall, config: cuda_ops.ConvConfig) -> Candidate:
    launch, base = conv(config, call.out, call.a, call.b, vars(call)), of_conv(call)
    counted = counts([launch])[launch.key]
    (registers,) = (number for kernel, (_, number) in kernels().items() if launch.kernel in kernel)
    notes = f"{registers:>9}  {', '.join(f'{phase} {counted.total(phase):.0f}' for phase in PHASES)}"
    if config.stages == 1:  # else loads are among the products
        notes += f"; {counted.total('load') / counted.of('LDGSTS'):.0f} a copy"
    shape = f"{config.rows} x {config.columns} x {config.block_co}, {config.stages} stages"
    return Candidate("cuda", shape, work(base.name, launch, counted, base.flops, base.dram), notes)


def _triton(call: cuda_ops.ConvCall, config: Config) -> Candidate:
    with recorded() as found:
        triton_ops.conv_by(triton_ops.Way(config), **vars(call))
    (one,) = (one for one in found if one.name.startswith("triton conv"))
    shape = f"{config.pixels} x {config.block_k} x {config.block_co}"
    return Candidate("triton", f"{shape}, {config.num_warps} warps, {config.num_stages} stages", one)
