"""The models inside other frameworks' trainers: the examples run unchanged if the framework is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build, make_input

import unetpp_fast as uf

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"steps": 12, "features": (6, 8, 10)}
ALL_FOREGROUND = 0.2201  # the IoU of a model that predicts foreground everywhere: the share of nuclei in the right half


def example(name: str, *needs: str) -> ModuleType:
    """An example as a module; skips the test if a framework is missing."""
    for module in needs:
        pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lightning_trains_it():
    main = example("lightning_nuclei", "lightning").main
    assert main(**SMALL, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False) > ALL_FOREGROUND


def test_accelerate_trains_it():
    assert example("accelerate_nuclei", "accelerate").main(**SMALL, cpu=True) > ALL_FOREGROUND


def test_the_trainer_and_the_evaluator_of_monai_take_it():
    assert example("monai_trainer", "monai", "ignite").main(**SMALL) > ALL_FOREGROUND


def test_mask_rcnn_trains_on_its_pyramid():
    reason = "torchvision is not installed (no build of it for this torch)"
    pytest.importorskip("torchvision", reason=reason, exc_type=ImportError)
    from torchvision.extension import _has_ops

    if not _has_ops():  # another test imported the Python code of one alone
        pytest.skip(reason)
    losses = example("mask_rcnn").main(steps=4, side=96, features=(4, 6, 8, 10, 12), channels=8)
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_mask_rcnn_learns_the_boxes_of_the_nuclei():
    labels = np.zeros((9, 12), np.uint8)
    labels[1:4, 2:7], labels[5:9, 8:12] = 3, 7
    target = example("mask_rcnn").target(labels)
    assert target["boxes"].tolist() == [[2, 1, 7, 4], [8, 5, 12, 9]] and target["labels"].tolist() == [1, 1]
    assert torch.equal(target["masks"], torch.from_numpy(np.stack([labels == 3, labels == 7])))


@pytest.mark.parametrize(("dims", "size"), [(2, (40, 50)), (3, (9, 20, 13))])
@pytest.mark.parametrize("deep", [False, True])
def test_sliding_windows_of_monai_take_it_unchanged(dims, size, deep):
    inferers = pytest.importorskip("monai.inferers", reason="monai is not installed", exc_type=ImportError)
    model = build(uf.UNetPlusPlus, 1, 2, spatial_dims=dims, features=(3, 4, 5), deep_supervision=deep).eval()
    x = make_input(1, 1, *size)
    window = tuple(min(8, axis) for axis in size)
    with torch.no_grad():
        outputs = inferers.sliding_window_inference(x, window, 4, model, overlap=0.5)
        first = model(x[(..., *(slice(0, side) for side in window))])
    pairs = zip(outputs if deep else [outputs], first if deep else [first], strict=True)
    for values, corner in pairs:
        assert values.shape == (1, 2, *size)
        pixel = (0, slice(None), *[0] * dims)  # only the first window sees the corner
        assert_close_relative(values[pixel], corner[pixel], FLOAT32, floor=corner.abs().max().item())
