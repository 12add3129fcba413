"""Models here are tiny: one thread computes them faster than several that wait for each other."""

import os

import pytest
import torch
from support import interpreter

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
