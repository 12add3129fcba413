"""Every mistake at the boundary gives one error that says what is expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import build, make_input

import unetpp_fast as uf

FEATURES = (2, 3, 4)


@pytest.fixture(scope="module")
def model() -> uf.UNetPlusPlus:
    return build(uf.UNetPlusPlus, 3, 1, features=FEATURES)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 8, 8), r"expected 4 axes \[N, C, H, W\], got 3: shape \(3, 8, 8\); .* x\[None\]"),
        ((1, 3, 8, 8, 8), r"expected 4 axes \[N, C, H, W\], got 5: .* this network is 2D, .* spatial_dims=3"),
        ((1, 1, 8, 8), r"expected 3 channels, got 1: shape \(1, 1, 8, 8\)"),
        ((1, 8, 8, 3), r"expected 3 channels, got 8"),
        ((1, 3, 8, 10), r"size 8x10 does not fit: every axis must be a positive multiple of 4"),
        ((1, 3, 9, 8), r"size 9x8 does not fit: every axis must be a positive multiple of 4"),
        ((1, 3, 0, 8), r"size 0x8 does not fit: every axis must be a positive multiple of 4"),
        ((0, 3, 2, 2), r"size 2x2 does not fit: every axis must be a positive multiple of 4"),
    ],
)
def test_shapes(model: uf.UNetPlusPlus, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_shapes_in_3d() -> None:
    model = build(uf.UNet, 1, 1, spatial_dims=3, features=(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"expected 5 axes \[N, C, D, H, W\], got 4"):
        model(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"size 8x16x12 does not fit: every axis must be a positive multiple of 8"):
        model(torch.zeros(1, 1, 8, 16, 12))


def test_pruned_networks_name_their_own_multiple() -> None:
    model = build(uf.UNetPlusPlus, 1, 1, features=FEATURES, deep_supervision=True).prune(1)
    assert model(torch.zeros(1, 1, 2, 6)).shape == (1, 1, 2, 6)
    with pytest.raises(ValueError, match="size 2x5 does not fit: every axis must be a positive multiple of 2 "):
        model(torch.zeros(1, 1, 2, 5))


@pytest.mark.parametrize(
    "x, kind",
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "torch.int64"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), "torch.complex64"),
        (np.zeros((1, 3, 8, 8), dtype=np.float32), "ndarray"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_types(model: uf.UNetPlusPlus, x: object, kind: str) -> None:
    how = r"x\.float\(\), scaled as in training" if isinstance(x, torch.Tensor) else r"torch\.as_tensor\(x\)\.float\(\)"
    message = rf"expected a floating-point tensor \[N, C, H, W\], got {kind}: convert it, e\.g\. with {how}"
    with pytest.raises(TypeError, match=message):
        model(x)
    if "int" in kind or "bool" in kind:
        message = rf"whole numbers \({kind}\), and this network carries no normalisation"
    with pytest.raises(TypeError, match=message):
        model.predict(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "layer"}, r"norm='layer' is not known: use one of \['batch', 'group', 'instance'\]"),
        ({"norm": 3}, r"norm=3 is not known"),
        ({"norm": ("batch",)}, r"norm=\('batch',\) is not known"),
        (
            {"norm": ("batch", {"affine": False})},
            r"norm='batch' has no keyword \['affine'\]: it takes \['eps', 'momentum'\]",
        ),
        (
            {"norm": ("instance", {"momentum": 0.1})},
            r"norm='instance' has no keyword \['momentum'\]: it takes \['affine', 'eps'\]",
        ),
        ({"act": None}, r"act=None is not known: use one of \['gelu', 'leaky_relu', 'prelu', 'relu', 'silu'\]"),
        ({"act": "mish"}, r"act='mish' is not known"),
        ({"act": ("relu", {"inplace": True})}, r"act='relu' has no keyword \['inplace'\]: it takes none"),
        (
            {"upsample": "bilinear"},
            r"upsample='bilinear' is not known: use one of \['deconv', 'linear', 'nearest', 'pixelshuffle'\]",
        ),
        ({"upsample": ("nearest", {"align_corners": True})}, r"upsample='nearest' has no keyword \['align_corners'\]"),
        ({"upsample": ("deconv", {"project": True})}, r"upsample='deconv' has no keyword \['project'\]"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), not -0.1"),
        ({"out_channels": 0}, r"out_channels must be a positive integer, not 0"),
        ({"out_channels": True}, r"out_channels must be a positive integer, not True"),
        ({"out_channels": 1.0}, r"out_channels must be a positive integer, not 1.0"),
        ({"in_channels": 0}, r"in_channels must be a positive integer, not 0"),
        ({"spatial_dims": 1}, r"spatial_dims must be 2 or 3, not 1"),
        ({"features": (4,)}, r"features must be 2 to 7 positive integers, one width per level, not \(4,\)"),
        ({"backend": "tpu"}, r"backend 'tpu' is not known: use one of \['auto', 'reference', 'triton', 'cuda', 'cpu'\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("maker", [uf.UNetPlusPlus, uf.UNet])
def test_options(maker: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maker(**{"features": FEATURES, **options})


def test_backend_reference_is_accepted() -> None:
    x = make_input(1, 1, 8, 8)
    outputs = [build(uf.UNetPlusPlus, 1, 1, features=FEATURES, backend=name).eval()(x) for name in ("auto", "reference")]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_instance_norm_on_one_value(spatial_dims: int, training: bool) -> None:
    """A map of one pixel has no spread; two pixels do."""
    model = build(uf.UNetPlusPlus, 1, 1, spatial_dims=spatial_dims, features=FEATURES, norm="instance").train(training)
    with pytest.raises(
        ValueError, match=r"instance norm needs more than one value .* leaves one pixel: use a larger size or"
    ):
        model(torch.zeros(3, 1, *[4] * spatial_dims))
    assert model(torch.zeros(3, 1, 8, *[4] * (spatial_dims - 1))).shape[0] == 3


def test_batch_norm_on_one_value() -> None:
    """Only in training, and only for one image."""
    model = build(uf.UNetPlusPlus, 1, 1, features=FEATURES, norm=("batch", {"eps": 1e-3}))
    with pytest.raises(ValueError, match=r"batch norm needs more than one value .* a larger size, a larger batch or"):
        model(torch.zeros(1, 1, 4, 4))
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 1, 4, 4)
    assert model.eval()(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)


def test_without_norm_one_pixel_is_enough() -> None:
    assert build(uf.UNetPlusPlus, 1, 1, features=FEATURES, norm=None)(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "slow"}, r"mode must be one of \('accurate', 'fast'\), not 'slow'"),
        ({"activation": "relu"}, r"activation must be one of \('sigmoid', 'softmax'\), not 'relu'"),
        ({"level": 1}, r"no head at level 1: .*deep_supervision=True"),
        ({"level": 3, "mode": "fast"}, r"no head at level 3: .*deep_supervision=True"),
    ],
)
def test_predict_arguments(model: uf.UNetPlusPlus, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(torch.zeros(1, 3, 5, 7), **arguments)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)])
def test_predict_shapes(model: uf.UNetPlusPlus, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected|does not fit"):
        model.predict(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_predict_refuses_what_is_not_finite(model: uf.UNetPlusPlus, value: float) -> None:
    x = torch.zeros(2, 3, 9, 9)
    x[1, 2, 8, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.predict(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_precision_than_the_models(dtype):
    model = uf.UNet(1, 1, features=(3, 4))
    with pytest.raises(
        TypeError, match=rf"the input is {dtype} but the model is torch\.float32: use x\.to\(torch\.float32\)"
    ):
        model(torch.zeros(1, 1, 4, 4, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
