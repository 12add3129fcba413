"""segmentation_models_pytorch's UnetPlusPlus and its 3D port: a stand-in with the known structure, and the library itself
if it is installed."""

from __future__ import annotations

import copy

import pytest
import torch
from support import cpu_kernels
from support.convert_cases import assert_converts, assert_same_outputs
from support.encoders import by
from support.helpers import (
    COMPILED,
    FLOAT64,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    weighted_sum,
)
from support.peer_libraries import library
from support.peer_models import UnetPlusPlus
from torch import nn

import unetpp_fast as uf
from unetpp_fast.converters.smp import Smp
from unetpp_fast.execution import acceptance, dispatch
from unetpp_fast.execution.fused import tuning

BOUND = 1e-8  # float64 gradients through the tens of normalised layers of an encoder


def image(dims: int = 2, batch: int = 2) -> torch.Tensor:
    return make_input(batch, 3, *((64, 32) if dims == 2 else (16, 32, 16)), dtype=torch.float64)


def smp_like(**options) -> UnetPlusPlus:
    return build(UnetPlusPlus, 3, 2, seed=8, **options).double()


SHALLOW = {"widths": (5, 8, 7, 9), "decoder": (6, 4, 3, 5), "dims": 3}
GATED = {"widths": (16, 18, 17, 20), "decoder": (23, 22, 21, 18), "dims": 3}  # gates have a sixteenth of the channels inside


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [
    {}, {"attention": "scse"}, {"norm": False}, {"mode": "bilinear"}, {"activation": nn.Sigmoid()}, {"center": True},
    {"activation": nn.Softmax(dim=1), "attention": "scse", "norm": False},
], ids=str)  # fmt: skip
def test_2d(options: dict, training: bool) -> None:
    assert_converts(smp_like(**options).train(training), "smp", image())


@pytest.mark.parametrize("attention", [None, "scse"])
def test_3d_and_fewer_levels(attention: str | None) -> None:
    assert_converts(smp_like(attention=attention, **(GATED if attention else SHALLOW)), "smp", image(3, 1))


def test_the_stand_in_is_as_large_as_the_library() -> None:
    """The parameter count of smp's decoder for resnet34."""
    with torch.device("meta"):
        decoder = UnetPlusPlus(3, 1, (64, 64, 128, 256, 512), (256, 128, 64, 32, 16)).decoder
    assert uf.parameter_count(decoder) == 4_793_792


def test_the_encoder_is_a_copy() -> None:
    theirs = smp_like()
    theirs.encoder.requires_grad_(False).eval()
    ours = uf.convert(theirs)
    assert ours.training and not ours.encoder.training and not ours.encoder.stages[0].training
    assert not any(parameter.requires_grad for parameter in ours.encoder.parameters())
    assert type(ours.encoder) is type(theirs.encoder)
    shared = {parameter.data_ptr() for parameter in theirs.parameters()} & {p.data_ptr() for p in ours.parameters()}
    assert not shared
    assert uf.convert(ours) is ours


def test_any_size_through_predict() -> None:
    theirs = smp_like(activation=nn.Sigmoid()).eval()
    ours = uf.convert(theirs)
    assert_close_relative(ours.predict(image()), theirs(image()), FLOAT64)
    assert ours.predict(make_input(1, 3, 41, 70, dtype=torch.float64)).shape == (1, 2, 41, 70)
    with pytest.raises(ValueError, match="multiple of 32; predict"):
        ours(make_input(1, 3, 41, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected 4 axes"):
        ours(image(3))
    with pytest.raises(ValueError, match="activation must be one of"):
        ours.predict(image(), activation="tanh")


def enlarge(model: UnetPlusPlus) -> None:
    model.segmentation_head[1] = nn.UpsamplingBilinear2d(scale_factor=2)


def classify(model: UnetPlusPlus) -> None:
    model.classification_head = nn.Linear(3, 2)


def empty_level(model: UnetPlusPlus) -> None:
    model.encoder.out_channels = (3, 16, 0, 18, 17, 20)


@pytest.mark.parametrize(("options", "change", "reason"), [
    ({}, enlarge, "its head enlarges the map"),
    ({}, classify, "aux_params: the classification head has no counterpart"),
    ({}, empty_level, "its encoder gives maps of"),
    ({"head_kernel": 1}, None, "kernel, expected 3x3"),
    ({"mode": "bicubic"}, None, "interpolates by 'bicubic'"),
    ({"activation": nn.Tanh()}, None, "its activation is Tanh"),
])  # fmt: skip
def test_what_has_no_counterpart_is_refused(options: dict, change, reason: str) -> None:
    model = smp_like(**options)
    if change:
        change(model)
    with pytest.raises(ValueError, match=reason):
        uf.convert(model)


def test_a_bare_state_dict_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="does not hold the encoder's code: load it into the smp model"):
        uf.convert(smp_like().state_dict())
    with pytest.raises(ValueError, match="this UNetPlusPlus cannot be written as a segmentation_models"):
        uf.to_state_dict(uf.UNetPlusPlus(features=(2, 3)), "smp")


LIBRARY = [
    {"encoder_depth": 4, "decoder_attention_type": "scse", "activation": "sigmoid"},
    {"encoder_depth": 3, "in_channels": 1}, {"encoder_name": "efficientnet-b0", "in_channels": 4},
    {"encoder_name": "mobilenet_v2", "encoder_depth": 4, "in_channels": 2},
    {"encoder_name": "densenet121", "encoder_depth": 3},
    {"encoder_name": "tu-resnet18", "encoder_depth": 4, "decoder_interpolation": "bilinear"},
]  # fmt: skip


def from_the_library(**options) -> nn.Module:
    """smp's model; a skip with the reason where smp is not installed."""
    smp = library("segmentation_models_pytorch")
    options = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 2, **options}
    depth = options.setdefault("encoder_depth", 5)
    options.setdefault("decoder_channels", (256, 128, 64, 32, 16)[-depth:])
    return build(smp.UnetPlusPlus, **options)


@pytest.mark.parametrize("options", LIBRARY, ids=str)
def test_the_library_itself(options: dict) -> None:
    theirs = from_the_library(**options).eval()
    ours, x = uf.convert(theirs), image().float()[:, :1].expand(-1, options.get("in_channels", 3), -1, -1)
    assert_same_outputs(theirs, ours, x, COMPILED)
    assert_converts(copy.deepcopy(theirs).double(), "smp", x.double())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", LIBRARY, ids=str)
def test_the_library_itself_by_the_engine(options: dict, training: bool) -> None:
    """Outputs, and the gradients of every parameter, the encoder's too, in float64."""
    theirs = from_the_library(**options).double().train(training)
    ours = uf.convert(theirs)
    x, found = make_input(2, options.get("in_channels", 3), 64, 64, dtype=torch.float64), []
    for model, run in ((theirs, lambda x: theirs(x)), (ours, lambda x: ours.shaped(by("naive")(ours, x)))):
        torch.manual_seed(0)  # for paths that are dropped at random
        output = run(x)
        weighted_sum([output]).backward()
        found.append((output, gradients(model)))
    (expected, theirs_by_name), (output, ours_by_name) = found
    assert_close_relative(output, expected, BOUND)
    pairs = {pair.theirs: pair for pair in Smp().pairs(ours)}
    ordered = {pairs[name].ours: pairs[name].to_ours(gradient) for name, gradient in theirs_by_name.items()}
    assert_gradients_close(ours_by_name, ordered, BOUND)


@cpu_kernels.needs_library()
@pytest.mark.parametrize("name", ["resnet18", "efficientnet-b0"])
def test_the_library_itself_optimized(name: str, monkeypatch) -> None:
    """Twice the error of smp's own float32, with an encoder whose norms are folded and the nest by the CPU kernels."""
    verdict = {"right": True, "backend": "cpu", "ratio": 2.0, "fused_ms": 1.0, "reference_ms": 2.0}
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "verdict", lambda call: verdict)
    theirs, x = from_the_library(encoder_name=name).eval(), image().float()
    fast = uf.optimize(theirs)
    assert ": cpu (" in fast.explain(x)
    with torch.no_grad():
        exact, usual = copy.deepcopy(theirs).double()(x.double()), theirs(x)
        laid_out = copy.deepcopy(theirs).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    vectors = [acceptance.as_vector([one]) for one in (exact, usual, laid_out, fast(x))]
    usual = acceptance.farther_off([vectors[0]], [vectors[1]], [vectors[2]])
    assert acceptance.disagreement([vectors[0]], usual, [vectors[3]], torch.float32) == ""
