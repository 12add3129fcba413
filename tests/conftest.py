"""Models here are tiny: one thread computes them sooner than several that wait for one another."""

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported


@pytest.fixture
def threads():
    """Sets the number of threads, which the test leaves as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
