"""CUDA graphs of an optimized network: which sizes are kept, what happens where capturing fails, and, on a GPU, outputs
from changing sizes, threads and streams."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build, make_input

import unetpp_fast as uf
from unetpp_fast.deployment import cuda_graphs
from unetpp_fast.execution import dispatch, reference
from unetpp_fast.execution.fused import tuning

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class FakeGraph:
    """Computes in place of replaying; `alive` counts those that were not dropped."""

    alive = 0

    def __init__(self, run, x):
        self.run, self.shape, self.done = run, x.shape, self
        FakeGraph.alive += 1

    def replay(self, x):
        assert x.shape == self.shape
        return self.run(x)

    def synchronize(self):
        FakeGraph.alive -= 1


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda_graphs, "Graph", FakeGraph)
    FakeGraph.alive = 0


@pytest.fixture
def float32_mode():
    """TF32, and afterwards what it was before."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def double(x: torch.Tensor) -> list[torch.Tensor]:
    return [2 * x]


def test_the_graphs_of_the_latest_sizes_are_kept(no_gpu):
    found = cuda_graphs.Graphs(kept=2)
    for size, alive in ((3, 1), (4, 2), (3, 2), (5, 2), (3, 2)):
        x = torch.ones(1, size)
        assert torch.equal(found.run(double, x, ("all",))[0], 2 * x)
        assert FakeGraph.alive == alive
    assert [key[-1] for key in found._graphs] == [(1, 5), (1, 3)]
    found.run(double, torch.ones(1, 3), ("one head",))
    assert [key[0] for key in found._graphs] == ["all", "one head"]


def test_a_failed_capture_is_remembered_with_its_reason(no_gpu, monkeypatch):
    """For its size alone: a larger one may not fit into memory."""
    attempts = []

    def fail(run, x):
        attempts.append(1)
        if len(x) > 2:
            return FakeGraph(run, x)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graphs, "Graph", fail)
    found = cuda_graphs.Graphs()
    for _ in range(3):
        assert found.run(double, torch.ones(2), ())[0].tolist() == [2, 2]
    assert found.reason == "2 is not captured: RuntimeError: operation not permitted" and len(attempts) == 1
    for _ in range(2):
        assert found.run(double, torch.ones(3), ())[0].tolist() == [2, 2, 2]
    assert FakeGraph.alive == 1 and len(attempts) == 2
    found.run(double, torch.ones(1), ())
    assert [line.split()[0] for line in found.reason.splitlines()] == ["2", "1"]


def test_inside_another_capture_and_without_images_nothing_is_captured(no_gpu, monkeypatch):
    found = cuda_graphs.Graphs()
    found.run(double, torch.ones(0, 4), ())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    found.run(double, torch.ones(2, 4), ())
    assert FakeGraph.alive == 0 and not found.reason


def test_the_fastest_graph_is_kept(no_gpu, monkeypatch):
    times = {"reference": 1.0, "triton": 2.0}
    measured = []

    def run(name: str):
        return lambda x: measured.append(name) or [2 * x]

    def milliseconds(launch, device):
        launch()
        return times[measured[-1]]

    monkeypatch.setattr(cuda_graphs.tuning, "milliseconds", milliseconds)
    found, runs = cuda_graphs.Graphs(), {name: run(name) for name in times}
    for _ in range(2):
        assert found.fastest(runs, torch.ones(2), ("all",)) == "reference"
    assert measured == ["reference", "triton"] and FakeGraph.alive == 1
    times["triton"] = 0.5
    for size in (3, 4, 5, 6):
        assert found.fastest(runs, torch.ones(size), ("all",)) == "triton"
    assert [(key[0], key[-1]) for key in found._graphs] == [("triton", (size,)) for size in (3, 4, 5, 6)]
    assert FakeGraph.alive == cuda_graphs.KEPT_GRAPHS

    def fail(run, x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda_graphs, "Graph", fail)
    assert found.fastest(runs, torch.ones(7), ("all",)) is None  # what was measured without graphs decides


@pytest.mark.skipif(not dispatch.CPU_KERNELS[0], reason=f"the CPU kernels are off: {dispatch.CPU_KERNELS[1]}")
@pytest.mark.parametrize("best", ["reference", "cpu"])
def test_passes_are_judged_as_they_are_captured(no_gpu, float32_mode, monkeypatch, best):
    """The CPU stands for a GPU: without graphs the reference was faster."""
    model, x = build(uf.UNetPlusPlus, 2, 3, features=(4, 6), backend="auto").eval(), make_input(1, 2, 4, 6)
    fast = uf.optimize(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(dispatch, "choose", lambda call: ("reference", "measured"))
    monkeypatch.setattr(dispatch, "_kernels", lambda call: ["cpu"])
    monkeypatch.setattr(tuning, "verdict", lambda call: {"right": True, "backend": "cpu", "ratio": 0.5})
    times = iter(2 * ([1.0, 2.0] if best == "reference" else [2.0, 1.0]))
    monkeypatch.setattr(tuning, "milliseconds", lambda run, device: run() and next(times))
    for _ in range(2):
        assert_close_relative(fast(x), reference.forward(model, x)[-1], FLOAT32)
    assert [key[0] for key in fast._graphs._graphs] == [best]
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # kernels are captured with their precision
    fast(x)
    assert [key[0] for key in fast._graphs._graphs] == [best, best]


def on_gpu(backend: str) -> uf.Network:
    model = build(uf.UNetPlusPlus, 2, 3, features=(16, 24, 33), deep_supervision=True, backend=backend)
    return model.cuda().eval()


def assert_near(found, expected) -> None:
    assert_close_relative(found, expected, 1e-2)  # TF32 on one side; the outputs of another image would be far off


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_sizes_and_batches_change_on_a_gpu(backend):
    model = on_gpu(backend)
    fast = uf.optimize(model)
    with torch.no_grad():
        for seed in range(12):
            x = make_input(1 + seed % 3, 2, 8 * (1 + seed % 5), 16, seed=seed).cuda()
            assert_near(fast(x), reference.forward(model, x))
            assert_near(fast(x), reference.forward(model, x))
    assert not fast._graphs.reason and len(fast._graphs._graphs) == cuda_graphs.KEPT_GRAPHS


@needs_gpu
def test_threads_and_streams_share_graphs_on_a_gpu():
    fast = uf.optimize(on_gpu("triton"), dtype=torch.float16)
    images = [make_input(1, 2, 64, 64, seed=seed).cuda() for seed in range(4)]
    expected = [fast(x) for x in images]
    wrong = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                if not all(torch.equal(a, b) for a, b in zip(fast(images[index]), expected[index], strict=True)):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not fast._graphs.reason
