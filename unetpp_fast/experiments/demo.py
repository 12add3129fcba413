"""The paper's comparison on one real image: train U-Net and UNet++ on its left half, test them on the right half, prune."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..architecture.precision import autocast
from ..common import messages
from ..common.atomic_files import check_folder
from ..common.errors import InputError
from ..common.extras import need
from ..common.timing import interleaved_times
from ..data.images import read_image
from ..data.masks import read_labels
from ..data.patches import Patches
from ..data.samples import ArraySample
from ..models.architectures import UNet, UNetPlusPlus, parameter_count
from ..models.network import Network
from ..models.prediction import evaluating, pad_to_multiple
from ..training import processes
from ..training.evaluation import evaluate
from ..training.recipe import Recipe
from ..training.trainer import Trainer
from . import pictures

FEATURES = (16, 32, 64, 128, 256)
PATCH = 96
STEPS_PER_EPOCH = 20


def example(name: str) -> Path:
    """The path of a file of the installed sample data, e.g. "nuclei/image.png".

    Raises:
        InputError: it is not installed.
    """
    try:
        path = Path(str(resources.files("unetpp_fast.examples"))) / name
    except ModuleNotFoundError:  # in a repository that is not installed
        path = Path(__file__).parents[2] / "examples" / name
    if not path.is_file():
        raise InputError(f"the sample data is missing ({path}): reinstall the package")
    return path


def halves() -> tuple[ArraySample, ArraySample]:
    """The left and the right half, 512x256 pixels each, of the nuclei image with its mask."""
    image = read_image(example("nuclei/image.png"))
    mask = read_labels(example("nuclei/instances.png"))[None] > 0
    middle = image.shape[-1] // 2
    left, right = np.s_[..., :middle], np.s_[..., middle:]
    return ArraySample("left", image[left], mask[left]), ArraySample("right", image[right], mask[right])


def run(
    out: Path,
    *,
    epochs: int = 10,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    reproducible: bool = False,
    loss: nn.Module | None = None,
) -> list[dict]:
    """Trains, tests and prunes; prints the table, writes `qualitative.png` and `speed_accuracy.png` to `out`.

    Args:
        reproducible: as in `Recipe`. loss: as in `Trainer`.

    Returns:
        The rows of the table, keys name, parameters, gflop, iou, dice, ms.
    """
    left, right = halves()
    recipe = make_recipe(epochs, seed, dtype, reproducible)
    rows, masks = compare(left, right, recipe, out, device, patch=PATCH, loss=loss, features=FEATURES)
    if processes.is_first():
        pictures.qualitative(out / "qualitative.png", right.image, right.mask[0], masks)
        messages.say(f"pictures: {out / 'qualitative.png'}, {out / 'speed_accuracy.png'}")
    return rows


def make_recipe(epochs: int = 10, seed: int = 0, dtype: str = "float32", reproducible: bool = False) -> Recipe:
    """The recipe of the demos."""
    return Recipe(epochs=epochs, seed=seed, dtype=dtype, learning_rate=1e-3, reproducible=reproducible)


def compare(
    train: ArraySample,
    test: ArraySample,
    recipe: Recipe,
    out: Path,
    device: str,
    *,
    patch: int,
    loss: nn.Module | None = None,
    **options,
) -> tuple[list[dict], dict[str, tuple[np.ndarray, float]]]:
    """Trains U-Net and UNet++ on one part of an image or volume, tests them and pruned UNet++ on another.

    Prints the table and draws `speed_accuracy.png`.

    Args:
        patch: side of the training patches.
        loss: as in `Trainer`.
        options: keywords of both networks.

    Returns:
        The rows of the table, and for both networks the mask of `test`, bool `[*S]`, with its IoU.
    """
    need("matplotlib.figure", "demo")  # fails now rather than after minutes of training
    check_folder(out)
    unet = trained("U-Net", UNet, train, recipe, device, patch, loss, **options)
    nested = trained("UNet++", UNetPlusPlus, train, recipe, device, patch, loss, deep_supervision=True, **options)
    models = {"U-Net": unet, "UNet++ accurate": nested}
    models |= {f"UNet++ L{level}": nested.prune(level) for level in nested.topology.heads}
    dtype = recipe.dtype
    first = processes.is_first()  # only one process measures times; the others wait
    times = milliseconds(list(models.values()), test, dtype) if first else [math.nan] * len(models)
    rows = [_row(name, model, test, ms, dtype) for (name, model), ms in zip(models.items(), times, strict=True)]
    if not first:
        return rows, {}
    print("\n" + table(rows) + "\n")
    size = "x".join(map(str, test.mask.shape[1:]))
    title = f"Pruning UNet++: {size}, batch 1, {device}, {torch.get_num_threads()} threads, {dtype}"
    pictures.speed_accuracy(out / "speed_accuracy.png", [row for row in rows if row["name"] != "UNet++ accurate"], title)
    shown = {"U-Net": rows[0], "UNet++": rows[1]}
    return rows, {name: (_mask(models[row["name"]], test, dtype), row["iou"]) for name, row in shown.items()}


def trained(
    name: str,
    build: Callable[..., Network],
    sample: ArraySample,
    recipe: Recipe,
    device: str,
    patch: int,
    loss: nn.Module | None = None,
    **options,
) -> Network:
    """A network with these options, trained on patches of a sample, by all processes together."""
    torch.manual_seed(recipe.seed)
    network = build(1, 1, **options).to(device)
    patches = Patches([sample], patch, per_image=recipe.batch_size * STEPS_PER_EPOCH, seed=recipe.seed)
    size = "x".join([str(patch)] * network.topology.spatial_dims)
    say = messages.say if processes.is_first() else lambda text: None
    say(f"training {name} on {len(patches) * recipe.epochs} patches of {size}")
    began = time.perf_counter()
    Trainer(network, patches, [], recipe, loss=loss).fit(progress=messages.shown())
    say(f"{name} trained in {time.perf_counter() - began:.0f} s")
    return network.eval()


def milliseconds(models: Sequence[Network], sample: ArraySample, dtype: str = "float32", rounds: int = 11) -> list[float]:
    """Median time of each model's forward pass on one whole image; the runs are interleaved."""
    device = next(models[0].parameters()).device
    image = torch.from_numpy(sample.load()[0])[None].to(device)

    def run(model: Network, x: torch.Tensor) -> None:
        with autocast(device, dtype):
            model(x)

    padded = [pad_to_multiple(image, model.multiple) for model in models]
    runs = {str(index): functools.partial(run, *pair) for index, pair in enumerate(zip(models, padded, strict=True))}
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        times = interleaved_times(runs, device, rounds=rounds)
    return [statistics.median(values) for values in times.values()]


def _row(name: str, model: Network, sample: ArraySample, ms: float, dtype: str) -> dict:
    scores = evaluate(model, [sample], dtype=dtype)
    gflop = model.gflop(sample.mask.shape[1:])
    return {"name": name, "parameters": parameter_count(model), "gflop": gflop, "ms": ms, **scores}


def _mask(model: Network, sample: ArraySample, dtype: str) -> np.ndarray:
    device = next(model.parameters()).device
    with autocast(device, dtype):
        probabilities = model.predict(torch.from_numpy(sample.load()[0])[None].to(device))
    return (probabilities[0, 0] > 0.5).cpu().numpy()


def table(rows: Sequence[dict]) -> str:
    """The rows as aligned text."""
    lines = [f"{'model':<16} {'parameters':>11} {'GFLOP':>7} {'IoU':>7} {'Dice':>7} {'ms/image':>9}"]
    for row in rows:
        numbers = f"{row['parameters']:>11,} {row['gflop']:>7.2f} {row['iou']:>7.4f} {row['dice']:>7.4f} {row['ms']:>9.1f}"
        lines.append(f"{row['name']:<16} {numbers}")
    return "\n".join(lines)
