"""What only a GPU can prove: the kernels in every precision, compiled, captured, on a second stream, over many steps."""

from __future__ import annotations

import copy

import pytest
import torch
from support.helpers import build, make_input, weighted_sum

import unetpp_fast as uf
from unetpp_fast.architecture.precision import autocast
from unetpp_fast.execution import reference
from unetpp_fast.execution.fused import operators

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LEAKY = ("leaky_relu", {"negative_slope": 0.1})
CASES = [
    (2, {"norm": "batch", "upsample": "deconv"}),
    (2, {"norm": None, "upsample": "nearest"}),
    (2, {"norm": "instance", "upsample": "linear", "act": LEAKY}),
    (3, {"norm": "instance", "upsample": "deconv", "act": LEAKY}),
    (3, {"norm": "batch", "upsample": "nearest"}),
]
DTYPES = ["float32", "tf32", "float16", "bfloat16"]


def network(axes: int, features=(16, 24, 33), backend: str = "triton", **options) -> uf.Network:
    model = build(
        uf.UNetPlusPlus, 2, 3, spatial_dims=axes, features=features, deep_supervision=True, backend=backend, **options
    )
    return model.cuda()


def image(axes: int, batch: int = 2, multiple: int = 4) -> torch.Tensor:
    return make_input(batch, 2, *(size * multiple for size in (5, 9, 3)[:axes])).cuda()


def passes(model: uf.Network, x: torch.Tensor, dtype: str) -> list[torch.Tensor]:
    """The outputs, the input's gradient and the parameters' gradients of a pass in a precision, each as one vector."""
    x = x.clone().requires_grad_()
    with autocast(x.device, "float32" if dtype == "tf32" else dtype):
        outputs = model(x)
    of_input, *gradients = torch.autograd.grad(weighted_sum([output.cpu() for output in outputs]), [x, *model.parameters()])
    groups = (outputs, [of_input], gradients)
    return [torch.cat([tensor.detach().double().flatten() for tensor in group]) for group in groups]


@pytest.fixture
def precision(request):
    """Whether float32 convolutions may use TF32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("precision", DTYPES, indirect=True)
@pytest.mark.parametrize(("axes", "options"), CASES, ids=str)
def test_outputs_and_gradients_keep_the_two_times_rule(axes, options, precision):
    """The error against float64 is at most twice that of PyTorch's own run in that precision, and the rounding."""
    model, x = network(axes, **options), image(axes)
    other = copy.deepcopy(model)
    other.backend = "reference"
    exact = passes(copy.deepcopy(other).double(), x.double(), "float32")
    usual, found = passes(other, x, precision), passes(model, x, precision)
    unit = {"float32": 2.0**-23, "tf32": 2.0**-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}[precision]
    for e, u, f in zip(exact, usual, found, strict=True):
        assert (f - e).norm() <= 2 * (u - e).norm() + unit * e.norm()


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_batch(batch):
    model, x = network(2).eval(), image(2, batch)
    with torch.no_grad():
        outputs, expected = model(x), reference.forward(model, x)
    for output, e in zip(outputs, expected, strict=True):
        assert output.shape == e.shape
        torch.testing.assert_close(output, e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
def test_opcheck(norm):
    model = build(uf.UNetPlusPlus, 1, 2, features=(16, 32), deep_supervision=True, norm=norm).cuda()
    norms = sum("norm" in name and name.endswith("weight") for name, _ in model.named_parameters())
    tensors = [*(parameter.detach().requires_grad_() for parameter in model.parameters()), *model.buffers()]
    x = make_input(2, 1, 8, 12).cuda().requires_grad_()
    torch.library.opcheck(
        operators.forward_op, ([x], tensors, True, model.structure.handle, "1" * norms, torch.float32, "triton", "", False)
    )


def test_runs_are_equal_bit_for_bit():
    model, x = network(2), image(2)
    one, two = passes(copy.deepcopy(model), x, "bfloat16"), passes(copy.deepcopy(model), x, "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_second_stream_and_a_cuda_graph():
    model, x = network(2).eval(), image(2)
    with torch.no_grad():
        expected = model(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = model(x)
        torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        x.copy_(image(2).flip(0))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, model(x), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device():
    model, x = network(2).eval(), image(2)
    with torch.no_grad():
        expected = model(x)
        found = copy.deepcopy(model).to("cuda:1")(x.to("cuda:1"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


def test_torch_compile_fullgraph():
    model, x = network(2, features=(16, 32)), image(2, multiple=2)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    for a, b in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


def losses_of(backend: str, seed: int, steps: int) -> torch.Tensor:
    """The loss curve of a training in bfloat16 on blobs."""
    torch.manual_seed(seed)
    model = uf.UNetPlusPlus(1, 1, features=(16, 32, 64), deep_supervision=True, backend=backend).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        rough = torch.rand(8, 1, 12, 12, generator=generator)
        mask = (torch.nn.functional.interpolate(rough, size=(48, 48), mode="bilinear") > 0.6).float()
        x = (mask + 0.5 * torch.randn(mask.shape, generator=generator)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(x)
        loss = uf.BCEDiceLoss()(outputs, mask.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def test_three_hundred_steps_lie_within_the_spread_of_seeds():
    """The kernels' curve is no farther from the reference's of the same seed than other seeds' curves are."""
    curves = [losses_of("reference", seed, 300) for seed in range(4)]
    found = losses_of("triton", 0, 300)
    smooth = [curve.unfold(0, 20, 1).mean(-1) for curve in (*curves, found)]
    spread = max((a - b).abs().max() for a in smooth[:-1] for b in smooth[:-1])
    assert (smooth[-1] - smooth[0]).abs().max() <= spread
    assert found[-20:].mean() < 0.7 * found[:20].mean()
