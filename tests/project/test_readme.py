"""The README and the pages of docs/: their Python runs, their links exist, and the commands are in the Makefile."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNetPlusPlus

import unetpp_fast as uf

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
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
NEEDS_A_NETWORK = {"docs/encoders.md": "the weights of ImageNet", "docs/hub.md": "the Hub"}  # these are only compiled


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables = GIVEN.get(page, dict)()
    for code in re.findall(r"```python\n(.+?)```", PAGES[page], re.DOTALL):
        program = compile(code, page, "exec")
        if page not in NEEDS_A_NETWORK:
            exec(program, variables)


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


def test_every_page_is_linked_from_the_readme():
    assert set(PAGES) - {"README.md"} <= set(re.findall(r"\]\(([^)#]+)", README))


def test_its_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{command}: " in makefile
