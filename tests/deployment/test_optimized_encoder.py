"""`optimize` of networks over an encoder: the encoder folded and channels-last, the nest by the engine."""

from __future__ import annotations

import copy

import pytest
import torch
from support import cpu_kernels
from support.encoders import encoded
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, build, make_input
from torch import Tensor, nn
from torch.nn import functional as F

import unetpp_fast as uf
from unetpp_fast.architecture.topology import Topology
from unetpp_fast.deployment.folding import folded_encoder
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.fused import tuning
from unetpp_fast.models.encoder_network import EncodedNetwork

LEAKY = ("leaky_relu", {"negative_slope": 0.1})
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def image(axes: int = 2, batch: int = 2) -> Tensor:
    return make_input(batch, 3, *(16, 24, 8)[:axes])


def chosen(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """What a measurement would have found."""
    ratio = 2.0 if backend == "cpu" else 0.5
    verdict = {"right": True, "backend": "cpu", "ratio": ratio, "fused_ms": 1.0, "reference_ms": ratio}
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "verdict", lambda call: verdict)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=cpu_kernels.needs_library())])
@pytest.mark.parametrize("options", [
    {}, {"norm": None, "bias": True}, {"norm": "instance", "act": LEAKY}, {"upsample": "linear"},
    {"norm": ("batch", {"eps": 0.1})},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("axes", [2, 3])
def test_it_computes_what_the_model_does_in_eval_mode(axes, options, backend, monkeypatch):
    chosen(monkeypatch, backend)
    model, x = encoded(axes=axes, **options), image(axes)
    fast = uf.optimize(model)
    exact = copy.deepcopy(model).double().eval()
    exact.backend = "reference"
    assert f": {backend} (" in fast.explain(x)
    for _ in range(2):  # composed, then kept
        assert_close_relative(fast.train()(x), exact(x.double()).detach(), FLOAT32)
    odd = x[..., :-3]
    assert_close_relative(fast.predict(odd), exact.predict(odd.double()), FLOAT32)
    assert not fast(x).requires_grad and model.training


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=cpu_kernels.needs_library())])
def test_all_batch_norms_are_folded(backend, monkeypatch):
    chosen(monkeypatch, backend)
    random = torch.get_rng_state()
    fast = uf.optimize(encoded())
    assert "PyTorch    encoder, channels-last: 3 of its 3 batch norms are folded" in fast.explain(image())
    assert torch.equal(torch.get_rng_state(), random)
    fast(image())
    assert not any(isinstance(module, NORMS) for module in fast.network.encoder.modules())
    assert fast.network.encoder.convs[1].weight.is_contiguous(memory_format=torch.channels_last)
    if backend == "reference":
        assert not any(isinstance(module, NORMS) for module in fast._composed["plain", (3,)].modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(dtype, monkeypatch):
    chosen(monkeypatch, "reference")
    model, x = encoded().eval(), image()
    found = uf.optimize(model, dtype=dtype)(x)
    assert found.dtype == dtype
    exact = model.double()(x.double()).detach()
    assert_close_relative(found, exact, FLOAT64 if dtype == torch.float64 else 0.1)


def test_weights_that_move_or_change_are_composed_again(monkeypatch):
    chosen(monkeypatch, "reference")
    model, x = encoded(), image()
    fast, other = uf.optimize(model), uf.optimize(build(lambda: encoded(), seed=5))
    first = fast(x)
    fast.load_state_dict(other.state_dict())
    assert_close_relative(fast(x), other(x), FLOAT32)
    assert (fast(x) - first).abs().max() > 1e-3
    assert_close_relative(copy.deepcopy(fast).double()(x.double()), fast(x), FLOAT32)


def test_one_head_has_no_levels():
    with pytest.raises(ValueError, match="no head at level 1: this network has heads at level 2;"):
        uf.optimize(encoded(), level=1)


class Block(nn.Module):
    """Convolutions whose result something beside the norm reads, or that run twice, and one that a norm alone reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.seen, self.seen_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.first, self.middle = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.norm(self.stem(x)).relu()
        raw = self.seen(y)
        y = self.seen_norm(raw) + raw.sigmoid()
        y = self.twice_norm(self.twice(y)).relu()
        y = self.twice_norm(self.twice(y)).relu()
        return [x, self.middle(self.first(y)), F.avg_pool2d(y, 2)]


def test_only_what_a_norm_alone_reads_is_folded():
    encoder, x = build(Block).eval(), make_input(2, 3, 8, 12)
    folded, words = folded_encoder(encoder, x)
    assert words == "1 of its 4 batch norms are folded"
    kept = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert kept == ["seen_norm", "twice_norm", "first"]
    with torch.no_grad():
        assert_close_relative(folded(x), encoder(x), FLOAT32)
    assert isinstance(encoder.norm, nn.BatchNorm2d) and encoder.stem.weight.requires_grad


class Reads(nn.Module):
    """An encoder that looks into its norm; `hidden`: where autograd does not see it."""

    def __init__(self, hidden: bool):
        super().__init__()
        self.conv, self.norm, self.hidden = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), hidden

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)
        if self.hidden:
            return [x, self.norm(y) + y.detach()]
        return [x, self.norm(y) * self.norm.weight.view(1, -1, 1, 1)]


@pytest.mark.parametrize(("hidden", "why"), [(True, "its maps would change"), (False, "AttributeError")])
def test_an_encoder_that_folding_would_change_stays_as_it_is(hidden, why):
    encoder, x = build(Reads, hidden).eval(), make_input(2, 3, 8, 12)
    found, words = folded_encoder(encoder, x)
    assert found is encoder and "not folded" in words and why in words


def test_an_encoder_of_another_library_may_name_its_maps_as_it_likes(monkeypatch):
    """A tuple will do."""
    chosen(monkeypatch, "reference")

    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            half = self.convs[0](x)
            return x, half, self.convs[1](half)

    topology = Topology.nested(2, (4, 6))
    model, x = (
        build(EncodedNetwork, Tuple(), topology, 3, 2, upsample=("nearest", {"project": True})),
        make_input(2, 2, 8, 12),
    )
    fast = uf.optimize(model)
    with torch.no_grad():
        assert_close_relative(fast(x), model.eval()(x), FLOAT32)
    with pytest.raises(ValueError, match="over an encoder is not loaded: load the original"):
        uf.load_optimized(fast.state_dict())
