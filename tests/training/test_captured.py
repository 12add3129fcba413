"""Training steps as CUDA graphs, with stubs for the GPU (`support/cuda_stubs.py`): a captured training gives the weights of
a plain one bit for bit, and changed layers are noticed."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.cuda_stubs import Watching, stubbed
from support.helpers import build, gradients, make_input
from torch import nn

import unetpp_fast as uf
from unetpp_fast.training import captured

BACKENDS = ["reference", "cpu"]
OPTIONS = {"features": (4, 8), "deep_supervision": True}


def network(backend: str = "reference", **options) -> uf.Network:
    return build(uf.UNetPlusPlus, 1, 1, backend=backend, **{**OPTIONS, **options})


def batch(seed: int, images: int = 2, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return make_input(images, 1, size, size, seed=seed), (make_input(images, 1, size, size, seed=seed + 99) > 0).float()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


def train(model: nn.Module, step, optimizer, *, steps: int = 8, amp=None, scaler=None, clip=0.0, schedule=None, every=1):
    """The losses and weights of a training, by whatever adds gradients; batches of two images and, now and then, three."""
    torch.manual_seed(1)
    losses = []
    for number in range(steps):
        x, y = batch(number, 3 if number % 3 == 0 else 2)
        if number % every == 0:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", amp) if amp else contextlib.nullcontext():
            losses.append(step(x, y))
        if (number + 1) % every:
            continue
        if clip:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if schedule:
            schedule.step()
    return {"losses": torch.stack(losses), **model.state_dict()}


def plain_step(model: nn.Module, loss: nn.Module, scaler=None):
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = loss(model(x), y)
        with torch.autocast("cpu", enabled=False):
            (scaler.scale(value) if scaler else value).backward()
        return value.detach()

    return step


CASES = {
    "plain": ({}, {}),
    "dropout": ({"dropout": 0.3}, {}),
    "instance": ({"norm": "instance"}, {}),
    "autocast": ({}, {"amp": torch.bfloat16}),
    "clipped": ({}, {"clip": 0.1}),
    "scheduled": ({}, {"scheduled": True}),
    "scaled": ({}, {"amp": torch.bfloat16, "scaled": True, "clip": 0.1}),
    "accumulated": ({}, {"every": 3, "steps": 12}),
}


@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, backend) for case in CASES for backend in BACKENDS if backend == "reference" or case != "dropout"],
)
def test_a_captured_training_gives_the_weights_of_a_plain_one(case, backend):
    options, how = CASES[case]
    how, results = dict(how), []
    scheduled, scaled = how.pop("scheduled", False), how.pop("scaled", False)
    for is_captured in (False, True):
        model, loss = network(backend, **options), uf.BCEDiceLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2) if scaled else None
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if scheduled else None
        with Watching(), stubbed() as stubs:
            step = uf.capture(model, loss, scaler=scaler) if is_captured else plain_step(model, loss, scaler)
            results.append(train(model, step, optimizer, scaler=scaler, schedule=schedule, **how))
        assert len(stubs.graphs) == 2 * is_captured and not (is_captured and step.reason)
        if scaled:
            assert scaler.get_scale() == 2.0**12  # which the graphs read anew
    assert_equal(results[1], results[0])


def test_what_is_captured_and_replayed_and_where():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss())
        for number in range(5):
            optimizer.zero_grad()
            step(*batch(number))
            optimizer.step()
    beside = [("wait", "side 1", "main"), ("wait", "main", "side 1")]
    assert stubs.log == [*beside, *beside, ("capture", "side 1"), *3 * [("replay", "main")]]
    (graph,) = stubs.graphs
    names = [func.overloadpacket.__name__ for func, *_ in graph.operators]
    convolutions = sum(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in model.modules())
    assert names.count("convolution") == names.count("convolution_backward") == convolutions == 8
    assert not any("addcdiv" in name or "sqrt" in name for name in names)  # the optimizer's step is outside
    assert stubs.modes == ["thread_local"]  # threads that load images go on


def test_sizes_share_one_pool_and_one_stream():
    model = network()
    with stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss())
        for images in 3 * (1, 2, 3):
            model.zero_grad()
            step(*batch(images, images))
    assert len(stubs.graphs) == 3 and {graph.pool() for graph in stubs.graphs} == {stubs.graphs[0]}
    assert [entry for entry in stubs.log if entry[0] == "capture"] == 3 * [("capture", "side 1")]


def test_steps_that_differ_in_more_than_their_size_have_graphs_of_their_own():
    model = build(uf.UNetPlusPlus, 2, 1, **OPTIONS)
    inputs = {name: make_input(2, 2, 8, 8, layout=name) for name in ("contiguous", "strided", "channels_last")}
    y = batch(0)[1]
    with stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss())
        for case in 4 * [*inputs, "autocast", "precise"]:
            torch.backends.cudnn.conv.fp32_precision = "ieee" if case == "precise" else "tf32"
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
                step(inputs.get(case, inputs["contiguous"]), y)
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert len(stubs.graphs) == 4 and not step.reason  # strided images are copied into contiguous ones
    images = [graph.operators[0][1][0] for graph in stubs.graphs]
    assert [image.is_contiguous() for image in images] == [True, False, True, True]


class Layouts(nn.Module):
    """Notes whether its inputs are contiguous, in a list that stays the same object."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x: torch.Tensor):
        self.seen.append(x.is_contiguous())
        return self.model(x)


def test_real_steps_and_the_captured_one_see_the_same_layout():
    model = Layouts(network())
    with stubbed():
        step = uf.capture(model, uf.BCEDiceLoss())
        for _ in range(4):
            step(make_input(2, 1, 8, 8, layout="strided"), batch(0)[1])
    assert model.seen == [True, True, True]  # a replay calls no layer


def test_the_backward_pass_is_outside_of_autocast():
    seen = []

    def loss(outputs, y):
        value = uf.BCEDiceLoss()(outputs, y)
        value.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        seen.append(torch.is_autocast_enabled("cpu"))
        return value

    with stubbed(), torch.autocast("cpu", torch.bfloat16):
        step = uf.capture(network(), loss)
        for number in range(4):
            step(*batch(number))
    assert seen == 3 * [True, False]


def test_gradients_are_static_tensors_that_come_back_after_zero_grad():
    model = network()
    model.nodes["x1_0"].requires_grad_(False)
    with stubbed():
        step, seen = uf.capture(model, uf.BCEDiceLoss()), []
        for number in range(5):
            model.zero_grad(set_to_none=True)
            assert all(parameter.grad is None for parameter in model.parameters())
            step(*batch(number))
            expected = gradients_of(copy.deepcopy(model), *batch(number))
            assert_equal(gradients(model), expected)
            seen.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(a is b for a, b in zip(seen[2], seen[4], strict=True))
    assert not any(parameter.grad is not None for parameter in model.nodes["x1_0"].parameters())


def gradients_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: nn.Module | None = None) -> dict:
    model.zero_grad()
    (loss or uf.BCEDiceLoss())(model(x), y).backward()
    return gradients(model)


def test_gradients_that_were_not_zeroed_are_added_to():
    """Those of a replay too, which the next one writes over, and whether it is of the same size or another."""
    model, other = network(norm=None), network(norm=None)
    with Watching(), stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss())
        for number, images in enumerate([2, 2, 2, 2, 3, 3, 3, 2, 2]):
            step(*batch(number, images))
            plain_step(other, uf.BCEDiceLoss())(*batch(number, images))
            assert_equal(gradients(model), gradients(other))
    assert len(stubs.graphs) == 2 and not step.reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_of_buffers_tell_of_a_replay(backend):
    model = network(backend)
    with stubbed():
        step = uf.capture(model, uf.BCEDiceLoss())
        for _ in range(3):
            step(*batch(0))
        before = {name: buffer._version for name, buffer in model.named_buffers()}
        values = {name: buffer.clone() for name, buffer in model.named_buffers()}
        step(*batch(1))
    assert before and all(buffer._version > before[name] for name, buffer in model.named_buffers())
    assert not any(torch.equal(buffer, values[name]) for name, buffer in model.named_buffers())


def test_casts_that_autocast_keeps_stay_out_of_graphs():
    """Inside one autocast, which keeps the casts of the first step for the whole of it."""
    results = []
    for is_captured in (False, True):
        model, loss = network(), uf.BCEDiceLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Watching(), stubbed() as stubs, torch.autocast("cpu", torch.bfloat16):
            model(batch(0)[0])
            step = uf.capture(model, loss)
            for number in range(6):
                optimizer.zero_grad()
                if is_captured:
                    step(*batch(number))
                else:
                    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                        plain_step(model, loss)(*batch(number))
                optimizer.step()
            assert torch.is_autocast_cache_enabled()
        results.append(model.state_dict())
    assert len(stubs.graphs) == 1
    assert_equal(results[1], results[0])


def test_inputs_are_copied_without_waiting():
    model = network()
    with stubbed():
        step = uf.capture(model, uf.BCEDiceLoss())
        for number in range(3):
            step(*batch(number))
        with Watching() as watching:
            step(*batch(3))
    copies = [(tuple(args[0].shape), args[2:]) for func, args in watching.calls if func is torch.ops.aten.copy_.default]
    assert copies[:2] == 2 * [((2, 1, 8, 8), (True,))]  # the image and the mask; `non_blocking`


def test_so_many_sizes_are_kept_until_one_is_idle(monkeypatch):
    monkeypatch.setattr(captured, "IDLE_STEPS", 6)
    model = network(norm=None)
    with stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss(), kept=2)
        for images in (1, 1, 1, 2, 2, 2, 3, 3, 3):
            step(*batch(images, images))
        assert len(stubs.graphs) == 2
        assert step.reason == "steps of more than 2 sizes take turns: only 2 of them are captured"
        model.zero_grad()
        step(*batch(0, 3))
        assert_equal(gradients(model), gradients_of(copy.deepcopy(model), *batch(0, 3)))
        assert len(stubs.graphs) == 3 and not step.reason  # in the place of the first size
        assert stubs.graphs[2].pool() is stubs.graphs[0]
        step(*batch(0, 1))
        assert len(stubs.graphs) == 3
    with pytest.raises(ValueError, match="kept must be at least 1, not 0"):
        uf.capture(model, uf.BCEDiceLoss(), kept=0)
    with pytest.raises(TypeError, match="capture takes a module, not OrderedDict"):
        uf.capture(model.state_dict().copy(), uf.BCEDiceLoss())


class Settings(nn.Module):
    """A loss with a number that a graph fixes, and a count of its calls if asked for."""

    def __init__(self, counts: bool = False):
        super().__init__()
        self.factor, self.counts, self.calls = 1.0, counts, 0

    def forward(self, outputs, target):
        self.calls += self.counts
        return self.factor * uf.BCEDiceLoss()(outputs, target)


def replace_head(model: uf.Network, loss: Settings) -> None:
    model.heads["x0_1"] = copy.deepcopy(model.heads["x0_1"])


def replace_parameter(model: uf.Network, loss: Settings) -> None:
    model.heads["x0_1"].bias = nn.Parameter(torch.zeros(1))


def swap_memory(model: uf.Network, loss: Settings) -> None:
    model.heads["x0_1"].weight.data = 2 * model.heads["x0_1"].weight.data


def freeze(model: uf.Network, loss: Settings) -> None:
    model.nodes["x0_0"].requires_grad_(False)


def stop_statistics(model: uf.Network, loss: Settings) -> None:
    model.nodes["x0_0"].norm1.eval()


def set_factor(model: uf.Network, loss: Settings) -> None:
    loss.factor = 0.25


@pytest.mark.parametrize(
    "change", [replace_head, replace_parameter, swap_memory, freeze, stop_statistics, set_factor], ids=lambda f: f.__name__
)
def test_changed_layers_are_captured_anew(change):
    model, loss = network(), Settings()
    with Watching(), stubbed() as stubs:
        step = uf.capture(model, loss)
        for number in range(4):
            step(*batch(number))
        change(model, loss)
        for number in range(4, 8):
            model.zero_grad()
            expected = gradients_of(copy.deepcopy(model), *batch(number), loss)
            step(*batch(number))
            assert_equal(gradients(model), expected)
            assert len(stubs.graphs) == 1 + (number >= 6) and not step.reason


def test_a_change_now_and_then_is_no_reason():
    model = network()
    with stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss())
        for number in range(9):
            if number in (3, 6):
                model.nodes["x0_0"].requires_grad_(number == 6)
            step(*batch(number))
            assert not step.reason
    assert len(stubs.graphs) == 3


def test_equal_settings_and_evaluation_in_between_are_no_change():
    model, loss = network(), Settings()
    with stubbed() as stubs:
        step = uf.capture(model, loss)
        for number in range(6):
            step(*batch(number))
            model.eval().predict(batch(number)[0])
            model.train()
            loss.factor = float("1.0")
            model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert len(stubs.graphs) == 1 and len([entry for entry in stubs.log if entry[0] == "replay"]) == 4


def test_layers_that_change_at_every_step_are_not_captured():
    model, loss = network(), Settings(counts=True)
    with stubbed() as stubs:
        step = uf.capture(model, loss)
        for number in range(6):
            step(*batch(number))
    assert loss.calls == 6 and not stubs.graphs
    assert len({name for entry in stubs.log for name in entry if "side" in name}) == 1  # whose memory is used again
    assert step.reason.startswith("layers, their attributes or tensors change between steps")


def test_what_no_attribute_shows_is_captured_anew_when_asked():
    model, factors = network(), [1.0]
    with stubbed() as stubs:
        step = uf.capture(model, lambda outputs, y: factors[0] * uf.BCEDiceLoss()(outputs, y))
        values = []
        for number in range(6):
            values.append(step(*batch(0)))
            if number == 3:
                factors[0] = 0.0
            if number == 4:
                step.forget()
    assert [float(value) > 0 for value in values] == [True, True, True, True, True, False] and len(stubs.graphs) == 1
