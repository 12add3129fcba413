"""Kernels of weights.py, through `Composition`, against `weight_composition`: every operand, and every gradient."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build
from support.kernel_cases import DEVICE, random

import unetpp_fast as uf
from unetpp_fast.execution.fused import ops
from unetpp_fast.execution.plan import operands, weight_composition
from unetpp_fast.execution.plan.steps import Step

pytestmark = pytest.mark.skipif(not ops.HAS_TRITON, reason="needs Triton")
UPSAMPLES = ["deconv", "nearest", ("nearest", {"project": True}), "linear", ("linear", {"project": True})]
WIDTHS = {2: (5, 33, 4), 3: (3, 34)}  # more channels than a tile has among them


def network(axes: int, upsample) -> uf.Network:
    options = {"spatial_dims": axes, "features": WIDTHS[axes], "upsample": upsample, "deep_supervision": True}
    return build(uf.UNetPlusPlus, 2, 1, **options).to(DEVICE)


def parameters_of(model: uf.Network, wide: bool = False) -> dict[str, torch.Tensor]:
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: value.double() for name, value in named.items()} if wide else named


@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("axes", [2, 3])
def test_operands(axes, upsample):
    from unetpp_fast.execution.fused.composed import Composed, composition

    model = network(axes, upsample)
    named, wide, plan = parameters_of(model), parameters_of(model, True), model.structure.plan
    of_all = composition(model.structure, named)
    composed = Composed(of_all, of_all.compose(named, torch.float32), named)
    for step in plan.steps:
        exact = operands.node_operands(plan, step, wide, {})
        for found, expected in zip(composed.operands[step.node.name], exact, strict=True):
            for a, e in zip(found.tensors(), expected.tensors(), strict=True):
                assert (a is None) == (e is None)
                if a is not None:
                    assert_close_relative(a.double(), e, FLOAT32)
        for a, e in zip(
            vars(composed.of_gradients(step)).values(),
            vars(operands.gradient_operands(plan, step, wide)).values(),
            strict=True,
        ):
            assert (a is None) == (e is None)
            if a is not None:
                assert a.is_contiguous() and a.data_ptr() % 16 == 0
                assert_close_relative(a.double(), e, FLOAT32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("axes", [2, 3])
def test_operands_with_folded_norms(axes, upsample, bias):
    """Of a pass in eval mode; weights of data gradients are left out."""
    from unetpp_fast.execution.fused.composed import Composed, composition

    model = build(uf.Network, network(axes, upsample).topology, upsample=upsample, bias=bias).to(DEVICE)
    named = {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    wide = {name: value.double() for name, value in named.items()}
    modes = dict.fromkeys(model.structure.norms, "folded")
    of_all = composition(model.structure, named)
    scales, given = of_all.folded(named)
    flipped, *rest = of_all.compose(named, torch.float32, scales, keep=False)
    composed = Composed(of_all, [None, *rest], given)
    assert flipped is None
    for step in model.structure.plan.steps:
        exact = operands.node_operands(model.structure.plan, step, wide, modes)
        for found, expected in zip(composed.operands[step.node.name], exact, strict=True):
            for a, e in zip(found.tensors(), expected.tensors(), strict=True):
                assert (a is None) == (e is None)
                if a is not None:
                    assert a is found.border or a.data_ptr() % 16 == 0
                    assert_close_relative(a.double(), e, FLOAT32)


def test_operands_are_rounded_once():
    from unetpp_fast.execution.fused.composed import composition

    named = parameters_of(network(2, "deconv"))
    of_all = composition(network(2, "deconv").structure, named)
    (*halves, borders), (*singles, same) = (of_all.compose(named, dtype) for dtype in (torch.float16, torch.float32))
    for places, half, single in zip((of_all.flipped, of_all.operands), halves, singles, strict=True):
        for name in places.of:
            assert torch.equal(places.view(half, name), places.view(single, name).half())
    assert torch.equal(borders, same)


@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize(("axes", "heads"), [(2, None), (2, (True, False)), (3, None)])
def test_gradients(axes, upsample, heads):
    from unetpp_fast.execution.fused.composed import composition

    model = network(axes, upsample)
    named, wide, plan = parameters_of(model), parameters_of(model, True), model.structure.plan
    reached = composition(model.structure, named, heads)
    parts = {name: random(*shape, seed=k) for k, (name, (_, shape)) in enumerate(reached.gradients.of.items())}
    flat = reached.gradients_of(named, parts)
    found = {name: reached.out.view(flat, name) for name in reached.weights}
    exact: dict[str, torch.Tensor] = {}
    for step in reached.steps:
        exact |= exact_gradients(plan, step, wide, {name: value.double() for name, value in parts.items()})
    assert set(found) == set(exact)
    for name, expected in exact.items():
        assert_close_relative(found[name].double(), expected, FLOAT32)


def exact_gradients(plan, step: Step, wide: dict, parts: dict) -> dict[str, torch.Tensor]:
    """By `weight_composition`, from the gradients of a node's operands."""
    node = step.node.name
    weight = wide[f"nodes.{node}.conv1.weight"]
    up, up_bias = operands.up_parameters(plan, step, wide)
    low = parts.get(f"{node} low")
    given = weight_composition.Operands(
        parts[f"{node} prefix"], low[None] if step.form == "full" else low, None, parts.get(f"{node} border")
    )
    prefix = operands.prefix_width(step, weight)
    g_weight, g_up, g_bias = weight_composition.first_operands_backward(given, weight, prefix, step.form, up, up_bias)
    found = {f"nodes.{node}.conv1.weight": g_weight}
    found[f"nodes.{node}.conv2.weight"] = weight_composition.taps_last(parts[f"{node} second"], plan.axes)
    if up is not None:
        name = f"nodes.{node}.up.project" if plan.project else f"nodes.{node}.up"
        found |= {f"{name}.weight": g_up.transpose(0, 1) if plan.project else g_up, f"{name}.bias": g_bias}
    return found
