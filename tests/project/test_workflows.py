"""The workflows by actionlint: syntax, contexts and types of expressions, inputs of actions, runners, needs.

It does not see what only a run shows: whether the steps succeed, versions of actions that are not among the popular
ones, and the shell of `run:` where shellcheck is not installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).parents[2] / ".github/workflows").glob("*.yml"))
ACTIONLINT = shutil.which("actionlint", path=str(Path(sys.executable).parent)) or shutil.which("actionlint")
pytestmark = pytest.mark.skipif(ACTIONLINT is None, reason="there is no actionlint (extra test, on Linux)")
MISTAKES = {
    "needs: [wheel, torches, source]": "needs: [wheel, torches, sources]",
    "matrix.system }}": "matrix.sytem }}",
    "runs-on: ubuntu-latest": "runs-on: ubuntu-lates",
    "path: wheelhouse/*.whl": "paths: wheelhouse/*.whl",
}


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ACTIONLINT, *files], capture_output=True, text=True)


@pytest.mark.parametrize("file", WORKFLOWS, ids=[file.name for file in WORKFLOWS])
def test_a_workflow_has_no_mistake(file):
    done = check(file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("right", MISTAKES)
def test_a_mistake_is_found(right, tmp_path):
    (file,) = [file for file in WORKFLOWS if file.name == "wheels.yml"]
    text = file.read_text()
    assert right in text
    (tmp_path / "wrong.yml").write_text(text.replace(right, MISTAKES[right], 1))
    assert check(tmp_path / "wrong.yml").returncode == 1
