"""What cannot be captured: the step says why and adds the same gradients. And the trainer, which captures its steps."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cuda_stubs import Watching, stubbed
from support.folders import write_nuclei
from support.helpers import build, gradients, make_input
from torch import nn
from torch.nn.modules import module as torch_module

import unetpp_fast as uf
from unetpp_fast.cli import parser
from unetpp_fast.common import cuda_graphs
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.execution import reference
from unetpp_fast.training import processes
from unetpp_fast.training.checkpoint import load_checkpoint
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Interrupted, Trainer


def network(backend: str = "reference") -> uf.Network:
    return build(uf.UNetPlusPlus, 1, 1, features=(4, 8), deep_supervision=True, backend=backend)


def batch(seed: int, images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return make_input(images, 1, 8, 8, seed=seed), (make_input(images, 1, 8, 8, seed=seed + 99) > 0).float()


def assert_same_gradients(step, x: torch.Tensor, y: torch.Tensor, change=lambda x: x) -> None:
    """A step gives the gradients of a plain one."""
    other = copy.deepcopy(step.model)  # without gradients
    step.model.zero_grad()
    step.loss(other(x), y).backward()
    step(change(x), y)
    found, expected = gradients(step.model), gradients(other)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def assert_plain(step, stubs, reason: str, change=lambda x: x) -> None:
    """Steps give the gradients of plain ones, nothing is captured, and `reason` is said."""
    for number in range(4):
        assert_same_gradients(step, *batch(number), change)
        assert step.reason == reason and not stubs.graphs


def test_without_a_gpu_steps_are_plain():
    model = network()
    step = uf.capture(model, uf.BCEDiceLoss())
    assert not step.reason  # nothing was tried yet
    step(*batch(0))
    assert step.reason == "the model is on cpu: only a GPU's work is captured"


def test_several_processes_are_not_captured(monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 2)
    model = network()
    with stubbed() as stubs:
        reason = "several processes train together: they exchange gradients by hooks, which a replay would not call"
        assert_plain(uf.capture(model, uf.BCEDiceLoss()), stubs, reason)


def test_an_input_that_needs_a_gradient_gets_it():
    model = network()
    with stubbed() as stubs:
        reason = "an input needs a gradient, which a replay would not give it"
        given = []
        step = uf.capture(model, uf.BCEDiceLoss())
        assert_plain(step, stubs, reason, change=lambda x: given.append(x.requires_grad_()) or x)
    assert all(x.grad.abs().sum() > 0 for x in given)


def forward_hook(model: nn.Module, called: list):
    return model.nodes["x0_0"].register_forward_hook(lambda *_: called.append(1))


def forward_pre_hook(model: nn.Module, called: list):
    return model.register_forward_pre_hook(lambda *_: called.append(1))


def backward_hook(model: nn.Module, called: list):
    return model.heads["x0_1"].register_full_backward_hook(lambda *_: called.append(1))


def tensor_hook(model: nn.Module, called: list):
    return model.heads["x0_1"].weight.register_hook(lambda _: called.append(1))


def accumulate_hook(model: nn.Module, called: list):
    return model.heads["x0_1"].weight.register_post_accumulate_grad_hook(lambda _: called.append(1))


def global_hook(model: nn.Module, called: list):
    return torch_module.register_module_forward_hook(lambda *_: called.append(1))


HOOKS = {
    forward_hook: "a layer (NodeModule) has hooks, which a replay would not call",
    forward_pre_hook: "a layer (UNetPlusPlus) has hooks, which a replay would not call",
    backward_hook: "a layer (Conv2d) has hooks, which a replay would not call",
    tensor_hook: "a parameter has hooks, which a replay would not call",
    accumulate_hook: "a parameter has hooks, which a replay would not call",
    global_hook: "there are hooks for all modules, which a replay would not call",
}


@pytest.mark.parametrize("make", HOOKS, ids=lambda make: make.__name__)
def test_hooks_are_called_at_every_step(make):
    """Also those that are registered when graphs are there already; without them steps are captured again."""
    model, called = network(), []
    with stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss())
        for number in range(4):
            step(*batch(number))
        hook = make(model, called)
        before = len(stubs.log)
        for number in range(3):
            called.clear()
            step(*batch(number))
            assert called and step.reason == HOOKS[make] and len(stubs.log) == before
        hook.remove()
        called.clear()
        for number in range(3):
            step(*batch(number))
        assert stubs.log[-1] == ("replay", "main") and not called and not step.reason


def test_data_parallel_is_not_captured():
    model = network()
    with stubbed() as stubs:
        reason = "DataParallel exchanges gradients by hooks, which a replay would not call"
        assert_plain(uf.capture(nn.DataParallel(model), uf.BCEDiceLoss()), stubs, reason)


class ReadsBack(nn.Module):
    """A loss that reads a value back, for batches of three images alone."""

    def forward(self, outputs, target):
        loss = uf.BCEDiceLoss()(outputs, target)
        return loss * (2.0 if len(target) == 3 and float(loss.detach()) > 1e9 else 1.0)


def test_a_failed_capture_turns_its_size_alone_off():
    reason = "3x1x8x8 is not captured: RuntimeError: operation not permitted when stream is capturing"
    with Watching(), stubbed() as stubs:
        step = uf.capture(network(), ReadsBack())
        for images in (3, 3, 2, 2, 2, 3, 3, 2, 3):
            assert not step.reason or stubs.graphs
            assert_same_gradients(step, *batch(images, images))
        assert step.reason == reason
    assert [entry[0] for entry in stubs.log if entry[0] != "wait"] == ["capture", "replay", "capture", "replay"]
    assert len(stubs.graphs) == 1


def test_a_broken_capture_keeps_gradients_and_the_current_stream():
    """The end of a broken capture raises an error of its own and leaves its stream current, as torch's does."""
    model = network()
    with stubbed() as stubs:
        step = uf.capture(model, ReadsBack())
        for number in range(2):
            step(*batch(number, 3))
        stubs.broken = RuntimeError("the capture was invalidated")
        expected = gradients(model)
        other = copy.deepcopy(model)
        ReadsBack()(other(batch(2, 3)[0]), batch(2, 3)[1]).backward()
        step(*batch(2, 3))
        found = gradients(model)
        assert all(torch.equal(found[name], expected[name] + value) for name, value in gradients(other).items())
        assert "operation not permitted" in step.reason and stubs.current is stubs.main
        with pytest.raises(RuntimeError, match="the capture was invalidated"):
            cuda_graphs.capture(lambda: None, torch.cuda.Stream(None))
        assert stubs.current is stubs.main


def test_recomputing_is_captured_where_it_can_be(monkeypatch):
    for backend in ("cpu", "reference"):
        model = network(backend)
        model.recompute = True
        with stubbed() as stubs, pytest.MonkeyPatch.context() as patch:
            step = uf.capture(model, uf.BCEDiceLoss())
            if backend == "cpu":
                for number in range(4):
                    step(*batch(number))
                assert len(stubs.graphs) == 1 and not step.reason
                continue
            patch.setattr(torch.Tensor, "is_cuda", True)  # what the reference asks before it recomputes
            for number in range(4):
                step(*batch(number))
        why = "PyTorch reads random states back to recompute a node, which no CUDA graph can hold"
        assert not stubs.graphs and step.reason == f"2x1x8x8 is not captured: RuntimeError: {why}"


def test_an_empty_batch_and_a_step_inside_another_capture_are_plain(monkeypatch):
    model = build(uf.UNetPlusPlus, 1, 1, features=(4, 8), norm=None, backend="reference")
    with stubbed() as stubs:
        step = uf.capture(model, lambda outputs, y: outputs.sum())
        for _ in range(4):
            step(*batch(0, 0))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(4):
            step(*batch(0))
    assert not stubs.log and not step.reason


EVERYTHING = {"optimizer": "sgd", "schedule": "poly", "warm_up": 1.5, "clip": 0.5, "ema": 0.9}


def make_trainer(out: Path | None = None, backend: str = "reference", **recipe) -> Trainer:
    """A trainer of a tiny network on four images of blobs; batches of three images and a last one of two."""
    network = build(uf.UNetPlusPlus, 1, 1, features=(4, 8), dropout=0.2, deep_supervision=True, backend=backend)
    images = [make_input(1, 24, 24, seed=seed).numpy() for seed in range(5)]
    samples = [ArraySample(f"image {k}", image, (image > 0.3).astype(np.float32)) for k, image in enumerate(images)]
    patches = Patches(samples[:4], 16, per_image=2, seed=0)
    torch.manual_seed(0)
    return Trainer(network, patches, samples[4:], Recipe(**{"epochs": 3, "batch_size": 3, **recipe}), out)


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "log.csv").read_text() == (other / "log.csv").read_text()
    a, b = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"] | b["model"])
    assert all(torch.equal(value, b["ema"][key]) for key, value in a.get("ema", {}).items())
    assert (
        a["scaler"] == b["scaler"]
        and a.get("schedule") == b.get("schedule")
        and torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    )
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("recipe", "graphs"),
    [({}, 2), ({"accumulate": 2, **EVERYTHING}, 3), ({"dtype": "bfloat16"}, 2), ({"dtype": "float16"}, 2)],
    ids=["float32", "accumulate", "bfloat16", "float16"],
)
def test_the_trainer_captures_its_steps_by_itself(tmp_path, recipe, graphs):
    """With dropout, and two sizes; accumulated, micro-batches of two and one, and of one and one."""
    with Watching():
        make_trainer(tmp_path / "plain", **recipe).fit(progress=False)
        with stubbed() as stubs:
            trainer = make_trainer(tmp_path / "captured", **recipe)
            trainer.fit(progress=False)
    assert len(stubs.graphs) == graphs and not trainer.train_step.reason
    assert_same_run(tmp_path / "plain", tmp_path / "captured")


def test_a_captured_run_resumes_exactly(tmp_path):
    with Watching():
        make_trainer(tmp_path / "plain", epochs=4).fit(progress=False)
        with stubbed() as stubs:
            broken = make_trainer(tmp_path / "captured", epochs=4)
            run = broken.train_step.run

            def stop_at(*images):
                broken._stop = (broken.epoch, broken.step) == (1, 1)
                return run(*images)

            broken.train_step.run = stop_at
            with pytest.raises(Interrupted):
                broken.fit(progress=False)
            assert len(stubs.graphs) == 1
            resumed = make_trainer(tmp_path / "captured", epochs=4)
            torch.manual_seed(99)
            resumed.resume()
            resumed.fit(progress=False)
    assert len(stubs.graphs) == 3  # both sizes anew
    assert_same_run(tmp_path / "plain", tmp_path / "captured")


def test_the_trainer_says_once_why_steps_are_not_captured(monkeypatch, capsys):
    for reason in ("", "several processes train together"):
        with stubbed(), contextlib.ExitStack() as stack:
            trainer = make_trainer()
            if reason:
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                    type(trainer.train_step), "reason", property(lambda _, reason=reason: reason)
                )
            trainer.fit()
        text = capsys.readouterr().out
        assert text.count("not as CUDA graphs") == bool(reason) and (not reason or f"graphs: {reason}" in text)
    make_trainer().fit()
    assert "CUDA graphs" not in capsys.readouterr().out  # on a CPU nobody expects them


def test_a_recipe_turns_capturing_off(tmp_path):
    with stubbed() as stubs:
        trainer = make_trainer(tmp_path, capture=False)
        trainer.fit(progress=False)
        assert not stubs.log and trainer.train_step.reason == "not asked for"
        make_trainer(tmp_path, epochs=4).resume()  # which a resumed run may change


@pytest.mark.parametrize(
    ("options", "captured", "says"),
    [((), True, False), (("--no-capture",), False, False), (("--max-memory", "5M"), False, True)],
    ids=["default", "no-capture", "max-memory"],
)
def test_the_command_captures_unless_memory_is_limited(tmp_path, capsys, options, captured, says):
    folder = write_nuclei(tmp_path / "data", count=3)
    command = ("train", "--data", folder, "--out", tmp_path / "out", "--features", "4,8", "--patch", "32", "--epochs", "1")
    with stubbed():
        assert parser.main([*map(str, command), "--device", "cpu", *options]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["capture"] is captured
    assert ("--max-memory: steps are computed kernel by kernel" in capsys.readouterr().out) == says


def test_the_reference_recomputes_outside_of_captures():
    """The error of a capture is not raised elsewhere."""
    model = network()
    model.recompute = True
    reference.forward(model, batch(0)[0])[-1].sum().backward()
    assert model.heads["x0_1"].bias.grad is not None
