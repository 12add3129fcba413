"""Training whose weights do not depend on how many processes and threads share the work, on a CPU.

In float32 the order of a sum shows in its last bits, and training amplifies them: a ReLU or a maximum that switches sides
changes a gradient by percents, and Adam makes a whole step of a gradient that is only rounding error. So `each_image` gives
every layer that has parameters another `forward`, for the time of a step:

- It computes one image after another, each on one thread and from memory of the same alignment. An image then has the same
  bits wherever it is computed. Layers without parameters never mix images.
- Sums over images and processes, which are the gradients of parameters and the statistics of batch norm, add float32 values
  in float64. Such a sum is exact unless the values lie 2^29 apart, so the order of the images does not matter.

The rest of the step runs on one thread; `sum_over_images` computes the loss in the same way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture.layers import InstanceNorm
from ..common.errors import InputError
from ..execution.batch_statistics import unbiased, update_running_statistics
from ..execution.built import changed
from ..models.network import Network
from . import processes

ALIGNMENT = 64  # bytes; PyTorch aligns its allocations on a CPU to this


def check(network: Network, device: torch.device, dtype: str) -> None:
    """Raises InputError if this network cannot be trained reproducibly on that device in that precision."""
    reason = ""
    if device.type != "cpu":
        reason = f"only on a CPU, not on {device}: use --device cpu"
    elif dtype != "float32":
        reason = f"only in float32, not in {dtype}: use --dtype float32"
    elif network.over_encoder:
        reason = "only without an encoder of another library, whose layers compute whole batches"
    elif network.options["dropout"]:
        reason = "only without dropout, for which every process draws its own numbers: use --dropout 0"
    elif any(parameter.dtype != torch.float32 for parameter in network.parameters()):
        reason = "only in float32: use network.float()"
    elif others := [type(module).__name__ for module in network.modules() if _is_unknown(module)]:
        reason = f"only with the layers that this package makes, not with {others[0]}"
    elif why := changed(network):
        reason = f"only with the layers as they were built: {why}"
    if reason:
        raise InputError(f"training is reproducible {reason}")


def _is_unknown(module: nn.Module) -> bool:
    """Whether a module has parameters but no forward function here, so that their gradients would not be summed."""
    known = type(module) in _FORWARDS and "forward" not in vars(module)
    return not known and next(module.parameters(recurse=False), None) is not None


def same_weights(network: Network) -> None:
    """Copies the weights and buffers of the first process to the others."""
    if processes.size() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


@contextmanager
def each_image(network: Network) -> Iterator[None]:
    """Inside, layers compute image by image, and backward passes give gradients summed over the images of all processes.

    PyTorch's number of threads is the number of images computed at a time; all else runs on the calling thread.
    """
    layers = [module for module in network.modules() if type(module) in _FORWARDS]
    threads, group, backend = torch.get_num_threads(), network.sync_group, network.backend
    outer = _pool.set(_workers(os.getpid(), threads) if threads > 1 else None)
    try:
        if processes.size() > 1:
            network.sync_group = dist.group.WORLD.group_name  # batch norm counts the pixels of all processes
        network.backend = "reference"  # which calls every layer
        for layer in layers:
            layer.forward = MethodType(_FORWARDS[type(layer)], layer)  # hides the method of the class
        with one_thread():
            yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
        network.sync_group, network.backend = group, backend
        _pool.reset(outer)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch computes on the calling thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@cache
def _workers(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads on each of which PyTorch computes with one thread: its number of threads belongs to the calling thread."""
    started = threading.Barrier(threads, timeout=60)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # the number takes effect when it is read
        started.wait()

    pool = ThreadPoolExecutor(threads, "image", start)
    for _ in range(threads):
        pool.submit(int)  # starts a thread: none is idle until all have started
    return pool


def sum_over_images(loss: Callable, heads: Sequence[Tensor], target: Tensor) -> Tensor:
    """The sum of the losses of single images, float64; without images a zero from which a backward pass can start."""
    if not len(target):
        zero: Any = sum(head.double().sum() for head in heads)
        return zero
    images = zip(*(head.split(1) for head in heads), target.split(1), strict=True)
    return sum(loss([head.double() for head in image], mask.double()) for *image, mask in images)


def _map_images(work: Callable, *batches: Tensor) -> list:
    """`work(...)` of the first image `[1, ...]` of every batch, of the second, and so on, on the threads of the pool."""
    images = [batch.split(1) if len(batch) else () for batch in batches]
    pool = _pool.get()
    if pool is None or len(images[0]) < 2:
        return [work(*image) for image in zip(*images, strict=True)]
    return list(pool.map(torch.no_grad()(work), *images))


def _total(sums: Tensor) -> Tensor:
    """The sum over all processes, float64."""
    if processes.size() > 1:
        dist.all_reduce(sums)
    return sums


def _aligned(image: Tensor) -> Tensor:
    """The image in aligned memory: inside a batch it may not be, and convolutions may then sum in another order."""
    return image if image.data_ptr() % ALIGNMENT == 0 else image.clone()


class _Convolution(torch.autograd.Function):
    """A convolution, transposed or not; `settings` are those of `torch.convolution` after the bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        images = _map_images(lambda image: torch.convolution(_aligned(image), weight, bias, *settings), x)
        return torch.cat(images) if images else torch.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])

        def of_image(image: Tensor, of_output: Tensor) -> tuple:
            bias_shape, maps = [of_output.shape[1]], (_aligned(of_output), _aligned(image))
            return torch.ops.aten.convolution_backward(*maps, weight, bias_shape, *ctx.settings, needed)

        gradients = _map_images(of_image, x, gradient.contiguous())  # of the input, the weight and the bias, by image
        of_x = None
        if needed[0]:
            of_x = torch.cat([of_input for of_input, _, _ in gradients]) if gradients else torch.zeros_like(x)
        shapes = zip((weight.shape, gradient.shape[1:2]), needed[1:], strict=True)
        sums = [torch.zeros(shape, dtype=torch.float64) if need else None for shape, need in shapes]
        for _, *of_parameters in gradients:
            for total, values in zip(sums, of_parameters, strict=True):
                if total is not None:
                    total += values
        return of_x, *(None if total is None else _total(total).to(x.dtype) for total in sums), None


class _Norm(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) · weight + bias.

    With `keep` the statistics are those of the whole batch in all processes, and `keep` is called with the mean and the
    unbiased variance `[C]`, float64. Without it, every image has its own statistics (instance norm).

    Gradient, for the gradient g of the output, with means over the pixels that share statistics::

        scale (g - mean(g) - (x - mean) mean(g (x - mean)) / (variance + eps)),   scale = weight / sqrt(variance + eps)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: Callable | None) -> Tensor:
        pixels = torch.tensor(x[0:1, 0].numel() if keep is None else x[:, 0].numel(), dtype=torch.float64)
        pixels = pixels if keep is None else _total(pixels)

        def average(sums: list[Tensor]) -> Tensor:
            """`[1, C]` for the batch, or `[N, C]`, from the sums of each image."""
            stacked = _stacked(sums, x.shape[1:2])
            return (stacked if keep is None else _total(stacked.sum(0, keepdim=True))) / pixels

        exact_mean = average(_map_images(_sums, x))
        mean = exact_mean.to(x.dtype).expand(len(x), -1)
        variance = average(_map_images(lambda image, m: _sums((image - _per_channel(m, image)).square_()), x, mean))
        inverse = (variance + eps).rsqrt()
        scale = (inverse if weight is None else inverse * weight.double()).to(x.dtype).expand(len(x), -1)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)

        def normalise(image: Tensor, m: Tensor, s: Tensor, out: Tensor) -> None:
            torch.sub(image, _per_channel(m, image), out=out).mul_(_per_channel(s, image))
            if bias is not None:
                out.add_(_per_channel(bias, image))

        _map_images(normalise, x, mean, scale, result)
        if keep:
            keep(exact_mean[0], unbiased(variance[0], pixels))
        ctx.save_for_backward(x, mean, inverse, scale, pixels)
        ctx.whole_batch, ctx.affine = keep is not None, weight is not None
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, mean, inverse, scale, pixels = ctx.saved_tensors
        result = torch.empty_like(x, memory_format=torch.contiguous_format)

        def sums(image: Tensor, m: Tensor, of_output: Tensor, centred: Tensor) -> Tensor:
            torch.sub(image, _per_channel(m, image), out=centred)
            return torch.stack((_sums(of_output), _sums(of_output * centred)))

        parts = _stacked(_map_images(sums, x, mean, gradient, result), (2, x.shape[1]))
        factor = torch.stack((torch.ones_like(inverse), inverse), dim=1)
        if ctx.whole_batch:
            together = _total(parts.sum(0)) * factor
        else:  # rounded: values summed over images must be float32
            parts = together = (parts * factor).to(x.dtype).double()
        averages = together / pixels
        level, slope = (part.to(x.dtype).expand(len(x), -1) for part in (averages[:, 0], averages[:, 1] * inverse))

        def of_input(of_output: Tensor, a: Tensor, b: Tensor, s: Tensor, out: Tensor) -> None:
            out.mul_(_per_channel(-b, out)).add_(of_output).sub_(_per_channel(a, out)).mul_(_per_channel(s, out))

        _map_images(of_input, gradient, level, slope, scale, result)  # `result` still holds x - mean
        of_bias, of_weight = None, None
        if ctx.affine:
            of_bias, of_weight = (together[0] if ctx.whole_batch else _total(parts.sum(0))).to(x.dtype)
        return result, of_weight, of_bias, None, None


def _sums(image: Tensor) -> Tensor:
    """The sum `[C]`, float64, over the pixels of an image `[1, C, *S]`."""
    return image.flatten(2).sum(2)[0].double()


def _stacked(sums: list[Tensor], shape: Sequence[int]) -> Tensor:
    """`[N, *shape]`, float64; N may be 0."""
    return torch.stack(sums) if sums else torch.zeros(0, *shape, dtype=torch.float64)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Values per channel, in the shape that broadcasts over an image `[1, C, *S]`."""
    return values.view(1, -1, *[1] * (like.ndim - 2))


def _convolve(layer: nn.Module, x: Tensor) -> Tensor:
    settings = layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
    return _Convolution.apply(x, layer.weight, layer.bias, settings)


def _batch_norm(layer: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    if layer.training:
        return _Norm.apply(x, layer.weight, layer.bias, layer.eps, partial(update_running_statistics, layer))
    # Frozen: a scale and a shift per channel, which is a 1x1 convolution in groups of one channel.
    x, dims = F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps), x.ndim - 2
    settings = [1] * dims, [0] * dims, [1] * dims, False, [0] * dims, x.shape[1]
    return _Convolution.apply(x, layer.weight.view(-1, 1, *[1] * dims), layer.bias, settings)


def _instance_norm(layer: InstanceNorm, x: Tensor) -> Tensor:
    return _Norm.apply(x, layer.weight, layer.bias, layer.eps, None)


_FORWARDS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Conv2d: _convolve,
    nn.Conv3d: _convolve,
    nn.ConvTranspose2d: _convolve,
    nn.ConvTranspose3d: _convolve,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    InstanceNorm: _instance_norm,
}
