"""The paper's table 3: U-Net, wide U-Net and UNet++, also with deep supervision, trained by one recipe and several seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.atomic_files import check_folder, write_atomic
from ..common.errors import InputError
from ..common.progress import progress_bar
from ..data.layouts import read_folder
from ..data.pairs import Folder
from ..data.patches import Patches
from ..data.samples import check_samples, groups, split
from ..data.tasks import Task, own_folder
from ..models.architectures import PAPER_FEATURES, UNet, UNetPlusPlus, parameter_count
from ..models.network import Network
from ..training.checkpoint import load_model
from ..training.evaluation import evaluate
from ..training.loss_table import choose_loss
from ..training.recipe import Recipe
from ..training.trainer import Trainer
from . import demo

COLUMNS = ("model", "seed", "parameters", "iou", "dice", "epochs", "seconds")
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2
BASELINE = "U-Net"


class Contender(NamedTuple):
    """A row of the table."""

    name: str
    folder: str
    arch: str
    deep_supervision: bool


CONTENDERS = (
    Contender(BASELINE, "unet", "unet", False),
    Contender("wide U-Net", "wide_unet", "wide_unet", False),
    Contender("UNet++", "unetpp", "unet++", False),
    Contender("UNet++ with deep supervision", "unetpp_ds", "unet++", True),
)


@dataclass(frozen=True)
class Material:
    """What all contenders share: the data and the recipe.

    training, validation, test: samples; without `validation` there is no early stopping.
    per_image: patches per sample and epoch.
    network: keywords of every network.
    exclusive: whether the classes exclude each other.
    found: one line on what a folder holds.
    """

    training: Sequence
    validation: Sequence
    test: Sequence
    channels: int
    classes: int
    task: Task
    per_image: int
    network: Mapping[str, Any]
    recipe: Recipe
    exclusive: bool = False
    found: str = ""


def from_sample(epochs: int | None, dtype: str) -> Material:
    """The left half of the nuclei image for training and the right one for testing, with the demo's norm and learning rate.

    The image is too small for a validation part.
    """
    left, right = demo.halves()
    recipe = Recipe(epochs=10 if epochs is None else epochs, learning_rate=1e-3, dtype=dtype)
    patches = recipe.batch_size * demo.STEPS_PER_EPOCH
    return Material([left], [], [right], 1, 1, own_folder(2), patches, {"norm": "batch"}, recipe)


def from_folder(
    root: Path,
    task: Task | None,
    epochs: int | None,
    dtype: str,
    names: Sequence[str] | None = None,
    ignore: int | None = 255,
) -> Material:
    """A fifth of the data for testing, a fifth of the rest for early stopping, equal for all seeds; the paper's recipe.

    A split that the data come with is used.

    task: None for a folder in one of the layouts of `read_folder`. names, ignore: as there.
    """
    if task:
        samples, classes, channels = task.read(root)
        folder = Folder(samples, classes, "")
    else:
        folder = read_folder(root, names, ignore)
        task = own_folder(folder.spatial_dims)
        channels = check_samples([*folder.samples, *(folder.validation or []), *(folder.test or [])])
    training, validation, test = folder.samples, folder.validation, folder.test
    if test is None:
        training, test = split(training, TEST_SHARE, 0)
    if validation is None:
        training, validation = split(training, VALIDATION_SHARE, 0)
    recipe = Recipe(epochs=100 if epochs is None else epochs, dtype=dtype)
    network = {"norm": None, "dropout": 0.5}
    parts = (training, validation, test)
    return Material(
        *parts, channels, len(folder.classes), task, task.per_image, network, recipe, folder.exclusive, folder.found
    )


def run(
    material: Material, seeds: Sequence[int], width: float, out: Path, device: torch.device, about: Mapping[str, Any]
) -> list[dict]:
    """Trains every contender with every seed. The seed sets the initial weights and the order of the data.

    After each run `compare.csv` and `compare.json` are written to `out`. Runs that they hold are not repeated; an
    interrupted one is resumed.

    Args:
        width: factor on the paper's channels.
        about: settings of the caller, written to `compare.json`.

    Returns:
        One row per run, keys `COLUMNS`.

    Raises:
        InputError: `out` holds a comparison with other settings.
        Interrupted: training was asked to stop.
    """
    recipe = material.recipe
    settings = {**about, "width": width, "epochs": recipe.epochs, "dtype": recipe.dtype, "device": device.type}
    settings["test"] = groups(material.test)
    check_folder(out)
    rows = _finished_rows(out / "compare.json", settings)
    done = {(row["model"], row["seed"]) for row in rows}
    wanted = [(contender, seed) for seed in seeds for contender in CONTENDERS if (contender.name, seed) not in done]
    with progress_bar(total=len(wanted) * recipe.epochs, desc="comparing", unit="epoch", disable=None) as bar:
        for number, (contender, seed) in enumerate(wanted, 1):
            bar.set_postfix_str(f"{contender.name}, seed {seed}")
            rows.append(_train(material, contender, seed, width, out, device, bar.update))
            bar.update(number * recipe.epochs - bar.n)  # it may have stopped early
            _write(out, settings, rows)
    names = [contender.name for contender in CONTENDERS]
    return sorted((row for row in rows if row["seed"] in seeds), key=lambda row: (names.index(row["model"]), row["seed"]))


def _finished_rows(path: Path, settings: Mapping[str, Any]) -> list[dict]:
    """The rows of an earlier call, which must have had the same settings."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, earlier = content["rows"], content["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove it, or choose another --out") from error
    for key, value in settings.items():
        if earlier.get(key) != value:
            shown = f"{key}={earlier.get(key)!r}, now {value!r}" if key != "test" else "set of test images"
            raise InputError(f"{path} was made with another {shown}: use the same, or choose another --out")
    return rows


def build(contender: Contender, material: Material, width: float) -> Network:
    """The contender's network with `width` times the paper's channels, at least one per level."""
    features = [max(1, round(width * channels)) for channels in PAPER_FEATURES[contender.arch]]
    options = {**material.network, "features": features, "spatial_dims": material.task.spatial_dims}
    if contender.arch == "unet++":
        return UNetPlusPlus(material.channels, material.classes, **options, deep_supervision=contender.deep_supervision)
    return UNet(material.channels, material.classes, **options)


def _train(
    material: Material, contender: Contender, seed: int, width: float, out: Path, device: torch.device,
    after_epoch: Callable[[], object],
) -> dict:  # fmt: skip
    torch.manual_seed(seed)
    network: Any = build(contender, material, width).to(device)
    folder = out / f"{contender.folder}-{seed}"
    patches = Patches(material.training, material.task.patch, material.per_image, seed)
    loss = choose_loss(None, material.exclusive)
    trainer = Trainer(network, patches, material.validation, replace(material.recipe, seed=seed), folder, loss=loss)
    if (folder / "last.pt").exists():
        trainer.resume()
    began = time.perf_counter()
    history = trainer.fit(progress=False, after_epoch=lambda _: after_epoch())
    seconds = time.perf_counter() - began
    if material.validation:
        network, _ = load_model(folder / "best.pt", device)
    scores = evaluate(network, material.test, dtype=material.recipe.dtype, loss=loss)
    values = (contender.name, seed, parameter_count(network), scores["iou"], scores["dice"], len(history), seconds)
    return dict(zip(COLUMNS, values, strict=True))


def _write(out: Path, settings: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "compare.csv", lambda stream: stream.write(text.getvalue().encode()))
    content = json.dumps({"settings": settings, "rows": rows}, indent=1)
    write_atomic(out / "compare.json", lambda stream: stream.write(content.encode()))


def table(rows: Sequence[Mapping]) -> str:
    """A line per contender: parameters, IoU and its gain over U-Net with the same seed.

    IoU and gain are mean ± standard deviation and range over the seeds.
    """
    ious: dict[str, dict] = {contender.name: {} for contender in CONTENDERS}
    for row in rows:
        ious[row["model"]][row["seed"]] = row["iou"]
    parameters = {row["model"]: row["parameters"] for row in rows}
    lines = [f"{'model':<28} {'parameters':>11}  {'IoU':<31} gain over {BASELINE}"]
    for name, mine in ious.items():
        gains = [mine[seed] - ious[BASELINE][seed] for seed in mine]
        gain = "" if name == BASELINE else spread(gains, "+")
        lines.append(f"{name:<28} {parameters[name]:>11,}  {spread(list(mine.values())):<31} {gain}".rstrip())
    seeds = ", ".join(str(seed) for seed in ious[BASELINE])
    return "\n".join([*lines, f"seeds {seeds}: mean ± standard deviation (smallest to largest)"])


def spread(values: Sequence[float], sign: str = "") -> str:
    """`0.8531 ± 0.0040 (0.8490 to 0.8570)`; of a single value only the value."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.4f} ({min(values):{sign}.4f} to {max(values):{sign}.4f})"
