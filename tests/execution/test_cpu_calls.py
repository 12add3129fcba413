"""The CPU backend over many calls: memory, threads, weights that change, and who is sent to the reference."""

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
from unetpp_fast.execution.cpu import packed_weights, passes


@pytest.fixture(autouse=True)
def no_workspaces():
    passes.workspaces.clear()
    yield
    passes.workspaces.clear()


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
            if isinstance(value, torch.Tensor) and not value.is_mkldnn
        }
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in given:
                name = func.overloadpacket.__name__
                self.largest[name] = max(self.largest.get(name, 0), value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
@torch.no_grad()
def test_nothing_is_concatenated_upsampled_or_allocated(axes, upsample):
    topology = uf.Topology.nested(
        1, (8, 13, 22), spatial_dims=axes, all_heads=True, up_width=lambda low, level: low if upsample == "nearest" else 7
    )
    model = build(uf.Network, topology, 1, upsample=upsample, deep_supervision=True, backend="cpu").eval()
    size = tuple(size * 4 for size in (5, 7, 3)[:axes])
    x = make_input(2, 1, *size)
    model(x)
    with Recorder() as recorder:
        model(x)
    assert not any("cat" in name or "upsample" in name or "interpolate" in name for name in recorder.operations)
    wide = {topology.in_width(node) for node in topology.nodes if node.column}
    columns = {size[-1] >> level for level in range(3)}
    maps = [shape for shape in recorder.shapes if len(shape) == axes + 2 and shape[0] <= 2 and shape[-1] in columns]
    assert maps and not any(shape[1] in wide for shape in maps)
    with Allocations() as second:
        model(x)
    assert second.largest.pop("_convolution_transpose_pointwise") <= passes.STRIP_BYTES  # gone before the next strip
    assert max(second.largest.values()) == x.nbytes, second.largest  # the logits


@torch.no_grad()
def test_linear_upsampling_makes_the_upsampled_map_in_kept_memory():
    model, x = network(upsample="linear"), make_input(1, 1, 20, 28)
    model(x)
    with Allocations() as second, Recorder() as recorder:
        model(x)
    assert not any("cat" in name for name in recorder.operations)
    assert max(second.largest.values()) == x.nbytes, second.largest


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
    assert len(passes.workspaces._idle) == passes.KEPT_WORKSPACES


@torch.no_grad()
def test_large_workspaces_do_not_pile_up(monkeypatch):
    model, images = network(), [make_input(1, 1, 8, 4 * width) for width in range(3, 6)]
    model(images[0])
    one = passes.workspaces._idle[0].nbytes
    for bound, kept in ((one // 2, 1), (3 * one, 2)):
        monkeypatch.setattr(passes, "KEPT_BYTES", bound)
        for x in images:
            model(x)
        assert len(passes.workspaces._idle) == kept
        assert passes.workspaces._idle[-1].sizes[0] == (8, 20)


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
    assert len(passes.workspaces._idle) <= passes.KEPT_WORKSPACES


@torch.no_grad()
def compare(model: uf.Network, x: torch.Tensor) -> None:
    for _ in range(2):
        assert_close_relative(model(x), reference.forward(model, x), FLOAT32)


def test_weights_may_change_in_any_way_between_calls(monkeypatch):
    model, x = network(), make_input(1, 1, 8, 12)
    packs = []
    pack = packed_weights.pack
    monkeypatch.setattr(packed_weights, "pack", lambda *args: packs.append(1) or pack(*args))

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


def test_packed_weights_go_with_the_model():
    model = network()
    compare(model, make_input(1, 1, 8, 12))
    kept = len(packed_weights._kept)
    del model
    gc.collect()
    assert len(packed_weights._kept) < kept


def test_auto_takes_the_cpu_backend_for_inference_alone(monkeypatch):
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    model, x = network(backend="auto"), make_input(1, 1, 8, 12)
    with torch.no_grad():
        assert "fewer than 8192 pixels" in dispatch.choose(Call(model, x))[1]
        assert dispatch.choose(Call(model, make_input(2, 1, 64, 64)))[0] == "cpu"
    monkeypatch.setattr(dispatch, "MIN_CPU_PIXELS", 0)
    assert "no gradients" in dispatch.choose(Call(model, x))[1]
    with torch.no_grad():
        assert dispatch.choose(Call(model, x))[0] == "cpu"
        assert dispatch.choose(Call(model.train(), x)) == (
            "reference",
            "the CPU backend is for inference: call model.eval()",
        )
        model.eval()
        with Recorder():
            assert dispatch.choose(Call(model, x))[0] == "reference"
        with torch.autocast("cpu", torch.float16):
            assert "not torch.float16" in dispatch.choose(Call(model, x))[1]
        assert "not torch.float64" in dispatch.choose(Call(network().double(), x.double()))[1]
        reasons = []
        torch.func.vmap(lambda image: reasons.append(dispatch.choose(Call(model, image))[1]) or image)(x[None])
        assert "torch.func" in reasons[0]
    assert model.requires_grad_(False) is model and dispatch.choose(Call(model, x))[0] == "cpu"
    model.nodes["x0_0"].register_forward_hook(lambda module, arguments, output: output)
    assert "hooks" in dispatch.choose(Call(model, x))[1]


@torch.no_grad()
def test_torch_compile_and_export_take_the_reference():
    model, x = network(), make_input(1, 1, 8, 12)
    expected = reference.forward(model, x)
    assert_close_relative(torch.compile(model, fullgraph=True, backend="eager")(x), expected, FLOAT32)
    assert_close_relative(torch.export.export(model, (x,)).module()(x), expected, FLOAT32)


@torch.no_grad()
def test_explain_names_the_backend(capsys):
    text = uf.explain(network(), make_input(1, 1, 8, 12))
    assert text == capsys.readouterr().out.strip()
    assert text.splitlines()[0].endswith("cpu (oneDNN writes into kept memory)")
