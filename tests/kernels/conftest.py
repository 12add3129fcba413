"""Which CPU kernel a test is about."""

from __future__ import annotations

import pytest
from support import cpu_kernels


@pytest.fixture
def kernel(request, monkeypatch) -> str:
    """The kernel that computes convolutions, whatever their size; `tiles` those of bfloat16 maps, and weight gradients."""
    if request.param not in cpu_kernels.kernels_here():
        pytest.skip("this CPU has no matrix tiles, and the library for its instruction set does not imitate them")
    cpu_kernels.select(request.param, monkeypatch.setattr)
    return request.param
