"""The CUDA kernel for gradients of weights in the CPU emulation under the sanitizers, against naive.py in float64."""

from __future__ import annotations

import pytest
import torch
from support.emulation import COMPILER, emulated
from support.emulation_cases import PRECISIONS, check_wgrad, wgrad_case

from unetpp_fast.kernels import cuda_ops

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation needs g++")
ONE, MANY = cuda_ops.WgradConfig(1), cuda_ops.WgradConfig(264)  # all tiles in one block, or one block per tile


@pytest.fixture(scope="module")
def emulation():
    with emulated() as emulation:
        yield emulation


@pytest.fixture(autouse=True)
def _plain(emulation):
    emulation.order, emulation.fault = 0, "none"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize("config", [ONE, MANY], ids=str)
def test_emulation_wgrad(emulation, dtype: torch.dtype, phased: bool, config):
    """Several tiles, images and blocks of channels; the sums of one block or of many."""
    check_wgrad(cuda_ops.conv_wgrad, config, dtype, (10, 38), co=24, phased=phased, rows=2, slope=0.1)
    assert emulation.conflicts == (0 if dtype == torch.float32 else 1)  # ldmatrix does not read TF32


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("phased", [False, True])
def test_emulation_wgrad_3d(dtype: torch.dtype, phased: bool):
    """Each plane of taps in separate blocks."""
    for config, size in ((ONE, (4, 2, 6)), (MANY, (2, 10, 34))):
        check_wgrad(cuda_ops.conv_wgrad, config, dtype, size, co=24, phased=phased, rows=1)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("k, co", [(1, 1), (3, 33), (33, 17), (7, 5)])
def test_emulation_wgrad_channels(dtype: torch.dtype, k: int, co: int):
    for aligned, phased in ((True, False), (False, True)):
        check_wgrad(cuda_ops.conv_wgrad, None, dtype, (4, 6), k=k, co=co, aligned=aligned, phased=phased, rows=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (8, 32), (9, 33), (1, 129)])
def test_emulation_wgrad_sizes(size: tuple[int, int]):
    check_wgrad(cuda_ops.conv_wgrad, ONE, torch.bfloat16, size, n=1, k=7, co=9, rows=1)
    check_wgrad(cuda_ops.conv_wgrad, ONE, torch.bfloat16, tuple(2 * axis for axis in size), n=1, k=7, co=9, phased=True)


@pytest.mark.parametrize("phased", [False, True])
def test_emulation_wgrad_is_deterministic(emulation, phased: bool):
    """Threads in other orders give the same bits."""
    a, dy, options = wgrad_case(torch.float16, (18, 34), n=1, phased=phased)
    results = []
    for emulation.order in (0, 1, 2):
        results.append(cuda_ops.conv_wgrad(a, dy, config=MANY, **options))
    assert all(torch.equal(result, results[0]) for result in results)


def test_emulation_wgrad_of_an_empty_batch():
    a, dy, options = wgrad_case(torch.float16, (2, 4), n=0)
    assert torch.equal(cuda_ops.conv_wgrad(a, dy, **options), torch.zeros(1, 9, 40, 32))
