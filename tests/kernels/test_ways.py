"""Every way to run a convolution agrees with the twin in plain PyTorch, and any of them can be chosen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.conv_cases import Aligned, check_conv, check_wgrad, conv_case, wgrad_case

from unetpp_fast.kernels import conv_configs, conv_wgrad, library, triton_ops, tuning
from unetpp_fast.kernels.triton_ops import Way

DTYPES = (torch.float32, torch.float16)
CONFIG = {2: conv_configs.Config(1, 8, 16, 32, 32, 4, 1), 3: conv_configs.Config(2, 4, 8, 32, 32, 4, 1)}
WGRAD_WAYS = [Way(None), Way(conv_wgrad.WgradConfig(1, 4, 8, 64, 32, 4, 1), True)]
FORMS = {
    "plain": {},
    "prefix gradient": {"add": True},
    "full resolution": {"kb": 3, "affine": "image shared", "slope": 0.1, "act": True, "stats": True},
    "low gradient": {"taps": 4, "add": True},
    "folded": {"phased": True, "kb": 8, "bias": True, "border": True, "act": True, "slope": 0.1},
    "node": {"phased": True, "kb": 8, "affine": "shared image", "slope": 0.1, "bias": True, "border": True, "stats": True},
    "after a given map": {"phased": True, "kb": 8, "affine": "shared image", "slope": 0.1, "stats": True, "plain": 3},
    "low source alone": {"phased": True, "ka": 0, "kb": 8, "bias": True, "act": True},
}


def ways(axes: int) -> list[Way]:
    return [Way(None), Way(CONFIG[axes], finalise=True)]


@pytest.mark.parametrize(("axes", "size"), [(2, (6, 20)), (3, (2, 4, 6))])
@pytest.mark.parametrize("index", range(2), ids=["library", "finalised"])
@pytest.mark.parametrize("form", FORMS)
def test_every_way_of_a_convolution(axes, size, index, form):
    dtype = torch.float16 if form == "node" else torch.float32
    way = ways(axes)[index]
    options = {"n": 2 if axes == 2 else 1, "ka": 8, "co": 17, "inputs": Aligned, **FORMS[form]}
    check_conv(partial(triton_ops.conv_by, way), dtype, axes, size, **options)


@pytest.mark.parametrize("size", [(2, 2), (2, 6)])
@pytest.mark.parametrize("index", range(2))
def test_maps_one_pixel_wide(size, index):
    options = {"n": 3, "ka": 8, "inputs": Aligned, **FORMS["node"]}
    check_conv(partial(triton_ops.conv_by, ways(2)[index]), torch.float32, 2, size, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("axes", "size"), [(2, (6, 10)), (3, (2, 4, 6))])
@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize("affine", [None, 1, 0])
@pytest.mark.parametrize("way", WGRAD_WAYS, ids=["library", "finalised"])
def test_every_way_of_a_weight_gradient(dtype, axes, size, phased, affine, way):
    run = partial(triton_ops.conv_wgrad_by, way)
    check_wgrad(run, dtype, axes, size, phased=phased, affine=affine, slope=0.1)


@pytest.mark.parametrize("way", WGRAD_WAYS, ids=["library", "finalised"])
def test_every_way_of_a_weight_gradient_after_a_given_map(way):
    check_wgrad(partial(triton_ops.conv_wgrad_by, way), torch.float32, 2, (6, 10), affine=1, slope=0.1, plain=3)


@pytest.mark.parametrize("axes", [2, 3])
def test_phase_weights_as_a_transposed_convolution_and_back(axes):
    wb = torch.randn(2**axes, 2**axes, 3, 5)
    assert torch.equal(library.by_phase(library.transposed(wb, axes), axes), wb)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Ways are chosen as on a GPU, and run in the interpreter; no earlier measurement is known."""
    monkeypatch.setattr(triton_ops, "interpreted", lambda x: False)
    monkeypatch.setattr(tuning, "table", {})
    monkeypatch.setattr(tuning, "_chosen", {})


@pytest.mark.parametrize("best", ["library", "block_k 64", "finalise"])
def test_the_way_that_was_fastest_is_taken_for_sizes_of_its_bucket(as_on_a_gpu, monkeypatch, best):
    out, a, wa, options = conv_case(torch.float16, 2, (6, 20), ka=16, co=16, affine="shared", stats=True, inputs=Aligned)
    offered = triton_ops.ways_of_conv(out, a, **options)
    assert len({str(way) for way in offered}) == len(offered)
    assert not offered[0].finalise and offered[-1] == Way(None)
    timed = []

    def measure(launch):
        way = launch.__defaults__[0]
        timed.append(way)
        return 1.0 if best in str(way) else 2.0

    taken = []
    monkeypatch.setattr(triton_ops, "conv_by", lambda way, *args, **kwargs: taken.append(way))
    triton_ops.conv(out, a, wa, **options)
    with tuning.measuring(measure):
        triton_ops.conv(out, a, wa, **options)
    assert timed == offered
    other = conv_case(torch.float16, 2, (7, 24), ka=16, co=16, affine="shared", stats=True, inputs=Aligned)
    triton_ops.conv(*other[:3], **other[3])
    farther = conv_case(torch.float16, 2, (9, 20), ka=16, co=16, affine="shared", stats=True, inputs=Aligned)
    triton_ops.conv(*farther[:3], **farther[3])
    assert taken[0] == offered[0] and taken[3] == triton_ops.ways_of_conv(*farther[:2], **farther[3])[0]
    assert best in str(taken[1]) and str(taken[2]) == str(taken[1])


def test_the_fastest_way_of_a_weight_gradient_is_taken(as_on_a_gpu, monkeypatch):
    a, dy, options = wgrad_case(torch.float16, 2, (6, 10), affine=1)
    taken = []
    monkeypatch.setattr(triton_ops, "conv_wgrad_by", lambda way, *args, **kwargs: taken.append(way))
    with tuning.measuring(lambda launch: 1.0 if launch.__defaults__[0] == Way(None) else 2.0):
        triton_ops.conv_wgrad(a, dy, **options)
    assert taken == [Way(None)]


def test_large_tiles_are_offered_where_they_fit(as_on_a_gpu, monkeypatch):
    def pixels(shared: int, **options) -> list[int]:
        monkeypatch.setattr(triton_ops, "shared_memory", lambda device: shared)
        out, a = (torch.empty(32, 1, 64, 64, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
        return [way.config.pixels for way in triton_ops.ways_of_conv(out, a, axes=2, **options) if way.config]

    assert pixels(227 * 1024) == [256, 128, 128, 64] and pixels(99 * 1024) == [128, 128, 64]
    normed = torch.empty(1, 128, device="meta"), torch.empty(1, 128, device="meta")
    assert pixels(227 * 1024, affine_a=normed) == [128, 128, 64, 256, 128, 128, 64]  # the rest after the norm
