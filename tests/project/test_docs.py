"""What the documents name exists: the stops of a training step, and the files that a change touches."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
STOPS = re.findall(r"^\d+\. `([\w/.]+)` · `([\w.]+)`", ARCHITECTURE, flags=re.MULTILINE)
CHANGES = (
    "an activation", "an up-sampling", "an operator", "a kernel configuration", "a peer", "a reader", "a command-line flag",
    "a benchmark implementation", "a loss", "an encoder", "a precision",
)  # fmt: skip


def functions(path: Path) -> set[str]:
    """Functions of a module, and methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        names |= {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


def test_a_step_has_at_most_ten_stops():
    assert 5 <= len(STOPS) <= 10 and [int(n) for n in re.findall(r"^(\d+)\. `", ARCHITECTURE, flags=re.MULTILINE)] == list(
        range(1, len(STOPS) + 1)
    )


@pytest.mark.parametrize(("file", "function"), STOPS)
def test_each_stop_is_where_it_says(file, function):
    assert function in functions(ROOT / file)


def test_every_part_of_the_package_is_listed():
    folders = {path.name for path in (ROOT / "unetpp_fast").iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(re.findall(r"^\| `(?:execution/)?(\w+)/`", ARCHITECTURE, flags=re.MULTILINE))


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_names_its_files_in_order_and_a_test(change):
    match = re.search(rf"^### Add {change}\n(.+?)(?=^##|\Z)", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
    assert match, f"CONTRIBUTING.md has no entry 'Add {change}'"
    entry = match[1]
    assert re.search(r"^1\. ", entry, flags=re.MULTILINE) and re.search(r"`tests/[\w/.]+\.py`", entry)


@pytest.mark.parametrize("text", [ARCHITECTURE, CONTRIBUTING], ids=["architecture", "contributing"])
def test_every_file_that_is_named_exists(text):
    named = set(re.findall(r"`((?:unetpp_fast|kernels|csrc|tests|benchmarks|docs|examples)/[\w/.-]*)`", text))
    assert named and not sorted(name for name in named if not (ROOT / name).exists())
