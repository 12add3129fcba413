"""What a call costs beside its operators: layers are walked once, input is checked once, and nothing is registered."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch
from support.fused_cases import run_fused
from support.helpers import build, make_input, weighted_sum
from torch import nn

import unetpp_fast as uf
from unetpp_fast.architecture import input_checks
from unetpp_fast.execution.fused import structure as structures
from unetpp_fast.models import network as networks
from unetpp_fast.models import prediction


def network(**options) -> uf.Network:
    return build(uf.UNetPlusPlus, 1, 2, **{"features": (3, 4, 5), "deep_supervision": True, **options}).eval()


@contextlib.contextmanager
def walks(model: nn.Module) -> Iterator[list[int]]:
    """How many layers each walk over `model`'s nodes has visited."""
    visited: list[int] = []
    named_modules = nn.Module.named_modules

    def counting(self, *args, **options):
        if self is not model.nodes:
            yield from named_modules(self, *args, **options)
            return
        visited.append(0)
        place = len(visited) - 1
        for pair in named_modules(self, *args, **options):
            visited[place] += 1
            yield pair

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", counting)
        yield visited


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_the_layers_are_walked_once_per_call(backend):
    model, x = network(backend=backend), make_input(1, 1, 8, 12)
    with torch.no_grad():
        model(x)
        with walks(model) as visited:
            model(x)
    whole = sum(1 for _ in model.nodes.modules())
    assert sum(count == whole for count in visited) == 1
    assert sum(visited) <= whole + 8  # the rest looks at the first parameter alone


def test_predict_checks_its_input_once_and_registers_nothing_again(monkeypatch):
    model, x = network(), make_input(1, 1, 9, 13)
    checks, made = [], []
    check, structure_of = input_checks.check_input, networks.structure_of
    monkeypatch.setattr(networks, "structure_of", lambda part: made.append(part) or structure_of(part))
    for module in (networks, prediction):
        monkeypatch.setattr(module, "check_input", lambda *args, **options: checks.append(1) or check(*args, **options))
    settings = [{}, {"mode": "fast", "level": 1}, {"level": 1}]
    first = [model.predict(x, **options) for options in settings]
    assert len(checks) == len(settings) and len(made) == len(settings)
    again = [model.predict(x, **options) for options in settings]
    assert len(checks) == 2 * len(settings) and len(made) == len(settings)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_predict_sees_a_layer_that_was_replaced_and_one_that_was_hooked():
    model, x = network(), make_input(1, 1, 8, 12)
    before = model.predict(x)
    replaced = nn.Conv2d(3, 2, 1)
    old, model.heads["x0_1"] = model.heads["x0_1"], replaced
    after = model.predict(x)
    assert not torch.equal(before, after)
    model.heads["x0_1"] = old
    assert torch.equal(model.predict(x), before)
    hook = model.nodes["x0_0"].register_forward_hook(lambda module, arguments, output: 2 * output)
    assert not torch.equal(model.predict(x), before)
    hook.remove()
    assert torch.equal(model.predict(x), before)


def test_predict_follows_the_network_it_is_of():
    model, x = network(norm="batch"), make_input(1, 1, 8, 12)
    model.predict(x)
    model.backend, model.recompute = "reference", True
    part = model.part(2, keep_heads=True)
    assert part.backend == "reference" and part.recompute and not part.training
    model.double()
    assert model.predict(x.double()).dtype == torch.float64


def test_a_structure_goes_with_its_networks():
    """No other test has these widths: the handle is new, and gone afterwards."""
    model = network(features=(3, 5, 11))
    handle = model.structure.handle
    pruned, copy = model.prune(1), torch.nn.Sequential(model)
    assert structures.find(handle) is model.structure and handle != pruned.structure.handle
    other = pruned.structure.handle
    del model, copy
    gc.collect()
    assert handle not in structures._alive and other in structures._alive
    del pruned
    gc.collect()
    assert other not in structures._alive


def test_a_backward_pass_outlives_its_network():
    model, x = network(features=(3, 5, 13), norm=None), make_input(1, 1, 8, 12).requires_grad_()
    outputs = run_fused("naive")(model, x)
    expected = torch.autograd.grad(weighted_sum(model(x)), x)[0]
    del model
    gc.collect()
    weighted_sum(outputs).backward()
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
