"""One hash of the sources that a measurement depends on, so that figures of older sources are seen to be stale."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
FOLDERS = ("architecture", "execution", "models", "deployment")  # of the package: the code that a pass runs
BUILT = {".pyc", ".so", ".dll", ".o", ".d", ".md"}


def pass_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Every file of `FOLDERS`, of the kernels and, in a repository, of csrc, by its path relative to the package's parent;
    sorted."""
    inside, beside = package / "kernels", package.parent / "kernels"  # installed, or in the repository
    folders = {"kernels": inside if inside.is_dir() else beside, "csrc": package.parent / "csrc"}
    folders |= {f"{package.name}/{name}": package / name for name in FOLDERS}
    files = {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in BUILT
    }
    return dict(sorted(files.items()))


@lru_cache
def source_hash(package: Path = PACKAGE) -> str:
    """16 hexadecimal digits over the relative paths and contents of `pass_files`."""
    digest = hashlib.sha256()
    for name, path in pass_files(package).items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
