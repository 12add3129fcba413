"""The grid of nodes: what there is, in which order, how wide, what pruning leaves, what it costs."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import build
from torch.utils.flop_counter import FlopCounterMode

import unetpp_fast as uf
from unetpp_fast import Topology
from unetpp_fast.architecture.topology import MAX_DEPTH

WIDTHS = (3, 5, 6, 9, 11, 13, 17)
DEPTHS = range(1, MAX_DEPTH + 1)
PAPER = (32, 64, 128, 256, 512)


def nested_positions(depth: int) -> set[tuple[int, int]]:
    return {(i, j) for i in range(depth + 1) for j in range(depth + 1) if i + j <= depth}


def assert_can_run(topology: Topology) -> None:
    """Every node comes after all that it reads."""
    done: set[tuple[int, int]] = set()
    for node in topology.nodes:
        i, j = node.position
        needs = {(i, column) for column in node.prefix} | ({node.low} if j else {(i - 1, 0)} if i else set())
        assert needs <= done, f"{node.name} runs before {needs - done}"
        assert node.position not in done
        done.add(node.position)


@pytest.mark.parametrize("depth", DEPTHS)
def test_nested_grid(depth: int) -> None:
    features = WIDTHS[: depth + 1]
    topology = Topology.nested(2, features)
    assert {node.position for node in topology.nodes} == nested_positions(depth)
    assert_can_run(topology)
    assert (topology.depth, topology.multiple, topology.heads) == (depth, 2**depth, (depth,))
    for node in topology.nodes:
        i, j = node.position
        assert node.name == f"x{i}_{j}"
        assert node.width == features[i]
        assert node.prefix == tuple(range(j))
        assert node.low == ((i + 1, j - 1) if j else None)
        assert node.up_width == (features[i] if j else 0)
        assert topology.low_width(node) == (features[i + 1] if j else 0)
        cin = (j + 1) * features[i] if j else features[i - 1] if i else 2
        assert topology.convolutions(node) == ((cin, features[i]), (features[i], features[i]))
    assert Topology.nested(2, features, all_heads=True).heads == tuple(range(1, depth + 1))


@pytest.mark.parametrize("depth", DEPTHS)
def test_plain_grid(depth: int) -> None:
    topology = Topology.plain(2, WIDTHS[: depth + 1])
    expected = {(i, 0) for i in range(depth + 1)} | {(depth - j, j) for j in range(1, depth + 1)}
    assert {node.position for node in topology.nodes} == expected
    assert_can_run(topology)
    assert topology.heads == (depth,)
    for node in topology.nodes:
        assert node.prefix == ((0,) if node.column else ())
    assert topology.pruned(depth) == topology


def test_depth_1_is_the_same_network_nested_or_plain() -> None:
    assert set(Topology.nested(1, (4, 6)).nodes) == set(Topology.plain(1, (4, 6)).nodes)


@pytest.mark.parametrize("depth", DEPTHS)
def test_pruned(depth: int) -> None:
    topology = Topology.nested(2, WIDTHS[: depth + 1], all_heads=True, up_width=lambda low_width, level: low_width)
    for level in range(1, depth + 1):
        small = topology.pruned(level)
        assert {node.position for node in small.nodes} == nested_positions(level)
        assert set(small.nodes) <= set(topology.nodes)
        assert_can_run(small)
        assert (small.heads, small.depth, small.multiple) == ((level,), level, 2**level)
        assert small.gflop((64, 64)) <= topology.gflop((64, 64))
        kept = topology.pruned(level, keep_heads=True)
        assert kept.nodes == small.nodes
        assert kept.heads == tuple(range(1, level + 1))
        assert kept.pruned(1) == topology.pruned(1)
    assert topology.pruned(depth, keep_heads=True) == topology


@pytest.mark.parametrize("level", [0, 1, 4, -1, None, "2"])
def test_pruned_needs_a_head(level: object) -> None:
    with pytest.raises(ValueError, match=r"heads at level 3; UNetPlusPlus\(deep_supervision=True\) has one at every level"):
        Topology.nested(1, (2, 3, 4, 5)).pruned(level)


def test_pruned_past_the_last_head() -> None:
    with pytest.raises(ValueError, match=r"no head at level 3: this network has heads at level 1, 2$"):
        Topology.nested(1, (2, 3, 4), all_heads=True).pruned(3)


def test_widths_of_single_nodes() -> None:
    """A decoder's own widths reach the nodes that read them."""
    topology = Topology.nested(
        1, (4, 6, 9), widths={(0, 1): 5, (1, 1): 7}, up_width=lambda low_width, level: low_width + level
    )
    assert topology[0, 1].width == 5
    assert topology.in_width(topology[0, 1]) == 4 + 6
    assert topology.in_width(topology[1, 1]) == 6 + (9 + 1)
    assert topology.in_width(topology[0, 2]) == 4 + 5 + 7
    assert topology.convolutions(topology[1, 1]) == ((16, 7), (7, 7))


def test_missing_node() -> None:
    with pytest.raises(KeyError, match=r"no node X\(0, 3\)"):
        Topology.nested(1, (2, 3, 4))[0, 3]


@pytest.mark.parametrize("features", [(), (3,), (2,) * 8, (4, 0), (4, -2), (4, 2.0), (True, 2), "ab", 5, None])
@pytest.mark.parametrize("make", [Topology.nested, Topology.plain])
def test_bad_features(make, features: object) -> None:
    with pytest.raises(ValueError, match="features must be 2 to 7 positive integers"):
        make(1, features)


@pytest.mark.parametrize("in_channels", [0, -1, 1.5, True, "3", None])
def test_bad_in_channels(in_channels: object) -> None:
    with pytest.raises(ValueError, match="in_channels must be a positive integer"):
        Topology.nested(in_channels, (2, 3))


@pytest.mark.parametrize("spatial_dims", [1, 4, "2", None])
def test_bad_spatial_dims(spatial_dims: object) -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        Topology.plain(1, (2, 3), spatial_dims=spatial_dims)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_dictionary_round_trip(spatial_dims: int) -> None:
    whole = Topology.nested(
        2, WIDTHS[:5], spatial_dims=spatial_dims, all_heads=True, widths={(0, 4): 8}, up_width=lambda low, level: low // 2
    )
    for topology in (whole, whole.pruned(2), whole.pruned(3, keep_heads=True), Topology.plain(1, (4, 6))):
        again = Topology.from_dict(json.loads(json.dumps(topology.to_dict())))
        assert again == topology
        assert hash(again) == hash(topology)


def test_gflop_of_known_networks() -> None:
    """32..512 at 512x512: nearest with 3 channels in, pruned to L1..L4 with one head, and the paper's own with 1."""
    nearest = Topology.nested(3, PAPER, all_heads=True, up_width=lambda low_width, level: low_width)
    assert [round(nearest.pruned(level).gflop((512, 512)), 1) for level in (1, 2, 3, 4)] == [31.9, 82.6, 162.3, 275.9]
    assert round(Topology.nested(1, PAPER).gflop((512, 512), deconv=True), 1) == 238.0


@pytest.mark.parametrize("spatial_dims, size", [(2, (8, 24)), (3, (4, 8, 12))])
@pytest.mark.parametrize(
    "upsample", ["deconv", "nearest", ("linear", {"project": True}), ("nearest", {"project": True})], ids=str
)
@pytest.mark.parametrize("nested", [True, False], ids=["unet++", "unet"])
def test_gflop_is_what_torch_counts(nested: bool, upsample, spatial_dims: int, size: tuple[int, ...]) -> None:
    """Exactly. A transposed convolution too: torch counts every tap at each input pixel, which with stride = kernel is
    one tap at each output pixel."""
    options = {"spatial_dims": spatial_dims, "features": (4, 6, 9), "upsample": upsample}
    if nested:
        model = build(uf.UNetPlusPlus, 2, 3, deep_supervision=True, **options).eval()
        models = [model, model.prune(1), model.prune(2)]
    else:
        models = [build(uf.UNet, 2, 3, **options).eval()]
    for model in models:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 2, *size))
        assert round(1e9 * model.gflop(size)) == counter.get_total_flops()


def test_gflop_of_a_size_with_other_axes() -> None:
    with pytest.raises(ValueError, match="does not have 2 axes"):
        Topology.nested(1, (2, 3)).gflop((8, 8, 8))
