"""The README's example runs, its links exist, and its commands are in the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_example_runs():
    (code, *_) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    assert code.count("\n") <= 13
    variables: dict = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert variables["accurate"].shape == variables["fast"].shape == variables["image"].shape


@pytest.mark.parametrize("name", re.findall(r"\]\((?!http)([^)]+)\)|`(unetpp_fast/[\w./]+)`", README))
def test_what_it_points_to_exists(name):
    assert (ROOT / "".join(name)).exists()


def test_its_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{command}: " in makefile
