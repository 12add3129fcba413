"""Global hooks, forward-mode differentiation, tracing and export go through plain PyTorch operators."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from torch import nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.fx.experimental import _config as experimental

import unetpp_fast as uf
from unetpp_fast.execution import dispatch, reference

BACKEND = "cpu" if dispatch.CPU_KERNELS[0] else "triton"


def network(**options) -> uf.Network:
    return build(uf.UNetPlusPlus, 2, 3, features=(3, 4, 5), backend=BACKEND, **options).eval()


@torch.no_grad()
def test_hooks_for_all_modules_are_called() -> None:
    model, x = network(), make_input(1, 2, 8, 12)
    plain, fast = model(x), uf.optimize(model)

    def scale(module, arguments, output):
        return 1.5 * output if isinstance(module, nn.ReLU) else None

    hook = nn.modules.module.register_module_forward_hook(scale)
    try:
        expected = reference.forward(model, x)[-1]
        assert not torch.allclose(expected, plain, rtol=1e-3)
        assert_close_relative(model(x), expected, FLOAT32)
        assert_close_relative(model.predict(x), expected.sigmoid(), FLOAT32)
        assert "there are hooks for all modules" in uf.explain(model, x)
        assert_close_relative(fast(x), expected, FLOAT32)
        assert_close_relative(fast.predict(x), expected.sigmoid(), FLOAT32)
        assert_close_relative(uf.optimize(model)(x), expected, FLOAT32)
    finally:
        hook.remove()
    assert_close_relative(model(x), plain, FLOAT32)
    assert_close_relative(fast(x), plain, FLOAT32)


@pytest.mark.parametrize("of", ["the model", "the optimized model"])
def test_forward_mode_differentiation(of: str) -> None:
    model = network().double()
    x, tangent = (make_input(1, 2, 8, 12, seed=seed, dtype=torch.float64) for seed in (0, 1))
    _, expected = torch.func.jvp(lambda image: reference.forward(model, image)[-1], (x,), (tangent,))
    wide = model if of == "the model" else uf.optimize(model)
    single = network() if of == "the model" else uf.optimize(network())
    for run, dtype, bound in ((wide, torch.float64, 1e-9), (single, torch.float32, 1e-4)):
        image, along = x.to(dtype), tangent.to(dtype)
        with forward_ad.dual_level():
            output = run(forward_ad.make_dual(image, along))
            assert_close_relative(forward_ad.unpack_dual(output).tangent.double(), expected, bound)
        assert_close_relative(torch.func.jvp(run, (image,), (along,))[1].double(), expected, bound)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("norm", ["batch", "instance"])
@torch.no_grad()
def test_a_trace_of_the_optimized_model(norm: str) -> None:
    model, x = network(norm=norm), make_input(2, 2, 16, 12)
    for module in (model, uf.optimize(model)):
        traced = torch.jit.trace(module, make_input(1, 2, 16, 12))
        assert_close_relative(traced(x), model(x), 10 * FLOAT32)


@pytest.mark.parametrize("norm", ["batch", "instance", None])
@torch.no_grad()
def test_an_export_from_one_image_takes_more(norm: str | None) -> None:
    """`torch.export` fixes a size of 1 for any module; where it is told not to, no code here fixes it either."""
    model, one, x = network(norm=norm), make_input(1, 2, 8, 12), make_input(3, 2, 8, 12)
    with pytest.raises(ValueError, match="0/1 specialized"):
        torch.export.export(nn.Conv2d(2, 3, 1), (one,), dynamic_shapes=({0: Dim.DYNAMIC},))
    with experimental.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (one,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert_close_relative(program.module()(x), model(x), FLOAT32)
