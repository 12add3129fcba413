"""Whole networks: inference, training steps, peak memory. See `cases.py` for the matrix, `conftest.py` for the options."""

from __future__ import annotations

import pytest


def test_model(suite, show, case, name):
    """The implementation gives the right result, and its row is recorded."""
    outcome = suite.outcome(case)
    if name in outcome.skipped:
        pytest.skip(outcome.skipped[name])
    assert name not in outcome.wrong, outcome.wrong[name]
    if name in outcome.times:
        show(case, outcome.times[name])
