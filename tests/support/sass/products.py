"""The products that each accumulator of a CUDA kernel must get, by the formulas of `csrc/conv.h` and `csrc/conv_wgrad.h`.

A product is what one lane has loaded of its two factors, by address from the start of shared memory. All is in 2D: in 3D the
kernels multiply a plane by the same instructions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from support.sass.registers import Loaded

PIXEL = 64  # bytes
IMAGE, SIZE = 1 << 40, 64  # where a map begins in global memory, and its height and width
PARTIAL = 1 << 41


class Tile(NamedTuple):
    """`Tile` of csrc/halo_tile.h."""

    rows: int
    columns: int
    split: bool

    @property
    def odd(self) -> int:
        """Where the odd columns of a row begin."""
        return self.columns // 2 | 1

    @property
    def pitch(self) -> int:
        return (2 * self.odd if self.split else self.columns) * PIXEL

    @property
    def bytes(self) -> int:
        return self.rows * self.pitch

    def place(self, x: int) -> int:
        return x % 2 * self.odd + x // 2 if self.split else x

    def at(self, row: int, place: int, piece: int) -> int:
        """Where 16 bytes of a pixel begin, `place` in its row."""
        return row * self.pitch + place * PIXEL + (piece ^ place // 2 % 4) * 16


class Conv(NamedTuple):
    """An instance of `ConvTraits`; `size`: bytes of a value."""

    size: int
    co_tile: int
    rows: int
    stages: int
    gathered: bool

    @property
    def arguments(self) -> dict[str, object]:
        """Two stages of the first operand, the second half full, and two of the low source."""
        step = 32 // self.size
        map_a = {"data": IMAGE, "image_stride": 1 << 20, "pixel_stride": 64, "height": SIZE, "width": SIZE}
        given = {f"a.{name}": value for name, value in map_a.items()} | {"a.channels": 3 * step, "a.vector": 1}
        if not self.gathered:
            given |= {f"b.{name}": value for name, value in map_a.items()}
            given |= {"b.height": SIZE // 2, "b.width": SIZE // 2, "b.channels": 3 * step, "phased": 1}
            given |= {"weights_b": IMAGE}
        size = SIZE // 2 if self.gathered else SIZE
        given |= {"weights_a": IMAGE, "out": IMAGE, "out_image_stride": 1 << 20, "out_pixel_stride": 64, "images": 1}
        given |= {"height": size, "width": size, "channels": self.co_tile}
        given |= {"tiles_y": 4, "tiles_x": 2, "co_blocks": 1, "stages_a": 2, "stages": 2 if self.gathered else 4}
        return given

    @property
    def first(self) -> Tile:
        return Tile(self.rows + 2, 34, True)

    @property
    def low(self) -> Tile:
        return Tile(self.rows // 2 + 2, 18, False)

    def memory(self, tile: Tile, taps: int) -> int:
        return tile.bytes + taps * 64 * self.co_tile  # a chunk of channels has 64 bytes

    def expected(self, thread: int) -> Counter:
        """The sorted products of every accumulator."""
        rows = 2 if self.gathered else 4
        side_by_side = 1 if self.gathered else 2
        pixel_warps = (self.rows // 2 if self.gathered else self.rows) // rows * side_by_side
        warp, lane = divmod(thread, 32)
        part, parity, warp_row = warp // pixel_warps, warp % pixel_warps % side_by_side, warp % pixel_warps // side_by_side
        stage = self.memory(self.first, 16 if self.gathered else 9)
        if not self.gathered:
            stage = max(stage, self.memory(self.low, 16))
        sums = []
        for m in range(rows):
            for n in range(4):
                products = []
                for index in range(2 if self.gathered else 4):
                    start = index % self.stages * stage
                    low = index >= 2
                    tile = self.low if low else self.first
                    for tap, row, x in self.taps(m, warp_row, parity, low):
                        for step in range(2 if index % 2 == 0 else 1):
                            pixel = start + tile.at(row, tile.place(x) + lane % 16, step * 2 + lane // 16)
                            a = tuple(Loaded("M", pixel, k) for k in range(4))
                            weights = start + tile.bytes + (tap * 64 + step * 32) * self.co_tile
                            products.append((a, self.weights(weights, part, n, lane)))
                sums.append(tuple(sorted(products)))
        return Counter(sums)

    def taps(self, m: int, warp_row: int, parity: int, low: bool) -> Iterator[tuple[int, int, int]]:
        """Of an accumulator's row m: each tap, and the row and column of the tile that its first pixel reads."""
        count = 2 if low else 4 if self.gathered else 3
        for ty in range(count):
            for tx in range(count):
                if low:  # output pixel 2u + p reads u + p + t of the low source
                    unit, py = divmod(m, 2)
                    yield (py * 2 + parity) * 4 + ty * 2 + tx, warp_row * 2 + unit + py + ty, parity + tx
                else:
                    yield ty * count + tx, warp_row * 4 + m * (2 if self.gathered else 1) + ty, parity + tx

    def weights(self, offset: int, part: int, n: int, lane: int) -> tuple[Loaded, ...]:
        """Columns 8n to 8n + 7 of a warp's part, of the rows of one step."""
        row_bytes = self.co_tile * self.size
        if self.size == 4:
            rows = [lane % 4 + 4 * half for half in range(2)]
            piece = part * 8 + n * 2 + lane // 4 // 4
            places = [offset + row * row_bytes + (piece ^ row % 4 * 2) * 16 + lane // 4 % 4 * 4 for row in rows]
            return tuple(Loaded("word", place, 0) for place in places)
        row, piece = lane % 16, part * 4 + n // 2 * 2 + lane // 16
        permuted = piece ^ (row // 2 % 4 if row_bytes == 64 else row % 8)
        place = offset + row * row_bytes + permuted * 16
        return tuple(Loaded("MT", place, n % 2 * 2 + k) for k in range(2))


class Wgrad(NamedTuple):
    """An instance of `WgradTraits`."""

    size: int
    phased: bool

    @property
    def chunk(self) -> int:
        return 64 // self.size

    @property
    def bands(self) -> int:
        return 8 // ((self.chunk // 16) ** 2 * 2)

    @property
    def first(self) -> Tile:
        return Tile(6, 18, False) if self.phased else Tile(10, 34, True)

    @property
    def arguments(self) -> dict[str, object]:
        """Two tiles for the block."""
        unit = 2 if self.phased else 1
        shared = {"data": IMAGE, "image_stride": 1 << 20, "pixel_stride": 64, "channels": self.chunk}
        given = {f"{name}.{key}": value for name in ("a", "dy") for key, value in shared.items()}
        given |= {"a.height": 16 // unit, "a.width": 32 // unit, "dy.height": 16, "dy.width": 32}
        given |= {"partial": PARTIAL, "result": IMAGE, "images": 1, "parts": self.bands * (1 if self.phased else 2)}
        given |= {"phased": int(self.phased), "tiles": 2, "tiles_x": 1, "tiles_each": 2}
        return given | {"planes": 1, "taps": 16 if self.phased else 9}

    def expected(self, thread: int) -> dict[int, tuple]:
        """By address of the partial sums: the sorted products of a value, and its place in the accumulator."""
        tile, gradient = self.first, Tile(8, 32, True)
        unit, taps, side = (2, 16, 2) if self.phased else (1, 9, 3)
        warp, lane = divmod(thread, 32)
        ways = self.chunk // 16
        k_part, co_part, parity, band = warp % ways, warp // ways % ways, warp // ways**2 % 2, warp // (ways**2 * 2)
        rows = 8 // self.bands
        part = band if self.phased else parity * self.bands + band
        found = {}
        for tap in range(taps):
            phase, t = divmod(tap, 4) if self.phased else (0, tap)
            ty, tx = divmod(t, side)
            py = phase // 2
            if self.phased and phase % 2 != parity:
                continue
            for half in range(2):
                products = []
                for stage in (0, tile.bytes + gradient.bytes):
                    for y in range(band * rows + py, (band + 1) * rows, unit):
                        first = (stage, tile, y // unit + py + ty, tile.place(parity + tx), k_part)
                        second = (stage + tile.bytes, gradient, y, gradient.place(parity), co_part)
                        products += self.products(first, second, half, lane)
                for e in range(4):
                    k = k_part * 16 + lane // 4 + e // 2 * 8
                    co = co_part * 16 + half * 8 + lane % 4 * 2 + e % 2
                    place = ((part * taps + tap) * self.chunk + k) * self.chunk + co
                    found[PARTIAL + 4 * place] = tuple(sorted(products)), e
        return found

    def products(self, first: tuple, second: tuple, half: int, lane: int) -> list[tuple]:
        """Of 16 pixels of a row, in one step, in TF32 in two; each side by its stage, tile, row, place and 16 channels."""

        def at(side: tuple, pixel: int, byte: int) -> int:
            stage, tile, row, place, part = side
            return stage + tile.at(row, place + pixel, part * self.size + byte // 16) + byte % 16

        if self.size == 2:
            a = at(first, lane % 8 + lane // 16 * 8, lane // 8 % 2 * 16)
            b = at(second, lane % 16, lane // 16 * 16)
            return [(tuple(Loaded("MT", a, k) for k in range(4)), tuple(Loaded("MT", b, half * 2 + k) for k in range(2)))]
        found = []
        for step in range(2):
            pixels = [step * 8 + lane % 4, step * 8 + lane % 4 + 4]
            a = [at(first, pixels[k // 2], (lane // 4 + k % 2 * 8) * 4) for k in range(4)]
            b = [at(second, pixels[k], (half * 8 + lane // 4) * 4) for k in range(2)]
            found.append(tuple(tuple(Loaded("word", place, 0) for place in places) for places in (a, b)))
        return found
