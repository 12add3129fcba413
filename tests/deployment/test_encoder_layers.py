"""An encoder's convolutions by the CPU kernels: which, with what result, and where they were measured to be faster."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.cpu_kernels import needs_library
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unetpp_fast.deployment import encoder_layers
from unetpp_fast.deployment.encoder_layers import Layer, Pass, fastest, layers_of, running, with_layers

pytestmark = needs_library()


class Same(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, groups=self.groups)


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
        "stem", "same", "last", "one", "seen",
    }  # fmt: skip
    assert {layer.act for layer in layers if layer.conv in (changed.same, changed.stem)} == {True}
    assert all(layer._weight is None for layer in layers)  # nothing is packed before it is used
    assert not layers_of(mine) and changed.state_dict().keys() == mine.state_dict().keys()
    exact = copy.deepcopy(mine).double()(x.double())[1].detach()
    for kernels in (range(5), (0, 2, 3), ()):
        with torch.inference_mode(inference), torch.no_grad(), running(Pass(kernels)):
            assert_close_relative(copy.deepcopy(changed)(x)[1], exact, FLOAT32)
    with torch.no_grad():
        assert_close_relative(changed(x)[1], exact, FLOAT32)
    changed.load_state_dict({name: 2 * value for name, value in mine.state_dict().items()})
    with torch.no_grad(), running(Pass(range(5))):
        doubled = changed(x)[1]
    with torch.no_grad():
        assert_close_relative(doubled, changed(x)[1], FLOAT32)


def test_a_rectified_map_is_not_rectified_again():
    mine, x = encoder()
    changed, calls = with_layers(mine, x), []
    with torch.no_grad(), running(Pass(range(5))), pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoder_layers.FUNCTIONS, True, lambda y, inplace=False: calls.append(y) or y.relu())
        changed(x)
    assert len(calls) == 2  # of the module, the sum's and the changed one's


class Block(nn.Module):
    """A block of efficientnets: convolutions with an activation each, one of them with groups; `function`: not a module."""

    def __init__(self, kind: type[nn.Module], inplace: bool, function: bool, pads: bool):
        super().__init__()
        self.act, self.function = kind(inplace=inplace), function
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.expand, self.norm = nn.Conv2d(6, 20, 1), nn.BatchNorm2d(20)
        self.depth = (Same if pads else nn.Conv2d)(20, 20, 3, padding=0 if pads else 1, groups=20)
        self.reduce, self.project = nn.Conv2d(20, 2, 1), nn.Conv2d(20, 6, 1, bias=False)
        self.halve = nn.Conv2d(6, 5, 5, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        act = F.silu if self.function else self.act
        y = act(self.stem(x))
        z = act(self.depth(act(self.expand(y))))
        z = z * self.reduce(z.mean((2, 3), keepdim=True)).sum(1, keepdim=True).sigmoid()
        y = self.project(z) + y
        return [x, y, act(self.halve(y))]


@pytest.mark.parametrize("size", [(18, 50), (17, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("kind", "inplace", "pads"), [
    (nn.ReLU, True, False), (nn.ReLU6, True, False), (nn.SiLU, False, True), (nn.SiLU, True, False),
    (nn.Hardswish, False, True),
])  # fmt: skip
def test_activations_of_every_layer(kind, inplace, pads, n, dtype, size):
    mine, x = build(Block, kind, inplace, False, pads).eval(), make_input(n, 3, *size)
    changed = with_layers(mine, make_input(1, 3, 16, 16))
    found = {name: module.__dict__.get("forward") for name, module in changed.named_modules()}
    acts = {name: layer.act for name, layer in found.items() if isinstance(layer, Layer)}
    act = encoder_layers.MODULES[kind]
    assert {name for name, one in acts.items() if one} == {"stem", "expand", "depth", "halve"}
    assert {one for one in acts.values() if one} == {act} and len(layers_of(changed)) == 4
    exact = copy.deepcopy(mine).double()(x.double())
    precision = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    for kernels, inference in itertools.product((range(4), (1,), ()), (False, True)):
        with torch.inference_mode(inference), torch.no_grad(), running(Pass(kernels)), precision:
            maps = changed(x)
        for one, other in zip(maps, exact, strict=True):
            assert_close_relative(one, other.detach(), FLOAT32 if dtype == torch.float32 else 0.05)


def test_what_is_applied_by_a_function_stays_with_the_encoder():
    """SiLU changes what it is applied to twice, and nothing tells a function that it was."""
    mine, x = build(Block, nn.SiLU, False, True, False).eval(), make_input(1, 3, 16, 16)
    changed = with_layers(mine, x)
    assert len(layers_of(changed)) == 4 and not any(layer.act for layer in layers_of(changed))


def test_activated_maps_allocate_nothing_more():
    """An activation that is not in place becomes so where it alone reads a convolution; no map is copied for its border."""
    mine, x = build(Block, nn.SiLU, False, False, True).eval(), make_input(1, 3, 16, 16)
    changed = with_layers(mine, x)
    with torch.no_grad(), running(Pass(range(4))), Names() as names:
        changed(x)
    assert names.count("silu_") == 2 and not {"silu", "constant_pad_nd"} & {*names}  # the other two in the kernels
    with torch.no_grad(), Names() as names:
        changed(x)
    assert names.count("silu") == 4 and names.count("constant_pad_nd") == 1


class Names(TorchDispatchMode, list):
    """The names of the operators that run."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_several_threads_at_once():
    mine, x = build(Block, nn.SiLU, False, False, True).eval(), make_input(2, 3, 32, 32)
    changed = with_layers(mine, x)

    def run(kernels) -> Tensor:
        with torch.no_grad(), running(Pass(kernels)):
            return changed(x)[2]

    expected = [run(kernels) for kernels in ((), range(4))] * 8
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(run, [(), range(4)] * 8)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_class_that_pads_by_the_size_keeps_its_way():
    class ByTheSize(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (x.shape[-1] % 2, 1) * 2), self.weight, self.bias, self.stride)

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ByTheSize(3, 4, 3, 2)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.conv(x).relu()]

    mine = build(Maps).eval()
    changed, x = with_layers(mine, make_input(1, 3, 15, 15)), make_input(1, 3, 16, 16)
    assert not layers_of(changed)
    with torch.no_grad(), running(Pass(())):
        assert torch.equal(changed(x)[0], mine(x)[0])


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


def test_a_copy_and_a_pickle_of_an_encoder_with_layers():
    mine, x = build(Block, nn.SiLU, False, False, True).eval(), make_input(1, 3, 16, 16)
    changed = with_layers(mine, x)
    assert changed.state_dict().keys() == mine.state_dict().keys()
    for other in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        with torch.no_grad(), running(Pass(range(4))):
            expected, found = changed(x), other(x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert all(layer.conv in set(other.modules()) for layer in layers_of(other))


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
