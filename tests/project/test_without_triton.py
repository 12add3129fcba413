"""The tests where there is no Triton, as on macOS and Windows: those that need none can be collected there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLLECT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import pytest
raise SystemExit(pytest.main(["-q", "--collect-only", "-p", "no:xdist", "-p", "no:cacheprovider", "tests"]))
"""


def test_the_tests_can_be_collected():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/models/test_models.py::" in done.stdout and "tests/kernels/test_naive.py::" in done.stdout
    assert "tests/kernels/test_conv.py::" not in done.stdout  # it imports the kernels
