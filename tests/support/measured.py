"""A store of measurements of its own for each test, and a network to measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.helpers import make_input

import unetpp_fast as uf
from unetpp_fast.execution.fused import tuning, verdicts
from unetpp_fast.kernels import tuning as kernel_tuning


def forget() -> None:
    """As in a new process."""
    tables = verdicts._known, verdicts._latest, verdicts._loaded, verdicts._doubted
    for known in (*tables, tuning._failures, kernel_tuning.table, kernel_tuning._chosen):
        known.clear()


def own_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For a fixture: the empty folder of the store; what was known before and after is forgotten."""
    monkeypatch.setenv("UNETPP_FAST_CACHE", str(folder / "cache"))
    monkeypatch.setattr(tuning, "share_waited", lambda since: 0.0)  # whatever runs beside the tests
    forget()
    yield folder / "cache"
    forget()


def small() -> tuple[uf.Network, torch.Tensor]:
    """A U-Net and an image for it."""
    torch.manual_seed(0)
    return uf.UNet(1, 1, features=(3, 4)), make_input(2, 1, 4, 6)
