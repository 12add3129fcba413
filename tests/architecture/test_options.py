"""The tables of options: one entry is enough, for networks, checkpoints, `convert` and what `explain` says."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from torch import nn

import unetpp_fast as uf
from unetpp_fast.architecture import options, precision
from unetpp_fast.converters.peer import act_option
from unetpp_fast.converters.registry import PEERS
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.call import Call


@pytest.fixture
def softplus(monkeypatch) -> None:
    """An activation that only the reference computes: one entry."""
    entry = options.Activation({"beta": 1.0}, options.reference_only("softplus activations"), layer=nn.Softplus)
    monkeypatch.setitem(options.ACTIVATIONS, "softplus", entry)


@pytest.mark.parametrize("backend", ["auto", *options.ENGINES])
def test_one_entry_adds_an_activation_and_explain_says_why_it_is_not_fused(softplus, backend):
    model = build(uf.UNetPlusPlus, 1, 1, features=(3, 4), act=("softplus", {"beta": 2.0}), backend=backend)
    x = make_input(1, 1, 4, 6)
    assert "reference (softplus activations run on the reference)" in uf.explain(model, x) or backend == "auto"
    name, reason = dispatch.choose(Call(model, x))
    assert name == "reference" and (backend == "auto" or reason == "softplus activations run on the reference")
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_is_saved_optimized_and_converted(softplus):
    model = build(uf.UNetPlusPlus, 1, 1, features=(3, 4), act=("softplus", {"beta": 2.0})).eval()
    again = uf.Network.from_config(model.config)
    again.load_state_dict(model.state_dict())
    x = make_input(1, 1, 4, 6)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(again.eval()(x), expected)
        assert_close_relative(uf.optimize(model)(x), expected, FLOAT32)
    assert act_option(PEERS["monai"], nn.Softplus(beta=3.0)) == ("softplus", {"beta": 3.0})


@pytest.mark.parametrize(("given", "says"), [
    ({"act": ("prelu", {"init": 0.1})}, "activations with learned slopes run on the reference"),
    ({"act": "gelu"}, "activations whose derivative is not told by the sign of their output run on the reference"),
    ({"act": "silu", "norm": ("group", {"num_groups": 2})}, "norms over groups of channels run on the reference"),
], ids=str)  # fmt: skip
def test_options_of_the_reference(given, says):
    model, x = build(uf.UNetPlusPlus, 1, 1, features=(4, 6), backend="cpu", **given), make_input(2, 1, 4, 6)
    assert says in uf.explain(model, x)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    slopes = [name for name, _ in model.named_parameters() if "act" in name]
    assert len(slopes) == (6 if "prelu" in str(given) else 0)  # one for each convolution
    again = uf.Network.from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with torch.no_grad():
        assert_close_relative(uf.optimize(model.eval())(x), model(x), FLOAT32)


def test_groups_that_do_not_divide_the_widths():
    with pytest.raises(ValueError, match=r"group norm splits 6 channels into num_groups=4: choose a divisor of all widths"):
        uf.UNet(features=(4, 6), norm=("group", {"num_groups": 4}))


def test_an_option_of_one_backend_runs_there_and_says_why_it_does_not_elsewhere(monkeypatch):
    def only_naive(backend: str, keywords: options.Keywords) -> str:
        return "" if backend == "triton" else f"the {backend} backend has no such activation"

    monkeypatch.setitem(options.ACTIVATIONS, "rectifier", options.Activation({}, only_naive, layer=nn.ReLU))
    model, x = uf.UNet(1, 1, features=(3, 4), act="rectifier").eval().requires_grad_(False), make_input(1, 1, 4, 6)
    assert dispatch.can_run_fused(Call(model, x), "triton") == (True, "")
    assert dispatch.can_run_cpu(Call(model, x)) == (False, "the cpu backend has no such activation")


@pytest.mark.parametrize("table", [options.ACTIVATIONS, options.NORMS, options.UPSAMPLES, options.DOWNSAMPLES])
def test_every_entry_answers_for_every_backend(table):
    for entry in table.values():
        for backend in options.ENGINES:
            assert isinstance(entry.unsupported(backend, entry.keywords), str)


def test_the_reasons_of_precisions_are_those_of_the_kernels():
    """The table says what the kernels' own checks say."""
    from unetpp_fast.kernels import naive

    for entry in precision.PRECISIONS.values():
        assert naive.accumulator(entry.dtype).itemsize >= 4
        halves = entry.half == (entry.dtype.itemsize < 4)
        assert halves and set(entry.unsupported) <= set(options.ENGINES)
    assert precision.unsupported_dtype(torch.float64, "triton") and not precision.unsupported_dtype(torch.float32, "cpu")
    assert "torch.float8_e5m2" in precision.unsupported_dtype(torch.float8_e5m2, "cpu")
