"""The reference of every public name says shapes, dtypes or units, errors, and its paper; the figures are up to date."""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest

import unetpp_fast as uf

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = (DOCS / "api.md").read_text()
NAMES = [name for name in uf.__all__ if name != "__version__"]
CANNOT_FAIL = {"Node", "parameter_count"}
PAPERS = {
    "UNetPlusPlus": "1807.10165", "from_paper": "1807.10165", "BCEDiceLoss": "1807.10165", "Topology": "1807.10165",
    "backbone": "1807.10165", "UNet": "1505.04597", "FocalLoss": "1708.02002", "TverskyLoss": "1706.05721",
    "DeepSupervision": "1807.10165",
}  # fmt: skip
SHAPE = r"\[N, |a scalar|of a module|size"
UNIT = r"floating point|float32|float64|precision|pixels|channels|bytes|dtype|probabilit|logits|values in"


def own(what: type, name: str) -> FunctionType | None:
    """A method of a class that this package defines."""
    found = getattr(what, name, None) if inspect.isclass(what) else None
    return found if found is not None and found.__module__.startswith("unetpp_fast") else None


def said(name: str) -> str:
    """The docstring of a name, and of what its reference shows of a class."""
    what = getattr(uf, name)
    if not inspect.isclass(what):
        return what.__doc__
    shown = [what, *(method for name in ("forward", "predict") if (method := own(what, name)))]
    return "\n".join(part.__doc__ for part in shown)


def takes_tensors(name: str) -> bool:
    what = getattr(uf, name)
    functions = [what] if isinstance(what, FunctionType) else [method for method in [own(what, "forward")] if method]
    return any("Tensor" in str(hint) or name == "image" for function in functions
               for name, hint in inspect.get_annotations(function).items() if name != "return")  # fmt: skip


def test_every_public_name_is_in_the_reference():
    assert sorted(re.findall(r"^\.\. (?:autoclass|autofunction|data):: (\w+)(?!\.)\b", REFERENCE, re.MULTILINE)) == sorted(
        uf.__all__
    )


@pytest.mark.parametrize("name", [name for name in NAMES if takes_tensors(name)])
def test_what_takes_tensors_says_their_shapes_and_dtypes_or_units(name):
    assert re.search(SHAPE, said(name)) and re.search(UNIT, said(name))


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_documented(name):
    text = said(name)
    assert name in CANNOT_FAIL or "Raises:" in text or re.search(r"errors as in\s+`(\w+)`", text)


@pytest.mark.parametrize("name", PAPERS)
def test_what_implements_a_paper_links_to_it(name):
    assert f"arxiv.org/abs/{PAPERS[name]}" in getattr(uf, name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_documented(name):
    """By its own name, in the docstring of the function or class, unless that points to another's for all."""
    what = getattr(uf, name)
    text = said(name)
    if "Arguments and errors as in" in text:
        return
    constructor = what.__init__ if inspect.isclass(what) else what
    given = [p for p in inspect.signature(constructor).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    assert not [p.name for p in given if p.name != "self" and not re.search(rf"\b{p.name}\b", text)]


def test_the_figures_are_drawn_by_the_script_as_it_is():
    """Else run `python docs/draw.py`."""
    hashed = hashlib.sha256((DOCS / "draw.py").read_bytes()).hexdigest()[:16]
    figures = list((DOCS / "figures").glob("*.svg"))
    assert figures and all(f"docs/draw.py {hashed}" in figure.read_text() for figure in figures)
