"""What was measured on this machine, kept in one file per device, torch, triton and state of the kernel sources.

A verdict that was measured while other programs used the cores is doubtful: it holds for the process that measured it, and
later ones measure again, up to three times in all; the one during which threads waited least counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from ...common.atomic_files import locked, write_atomic
from ...common.devices import device_name
from ...kernels import tuning as kernel_tuning
from ..source_hash import source_hash

BUSY = 0.05  # of the time in which threads of this process wanted a core: if they waited longer, a measurement is doubtful
TRIES = 3  # measurements of one kind until the least doubtful one is final
_known: dict[str, dict] = {}  # by setting and key
_latest: dict[str, dict] = {}  # by device and the key without size, for graphs that are being compiled
_doubted: set[str] = set()  # of `_known`, those that another process measured and this one may measure again
_loaded: set[str] = set()


def setting(device: torch.device) -> str:
    """A name for everything that a measurement depends on besides the model and its input."""
    return _setting(device, torch.get_num_threads() if device.type == "cpu" else 0)


@lru_cache
def _setting(device: torch.device, threads: int) -> str:
    kernels = f"isa{os.environ.get('UNETPP_FAST_ISA', '')}"
    if device.type == "cuda":
        import triton

        kernels = f"triton{triton.__version__}"
    return re.sub(r"[^\w.+-]+", "_", f"{device_name(device)}-torch{torch.__version__}-{kernels}-{source_hash()}")


def cache_file(device: torch.device) -> Path:
    """The file of a device's measurements, in `UNETPP_FAST_CACHE` or the user's cache folder."""
    root = (
        os.environ.get("UNETPP_FAST_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unetpp_fast"
    )
    return Path(root) / f"{setting(device)}.json"


def load(device: torch.device) -> None:
    """Reads the measurements of a device, once per process; an unreadable file counts as missing."""
    if setting(device) in _loaded:
        return
    _loaded.add(setting(device))
    table, verdicts = _read(device)
    kernel_tuning.table.update(table)
    for key, verdict in verdicts.items():
        keep(device, key, verdict)
        if is_doubtful(verdict) and verdict.get("tries", 1) < TRIES:
            _doubted.add(_place(device, key))


def _read(device: torch.device) -> tuple[dict[str, str], dict[str, dict]]:
    try:
        content = json.loads(cache_file(device).read_text(encoding="utf-8"))
        return dict(content["configurations"]), dict(content["verdicts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}


def save(device: torch.device) -> Path:
    """Writes the measurements of a device, atomically, merged with those that other processes have written meanwhile."""
    path, before = cache_file(device), _place(device, "")
    mine = {place.removeprefix(before): known for place, known in _known.items() if place.startswith(before)}
    for key, verdict in list(mine.items()):
        if "error" in verdict or _place(device, key) in _doubted:  # what may pass, and what others may have made better
            del mine[key]
    place = kernel_tuning.place(device)
    configurations = {key: value for key, value in kernel_tuning.table.items() if key.endswith(place)}
    with locked(path.with_suffix(".lock")):
        table, theirs = _read(device)
        merged = {"configurations": {**table, **configurations}, "verdicts": {**theirs, **mine}}
        text = json.dumps(merged, indent=1, sort_keys=True)
        write_atomic(path, lambda stream: stream.write(text.encode()))
    return path


def save_if_possible(device: torch.device) -> None:
    with contextlib.suppress(OSError):
        save(device)


def is_doubtful(verdict: Mapping) -> bool:
    """Whether other programs used the cores while it was measured."""
    return verdict.get("waited", 0.0) > BUSY


def keep(device: torch.device, key: str, verdict: dict) -> None:
    """For this process. key: its last word is the size."""
    _known[_place(device, key)] = verdict
    _doubted.discard(_place(device, key))
    _latest[f"{device} {key.rpartition(' ')[0]}"] = verdict


def remember(device: torch.device, key: str, verdict: dict) -> dict:
    """Keeps what was measured, on disk too if that is possible, and returns it; of several doubtful ones, the least so."""
    place = _place(device, key)
    if place in _doubted and "error" not in verdict:
        before = _known[place]
        better = min(verdict, before, key=lambda one: one.get("waited", 0.0))
        verdict = {**better, "tries": before.get("tries", 1) + 1}
    keep(device, key, verdict)
    save_if_possible(device)
    return verdict


def recall(device: torch.device, key: str) -> tuple[dict | None, bool]:
    """What was measured on a device under a key, by this process or one before it, and whether to measure it again."""
    load(device)
    place = _place(device, key)
    return _known.get(place), place in _doubted


def latest(device: torch.device, key: str) -> dict | None:
    """The latest verdict under a key without its size."""
    return _latest.get(f"{device} {key}")


def beginning_with(device: torch.device, start: str) -> dict[str, dict[str, dict]]:
    """What this process knows under keys that begin so, for `adopt`."""
    load(device)
    start = _place(device, start)
    known = {place.partition("|")[2]: verdict for place, verdict in _known.items() if place.startswith(start)}
    return {setting(device): known}


def adopt(device: torch.device, found: Mapping[str, Mapping[str, dict]]) -> None:
    """Keeps what `beginning_with` gave to an earlier process, unless it was measured elsewhere: this one chooses alike."""
    load(device)
    for key, verdict in found.get(setting(device), {}).items():
        keep(device, key, verdict)


def _place(device: torch.device, key: str) -> str:
    return f"{setting(device)}|{key}"
