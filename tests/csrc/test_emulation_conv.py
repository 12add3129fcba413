"""Every instance of the CUDA convolution in the CPU emulation under the sanitizers, against naive.py in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.emulation import COMPILER, emulated
from support.emulation_cases import PRECISIONS, check_conv, conv_case

from unetpp_fast.kernels import cuda_ops, naive

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation needs g++")
PLAIN = [config for config in cuda_ops.CONFIGS if not config.gathered]
GATHERED = [config for config in cuda_ops.CONFIGS if config.gathered]
SMALL = cuda_ops.CONFIGS[1]
NODE = {"phased": True, "kb": 24, "affine": "1 n", "slope": 0.1, "bias": True, "border": True, "stats": True}


@pytest.fixture(scope="module")
def emulation():
    with emulated() as emulation:
        yield emulation


@pytest.fixture(autouse=True)
def _plain(emulation):
    emulation.order, emulation.fault = 0, "none"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("config", PLAIN, ids=str)
def test_emulation_nodes(emulation, dtype: torch.dtype, config):
    """A node's first convolution with every option: prefix and low source by phases, an odd number of stages."""
    check_conv(cuda_ops.conv, config, dtype, (10, 38), co=config.block_co, **NODE)
    assert emulation.shared == config.shared and emulation.conflicts == 1


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("config", PLAIN, ids=str)
def test_emulation_second_convolutions(dtype: torch.dtype, config):
    """One operand, several tiles in both directions, channels that fill their chunks only partly."""
    check_conv(cuda_ops.conv, config, dtype, (19, 35), n=1, ka=72, co=config.block_co - 8, affine="n", act=True, stats=True)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("config", GATHERED, ids=str)
def test_emulation_low_gradients(emulation, dtype: torch.dtype, config):
    """The data gradient of the low source: 4 x 4 taps at a stride of two, added to the output."""
    check_conv(cuda_ops.conv, config, dtype, (9, 17), n=1, taps=4, co=config.block_co, add=True)
    assert emulation.shared == config.shared and emulation.conflicts == 1


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_emulation_prefix_gradients(dtype: torch.dtype):
    """The data gradient of the prefix: wide, in several blocks of channels, added to the output."""
    check_conv(cuda_ops.conv, cuda_ops.CONFIGS[2], dtype, (9, 33), n=1, ka=32, co=96, add=True)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"act": True, "slope": 0.1, "bias": True},
        {"affine": "1", "add": True},
        {"border": True, "stats": True, "add": True, "act": True},
        {"kb": 33, "affine": "1 1", "slope": 0.1, "stats": True},
    ],
    ids=lambda option: "-".join(option) or "plain",
)
def test_emulation_epilogues(dtype: torch.dtype, option: dict):
    """Each option with aligned and with unaligned maps; a second operand of full resolution too."""
    for aligned, co in ((True, 24), (False, 21)):
        check_conv(cuda_ops.conv, SMALL, dtype, (5, 7), n=3, ka=33, co=co, aligned=aligned, **option)


@pytest.mark.parametrize("ka, kb, co", [(1, 3, 1), (3, 33, 5), (33, 1, 17), (16, 17, 40)])
def test_emulation_channels(ka: int, kb: int, co: int):
    """Odd and unequal widths; aligned maps whose channels end within 16 bytes."""
    for aligned in (True, False):
        for dtype in (torch.float16, torch.float32):
            case = NODE | {"ka": ka, "kb": kb, "co": co, "aligned": aligned}
            check_conv(cuda_ops.conv, None, dtype, (4, 6), **case)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (8, 32), (9, 33), (1, 129)])
def test_emulation_sizes(size: tuple[int, int]):
    """One pixel; tiles that are just full; one pixel more; one row. Statistics of parts with few pixels."""
    check_conv(cuda_ops.conv, SMALL, torch.bfloat16, size, n=1, ka=7, border=True, stats=True, affine="1")
    doubled = tuple(2 * axis for axis in size)
    check_conv(cuda_ops.conv, SMALL, torch.bfloat16, doubled, n=1, **(NODE | {"ka": 7, "kb": 7}))
    check_conv(cuda_ops.conv, cuda_ops.CONFIGS[4], torch.bfloat16, size, n=1, ka=7, taps=4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_emulation_orders(emulation, order: int):
    """Threads in other orders give the same bits: no result depends on which thread comes first."""
    results = []
    for emulation.order in (0, order):
        for dtype, config in zip(PRECISIONS, PLAIN[1:], strict=True):
            out, a, wa, options = conv_case(dtype, (10, 6), n=1, co=config.block_co, **NODE)
            results += [cuda_ops.conv(out, a, wa, config=config, **options), out]
    half = len(results) // 2
    assert all(torch.equal(*pair) for pair in zip(results[:half], results[half:], strict=True))


def test_emulation_reads_a_buffer_that_it_writes():
    """A node reads the prefix of its level's buffer and writes the next slice of it."""
    buffer = torch.randn(2, 1, 6, 34, 48, generator=torch.Generator().manual_seed(0)).half()
    wa = torch.full((9, 32, 16), 1 / 64, dtype=torch.float16)
    expected = buffer.double()
    cuda_ops.conv(buffer[..., 32:], buffer[..., :32], wa, axes=2)
    naive.conv(expected[..., 32:], expected[..., :32].clone(), wa.double(), axes=2)
    assert torch.allclose(buffer.double(), expected, rtol=torch.finfo(torch.float16).eps, atol=1e-4)


def test_emulation_padding_after_norm_and_nan_in_place():
    """Zero padding is not shifted; a NaN in the map reaches the output, through ReLU too."""
    out, a, wa, options = conv_case(torch.float16, (3, 3), affine="1", act=True)
    a[0, 0, 1, 1, 0] = math.nan
    cuda_ops.conv(out, a, wa, **options)
    assert out[0].isnan().all() and not out[1].isnan().any()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_emulation_relu_of_minus_infinity_is_zero(dtype: torch.dtype):
    """As PyTorch's, where an operand is read and where a result is stored."""
    results = []
    for negative in (-math.inf, -60000.0):
        out, a, wa, options = conv_case(dtype, (3, 3), affine="1", act=True, bias=True)
        options["affine_a"][0].abs_()
        a[0, 0, 1, 1, 0] = options["bias"][0] = negative
        cuda_ops.conv(out, a, wa, **options)
        results.append(out)
    assert not results[0][..., 0].any() and torch.equal(*results)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        NODE | {"border": True},
        {"taps": 4, "add": True, "ka": 33},
        {"kb": 24, "affine": "n 1", "bias": True, "act": True, "border": True, "stats": True, "aligned": False},
    ],
    ids=["node", "low-gradient", "full-resolution"],
)
def test_emulation_3d(dtype: torch.dtype, case: dict):
    """Planes are separate stages: more planes than taps, and a single one."""
    config = cuda_ops.CONFIGS[4 if case.get("taps") == 4 else 1]
    for size in ((4, 2, 6), (2, 10, 34)):
        check_conv(cuda_ops.conv, config, dtype, size, **case)
    if not case.get("phased"):
        check_conv(cuda_ops.conv, config, dtype, (1, 3, 5), **case)


@pytest.mark.parametrize("n", [0, 3])
def test_emulation_batches(n: int):
    check_conv(cuda_ops.conv, SMALL, torch.float16, (2, 4), n=n, **(NODE | {"affine": "n n"})) if n else None
    out, a, wa, options = conv_case(torch.float16, (2, 4), n=n, stats=True)
    assert cuda_ops.conv(out, a, wa, **options).shape == (n, 1, 3, 32)


def test_emulation_says_what_the_kernels_do_not_take():
    """Wide maps, double precision, float32 without TF32 and other geometries are left to Triton."""

    def reason(channels: int, dtype: torch.dtype = torch.float32, images: int = 1, **geometry) -> str:
        out, a = (torch.empty(images, 3, 2, 2, count, dtype=dtype, device="meta") for count in (channels, 96))
        runs, why = cuda_ops.can_run_conv(out, a, **geometry)
        assert runs == (not why)
        return why

    assert not reason(64)
    assert "more than 64 channels" in reason(65)
    assert "2 taps at a stride of 1" in reason(64, taps=2)
    assert "as they are" in reason(64, plain=3)
    nothing, out = (torch.empty(1, 1, 2, 2, count, dtype=torch.float16) for count in (0, 8))
    assert "a low source alone" in cuda_ops.can_run_conv(out, nothing)[1]
    assert "not torch.float64" in reason(64, torch.float64)
    assert not reason(64, images=21845) and "more than 65535 planes" in reason(64, images=21846)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        assert "where TF32 is allowed" in reason(64)
    finally:
        torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wb": None}, "b and wb come together"),
        ({"bias": torch.zeros(3)}, "bias is"),
        ({"border": torch.zeros(3, 32)}, "border is"),
        ({"affine_b": (torch.zeros(3, 24), torch.zeros(3, 24))}, "affine_b is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_emulation_says_what_is_wrong(change: dict, message: str):
    out, a, wa, options = conv_case(torch.float16, (4, 6), **NODE)
    with pytest.raises(ValueError, match=message):
        cuda_ops.conv(out, a, wa, **(options | change))
