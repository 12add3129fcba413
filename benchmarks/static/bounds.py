"""The arithmetic of the static model: the least time of a kernel, from what it asks of each part of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

# An H100: multiprocessors, clocks a second, bytes a second. The L2 cache's rate is an assumption.
MULTIPROCESSORS, CLOCK = 132, 1.83e9
DRAM, L2 = 3.35e12, 5.5e12
SHARED = 128  # bytes a clock of a multiprocessor's shared memory
PORT = 64  # bytes a clock that a multiprocessor takes from L2: it binds where blocks are too few for all of them
ISSUE = 4  # instructions of a warp that a multiprocessor starts in a clock
MMA_SYNC = 613e12  # flops a second of mma.sync in 16 bits, 62 % of the tensor cores' peak
WGMMA = 989e12  # of wgmma: the peak


@dataclass(frozen=True)
class Work:
    """What a kernel asks for. Per block: clocks of the tensor pipe, of the issue slots and of shared memory on one
    multiprocessor; in all: bytes through L2 and to DRAM. An unknown demand is 0 and bounds nothing.

    flops: those of the operation, without padding.
    """

    name: str
    blocks: int = 1
    flops: float = 0
    tensor: float = 0
    issue: float = 0
    shared: float = 0
    l2: float = 0
    dram: float = 0

    def bounds(self) -> dict[str, float]:
        """Seconds by the part that needs them. The busiest multiprocessor has ceil(blocks / multiprocessors) blocks."""
        share = -(-self.blocks // MULTIPROCESSORS) / CLOCK
        on_one = {name: getattr(self, name) * share for name in ("tensor", "issue", "shared")}
        l2 = max(self.l2 / L2, self.l2 / self.blocks / PORT * share)
        return {**on_one, "l2": l2, "dram": self.dram / DRAM}

    @property
    def seconds(self) -> float:
        """If all parts work at once, the least."""
        return max(self.bounds().values())

    @property
    def in_turn(self) -> float:
        """If products wait for the other instructions, as those of one warp do, and the rest works meanwhile."""
        bounds = self.bounds()
        return max(bounds.pop("tensor") + bounds.pop("issue"), *bounds.values())

    @property
    def serial(self) -> float:
        """If one part works after another."""
        return sum(self.bounds().values())

    @property
    def binding(self) -> str:
        bounds = self.bounds()
        return max(bounds, key=bounds.get)

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12 if self.seconds else 0.0


def tensor_clocks(flops: float, rate: float) -> float:
    """Clocks of one multiprocessor's tensor cores for its flops, at a rate of the whole GPU."""
    return flops / (rate / MULTIPROCESSORS / CLOCK)
