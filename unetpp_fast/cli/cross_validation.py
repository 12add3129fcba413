"""`unetpp-fast train --folds`: one training per fold, each in a folder of its own."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..common.errors import InputError
from ..data.folds import Fold, make_folds, read_folds, samples_of, write_folds
from ..data.pairs import Folder
from ..training import checkpoint, processes

FILE = "folds.json"


def check(options: argparse.Namespace) -> None:
    """Raises InputError for options of folds that do not go together."""
    if options.folds is not None and not 0 <= (options.fold or 0) < options.folds:
        raise InputError(f"--fold must be 0 to {options.folds - 1}, not {options.fold}")


def check_data(options: argparse.Namespace, folder: Folder) -> None:
    """Raises InputError if --fold chooses among folds that there are not."""
    if options.fold is not None and options.folds is None and not folder.has_folds:
        raise InputError("--fold needs --folds, the number of all folds: the data have none of their own")


def run(
    options: argparse.Namespace,
    folder: Folder,
    check_out: Callable[[argparse.Namespace], None],
    train: Callable[[argparse.Namespace, Folder], int],
    say: Callable[[str], None],
) -> int:
    """Trains the folds that the options ask for; returns the exit code of the first that does not end well, or 0.

    Args:
        options: of `train`, whose `out` gets `folds.json` and a folder for each fold.
        folder: the data.
        check_out: raises InputError if a training cannot begin, or be resumed, in its folder.
        train: trains on `folder.samples` and `folder.validation` and returns the exit code.
        say: prints in one process.

    Raises:
        InputError: the data has validation images of its own, the folds cannot be made, or a folder is taken.
    """
    if folder.validation is not None:
        raise InputError(
            f"--folds splits all images, but {options.data} has validation images of its own: leave --folds out"
            + (" (--fold chooses one of its folds)" if folder.has_folds else "")
        )
    folds = _folds(options, folder)
    chosen = range(options.folds) if options.fold is None else [options.fold]
    jobs = [(number, _of_fold(options, number)) for number in chosen]
    if options.resume and not any(job.resume for _, job in jobs):
        raise InputError(f"there is nothing to resume: {jobs[0][1].out / 'last.pt'} does not exist")
    for _, job in jobs:
        check_out(job)
    if processes.is_first():
        write_folds(options.out / FILE, folds)
    for number, job in jobs:
        say(f"fold {number} of 0 to {options.folds - 1}: {job.out}")
        training, validation = (samples_of(folder.samples, folds[number][part]) for part in ("train", "val"))
        code = train(job, replace(folder, samples=training, validation=validation))
        if code:
            return code
    if options.fold is None:
        say(_summary([job.out for _, job in jobs], options.monitor))
    return 0


def _folds(options: argparse.Namespace, folder: Folder) -> list[Fold]:
    """The folds in the folder of the run, if there are any, or new ones."""
    kept = options.out / FILE
    if kept.exists():
        return read_folds(kept, folder.samples, options.folds)
    return make_folds(folder.samples, options.folds, options.seed)


def _of_fold(options: argparse.Namespace, number: int) -> argparse.Namespace:
    out = options.out / f"fold{number}"
    resume = options.resume and (out / "last.pt").exists()
    return argparse.Namespace(**{**vars(options), "out": out, "fold": number, "resume": resume})


def _summary(folders: list[Path], monitor: str) -> str:
    """The scores of the best epochs, their mean and standard deviation."""
    found = [checkpoint.load_checkpoint(path / "best.pt")["best"] for path in folders if (path / "best.pt").exists()]
    each = ", ".join(f"{score:.4f}" for score in found)
    spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    mean = f"{statistics.mean(found):.4f}{spread}" if found else "none"
    return f"{len(found)} folds, best validation {monitor}: {mean} ({each}); predict --checkpoint {folders[0].parent}"
