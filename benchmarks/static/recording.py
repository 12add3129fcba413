"""The launches and operators of a pass, recorded on meta tensors: nothing is computed, and no GPU is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from bounds import MULTIPROCESSORS, SHARED, WGMMA, Work, tensor_clocks
from compiled_cuda import Launch, conv, wgrad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from unetpp_fast.execution import reference
from unetpp_fast.execution.fused import operators
from unetpp_fast.execution.fused.backward import Backward
from unetpp_fast.execution.fused.forward import Forward
from unetpp_fast.kernels import cuda_ops, triton_ops
from unetpp_fast.kernels.conv_sums import FEW
from unetpp_fast.models.network import Network

DTYPE = torch.bfloat16
# What cuDNN's convolutions are taken to reach, by the fewer of their channels: an assumption, flops a second.
CUDNN = {32: 150e12, 64: 235e12, 128: 350e12, 256: 450e12}
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "detach")  # that move no bytes, besides views
Recorded = Work | tuple[Work, Launch]  # of a CUDA kernel, its flops and bytes alone: its instructions are counted later


class Operators(TorchDispatchMode):
    """Records PyTorch's operators: by bytes, convolutions by cuDNN's rates too. Those that make views are free."""

    def __init__(self, into: list[Recorded]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name not in FREE and not any(
            found.alias_info is not None and not found.alias_info.is_write for found in op._schema.returns
        ):
            read = () if name.startswith("new_") or name.endswith("_like") else (args, kwargs)
            tensors = [x for x in tree_flatten((read, result))[0] if isinstance(x, Tensor)]
            moved = sum({id(x): bytes_of(x) for x in tensors}.values())
            self.into.append(Work(name, dram=moved, **self.convolution(name, args)))
        return result

    def convolution(self, name: str, args: tuple) -> dict:
        """Flops of a convolution, of a backward one those of the gradients asked for, and clocks by cuDNN's rate."""
        if name not in ("convolution", "convolution_backward"):
            return {}
        x, weight = (args[0], args[1]) if name == "convolution" else (args[1], args[2])
        transposed = args[6] if name == "convolution" else args[7]
        if name == "convolution":
            sizes = x.shape[2:] if transposed else [size // step for size, step in zip(x.shape[2:], args[3], strict=True)]
            count = 1
        else:
            sizes = x.shape[2:] if transposed else args[0].shape[2:]
            count = sum(args[-1][:2])
        flops = 2 * count * x.shape[0] * math.prod(sizes) * weight.numel()
        narrow = min(weight.shape[:2])
        rate = next((CUDNN[width] for width in sorted(CUDNN, reverse=True) if narrow >= width), CUDNN[32])
        return {"flops": flops, "tensor": tensor_clocks(flops, rate) / MULTIPROCESSORS}


def bytes_of(x: Tensor) -> int:
    """Of a tensor's values; an expanded one has each once."""
    return x.element_size() * math.prod(size for size, step in zip(x.shape, x.stride(), strict=True) if step or size == 0)


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Records what runs inside, in order: Triton's launches, those of the CUDA library, PyTorch's operators."""
    found: list[Recorded] = []
    run_conv = cuda_ops._run_conv

    def launched(kernel, grid):
        def launch(*args, **kwargs) -> None:
            kwargs |= zip(kernel.arg_names, args, strict=False)
            found.append(of_triton(kernel.__name__, math.prod(grid), kwargs))

        return launch

    def run(call, config):
        if config == cuda_ops.TRITON:
            return run_conv(call, config)
        options = vars(call)
        launch = conv(config, call.out, call.a, call.b, options)
        found.append((of_conv(call), launch))
        tiles = launch.arguments["tiles_y"] * launch.arguments["tiles_x"]
        return (
            call.out.new_empty(call.out.shape[0], tiles, 3, call.out.shape[-1], dtype=torch.float32) if call.stats else None
        )

    def run_wgrad(a, scale, shift, dy, partial, result, axes, phased, slope):
        flops = 2 * dy[..., 0].numel() * (4 if phased else 9) * a.shape[-1] * dy.shape[-1]
        moved = bytes_of(a) + bytes_of(dy) + 2 * bytes_of(partial) + bytes_of(result)
        name = f"cuda wgrad {a.shape[-1]}→{dy.shape[-1]}{' phased' * phased} {dy.shape[2]}²"
        found.append((Work(name, flops=flops, dram=moved), wgrad(a, dy, scale, partial, phased)))

    library = SimpleNamespace(conv_wgrad=run_wgrad)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.jit.KernelInterface, "__getitem__", launched))
        stack.enter_context(mock.patch.object(cuda_ops, "_run_conv", run))
        stack.enter_context(mock.patch.object(triton_ops, "interpreted", lambda x: False))  # though no GPU holds them
        stack.enter_context(mock.patch.object(triton_ops, "shared_memory", lambda device: 227 * 1024))
        stack.enter_context(mock.patch.dict(torch.ops.__dict__, unetpp_fast_cuda=library))
        stack.enter_context(Operators(found))
        yield found


def of_conv(call: cuda_ops.ConvCall) -> Work:
    """Flops and bytes of a convolution: a low source's phases take 4 of 9 taps."""
    out, a, b = call.out, call.a, call.b
    units = out[..., 0].numel()
    flops = 2 * units * a.shape[-1] * out.shape[-1] * call.taps**call.axes
    flops += 0 if b is None else 2 * units * b.shape[-1] * out.shape[-1] * (4 if call.phased else 9)
    tensors = [x for x in (out, a, b, call.wa, call.wb) if x is not None]
    form = "".join(f" {name}" for name in ("phased", "add", "stats") if getattr(call, name))
    form += " norm" if call.affine_a is not None else ""
    channels = f"{a.shape[-1]}{f'+{b.shape[-1]}' if b is not None else ''}→{out.shape[-1]}"
    dram = sum(map(bytes_of, tensors)) + (bytes_of(out) if call.add else 0)
    return Work(f"cuda conv {channels}{' dlow' * call.gathered}{form} {out.shape[2]}²", flops=flops, dram=dram)


def of_triton(kernel: str, programs: int, given: dict) -> Work:
    """A Triton kernel: convolutions by tensor cores, shared memory and what their steps fetch through L2, all kernels by
    their tensors' bytes. Issue slots are not counted."""
    tensors = {id(x): bytes_of(x) for x in given.values() if isinstance(x, Tensor)}
    dram, name = sum(tensors.values()), f"triton {kernel.strip('_').removesuffix('_kernel')}"
    if kernel == "_conv_kernel":
        return _triton_conv(name, programs, given, dram)
    if kernel == "_conv_wgrad_kernel":
        return _triton_wgrad(name, programs, given, dram)
    return Work(name, programs, dram=dram)


def _triton_conv(name: str, programs: int, given: dict, dram: float) -> Work:
    """By its steps. With one stage loads go through L1, which is taken to hold a block's tile and halo for all its taps."""
    tile, co, axes = [given["BLOCK_H"], given["BLOCK_W"]], given["BLOCK_CO"], given["AXES"]
    tile = [given["BLOCK_D"], *tile] if axes == 3 else tile
    pixels, out, is_plain = math.prod(tile), given["out_ptr"], given["num_stages"] == 1
    sources = [("A", given["TAPS"], given["STRIDE"])]
    sources += [("B", 2 if given["PHASED"] else 3, 1)] if given["KB"] else []
    flops = tensor = shared = l2 = 0.0
    for source, taps, stride in sources:
        k, block, count = given[f"K{source}"], given[f"BLOCK_K{source}"], taps**axes
        flops += 2 * out[..., 0].numel() * k * given["CO"] * count
        steps = -(-k * count // block) if k <= FEW else -(-k // block) * count
        tensor += 2 * pixels * block * co * steps
        window = math.prod(stride * (side - 1) + taps for side in tile)
        fetched = window / count if is_plain or k <= FEW else pixels
        l2 += steps * (fetched + co) * block * out.element_size()
        shared += steps * shared_bytes(pixels, co, block, out.element_size(), is_plain)
    dram += bytes_of(out) if given["ADD"] else 0
    name += f" {given['KA']}{'+' + str(given['KB']) if given['KB'] else ''}→{given['CO']} {out.shape[2]}²"
    l2 += pixels * co * out.element_size()
    return Work(name, programs, flops, tensor_clocks(tensor, WGMMA), shared=shared / SHARED, l2=l2 * programs, dram=dram)


def _triton_wgrad(name: str, programs: int, given: dict, dram: float) -> Work:
    pixels, dy = given["BLOCK_D"] * given["BLOCK_H"] * given["BLOCK_W"], given["dy_ptr"]
    rows, co, steps = given["BLOCK_M"], given["BLOCK_CO"], given["steps"]
    flops = 2 * dy[..., 0].numel() * (2 if given["PHASED"] else 3) ** given["AXES"] * given["K"] * given["CO"]
    l2 = steps * pixels * (rows + co) * dy.element_size() + rows * co * 4
    shared = steps * shared_bytes(rows, co, pixels, dy.element_size(), given["num_stages"] == 1)
    tensor = tensor_clocks(2 * steps * pixels * rows * co, WGMMA)
    name += f" {given['K']}→{given['CO']} {dy.shape[2]}²"
    return Work(name, programs, flops, tensor, shared=shared / SHARED, l2=l2 * programs, dram=dram)


def shared_bytes(rows: int, columns: int, depth: int, size: int, is_plain: bool) -> int:
    """Bytes of a product [rows, depth] [depth, columns] through shared memory and L1: both factors arrive, by way of
    registers if loads are plain, and wgmma reads the second one for each 64 rows."""
    arrive = (2 if is_plain else 1) * (rows + columns)
    return (arrive + rows + columns * max(1, rows // 64)) * depth * size


def fused_pass(network: Network, x: Tensor, training: bool) -> list[Recorded]:
    """What a fused pass of a network on meta tensors runs: with `training`, forwards and backwards."""
    structure = network.structure
    named = operators._named(structure, [*(p.detach() for p in network.parameters()), *network.buffers()])
    modes = structure.modes(("1" if training else "0") * len(structure.norms), training)
    with torch.no_grad(), recorded() as found:
        outputs, maps = Forward(structure.plan, cuda_ops, modes, named, DTYPE).run(x, training)
        if training:
            Backward(structure.plan, cuda_ops, modes, named, DTYPE).run(maps, outputs, False)
    return found


def eager_pass(network: Network, x: Tensor, training: bool) -> list[Recorded]:
    """As `fused_pass`, of PyTorch's operators in bfloat16."""
    network = network.to(DTYPE)
    with torch.set_grad_enabled(training), recorded() as found:
        logits = reference.forward(network, x.to(DTYPE))
        if training:
            torch.autograd.backward(logits, [torch.empty_like(value) for value in logits])
    return found
