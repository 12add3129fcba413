"""The PyTorch `NestedUNet`s (pytorch-nested-unet, bigmb, UNET-ZOO), reimplemented from their known structure."""

from __future__ import annotations

import pytest
import torch
from support.convert_cases import assert_converts, assert_round_trip, assert_same_outputs
from support.fused_cases import assert_same_inference, assert_same_passes
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, build, make_input
from support.peer_models import NestedUNet

import unetpp_fast as uf
from unetpp_fast.architecture.options import ACTIVATIONS, Activation, reference_only
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.call import Call

NAMES = {False: "nested-unet", True: "unet-zoo"}


def image(size: tuple[int, int] = (32, 16)) -> torch.Tensor:
    return make_input(2, 3, *size, dtype=torch.float64)


def nested(zoo: bool = False, deep_supervision: bool = False, **options) -> NestedUNet:
    return build(NestedUNet, 2, deep_supervision=deep_supervision, zoo=zoo, seed=4, **options).double()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("deep_supervision", [True, False], ids=["4heads", "1head"])
@pytest.mark.parametrize("zoo", NAMES, ids=NAMES.get)
def test_outputs_gradients_and_round_trip(zoo: bool, deep_supervision: bool, training: bool) -> None:
    """A list with deep supervision, otherwise a tensor; UNET-ZOO's are probabilities."""
    theirs = nested(zoo, deep_supervision).train(training)
    ours = assert_converts(theirs, NAMES[zoo], image())
    outputs = ours(image())
    assert isinstance(outputs, list) == deep_supervision
    values = torch.cat([output.flatten() for output in outputs])
    assert bool(((values >= 0) & (values <= 1)).all()) == zoo


@pytest.mark.parametrize("zoo", NAMES, ids=NAMES.get)
def test_a_bare_state_dict(zoo: bool) -> None:
    theirs = nested(zoo, True).float().eval()
    ours = uf.convert(theirs.state_dict()).eval()
    assert_round_trip(theirs, ours, NAMES[zoo])
    assert_same_outputs(theirs, ours, image().float(), FLOAT32)


@pytest.mark.parametrize("zoo", NAMES, ids=NAMES.get)
def test_the_engine_runs_it(zoo: bool) -> None:
    ours = uf.convert(nested(zoo, True))
    assert dispatch.can_run_fused(Call(ours, image()), "triton") == (True, "")
    assert_same_passes(ours, image())
    assert_same_inference(ours.eval(), image())


def test_the_widths_of_both_authors() -> None:
    """32 to 512, and 64 to 1024 for bigmb: the names are the same, the widths are read from the shapes."""
    with torch.device("meta"):
        smaller = uf.convert(NestedUNet(1, features=(32, 64, 128, 256, 512)).state_dict())
        assert uf.parameter_count(smaller) == 9_163_329
        theirs = NestedUNet(1, features=(64, 128, 256, 512, 1024))
    ours = uf.convert(theirs.state_dict())
    assert uf.parameter_count(ours) == uf.parameter_count(theirs) == 36_629_633
    assert [ours.topology[i, 0].width for i in range(5)] == [64, 128, 256, 512, 1024]


def test_images_divided_by_255_twice() -> None:
    """A known mistake of its users: variances near eps, where the exact value of eps matters."""
    theirs = nested().eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1e-6)
    assert_converts(theirs, "nested-unet", image() / 255**2)
    assert_same_inference(uf.convert(theirs), image() / 255**2)


def test_another_up_sampling_in_a_fork() -> None:
    theirs = nested()
    theirs.up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    ours = assert_converts(theirs, "nested-unet", image())
    again = uf.convert(theirs.state_dict(), upsample="linear")
    assert_same_outputs(ours, again, image())
    theirs.up = torch.nn.Upsample(scale_factor=2, mode="nearest")
    assert_converts(theirs, "nested-unet", image())


def test_prune_and_predict() -> None:
    """There is no second sigmoid on probabilities."""
    theirs = nested(True, True).eval()
    ours, expected = uf.convert(theirs), theirs(image())
    assert_close_relative(ours.prune(2)(image()), expected[1], FLOAT64)
    assert_close_relative(ours.predict(image(), mode="fast", level=3), expected[2], FLOAT64)
    assert ours.predict(image((33, 50))).shape == (2, 2, 33, 50)


def replace(module: torch.nn.Module, old: type, new: torch.nn.Module) -> torch.nn.Module:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is old:
                setattr(parent, name, new)
    return module


@pytest.mark.parametrize(("old", "new", "reason"), [
    (torch.nn.ReLU, torch.nn.ELU(), "its activation is ELU"),
    (torch.nn.MaxPool2d, torch.nn.AvgPool2d(2), "its pooling is AvgPool2d"),
    (torch.nn.Upsample, torch.nn.Upsample(scale_factor=2, mode="bicubic"), "its up-sampling is Upsample"),
])  # fmt: skip
def test_forks_with_other_layers_are_refused(old: type, new: torch.nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        uf.convert(replace(nested(), old, new))


class Changed(NestedUNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flip(-1))


class Wrapped(NestedUNet):
    def forward(self, x: torch.Tensor) -> dict:
        return {"out": super().forward(x)}


@pytest.mark.parametrize(("kind", "reason"), [(Changed, "computes something else"), (Wrapped, "returns a dict")])
def test_a_class_that_computes_something_else_is_refused(kind: type, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        uf.convert(build(kind, 2))


def test_our_own_model_under_their_names() -> None:
    """A model with the structure can be written; for another, the message says what differs."""
    options = {"features": (4, 5, 6, 7, 8), "upsample": ("linear", {"align_corners": True}), "deep_supervision": True}
    mine = build(uf.UNetPlusPlus, 3, 2, **options).eval().double()
    theirs = NestedUNet(2, 3, True, (4, 5, 6, 7, 8)).double().eval()
    theirs.load_state_dict(uf.to_state_dict(mine, "nested-unet"), strict=True)
    assert_same_outputs(theirs, mine, image())
    for change, reason in (
        ({"act": "leaky_relu"}, r"its act is \('leaky_relu', .*, not \('relu'"),
        ({"upsample": "deconv"}, r"X\(0, 1\) reads 4 channels from the node below, expected 5"),
        ({"dropout": 0.5}, "its dropout is 0.5, not 0.0"),
        ({"norm": ("batch", {"eps": 1e-3})}, "its norm is .*0.001"),
        ({"norm": None}, "its norm is None"),
    ):
        other = uf.UNetPlusPlus(3, 2, **(options | change))
        with pytest.raises(ValueError, match=f"cannot be written as a NestedUNet.*{reason}"):
            uf.to_state_dict(other, "nested-unet")


def test_an_activation_added_to_the_table_converts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry in `ACTIVATIONS`: its keywords are read from the layer."""
    entry = Activation({"alpha": 1.0}, reference_only("ELUs"), layer=torch.nn.ELU)
    monkeypatch.setitem(ACTIVATIONS, "elu", entry)
    theirs = replace(nested(), torch.nn.ReLU, torch.nn.ELU(0.3))
    ours = uf.convert(theirs)
    assert ours.options["act"] == ("elu", {"alpha": 0.3})
    assert_same_outputs(theirs, ours, image())
    with pytest.raises(ValueError, match=r"its activation is Tanh; unetpp_fast has ReLU, .* and ELU"):
        uf.convert(replace(nested(), torch.nn.ReLU, torch.nn.Tanh()))
