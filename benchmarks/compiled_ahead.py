"""Kernels compiled on one machine for another: files that travel, and Triton's cache there.

Triton looks for a compiled kernel under a key that hashes its own installation, so its cache cannot simply be copied. Kept
here is what it was compiled from, and the results; `put` computes the key on the machine with the GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from kernel_variants import Variant
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-kernels"


def folder(target: GPUTarget, base: Path = FOLDER, sources: Path = ROOT / "kernels") -> Path:
    """Where kernels compiled by this version of Triton from the present sources for a GPU lie."""
    digest = hashlib.sha256()
    for path in sorted(sources.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = triton.__version__.partition("+")[0]
    return base / f"triton-{version}-sm_{target.arch}-{digest.hexdigest()[:16]}"


def path(folder: Path, variant: Variant) -> Path:
    """The file of a variant: its text, what Triton says of the result, and the result."""
    return folder / f"{variant.name.strip('_')}-{hashlib.sha256(variant.text().encode()).hexdigest()[:16]}.zip"


def compile_into(folder: Path, variant: Variant, target: GPUTarget) -> str:
    """Compiles a variant and writes its file; returns what went wrong, or ""."""
    try:
        compiled = triton.compile(variant.source(), target=target, options=dict(variant.options))
    except Exception as error:  # the compiler's own: a candidate that no GPU of this target can run
        return f"{variant.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    metadata = next(Path(file) for name, file in compiled.metadata_group.items() if name.endswith(".json"))
    folder.mkdir(parents=True, exist_ok=True)
    file = path(folder, variant)
    new = file.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("variant.json", variant.text())
        archive.writestr("metadata.json", metadata.read_text())
        archive.writestr("kernel", compiled.kernel)
    os.replace(new, file)
    return ""


@dataclass(frozen=True)
class Kept:
    """A compiled kernel as read from its file; metadata: Triton's, in JSON."""

    variant: Variant
    metadata: dict
    binary: bytes

    @classmethod
    def read(cls, file: Path) -> Kept:
        with zipfile.ZipFile(file) as archive:
            variant, metadata = (archive.read(f"{name}.json").decode() for name in ("variant", "metadata"))
            return cls(Variant.read(variant), json.loads(metadata), archive.read("kernel"))


def put(folder: Path) -> int:
    """Puts the kernels of a folder into Triton's cache, for the GPU that its driver names; returns how many."""
    target = triton.runtime.driver.active.get_current_target()
    backend, environment = make_backend(target), get_cache_invalidating_env_vars()
    by_signature = {}
    files = sorted(folder.glob("*.zip"))
    for kept in map(Kept.read, files):
        source, options = kept.variant.source(), backend.parse_options(dict(kept.variant.options))
        key = get_cache_key(source, backend, options, env_vars=environment)
        digest = hashlib.sha256(key.encode()).hexdigest()
        manager, name = get_cache_manager(digest), source.name[:150]
        metadata = {**kept.metadata, **vars(options), **environment, "hash": digest}
        group = {
            f"{name}.{backend.binary_ext}": manager.put(kept.binary, f"{name}.{backend.binary_ext}"),
            f"{name}.json": manager.put(json.dumps(metadata, default=vars), f"{name}.json", binary=False),
        }
        manager.put_group(f"{name}.json", group)
        by_signature[tuple(source.signature.items())] = kept.variant
    _make_launchers(list(by_signature.values()), target)
    return len(files)


def is_cached(variant: Variant, target: GPUTarget) -> bool:
    """Whether Triton finds a variant in its cache, and so does not compile it."""
    with mock.patch.object(ASTSource, "make_ir", side_effect=NotImplementedError):
        try:
            triton.compile(variant.source(), target=target, options=dict(variant.options))
        except NotImplementedError:
            return False
    return True


def _make_launchers(variants: list[Variant], target: GPUTarget) -> None:
    """Lets Triton 3.6 compile the C functions that launch kernels, one for each signature, on all cores."""

    def make(variant: Variant) -> None:
        compiled = triton.compile(variant.source(), target=target, options=dict(variant.options))
        triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in [pool.submit(make, variant) for variant in variants]:
            if job.exception():  # the first launch will say so again
                print(f"no launcher was made ahead: {job.exception()}", file=sys.stderr)


if __name__ == "__main__":
    here = folder(triton.runtime.driver.active.get_current_target())
    print(f"{put(here)} kernels compiled ahead ({here.name}); `make gpu-prepare` compiles them")
