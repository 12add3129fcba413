"""Measuring kernels and passes: what is chosen, what is kept, and that a doubt goes to the reference."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import make_input
from support.measured import forget, own_store, small
from torch.utils.flop_counter import FlopCounterMode

import unetpp_fast as uf
from unetpp_fast.execution import dispatch, explanation
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators, tuning, verdicts
from unetpp_fast.execution.fused.ops import HAS_TRITON, INTERPRETED
from unetpp_fast.execution.source_hash import source_hash
from unetpp_fast.kernels import tuning as kernel_tuning

pytestmark = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton and its interpreter")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    yield from own_store(tmp_path, monkeypatch)


@pytest.fixture
def clock(monkeypatch):
    """Lets a test say how long the reference and the kernels take; nothing is timed."""
    times = {"reference": 2.0, "kernels": 1.0}
    order = []

    def milliseconds(run, device, rounds=0):
        order.append(run)
        return times["reference"] if len(order) % 2 else times["kernels"]

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(kernel_tuning, "measuring", lambda *calls: pytest.MonkeyPatch.context())
    return times


def test_auto_uses_what_was_measured_in_this_process_and_the_next(clock, cache):
    model, x = small()
    assert "unetpp_fast.tune(model, x)" in dispatch.choose(Call(model, x))[1]
    found = uf.tune(model, x, progress=False)
    assert found["inference"]["right"] and found["training"]["right"] and found["training"]["ratio"] == 2.0
    assert all(parameter.grad is None for parameter in model.parameters())
    for _ in range(2):
        assert dispatch.choose(Call(model.train(), x)) == (
            "triton",
            "measured: the kernels take 0.50 of the reference's time",
        )
        model.eval()
        with torch.no_grad():
            assert dispatch.choose(Call(model, x))[0] == "triton"
            assert dispatch.choose(Call(model, make_input(2, 1, 4, 8)))[0] == "triton"  # of one bucket with 4x6
            assert dispatch.choose(Call(model, make_input(2, 1, 4, 10)))[0] == "reference"
            assert dispatch.choose(Call(uf.UNet(1, 1, features=(3, 5)).eval(), x))[0] == "reference"
        forget()
    (path,) = cache.glob("*.json")
    assert source_hash() in path.name and set(json.loads(path.read_text())) == {"configurations", "verdicts"}


def test_auto_stays_with_a_faster_reference(clock):
    clock["reference"] = 0.5
    model, x = small()
    uf.tune(model, x, training=False, progress=False)
    with torch.no_grad():
        assert dispatch.choose(Call(model.eval(), x)) == (
            "reference",
            "measured: the kernels take 2.00 of the reference's time",
        )


@pytest.fixture
def at_first_call(monkeypatch):
    """As outside the interpreter, where the first call of a size may stop to measure."""
    monkeypatch.setattr(tuning, "may_measure", lambda x: True)


def test_auto_compares_at_the_first_call_of_a_size(clock, cache, at_first_call, capsys):
    model, x = small()
    for said in (1, 0, 0):
        assert dispatch.choose(Call(model, x)) == ("triton", "measured: the kernels take 0.50 of the reference's time")
        assert capsys.readouterr().err.count("once on this device") == said
        forget()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.nodes["x0_0"].norm1.num_batches_tracked == 0
    (path,) = cache.glob("*.json")
    assert len(json.loads(path.read_text())["verdicts"]) == 1


def test_auto_stays_with_the_reference_where_kernels_fail(clock, cache, at_first_call, monkeypatch, capsys):
    from unetpp_fast.kernels import triton_ops

    def fails(*args, **options):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(triton_ops, "pool", fails)
    model, x = small()
    for said in (1, 0):
        name, reason = dispatch.choose(Call(model, x))
        assert (name, reason) == ("reference", "the kernels failed when they were tried: RuntimeError: no compiler")
        assert capsys.readouterr().err.count("once on this device") == said
    assert model(x).shape == (2, 1, 4, 6)
    (path,) = cache.glob("*.json")
    assert not json.loads(path.read_text())["verdicts"]  # what failed may work in the next process


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_nothing_is_measured_in_the_interpreter_or_against_the_users_will(kind, monkeypatch):
    x = make_input(2, 1, 4, 6)
    assert not tuning.may_measure(x)
    if kind == "cpu":
        monkeypatch.setattr(tuning.ops, "INTERPRETED", False)
    else:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.may_measure(x) and not tuning.may_measure(x[:0])
    monkeypatch.setenv("UNETPP_FAST_MEASURE", "0")
    assert not tuning.may_measure(x)


def test_a_frozen_encoder_can_be_measured(clock):
    model, x = small()
    model.nodes["x0_0"].requires_grad_(False)
    assert uf.tune(model, x, progress=False)["training"]["right"]


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("training", [False, True])
def test_the_way_of_every_convolution_is_told(norm, training):
    model = uf.UNetPlusPlus(1, 1, features=(8, 16, 32), norm=norm, upsample="linear").train(training)
    x = make_input(2, 1, 16, 24)
    with torch.set_grad_enabled(training):
        ways = explanation._ways(Call(model, x, torch.float32), "triton")
    assert list(ways) == [node.name for node in model.topology.nodes]
    assert all("not measured" in way for pair in ways.values() for way in pair) and len(ways["x0_0"]) == 2
    kernel_tuning.table.update(dict.fromkeys(_keys_asked_for(model, x), "library"))
    assert set(sum(explanation._ways(Call(model, x, torch.float32), "triton").values(), ())) == {"library (measured)"}


def test_the_cuda_kernels_are_named_where_they_serve():
    model = uf.UNetPlusPlus(1, 1, features=(8, 16, 256), norm="batch").half()
    ways = explanation._ways(Call(model, make_input(2, 1, 16, 24).half(), torch.float16), "cuda")
    assert all("CUDA" in way for name in ("x0_0", "x0_2", "x1_1") for way in ways[name])
    assert "CUDA" in ways["x2_0"][0] and "not measured" in ways["x2_0"][1]  # 16 to 256 channels, 256 to 256


@pytest.mark.parametrize("faster", ["triton", "cuda"])
def test_the_faster_of_both_kernels_is_taken(cache, at_first_call, monkeypatch, faster):
    """Here the kernels of csrc/ are those of Triton under another name."""
    from unetpp_fast.kernels import triton_ops

    monkeypatch.setattr(operators, "load_ops", lambda name: triton_ops)
    monkeypatch.setattr(dispatch, "can_run_cuda", lambda *_: (True, ""))
    loaded = [True]
    monkeypatch.setattr(dispatch.libraries, "load", lambda kind: (loaded[0], ""))
    times = iter([4.0, 2.0 if faster == "triton" else 3.0, 4.0, 2.0 if faster == "cuda" else 3.0])
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: next(times))
    model, x = small()
    assert dispatch.choose(Call(model, x)) == (faster, "measured: the kernels take 0.50 of the reference's time")
    assert model(x).shape == (2, 1, 4, 6)
    monkeypatch.setattr(tuning, "may_measure", lambda x: False)
    loaded[0] = False
    assert dispatch.choose(Call(model, x))[0] == ("triton" if faster == "triton" else "reference")


def test_a_backend_that_fails_does_not_take_the_other_with_it(cache, at_first_call, monkeypatch):
    monkeypatch.setattr(dispatch, "can_run_cuda", lambda *_: (True, ""))
    load = operators.load_ops
    monkeypatch.setattr(operators, "load_ops", lambda name: load("missing" if name == "cuda" else name))
    times = iter([4.0, 2.0, 4.0])
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: next(times))
    model, x = small()
    assert dispatch.choose(Call(model, x))[0] == "triton"


def test_a_reference_that_does_not_fit_into_memory_leaves_the_kernels(cache, at_first_call, monkeypatch):
    def milliseconds(run, *_):
        run()
        return 1.0

    def too_large(network, inputs):
        if inputs[0].dtype != torch.float64 and inputs[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, inputs)

    forward = tuning.reference.forward
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning.reference, "forward", too_large)
    assert dispatch.choose(Call(small()[0], make_input(3, 1, 4, 6)))[0] == "triton"


def test_passes_that_compute_other_things_are_measured_separately(clock, at_first_call):
    """In eval mode gradients go through running statistics; in training mode without gradients nothing goes back."""
    model, x = small()
    keys = set()
    for training in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                call = Call(model.train(training), x)
                dispatch.choose(call)
                keys.add(tuning._key(call))
    assert len(keys) == len(verdicts._known) == 4


@pytest.fixture
def tf32():
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def test_float32_as_tf32_is_measured_separately(tf32):
    model, x = small()

    def keys(dtype: torch.dtype) -> tuple[str, str]:
        return tuning._key(Call(model, x, dtype)), kernel_tuning.key("conv", x.to(dtype), "2d", (3, 4), (1, 1, 4, 6))

    single, half = keys(torch.float32), keys(torch.float16)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert all(a != b for a, b in zip(single, keys(torch.float32), strict=True)) and half == keys(torch.float16)


def test_every_device_has_its_own_measurements(cache, monkeypatch):
    """Two GPUs in one process: neither is given the other's fastest candidate, in memory or on disk."""
    names = {0: "one GPU", 1: "another GPU"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    places = [kernel_tuning.place(torch.device("cuda", index)) for index in names]
    kernel_tuning._place.cache_clear()
    for index, place in enumerate(places):
        kernel_tuning.table[f"conv{place}"] = f"block {index}"
    monkeypatch.setattr(verdicts, "device_name", torch.cuda.get_device_name)
    verdicts._setting.cache_clear()
    for index, place in enumerate(places):
        path = verdicts.save(torch.device("cuda", index))
        assert json.loads(path.read_text())["configurations"] == {f"conv{place}": f"block {index}"}
    verdicts._setting.cache_clear()


def test_a_graph_is_compiled_by_the_verdict_of_its_device(monkeypatch):
    """A CPU's backend would not run on a GPU."""
    monkeypatch.setattr(verdicts, "setting", str)
    model, x = small()
    call = Call(model, x)
    verdicts.keep(torch.device("cuda", 0), tuning._key(call), {"backend": "cuda"})
    verdicts.keep(x.device, tuning._key(call), {"backend": "cpu"})
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert tuning.verdict(call) == {"backend": "cpu"}
    verdicts.keep(torch.device("cuda", 0), tuning._key(call), {"backend": "cuda"})
    assert tuning.verdict(call) == {"backend": "cpu"}


@pytest.mark.parametrize(("single", "said"), [(0.25, True), (1.0, False)])
def test_a_precision_that_is_slower_than_float32_says_so(clock, at_first_call, monkeypatch, single, said):
    """The kernels take 1 ms of the reference's 2; the third that is timed is float32."""
    times = iter([2.0, 1.0, single])
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: next(times))
    model, x = small()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        reason = dispatch.choose(Call(model.eval(), x))[1]
    assert reason == "measured: the kernels take 0.50 of the reference's time" + said * (
        "; float32 would take 0.25 of the faster one's"
    )


@pytest.mark.parametrize(("taken", "ratio"), [((10.0, 11.0, 12.0, 8.0), 1.25), ((10.0, 20.0), 0.5), ((20.0, 10.0), 2.0)])
def test_close_times_on_a_cpu_are_taken_twice(at_first_call, monkeypatch, taken, ratio):
    """Another program may have slowed one of them."""
    times = iter(taken)
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: next(times))
    call = Call(*small())
    dispatch.choose(call)
    assert tuning.verdict(call)["ratio"] == ratio and next(times, None) is None


def test_a_judgement_that_runs_out_of_memory_is_repeated(clock, at_first_call, monkeypatch):
    """Other tensors may have taken the memory; but not for ever, because every judgement takes time."""
    judge, judged = tuning._judge, []

    def full(*args, **options):
        judged.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, x = small()
    monkeypatch.setattr(tuning, "_judge", full)
    assert "out of memory" in dispatch.choose(Call(model, x))[1]
    monkeypatch.setattr(tuning, "_judge", judge)
    assert dispatch.choose(Call(model, x))[0] == "triton"
    monkeypatch.setattr(tuning, "_judge", full)
    judged.clear()
    for _ in range(6):
        assert dispatch.choose(Call(model, make_input(2, 1, 8, 6)))[0] == "reference"
    assert len(judged) == tuning.JUDGEMENTS


def test_nothing_is_measured_while_operators_are_counted(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = make_input(2, 1, 4, 6)
    assert tuning.may_measure(x)
    with FlopCounterMode(display=False):
        assert not tuning.may_measure(x)


def test_more_classes_than_the_head_takes_run_on_the_reference():
    model = uf.UNet(1, 65, features=(3, 4), backend="triton")
    assert "64 classes" in dispatch.choose(Call(model, make_input(1, 1, 4, 6)))[1]


def _keys_asked_for(model: uf.Network, x: torch.Tensor) -> list[str]:
    kernel_tuning._chosen.clear()
    explanation._ways(Call(model, x, torch.float32), "triton")
    return [key for key, *_ in kernel_tuning._chosen]


@pytest.mark.parametrize("training", [False, True])
def test_auto_does_not_use_kernels_that_are_wrong(clock, monkeypatch, training):
    from unetpp_fast.kernels import triton_ops

    ops = {"conv_wgrad": "wrong gradients only"} if training else {"conv": "wrong outputs"}
    for name in ops:
        right = getattr(triton_ops, name)

        def wrong(*args, right=right, **options):
            result = right(*args, **options)
            (args[0] if result is None else result).mul_(1.01)
            return result

        monkeypatch.setattr(triton_ops, name, wrong)
    model, x = small()
    found = uf.tune(model.eval() if not training else model, x, training=training, progress=False)
    assert not found["training" if training else "inference"]["right"]
    with torch.set_grad_enabled(training):
        name, reason = dispatch.choose(Call(model, x))
    assert name == "reference" and "wrong result" in reason


def test_what_cannot_run_cannot_be_tuned():
    model, x = small()
    with pytest.raises(RuntimeError, match=r"nothing to tune: .*torch\.float64"):
        uf.tune(model.double(), x.double())
    with pytest.raises(ValueError, match="does not fit"):
        uf.tune(small()[0], make_input(2, 1, 3, 3))


def test_the_clock_takes_the_median_after_a_warm_up():
    calls = []
    assert tuning.milliseconds(lambda: calls.append(1), torch.device("cpu"), rounds=5) >= 0
    assert len(calls) == 7
