"""Which sources a measurement depends on, as one hash: a figure of other sources is stale and shows as such."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

# What cannot change a pass. A new file counts until it is named here: a stale mark too many is better than one too few.
APART = {
    "__init__.py", "__main__.py", "backbone.py", "bench.py", "bench_report.py", "budget.py", "cli.py", "commands.py",
    "compare.py", "convert.py", "data.py", "demo.py", "demo_volume.py", "explaining.py", "files.py", "info.py",
    "losses.py", "measuring.py", "metrics.py", "pictures.py", "processes.py", "readers.py", "readers_lidc.py",
    "readers_volume.py", "recipe.py", "records.py", "reproducible.py", "runs.py", "sources.py", "tasks.py", "tiles.py",
    "training.py", "tuning.py", "volumes.py",
}  # fmt: skip
BUILT = {".pyc", ".so", ".o", ".d", ".md"}


def engine_files() -> list[Path]:
    """The kernels, the CUDA sources where they are, and the modules that run a pass, in a fixed order."""
    here = Path(__file__).parent
    inside, beside = here / "kernels", here.parent / "kernels"  # installed, or in the repository
    folders = [inside if inside.is_dir() else beside, here.parent / "csrc"]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix not in BUILT]
    return sorted(found) + sorted(path for path in here.glob("*.py") if path.name not in APART)


@lru_cache
def source_hash() -> str:
    """16 hexadecimal digits over the names and contents of `engine_files`."""
    digest = hashlib.sha256()
    for path in engine_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
