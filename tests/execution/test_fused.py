"""The engine over level buffers, with the plain-PyTorch ops in float64, against the reference: every kind of network,
every gradient. What is left for the kernels to prove is that each op does what its plain form does."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from support.fused_cases import assert_same_inference, assert_same_passes, replica, run_fused
from support.helpers import Recorder, assert_close_relative, build, gradients, make_input, weighted_sum
from support.memory import kept_bytes

import unetpp_fast as uf
from unetpp_fast.architecture.options import reduces_channels
from unetpp_fast.execution import built, dispatch, reference
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators
from unetpp_fast.execution.fused.backward import Backward
from unetpp_fast.execution.fused.forward import Forward
from unetpp_fast.execution.plan import weight_composition
from unetpp_fast.execution.plan.steps import make_plan
from unetpp_fast.kernels import naive

BOUND = 1e-9  # float64 through up to twenty layers of which each adds in another order
LEAKY = ("leaky_relu", {"negative_slope": 0.1})
UPSAMPLES = [
    "deconv",
    "nearest",
    "linear",
    ("linear", {"align_corners": True, "project": True}),
    ("nearest", {"project": True}),
]
WIDTHS = {1: (3, 5), 2: (3, 5, 4), 3: (2, 5, 3, 4), 4: (2, 3, 5, 4, 3)}


def network(kind: str = "unet++", axes: int = 2, depth: int = 2, **options) -> uf.Network:
    maker = uf.UNetPlusPlus if kind == "unet++" else uf.UNet
    options |= {"deep_supervision": True} if kind == "unet++" else {}
    return build(maker, 2, 3, spatial_dims=axes, features=WIDTHS[depth], **options).double()


def image(axes: int, depth: int, batch: int = 2, layout: str = "contiguous", smallest=(1, 3, 2)) -> torch.Tensor:
    """float64, with one pixel on one axis of the lowest level."""
    return make_input(batch, 2, *(size * 2**depth for size in smallest[:axes]), dtype=torch.float64, layout=layout)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("axes", [2, 3])
def test_every_norm_and_upsampling(axes, norm, upsample, train):
    model = network(axes=axes, norm=norm, upsample=upsample, act=LEAKY).train(train)
    assert_same_passes(model, image(axes, 2), bound=BOUND)
    assert_same_inference(model, image(axes, 2), bound=BOUND)


@pytest.mark.parametrize("upsample", ["deconv", "linear", ("nearest", {"project": True}), "nearest", "pixelshuffle",
                                      ("deconv", {"bias": False})], ids=str)  # fmt: skip
@pytest.mark.parametrize(("axes", "size"), [(2, (7, 10)), (2, (4, 9)), (3, (5, 6, 8)), (3, (4, 8, 11))])
def test_odd_sizes(axes, size, upsample):
    """A pool drops the last pixel, an up-sampled map repeats it; even sizes of the same network too."""
    up = None if reduces_channels(upsample) else lambda low, level: low
    topology = uf.Topology.nested(2, WIDTHS[2], spatial_dims=axes, all_heads=True, up_width=up)
    norm = None if upsample == "nearest" else "instance" if upsample == "deconv" else "batch"
    options = {"norm": norm, "act": LEAKY, "upsample": upsample, "odd_sizes": True, "deep_supervision": True}
    model, x = build(uf.Network, topology, 3, **options).double(), make_input(2, 2, *size, dtype=torch.float64)
    assert_same_passes(model, x, bound=BOUND)
    assert_same_inference(model.eval(), x, bound=BOUND)


NO_BIAS = {"upsample": ("deconv", {"bias": False}), "head_bias": False}


@pytest.mark.parametrize("options", [{"downsample": "stride"}, NO_BIAS, {"downsample": "stride", **NO_BIAS}], ids=str)
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("axes", [2, 3])
def test_strided_convolutions_and_no_biases(axes, norm, options):
    topology = uf.Topology.nested(2, WIDTHS[2], spatial_dims=axes, all_heads=True)
    model = build(uf.Network, topology, 3, norm=norm, act=LEAKY, deep_supervision=True, **options).double()
    assert_same_passes(model, image(axes, 2), bound=BOUND)
    model.recompute = True
    assert_same_passes(model, image(axes, 2), heads=slice(0, 1), bound=BOUND)
    assert_same_inference(model.eval(), image(axes, 2), bound=BOUND)


@pytest.mark.parametrize("kind", ["unet++", "unet"])
@pytest.mark.parametrize(("axes", "depth"), [(2, 1), (2, 3), (2, 4), (3, 1), (3, 3)])
def test_every_depth(kind, axes, depth):
    model = network(kind, axes, depth)
    assert_same_passes(model, image(axes, depth), bound=BOUND)
    assert_same_inference(model.eval(), image(axes, depth), bound=BOUND)


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_batch(batch, norm):
    model = network(norm=norm)
    assert_same_passes(model, image(2, 2, batch), bound=BOUND)
    assert_same_inference(model.eval(), image(2, 2, batch), bound=BOUND)


@pytest.mark.parametrize("layout", ["offset", "strided", "transposed", "channels_last", "expanded"])
def test_every_layout_of_the_input(layout):
    assert_same_passes(network(), image(2, 2, layout=layout), bound=BOUND)


@pytest.mark.parametrize("heads", [slice(0, 1), slice(1, 2), slice(0, 2), slice(2, 3)])
def test_gradients_from_some_heads_reach_what_they_reach(heads):
    """Parameters behind unused heads have no gradient, as in the reference, rather than one of zeros."""
    assert_same_passes(network(depth=3), image(2, 3), heads=heads, bound=BOUND)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_pruned_networks(level):
    assert_same_passes(network(depth=3).prune(level), image(2, 3), bound=BOUND)


def test_widths_that_differ_by_node():
    topology = uf.Topology.nested(
        2, (3, 4, 5), all_heads=True, widths={(0, 2): 7, (1, 1): 2}, up_width=lambda low, level: low // 2 + 1
    )
    model = build(uf.Network, topology, 2, norm="batch", deep_supervision=True).double()
    assert_same_passes(model, image(2, 2), bound=BOUND)
    assert_same_passes(
        build(uf.Network, topology, 2, norm="batch", bias=False, deep_supervision=True).double(), image(2, 2), bound=BOUND
    )


def test_some_norms_frozen_in_training():
    model = network()
    model.nodes["x1_0"].norm1.eval()
    model.nodes["x0_1"].norm2.eval()
    assert_same_passes(model, image(2, 2), bound=BOUND)
    assert_same_inference(model, image(2, 2), bound=BOUND)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_follow_the_momentum(momentum):
    model = network(norm=("batch", {"momentum": momentum, "eps": 1e-3}))
    other = copy.deepcopy(model)
    for seed in range(3):
        x = make_input(2, 2, 8, 12, seed=seed, dtype=torch.float64)
        reference.forward(model, x)
        run_fused("naive")(other, x)
    for (name, buffer), (_, found) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert_close_relative(found.double(), buffer.double(), BOUND), name


def test_gradients_accumulate_and_one_network_may_run_twice_in_a_graph():
    model = network()
    other = copy.deepcopy(model)
    x = [make_input(2, 2, 8, 12, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    for net, run in ((model, reference.forward), (other, run_fused("naive"))):
        for _ in range(2):
            (weighted_sum(run(net, x[0])) + weighted_sum(run(net, x[1]), seed=3)).backward()
    for name, gradient in gradients(model).items():
        assert_close_relative(gradients(other)[name], gradient, BOUND, floor=1.0)


def test_inputs_are_not_written():
    model, x = network(), image(2, 2)
    before = [tensor.detach().clone() for tensor in (x, *model.parameters())]
    outputs = run_fused("naive")(model, x)
    dy = [torch.ones_like(output) for output in outputs]
    torch.autograd.grad(outputs, list(model.parameters()), dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *model.parameters()), strict=True))
    assert all((gradient == 1).all() for gradient in dy)


def test_frozen_parameters_and_an_input_without_gradient():
    model, x = network(), image(2, 2)
    for parameter in model.nodes["x0_1"].parameters():
        parameter.requires_grad_(False)
    weighted_sum(run_fused("naive")(model, x)).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {
        name for name, _ in model.named_parameters() if name.startswith("nodes.x0_1.")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
def test_autocast_keeps_the_two_times_rule(norm, dtype):
    """The error against float64 is at most twice that of the reference under the same autocast."""
    exact = network(norm=norm)
    model = copy.deepcopy(exact).float()
    x = image(2, 2)
    expected = reference.forward(exact, x)
    with torch.autocast("cpu", dtype):
        usual = reference.forward(copy.deepcopy(model), x.float())
        found = run_fused("naive")(model, x.float())
    for e, u, f in zip(expected, usual, found, strict=True):
        assert f.dtype == u.dtype == dtype
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert (f.double() - e).abs().max() <= 2 * (u.double() - e).abs().max() + rounding
    weighted_sum(found).backward()
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())


def test_weights_are_composed_in_full_precision_under_autocast(monkeypatch):
    model = build(uf.UNet, 1, 1, features=(3, 4), norm=None)
    seen = []
    compose = weight_composition.first_operands

    def spy(*args):
        seen.append(compose(*args))
        return seen[-1]

    monkeypatch.setattr(weight_composition, "first_operands", spy)
    x = make_input(1, 1, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        weighted_sum(run_fused("naive")(model, x)).backward()
    expected = compose(*[model.get_parameter(f"nodes.x0_1.conv1.{key}") for key in ("weight", "bias")], 3, "phases",
                       *[model.get_parameter(f"nodes.x0_1.up.{key}") for key in ("weight", "bias")])  # fmt: skip
    composed = [found for found in seen if found.wb is not None]
    assert len(composed) == 2  # forward and backward
    for found in composed:
        assert torch.equal(found.wb, expected.wb)
    assert torch.equal(composed[0].border, expected.border)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_torch_compile_sees_one_call_each_way(norm):
    model = build(uf.UNetPlusPlus, 2, 3, features=(3, 4), deep_supervision=True, norm=norm)
    x = make_input(2, 2, 4, 6).requires_grad_()
    expected = run_fused("naive")(copy.deepcopy(model), x)
    compiled = torch.compile(lambda x: run_fused("naive")(model, x), fullgraph=True, backend="aot_eager")
    outputs = compiled(x)
    assert_close_relative(outputs, expected, 1e-6)
    (gx,) = torch.autograd.grad(weighted_sum(outputs), x)
    (expected_gx,) = torch.autograd.grad(weighted_sum(expected), x)
    assert_close_relative(gx, expected_gx, 1e-5)


@pytest.mark.parametrize("upsample", ["deconv", "linear"])
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
def test_opcheck(norm, upsample):
    model = build(uf.UNetPlusPlus, 1, 2, features=(3, 4), deep_supervision=True, norm=norm, upsample=upsample)
    norms = sum("norm" in name and name.endswith("weight") for name, _ in model.named_parameters())
    for keep in (True, False):
        tensors = [parameter.detach().requires_grad_(keep) for parameter in model.parameters()] + list(model.buffers())
        arguments = (
            [make_input(2, 1, 4, 6).requires_grad_(keep)],
            tensors,
            keep,
            model.structure.handle,
            "1" * norms,
            torch.float32,
            "naive",
            "",
            False,
        )
        torch.library.opcheck(operators.forward_op, arguments)


def record(model: uf.Network, x: torch.Tensor) -> tuple[Recorder, Recorder]:
    """What runs in a forward and a backward pass of the engine."""
    structure = model.structure
    named = operators._named(structure, [*(p.detach() for p in model.parameters()), *model.buffers()])
    modes = structure.modes("1" * len(structure.norms), True)
    with torch.no_grad():
        with Recorder() as forward:
            outputs, maps = Forward(structure.plan, naive, modes, named, x.dtype).run(x, True)
        with Recorder() as backward:
            Backward(structure.plan, naive, modes, named, x.dtype).run(maps, outputs, True)
    return forward, backward


@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
@pytest.mark.parametrize("axes", [2, 3])
def test_nothing_is_concatenated_or_upsampled(axes, upsample):
    # Widths of which no sum is another's: a prefix, a node, and what the concatenation would be.
    up = (lambda low, level: low) if upsample == "nearest" else (lambda low, level: 5)
    topology = uf.Topology.nested(1, (8, 13, 22), spatial_dims=axes, all_heads=True, up_width=up)
    model = build(uf.Network, topology, 1, upsample=upsample, deep_supervision=True)
    size = tuple(size * 4 for size in (5, 7, 3)[:axes])
    pixels = {tuple(s >> level for s in size): level for level in range(3)}
    with Recorder() as usual:
        reference.forward(model, make_input(2, 1, *size))
    assert usual.operations["cat"] == 3
    concatenated = {(n.level, topology.in_width(n)) for n in topology.nodes if n.column}
    upsampled = {(n.level, n.up_width) for n in topology.nodes if n.column}
    for recorder in record(model, make_input(2, 1, *size)):
        assert not any("cat" in name or "upsample" in name or "interpolate" in name for name in recorder.operations)
        for shape in (shape for shape in recorder.shapes if len(shape) > axes):
            level = pixels.get(shape[-1 - axes : -1])
            assert (level, shape[-1]) not in concatenated | upsampled, shape


@pytest.mark.parametrize(("upsample", "share"), [("deconv", 0.40), ("nearest", 0.40), ("linear", 0.40)])
def test_bytes_kept_for_the_backward_pass(upsample, share):
    model = build(uf.UNetPlusPlus, 1, 1, features=(8, 16, 32, 64, 128), upsample=upsample)
    x = make_input(1, 1, 64, 64)
    usual, found = kept_bytes(reference.forward, model, x), kept_bytes(run_fused("naive"), model, x)
    print(f"{upsample}: {found / usual:.3f} of the reference's {usual / 1e6:.1f} MB")
    assert found <= share * usual


def test_repeated_runs_are_equal_bit_for_bit():
    model, x = network().float(), image(2, 2).float()
    runs = []
    for _ in range(2):
        net = copy.deepcopy(model)
        outputs = run_fused("naive")(net, x)
        weighted_sum(outputs).backward()
        runs.append([*outputs, *gradients(net).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_equal_networks_share_a_structure_and_copies_keep_theirs():
    a, b, c = network(), network(), network(norm=None)
    assert a.structure is b.structure is copy.deepcopy(a).structure is not c.structure
    assert a.prune(1).structure is b.prune(1).structure is not a.structure


def test_a_plan_reads_as_text():
    text = str(make_plan(network().topology, network().options))
    assert len(text.split("\n")) == 6
    assert (
        "X(0,2) -> channels 6..8 of level 0; reads X(0,0), X(0,1) in place, 6 channels, and X(1,1) at its own resolution"
        in text
    )


@pytest.mark.parametrize(
    ("options", "x", "reason"),
    [
        ({"backend": "reference"}, torch.zeros(1, 1, 4, 4), "asked for"),
        ({"backend": "triton", "dropout": 0.5}, torch.zeros(1, 1, 4, 4), "dropout"),
        ({"backend": "triton"}, torch.zeros(1, 1, 4, 4, dtype=torch.float64), "weights are torch.float32"),
    ],
)
def test_the_reference_takes_over_and_says_why(options, x, reason):
    model = uf.UNet(1, 1, features=(3, 4), **options)
    name, why = dispatch.choose(Call(model, x))
    assert name == "reference" and reason in why


def hooked(model: uf.Network) -> uf.Network:
    model.nodes["x0_0"].register_forward_hook(lambda module, arguments, output: 2 * output)
    return model


def widened(model: uf.Network) -> uf.Network:
    model.heads["x0_1"] = torch.nn.Conv2d(3, 5, 1)
    return model


def with_other_eps(model: uf.Network) -> uf.Network:
    model.nodes["x0_0"].norm1.eps = 1.0
    return model


def normalised(model: uf.Network) -> uf.Network:
    torch.nn.utils.parametrizations.weight_norm(model.nodes["x0_0"].conv1)
    return model


@pytest.mark.parametrize(
    "change", [torch.nn.SyncBatchNorm.convert_sync_batchnorm, replica, hooked, widened, with_other_eps, normalised]
)
def test_layers_that_are_not_as_built_are_called(change):
    """What is done to a layer counts: the operators know only the parameters and the structure as it was built."""
    model, x = build(uf.UNet, 1, 1, features=(3, 4), backend="triton").eval(), make_input(1, 1, 4, 6)
    for net in (model, copy.deepcopy(model)):
        assert not built.changed(net)
    changed = change(model)
    assert "a layer was replaced" in dispatch.choose(Call(changed, x))[1]
    if change is not replica:
        assert "a layer was replaced" in dispatch.choose(Call(changed.prune(1), x))[1]
    assert_close_relative(changed(x), reference.forward(changed, x)[0], BOUND)


def test_a_topology_without_a_plan_runs_on_the_reference():
    whole = uf.Topology.nested(1, (3, 4, 5))
    nodes = [dataclasses.replace(node, prefix=(1,)) if node.position == (0, 2) else node for node in whole.nodes]
    model = uf.Network(dataclasses.replace(whole, nodes=tuple(nodes)), backend="triton")
    assert model.structure is None and "leading nodes" in dispatch.choose(Call(model, torch.zeros(1, 1, 4, 4)))[1]


def test_a_negative_slope_without_a_norm_runs_on_the_reference():
    """The sign of a stored output does not tell that of its input then; with a norm it is not asked."""
    act = ("leaky_relu", {"negative_slope": -0.1})
    model = uf.UNet(1, 1, features=(3, 4), norm=None, act=act, backend="triton")
    assert model.structure is None and "slope" in dispatch.choose(Call(model, torch.zeros(1, 1, 4, 4)))[1]
    assert_same_passes(network(act=act), image(2, 2), bound=BOUND)
