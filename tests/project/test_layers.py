"""The package's parts import those before them alone, and no modules import one another in a circle.

Every import counts: lazy ones and those for type checkers too.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import unetpp_fast as uf

ROOT = Path(__file__).parents[2]
# Each may import those before it. A module directly in the package stands above all of them.
LAYERS = (
    "kernels", "common", "architecture", "execution.plan", "execution.fused", "execution.cpu", "execution", "models", "data",
    "converters", "training", "deployment", "experiments", "reports", "webapp", "benchmarking", "cli", "",
)  # fmt: skip
# What the parts of `execution` stand on, although it lies beside them.
GROUND = {"execution." + name for name in ("acceptance", "batch_statistics", "built", "call", "reference", "source_hash")}
ALLOWED_AT_THE_TOP = {"__init__", "__main__", "info"}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its name inside it; "" is the package itself."""
    folders = {"": root / "unetpp_fast", "kernels": root / "kernels"}
    found = {}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [*([prefix] if prefix else []), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, text: str, known: set[str], package: bool) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    base = name.split(".") if package and name else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                start = base[: len(base) - node.level + 1]
                target = [*start, *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == "unetpp_fast":
                target = node.module.split(".")[1:]
            else:
                continue
            target = [part for part in target if part]
            for alias in node.names:
                inner = ".".join([*target, alias.name])
                found.add(inner if inner in known else ".".join(target))
        elif isinstance(node, ast.Import):
            found |= {alias.name[len("unetpp_fast.") :] for alias in node.names if alias.name.startswith("unetpp_fast.")}
    return found - {name}


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    found = modules(root)
    return {name: imports(name, path.read_text(), set(found), path.stem == "__init__") for name, path in found.items()}


def layer(name: str) -> int:
    """The place of a module's part in `LAYERS`; what `execution` stands on comes before its parts."""
    if name in GROUND:
        return LAYERS.index("execution.plan")
    parts = name.split(".")
    folders = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((LAYERS.index(folder) for folder in folders if folder in LAYERS), len(LAYERS) - 1)


def faults(edges: dict[str, set[str]]) -> list[str]:
    """Imports against the order, and a circle if there is one."""
    found = [
        f"{name} imports {target}, which comes after it"
        for name, targets in edges.items()
        for target in targets
        if layer(target) > layer(name)
    ]
    try:
        tuple(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as error:
        found.append(f"a circle: {' <- '.join(error.args[1])}")
    return found


def test_every_part_imports_those_before_it():
    assert faults(graph()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("architecture.topology", "from ..models.network import Network"),
        ("architecture.topology", "if TYPE_CHECKING:\n    from ..execution.call import Call"),
        ("execution.plan.steps", "def late():\n    from unetpp_fast.execution import dispatch"),
        ("common.errors", "from . import extras"),
        ("kernels.naive", "import unetpp_fast.common.errors"),
    ],
)
def test_one_import_against_the_order_is_seen(name, line):
    found = modules()
    edges = graph()
    edges[name] |= imports(name, line, set(found), package=False)
    assert faults(edges)


def test_only_the_doors_stand_directly_in_the_package():
    assert {path.stem for path in (ROOT / "unetpp_fast").glob("*.py")} == ALLOWED_AT_THE_TOP


def test_no_module_shares_a_name_with_a_public_function():
    assert not {name.rpartition(".")[2] for name in modules()} & set(uf.__all__)
