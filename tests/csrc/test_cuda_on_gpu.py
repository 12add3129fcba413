"""The CUDA kernels on a GPU: the checks that the emulation passes, and whole networks with `backend="cuda"`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.emulation_cases import PRECISIONS, bits, check_conv, check_wgrad, conv_case, wgrad_case
from support.helpers import build, make_input, weighted_sum
from torch import Tensor

import unetpp_fast as uf
from unetpp_fast.execution import dispatch, reference
from unetpp_fast.execution.acceptance import as_vector, disagreement
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import libraries, operators
from unetpp_fast.kernels import cuda_ops

LOADED, REASON = libraries.load("cuda") if torch.cuda.is_available() else (False, "there is no CUDA device")
pytestmark = pytest.mark.skipif(not LOADED, reason=f"the CUDA kernels cannot run: {REASON}")
NODE = {"phased": True, "kb": 24, "affine": "1 n", "slope": 0.1, "bias": True, "border": True, "stats": True}


@pytest.fixture(autouse=True)
def _tf32():
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def on(device: str, op: Callable) -> Callable:
    """`op` for tensors on the CPU: it runs on copies of their whole storages, which are copied back."""

    def run(*args, **options):
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def moved(value):
            if isinstance(value, tuple):
                return tuple(moved(part) for part in value)
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in copies:
                whole = torch.empty(0, dtype=value.dtype).set_(storage)
                copies[storage.data_ptr()] = whole, whole.to(device, copy=True)
            return copies[storage.data_ptr()][1].as_strided(value.shape, value.stride(), value.storage_offset())

        result = op(*map(moved, args), **{name: moved(value) for name, value in options.items()})
        for whole, copy in copies.values():
            whole.copy_(copy)
        return None if result is None else result.cpu()

    return run


CONV, WGRAD = on("cuda", cuda_ops.conv), on("cuda", cuda_ops.conv_wgrad)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("config", cuda_ops.CONFIGS, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_convolutions(dtype: torch.dtype, config, aligned: bool):
    if config.shared > cuda_ops._shared_memory(torch.device("cuda", 0)):
        pytest.skip("a block of this configuration needs more shared memory")
    case = {"taps": 4, "add": True, "ka": 33} if config.gathered else NODE | {"ka": 72}
    for size in ((10, 38), (66, 130), (4, 6, 34)):
        check_conv(CONV, config, dtype, size, co=config.block_co - 3 * (not aligned), aligned=aligned, **case)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("phased", [False, True])
def test_gradients_of_weights(dtype: torch.dtype, phased: bool):
    for size, aligned in (((10, 38), True), ((66, 130), False), ((4, 6, 34), True)):
        check_wgrad(WGRAD, None, dtype, size, co=24, phased=phased, rows=2, slope=0.1, aligned=aligned)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_the_same_bits_again(dtype: torch.dtype):
    out, a, wa, options = conv_case(dtype, (130, 66), **NODE)
    results = []
    for _ in range(5):
        parts = CONV(out, a, wa, **options)
        results.append((bits(out), bits(parts)))
    assert all(torch.equal(*pair) for result in results for pair in zip(result, results[0], strict=True))
    a, dy, options = wgrad_case(dtype, (130, 66))
    results = [WGRAD(a, dy, **options) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_tensor_on_another_device_is_refused_and_the_current_device_stays():
    out, a, wa, _ = conv_case(torch.float16, (10, 38))
    nothing = dict.fromkeys(("scale_a", "shift_a", "b", "wb", "scale_b", "shift_b", "border", "stats"))
    options = {"axes": 2, "phased": False, "slope": 0.0, "act": False, "add": False, "config": 0}
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    moved = {"out": out.to(last), "a": a.to(last), "wa": wa.to(last)}
    torch.ops.unetpp_fast_cuda.conv(**moved, **nothing, bias=None, **options)
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="bias must be on the device of the other arguments"):
        torch.ops.unetpp_fast_cuda.conv(**moved, **nothing, bias=torch.zeros(32), **options)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_networks(axes: int, dtype: torch.dtype):
    """Outputs and gradients have at most twice the error of PyTorch's own run in that precision."""
    model, wide = (
        build(uf.UNetPlusPlus, 2, 3, spatial_dims=axes, features=(16, 24, 33), norm="batch", backend="cuda").cuda()
        for _ in range(2)
    )
    x = make_input(2, 2, *(20, 36, 12)[:axes]).cuda()

    def passes(model: uf.Network, x: Tensor, run: Callable) -> list[Tensor]:
        outputs = run(model, x)
        loss = weighted_sum([output.cpu() for output in outputs])
        return [as_vector(outputs), as_vector(torch.autograd.grad(loss, list(model.parameters())))]

    exact = passes(wide.double(), x.double(), reference.forward)
    with torch.autocast("cuda", dtype):
        assert dispatch.choose(Call(model, x)) == ("cuda", "asked for")
        plain = passes(model, x, reference.forward)
        fused = passes(model, x, lambda model, x: operators.forward(Call(model, x, dtype), "cuda"))
    assert not disagreement(exact, plain, fused, dtype)
