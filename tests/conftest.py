"""Models here are tiny: one thread computes them faster than several that wait for each other."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from support import interpreter

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()

# The files that take longest run first, so that the others can even out the processes of `make test`.
LONGEST = (
    "kernels/test_compile.py",
    "kernels/test_compile_small.py",
    "models/test_export.py",
    "experiments/test_demo.py",
    "csrc/test_cpu_library.py",
    "csrc/test_sass.py",
    "training/test_processes.py",
    "csrc/test_emulation_conv.py",
    "project/test_packaging.py",
    "benchmarking/test_harness.py",
    "training/test_trainer.py",
)

# The modules that these import cannot be imported without Triton, which is for Linux alone.
NEED_TRITON = (
    "csrc/test_bindings.py",
    "csrc/test_cuda_on_gpu.py",
    "csrc/test_emulation_conv.py",
    "csrc/test_emulation_conv_wgrad.py",
    "csrc/test_emulation_faults.py",
    "csrc/test_emulation_network.py",
    "csrc/test_sass.py",
    "kernels/test_conv.py",
    "kernels/test_conv_wgrad.py",
    "kernels/test_head.py",
    "kernels/test_norm.py",
    "kernels/test_pool.py",
    "kernels/test_ways.py",
)
collect_ignore = [] if importlib.util.find_spec("triton") else list(NEED_TRITON)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def short_pauses():
    """What is timed here is of no interest."""
    from unetpp_fast.common import timing

    timing.PAUSE = 0.001


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
