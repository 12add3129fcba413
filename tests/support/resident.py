"""The memory that a process of its own takes at its peak: everything that PyTorch and the libraries below it hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import ctypes, gc, sys, torch
from pathlib import Path

def status(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(name))

def begin():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from here
    return status("VmRSS")

torch.set_num_threads(1)
"""


def peak_of(program: str, *arguments: object) -> int:
    """Bytes by which a program rises above the place where it says `before = begin()`.

    Skips where the system does not tell.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak is read from Linux's /proc/self")
    command = [sys.executable, "-c", f'{BEGIN}{program}\nprint(status("VmHWM") - before)', *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
