"""Rows as benchmarks record them."""

from __future__ import annotations

import torch

from unetpp_fast.benchmarking import records

FACTS = records.facts(torch.device("cpu"))


def row(**changes) -> dict:
    """A valid row, with changes."""
    return {
        "bench": "inference", "model": "unet++", "level": 4, "mode": "fast", "size": [512, 512], "batch": 1,
        "dtype": "float32", "impl": "fused", "median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "peak_mb": None,
        "ratio_to": {"eager": 1.5}, "peak_ratio_to": {}, "tflops": 0.1, **FACTS, **changes,
    }  # fmt: skip
