"""The installed Triton and the oldest supported one, which `make test` installs beside it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "3.6.0"
OLDEST_FOLDER = Path(__file__).parents[2] / ".venv" / f"triton-{OLDEST}"
VERSIONS = ("installed", "oldest")


def start(version: str, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Runs a script with that Triton and with the interpreter off; skips the test if that Triton is missing."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    path = [str(Path(__file__).parents[1])]
    if version == "oldest":
        if importlib.metadata.version("triton") == OLDEST:
            pytest.skip(f"the installed Triton is the oldest supported one, {OLDEST}")
        if not (OLDEST_FOLDER / "triton").is_dir():
            pytest.skip(f"there is no {OLDEST_FOLDER}: `make test` installs Triton {OLDEST} there")
        path.append(str(OLDEST_FOLDER))
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(path)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, script, *arguments], env=environment, **options)
