"""An encoder's convolutions by the CPU kernels: which, with what result, and where they were measured to be faster."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cpu_kernels import needs_library
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from torch import Tensor, nn
from torch.nn import functional as F

from unetpp_fast.deployment import encoder_layers
from unetpp_fast.deployment.encoder_layers import Layer, Pass, fastest, layers_of, running, with_layers

pytestmark = needs_library()


class Same(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Residual(nn.Module):
    """One ReLU after a convolution, after a sum, and in place on what it gave before; layers of every kind."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.relu, self.inplace = nn.ReLU(inplace=inplace), inplace
        self.stem, self.same, self.last = nn.Conv2d(3, 5, 3, 2, 1), Same(5, 7, 3), nn.Conv2d(7, 7, 3, padding=1, bias=False)
        self.one, self.seen = nn.Conv2d(5, 7, 1), nn.Conv2d(7, 6, 1)
        self.grouped, self.dilated = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.relu(self.stem(x))
        short = self.one(y)
        y = self.relu(self.same(y))
        y = self.last(y)
        y += short
        y = self.relu(y)
        y = F.relu(self.seen(y), inplace=self.inplace)
        y -= 0.5  # which the next ReLU must see
        y = self.relu(y)
        y = self.dilated(self.grouped(y))
        return [x, self.twice(self.twice(y).relu())]


def encoder(inplace: bool = True) -> tuple[nn.Module, Tensor]:
    return build(Residual, inplace).eval(), make_input(2, 3, 18, 50)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_every_layer_gives_what_the_encoder_does(inplace, inference):
    mine, x = encoder(inplace)
    changed = with_layers(mine, x)
    layers = layers_of(changed)
    assert {name for name, module in changed.named_modules() if isinstance(module.__dict__.get("forward"), Layer)} == {
        "same", "last", "one", "seen",
    }  # fmt: skip
    assert {layer.rectified for layer in layers if layer.conv is changed.same} == {True}
    assert all(layer._weight is None for layer in layers)  # nothing is packed before it is used
    assert not layers_of(mine) and changed.state_dict().keys() == mine.state_dict().keys()
    exact = copy.deepcopy(mine).double()(x.double())[1].detach()
    for kernels in (range(4), (0, 2), ()):
        with torch.inference_mode(inference), torch.no_grad(), running(Pass(kernels)):
            assert_close_relative(copy.deepcopy(changed)(x)[1], exact, FLOAT32)
    with torch.no_grad():
        assert_close_relative(changed(x)[1], exact, FLOAT32)
    changed.load_state_dict({name: 2 * value for name, value in mine.state_dict().items()})
    with torch.no_grad(), running(Pass(range(4))):
        doubled = changed(x)[1]
    with torch.no_grad():
        assert_close_relative(doubled, changed(x)[1], FLOAT32)


def test_a_rectified_map_is_not_rectified_again():
    mine, x = encoder()
    changed, calls = with_layers(mine, x), []
    with torch.no_grad(), running(Pass(range(4))), pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_layers.F, "relu", lambda y, inplace=False: calls.append(y) or y.relu())
        changed(x)
    assert len(calls) == 3 + 1  # of the module: the stem's, the sum's and the changed one's; and the encoder's own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_volumes_and_bfloat16(dtype):
    mine = build(lambda: nn.Sequential(nn.Conv3d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv3d(5, 4, 1))).eval()

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mine

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.inner(x)]

    x = make_input(1, 3, 6, 9, 8)
    changed = with_layers(Maps().eval(), x)
    assert len(layers_of(changed)) == 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), running(Pass(range(2))):
        found = changed(x)[0]
    assert found.dtype == dtype
    assert_close_relative(found, mine.double()(x.double()).detach(), FLOAT32 if dtype == torch.float32 else 0.02)


def test_a_layer_that_something_hidden_reads_stays():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.conv(x)
            return [y.relu() + y.detach()]

    mine = build(Hidden).eval()
    assert with_layers(mine, make_input(1, 3, 8, 8)) is mine


def measured(monkeypatch, tmp_path, faster) -> None:
    """Times by `faster`, which says whether the kernels take less for a place."""
    monkeypatch.setenv("UNETPP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(encoder_layers.tuning, "may_measure", lambda x: True)
    for name, empty in (("_known", {}), ("_latest", {}), ("_loaded", set()), ("_doubted", set())):
        monkeypatch.setattr(encoder_layers.verdicts, name, empty)
    monkeypatch.setattr(encoder_layers, "share_waited", lambda since: 0.0)  # whatever runs beside the tests
    compute = Pass.compute

    def timed(self, layer, x):
        y = compute(self, layer, x)
        self.times[layer.place] = 1.0 if (layer.place in self.kernels) == faster(layer.place) else 2.0
        return y

    monkeypatch.setattr(Pass, "compute", timed)


def test_the_faster_of_both_is_taken_and_kept(monkeypatch, tmp_path):
    measured(monkeypatch, tmp_path, lambda place: place in (1, 3))
    mine, x = encoder()
    changed = with_layers(mine, x)
    assert fastest(changed, x, 2) == (1, 3)
    assert "encoder" in next(tmp_path.glob("*.json")).read_text()
    monkeypatch.setattr(encoder_layers, "_measured", None)  # it is not called again
    assert fastest(changed, x, 2) == (1, 3)
    assert fastest(mine, x, 2) == fastest(changed, x.double(), 2) == fastest(changed, x[:0], 2) == ()


def test_what_was_measured_beside_other_programs_is_measured_again_by_the_next_process(monkeypatch, tmp_path):
    for waited, faster, taken in ((0.3, (1, 3), (1, 3)), (0.0, (2,), (2,)), (0.0, (0,), (2,))):
        measured(monkeypatch, tmp_path, lambda place, faster=faster: place in faster)  # a new process
        monkeypatch.setattr(encoder_layers, "share_waited", lambda since, waited=waited: waited)
        mine, x = encoder()
        changed = with_layers(mine, x)
        assert fastest(changed, x, 2) == fastest(changed, x, 2) == taken


def test_kernels_with_a_wrong_result_are_not_taken(monkeypatch, tmp_path):
    measured(monkeypatch, tmp_path, lambda place: True)
    mine, x = encoder()
    changed = with_layers(mine, x)
    right = Layer.by_kernels
    monkeypatch.setattr(Layer, "by_kernels", lambda self, x: right(self, x) * 2)
    assert fastest(changed, x, 2) == ()
