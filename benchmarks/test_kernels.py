"""Every op of the engine at every level's shape, against PyTorch's equivalent. See `op_cases.py`."""

from __future__ import annotations

import pytest


def test_kernel(suite, show, case, name):
    """The op gives the right result, and its row is recorded."""
    outcome = suite.outcome(case)
    if name in outcome.skipped:
        pytest.skip(outcome.skipped[name])
    assert name not in outcome.wrong, outcome.wrong[name]
    show(case, outcome.times[name])
