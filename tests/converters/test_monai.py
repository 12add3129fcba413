"""MONAI's BasicUNetPlusPlus, an independent implementation, against its conversion, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.convert_cases import assert_converts, assert_equal_state, assert_round_trip, assert_same_outputs
from support.fused_cases import assert_same_inference, assert_same_passes
from support.grids import pairs_of
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, build, make_input
from torch.utils.flop_counter import FlopCounterMode

import unetpp_fast as uf
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.plan.steps import unsupported

nets = pytest.importorskip("monai.networks.nets", reason="MONAI, the independent implementation, is not installed")

EVEN = (4, 4, 8, 12, 16, 6)
ODD = (5, 6, 10, 14, 18, 7)
ODDER = (3, 5, 7, 9, 11, 4)
SIZES = {2: (16, 32), 3: (16, 16, 32)}
AFFINE = ("instance", {"affine": True})
GROUP = ("group", {"num_groups": 1, "eps": 1e-3})
BARE = "instance"  # without scale and shift
LEAKY = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
UPSAMPLES = ["deconv", "nontrainable", "pixelshuffle"]


def monai(
    dims: int = 2, features: tuple[int, ...] = ODD, norm: Any = AFFINE, act: Any = LEAKY, **options
) -> torch.nn.Module:
    made = build(nets.BasicUNetPlusPlus, dims, 2, 3, features, norm=norm, act=act, seed=1, **options)
    return made.double()


def image(dims: int = 2, batch: int = 2, size: tuple[int, ...] | None = None) -> torch.Tensor:
    return make_input(batch, 2, *(size or SIZES[dims]), dtype=torch.float64)


@pytest.mark.parametrize(
    ("upsample", "norm", "deep_supervision", "training"),
    pairs_of([UPSAMPLES, ("batch", AFFINE, BARE), (True, False), (True, False)]),
    ids=str,
)
def test_2d(upsample: str, norm: Any, deep_supervision: bool, training: bool) -> None:
    theirs = monai(upsample=upsample, norm=norm, deep_supervision=deep_supervision).train(training)
    assert_converts(theirs, "monai", image())


@pytest.mark.parametrize(("upsample", "norm"), [("deconv", "batch"), ("nontrainable", AFFINE), ("pixelshuffle", "batch")])
def test_3d(upsample: str, norm: Any) -> None:
    assert_converts(monai(3, ODDER, norm, upsample=upsample, deep_supervision=True), "monai", image(3, 1))


@pytest.mark.parametrize("options", [
    {"act": "relu", "bias": False}, {"act": ("leakyrelu", {"negative_slope": 0.3})},
    {"norm": ("batch", {"eps": 1e-2, "momentum": 0.3})}, {"norm": ("instance", {"affine": True, "eps": 0.1})},
    {"norm": None}, {"dropout": 0.4}, {"dropout": 0.4, "act": "relu", "norm": "batch"},
    {"act": ("prelu", {"init": 0.1}), "dropout": 0.4}, {"act": "gelu", "norm": GROUP}, {"act": "swish", "norm": "batch"},
], ids=str)  # fmt: skip
def test_other_options(options: dict) -> None:
    """In training mode dropout draws the same numbers, before the activation in MONAI and after it here, which commute."""
    assert_converts(monai(**options), "monai", image())


@pytest.mark.parametrize(("dims", "size", "upsample"), [
    (2, (37, 50), "deconv"), (2, (33, 32), "nontrainable"), (2, (17, 63), "pixelshuffle"), (3, (17, 19, 37), "deconv"),
])  # fmt: skip
def test_odd_sizes_repeat_the_last_pixel(dims: int, size: tuple[int, ...], upsample: str) -> None:
    theirs = monai(dims, ODDER, "batch", upsample=upsample, deep_supervision=True)
    ours = assert_converts(theirs, "monai", image(dims, 1, size))
    assert_same_outputs(theirs.eval(), ours.eval(), image(dims, 1, size))


def test_float32() -> None:
    """The project's bound, with random running statistics."""
    theirs = monai(norm="batch", deep_supervision=True).float()
    ours = uf.convert(theirs)
    assert_same_outputs(theirs.eval(), ours.eval(), image().float(), FLOAT32)
    assert_converts(theirs.train(), "monai", image().float(), FLOAT32)


def test_variances_near_eps() -> None:
    theirs = monai(norm="batch").eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1e-5)
    assert_converts(theirs, "monai", image() / 255)


@pytest.mark.parametrize(("upsample", "size"), [
    ("deconv", ()), ("nontrainable", ()), ("pixelshuffle", ()), ("deconv", (17, 34)), ("nontrainable", (21, 16)),
])  # fmt: skip
def test_the_engine_runs_it(upsample: str, size: tuple[int, ...]) -> None:
    """With spare heads, and with the frozen identity in place of a 1x1 convolution that MONAI does not have."""
    ours = uf.convert(monai(norm="batch", upsample=upsample))
    x = image(2, 2, size) if size else image()
    assert dispatch.can_run_fused(Call(ours, x), "triton") == (True, "")
    ours.requires_grad_(True)  # the engine computes the gradients of frozen weights too, the reference does not
    assert_same_passes(ours, x)
    assert_same_inference(ours.eval(), x)


@pytest.mark.parametrize(("options", "reason"), [
    ({"norm": BARE}, "without scale and shift"), ({"act": "prelu"}, "activations with learned slopes run on the reference"),
    ({"norm": GROUP}, "norms over groups of channels"), ({"act": "gelu"}, "whose derivative is not told by the sign"),
])  # fmt: skip
def test_the_engine_refuses_it_with_a_reason(options: dict, reason: str) -> None:
    ours = uf.convert(monai(**options))
    assert ours.structure is None
    assert reason in unsupported(ours.topology, ours.options)


def test_heads_that_never_run_are_kept_and_stay_out_of_predictions() -> None:
    theirs = monai(norm="batch")
    ours = uf.convert(theirs)
    assert ours.spare_heads == [1, 2, 3]
    assert [head.weight.requires_grad for head in ours.heads.values()] == [False, False, False, True]
    x = image()
    assert_close_relative(ours.predict(x), theirs.eval()(x)[0].sigmoid(), FLOAT64)
    with pytest.raises(ValueError, match="heads at level 4"):
        ours.prune(2)


def test_prune_and_predict_after_conversion() -> None:
    """A pruned model keeps the peer's form, a list of one; `predict` uses the logits."""
    theirs = monai(norm="batch", deep_supervision=True).eval()
    ours, x = uf.convert(theirs), image()
    expected = theirs(x)
    for level in (1, 2, 3, 4):
        (output,) = ours.prune(level)(x)
        assert_close_relative(output, expected[level - 1], FLOAT64)
    assert_close_relative(ours.predict(x), torch.stack([e.sigmoid() for e in expected]).mean(0), FLOAT64)
    with pytest.raises(ValueError, match=r"cannot be written as a MONAI.* has no 'conv_3_0"):
        uf.to_state_dict(ours.prune(2), "monai")


@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_operations_are_counted(upsample: str) -> None:
    ours = uf.convert(monai(features=ODDER, norm="batch", upsample=upsample))
    with FlopCounterMode(display=False) as counter:
        ours(image())
    assert ours.gflop(SIZES[2]) * 1e9 * 2 == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize("dims", [2, 3])
def test_pixelshuffle_starts_without_a_checkerboard(dims: int) -> None:
    """The pixels of a group start equal: after the mean, a constant map stays constant except at its border."""
    up = uf.UNetPlusPlus(2, features=(3, 4), spatial_dims=dims, upsample="pixelshuffle").nodes["x0_1"].up
    inner = up(torch.ones(1, 4, *[8] * dims))[(..., *[slice(3, -3)] * dims)]
    assert_close_relative(inner, inner[(..., *[slice(1)] * dims)].expand_as(inner), FLOAT32)


def test_empty_batch() -> None:
    theirs = monai(norm="batch").eval()
    assert uf.convert(theirs)(image(batch=0))[0].shape == theirs(image(batch=0))[0].shape == (0, 3, *SIZES[2])


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("norm", ["batch", AFFINE], ids=str)
def test_a_bare_state_dict(norm: Any, upsample: str) -> None:
    """Recognised by its names; the defaults are MONAI's."""
    theirs = monai(3, ODDER, norm, upsample=upsample).train()
    ours = uf.convert(theirs.state_dict())
    assert ours.training
    assert_round_trip(theirs, ours, "monai")
    assert_same_outputs(theirs, ours, image(3, 1))


def test_what_a_state_dict_leaves_open() -> None:
    theirs = monai(norm=("batch", {"eps": 0.1}), act="relu", deep_supervision=True, dropout=0.5).eval()
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}  # of nn.DataParallel
    ours = uf.convert(state, norm=("batch", {"eps": 0.1}), act="relu", deep_supervision=True, dropout=0.5).eval()
    assert ours.options["dropout"] == 0.5
    assert_same_outputs(theirs, ours, image())
    assert_equal_state(uf.to_state_dict(ours, "monai"), theirs.state_dict())
    bare = monai(norm=BARE)
    with pytest.raises(ValueError, match="no norm with weights: say norm=None or"):
        uf.convert(bare.state_dict())
    assert_same_outputs(bare, uf.convert(bare.state_dict(), norm=("instance", {"affine": False})), image())
    with pytest.raises(ValueError, match="norm='instance' was given, but the names of its weights show batch"):
        uf.convert(theirs.state_dict(), norm="instance")
    with pytest.raises(ValueError, match=r"\['upsample'\] cannot be given for a state_dict of MONAI"):
        uf.convert(theirs.state_dict(), upsample="nearest")
    with pytest.raises(ValueError, match=r"\['act'\] cannot be given for a module"):
        uf.convert(theirs, act="relu")


@pytest.mark.parametrize(("options", "reason"), [
    ({"act": "mish"}, "its activation is Mish; unetpp_fast has ReLU, LeakyReLU, PReLU, GELU and SiLU"),
    ({"act": "swish", "dropout": 0.5}, "it drops values before the activation, .* not the same for silu"),
    ({"norm": ("localresponse", {"size": 2})}, "its norm is LocalResponseNorm"),
    ({"norm": ("batch", {"affine": False})}, "batch norm lacks scale and shift"),
    ({"norm": ("instance", {"affine": True, "track_running_stats": True})}, "running statistics"),
    ({"upsample": "deconvgroup"}, "neither deconv nor nontrainable nor pixelshuffle"),
    ({"dims": 1, "norm": "batch"}, "1 spatial axis; unetpp_fast has 2 and 3"),
    ({"dropout": ("alphadropout", {"p": 0.5})}, "its dropout is AlphaDropout"),
], ids=str)  # fmt: skip
def test_what_has_no_counterpart_is_refused_with_a_reason(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^this .* cannot be converted: .*" + reason):
        uf.convert(monai(**options))
