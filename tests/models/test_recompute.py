"""Backward passes that compute the inside of nodes again: the same gradients and running statistics from fewer bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fused_cases import assert_same_passes, run_fused
from support.helpers import (
    FLOAT32,
    FLOAT64,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    weighted_sum,
)
from support.memory import kept_bytes

import unetpp_fast as uf
from unetpp_fast.execution import reference
from unetpp_fast.execution.fused import operators, ops, structure

WIDTHS = (3, 5, 4)
RUNS = {"reference": reference.forward, "naive": run_fused("naive")}


def network(axes: int = 2, **options) -> uf.Network:
    options = {"spatial_dims": axes, "features": WIDTHS, "deep_supervision": True, **options}
    return build(uf.UNetPlusPlus, 2, 3, **options).double()


def recomputed(model: uf.Network) -> uf.Network:
    model = copy.deepcopy(model)
    model.recompute = True
    return model


def step(run, model: uf.Network, x: torch.Tensor) -> dict:
    """What a forward and a backward pass give and leave behind, with one state of the random numbers."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    outputs = run(model, x)
    weighted_sum(outputs).backward()
    return {"outputs": outputs, "input": x.grad, "gradients": gradients(model), "buffers": dict(model.named_buffers())}


@pytest.mark.parametrize("upsample", ["deconv", ("linear", {"project": True})], ids=["deconv", "linear"])
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("axes", [2, 3])
def test_the_engine_gives_the_reference_s_gradients(axes, norm, upsample):
    model = recomputed(network(axes, norm=norm, upsample=upsample))
    assert_same_passes(model, make_input(2, 2, *(4, 12, 8)[:axes], dtype=torch.float64), bound=FLOAT64)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", ["batch", "frozen", "momentum", "none", "unet", "pruned", "empty"])
def test_recomputing_changes_nothing(run, case):
    """Bit for bit: the same operators run on the same values."""
    norm = {"momentum": ("batch", {"momentum": None}), "none": None}.get(case, "batch")
    model = network(norm=norm)
    if case == "unet":
        model = build(uf.UNet, 2, 3, features=WIDTHS).double()
    if case == "frozen":
        model.nodes["x0_1"].norm1.eval()
    if case == "pruned":
        model = model.prune(1)
    x = make_input(0 if case == "empty" else 2, 2, 12, 8, dtype=torch.float64)
    again = recomputed(model)
    usual, found = step(RUNS[run], model, x), step(RUNS[run], again, x)
    for key in ("gradients", "buffers"):
        assert usual[key].keys() == found[key].keys()
        assert all(torch.equal(usual[key][name], found[key][name]) for name in usual[key])
    assert all(torch.equal(a, b) for a, b in zip(usual["outputs"], found["outputs"], strict=True))
    assert torch.equal(usual["input"], found["input"])


def test_dropout_falls_alike_in_both_passes():
    """On the reference, the only backend with dropout."""
    model = network(dropout=0.4)
    x = make_input(2, 2, 12, 8, dtype=torch.float64)
    usual, found = step(reference.forward, model, x), step(reference.forward, recomputed(model), x)
    assert_gradients_close(found["gradients"], usual["gradients"], FLOAT64)


def test_a_step_in_half_precision():
    model = network().float()
    x = make_input(2, 2, 12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        usual = step(run_fused("naive"), copy.deepcopy(model), x)
        found = step(run_fused("naive"), recomputed(model), x)
    assert all(torch.equal(usual["gradients"][name], found["gradients"][name]) for name in usual["gradients"])


@pytest.mark.skipif(not (ops.HAS_TRITON and ops.INTERPRETED), reason="the kernels need Triton's interpreter here")
def test_the_kernels_recompute():
    model = build(uf.UNetPlusPlus, 1, 1, features=(3, 4), deep_supervision=True)
    x = make_input(1, 1, 8, 12)
    usual = step(reference.forward, copy.deepcopy(model).double(), x.double())
    found = step(run_fused("triton"), recomputed(model), x)
    assert_gradients_close(found["gradients"], usual["gradients"], 10 * FLOAT32)
    for name, buffer in usual["buffers"].items():
        assert_close_relative(found["buffers"][name].double(), buffer.double(), 10 * FLOAT32)


@pytest.mark.parametrize(("run", "share"), [("naive", 0.55), ("reference", 0.15)])
def test_fewer_bytes_are_kept(run, share):
    """The engine drops half of its maps; the reference keeps what nodes read of one another."""
    model = build(uf.UNetPlusPlus, 1, 1, features=(8, 16, 32, 64, 128))
    x = make_input(1, 1, 64, 64)
    usual, found = kept_bytes(RUNS[run], model, x), kept_bytes(RUNS[run], recomputed(model), x)
    print(f"{run}: {found / usual:.3f} of {usual / 1e6:.2f} MB")
    assert found <= share * usual


def test_opcheck():
    model = build(uf.UNetPlusPlus, 1, 2, features=(3, 4), deep_supervision=True)
    tensors = [parameter.detach().requires_grad_() for parameter in model.parameters()] + list(model.buffers())
    training = "1" * sum(isinstance(module, structure.NORMS) for module in model.modules())
    x = make_input(2, 1, 4, 6).requires_grad_()
    arguments = ([x], tensors, True, model.structure.handle, training, torch.float32, "naive", "", True)
    torch.library.opcheck(operators.forward_op, arguments)


def test_no_grad_and_pruning_keep_the_choice():
    model = recomputed(network())
    assert model.prune(1).recompute and not network().prune(1).recompute
    with torch.no_grad():
        assert all(output.grad_fn is None for output in model(make_input(2, 2, 12, 8, dtype=torch.float64)))
