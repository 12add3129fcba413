"""nnU-Net++'s Generic_UNetPlusPlus, reimplemented from its known structure: six levels, strided convolutions."""

from __future__ import annotations

import pytest
import torch
from support.convert_cases import assert_converts, assert_round_trip, assert_same_outputs
from support.fused_cases import assert_same_passes
from support.helpers import FLOAT64, assert_close_relative, build, make_input
from support.peer_models import NnUnet

import unetpp_fast as uf
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.explanation import describe


def image(dims: int = 2, batch: int = 2) -> torch.Tensor:
    return make_input(batch, 2, *((32, 64) if dims == 2 else (32, 32, 64)), dtype=torch.float64)


def nnunet(dims: int = 2, **options) -> NnUnet:
    return build(NnUnet, 2, 3, dims, seed=6, **options).double()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [
    {}, {"deep_supervision": False}, {"norm": "batch"}, {"final": "softmax"},
    {"final": "softmax", "deep_supervision": False}, {"head_bias": True, "features": (3, 2, 5, 4, 3, 7)},
], ids=str)  # fmt: skip
def test_2d(options: dict, training: bool) -> None:
    """A tuple, the deepest output first, or only that output."""
    ours = assert_converts(nnunet(**options).train(training), "nnunet", image())
    outputs = ours(image())
    assert isinstance(outputs, tuple) == options.get("deep_supervision", True)
    assert ours.topology.depth == 5 and ours.options["downsample"] == "stride"


def test_3d() -> None:
    assert_converts(nnunet(3, features=(2, 2, 3, 2, 3, 2)), "nnunet", image(3, 1))


UNLIKE = {
    "strides": [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)],
    "kernels": [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)],
}


def test_a_plan_for_unlike_axes() -> None:
    """Strides and kernels are read from the weights; each axis has its own multiple."""
    theirs = nnunet(3, features=(2, 2, 3, 2, 3, 2), **UNLIKE)
    x = make_input(1, 2, 8, 32, 64, dtype=torch.float64)
    ours = assert_converts(theirs, "nnunet", x)
    assert ours.multiples == (4, 32, 32) and ours.topology.strides == tuple(UNLIKE["strides"])
    assert ours.topology[0, 0].kernel == (1, 3, 3) and ours.topology[1, 1].kernel is None
    assert_same_outputs(theirs, uf.convert(theirs.state_dict()), x)
    assert_same_passes(ours, x)
    text = describe(Call(ours, x), "cpu", "asked for")
    assert text.count("\ncpu ") == 21 and text.count(", slice by slice") == 7  # level 0 and X(1,0)
    with pytest.raises(ValueError, match=r"every axis must be a positive multiple of its number of \(4, 32, 32\)"):
        ours(x[:, :, :6])
    theirs = nnunet(2, strides=[(2, 1), (2, 2), (1, 2), (2, 2), (2, 2)], kernels=[(3, 3)] * 5 + [(1, 3)])
    ours = assert_converts(theirs, "nnunet", image())
    assert ours.multiples == (16, 16)
    assert "others than (1, 2, 2) and (1, 3, 3) run on the reference" in uf.explain(ours, image())


def test_a_bare_state_dict() -> None:
    theirs = nnunet(norm="batch")
    ours = uf.convert(theirs.state_dict())
    assert_round_trip(theirs, ours, "nnunet")
    assert_same_outputs(theirs, ours, image())
    theirs.do_ds = False  # as its users do for inference
    assert_same_outputs(theirs.eval(), uf.convert(theirs.state_dict(), deep_supervision=False).eval(), image())


def test_every_head_is_trained_and_prunes() -> None:
    theirs = nnunet()
    ours, expected = uf.convert(theirs.eval()), theirs(image())
    for level in (1, 2, 3, 4, 5):
        assert_close_relative(ours.prune(level)(image()), expected[5 - level], FLOAT64)
    assert_close_relative(ours.predict(image()), torch.stack([e.sigmoid() for e in expected]).mean(0), FLOAT64)


def test_the_engine_runs_it() -> None:
    ours = uf.convert(nnunet())
    assert_same_passes(ours, image(batch=1))
    text = describe(Call(ours, image()), "cpu", "asked for")
    assert "cpu        X(1,0) -> channels 0..2 of level 1; reads every second pixel of X(0,0), 2 channels" in text
    assert text.count("\ncpu ") == 21


def set_up_scale(model: NnUnet) -> None:
    model.upscale_logits = True


def add_a_convolution(model: NnUnet) -> None:
    blocks = model.conv_blocks_context[0].blocks
    blocks.append(blocks[1])


def flatten_a_kernel(model: NnUnet) -> None:
    conv = model.conv_blocks_context[0].blocks[0].conv
    conv.weight = torch.nn.Parameter(conv.weight[..., 1:2, :])


@pytest.mark.parametrize(("change", "reason"), [
    (set_up_scale, "upscale_logits=True"),
    (add_a_convolution, "more than two convolutions per node"),
    (flatten_a_kernel, r"its layers differ in the kernels of \['conv_blocks_context.0.blocks.0.conv.weight', .*\(1, 3\)"),
])  # fmt: skip
def test_what_has_no_counterpart_is_refused(change, reason: str) -> None:
    model = nnunet()
    change(model)
    with pytest.raises(ValueError, match=reason):
        uf.convert(model)


def test_dropout_before_the_norm_is_refused_until_it_is_off() -> None:
    theirs = nnunet(dropout=0.3)
    with pytest.raises(ValueError, match="drops whole channels before the norm"):
        uf.convert(theirs)
    ours = uf.convert(theirs.state_dict())
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.p = 0.0
    assert_same_outputs(theirs, ours, image())
    assert_converts(theirs, "nnunet", image())


def test_an_unknown_final_function_is_refused() -> None:
    with pytest.raises(ValueError, match="final_nonlin is neither the identity nor a softmax"):
        uf.convert(nnunet(final="tanh"))
