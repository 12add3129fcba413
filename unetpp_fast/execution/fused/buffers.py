"""The level buffers of a pass: one channels-last tensor per level, of which each node writes a slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import naive
from ..plan.steps import Plan, Slot, Step

SCALE, SHIFT = 2, 3  # rows of a table


@dataclass
class Maps:
    """The buffers of a pass.

    image: None where the maps of an encoder are given.
    levels: per level, the outputs of its nodes' second convolutions side by side, `[N, D, H, W, sum of widths]`; a given map
        is the first.
    mids: the same for the first convolutions; if they need not be kept, the nodes of a level share one place, or only some
        rows of it (`paired`).
    level_tables, mid_tables: `[4, 1 or N, sum of widths]`, how to read these maps; None if they are stored activated.
    given: per level, the channels of its given map (`Plan.given`), which is read as it is whatever the table says.
    pools: the pooled map of a level.
    raws: of a plan with gates in a pass that is kept, per level the outputs of second convolutions before their gates, and
        `levels` those after them, stored as they are read; otherwise empty.
    gates: whether it is such a plan.
    """

    image: Tensor | None
    levels: list[Tensor]
    mids: list[Tensor]
    level_tables: list[Tensor | None]
    mid_tables: list[Tensor | None]
    given: tuple[int, ...]
    pools: dict[int, Tensor] = field(default_factory=dict)
    raws: list[Tensor | None] = field(default_factory=list)
    gates: bool = False

    def slot(self, level: int, slot: Slot) -> Slot:
        """Where the output of a node lies: in its slot, or in the first of its level if the buffer has no room for it."""
        return slot if slot.end <= self.levels[level].shape[-1] else Slot(0, slot.width)

    def out(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The output of a node and how to read it."""
        level = step.node.level
        return view(self.levels[level], self.slot(level, step.out)), self._affine(level, step.out)

    def raw(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The output of a node's second convolution and how to read it: the node's output, where no gate follows; before
        a gate it is there too, for a moment, in a pass that is not kept."""
        level = step.node.level
        if not self.raws:
            return view(self.levels[level], self.slot(level, step.out)), affine(self.level_tables[level], step.out)
        slot = Slot(step.out.offset - self.given[level], step.out.width)
        return view(self.raws[level], slot), affine(self.level_tables[level], step.out)

    def paired(self, step: Step) -> bool:
        """Whether a node's first convolution runs strip by strip with its second."""
        level = step.node.level
        return self.mids[level].shape[2] != self.levels[level].shape[2]

    def mid(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The output of a node's first convolution and how to read it."""
        slot = self.mid_slot(step)
        return view(self.mids[step.node.level], slot), affine(self.mid_tables[step.node.level], step.out)

    def mid_slot(self, step: Step) -> Slot:
        """The slot in `mids`: beside the other nodes of the level, or the place that they share."""
        level = step.node.level
        slot = Slot(step.out.offset - self.given[level], step.out.width)
        return slot if slot.end <= self.mids[level].shape[-1] else Slot(0, slot.width)

    def prefix(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The first operand of a node's first convolution."""
        if step.source == "input":
            return self.image, None
        if step.source == "pool":
            return self.pools[step.node.level], None
        if step.source in ("stride", "unlike"):
            above = step.node.level - 1
            slot = Slot(0, step.prefix)
            return view(self.levels[above], slot), self._affine(above, slot)
        slot = Slot(0, step.prefix)
        return view(self.levels[step.node.level], slot), self._affine(step.node.level, slot)

    def plain(self, step: Step) -> int:
        """The channels of a node's first operand that are read as they are, where others are not."""
        level = step.node.level
        mixed = step.source == "prefix" and step.prefix > self.given[level] and self.level_tables[level] is not None
        return self.given[level] if mixed and not self.gates else 0

    def low(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The low source of a node, at low resolution."""
        below = step.node.level + 1
        return view(self.levels[below], self.slot(below, step.low)), self._affine(below, step.low)

    def _affine(self, level: int, slot: Slot) -> naive.Affine | None:
        return None if self.gates or slot.end <= self.given[level] else affine(self.level_tables[level], slot)

    def kept(self, plan: Plan, recompute: bool) -> list[Tensor]:
        """The tensors that a backward pass needs beside the image, in the order of `kept_names`.

        recompute: the backward pass recomputes the outputs of first convolutions; they are left out.
        """
        raw = self.level_tables[0] is not None
        return [getattr(self, name)[key] for name, key in kept_names(plan, raw, recompute)]

    @classmethod
    def from_kept(cls, plan: Plan, image: Tensor | None, kept: Sequence[Tensor], raw: bool, recompute: bool) -> Maps:
        """The inverse of `kept`; with `recompute`, `mids` has room for one node per level."""
        nothing = [None] * len(plan.widths)
        maps = cls(image, list(nothing), list(nothing), list(nothing), list(nothing), plan.given, gates=plan.gates)
        maps.raws = list(nothing) if plan.gates else []
        for (name, key), tensor in zip(kept_names(plan, raw, recompute), kept, strict=True):
            getattr(maps, name)[key] = tensor
        if recompute:
            maps.mids = shared_mids(plan, maps.levels)
        return maps


def kept_names(plan: Plan, raw: bool, recompute: bool) -> list[tuple[str, int]]:
    """The (field of `Maps`, key) of each tensor that a forward pass keeps for its backward pass.

    raw: outputs are stored raw, with tables.
    """
    levels = range(len(plan.widths))
    fields = ["levels", *([] if recompute else ["mids"]), *(["raws"] if plan.gates else [])]
    fields += ["level_tables", "mid_tables"] if raw else []
    names = [(name, level) for name in fields for level in levels]
    return names + [("pools", step.node.level) for step in plan.steps if step.source == "pool"]


def view(buffer: Tensor, slot: Slot) -> Tensor:
    return buffer[..., slot.offset : slot.end]


def affine(table: Tensor | None, slot: Slot) -> naive.Affine | None:
    return None if table is None else (table[SCALE, :, slot.offset : slot.end], table[SHIFT, :, slot.offset : slot.end])


def to_maps(x: Tensor, axes: int) -> Tensor:
    """`[N, C, *S]` as channels-last `[N, D, H, W, C]`, D = 1 in 2D."""
    return (x.unsqueeze(2) if axes == 2 else x).movedim(1, -1)


def from_maps(x: Tensor, axes: int) -> Tensor:
    """The inverse of `to_maps`, a view."""
    x = x.movedim(-1, 1)
    return x.squeeze(2) if axes == 2 else x


def full_size(plan: Plan, inputs: Sequence[Tensor]) -> list[int]:
    """`*S`, the size of level 0, by the largest of the inputs."""
    return [side << plan.inputs[0].node.level for side in inputs[0].shape[2:]]


def allocate(
    plan: Plan,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    keep: bool,
    raw: bool,
    recompute: bool = False,
    pair_rows: Callable[..., int] | None = None,
) -> Maps:
    """The buffers for the inputs of a pass: the image `[N, C, *S]`, or the given maps.

    keep: keep the outputs of all convolutions for a backward pass; else some nodes use the place of others that were read.
    raw: store outputs raw, with tables. recompute: those of first convolutions are not kept. pair_rows: of ops that run the
    two convolutions of a node strip by strip, if they may.
    """
    x, axes, acc = inputs[0], plan.axes, naive.accumulator(dtype)
    image = None if plan.topology.given else to_maps(x, axes).to(dtype).contiguous()
    full = full_size(plan, inputs)
    rows = x.shape[0] if plan.norm == "instance" else 1
    levels, tables = [], []
    for level, width in enumerate(plan.widths):
        size = [*([] if axes == 3 else [1]), *(s // by for s, by in zip(full, plan.topology.shrunk(level), strict=True))]
        tables.append([x.new_empty((4, rows, width), dtype=acc) if raw else None for _ in range(2)])
        room = width if keep else plan.least_widths[level]
        levels.append(x.new_empty((x.shape[0], *size, room), dtype=dtype))
    kept = keep and not recompute
    computed = [(*y.shape[:4], y.shape[4] - plan.given[i]) for i, y in enumerate(levels)]
    mids = [x.new_empty(shape, dtype=dtype) for shape in computed] if kept else shared_mids(plan, levels, pair_rows)
    pools = {} if keep else _pools_beside(plan, levels)
    raws = [x.new_empty(shape, dtype=dtype) for shape in computed] if keep and plan.gates else []
    level_tables, mid_tables = map(list, zip(*tables, strict=True))
    return Maps(image, levels, mids, level_tables, mid_tables, plan.given, pools, raws, plan.gates)


def _pools_beside(plan: Plan, levels: Sequence[Tensor]) -> dict[int, Tensor]:
    """The pooled maps that fit into the place of nodes of their level, which all run later."""
    pools = {}
    for step in plan.steps:
        if step.source == "pool":
            slot = Slot(step.out.end, plan.topology[step.node.level - 1, 0].width)
            if slot.end <= levels[step.node.level].shape[-1]:
                pools[step.node.level] = view(levels[step.node.level], slot)
    return pools


def shared_mids(plan: Plan, levels: Sequence[Tensor], pair_rows: Callable[..., int] | None = None) -> list[Tensor]:
    """For each level, room for the output of one node's first convolution; all in one place, as one node runs at a time."""
    shapes, strided = [], {step.node.level for step in plan.computed if step.source == "stride"}
    for level, buffer in enumerate(levels):
        widths = {step.out.width for step in plan.computed if step.node.level == level}
        widest, (images, *size) = max(widths, default=0), buffer.shape[:4]
        pairs = pair_rows and len(widths) == 1 and images and level not in strided
        held = pair_rows(size[1:], widest, buffer.itemsize) if pairs else 0
        shapes.append((1, 1, held, size[2], widest) if held else (images, *size, widest))
    memory = levels[0].new_empty(max(map(math.prod, shapes)))
    return [memory[: math.prod(shape)].view(shape) for shape in shapes]
