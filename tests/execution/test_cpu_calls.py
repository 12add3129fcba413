"""The CPU backend over many calls: memory, threads, weights that change, and the choice that is measured."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from support.helpers import FLOAT32, Recorder, assert_close_relative, build, make_input
from torch.utils._python_dispatch import TorchDispatchMode

import unetpp_fast as uf
from unetpp_fast.execution import dispatch, reference
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.cpu import inference, kept_operands
from unetpp_fast.execution.fused import tuning, verdicts

pytestmark = pytest.mark.skipif(not dispatch.CPU_KERNELS[0], reason=f"the CPU kernels are off: {dispatch.CPU_KERNELS[1]}")


@pytest.fixture(autouse=True)
def no_buffers():
    inference.buffers.clear()
    yield
    inference.buffers.clear()


def network(features=(8, 13, 22), **options) -> uf.Network:
    options = {"deep_supervision": True, "backend": "cpu", **options}
    return build(uf.UNetPlusPlus, 1, 1, features=features, **options).eval()


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that an operation makes, rather than returns from what it was given, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            value.untyped_storage().data_ptr()
            for value in (*args, *(kwargs or {}).values())
            if isinstance(value, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in given:
                name = func.overloadpacket.__name__
                self.largest[name] = max(self.largest.get(name, 0), value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("upsample", ["deconv", "nearest", "linear"])
@torch.no_grad()
def test_nothing_is_concatenated_upsampled_or_allocated(axes, upsample):
    topology = uf.Topology.nested(
        1, (8, 13, 22), spatial_dims=axes, all_heads=True, up_width=lambda low, level: 7 if upsample == "deconv" else low
    )
    model = build(uf.Network, topology, 1, upsample=upsample, deep_supervision=True, backend="cpu").eval()
    size = tuple(size * 4 for size in (5, 7, 3)[:axes])
    x = make_input(2, 1, *size)
    model(x)
    with Recorder() as recorder:
        model(x)
    assert not any("cat" in name or "upsample" in name or "interpolate" in name for name in recorder.operations)
    assert recorder.operations["conv"] == 2 * len(topology.nodes)
    with Allocations() as second:
        model(x)
    assert max(second.largest.values()) == x.nbytes, second.largest  # the logits


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell the resident memory")
@torch.no_grad()
def test_memory_is_flat_over_a_thousand_calls_of_changing_shapes():
    model = network(features=(2, 3))
    sizes = [(2 * rows, 2 * columns) for rows in range(2, 8) for columns in range(3, 9)]
    images = [make_input(1, 1, *size) for size in sizes]
    expected = [reference.forward(model, x)[0] for x in images]

    def calls(count: int) -> None:
        for index in range(count):
            place = 7 * index % len(images)
            assert_close_relative(model(images[place])[0], expected[place], FLOAT32)

    calls(200)
    before = resident()
    calls(1000)
    assert resident() - before < 4 * 2**20
    assert len(inference.buffers._idle) == inference.KEPT_BUFFERS


@torch.no_grad()
def test_large_buffers_do_not_pile_up(monkeypatch):
    model, images = network(), [make_input(1, 1, 8, 4 * width) for width in range(3, 6)]
    model(images[0])
    one = inference.nbytes(inference.buffers._idle[0][1])
    for bound, kept in ((one // 2, 1), (3 * one, 2)):
        monkeypatch.setattr(inference, "KEPT_BYTES", bound)
        for x in images:
            model(x)
        assert len(inference.buffers._idle) == kept
        assert inference.buffers._idle[-1][1].levels[0].shape[2:4] == (8, 20)


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_a_call_leaves_earlier_inputs_alone(channels):
    model = build(uf.UNetPlusPlus, channels, 1, features=(8, 13), backend="cpu").eval()
    images = [make_input(1, channels, 8, 12, seed=seed) for seed in range(3)]
    copies = [x.clone() for x in images]
    for x in images:
        model(x)
    assert all(torch.equal(x, copy) for x, copy in zip(images, copies, strict=True))


@torch.no_grad()
def test_threads_do_not_disturb_one_another():
    model = network()
    images = [make_input(2, 1, 16, 24, seed=seed) for seed in range(3)] + [make_input(1, 1, 40, 12)]
    expected = [model(x) for x in images]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            with torch.no_grad():
                found = model(images[index])
            if not all(torch.equal(a, b) for a, b in zip(found, expected[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(inference.buffers._idle) <= inference.KEPT_BUFFERS


@torch.no_grad()
def compare(model: uf.Network, x: torch.Tensor) -> None:
    for _ in range(2):
        assert_close_relative(model(x), reference.forward(model, x), FLOAT32)


def test_weights_may_change_in_any_way_between_calls(monkeypatch):
    model, x = network(), make_input(1, 1, 8, 12)
    packs = []
    compose = kept_operands.all_operands
    monkeypatch.setattr(kept_operands, "all_operands", lambda *args: packs.append(1) or compose(*args))

    def check(number: int) -> None:
        compare(model, x)
        assert len(packs) == number

    check(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(output.square().mean() for output in model(x)).backward()
    optimizer.step()
    check(2)
    model.nodes["x0_1"].conv2.weight.data.mul_(1.5)
    check(3)
    model.nodes["x1_0"].norm1.running_var.data += 1
    check(4)
    model.load_state_dict(network(features=(8, 13, 22)).state_dict())
    check(5)
    with torch.no_grad():
        assert_close_relative(model.prune(1)(x), model(x)[0], FLOAT32)
        model.predict(x)


def test_composed_weights_go_with_the_model():
    model = network()
    compare(model, make_input(1, 1, 8, 12))
    kept = len(kept_operands._kept)
    del model
    gc.collect()
    assert len(kept_operands._kept) < kept


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[str]:
    """Measuring as on a user's machine, with times given: reference 4 ms, kernels 2 ms; lists what is timed."""
    monkeypatch.setenv("UNETPP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    for name, empty in (("_known", {}), ("_latest", {}), ("_loaded", set()), ("_doubted", set())):
        monkeypatch.setattr(verdicts, name, empty)
    monkeypatch.setattr(tuning, "share_waited", lambda since: 0.0)  # whatever runs beside the tests
    timed: list[str] = []

    def milliseconds(run, device, rounds):
        run()
        timed.append("run")
        return 4.0 if len(timed) % 2 else 2.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    return timed


def test_auto_takes_what_was_measured_for_inference_and_for_training(measured):
    model, x = network(backend="auto"), make_input(1, 1, 8, 12)
    faster = ("cpu", "measured: the kernels take 0.50 of the reference's time")
    with torch.no_grad():
        assert dispatch.choose(Call(model, x)) == faster and len(measured) == 2
        assert dispatch.choose(Call(model, make_input(1, 1, 8, 16))) == faster and len(measured) == 2  # of one bucket
        assert dispatch.choose(Call(model, make_input(1, 1, 16, 20))) == faster and len(measured) == 4
    assert dispatch.choose(Call(model, x)) == faster and len(measured) == 6  # gradients are another pass
    verdicts._known.clear()
    verdicts._loaded.clear()
    with torch.no_grad():  # as another process does
        assert dispatch.choose(Call(model, x)) == faster and len(measured) == 6


def test_auto_keeps_the_reference_where_the_kernels_are_slower_wrong_or_fail(measured, monkeypatch):
    model, x = network(backend="auto"), make_input(1, 1, 8, 12)
    with torch.no_grad():
        monkeypatch.setattr(tuning, "milliseconds", lambda *_: 2.0)
        assert dispatch.choose(Call(model, x))[0] == "reference"
        monkeypatch.setattr(dispatch.inference, "run", lambda *args: [torch.zeros(1, 1, 8, 16) for _ in range(2)])
        assert "wrong result" in dispatch.choose(Call(model, make_input(1, 1, 16, 16)))[1]
        monkeypatch.setattr(dispatch.inference, "run", lambda *args: 1 / 0)
        assert "ZeroDivisionError" in dispatch.choose(Call(model, make_input(1, 1, 32, 16)))[1]


def test_two_processes_keep_what_both_have_measured(measured):
    """The second one read the table before the first one wrote it."""
    model = network(backend="auto")
    with torch.no_grad():
        dispatch.choose(Call(model, make_input(1, 1, 8, 12)))
        first = dict(verdicts._known)
        verdicts._known.clear()  # of a process that has not seen the first one's
        dispatch.choose(Call(model, make_input(1, 1, 16, 20)))
        verdicts._known.clear()
        verdicts._loaded.clear()
        verdicts.load(torch.device("cpu"))
    assert set(first) < set(verdicts._known) and len(verdicts._known) == 2


@torch.no_grad()
def test_a_large_image_is_measured_in_part(measured, monkeypatch):
    monkeypatch.setattr(tuning, "MEASURED_PIXELS", 16 * 16)
    call = Call(network(backend="auto"), make_input(3, 1, 40, 28))
    part = tuning._copy(call, False).x
    assert part.shape[2:].numel() <= 256 and all(size % 4 == 0 for size in part.shape[2:]) and len(part) <= 3


def test_what_the_kernels_cannot_do_runs_on_the_reference(monkeypatch):
    model, x = network(), make_input(1, 1, 8, 12)
    with torch.no_grad():
        with torch.autocast("cpu", torch.float16):
            assert "not torch.float16" in dispatch.choose(Call(model, x))[1]
        assert "not torch.float64" in dispatch.choose(Call(network().double(), x.double()))[1]
        reasons = []
        torch.func.vmap(lambda image: reasons.append(dispatch.choose(Call(model, image))[1]) or image)(x[None])
        assert "torch.func" in reasons[0]
        model.backend = "auto"
        monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
        with Recorder():
            assert dispatch.choose(Call(model, x))[0] == "reference"
        model.backend = "cpu"
    monkeypatch.setattr(dispatch, "CPU_KERNELS", (False, "there is no compiler"))
    assert dispatch.choose(Call(model, x)) == ("reference", "the CPU kernels are off: there is no compiler")
    monkeypatch.undo()
    model.nodes["x0_0"].register_forward_hook(lambda module, arguments, output: output)
    assert "hooks" in dispatch.choose(Call(model, x))[1]


@torch.no_grad()
def test_torch_compile_takes_the_operator_and_export_the_reference():
    model, x = network(), make_input(1, 1, 8, 12)
    expected = reference.forward(model, x)
    assert_close_relative(torch.compile(model, fullgraph=True, backend="eager")(x), expected, FLOAT32)
    assert_close_relative(torch.export.export(model, (x,)).module()(x), expected, FLOAT32)


@torch.no_grad()
def test_explain_names_the_backend(capsys):
    text = uf.explain(network(), make_input(1, 1, 8, 12))
    assert text == capsys.readouterr().out.strip()
    assert text.splitlines()[0].endswith("cpu (asked for)")
