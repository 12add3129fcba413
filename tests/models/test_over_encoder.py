"""`UNetPlusPlus(encoder=...)`: which modules are encoders, deep supervision, pruning down to the encoder's stages, modes."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from support import cpu_kernels
from support.encoders import Pyramid, assert_same, by, encoded, image
from support.helpers import (
    FLOAT32,
    FLOAT64,
    Recorder,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    weighted_sum,
)
from torch import Tensor, nn
from torch.nn import functional as F

import unetpp_fast as uf
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.fused import tuning
from unetpp_fast.models.encoder_network import EncodedNetwork
from unetpp_fast.models.encoders import load_weights
from unetpp_fast.training.checkpoint import load_checkpoint, load_model
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Trainer

WIDTHS = (5, 6, 7, 4)
LEVELS = (1, 2, 3)
OPS = ["naive", pytest.param("cpu", marks=cpu_kernels.needs_library())]


def over(encoder: nn.Module | None = None, **options) -> EncodedNetwork:
    options = {"encoder_depth": 4, "decoder_channels": (8, 6, 5, 4), "deep_supervision": True, **options}
    dims = options.get("spatial_dims", 2)
    return build(lambda: uf.UNetPlusPlus(3, 2, encoder=encoder or Pyramid(3, WIDTHS, dims), **options))


def test_the_widths_are_those_of_smp():
    """Its UnetPlusPlus over resnet34 has a decoder of 4,793,792 parameters and a head of 145."""
    encoder = Pyramid(3, (64, 64, 128, 256, 512), 2)
    model = uf.UNetPlusPlus(encoder=encoder)
    assert type(model) is EncodedNetwork and model.encoder.body is encoder
    assert uf.parameter_count(model) - uf.parameter_count(encoder) == 4_793_792 + 145
    assert isinstance(copy.deepcopy(uf.UNetPlusPlus(features=(2, 3))), uf.UNetPlusPlus)


@pytest.mark.parametrize("heads", ["all", "first", "from a quarter"])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("ops", OPS)
def test_a_head_on_every_column_by_the_engine(ops, axes, heads):
    """Outputs and every gradient against the reference in float64; also where one head alone has a gradient, and over an
    encoder without a map at half the size."""
    model = encoded(axes=axes, deep_supervision=True, starts_lower=heads == "from a quarter")
    x, exact = image(model, *((1, (1, 2, 1)) if axes == 3 else (2,))), ops == "naive"
    bound = FLOAT64 if exact else 10 * FLOAT32
    if heads != "first":
        assert_same(model.double() if exact else model, x.double() if exact else x, ops, bound)
        return
    wide, found = copy.deepcopy(model).double(), []
    for net, run, values in ((wide, by("reference"), x.double()), (model, by(ops), x)):
        run(net, values)[0].square().sum().backward()
        found.append(gradients(net))
    kept = {name.replace("encoder.body.", "encoder.") for name, _ in model.prune(1).named_parameters()}
    assert set(found[0]) == kept
    assert_gradients_close({name: found[1][name] for name in found[0]}, found[0], 10 * FLOAT32)
    assert not any(value.any() for name, value in found[1].items() if name not in found[0])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_pruned_network_is_the_head_of_the_whole_on_the_first_stages(axes, train):
    model, x = over(spatial_dims=axes).train(train), make_input(2, 3, *(32, 16, 16)[:axes])
    heads = model(x)
    assert [tuple(head.shape) for head in heads] == [(2, 2, *x.shape[2:])] * 3
    whole = dict(model.named_parameters())
    for level in LEVELS:
        small = model.prune(level)
        assert torch.equal(small(x), heads[level - 1]) and small.multiple == 2 ** (level + 1)
        assert torch.equal(copy.deepcopy(small)(x), heads[level - 1])
        mine = dict(small.named_parameters())
        assert all(parameter is whole[name] for name, parameter in mine.items())
        stages = {int(name.split(".")[3]) for name in mine if name.startswith("encoder.body.convs")}
        assert stages == set(range(level + 1)) and f"heads.x0_{level}.weight" in mine
        with Recorder() as recorder:
            small(x[..., : small.multiple, : small.multiple, : small.multiple] if axes == 3 else x)
        ran = {weight for weight, _ in recorder.convolutions}
        assert len([1 for name in mine if name.endswith("conv1.weight")]) == level * (level + 1) // 2 + 1
        assert all(tuple(conv.weight.shape) in ran for conv in model.encoder.body.convs[: level + 1])
        assert not any(tuple(conv.weight.shape) in ran for conv in model.encoder.body.convs[level + 1 :])


def test_the_operations_of_pruned_networks_are_counted_as_pytorch_counts_them():
    model, size = over().eval(), (32, 48)
    for net in (model, *map(model.prune, LEVELS)):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            net(make_input(1, 3, *size))
        assert net.gflop(size) == pytest.approx(1e-9 * counter.get_total_flops())


def test_training_a_pruned_network_trains_the_whole():
    model, x = over(norm=None), make_input(2, 3, 16, 16)
    before = model(x)[0]
    small = model.prune(1)
    small(x).square().sum().backward()
    assert set(gradients(model)) == {name for name, _ in small.named_parameters()}
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    assert not torch.equal(model(x)[0], before)


def test_both_modes_of_predict(monkeypatch):
    model, x = over(), make_input(2, 3, 33, 50)
    expected = []
    with torch.no_grad():
        for level in LEVELS:
            small = copy.deepcopy(model).eval().prune(level)
            padding = [amount for side in (50, 33) for amount in (0, -side % small.multiple)]
            expected.append(small(F.pad(x, padding, mode="replicate"))[..., :33, :50].sigmoid())
    for level in LEVELS:
        assert_close_relative(model.predict(x, "fast", level), expected[level - 1], FLOAT32)
    padded = F.pad(x, (0, 14, 0, 15), mode="replicate")
    with torch.no_grad():
        heads = copy.deepcopy(model).eval()(padded)
    mean = sum(head[..., :33, :50].sigmoid() for head in heads) / 3
    assert_close_relative(model.predict(x), mean, FLOAT32)
    assert model.training and model.encoder.body.training
    with Recorder() as recorder:  # nothing beyond the head
        model.predict(make_input(1, 3, 16, 16), "fast")
    assert len([1 for _, output in recorder.convolutions.elements() if output[-1] == 16]) == 3
    with pytest.raises(ValueError, match=r"no head at level 4: this network has heads at level 1, 2, 3$"):
        model.predict(x, level=4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=cpu_kernels.needs_library())])
def test_optimized_networks_have_all_heads_levels_and_modes(backend, monkeypatch):
    ratio = 2.0 if backend == "cpu" else 0.5
    verdict = {"right": True, "backend": "cpu", "ratio": ratio, "fused_ms": 1.0, "reference_ms": ratio}
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "verdict", lambda call: verdict)
    model, x = over().eval(), make_input(1, 3, 32, 48)
    with torch.no_grad():
        heads = by("reference")(model, x)
    fast = uf.optimize(model, mode="fast")
    assert f": {backend} (" in fast.explain(x)
    for _ in range(2):
        assert_close_relative(fast.predict(x), heads[-1].sigmoid(), FLOAT32)
        assert_close_relative(fast(x), heads, FLOAT32)
    assert_close_relative(uf.optimize(model).predict(x), sum(head.sigmoid() for head in heads) / 3, FLOAT32)
    for level in LEVELS:
        assert_close_relative(uf.optimize(model, level=level)(x), heads[level - 1], FLOAT32)


class Kinds(nn.Module):
    """Maps as other libraries return them: `kind` says in what, and which."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.extra = kind, nn.Conv2d(6, 6, 1)
        self.stages = nn.ModuleList([nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((3, 4), (4, 5), (5, 6))])

    def forward(self, x: Tensor):
        maps = [x]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        if self.kind == "mixed":  # a finer map reads the coarsest one
            maps[1] = maps[1] + maps[3].mean()
        if self.kind == "hidden":  # where autograd does not see it
            maps[1] = maps[1] + maps[3].detach().mean()
        results = {
            "list": maps,
            "tuple": tuple(maps[1:]),
            "dict": OrderedDict((str(index), one) for index, one in enumerate(maps[1:])),
            "two of a size": [maps[1], maps[2] * 0, maps[2], maps[3], self.extra(maps[3])],
            "mixed": maps,
            "hidden": maps,
            "tensor": maps[-1],
            "last axis": [one.movedim(1, -1) for one in maps],
            "skips": [maps[0], maps[2], maps[3]],
        }
        return results[self.kind]


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "two of a size"])
def test_maps_of_every_kind(kind):
    model = over(Kinds(kind), encoder_depth=3)
    x = make_input(1, 3, 16, 24)
    maps = model.maps(x)
    assert [one.shape[1] for one in maps] == [4, 5, 6]
    weighted_sum(model(x)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (kind == "two of a size") == any("extra" in name for name, _ in model.named_parameters())
    assert torch.equal(model.prune(1)(x), model(x)[0]) and maps[1].any()


def test_an_encoder_whose_stages_cannot_be_told_apart_runs_as_a_whole_and_says_so():
    model, x = over(Kinds("mixed"), encoder_depth=3), make_input(1, 3, 16, 24)
    small = model.prune(1)  # all stages are needed: there is nothing to cut
    assert torch.equal(small(x), model(x)[0]) and len(list(small.encoder.parameters())) == 6

    model = over(Kinds("hidden"), encoder_depth=3)
    with pytest.warns(UserWarning, match="it runs as a whole: RuntimeError: its maps would change"):
        small = model.prune(1)
    assert torch.equal(small(x), model(x)[0])

    class Looks(Kinds):
        def forward(self, x):
            assert self.stages[2].weight.any()
            return super().forward(x)

    model = over(Looks("list"), encoder_depth=3)
    with pytest.warns(UserWarning, match="the encoder is not cut, it runs as a whole: AttributeError"):
        small = model.prune(1)
    assert torch.equal(small(x), model(x)[0])


@pytest.mark.parametrize(("options", "says"), [
    ({"encoder": Kinds("tensor")}, r"gives maps of 2x2: there is none at 1/2 of the size; set choose"),
    ({"encoder": Kinds("last axis")}, "there is none at 1/2 of the size"),
    ({"encoder": Kinds("skips"), "encoder_depth": 4}, "gives maps of 32x32, 8x8, 4x4: there is none at 1/2"),
    ({"encoder": Kinds("list"), "encoder_depth": 4}, "none at 1/16 of the size; set encoder_depth=3, or choose"),
    ({"encoder": nn.Linear(3, 4)}, "does not take an image of shape"),
    ({"encoder": 34}, "a name of timm or a module, not int"),
    ({"encoder": Kinds("list"), "encoder_depth": 1}, "encoder_depth must be an integer from 2 to 7, not 1"),
    ({"encoder": Kinds("list"), "decoder_channels": (4, 4)}, "decoder_channels must be 3 positive integers"),
    ({"encoder": Kinds("list"), "encoder_weights": "imagenet"}, "a module has its weights, or give a file"),
    ({"encoder": Kinds("list"), "encoder_weights": "nowhere.pth"}, "nowhere.pth does not exist"),
    ({"encoder": Kinds("list"), "attention": "se"}, 'attention must be None or "scse"'),
    ({"encoder": "resnet34", "spatial_dims": 3}, "timm's encoders are 2D"),
], ids=str)  # fmt: skip
def test_bad_input_is_one_clear_error(options, says):
    with pytest.raises(ValueError, match=says):
        uf.UNetPlusPlus(**{"encoder_depth": 3, **options})


def test_weights_of_an_encoder_from_a_file(tmp_path):
    encoder, path = Kinds("list"), tmp_path / "weights.pth"
    other = build(Kinds, "list", seed=5)
    state = {f"module.encoder.{name}": value for name, value in other.state_dict().items()}
    torch.save({"state_dict": {**state, "module.head.weight": torch.zeros(2)}}, path)
    load_weights(encoder, path)
    assert all(map(torch.equal, encoder.state_dict().values(), other.state_dict().values()))
    state["module.encoder.stages.1.weight"] = torch.zeros(5, 3, 3, 3)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"has 'stages.1.weight' of shape \(5, 3, 3, 3\), the encoder needs \(5, 4, 3, 3\)"):
        load_weights(encoder, path)
    torch.save({"stem.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="it holds the weights of another encoder"):
        load_weights(encoder, path)
    path.write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as a state_dict"):
        load_weights(encoder, path)


def test_a_frozen_encoder_keeps_weights_and_statistics():
    model, x = over().train().freeze_encoder(), make_input(2, 3, 16, 16)
    before = copy.deepcopy(model.encoder.state_dict())
    model.train()
    assert not model.encoder.training and not model.encoder.body.norms[0].training and model.nodes.training
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    weighted_sum(model(x)).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if not name.startswith("encoder."))
    model.freeze_encoder(False)
    assert model.encoder.training and all(parameter.requires_grad for parameter in model.parameters())


def test_the_trainer_saves_a_network_over_a_module_and_its_encoder_is_asked_for(tmp_path):
    """What no config describes is built again by who made it."""
    rng = torch.Generator().manual_seed(0)
    images, masks = torch.rand(2, 3, 32, 32, generator=rng), torch.rand(2, 2, 32, 32, generator=rng) > 0.5
    samples = [ArraySample(str(k), images[k].numpy(), masks[k].numpy()) for k in range(2)]
    model = over()
    Trainer(model, Patches(samples, 32, 1, 0), samples, Recipe(epochs=1, batch_size=2), tmp_path).fit(progress=False)
    with pytest.raises(ValueError, match=r"best.pt: this network's encoder is a module of its own"):
        load_model(tmp_path / "best.pt")
    content = load_checkpoint(tmp_path / "best.pt")
    again = EncodedNetwork.from_config(content["config"], encoder=Pyramid(3, WIDTHS, 2))
    again.load_state_dict(content["model"])
    x = make_input(1, 3, 20, 30)
    assert torch.equal(again.predict(x), model.predict(x))
    with pytest.raises(ValueError, match=r"maps of \(5, 6, 7, 9\) channels, the network was made for \(5, 6, 7, 4\)"):
        EncodedNetwork.from_config(content["config"], encoder=Pyramid(3, (5, 6, 7, 9), 2))


@pytest.mark.parametrize(("options", "says"), [
    ({"encoder": Kinds("list"), "features": (4, 8)}, "those of decoder_channels: leave features out"),
    ({"encoder_weights": "imagenet"}, "encoder_weights is for a network over an encoder: give one"),
    ({"attention": "scse"}, "attention is for a network over an encoder: give one"),
], ids=str)  # fmt: skip
def test_arguments_of_the_other_kind_of_network_are_named(options, says):
    with pytest.raises(TypeError, match=says):
        uf.UNetPlusPlus(**options)
