"""What computes each node of a network for an input, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..architecture.network_spec import NetworkSpec
from ..architecture.topology import Node
from ..architecture.wrappers import network_of
from . import dispatch
from .call import Call
from .fused.forward import Forward
from .fused.structure import NORMS


def explain(network: NetworkSpec, x: Tensor) -> str:
    """Prints and returns, for each node of `network(x)`, the backend that computes it, what it reads and the reason.

    Args:
        network: a model of this package.
        x: an input it takes, `[N, in_channels, *S]`; nothing but an encoder is computed, unless `backend="auto"` has to
            measure first.

    Processes that share batch statistics decide together at their first training step: before it, one that explains such a
    step says just that, and it waits for no other.

    Raises:
        TypeError, ValueError: the network does not take `x`.
    """
    call = Call(*network_of(network, "explain").engine_input(x))
    return describe(call, *dispatch.outlook(call))


def describe(call: Call, name: str, reason: str) -> str:
    """Prints and returns what the backend `name`, chosen for `reason`, does at each node; of "undecided" only the reason."""
    network, x = call.network, call.x
    given = network.topology.given
    scale = 2 ** min(node.level for node in network.topology.nodes if not node.column) if given else 1
    size = "x".join(str(scale * side) for side in x.shape[2:])
    lines = [f"{x.shape[0]} image(s) of {size} pixels in {call.dtype} on {x.device}: {name} ({reason})"]
    plan = None if name == "reference" else call.structure.plan
    ways = _ways(call, name) if name in ("triton", "cuda") and x.is_cuda else {}
    for index, node in enumerate(network.topology.nodes if name != "undecided" else ()):
        what = plan.describe(plan.steps[index]) if plan else _describe(network, node)
        lines.append(f"{name:<10} {what}")
        lines += [f"{'':<10}   conv{number}: {way}" for number, way in enumerate(ways.get(node.name, ()), 1)]
    text = "\n".join(lines)
    print(text)
    return text


def _describe(network: NetworkSpec, node: Node) -> str:
    """What the reference does for a node."""
    i, j = node.position
    if not j and network.topology.given:
        return f"X({i},0) -> {node.width} channels; the encoder's map"
    if not j:
        how = {"pool": "the pooled", "stride": "every second pixel of"}[network.options["downsample"]]
        return f"X({i},0) -> {node.width} channels from {'the image' if i == 0 else f'{how} X({i - 1},0)'}"
    maps, low = ", ".join(f"X({i},{column})" for column in node.prefix), f"the up-sampled X({i + 1},{j - 1})"
    return f"X({i},{j}) -> {node.width} channels from {f'a concatenation of {maps} and {low}' if maps else low}"


class _Ways:
    """Ops that compute nothing and record how the kernels would do each convolution."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.ways: list[str] = []

    def conv(self, out: Tensor, a: Tensor, wa: Tensor, *, stats: bool = False, **options: Any) -> Tensor | None:
        from ..kernels import cuda_ops, triton_ops

        geometry = {key: options[key] for key in ("taps", "stride", "phased", "plain") if key in options}
        if self.backend == "cuda" and cuda_ops.can_run_conv(out, a, **geometry)[0]:
            self.ways.append("the CUDA kernel, unless Triton's was measured to be faster")
            return self._statistics(out, stats)
        way, measured = triton_ops.way_of_conv(out, a, lambda way: None, stats=stats, **options)
        self.ways.append(f"{way} ({'measured' if measured else 'not measured: unetpp_fast.tune(model, x) does'})")
        return self._statistics(out, stats)

    def _statistics(self, out: Tensor, stats: bool) -> Tensor | None:
        return out.new_empty(out.shape[0], 1, 3, out.shape[-1], dtype=torch.float32) if stats else None

    def norm_table(self, *args: Any, **options: Any) -> None: ...

    def pool(self, *args: Any, **options: Any) -> None: ...

    def head(self, *args: Any, **options: Any) -> None: ...


def _ways(call: Call, backend: str) -> dict[str, tuple[str, ...]]:
    """For each node, by name, how the kernels do its two convolutions in a forward pass."""
    structure = call.structure
    ops: Any = _Ways(backend)
    training = "".join("1" if module.training else "0" for module in call.modules if isinstance(module, NORMS))
    tensors = {name: value.to("meta") for name, value in call.tensors().items()}
    modes = structure.modes(training, call.needs_gradients)
    Forward(structure.plan, ops, modes, tensors, call.dtype).run([x.to("meta") for x in call.inputs], call.needs_gradients)
    names = [step.node.name for step in structure.plan.computed]
    return {name: tuple(ops.ways[2 * index : 2 * index + 2]) for index, name in enumerate(names)}
