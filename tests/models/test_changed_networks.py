"""Networks whose layers, hooks or `forward` were changed after building: everything computes what calling them computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support.encoders import encoded
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.execution import dispatch, reference
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.plan import weight_composition

BACKEND = "cpu" if dispatch.CPU_KERNELS[0] else "triton"


def network(**options) -> uf.Network:
    options = {"deep_supervision": True, "features": (3, 4, 5), "backend": BACKEND, **options}
    return build(uf.UNetPlusPlus, 2, 3, **options).eval()


def layer_names(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


def replace(model: uf.Network, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    for name in layer_names(model, kind):
        model.set_submodule(name, make(model.get_submodule(name)))


def to_act(act: Callable[[], nn.Module]) -> Callable[[uf.Network], None]:
    return lambda model: replace(model, nn.ReLU, lambda _: act())


def set_all(kind: type, **values) -> Callable[[uf.Network], None]:
    def change(model: uf.Network) -> None:
        for name in layer_names(model, kind):
            for key, value in values.items():
                setattr(model.get_submodule(name), key, value)

    return change


def like(conv: nn.Conv2d, **options) -> nn.Conv2d:
    given = {"kernel_size": conv.kernel_size, "padding": conv.padding, "groups": conv.groups, **options}
    return build(nn.Conv2d, conv.in_channels, conv.out_channels, **given)


class Lora(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv, self.extra = conv, build(nn.Conv2d, conv.in_channels, conv.out_channels, 1)

    def forward(self, x):
        return self.conv(x) + self.extra(x)


def double_output(module, arguments, output):
    return 2 * output


def gelu_forward(x):
    return nn.functional.gelu(x)


def without_running_statistics(model: uf.Network) -> None:
    def make(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(norm.num_features, track_running_stats=False)

    replace(model, nn.BatchNorm2d, make)


def fused_norms(model: uf.Network) -> None:
    for node in model.nodes.values():
        for number in "12":
            conv, norm = getattr(node, f"conv{number}"), getattr(node, f"norm{number}")
            setattr(node, f"conv{number}", fuse_conv_bn_eval(conv, norm))
            setattr(node, f"norm{number}", nn.Identity())


CHANGES = {
    "gelu": to_act(nn.GELU),
    "silu": to_act(nn.SiLU),
    "prelu": to_act(nn.PReLU),
    "another slope": lambda model: replace(model, nn.ReLU, lambda _: nn.LeakyReLU(0.3)),
    "circular padding": lambda model: replace(model, nn.Conv2d, lambda c: like(c, padding_mode="circular")),
    "reflected padding": lambda model: replace(model, nn.Conv2d, lambda c: like(c, padding_mode="reflect")),
    "replicated padding": lambda model: replace(model, nn.Conv2d, lambda c: like(c, padding_mode="replicate")),
    "groups": lambda model: replace(
        model, nn.Conv2d, lambda c: like(c, groups=c.in_channels) if c.in_channels == c.out_channels else c
    ),
    "dilation": lambda model: replace(
        model, nn.Conv2d, lambda c: like(c, dilation=2, padding=2) if c.kernel_size == (3, 3) else c
    ),
    "5x5": lambda model: replace(
        model, nn.Conv2d, lambda c: like(c, kernel_size=5, padding=2) if c.kernel_size == (3, 3) else c
    ),
    "another norm in place of a norm": lambda model: replace(
        model, nn.BatchNorm2d, lambda norm: nn.GroupNorm(1, norm.num_features)
    ),
    "identity norms": lambda model: replace(model, nn.BatchNorm2d, lambda norm: nn.Identity()),
    "fused norms": fused_norms,
    "no running statistics": without_running_statistics,
    "eps": set_all(nn.BatchNorm2d, eps=0.5),
    "hook of a layer": lambda model: model.nodes["x0_1"].register_forward_hook(double_output),
    "patched layer": lambda model: setattr(model.nodes["x0_0"].act, "forward", gelu_forward),
    "patched inner method": lambda model: setattr(
        model.nodes["x0_1"], "convolve", lambda x, inner=model.nodes["x0_1"]: inner.act(inner.conv2(inner.conv1(x)))
    ),
    "weight norm": lambda model: parametrizations.weight_norm(model.nodes["x0_1"].conv1),
    "old spectral norm": lambda model: nn.utils.spectral_norm(model.nodes["x0_1"].conv2).eval(),
    "pruning mask": lambda model: prune.l1_unstructured(model.nodes["x0_1"].conv1, "weight", 0.5),
    "lora": lambda model: model.nodes["x0_1"].register_module("conv1", Lora(model.nodes["x0_1"].conv1)),
}
SAME = ("weight norm", "old spectral norm", "fused norms")  # which compute what was there, from other tensors
NOT_PICKLED = ("patched inner method", "weight norm")  # pickle takes no lambda, and PyTorch no parametrization


def changed(name: str, **options) -> uf.Network:
    model = network(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a norm that is drawn near zero would divide by it
        CHANGES[name](model)
    return model


def truth(model: uf.Network, x: torch.Tensor) -> list[torch.Tensor]:
    """By the modules themselves in float64."""
    with torch.no_grad():
        return [one.float() for one in reference.forward(copy.deepcopy(model).double(), x.double())]


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changed_layers_run_as_they_are_everywhere(name: str) -> None:
    model, x = changed(name), make_input(2, 2, 16, 24)
    with_plain = network()
    heads = reference.forward(model, x)
    assert not torch.allclose(heads[-1], with_plain(x)[-1], rtol=1e-3) or name in SAME
    assert_close_relative(model(x), heads, FLOAT32)
    assert_close_relative(copy.deepcopy(model)(x), heads, FLOAT32)
    assert_close_relative(model.prune(1)(x), heads[0], FLOAT32)
    if name not in NOT_PICKLED:
        assert_close_relative(pickle.loads(pickle.dumps(model))(x), heads, FLOAT32)
    mean = torch.stack([head.sigmoid() for head in heads]).mean(0)
    assert_close_relative(model.predict(x), mean, FLOAT32)
    assert_close_relative(copy.deepcopy(model).predict(x, mode="fast", level=1), heads[0].sigmoid(), FLOAT32)
    if name != "no running statistics":  # which are then those of each image
        assert_close_relative(uf.predict_tiled(model, x, tile=24, overlap=0.0), mean, FLOAT32)
    fast = uf.optimize(model)
    assert_close_relative(fast(x), heads, FLOAT32)
    assert_close_relative(uf.optimize(model, level=1)(x), heads[0], FLOAT32)
    assert_close_relative(fast.predict(x), mean, FLOAT32)
    assert "a layer was replaced, changed or given hooks: " in fast.explain(x)
    assert "a layer was replaced, changed or given hooks: " in uf.explain(model, x)


@pytest.mark.parametrize("name", ["gelu", "eps", "hook of a layer", "lora"])
def test_plain_data_does_not_stand_for_a_changed_network(name: str) -> None:
    model = changed(name)
    with pytest.raises(ValueError, match=r"changed after it was built.*load its state_dict"):
        uf.Network.from_config(model.config)
    with pytest.raises(InputError, match=r"changed after it was built.*optimize\(model\)\.load_state_dict"):
        uf.load_optimized(uf.optimize(model).state_dict())
    fast, x = uf.optimize(model), make_input(1, 2, 8, 8)
    again = uf.optimize(changed(name))
    again.load_state_dict(fast.state_dict())
    assert_close_relative(again(x), fast(x), FLOAT32)
    assert "changed" not in network().config


def test_the_reason_names_the_layer_and_what_differs() -> None:
    x = make_input(1, 2, 8, 8)
    for name, reason in {
        "gelu": "nodes.x0_0.act is a GELU, it was built as a ReLU",
        "eps": "nodes.x0_0.norm1 has eps=0.5, it was built with 1e-05",
        "hook of a layer": "nodes.x0_1 has hooks",
        "patched layer": "nodes.x0_0.act has another forward",
        "circular padding": "nodes.x0_0.conv1 has padding_mode='circular', it was built with 'zeros'",
        "no running statistics": "nodes.x0_0.norm1 has track_running_stats=False, it was built with True",
        "lora": "nodes.x0_1.conv1 is a Lora, it was built as a Conv2d",
    }.items():
        assert reason in dispatch.choose(Call(changed(name), x))[1]
    model = network()
    model.nodes["x0_1"].norm1 = model.nodes["x0_1"].norm2
    assert "gone, or one with another layer" in dispatch.choose(Call(model, x))[1]


@torch.no_grad()
def test_a_class_that_is_patched_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), make_input(1, 2, 8, 8)
    before = model(x)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: nn.functional.gelu(x))
    heads = reference.forward(model, x)
    assert not torch.allclose(heads[-1], before[-1], rtol=1e-3)
    assert_close_relative(model(x), heads, FLOAT32)
    assert "forward of the class ReLU was replaced" in uf.explain(model, x)
    assert_close_relative(uf.optimize(model)(x), heads, FLOAT32)


def test_training_goes_through_changed_layers_and_a_dropout_in_training_mode() -> None:
    model, x = changed("gelu", norm=None).train(), make_input(1, 2, 8, 8)
    expected = torch.autograd.grad(sum(h.square().sum() for h in reference.forward(model, x)), list(model.parameters()))
    found = torch.autograd.grad(sum(h.square().sum() for h in model(x)), list(model.parameters()))
    assert_close_relative(found, expected, FLOAT32)
    dropping = network()
    for node in dropping.nodes.values():
        node.dropout.p = 0.5
        node.dropout.train()  # as for an estimate by many draws
    with torch.no_grad():
        assert not torch.equal(dropping(x)[-1], dropping(x)[-1])
    assert "dropout" in uf.explain(dropping, x)


class Normalising(uf.UNetPlusPlus):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mean", torch.tensor(0.7))

    def forward(self, x):
        return super().forward((x - self.mean) / 0.3)


class WithSigmoid(uf.UNetPlusPlus):
    def forward(self, x):
        return [head.sigmoid() for head in super().forward(x)]


def halve(module, arguments):
    return (arguments[0] / 2,)


def scale(module, arguments, outputs):
    return [3 * one for one in outputs] if isinstance(outputs, list) else 3 * outputs


def of_kind(name: str) -> uf.Network:
    kinds = {"subclass": Normalising}
    options = {"deep_supervision": True, "features": (3, 4, 5), "backend": BACKEND}
    model = build(kinds.get(name, uf.UNetPlusPlus), 2, 3, **options).eval()
    if name == "pre-hook":
        model.register_forward_pre_hook(halve)
    if name == "hook":
        model.register_forward_hook(scale)
    return model


@pytest.mark.parametrize("name", ["subclass", "pre-hook", "hook"])
@torch.no_grad()
def test_the_forward_and_hooks_of_the_whole_count(name: str) -> None:
    model, x = of_kind(name), make_input(2, 2, 16, 24)
    heads = model(x)
    assert not torch.allclose(heads[-1], reference.forward(model, x)[-1], rtol=1e-3)
    mean = torch.stack([head.sigmoid() for head in heads]).mean(0)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close_relative(one(x), heads, FLOAT32)
        assert_close_relative(one.predict(x), mean, FLOAT32)
        assert_close_relative(one.predict(x, mode="fast", level=1), heads[0].sigmoid(), FLOAT32)
        assert_close_relative(one.prune(1)(x), heads[0], FLOAT32)
    assert_close_relative(uf.predict_tiled(model, x, tile=24, overlap=0.0), mean, FLOAT32)
    fast = uf.optimize(model)
    assert_close_relative(fast(x), heads, FLOAT32)
    assert_close_relative(fast.predict(x), mean, FLOAT32)
    assert_close_relative(uf.optimize(model, level=1)(x), heads[0], FLOAT32)
    assert "the model is called as it is: " in fast.explain(x)
    if name == "subclass":
        assert BACKEND in uf.explain(model, x)  # what else the subclass holds does not stand in the way


@torch.no_grad()
def test_a_forward_of_one_instance() -> None:
    model, x = network(), make_input(1, 2, 8, 8)
    heads = [2 * head for head in model(x)]
    inner = model.forward
    model.forward = lambda image: [2 * head for head in inner(image)]
    assert_close_relative(model.predict(x, mode="fast", level=1), heads[0].sigmoid(), FLOAT32)
    assert_close_relative(uf.optimize(model)(x), heads, FLOAT32)
    for call in (lambda: model.prune(1), lambda: uf.optimize(model, level=1)):
        with pytest.raises(ValueError, match="make it a method of a subclass"):
            call()


@torch.no_grad()
def test_probabilities_are_taken_of_logits_alone() -> None:
    model, x = (
        build(WithSigmoid, 2, 3, features=(3, 4), deep_supervision=True, backend=BACKEND).eval(),
        make_input(1, 2, 4, 6),
    )
    assert_close_relative(model.predict(x), model(x)[0], FLOAT32)
    model.register_forward_pre_hook(halve)
    assert_close_relative(model.predict(x), model(x)[0], FLOAT32)
    for result, reason in (
        ({"out": x}, "returns a dict, not logits"),
        ([x], "not 1 map"),
        ([x[:, :1].sigmoid()], "values in"),
    ):
        other = build(uf.UNetPlusPlus, 2, 1, features=(3, 4), deep_supervision=True).eval()
        other.register_forward_hook(lambda *_, result=result: result)
        with pytest.raises(ValueError, match=reason):
            other.predict(x)


@torch.no_grad()
def test_changed_networks_over_an_encoder() -> None:
    x = make_input(1, 3, 64, 64)
    for change in (
        lambda model: replace(model, nn.ReLU, lambda _: nn.GELU()),
        lambda model: model.register_forward_pre_hook(halve) and None,
        lambda model: set_all(nn.BatchNorm2d, eps=0.5)(model),
    ):
        model = encoded().eval()
        model.backend = BACKEND
        change(model)
        expected = model.shaped([reference.forward(model.nest, model.maps(x / 2 if model._forward_pre_hooks else x))[0]])
        for one in (model, copy.deepcopy(model), uf.optimize(model)):
            assert_close_relative(one(x), expected, FLOAT32)
            assert_close_relative(one.predict(x), expected.sigmoid(), FLOAT32)


@torch.no_grad()
def test_what_differs_on_the_small_image_is_called_as_it_is() -> None:
    model, x = network(), make_input(1, 2, 8, 8)
    fold = weight_composition.fold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_composition, "fold", lambda *given: (fold(*given)[0], fold(*given)[1] + 1))
        fast = uf.optimize(model)
    assert_close_relative(fast(x), reference.forward(model, x), FLOAT32)
    assert "the model is called as it is: what was fused gave another result" in fast.explain(x)
