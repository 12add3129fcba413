"""The nest over an encoder by the engine against the reference in float64: outputs and every gradient, the encoder's too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import cpu_kernels
from support.encoders import Pyramid, assert_same, by, encoded, image
from support.fused_cases import replica
from support.helpers import (
    FLOAT32,
    FLOAT64,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    weighted_sum,
)
from torch import nn
from torch.export import Dim

import unetpp_fast as uf
from unetpp_fast.execution import acceptance, dispatch
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import ops, tuning, verdicts
from unetpp_fast.execution.plan.steps import make_plan
from unetpp_fast.models.encoder_network import EncodedNetwork

LEAKY = ("leaky_relu", {"negative_slope": 0.1})
UPSAMPLES = ["nearest", "deconv", "linear", ("nearest", {"project": True}), ("linear", {"project": True})]
OPS = ["naive", pytest.param("cpu", marks=cpu_kernels.needs_library())]
KERNELS = [*cpu_kernels.KERNELS]


def check(model, ops: str, **options) -> None:
    """In float64 for the plain ops, in float32 for the kernels."""
    x = image(model, **options)
    exact = ops == "naive"
    assert_same(model.double() if exact else model, x.double() if exact else x, ops, FLOAT64 if exact else 10 * FLOAT32)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("ops", OPS)
def test_every_norm(ops, axes, norm, train):
    check(encoded(axes=axes, norm=norm, bias=norm is None, act=LEAKY).train(train), ops)


@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("ops", OPS)
def test_every_upsampling(ops, axes, upsample):
    check(encoded(axes=axes, upsample=upsample), ops)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("ops", OPS)
def test_every_depth_and_number_of_channels(ops, depth, channels):
    check(encoded(depth, channels=channels), ops)


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("ops", OPS)
def test_every_batch(ops, batch, norm):
    check(encoded(norm=norm).train(batch > 0), ops, batch=batch)


@cpu_kernels.needs_library()
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_of_a_cpu(kernel, monkeypatch):
    cpu_kernels.select(kernel, monkeypatch.setattr)
    check(encoded(), "cpu")


@pytest.mark.skipif(not (ops.HAS_TRITON and ops.INTERPRETED), reason="needs Triton and its interpreter")
@pytest.mark.parametrize("options", [{}, {"norm": "instance", "act": LEAKY}, {"norm": None, "upsample": "deconv"}], ids=str)
def test_the_triton_kernels(options):
    model = encoded(1, **options)
    assert_same(model, image(model, lowest=(1, 2, 1)), "triton", 10 * FLOAT32)


@pytest.mark.parametrize("ops", OPS)
def test_recomputed_maps(ops):
    """The inside of nodes is not kept for the backward pass."""
    model = encoded().requires_grad_(True)
    model.recompute = True
    assert model.nest.recompute
    check(model, ops)


@pytest.mark.parametrize("frozen", ["encoder", "nest"])
def test_gradients_of_one_part_alone(frozen):
    model = encoded().double()
    parts = [model.encoder] if frozen == "encoder" else [model.nodes, model.last, model.head]
    for part in parts:
        part.requires_grad_(False)
    x, found = make_input(2, 3, 16, 24, dtype=torch.float64), []
    for name in ("reference", "naive"):
        net = copy.deepcopy(model)
        weighted_sum(by(name)(net, x)).backward()
        found.append(gradients(net))
    assert found[0] and not any(name.startswith("encoder") == (frozen == "encoder") for name in found[0])
    assert_gradients_close(found[1], found[0], FLOAT64)


@cpu_kernels.needs_library()
@pytest.mark.parametrize("norm", [None, "batch"])
def test_autocast_keeps_the_two_times_rule(norm):
    model = encoded(norm=norm)
    x = image(model)
    exact, vectors = copy.deepcopy(model).double(), []
    for net, name, half in ((exact, "reference", False), (copy.deepcopy(model), "reference", True), (model, "cpu", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = by(name)(net, x if half else x.double())
        assert not half or outputs[0].dtype == torch.bfloat16
        weighted_sum([output.float() if half else output for output in outputs]).backward()
        vectors.append([acceptance.as_vector(outputs), acceptance.as_vector(list(gradients(net).values()))])
    assert acceptance.disagreement(*vectors, torch.bfloat16) == ""


def test_what_auto_measures_decides(monkeypatch, tmp_path):
    """The kernels take the nest if they are right and faster; the verdict is on the nest, whatever the encoder is."""
    monkeypatch.setenv("UNETPP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "can_run_cpu", lambda call: (True, ""))
    model, x, ran = encoded(), make_input(2, 3, 16, 24), []

    def compute(call, backend):
        ran.append(backend)
        return dispatch.reference.forward(call.network, call.inputs)

    monkeypatch.setattr(dispatch, "compute", compute)
    for ratio, name in ((2.0, "cpu"), (0.5, "reference")):
        verdict = {"backend": "cpu", "right": True, "ratio": ratio, "fused_ms": 1.0, "reference_ms": ratio}
        monkeypatch.setattr(tuning, "verdict", lambda call, verdict=verdict: verdict)
        model(x)
        assert ran.pop() == name
    monkeypatch.undo()


@cpu_kernels.needs_library()
@pytest.mark.parametrize("training", [True, False])
def test_a_measurement_checks_outputs_and_gradients_of_the_maps(training, monkeypatch):
    """The image is 64 times as large as what is checked; every map is cut alike."""
    model = encoded().train(training)
    with torch.set_grad_enabled(training):
        call = Call(*model.engine_input(make_input(1, 3, 256, 128)))
        seen = []

        def compute(call, backend):
            seen.append([tuple(x.shape[2:]) for x in call.inputs])
            return dispatch.compute(call, backend)

        verdict = tuning._judge(tuning._copy(call, training), ["cpu"], compute, rounds=1)
    assert verdict["right"] and seen[0] == [(64, 64), (32, 32), (16, 16)]

    def wrong(call, backend):
        """The values are right, and the gradients of the maps are not."""
        maps = [2 * x - x.detach() for x in call.inputs]
        return dispatch.reference.forward(call.network, maps)

    if training:
        assert not tuning._judge(tuning._copy(call, training), ["cpu"], wrong, rounds=1)["right"]


@cpu_kernels.needs_library()
def test_tune_measures_the_nest(monkeypatch, tmp_path):
    monkeypatch.setenv("UNETPP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    monkeypatch.setattr(verdicts, "_known", {})
    model, x = encoded(), make_input(2, 3, 16, 24)
    found = uf.tune(model, x, progress=False)
    assert set(found) == {"inference", "training"} and all(verdict["right"] for verdict in found.values())
    for training in (True, False):
        with torch.set_grad_enabled(training):
            call = Call(*model.train(training).engine_input(x))
            assert tuning.verdict(call) == found["training" if training else "inference"]


def test_explain_leaves_the_statistics_of_an_encoder_as_they_are():
    model = encoded().train()
    before = copy.deepcopy(dict(model.named_buffers()))
    assert any(name.startswith("encoder.") for name in before)
    uf.explain(model, make_input(2, 3, 16, 24))
    assert model.encoder.training
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=cpu_kernels.needs_library())])
def test_explain_names_what_runs_each_node(backend, monkeypatch):
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    model, x = encoded(), make_input(1, 3, 16, 24)
    model.backend = backend
    lines = uf.explain(model, x).splitlines()
    assert lines[0].startswith("1 image(s) of 16x24 pixels") and f": {backend} (asked for)" in lines[0]
    assert [line.split()[:2] for line in lines[1:]] == [[backend, f"X({i},{j})"] for i, j in (
        (1, 0), (2, 0), (1, 1), (3, 0), (2, 1), (1, 2), (0, 3),
    )]  # fmt: skip
    assert "the encoder's map" in lines[1] and "X(1,2)" in lines[-1]


def gated(axes: int = 2, starts_lower: bool = False, **options) -> EncodedNetwork:
    """With scSE gates, which squeeze 16 channels into one, and two heads."""
    widths = (16, 18, 17)[: 5 - axes]  # fewer pixels in 3D: else each image has values too near to a choice
    topology = uf.Topology.nested(
        3, widths, spatial_dims=axes, all_heads=True, widths={(0, len(widths) - 1): 19},
        up_width=lambda low_width, level: low_width,
    )  # fmt: skip
    topology = topology.without_finest_map() if starts_lower else topology
    encoder = Pyramid(3, widths, axes, starts_lower)
    return build(lambda: EncodedNetwork(encoder, topology, 16, 2, attention=True, deep_supervision=True, **options))


GATED = [
    {}, {"axes": 3, "upsample": "deconv"}, {"norm": None, "bias": True, "act": LEAKY}, {"starts_lower": True},
    {"norm": "instance", "upsample": ("linear", {"project": True})},
]  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", GATED, ids=str)
@pytest.mark.parametrize("ops", OPS)
def test_gates(ops, options, train):
    model = gated(**options).train(train)
    for last in model.lasts.values():
        last.attention1.requires_grad_(False)  # has weights, as in smp, and never runs
    check(model, ops, batch=2, lowest=(1, 2, 1))


@cpu_kernels.needs_library()
def test_explain_tells_of_gates(monkeypatch):
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    model, x = gated().eval(), make_input(1, 3, 16, 24)
    model.backend = "cpu"
    text = uf.explain(model, x)
    assert text.count("in one gated map; its output is gated by PyTorch's operators") == 3 and "reference" not in text
    with torch.no_grad():
        for mine, exact in zip(model(x), by("reference")(copy.deepcopy(model).double(), x.double()), strict=True):
            assert_close_relative(mine, exact, 10 * FLOAT32)
    model.nodes["x0_1"].attention1.register_forward_hook(lambda *_: None)
    assert "a layer was replaced, changed or given hooks: nodes.x1_1.attention1 has hooks" in uf.explain(model, x)


@cpu_kernels.needs_library()
def test_a_changed_node_is_seen(monkeypatch):
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    model, x = encoded().eval(), make_input(1, 3, 16, 24)
    model.backend = "cpu"
    nest = model.nest
    assert model.nest is nest and copy.deepcopy(model).nest is not nest
    model.nodes["x0_1"].act = nn.Tanh()
    assert "a layer was replaced" in uf.explain(model, x)
    for act in ("relu", LEAKY):
        model.nodes["x0_1"] = encoded(act=act).eval().nodes["x0_1"]
        assert model.nest is not nest and model.nest.nodes["x1_1"] is model.nodes["x0_1"]
        assert ("a layer was replaced" in uf.explain(model, x)) == (act == LEAKY)
        with torch.no_grad():
            assert_close_relative(model(x), by("reference")(model, x)[0], FLOAT32)


def test_maps_that_do_not_fit_are_one_clear_error():
    model, x = encoded(), make_input(1, 3, 16, 24)
    whole = model.encoder.forward
    for change in (lambda maps: maps[:-1], lambda maps: [*maps[:2], maps[2][:, :1], *maps[3:]]):
        model.encoder.forward = lambda x, change=change: change(whole(x))
        with pytest.raises(ValueError, match="the encoder gives maps of"):
            model(x)


def test_a_compiled_network_is_one_graph():
    model, x = encoded(norm=None, bias=True), make_input(1, 3, 16, 24)
    model.backend = "cpu"
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    found = []
    for net in (model, compiled):
        output = net(x)
        weighted_sum([output]).backward()
        found.append([output, *gradients(model if net is model else net._orig_mod).values()])
    for one, other in zip(*found, strict=True):
        assert_close_relative(one, other, FLOAT32)


def test_given_maps_take_no_room_among_first_convolutions():
    """What is kept for a backward pass: nothing of a given map but its copy."""
    model = encoded()
    plan = make_plan(model.nest.topology, model.nest.options)
    assert plan.given == (0, 5, 6, 7) and plan.widths == (4, 5 + 4 + 3, 6 + 9, 7)
    assert [step.node.position for step in plan.inputs] == [(1, 0), (2, 0), (3, 0)]
    assert plan.least_widths == (4, 5 + 4, 6 + 9, 7)  # X(1,2) may write over X(1,0): nobody reads that any more


@cpu_kernels.needs_library()
def test_a_replica_runs_on_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    model, x = encoded().eval(), make_input(1, 3, 16, 24)
    model.backend = "cpu"
    other = replica(model)
    assert "a layer was replaced" in uf.explain(other, x)
    with torch.no_grad():
        assert torch.equal(other(x), by("reference")(model, x)[0])


def test_a_network_is_pickled_without_what_it_can_make_again():
    model, x = encoded().eval(), make_input(1, 3, 16, 24)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(by("naive")(again, x)[0], by("naive")(model, x)[0])
    assert not any("nest" in name for name in model.state_dict())


def test_export_with_free_batch_and_sizes():
    model = encoded().eval()
    free = {0: Dim("batch", max=64), 2: 8 * Dim("h", max=64), 3: 8 * Dim("w", max=64)}
    program = torch.export.export(model, (make_input(3, 3, 16, 24),), dynamic_shapes=({**free},))
    for x in (make_input(2, 3, 40, 16), make_input(3, 3, 16, 24)):
        assert_close_relative(program.module()(x), model(x), FLOAT32)
