"""What `convert` does for every peer: what it refuses, and what converted models can do."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping

import pytest
import torch
from support.convert_cases import assert_equal_state, assert_same_outputs
from support.helpers import build, make_input
from support.peer_models import NestedUNet, NnUnet, UnetPlusPlus, keras_arrays

import unetpp_fast as uf
from unetpp_fast.converters.nested_unet import Nested
from unetpp_fast.converters.registry import PEERS
from unetpp_fast.execution.plan.steps import unsupported

MAKERS = {
    "nested-unet": lambda: build(NestedUNet, 2, 2, True),
    "unet-zoo": lambda: build(NestedUNet, 2, 2, zoo=True),
    "nnunet": lambda: build(NnUnet, 2, 2),
}
IMAGE = make_input(1, 2, 32, 64)


def states() -> dict[str, dict]:
    return {name: make().state_dict() for name, make in MAKERS.items()} | {"keras": keras_arrays()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_is_rebuilt_from_plain_data(name: str) -> None:
    """`config` through JSON, `state_dict`, pickle and deepcopy; with the form of the outputs and the inverse conversion."""
    ours = uf.convert(MAKERS[name]()).eval()
    again = uf.Network.from_config(json.loads(json.dumps(ours.config))).eval()
    again.load_state_dict(ours.state_dict(), strict=True)
    for other in (again, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert_same_outputs(ours, other, IMAGE, 0.0)
        assert_equal_state(uf.to_state_dict(other, name), uf.to_state_dict(ours, name))


@pytest.mark.parametrize("name", MAKERS)
def test_weights_are_copied_and_the_original_is_unchanged(name: str) -> None:
    theirs = MAKERS[name]()
    theirs.train()
    before = copy.deepcopy(theirs.state_dict())
    random = torch.get_rng_state()
    ours = uf.convert(theirs)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert theirs.training and ours.training
    assert_equal_state(theirs.state_dict(), before)


def test_frozen_parameters_modes_and_precision_are_carried_over() -> None:
    theirs = MAKERS["nested-unet"]().bfloat16()
    theirs.conv0_0.requires_grad_(False)
    theirs.conv2_1.bn2.eval()
    ours = uf.convert(theirs)
    frozen = {name.rpartition(".")[0] for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"nodes.x0_0.{part}" for part in ("conv1", "norm1", "conv2", "norm2")}
    assert ours.training and [name for name, layer in ours.named_modules() if not layer.training] == ["nodes.x2_1.norm2"]
    assert all(parameter.dtype == torch.bfloat16 for parameter in ours.parameters())
    assert_equal_state(uf.to_state_dict(ours, "nested-unet"), theirs.state_dict())


def test_wrapped_modules_and_our_own() -> None:
    theirs = MAKERS["nested-unet"]()
    for wrapped in (torch.nn.DataParallel(theirs), torch.compile(theirs)):
        assert_same_outputs(theirs, uf.convert(wrapped), IMAGE)
    mine = uf.UNetPlusPlus(features=(2, 3))
    assert uf.convert(mine) is mine


@pytest.mark.parametrize("name", ["nested-unet", "unet-zoo", "nnunet", "keras"])
def test_a_dict_that_does_not_fit_is_one_clear_error(name: str) -> None:
    """Truncated anywhere, with an unknown name, with one tensor of another shape."""
    state = states()[name]
    names = list(state)
    for missing in (names[0], names[len(names) // 2], names[-2]):
        with pytest.raises(ValueError, match=r"^this .* cannot be converted: "):
            uf.convert({key: value for key, value in state.items() if key != missing})
    with pytest.raises(ValueError, match="cannot be converted: "):
        uf.convert({key: state[key] for key in names[: len(names) // 3]})
    with pytest.raises(ValueError, match=r"nothing is known of attention\.gamma$"):
        uf.convert({**state, "attention.gamma": torch.ones(3)})
    last = next(key for key in reversed(names) if "bias" in key)
    with pytest.raises(ValueError, match=rf"{last} has shape \(77,\), expected"):
        uf.convert({**state, last: torch.ones(77)})


def test_a_wrong_shape_anywhere_is_an_error() -> None:
    state = MAKERS["nnunet"]().state_dict()
    for key, value in list(state.items())[::7]:
        if value.ndim:
            with pytest.raises(ValueError, match="cannot be converted: "):
                uf.convert({**state, key: torch.cat([value, value])})


@pytest.mark.parametrize(("source", "kind", "reason"), [
    ({}, ValueError, r"this state_dict is not of a known UNet\+\+ \(its weights: none\): convert takes MONAI"),
    ({"layer1.0.conv1.weight": torch.ones(3, 3, 3, 3)}, ValueError, "not of a known"),
    ({"epoch": 3, "state_dict": {}}, ValueError, r"'epoch' is a int; give its \['state_dict'\]"),
    ({"epoch": 3, "state_dict": {"fc.weight": torch.ones(2)}}, ValueError, r"not of a known.*its weights: fc.weight"),
    ({"config": "x"}, ValueError, "give only the weights"),
    (torch.nn.Conv2d(1, 1, 1), ValueError, r"this Conv2d is not of a known UNet\+\+ \(its weights: weight, bias\)"),
    ([1, 2], TypeError, "not list"),
], ids=str)  # fmt: skip
def test_other_things_are_refused(source, kind: type, reason: str) -> None:
    with pytest.raises(kind, match=reason):
        uf.convert(source)


def test_names_of_peers() -> None:
    with pytest.raises(ValueError, match="peer='pytorch' is not known: use one of"):
        uf.to_state_dict(uf.UNetPlusPlus(features=(2, 3)), "pytorch")
    with pytest.raises(ValueError, match="this UNetPlusPlus cannot be written as"):
        uf.to_state_dict(uf.UNetPlusPlus(features=(2, 3)), "smp")
    with pytest.raises(ValueError, match="this EncodedNetwork cannot be written as a MONAI"):
        uf.to_state_dict(uf.convert(build(UnetPlusPlus)), "monai")
    shallow = uf.UNetPlusPlus(features=(2, 3), upsample=("linear", {"align_corners": True}))
    with pytest.raises(ValueError, match="has no 'conv2_0"):
        uf.to_state_dict(shallow, "nested-unet")
    with pytest.raises(ValueError, match=r"cannot be written as a UNET-ZOO.*which has no 'up'"):
        uf.to_state_dict(uf.UNetPlusPlus(features=(2,) * 5), "unet-zoo")


def test_a_frozen_identity_that_was_trained_cannot_be_written() -> None:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    ours = uf.convert(nets.BasicUNetPlusPlus(2, 2, 3, (2, 2, 4, 4, 4, 2), upsample="nontrainable"))
    with torch.no_grad():
        ours.nodes["x0_2"].up.project.bias += 1
    with pytest.raises(ValueError, match=r"nodes\.x0_2\.up\.project\.bias is no longer the identity"):
        uf.to_state_dict(ours, "monai")


def test_a_class_that_is_built_differently_is_refused() -> None:
    theirs = MAKERS["nnunet"]()
    del theirs.do_ds
    with pytest.raises(ValueError, match=r"its class is built differently .*do_ds"):
        uf.convert(theirs)
    theirs = MAKERS["nested-unet"]()
    theirs.pool = torch.nn.MaxPool2d(2, 1)
    with pytest.raises(ValueError, match=r"does not run on an image of .* pixels, for comparison"):
        uf.convert(theirs)


class Renamed(Nested):
    """A peer like pytorch-nested-unet with other names."""

    name, title, keys = "renamed", "RenamedUNet", r"(node\d\d\.(conv|bn)[12]|head)\."

    def module(self, node: uf.Node, part: str) -> str:
        return super().module(node, part).replace("conv", "node", 1).replace("_", "")

    def head(self, column: int, topology: uf.Topology) -> str:
        return super().head(column, topology).replace("final", "head")

    def plain_names(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {name.replace("NODE", "node"): value for name, value in state.items()}


def test_a_peer_is_one_class_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion of a state_dict and back, another spelling of the names, and the messages."""
    with pytest.raises(ValueError, match="not of a known"):
        uf.convert({"node00.conv1.weight": torch.ones(2, 2, 3, 3)})
    monkeypatch.setitem(PEERS, "renamed", Renamed())
    theirs = build(NestedUNet, 2, 2).eval()
    ours = uf.convert(theirs).eval()
    state = uf.to_state_dict(ours, "renamed")
    assert {"node00.conv1.weight", "node04.bn2.running_var", "head.bias"} <= set(state)
    for name in ("node", "NODE"):
        again = uf.convert({key.replace("node", name): value for key, value in state.items()}).eval()
        assert_same_outputs(theirs, again, IMAGE)
    with pytest.raises(ValueError, match=r"this RenamedUNet cannot be converted: its state_dict has no 'node00"):
        uf.convert({"node01.conv1.weight": state["node01.conv1.weight"]})


@pytest.mark.parametrize(("options", "reason"), [
    ({"upsample": ("deconv", {"bias": False})}, ""), ({"head_bias": False}, ""), ({"downsample": "stride"}, ""),
    ({"upsample": "pixelshuffle"}, ""), ({"norm": ("instance", {"affine": False})}, "without scale and shift"),
], ids=str)  # fmt: skip
def test_options_that_only_peers_need(options: dict, reason: str) -> None:
    """What the engine refuses, it refuses with a reason; an empty batch runs too."""
    network = uf.Network(uf.Topology.nested(1, (2, 3)), **options)
    found = unsupported(network.topology, network.options)
    assert (network.structure is None) == bool(reason) == bool(found) and reason in found
    assert network(make_input(2, 1, 8, 16)).shape == (2, 1, 8, 16)
    assert network.eval()(make_input(0, 1, 8, 16)).shape == (0, 1, 8, 16)
    assert network.gflop((8, 16)) > 0


@pytest.mark.parametrize("options", [{"form": "dict"}, {"downsample": "mean"}])
def test_options_of_a_network_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match=r"is not known|must be one of"):
        uf.Network(uf.Topology.nested(1, (2, 3)), **options)
