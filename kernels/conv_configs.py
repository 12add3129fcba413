"""How a convolution is cut into programs: the configurations worth timing, and the default."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import lru_cache
from typing import Any

import torch

from .maps import ceil_div, power_of_two
from .naive import dot_precision

MOST_VALUES = 2**20  # of a block, in Triton
# Of an H100: multiprocessors; flops a clock of one's tensor cores, in 16 bits; bytes a clock of the L2 cache, assumed.
MULTIPROCESSORS, FLOPS, L2_BYTES = 132, 4096, 3000
NEAR = 1.05  # times the least bound: as good
LEAST_SHARED = 99 * 1024  # bytes of shared memory that a program may take on every GPU since compute capability 8.0


@dataclasses.dataclass(frozen=True)
class Config:
    """How a convolution is cut into programs: a tile of units, up to block_k channels per step, block_co output channels.

    num_stages: steps whose operands are in shared memory at once, by copies that bypass L1 (cp.async); with one, loads.
    """

    block_d: int
    block_h: int
    block_w: int
    block_k: int
    block_co: int
    num_warps: int
    num_stages: int

    @property
    def pixels(self) -> int:
        return self.block_d * self.block_h * self.block_w

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory that its stages take."""
        return self.num_stages * (self.pixels + self.block_co) * self.block_k * dtype.itemsize


def tile_counts(units: tuple[int, int, int], config: Any) -> list[int]:
    """Tiles along D, H and W; `config` may be any with `block_d`, `block_h` and `block_w`."""
    blocks = config.block_d, config.block_h, config.block_w
    return [ceil_div(unit, block) for unit, block in zip(units, blocks, strict=True)]


def block_of_channels(channels: int, limit: int) -> int:
    """The largest power of two from 16 (tensor cores take no fewer) to `limit` that pads `channels` least."""
    sizes = [size for size in (256, 128, 64, 32, 16) if size <= max(limit, 16)]
    return min(sizes, key=lambda size: -(-channels // size) * size)


@lru_cache(maxsize=1024)  # called by every launch
def block_of_pixels(units: tuple[int, int, int], pixels: int, axes: int) -> tuple[int, int, int]:
    """The tile of `pixels` units that pads the grid least; among equals the one with the smallest halo of samples."""
    powers = [2**k for k in range(pixels.bit_length())]
    depths = powers if axes == 3 else [1]
    tiles = [(d, h, pixels // (d * h)) for d, h in itertools.product(depths, powers) if d * h <= pixels]

    def cost(tile: tuple[int, int, int]) -> tuple[int, int, int]:
        covered, halo = 1, 1
        for unit, block, on in zip(units, tile, (axes == 3, True, True), strict=True):
            covered *= -(-unit // block) * block
            halo *= block + 2 * on
        return covered, halo, -tile[2]

    return min(tiles, key=cost)


def configs(
    units: tuple[int, int, int],
    images: int,
    co: int,
    axes: int,
    phased: bool,
    dtype: torch.dtype,
    shared: int = LEAST_SHARED,
    normed: bool = False,
) -> list[Config]:
    """The configurations worth timing that fit in `shared` bytes; the first is the default.

    normed: operands are normalised as they are loaded, which takes registers; the largest tiles would spill (sm_90).

    A step loads (pixels + block_co) block_k values for 2 pixels block_co block_k flops: 26 flops per byte of bf16 at
    128 x 32, 43 at 128 x 64, 64 at 128 x 128, 85 at 256 x 128. Copies by cp.async bypass L1, where eight of nine taps would
    hit, so up to 64 output channels one stage with plain loads comes first. Up to 128 output channels are one block, so that
    pixels are loaded once. The first near the best bound comes first: where tiles are few, a smaller one. The order is that
    of `benchmarks/static`, which no GPU has confirmed.
    """
    block_co = block_of_outputs(co)
    if dot_precision(dtype) == "ieee" and dtype in (torch.float32, torch.float64):
        shapes = [(64, 16, min(block_co, 32), 4, 2)]  # no tensor cores for float32: registers hold operands too
    else:
        shapes = {
            32: [(128, 32, 32, 4, 1), (128, 32, 32, 4, 3), (256, 32, 32, 8, 2), (128, 64, 32, 4, 3)],
            64: [(128, 32, 64, 8, 1), (128, 32, 64, 8, 4), (256, 32, 64, 8, 3), (128, 64, 64, 8, 3)],
            128: [(256, 64, 128, 8, 3), (128, 32, 128, 8, 3), (128, 64, 128, 8, 3), (64, 64, 64, 4, 3)],
        }[max(block_co, 32)]
        if block_co < 32:
            shapes = [(pixels, k, block_co, warps, stages) for pixels, k, _, warps, stages in shapes]
    offered = []
    for pixels, block_k, block, warps, stages in shapes:
        tile = block_of_pixels(units, pixels, axes)
        # Half as many channels of float32 fill the same bytes.
        block_k = max(16, block_k // 2) if dtype.itemsize > 2 else block_k
        offered.append(Config(*tile, block_k, block, warps, stages))
    most = 128 * 128 if normed else 256 * 128  # sums of a program
    offered = [config for config in offered if config.shared(dtype) <= shared and config.pixels * config.block_co <= most]

    def programs(config: Config) -> int:
        return images * math.prod(tile_counts(units, config)) * (2**axes if phased else 1) * ceil_div(co, config.block_co)

    def clocks(config: Config) -> float:
        """At least, for one channel of a tap: by the products of the busiest multiprocessor and by copies through L2.
        With one stage all taps share a tile in L1."""
        products = ceil_div(programs(config), MULTIPROCESSORS) * 2 * config.pixels * config.block_co / FLOPS
        copied = config.block_co + config.pixels / (3**axes if config.num_stages == 1 else 1)
        return max(products, programs(config) * copied * dtype.itemsize / L2_BYTES)

    least = min(map(clocks, offered))
    first = next(config for config in offered if clocks(config) <= NEAR * least)
    return [first, *(config for config in offered if config != first)]


def default_config(
    units: tuple[int, int, int],
    images: int,
    k: int,
    co: int,
    axes: int,
    phased: bool,
    dtype: torch.dtype,
    interpreted: bool,
) -> Config:
    """The first of `configs`; in the interpreter, as few programs as Triton allows."""
    if not interpreted:
        return configs(units, images, co, axes, phased, dtype)[0]
    block_k, block_co = (min(limit, max(16, power_of_two(count))) for count, limit in ((k, 256), (co, 128)))
    block_d, block_h, block_w = interpreted_tile(units, (8, 64, 64), max(block_k, block_co))
    return Config(block_d, block_h, block_w, block_k, block_co, 4, 1)


def interpreted_tile(units: tuple[int, int, int], limits: tuple[int, int, int], channels: int) -> list[int]:
    """The largest tile up to `limits`: the interpreter takes as long for a small one, and Triton allows 2^20 values."""
    tile = [min(power_of_two(max(unit, 1)), limit) for unit, limit in zip(units, limits, strict=True)]
    while math.prod(tile) * channels > MOST_VALUES:
        tile[tile.index(max(tile))] //= 2
    return tile


def block_of_outputs(co: int) -> int:
    """All output channels up to 128; of more, the block of least cost, where loading the pixels counts as 64 columns."""
    if co <= 128:
        return max(16, power_of_two(co))
    return min((128, 64), key=lambda block: -(-co // block) * (block + 64))
