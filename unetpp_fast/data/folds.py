"""Folds of a cross-validation, and the file that keeps them, in the format of nnU-Net's splits_final.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic_files import write_atomic
from ..common.errors import InputError
from .samples import groups

Fold = dict[str, list[str]]  # "train" and "val": names of samples


def make_folds(samples: Sequence[Any], count: int, seed: int) -> list[Fold]:
    """Folds of about the same size, in each of which other samples validate; those of one group (a patient) stay together.

    Args:
        samples: in any order, which does not matter.
        count: of the folds.
        seed: of the choice.

    Raises:
        InputError: there are fewer than two folds, or fewer groups than folds.
    """
    names = groups(samples)
    if count < 2:
        raise InputError(f"--folds must be at least 2, not {count}")
    if len(names) < count:
        raise InputError(f"--folds {count} needs at least {count} images, of different patients or videos, not {len(names)}")
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[index]: place % count for place, index in enumerate(order.tolist())}
    folds: list[Fold] = [{"train": [], "val": []} for _ in range(count)]
    for sample in sorted(samples, key=lambda one: one.name):
        for number, fold in enumerate(folds):
            fold["val" if fold_of[groups([sample])[0]] == number else "train"].append(sample.name)
    return folds


def write_folds(path: Path, folds: Sequence[Fold]) -> None:
    """Writes folds as JSON, atomically."""
    write_atomic(path, lambda stream: stream.write((json.dumps(list(folds), indent=1) + "\n").encode()))


def load_folds(path: Path) -> list[Fold]:
    """The folds in a file, whatever they name.

    Raises:
        InputError: it holds none.
    """
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): remove it") from error
    if not isinstance(folds, list) or not all(isinstance(fold, dict) and {"train", "val"} <= fold.keys() for fold in folds):
        raise InputError(f'{path} must be a list of folds {{"train": [names], "val": [names]}}')
    lists = [fold[part] for fold in folds for part in ("train", "val")]
    if not folds or not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise InputError(f'{path} must be a list of folds {{"train": [names], "val": [names]}}')
    return folds


def read_folds(path: Path, samples: Sequence[Any], count: int) -> list[Fold]:
    """Folds that were kept, or written by hand.

    Raises:
        InputError: they are not `count` folds of these samples.
    """
    folds = load_folds(path)
    if len(folds) != count:
        raise InputError(f"{path} holds {len(folds)} folds: use --folds {len(folds)}, or choose another --out")
    known = {sample.name for sample in samples}
    for number, fold in enumerate(folds):
        train, val = set(fold["train"]), set(fold["val"])
        strange = sorted((train | val) - known)
        if strange:
            raise InputError(f"fold {number} of {path} names {strange[0]}, which the data does not hold")
        if train & val or not train or not val:
            what = f"has {sorted(train & val)[0]} on both sides" if train & val else "has an empty side"
            raise InputError(f"fold {number} of {path} {what}")
    return folds


def samples_of(samples: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The samples of these names, sorted by name."""
    return sorted((sample for sample in samples if sample.name in set(names)), key=lambda sample: sample.name)
