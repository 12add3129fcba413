"""Other libraries, where they are installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SMP = "0.6.0"
SMP_FOLDER = Path(__file__).parents[2] / ".venv" / f"smp-{SMP}"  # `make test` puts smp, timm and torchvision there
_SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
_kept: list[torch.library.Library] = []


def library(name: str) -> ModuleType:
    """The module, or a skip with the reason; one that needs torchvision imports beside a torchvision without operators."""
    if SMP_FOLDER.is_dir() and str(SMP_FOLDER) not in sys.path:
        sys.path.append(str(SMP_FOLDER))  # last: what is installed goes first
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        pytest.skip(f"{name} needs torchvision: {error}")
    except RuntimeError:  # its operators are not built for this torch; smp's encoders use none of them
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        _declare_operators()
    return pytest.importorskip(name)


def _declare_operators() -> None:
    declared = torch.library.Library("torchvision", "DEF")
    for schema in (*_SCHEMAS, *(f"q{schema}" for schema in _SCHEMAS)):
        declared.define(schema)
    _kept.append(declared)
    register = torch.library.register_fake

    def lenient(name, *args, **keywords):
        """Operators that do not exist are left out."""

        def wrap(function):
            try:
                return register(name, *args, **keywords)(function)
            except RuntimeError:
                return function

        return wrap

    torch.library.register_fake = lenient
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register
