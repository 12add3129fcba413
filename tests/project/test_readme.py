"""The README and the pages of docs/: their Python runs, and so do the commands of the tutorials; their links exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNetPlusPlus
from support import command_line
from support.peer_libraries import library

import unetpp_fast as uf
from unetpp_fast.cli import parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
}
LINKS = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
FEATURES = (4, 4, 4, 4, 4, 4)


def monai_model() -> dict[str, Any]:
    names = {"torch": torch, "uf": uf, "x": torch.rand(1, 1, 32, 32)}
    return {**names, "their_model": BasicUNetPlusPlus(2, 1, 1, FEATURES, deep_supervision=True)}


def training() -> dict[str, Any]:
    model = uf.UNetPlusPlus(1, 1, features=(2, 4))
    data = [(torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8))]
    return {"torch": torch, "uf": uf, "model": model, "loader": data, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}


# What a page's Python takes from its reader's program.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": monai_model,
    "docs/convert.md": monai_model,
    "docs/training.md": training,
}
TUTORIALS = sorted(page for page in PAGES if page.startswith("docs/tutorials/"))
NEEDS_A_NETWORK = {"docs/encoders.md": "the weights of ImageNet", "docs/hub.md": "the Hub"}  # these are only compiled


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text and page not in TUTORIALS])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables = GIVEN.get(page, dict)()
    for code in re.findall(r"```python\n(.+?)```", PAGES[page], re.DOTALL):
        program = compile(code, page, "exec")
        if page not in NEEDS_A_NETWORK:
            exec(program, variables)


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """Its Python, and its `unetpp-fast` commands on files that it has made; of others the options are checked."""
    monkeypatch.chdir(tmp_path)
    if "import segmentation_models_pytorch" in PAGES[page]:
        library("segmentation_models_pytorch")
    variables: dict[str, Any] = {}
    for kind, code in re.findall(r"```(python|sh)\n(.+?)```", PAGES[page], re.DOTALL):
        if kind == "python":
            exec(compile(code, page, "exec"), variables)
            continue
        for line in [line for line in code.splitlines() if line.startswith("unetpp-fast ")]:
            arguments = shlex.split(line, comments=True)[1:]
            options = parser.build_parser().parse_args(arguments)
            named = [vars(options).get(name) or [] for name in ("data", "images", "checkpoint")]
            files = [path for value in named for path in (value if isinstance(value, list) else [value])]
            if all(path.exists() for path in files) and arguments[0] != "bench":
                assert command_line.run(*arguments) == 0


def test_the_example_is_short_and_gives_masks_of_the_size():
    code = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]
    assert code.count("\n") <= 13 and README.count("\n") <= 110
    variables: dict = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert variables["accurate"].shape == variables["fast"].shape == variables["image"].shape


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_what_a_page_links_to_exists(page, link):
    assert (ROOT / page).parent.joinpath(link).exists()


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_files_that_a_page_names_exist(page):
    assert all((ROOT / name).exists() for name in re.findall(r"`(unetpp_fast/[\w./]+)`", PAGES[page]))


def test_every_page_is_in_the_contents():
    """Sphinx says so too, where it is installed."""
    contents = re.findall(r"```{toctree}.+?```", PAGES["docs/index.md"], re.DOTALL)
    listed = {f"docs/{name}.md" for name in re.findall(r"^[\w/-]+$", "\n".join(contents), re.MULTILINE)}
    assert listed == set(PAGES) - {"README.md", "docs/index.md"}
    assert "docs/index.md" in re.findall(r"\]\(([^)#]+)", README)


def test_its_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{command}: " in makefile
