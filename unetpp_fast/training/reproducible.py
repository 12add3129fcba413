"""Training whose weights do not depend on how many processes and threads share the work, on a CPU.

In float32 the order of a sum shows in its last bits, and training makes much of them: a ReLU or a maximum that falls the
other way changes a gradient by percents, and Adam makes a whole step of a gradient that is all rounding error. So inside
`each_image(network)` every layer that has parameters works off one image after another, each by one thread and from memory
that begins alike, and what is summed over images, the gradients of parameters and the statistics of batch norm, are values
of float32 that are summed in float64, over all processes. Unless they lie 2^29 apart such a sum is exact, so it is the same
whichever image lies where.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture.layers import InstanceNorm
from ..common.errors import InputError
from ..execution.batch_statistics import SyncedBatchNorm2d, SyncedBatchNorm3d, unbiased
from ..models.network import Network
from . import processes

ALIGNMENT = 64  # bytes, of PyTorch's allocations on a CPU


def check(network: Network, device: torch.device, dtype: str) -> None:
    """Raises InputError if this network cannot be trained reproducibly on that device in that precision."""
    reason = ""
    if device.type != "cpu":
        reason = f"on a CPU alone, not on {device}: use --device cpu"
    elif dtype != "float32":
        reason = f"in float32 alone, not in {dtype}: use --dtype float32"
    elif network.options["dropout"]:
        reason = "only without dropout, whose numbers each process draws by itself: use --dropout 0"
    elif any(parameter.dtype != torch.float32 for parameter in network.parameters()):
        reason = "in float32 alone: use network.float()"
    elif strange := [type(module).__name__ for module in network.modules() if _has_own(module)]:
        reason = f"with the layers that this package makes alone, not with {strange[0]}"
    if reason:
        raise InputError(f"training is reproducible {reason}")


def _has_own(module: nn.Module) -> bool:
    """Whether it has parameters whose gradients nothing here would sum."""
    return type(module) not in _EACH_IMAGE and next(module.parameters(recurse=False), None) is not None


def same_weights(network: Network) -> None:
    """Gives every process the weights and buffers of the first."""
    if processes.size() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


@contextmanager
def each_image(network: Network) -> Iterator[None]:
    """Inside, the gradients that backward passes give are summed over all processes, each adding its images.

    As many images are worked on at once as PyTorch has threads; everything else is left to the thread that calls.
    """
    before = [(module, type(module)) for module in network.modules() if type(module) in _EACH_IMAGE]
    threads, group = torch.get_num_threads(), network.sync_group
    outer = _pool.set(_workers(os.getpid(), threads) if threads > 1 else None)
    try:
        if processes.size() > 1:
            network.sync_group = dist.group.WORLD.group_name  # statistics are not of this process's images alone
        for module, kind in before:
            module.__class__ = _EACH_IMAGE[kind]
        with one_thread():
            yield
    finally:
        for module, kind in before:
            module.__class__ = kind
        network.sync_group = group
        _pool.reset(outer)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch computes by the thread that calls alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@cache
def _workers(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that compute by themselves: PyTorch keeps the number of threads for each thread that calls it."""
    started = threading.Barrier(threads, timeout=60)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # asking fixes it
        started.wait()

    pool = ThreadPoolExecutor(threads, "image", start)
    for _ in range(threads):
        pool.submit(int)  # starts a thread: none is idle before all are there
    return pool


def sum_over_images(loss: Callable, heads: Sequence[Tensor], target: Tensor) -> Tensor:
    """The sum of the losses, float64, of images each by itself; of none, a zero that backward passes start from."""
    if not len(target):
        return sum(head.double().sum() for head in heads)
    images = zip(*(head.split(1) for head in heads), target.split(1), strict=True)
    return sum(loss([head.double() for head in image], mask.double()) for *image, mask in images)


def _each(work: Callable, *batches: Tensor) -> list:
    """`work(...)` of the first image `[1, ...]` of every batch, of the second, and so on."""
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
    """Convolutions may sum in another order where memory begins elsewhere, as an image's does inside a batch."""
    return image if image.data_ptr() % ALIGNMENT == 0 else image.clone()


class _Convolution(torch.autograd.Function):
    """A convolution, transposed or not; `settings` are those of `torch.convolution` after the bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        images = _each(lambda image: torch.convolution(_aligned(image), weight, bias, *settings), x)
        return torch.cat(images) if images else torch.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])

        def of_image(image: Tensor, upper: Tensor) -> tuple:
            maps, of_bias = (_aligned(upper), _aligned(image)), [upper.shape[1]]
            return torch.ops.aten.convolution_backward(*maps, weight, of_bias, *ctx.settings, needed)

        found = _each(of_image, x, gradient.contiguous())
        below = (torch.cat([part[0] for part in found]) if found else torch.zeros_like(x)) if needed[0] else None
        shapes = [weight.shape, gradient.shape[1:2]]
        wanted = zip(shapes, needed[1:], strict=True)
        sums = [torch.zeros(shape, dtype=torch.float64) if need else None for shape, need in wanted]
        for part in found:
            for total, values in zip(sums, part[1:], strict=True):
                if total is not None:
                    total += values
        return below, *(None if total is None else _total(total).to(x.dtype) for total in sums), None


class _Norm(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) · weight + bias.

    With `keep` the statistics are those of the whole batch, over all processes, and `keep(mean, variance, pixels)` is called
    with them, float64, the variance biased; without, each image has its own.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: Callable | None) -> Tensor:
        pixels = torch.tensor(x[0:1, 0].numel() if keep is None else x[:, 0].numel(), dtype=torch.float64)
        pixels = pixels if keep is None else _total(pixels)

        def average(sums: list[Tensor]) -> Tensor:
            """`[1, C]` or `[N, C]`, from each image's sums."""
            stacked = _stacked(sums, x.shape[1:2])
            return (stacked if keep is None else _total(stacked.sum(0, keepdim=True))) / pixels

        average_of = average(_each(_sums, x))
        mean = average_of.to(x.dtype).expand(len(x), -1)
        variance = average(_each(lambda image, m: _sums((image - _wide(m, image)).square_()), x, mean))
        inverse = (variance + eps).rsqrt()
        scale = (inverse if weight is None else inverse * weight.double()).to(x.dtype).expand(len(x), -1)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)

        def normalise(image: Tensor, m: Tensor, s: Tensor, out: Tensor) -> None:
            torch.sub(image, _wide(m, image), out=out).mul_(_wide(s, image))
            if bias is not None:
                out.add_(_wide(bias, image))

        _each(normalise, x, mean, scale, result)
        if keep:
            keep(average_of[0], variance[0], pixels)
        ctx.save_for_backward(x, mean, inverse, scale, pixels)
        ctx.whole, ctx.affine = keep is not None, weight is not None
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, mean, inverse, scale, pixels = ctx.saved_tensors
        result = torch.empty_like(x, memory_format=torch.contiguous_format)

        def sums(image: Tensor, m: Tensor, upper: Tensor, centred: Tensor) -> Tensor:
            torch.sub(image, _wide(m, image), out=centred)
            return torch.stack((_sums(upper), _sums(upper * centred)))

        parts = _stacked(_each(sums, x, mean, gradient, result), (2, x.shape[1]))
        factor = torch.stack((torch.ones_like(inverse), inverse), dim=1)  # for the gradient, and that times the map
        if ctx.whole:
            together = _total(parts.sum(0)) * factor
        else:  # rounded, for what is summed over images has to be float32
            parts = together = (parts * factor).to(x.dtype).double()
        averages = together / pixels
        level, slope = (part.to(x.dtype).expand(len(x), -1) for part in (averages[:, 0], averages[:, 1] * inverse))

        def below(upper: Tensor, a: Tensor, b: Tensor, s: Tensor, out: Tensor) -> None:
            out.mul_(_wide(-b, out)).add_(upper).sub_(_wide(a, out)).mul_(_wide(s, out))

        _each(below, gradient, level, slope, scale, result)
        of_bias, of_weight = None, None
        if ctx.affine:
            of_bias, of_weight = (together[0] if ctx.whole else _total(parts.sum(0))).to(x.dtype)
        return result, of_weight, of_bias, None, None


def _sums(image: Tensor) -> Tensor:
    """The sum `[C]`, float64, over the pixels of an image `[1, C, *S]`."""
    return image.flatten(2).sum(2)[0].double()


def _stacked(sums: list[Tensor], shape: Sequence[int]) -> Tensor:
    """`[N, *shape]`, float64; of no image too."""
    return torch.stack(sums) if sums else torch.zeros(0, *shape, dtype=torch.float64)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Values of each channel, as they are combined with an image `[1, C, *S]`."""
    return values.view(1, -1, *[1] * (like.ndim - 2))


class _EachConvolution:
    def forward(self, x: Tensor) -> Tensor:
        settings = self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        return _Convolution.apply(x, self.weight, self.bias, settings)


class _EachBatchNorm:
    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:  # frozen: a factor and a bias of each channel
            x, dims = F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps), x.ndim - 2
            settings = [1] * dims, [0] * dims, [1] * dims, False, [0] * dims, x.shape[1]
            return _Convolution.apply(x, self.weight.view(-1, 1, *[1] * dims), self.bias, settings)
        return _Norm.apply(x, self.weight, self.bias, self.eps, self._keep)

    def _keep(self, mean: Tensor, variance: Tensor, pixels: Tensor) -> None:
        self._update(mean, unbiased(variance, pixels))


class _EachInstanceNorm(InstanceNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.bias, self.eps, None)


class _EachBatchNorm2d(_EachBatchNorm, SyncedBatchNorm2d):
    pass


class _EachBatchNorm3d(_EachBatchNorm, SyncedBatchNorm3d):
    pass


class _EachConv2d(_EachConvolution, nn.Conv2d):
    pass


class _EachConv3d(_EachConvolution, nn.Conv3d):
    pass


class _EachConvTranspose2d(_EachConvolution, nn.ConvTranspose2d):
    pass


class _EachConvTranspose3d(_EachConvolution, nn.ConvTranspose3d):
    pass


_EACH_IMAGE = {
    nn.Conv2d: _EachConv2d,
    nn.Conv3d: _EachConv3d,
    nn.ConvTranspose2d: _EachConvTranspose2d,
    nn.ConvTranspose3d: _EachConvTranspose3d,
    nn.BatchNorm2d: _EachBatchNorm2d,
    nn.BatchNorm3d: _EachBatchNorm3d,
    InstanceNorm: _EachInstanceNorm,
}
