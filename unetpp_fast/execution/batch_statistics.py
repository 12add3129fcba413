"""Batch norm statistics over several processes, for the reference and the fused operators.

`training.processes.sync_batch_norm` turns the batch norms of a network into ones whose training statistics are those of the
whole batch, over all processes. Squares are summed around the mean, and the sums of the processes are combined in the same
order everywhere: every process gets the same bits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist  # some builds of torch lack its members: name them only inside functions
from torch import Tensor, nn

from ..architecture.network_spec import NetworkSpec


def group_of(name: Any) -> dist.ProcessGroup | None:
    """The process group of that name; None for "", this process only."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None


def gathered_statistics(moments: Tensor, pixels: int, group: dist.ProcessGroup) -> Tensor:
    """From this process's mean and unbiased variance `[2, C]` over its `pixels`: the partial statistics of all processes,
    `[1, processes, 3, C]`, as `naive.norm_table` takes them."""
    count = torch.full_like(moments[0], pixels)
    mine = torch.stack((count, moments[0], moments[1] * max(pixels - 1, 0)))
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts)[None]


def averages_of(sums: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """Means `[2, C]` over the pixels of all processes, from this process's sums over its `count` pixels
    (`naive.norm_backward`)."""
    packed = torch.cat((sums.flatten(), sums.new_full((1,), count)))
    dist.all_reduce(packed, group=group)
    return (packed[:-1] / packed[-1]).view_as(sums)


def unbiased(variance: Tensor, count: int | Tensor) -> Tensor:
    """The unbiased variance, which running statistics hold, from the biased variance of `count` values."""
    return variance * (count / (count - 1).clamp(min=1) if isinstance(count, Tensor) else count / max(count - 1, 1))


@torch.no_grad()
def update_running_statistics(norm: nn.BatchNorm2d | nn.BatchNorm3d, mean: Tensor, variance: Tensor) -> None:
    """Updates the running statistics of a batch norm with the mean and unbiased variance `[C]` of a batch."""
    norm.num_batches_tracked += 1
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """The sum over processes. Its gradient is summed too: the loss of every process depends on it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class SyncedBatchNorm:
    """Batch norm with training statistics over a process group, mixed into `nn.BatchNorm2d` and `nn.BatchNorm3d`, whose
    parameters, buffers and modes it keeps. `nn.SyncBatchNorm` does the same, but only on CUDA devices.
    """

    group_name = ""

    def forward(self: Any, x: Tensor) -> Tensor:
        group = group_of(self.group_name) if self.training else None
        if group is None:
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.float() if x.dtype.itemsize < 4 else x
        axes, shape = [0, *range(2, x.ndim)], (1, -1) + (1,) * (x.ndim - 2)
        count = torch.full((1,), x[:, 0].numel(), dtype=wide.dtype, device=x.device)
        sums = _Sum.apply(torch.cat((wide.sum(axes), count)), group)
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes), group) / total
        update_running_statistics(self, mean.detach(), unbiased(variance.detach(), total))
        result = centred * (self.weight * (variance + self.eps).rsqrt()).view(shape) + self.bias.view(shape)
        return result.to(x.dtype)


class SyncedBatchNorm2d(SyncedBatchNorm, nn.BatchNorm2d):
    """Over `[N, C, H, W]`."""


class SyncedBatchNorm3d(SyncedBatchNorm, nn.BatchNorm3d):
    """Over `[N, C, D, H, W]`."""


def copy_alone(network: NetworkSpec) -> NetworkSpec:
    """A copy of the network whose batch norms take the statistics of this process only."""
    network = copy.deepcopy(network)
    network.sync_group = ""
    for module in network.modules():
        if isinstance(module, SyncedBatchNorm):
            module.group_name = ""
    return network
