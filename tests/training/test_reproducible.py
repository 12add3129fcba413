"""Training image by image: the gradients are right, with the same bits for any order of images and any threads."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from support.folders import write_nuclei
from support.helpers import (
    FLOAT64,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    weighted_sum,
)
from torch.nn.utils import parametrizations

import unetpp_fast as uf
from unetpp_fast.cli import parser
from unetpp_fast.common.errors import InputError
from unetpp_fast.execution.batch_statistics import SyncedBatchNorm2d
from unetpp_fast.training import reproducible
from unetpp_fast.training.losses import BCEDiceLoss
from unetpp_fast.training.recipe import Recipe

WIDTHS = (3, 5, 4)
OPTIONS = {
    "batch": {},
    "instance": {"norm": "instance"},
    "instance, plain": {"norm": ("instance", {"affine": False})},
    "no norm": {"norm": None},
    "average": {"norm": ("batch", {"momentum": None})},
    "nearest": {"upsample": ("nearest", {"project": True}), "act": ("leaky_relu", {"negative_slope": 0.1})},
    "linear": {"upsample": "linear"},
    "shuffled": {"upsample": "pixelshuffle"},
    "deconv without bias": {"upsample": ("deconv", {"bias": False})},
}


def network(axes: int = 2, widths: tuple[int, ...] = WIDTHS, **options) -> uf.Network:
    options = {"spatial_dims": axes, "features": widths, "deep_supervision": True, **options}
    return build(uf.UNetPlusPlus, 2, 2, **options).train()


def step(model: uf.Network, x: torch.Tensor) -> dict:
    x = x.clone().requires_grad_()
    outputs = model(x)
    weighted_sum(outputs).backward()
    outputs = [head.detach() for head in outputs]
    return {"outputs": outputs, "input": x.grad, "gradients": gradients(model), "buffers": dict(model.named_buffers())}


def step_of_images(model: uf.Network, x: torch.Tensor) -> dict:
    with reproducible.each_image(model):
        return step(model, x)


def assert_same_step(actual: dict, expected: dict) -> None:
    for key in ("outputs", "input"):
        assert_close_relative(actual[key], expected[key], FLOAT64)
    assert_gradients_close(actual["gradients"], expected["gradients"], FLOAT64)
    for name, buffer in expected["buffers"].items():
        assert_close_relative(actual["buffers"][name].double(), buffer.double(), FLOAT64)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("axes", [2, 3])
def test_the_gradients_are_those_of_the_whole_batch(axes, name):
    model = network(axes, **OPTIONS[name]).double()
    x = make_input(3, 2, *(8, 12, 4)[:axes], dtype=torch.float64)
    assert_same_step(step_of_images(copy.deepcopy(model), x), step(model, x))


@pytest.mark.parametrize("case", ["recomputed", "frozen norm", "frozen weights", "one image", "no image", "channels last"])
def test_special_cases(case):
    model = network(norm="instance" if case == "no image" else "batch").double()
    images = {"one image": 1, "no image": 0}.get(case, 2)
    x = make_input(images, 2, 8, 12, dtype=torch.float64, layout="channels_last" if case == "channels last" else "offset")
    if case == "frozen norm":
        model.nodes["x0_1"].norm1.eval()
    if case == "frozen weights":
        model.nodes["x1_0"].requires_grad_(False)
        model.nodes["x0_1"].up.weight.requires_grad_(False)
        model.nodes["x0_1"].conv1.bias.requires_grad_(False)
    model.recompute = case == "recomputed"
    results = step_of_images(copy.deepcopy(model), x)
    model.recompute = False
    assert_same_step(results, step(model, x))


def bits(results: dict) -> dict:
    return {**results["gradients"], **results["buffers"]}


@pytest.mark.parametrize(
    ("name", "widths", "size"),
    [
        *((name, (16, 24, 40), (40, 36)) for name in ("batch", "instance", "nearest", "linear")),
        ("batch", (3, 3, 3), (12, 12)),  # maps of 27 values: the next image is not aligned
        ("frozen", (5, 3, 7), (12, 20)),
        ("shuffled", (3, 5), (6, 10, 6)),
        ("no norm", (1, 3, 5), (4, 12, 4)),
    ],
)
def test_float32_gradients_are_the_same_bits_in_any_order_and_on_any_threads(threads, name, widths, size):
    """At sizes where the usual pass gives different bits."""
    model, x = network(len(size), widths, **OPTIONS.get(name, {})), make_input(6, 2, *size)
    target = make_input(6, 2, *size, seed=5).sigmoid()
    if name == "frozen":
        model.nodes["x0_1"].norm1.eval()

    def run(order: list[int], count: int) -> dict:
        threads(count)
        own = copy.deepcopy(model)
        with reproducible.each_image(own):
            reproducible.sum_over_images(BCEDiceLoss(), own(x[order]), target[order]).div(len(order)).backward()
        assert torch.get_num_threads() == count
        return bits({"gradients": gradients(own), "buffers": dict(own.named_buffers())})

    expected = run([0, 1, 2, 3, 4, 5], 1)
    for order, count in (([5, 3, 1, 0, 2, 4], 1), ([0, 1, 2, 3, 4, 5], 2), ([2, 1, 0, 5, 4, 3], 3)):
        results = run(order, count)
        assert [key for key, value in expected.items() if not torch.equal(results[key], value)] == []


def test_threads_compute_one_image_each_and_everything_is_restored(threads):
    threads(3)
    model = network()
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    before = [sorted(vars(layer)) for layer in layers]
    with pytest.raises(KeyError), reproducible.each_image(model):
        assert layers and all("forward" in vars(layer) for layer in layers)
        counts = reproducible._map_images(lambda image: (threading.get_ident(), torch.get_num_threads()), torch.zeros(12, 1))
        assert {count for _, count in counts} == {1} and threading.get_ident() not in dict(counts)
        assert torch.get_num_threads() == 1
        raise KeyError
    assert [sorted(vars(layer)) for layer in layers] == before
    assert torch.get_num_threads() == 3


def test_a_network_that_asks_for_the_kernels_computes_image_by_image_too():
    results = []
    for backend in ("triton", "reference"):
        model = network(widths=(3, 4), backend=backend)
        results.append(step_of_images(model, make_input(2, 2, 8, 8)))
        assert model.backend == backend
    kernels, reference = (bits(result) for result in results)
    assert all(torch.equal(kernels[name], value) for name, value in reference.items())


@pytest.mark.parametrize(
    ("options", "device", "dtype", "message"),
    [
        ({}, "cuda", "float32", "only on a CPU, not on cuda: use --device cpu"),
        ({}, "cpu", "bfloat16", "only in float32, not in bfloat16: use --dtype float32"),
        ({"dropout": 0.5}, "cpu", "float32", "use --dropout 0"),
    ],
    ids=["device", "dtype", "dropout"],
)
def test_settings_that_are_not_reproducible_are_refused(options, device, dtype, message):
    with pytest.raises(InputError, match=message):
        reproducible.check(network(**options), torch.device(device), dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), r"network\.float\(\)"),
        (lambda model: parametrizations.weight_norm(model.nodes["x0_0"].conv1), "layers that this package makes"),
        (lambda model: setattr(model.nodes["x0_0"].norm1, "__class__", SyncedBatchNorm2d), "SyncedBatchNorm2d"),
        (lambda model: setattr(model.nodes["x0_0"].conv1, "forward", lambda x: x), "not with Conv2d"),
    ],
    ids=["float64", "parametrized", "synced", "another forward"],
)
def test_layers_whose_gradients_would_not_be_summed_are_refused(change, message):
    model = network()
    change(model)
    with pytest.raises(InputError, match=message):
        reproducible.check(model, torch.device("cpu"), "float32")


@pytest.mark.parametrize("more", [["--dropout", "0.5"], ["--max-memory", "1G"]], ids=lambda more: more[0])
def test_the_command_line_refuses_them_too(tmp_path, capsys, more):
    folder = write_nuclei(tmp_path / "data", count=3)
    arguments = ["train", "--data", str(folder), "--out", str(tmp_path / "out"), "--reproducible", "--device", "cpu"]
    assert parser.main([*arguments, "--features", "4,8", "--patch", "32", *more]) == 2
    assert "reproducible" in capsys.readouterr().err and not (tmp_path / "out/last.pt").exists()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("accumulate", "reproducible"), [(1, False), (3, False), (3, True), (9, True), (9, False)])
def test_processes_share_every_image_of_every_micro_batch(processes, accumulate, reproducible):
    for batch in (1, 2, 4, 7, 8):
        recipe = Recipe(accumulate=accumulate, reproducible=reproducible)
        by_rank = [recipe.micro_batches(batch, rank, processes) for rank in range(processes)]
        shares = list(zip(*by_rank, strict=True))  # by micro-batch, then by rank
        micro_batches = [sorted(index for share in of_ranks for index in share) for of_ranks in shares]
        assert [index for indices in micro_batches for index in indices] == list(range(batch)) and all(micro_batches)
        assert len(micro_batches) == recipe.micro_batch_count(batch, processes) <= accumulate
        largest = max(len(share) for of_ranks in shares for share in of_ranks)
        assert largest == math.ceil(batch / (len(micro_batches) * processes))
        if reproducible:
            assert micro_batches == [[*indices] for indices in torch.arange(batch).tensor_split(min(accumulate, batch))]
