"""One backend for all processes that share batch statistics.

Each backend exchanges statistics in its own way, so processes that differed in it would wait for one another forever. They
decide together, once for each kind of pass: every process says which backends it can run, and the first one which of them it
measured to be fastest. What they are asked under is the same in all of them, whatever their sizes, their layers and their
earlier measurements are: so all ask at the same call.

They talk over a Gloo group of their own. While the first process compiles and measures for minutes, the others then wait on
no collective of the GPUs, whose time-out would end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist  # some builds of torch lack its members: name them only inside functions

from .batch_statistics import group_of
from .call import Call
from .fused import tuning

TIMEOUT = timedelta(hours=2)  # for the first process to compile and measure; a process that ends is noticed at once
Choice = tuple[str, str]  # a backend, and the reason


@dataclass
class _Circle:
    """The processes of a group that shares statistics; `talk` is the Gloo group of the same processes."""

    group: dist.ProcessGroup
    talk: dist.ProcessGroup
    decided: dict[tuple, Choice] = field(default_factory=dict)


_circles: dict[str, _Circle] = {}  # by the name of the group


def concerns(call: Call) -> bool:
    """Whether the processes that share statistics have to take the same backend for `call`."""
    network = call.network
    trains = bool(network.sync_group) and (network.training or call.in_training)
    return trains and network.structure is not None  # without one every process takes the reference


def known(call: Call) -> Choice | None:
    """What was decided for such a pass; None if nothing was."""
    circle = _circles.get(call.network.sync_group)
    if circle is None or not (torch.compiler.is_compiling() or circle.group is group_of(call.network.sync_group)):
        return None  # or that was an earlier group of this name
    return circle.decided.get(_key(call))


def decide(call: Call, able: Sequence[str], why_not: str, measure: Callable[[], Choice]) -> Choice:
    """Decides with the other processes, each of which has to call this too.

    Args:
        call: the pass that is about to run.
        able: the backends beside the reference that this process can run.
        why_not: the reason, if there are none.
        measure: the choice of one process alone; called in the first process if all can run some backend.

    Raises:
        RuntimeError: a process ended meanwhile.
    """
    circle = _circle(call.network.sync_group)
    offers: list = [None] * circle.talk.size()
    dist.all_gather_object(offers, (list(able), why_not), group=circle.talk)
    choice = _first(circle, offers, lambda names: not names, "takes the reference")
    if choice is None:
        told = [measure() if circle.talk.rank() == 0 else None]
        dist.broadcast_object_list(told, group=circle.talk, group_src=0)
        name, reason = told[0]
        choice = name, f"agreed on by all processes that share statistics; {reason}"
        if name != "reference":
            missing = f"cannot run {name}, the choice of the first process"
            choice = _first(circle, offers, lambda names: name not in names, missing) or choice
    circle.decided[_key(call)] = choice
    return choice


def _first(circle: _Circle, offers: Sequence, differs: Callable[[list[str]], bool], what: str) -> Choice | None:
    """The reference, because of the first process that differs; None if none does."""
    for rank, (names, why) in enumerate(offers):
        if differs(names):
            return "reference", f"process {dist.get_global_rank(circle.talk, rank)} {what}{f': {why}' if why else ''}"
    return None


def _circle(name: str) -> _Circle:
    """The processes of a group; the first call makes their Gloo group, in all of them together."""
    group = group_of(name)
    if name not in _circles or _circles[name].group is not group:
        ranks = dist.get_process_group_ranks(group)
        some = len(ranks) < dist.get_world_size()  # then the others are not asked to take part
        talk = dist.new_group(ranks, timeout=TIMEOUT, backend="gloo", use_local_synchronization=some)
        _circles[name] = _Circle(group, talk)
    return _circles[name]


def _key(call: Call) -> tuple:
    """The same in all processes at the same call: what the program sets, without what may differ between them."""
    return call.network.backend, tuning.pass_key(call)
