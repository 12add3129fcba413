"""How long threads of this process wait for a core, which tells whether other programs disturb a measurement."""

from __future__ import annotations

from pathlib import Path

TASKS = Path("/proc/self/task")


def computed_and_waited() -> tuple[int, int]:
    """Nanoseconds that the threads of this process have computed, and in which they could have and had no core; both 0 where
    the system does not count them (Linux does)."""
    computed = waited = 0
    for path in TASKS.glob("*/schedstat"):
        try:
            run, wait = map(int, path.read_text(encoding="utf-8").split()[:2])
        except (OSError, ValueError):  # the thread has just ended
            continue
        computed, waited = computed + run, waited + wait
    return computed, waited


def share_waited(since: tuple[int, int]) -> float:
    """Of the time in which threads wanted a core since `computed_and_waited` gave `since`, the share in which they waited: 0
    on a quiet machine, 0.5 if another program wants every core too."""
    computed, waited = (max(now - then, 0) for now, then in zip(computed_and_waited(), since, strict=True))
    return waited / (computed + waited) if waited else 0.0
