"""Several processes that train one network, started by `torchrun`: their group, and sums and flags over all of them.

Without torchrun there is one process, and nothing here communicates.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common.errors import InputError, first_line
from ..execution.batch_statistics import SyncedBatchNorm2d, SyncedBatchNorm3d
from ..models.network import Network

KNOWN_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, SyncedBatchNorm2d, SyncedBatchNorm3d)


def sync_batch_norm(network: Network, group: dist.ProcessGroup | None = None) -> Network:
    """Makes the network's batch norms take their training statistics over all processes of a group, in place.

    Call it before wrapping the network in `DistributedDataParallel`; the processes then train as one process would on all
    their images. Weights, buffers and the names in `state_dict` do not change. Other norms have no statistics over images.
    An encoder's that are of a subclass of PyTorch's, which may do more than normalise, keep those of their own process.

    Args:
        network: a model of this package.
        group: by default all processes.

    Returns:
        The same network.

    Raises:
        RuntimeError: there is no process group: call `torch.distributed.init_process_group` first.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("there is no process group: call torch.distributed.init_process_group, or use torchrun")

    name = (group or dist.group.WORLD).group_name
    for module in network.modules():
        if type(module) in KNOWN_NORMS:
            flat = isinstance(module, nn.BatchNorm2d)
            module.__class__ = SyncedBatchNorm2d if flat else SyncedBatchNorm3d
            module.group_name = name  # type: ignore[assignment]
    network.sync_group = name
    network.refresh_handle()
    return network


class Lost(RuntimeError):
    """Another process of the run ended or cannot be reached."""


def size() -> int:
    """The number of processes (world size)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this process, of rank 0, writes files and prints."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Inside, the processes that torchrun started form a group: NCCL on GPUs, Gloo on CPUs.

    Args:
        device: as the user named it; "auto" and "cuda" stand for the GPU of this process.

    Yields:
        The name of the device to use.

    Raises:
        InputError: there are fewer GPUs than processes, or several processes cannot train on the device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    device = _own_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for processes that may have ended


def _own_device(name: str) -> str:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InputError(f"process {local} has no GPU, there are {count}: lower --nproc-per-node")
        name = f"cuda:{local}"
        torch.cuda.set_device(name)
    if name != "cpu" and name != f"cuda:{local}":
        raise InputError(f"several processes train on GPUs (--device cuda) or on the CPU, not on {name!r}")
    return name


@contextmanager
def watching() -> Iterator[None]:
    """Turns errors of the connection to other processes into `Lost`."""
    try:
        yield
    except RuntimeError as error:
        first = first_line(error)
        if size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in first or "NCCL" in first):
            raise
        what = (first.partition("] ")[2] or first).partition(". ")[0]  # without Gloo's source location and its advice
        raise Lost(f"another process of this training ended ({what})") from error


def parallel(module: nn.Module) -> DistributedDataParallel:
    """The module wrapped so that gradients are averaged over all processes; buffers are not, as they are equal already."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the old name is deprecated
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(module, **options)


def summed(values: Tensor) -> Tensor:
    """The sum over processes of tensors of one shape, on the CPU; every process gets the same bits."""
    if size() == 1:
        return values.cpu()
    values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(values)
    return values.cpu()


def any_of(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process."""
    return [bool(count) for count in summed(torch.tensor(flags, dtype=torch.float64))] if size() > 1 else list(flags)


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seeds the random numbers of a step by run, step and rank, so that a resumed run needs no state of other processes."""
    state = np.random.SeedSequence((seed, epoch, step, rank())).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)
