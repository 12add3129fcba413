"""`uf.optimize` against the model it was made from: outputs in every precision and level, saved, copied, from threads."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from support.cpu_kernels import needs_library
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, build, make_input
from torch import nn

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.deployment import engine
from unetpp_fast.execution import acceptance, dispatch, reference
from unetpp_fast.execution.fused import ops, tuning
from unetpp_fast.execution.plan import operands
from unetpp_fast.kernels import naive
from unetpp_fast.models.network import Network

LEAKY = ("leaky_relu", {"negative_slope": 0.1})
ODD_ONE = {"bias": False, "downsample": "stride", "upsample": "pixelshuffle", "act": LEAKY}  # what only peers have
OPTIONS = [
    (2, {"norm": "batch"}),
    (2, {"norm": None, "upsample": "nearest"}),
    (2, {"norm": "instance", "upsample": "linear", "act": LEAKY}),
    (3, {"norm": "batch", "upsample": ("linear", {"align_corners": True, "project": True})}),
    (3, {"norm": "instance", "upsample": "deconv", "act": LEAKY}),
]


def network(axes: int = 2, features=(4, 5, 3, 6), **options) -> uf.Network:
    options = {"deep_supervision": True, "backend": "cpu", **options}
    return build(uf.UNetPlusPlus, 2, 3, spatial_dims=axes, features=features, **options).eval()


def image(axes: int = 2, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return make_input(batch, 2, *(16, 24, 8)[:axes], seed=seed)


def as_list(outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@pytest.mark.parametrize("level", [None, 1, 2, 3])
@pytest.mark.parametrize(("axes", "options"), OPTIONS, ids=str)
def test_outputs_are_those_of_eval_mode(axes, options, level):
    model, x = network(axes, **options), image(axes)
    part = model if level is None else model.prune(level)
    fast = uf.optimize(model.train(), level=level)
    with torch.no_grad():
        expected = part.eval()(x)
    outputs = fast(x)
    assert type(outputs) is type(expected)
    assert_close_relative(as_list(outputs), as_list(expected), FLOAT32)
    assert all(not output.requires_grad for output in as_list(outputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("axes", "options"), OPTIONS, ids=str)
@torch.no_grad()
def test_every_precision_keeps_the_two_times_rule(axes, options, dtype):
    model, x = network(axes, **options), image(axes)
    exact = reference.forward(copy.deepcopy(model).double(), x.double())
    half = dtype.itemsize < 4
    with torch.autocast("cpu", dtype if half else torch.bfloat16, enabled=half):
        usual = reference.forward(copy.deepcopy(model).to(dtype) if not half else model, x if half else x.to(dtype))
    found = uf.optimize(model, dtype=dtype)(x)
    assert all(output.dtype == dtype for output in found)
    if dtype == torch.float64:  # the oracle itself, but for the batch norms that are folded
        assert_close_relative(found, exact, FLOAT64)
        return
    vectors = [[acceptance.as_vector(outputs)] for outputs in (exact, usual, found)]
    assert acceptance.disagreement(*vectors, dtype) == ""


@pytest.mark.parametrize("mode", ["accurate", "fast"])
@pytest.mark.parametrize("level", [None, 1, 3])
@pytest.mark.parametrize("size", [(16, 24), (13, 9), (1, 1)])
def test_predict_takes_any_size(size, level, mode):
    model, x = network(norm="instance"), make_input(2, 2, *size)
    expected = model.predict(x, mode=mode, level=level)
    fast = uf.optimize(model, level=level, mode=mode)
    assert_close_relative(fast.predict(x), expected, FLOAT32)
    softmax = model.predict(x, mode=mode, level=level, activation="softmax")
    assert_close_relative(fast.predict(x, activation="softmax"), softmax, FLOAT32)
    assert fast.predict(x.half()).dtype == torch.float32


def test_a_u_net_and_a_model_in_half_precision():
    model, x = build(uf.UNet, 2, 3, features=(4, 6), backend="reference").eval(), image()
    with torch.no_grad():
        assert_close_relative(uf.optimize(model)(x), model(x), FLOAT32)
        fast = uf.optimize(model.bfloat16())
        assert fast(x).dtype == torch.bfloat16
        assert next(fast.parameters()).dtype == torch.float32  # folded wide, rounded once
        assert_close_relative(fast(x), uf.optimize(model.float(), dtype=torch.bfloat16)(x), 0)


def test_autocast_counts_where_no_precision_was_asked_for():
    fast, x = uf.optimize(network()), image()
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x)[0].dtype == torch.bfloat16
    assert fast(x)[0].dtype == torch.float32


def test_the_model_may_go_on_training():
    model, x = network(), image()
    fast = uf.optimize(model)
    before = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(fast(x), before, strict=True))
    assert fast.train() is fast and not fast.network.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@needs_library()
def test_weights_are_composed_once(monkeypatch):
    calls, compose = [], engine.all_operands
    monkeypatch.setattr(engine, "all_operands", lambda *args: calls.append(1) or compose(*args))
    fast = uf.optimize(network())
    calls.clear()  # of the comparison with the model
    for _ in range(3):
        fast(image()), fast.predict(image()[..., :9])
    assert len(calls) == 1


LOAD = """
import sys, torch
sys.modules["monai"] = None
import unetpp_fast as uf
folder = sys.argv[1]
torch.set_num_threads(1)
fast, (x, outputs) = uf.load_optimized(folder + "/fast.pt"), torch.load(folder + "/values.pt", weights_only=True)
fast.network.backend = "cpu"
found = fast(x)
assert type(found) is list and all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
"""


def test_a_saved_state_dict_loads_without_the_peer(tmp_path):
    monai = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    module = build(monai.BasicUNetPlusPlus, 2, 1, 2, (8, 8, 8, 8, 8, 8), deep_supervision=True).eval()
    x = make_input(1, 1, 16, 32)
    fast = uf.optimize(module, dtype=torch.float32)
    fast.network.backend = "cpu"
    outputs = fast(x)
    with torch.no_grad():
        assert_close_relative(outputs, module(x), 10 * FLOAT32)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    torch.save((x, outputs), tmp_path / "values.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("settings", [{}, {"level": 2, "dtype": torch.bfloat16, "mode": "fast"}], ids=str)
def test_copies_and_state_dicts_give_the_same(settings, tmp_path):
    fast, x = uf.optimize(network(act=LEAKY), **settings), image()
    outputs, probabilities = as_list(fast(x)), fast.predict(x)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), uf.load_optimized(fast.state_dict())]
    for other in [*copies, uf.load_optimized(tmp_path / "fast.pt")]:
        other.network.backend = "cpu"
        assert all(torch.equal(a, b) for a, b in zip(as_list(other(x)), outputs, strict=True))
        assert torch.equal(other.predict(x), probabilities)


def test_loading_other_weights_is_noticed():
    fast, x = uf.optimize(network()), image()
    fast(x)
    other = build(uf.UNetPlusPlus, 2, 3, features=(4, 5, 3, 6), deep_supervision=True, seed=1, backend="cpu")
    fast.load_state_dict(uf.optimize(other).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fast(x), uf.optimize(other)(x), strict=True))
    with pytest.raises(ValueError, match="load_optimized"):
        fast.load_state_dict(uf.optimize(network(act=LEAKY)).state_dict())


def test_what_cannot_be_loaded_is_said(tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"no archive")
    torch.save(network().state_dict(), tmp_path / "other.pt")
    for name, message in (
        ("none.pt", "does not exist"),
        ("damaged.pt", "is not a readable"),
        ("other.pt", "not a state_dict of"),
    ):
        with pytest.raises(InputError, match=message):
            uf.load_optimized(tmp_path / name)


def test_threads_do_not_disturb_one_another():
    fast, wrong = uf.optimize(network()), []
    images = [make_input(1, 2, 8 * (1 + seed), 16, seed=seed) for seed in range(4)]
    expected = [uf.optimize(network())(x) for x in images]

    def work(index: int) -> None:
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(fast(images[index]), expected[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("axes", "options"), OPTIONS, ids=str)
@torch.no_grad()
def test_the_engine_runs_with_operands_composed_once(axes, options, dtype, monkeypatch):
    """The way of a GPU, with plain operators in place of the kernels."""
    model, x = network(axes, **options), image(axes)
    model.backend = "triton"
    monkeypatch.setattr(engine, "load_ops", lambda name: naive)
    monkeypatch.setattr(ops, "HAS_TRITON", True)
    monkeypatch.setattr(ops, "INTERPRETED", True)
    composed, compose = [], operands.node_operands
    monkeypatch.setattr(operands, "node_operands", lambda *args: composed.append(1) or compose(*args))
    fast = uf.optimize(model, dtype=dtype)
    exact = reference.forward(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        usual = reference.forward(model, x)
    for _ in range(2):
        found = fast(x)
        assert len(composed) == len(model.topology.nodes)
    vectors = [[acceptance.as_vector(outputs)] for outputs in (exact, usual, found)]
    assert acceptance.disagreement(*vectors, dtype) == ""
    assert_close_relative(uf.optimize(model, level=2, dtype=dtype)(x), found[1], 0)
    assert "triton (asked for)" in fast.explain(x)


@pytest.mark.skipif(not ops.INTERPRETED or not ops.HAS_TRITON, reason="needs Triton's interpreter")
@torch.no_grad()
def test_the_kernels_in_the_interpreter():
    model, x = network(features=(3, 4), backend="triton"), make_input(1, 2, 4, 6)
    assert_close_relative(uf.optimize(model)(x), reference.forward(model, x), FLOAT32)


@pytest.mark.parametrize("norm", [None, "batch", ("batch", {"eps": 0.1}), "instance"])
@pytest.mark.parametrize(
    "more", [{}, {"bias": False, "downsample": "stride", "upsample": "pixelshuffle", "act": LEAKY}], ids=str
)
@pytest.mark.parametrize("axes", [2, 3])
def test_what_runs_on_the_reference_has_its_batch_norms_folded(axes, more, norm):
    """What was not measured to be faster elsewhere, and what no backend runs."""
    model = build(lambda: Network.from_config({**network(axes, norm=norm).config, **more}, "reference")).eval().double()
    x, random = image(axes).double(), torch.get_rng_state()
    fast = uf.optimize(model)
    assert ": reference (" in fast.explain(x)
    with torch.no_grad():
        assert_close_relative(fast(x), model(x), FLOAT64)
    assert torch.equal(torch.get_rng_state(), random)
    kinds = {type(module) for module in fast._composed["plain",].modules()}
    assert not kinds & {nn.BatchNorm2d, nn.BatchNorm3d}


@pytest.mark.skipif(not dispatch.CPU_KERNELS[0], reason=f"the CPU kernels are off: {dispatch.CPU_KERNELS[1]}")
@pytest.mark.parametrize(("ratio", "name"), [(0.5, "reference"), (2.0, "cpu")])
def test_the_faster_of_the_kernels_and_the_reference_is_taken(ratio, name, monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "verdict", lambda call: {"right": True, "backend": "cpu", "ratio": ratio})
    model, x = network(), image()
    fast = uf.optimize(model)
    fast.network.backend = "auto"
    assert f": {name} (" in fast.explain(x)
    with torch.no_grad():
        assert_close_relative(fast(x), reference.forward(model, x), FLOAT32)


def test_odd_sizes_run_where_the_model_takes_them():
    topology = uf.Topology.nested(2, (4, 6))
    model = build(uf.Network, topology, 1, odd_sizes=True).eval()
    x = make_input(1, 2, 9, 13)
    with torch.no_grad():
        assert_close_relative(uf.optimize(model)(x), model(x), FLOAT32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "quick"}, "mode must be"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"level": 7}, "no head at level 7"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        uf.optimize(network(), **settings)


@pytest.mark.parametrize("thing", ["resnet", None, {}], ids=str)
def test_what_is_not_a_module_is_refused(thing):
    with pytest.raises(TypeError, match=f"optimize takes a module, not {type(thing).__name__}: give weights to .*convert"):
        uf.optimize(thing)


def test_wrong_inputs_are_refused():
    fast = uf.optimize(network())
    with pytest.raises(ValueError, match=r"the image is empty: expected .* got shape \(1, 2, 0, 16\)"):
        fast.predict(torch.zeros(1, 2, 0, 16))
    with pytest.raises(ValueError, match="multiple of 8"):
        fast(make_input(1, 2, 12, 16))
    with pytest.raises(TypeError, match="floating-point"):
        fast(torch.zeros(1, 2, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        fast.predict(torch.full((1, 2, 16, 16), torch.nan))
    with pytest.raises(ValueError, match="activation"):
        fast.predict(image(), activation="tanh")


@pytest.mark.parametrize("damage", ["empty", "settings", "dtype", "weights"])
def test_a_damaged_file_is_one_clear_error(tmp_path, damage):
    state = uf.optimize(uf.UNet(1, 1, features=(3, 4))).state_dict()
    extra = state["_extra_state"]
    if damage == "settings":
        state["_extra_state"] = {"unetpp_fast_optimized": extra["unetpp_fast_optimized"]}
    elif damage == "dtype":
        extra["dtype"] = "load"
    else:
        state = {"_extra_state": extra}
    path = tmp_path / "fast.pt"
    path.touch() if damage == "empty" else torch.save(state, path)
    with pytest.raises(InputError):
        uf.load_optimized(path)


def test_a_wrapped_model_is_taken_out_of_its_wrapper():
    model = uf.UNet(1, 1, features=(3, 4)).eval()
    x = make_input(1, 1, 4, 6)
    with torch.no_grad():
        assert_close_relative(uf.optimize(torch.nn.DataParallel(model))(x), model(x), FLOAT32)
