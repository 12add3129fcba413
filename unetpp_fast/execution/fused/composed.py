"""The weights of a pass, composed by a kernel for all nodes at once (`kernels/weights.py`).

Parameters lie in one flat tensor, operands and the gradients of operands in two others. `Composition` knows where: what
`weight_composition.first_operands` and its gradient compute node by node with small operators, it has done by two or three
kernels, whose tables of jobs are made once per network and device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...kernels import scratch
from ..plan.operands import GradientOperands
from ..plan.steps import Step
from ..plan.weight_composition import Operands
from .structure import Structure

ALIGNED = 64  # operands begin at multiples of so many values


@dataclass
class Places:
    """Where tensors lie in a flat one, and its size."""

    size: int = 0
    of: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def add(self, name: str, *shape: int, aligned: int = 1) -> int:
        start = -(-self.size // aligned) * aligned
        self.of[name] = start, shape
        self.size = start + math.prod(shape)
        return start

    def __getitem__(self, name: str) -> int:
        return self.of[name][0]

    def view(self, flat: Tensor, name: str) -> Tensor | None:
        """The tensor of that name, a view; None if there is none."""
        if name not in self.of:
            return None
        start, shape = self.of[name]
        return flat.as_strided(shape, scratch.strides(shape), start)


@dataclass(frozen=True)
class Tables:
    """The jobs of the kernels on one device, forwards and backwards."""

    arrange: Tensor | None
    phases: Tensor | None
    arrange_back: Tensor | None
    phases_back: tuple[Tensor | None, Tensor | None]


class Composition:
    """What the kernels compose for the nodes `reached`, by their names.

    weights: names of the parameters that are composed, in the order of the flat tensor.
    """

    def __init__(self, structure: Structure, shapes: Mapping[str, Sequence[int]], reached: Iterable[str]):
        self.plan = plan = structure.plan
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.steps = [step for step in plan.computed if step.node.name in set(reached)]
        self.up = "deconv" if plan.upsample == "deconv" else "project" if plan.project else "none"
        self.borders_too = self.up != "none" and "up" not in plan.no_bias  # those of the up-samplings' biases
        self.parameters, self.operands, self.flipped, self.borders = Places(), Places(), Places(), Places()
        self.gradients, self.out, self.scales = Places(), Places(), Places()
        mine = {f"nodes.{step.node.name}.{key}" for step in self.steps for key in self._keys(step)}
        self.weights = [name for name in structure.parameters if name in mine]
        for name in self.weights:
            self.parameters.add(name, *self.shapes[name])
            self.out.add(name, *self.shapes[name])
        for step in self.steps:
            self._place(step)
        self._tables: dict[torch.device, Tables] = {}

    def _keys(self, step: Step) -> list[str]:
        up = {"deconv": "up", "project": "up.project"}.get(self.up) if step.form == "phases" else None
        names = ["conv1.weight", "conv2.weight", *([f"{up}.weight"] if up else [])]
        return [*names, *([f"{up}.bias"] if up and self.borders_too else [])]

    def _sizes(self, step: Step) -> tuple[int, int, int, int]:
        """Channels of a node: of its prefix, of its low source, of that up-sampled, and its own."""
        co, inputs = self.shapes[f"nodes.{step.node.name}.conv1.weight"][:2]
        prefix = inputs if step.source in ("input", "pool", "stride", "gated") else step.prefix
        low = 0 if step.low is None else step.low.width if step.form == "phases" else inputs - prefix
        return prefix, low, inputs - prefix, co

    def _place(self, step: Step) -> None:
        node, axes = step.node.name, self.plan.axes
        prefix, low, _, co = self._sizes(step)
        for place in (1, 2):
            self.scales.add(f"{node}.norm{place}", co)
        parts = {"second": (3**axes, co, co), "prefix": (3**axes, prefix, co)}
        if step.form == "full":
            parts["low"] = 3**axes, low, co
        for part, (taps, k, width) in parts.items():
            self.operands.add(f"{node} {part}", taps, k, width, aligned=ALIGNED)
            self.flipped.add(f"{node} {part}", taps, width, k, aligned=ALIGNED)
            self.gradients.add(f"{node} {part}", taps, k, width)
        if step.form == "phases":
            phases = 2**axes
            self.operands.add(f"{node} low", phases, phases, low, co, aligned=ALIGNED)
            self.flipped.add(f"{node} low", 4**axes, co, low, aligned=ALIGNED)
            self.gradients.add(f"{node} low", phases, phases, low, co)
            if self.borders_too:
                self.borders.add(f"{node} border", 3**axes, co)
                self.gradients.add(f"{node} border", 3**axes, co)

    def tables(self, device: torch.device) -> Tables:
        """The jobs for a device, made at the first call."""
        if device not in self._tables:
            from ...kernels import weights  # not at the top: Triton is optional

            plain = [job for step in self.steps for job in self._plain(step, self.operands, weights.tiles)]
            back = [job for step in self.steps for job in self._plain(step, self.gradients, weights.tiles)]
            phased = [step for step in self.steps if step.form == "phases"]
            if self.borders_too:
                plain += [job for step in phased for job in self._borders(step, weights.tiles)]
            jobs = [
                plain,
                [job for step in phased for job in self._phases(step, weights.tiles)],
                back,
                [job for step in phased for job in self._phases_back(step, weights.tiles)],
                [job for step in phased if self.up != "none" for job in self._ups_back(step, weights.tiles)],
            ]
            first, second, third, *rest = (weights.table(rows, device) for rows in jobs)
            fourth, fifth = rest
            self._tables[device] = Tables(first, second, third, (fourth, fifth))
        return self._tables[device]

    def _plain(self, step: Step, places: Places, tiles) -> list[tuple[int, ...]]:
        """Jobs of weights that are only arranged, to or from `places`."""
        node, taps = step.node.name, 3**self.plan.axes
        prefix, low, up, co = self._sizes(step)
        weight = self.parameters[f"nodes.{node}.conv1.weight"]
        parts = [("second", self.parameters[f"nodes.{node}.conv2.weight"], co, co), ("prefix", weight, prefix + up, prefix)]
        if step.form == "full":
            parts.append(("low", weight + prefix * taps, prefix + up, low))
        jobs = []
        for part, start, inputs, k in parts:
            flipped = self.flipped[f"{node} {part}"]
            head = start, places[f"{node} {part}"], flipped, inputs, k, co, 0, 0
            end = 0, 0, 0, 0, 0, self.scales[f"{node}.norm{2 if part == 'second' else 1}"]
            jobs += [(*head, *tile, *end) for tile in tiles(k, co)]
        return jobs

    def _ends(self, step: Step, places: Places) -> tuple[int, int, int]:
        """The last columns of a job: the up-sampling's weight and bias in the parameters, the border table in `places`, -1
        if it has no bias."""
        if self.up == "none":
            return 0, 0, 0
        node, up = step.node.name, "up" if self.up == "deconv" else "up.project"
        weight = self.parameters[f"nodes.{node}.{up}.weight"]
        if not self.borders_too:
            return weight, -1, -1
        return weight, self.parameters[f"nodes.{node}.{up}.bias"], places[f"{node} border"]

    def _low_weight(self, step: Step, places: Places) -> int:
        return places[f"nodes.{step.node.name}.conv1.weight"] + self._sizes(step)[0] * 3**self.plan.axes

    def _phases(self, step: Step, tiles) -> list[tuple[int, ...]]:
        node, axes = step.node.name, self.plan.axes
        prefix, low, up, co = self._sizes(step)
        head = (
            self._low_weight(step, self.parameters), self.operands[f"{node} low"], self.flipped[f"{node} low"],
            prefix + up, low, co, up,
        )  # fmt: skip
        ends = *self._ends(step, self.borders), 0, 0, self.scales[f"{node}.norm1"]
        return [(*head, place, *tile, *ends) for tile in tiles(low, co) for place in range(4**axes)]

    def _borders(self, step: Step, tiles) -> list[tuple[int, ...]]:
        job = self._phases(step, tiles)[0]
        return [(*job[:7], -1, *tile, *job[10:]) for tile in tiles(1, self._sizes(step)[3])]

    def _phases_back(self, step: Step, tiles) -> list[tuple[int, ...]]:
        prefix, low, up, co = self._sizes(step)
        head = (
            self._low_weight(step, self.parameters), self.gradients[f"{step.node.name} low"],
            self._low_weight(step, self.out), prefix + up, low, co, up,
        )  # fmt: skip
        ends = self._ends(step, self.gradients)
        return [(*head, tap, *tile, *ends) for tile in tiles(up, co) for tap in range(3**self.plan.axes)]

    def _ups_back(self, step: Step, tiles) -> list[tuple[int, ...]]:
        name = f"nodes.{step.node.name}.{'up' if self.up == 'deconv' else 'up.project'}"
        _, low, up, _ = self._sizes(step)
        head = self._phases_back(step, tiles)[0][:7]
        bias = self.out[f"{name}.bias"] if self.borders_too else -1
        ends = *self._ends(step, self.gradients), self.out[f"{name}.weight"], bias
        elements = range(2**self.plan.axes) if self.up == "deconv" else (0,)
        return [(*head, element, *tile, *ends) for tile in tiles(low, up) for element in elements]

    def compose(
        self, parameters: Mapping[str, Tensor], dtype: torch.dtype, scales: Tensor | None = None, keep: bool = True
    ) -> list[Tensor | None]:
        """Those of data gradients (None unless `keep`), the other operands, all in `dtype`, and all border tables, as three
        flat tensors. scales: of outputs, as `folded` gives them."""
        from ...kernels import weights

        flat = self._flat(parameters)
        tables, axes = self.tables(flat.device), self.plan.axes
        flipped, operands, borders = self.results(flat, dtype, keep)
        weights.compose(flat, operands, flipped, borders, scales, tables.arrange, tables.phases, axes, self.up)
        return [flipped, operands, borders]

    def folded(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of all convolutions with the batch norms in eval mode after them: the scales of their outputs, in a flat tensor,
        and the parameters with the biases that are left. Needs this to be of all nodes."""
        norms, widths = list(self.scales.of), [shape[0] for _, shape in self.scales.of.values()]
        keys = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, variance = (torch.cat([parameters[f"nodes.{norm}.{key}"] for norm in norms]) for key in keys)
        names = [f"nodes.{norm.replace('norm', 'conv')}.bias" for norm in norms]
        scales = gamma * (variance + self.plan.eps).rsqrt()
        centred = torch.cat([parameters[name] for name in names]) - mean if names[0] in parameters else -mean
        biases = torch.addcmul(beta, centred, scales).split(widths)
        # Kernels are compiled for biases that are allocated at multiples of 16 bytes.
        aligned = [bias if bias.data_ptr() % 16 == 0 else bias.clone() for bias in biases]
        return scales, {**parameters, **dict(zip(names, aligned, strict=True))}

    def results(self, like: Tensor, dtype: torch.dtype, keep: bool = True) -> list[Tensor | None]:
        """Room for what `compose` returns."""
        flipped = like.new_empty(self.flipped.size, dtype=dtype) if keep else None
        operands = like.new_empty(self.operands.size, dtype=dtype)
        return [flipped, operands, like.new_empty(self.borders.size, dtype=torch.float32)]

    def _flat(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch._C._nn.flatten_dense_tensors([parameters[name] for name in self.weights])

    def gradients_of(self, parameters: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> Tensor:
        """The gradients of `weights`, one after another, from those of all operands, as `Backward` collects them."""
        from ...kernels import weights

        flat, axes = self._flat(parameters), self.plan.axes
        gradients = torch._C._nn.flatten_dense_tensors([parts[name] for name in self.gradients.of])
        out, tables = torch.empty_like(flat), self.tables(flat.device)
        weights.compose_backward(flat, gradients, out, tables.arrange_back, tables.phases_back, axes, self.up)
        return out


@dataclass(frozen=True)
class Composed:
    """All operands, as `Composition.compose` returned them for all nodes, and the parameters by name. A backward pass that
    recomputes nothing needs those of data gradients alone."""

    all_nodes: Composition
    tensors: Sequence[Tensor | None]
    parameters: Mapping[str, Tensor]

    @cached_property
    def operands(self) -> dict[str, tuple[Operands, Operands]]:
        """`Forward.operands`."""
        return {step.node.name: (self._first(step), self._second(step)) for step in self.all_nodes.steps}

    def _first(self, step: Step) -> Operands:
        node, of = step.node.name, self.all_nodes
        _, wide, borders = self.tensors
        low = of.operands.view(wide, f"{node} low")
        return Operands(
            of.operands.view(wide, f"{node} prefix"),
            low[None] if step.form == "full" else low,
            self.parameters.get(f"nodes.{node}.conv1.bias"),
            of.borders.view(borders, f"{node} border"),
        )

    def _second(self, step: Step) -> Operands:
        weight = self.all_nodes.operands.view(self.tensors[1], f"{step.node.name} second")
        return Operands(weight, bias=self.parameters.get(f"nodes.{step.node.name}.conv2.bias"))

    def of_gradients(self, step: Step) -> GradientOperands:
        """The weights of a node's data gradients."""
        parts = (f"{step.node.name} {part}" for part in ("prefix", "low", "second"))
        return GradientOperands(*(self.all_nodes.flipped.view(self.tensors[0], part) for part in parts))


_compositions: WeakKeyDictionary[Structure, dict[tuple[bool, ...] | None, Composition]] = WeakKeyDictionary()


def composition(structure: Structure, parameters: Mapping[str, Tensor], heads: Sequence[bool] | None = None) -> Composition:
    """That of the nodes which these heads reach, by default of all nodes; made once per structure."""
    mine, key = _compositions.setdefault(structure, {}), None if heads is None else tuple(heads)
    if key not in mine:
        reached = structure.nodes_of(heads) if heads else {node.name for node in structure.plan.topology.nodes}
        mine[key] = Composition(structure, {name: value.shape for name, value in parameters.items()}, reached)
    return mine[key]
