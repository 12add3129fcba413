"""Distances between the surfaces of predicted and true objects, by MONAI."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.extras import need
from .losses import check_pair

EXTRA = "metrics"
PERCENTILE = 95
NAMES = ("asd", "hd95")


def surface_distances(predicted: Tensor, target: Tensor, spacing: Sequence[float] | None = None) -> dict[str, list[float]]:
    """How far the surface of each class lies from where it should be, in one image or volume.

    Args:
        predicted, target: bool or 0 and 1, `[C, *S]`, on any device.
        spacing: size of a pixel or voxel along each axis of S, such as millimetres; None: 1, distances in pixels.

    Returns:
        Per class "asd", the mean of both directions' distances (symmetric average surface distance), and "hd95", the 95th
        percentile of the distances, the larger of both directions (Hausdorff). A class that is in neither has NaN, one
        that is in only one of the two infinity.

    Raises:
        ValueError: shapes differ, or there are not as many spacings as axes.
        InputError: MONAI or scipy is missing (extra `metrics`).
    """
    check_pair(predicted[None], target[None], "predicted")
    if spacing is not None and len(spacing) != predicted.ndim - 1:
        raise ValueError(f"spacing must have {predicted.ndim - 1} numbers, one per axis, not {len(spacing)}")
    need("scipy", EXTRA)
    metrics = need("monai.metrics", EXTRA)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for one, other in zip(predicted.cpu() > 0.5, target.cpu() > 0.5, strict=True):
        if not (one.any() and other.any()):
            alone = math.inf if one.any() or other.any() else math.nan
            for name in NAMES:
                found[name].append(alone)
            continue
        pair = {"y_pred": one[None, None], "y": other[None, None], "include_background": True, "spacing": spacing}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that MONAI would prefer
            found["asd"].append(float(metrics.compute_average_surface_distance(symmetric=True, **pair)))
            found["hd95"].append(float(metrics.compute_hausdorff_distance(percentile=PERCENTILE, **pair)))
    return found


def surface_sums(distances: dict[str, list[float]]) -> Tensor:
    """Of one image, float64 `[C, 4]`, to be added over images: both distances where they are finite, 1 there, and 1 where
    the class is in the mask or the prediction alone."""
    table = torch.tensor([distances[name] for name in NAMES], dtype=torch.float64).T
    both, alone = table.isfinite().all(dim=1, keepdim=True), table.isinf().all(dim=1, keepdim=True)
    return torch.cat([table.where(both, 0.0), both.double(), alone.double()], dim=1)


def surface_means(sums: Tensor) -> dict[str, list[float]]:
    """Means over the images whose mask and prediction both have the class, NaN if there is none, and the number of images in
    which it is in one of them alone: keys "class_asd", "class_hd95" and "class_alone"."""
    means = (sums[:, :2] / sums[:, 2:3]).T.tolist()
    return {
        **{f"class_{name}": values for name, values in zip(NAMES, means, strict=True)},
        "class_alone": sums[:, 3].tolist(),
    }
