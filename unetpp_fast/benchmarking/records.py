"""The rows that benchmarks record: what a row must contain, where rows are stored, and which of them are current.

A file `benchmarks/results/<machine>.json` is a list of rows. A row is identified by the fields in `IDENTITY`; measuring
the same thing again replaces it. Its `source_hash` says which kernels and engine were measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..architecture.precision import TRAINED
from ..common.atomic_files import write_atomic
from ..common.devices import device_name
from ..common.errors import InputError
from ..execution.source_hash import source_hash
from .implementations import IMPLEMENTATIONS

BENCHES = ("inference", "training", "kernel", "memory")
MODES = ("accurate", "fast")
IDENTITY = ("bench", "model", "level", "mode", "size", "batch", "dtype", "impl", "device", "memory_of")
TIMES = ("median_ms", "p20_ms", "p80_ms")
TEXTS = ("model", "device", "torch", "commit", "source_hash", "date")
# Texts that are null on some machines, and numbers that are null in some kinds of rows.
OPTIONAL_TEXTS = ("driver", "triton", "cuda", "cudnn")
OPTIONAL_NUMBERS = (*TIMES, "peak_mb", "tflops")
# Fields of kernel rows only: the traffic, and the ceilings measured in the same run. Memory rows have `memory_of` too, and
# rows of times may have `error`: of the outputs against float64, relative, in Euclidean norms.
EXTRA_NUMBERS = ("gb_s", "ceiling_tflops", "ceiling_gb_s", "share_of_ceiling", "flop", "bytes")
FIELDS = (
    "bench", "model", "level", "mode", "size", "batch", "dtype", "impl", *TIMES, "peak_mb", "ratio_to", "peak_ratio_to",
    "tflops", "device", "driver", "torch", "triton", "cuda", "cudnn", "commit", "source_hash", "date",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def faults(row: object) -> list[str]:
    """What is wrong with a row, one message per fault; empty for a valid row."""
    if not isinstance(row, dict):
        return [f"a row is an object, not {type(row).__name__}"]
    messages = [f"{name} is missing" for name in FIELDS if name not in row]
    messages += [f"{name} is not known" for name in sorted(set(row) - {*FIELDS, *EXTRA_NUMBERS, "memory_of", "error"})]
    if messages:
        return messages
    kernel, memory = row["bench"] == "kernel", row["bench"] == "memory"
    checks = {
        "bench": row["bench"] in BENCHES,
        "mode": row["mode"] in MODES or (kernel and row["mode"] is None),
        "dtype": row["dtype"] in TRAINED,
        "impl": isinstance(row["impl"], str) and row["impl"] in IMPLEMENTATIONS,
        "level": _is_count(row["level"], least=0 if kernel else 1),
        "batch": _is_count(row["batch"]),
        "size": isinstance(row["size"], list) and len(row["size"]) in (2, 3) and all(map(_is_count, row["size"])),
        "memory_of": row.get("memory_of") in (("inference", "training") if memory else (None,)),
        "source_hash": bool(re.fullmatch(r"[0-9a-f]{16}", str(row["source_hash"]))),
        "date": _is_date(row["date"]),
    }
    checks |= {name: isinstance(row[name], str) and bool(row[name]) for name in TEXTS if name not in checks}
    checks |= {name: row[name] is None or isinstance(row[name], str) for name in OPTIONAL_TEXTS}
    checks |= {name: row[name] is None or _is_amount(row[name]) for name in OPTIONAL_NUMBERS}
    checks |= {name: _is_amount(row[name]) for name in (*EXTRA_NUMBERS, "error") if name in row}
    checks |= {name: _is_ratios(row[name], row["impl"]) for name in ("ratio_to", "peak_ratio_to")}
    messages = [f"{name} cannot be {row.get(name)!r}" for name, good in checks.items() if not good]
    needed = ("peak_mb",) if memory else TIMES
    messages += [f"a {row['bench']} row needs {name}" for name in needed if row[name] is None]
    if not messages and not memory and not row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]:
        messages.append("p20_ms, median_ms and p80_ms are not in order")
    return messages


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_ratios(value: object, own: str) -> bool:
    return isinstance(value, dict) and all(
        key in IMPLEMENTATIONS and key != own and _is_amount(ratio) and ratio > 0 for key, ratio in value.items()
    )


def _is_date(value: object) -> bool:
    try:
        return datetime.fromisoformat(str(value)).tzinfo is not None
    except ValueError:
        return False


def digits(value: float) -> str:
    """Three of them, as tables show times: 0.123, 38.1, 2310."""
    return f"{float(f'{value:.3g}'):g}"


def identity(row: Mapping) -> tuple:
    """What a row measured: rows of equal identity replace one another."""
    return tuple(tuple(row[key]) if key == "size" else row.get(key) for key in IDENTITY)


def read(path: Path) -> list[dict]:
    """The rows of a file, none if it does not exist.

    Raises:
        InputError: the file cannot be read or a row is not valid; the message says which and why.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as records ({error}): fix or remove it") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a list of rows: fix or remove it")
    for index, row in enumerate(rows):
        if wrong := faults(row):
            raise InputError(f"{path}, row {index}: {'; '.join(wrong)}")
    return rows


def read_all(folder: Path = RESULTS) -> dict[str, list[dict]]:
    """The rows of every machine, by its name."""
    return {path.stem: read(path) for path in sorted(Path(folder).glob("*.json"))}


def merge(path: Path, rows: Iterable[Mapping]) -> None:
    """Adds rows to a file, in one step; each replaces an older one of the same identity.

    Raises:
        ValueError: a row is not valid; the file is not changed.
    """
    rows = [dict(row) for row in rows]
    for row in rows:
        if wrong := faults(row):
            raise ValueError(f"a row is not valid: {'; '.join(wrong)}")
    known = {identity(row): row for row in [*read(path), *rows]}
    lines = [json.dumps(known[key]) for key in sorted(known, key=repr)]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    write_atomic(path, lambda stream: stream.write(text.encode()))


def is_current(row: Mapping) -> bool:
    """Whether a row was measured with the present kernels and engine."""
    return row["source_hash"] == source_hash()


def legend(table: str) -> str:
    """What † means, after a table with such a row; otherwise ""."""
    return " † is of older sources." if "†" in table else ""


def machine(device: torch.device) -> str:
    """The name of a machine's file of records, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def facts(device: torch.device) -> dict[str, str | None]:
    """The fields of a row that say where, when and with what it was measured."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _driver() if cuda else None,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": str(torch.backends.cudnn.version()) if cuda else None,
        "commit": commit(),
        "source_hash": source_hash(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        version = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return None
    return version[1] if version else None


def commit() -> str:
    """The commit of this tree, followed by "+" if files differ from it; `UNETPP_FAST_COMMIT` overrides it."""
    if name := os.environ.get("UNETPP_FAST_COMMIT"):
        return name
    head, changes = (_git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no"))
    return f"{head}{'+' if changes else ''}" if head else "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def summary(folder: Path = RESULTS) -> str:
    """One line: for each machine, how many rows are current and how many are stale."""
    parts = []
    for rows in read_all(folder).values():
        for device in dict.fromkeys(row["device"] for row in rows):
            mine = [row for row in rows if row["device"] == device]
            current = sum(map(is_current, mine))
            parts.append(f"{device}: {current} current, {len(mine) - current} stale")
    return "; ".join(parts) or "none"


def of_bench(rows: Sequence[Mapping], bench: str) -> list[Mapping]:
    """The rows of one kind."""
    return [row for row in rows if row["bench"] == bench]
