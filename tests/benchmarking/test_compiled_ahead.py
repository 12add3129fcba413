"""Kernels that one machine compiles are found in Triton's cache of another; no GPU is needed to see it.

The kernels must not be those of the interpreter, so this file is also a script, which runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.triton_versions import VERSIONS, start

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))


def run(version: str, *arguments: str, **environment: str) -> dict:
    """What this file prints as a script."""
    process = start(version, __file__, *arguments, **environment)
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_compiled_ahead_are_not_compiled_again(version, tmp_path):
    """They are launched from an empty cache after `put`, with Triton's compiler out of order."""
    found = run(version, "put", str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "first"))
    assert found["wanted"] == found["put"] == 3
    assert found["before"] == [False] * 3 and found["after"] == [True] * 3
    assert found["launched"] == [["_read_kernel", [8, 1, 1]]] * 3  # each from the cache
    assert found["other source"] == found["other options"] == found["other target"] is False


def test_other_sources_have_another_folder(tmp_path):
    import compiled_ahead
    from triton.backends.compiler import GPUTarget

    (tmp_path / "a.py").write_text("1")
    targets = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)
    folders = [compiled_ahead.folder(target, tmp_path, tmp_path) for target in targets]
    (tmp_path / "a.py").write_text("2")
    folders.append(compiled_ahead.folder(targets[0], tmp_path, tmp_path))
    assert len(set(folders)) == 3 and all(path.parent == tmp_path for path in folders)


def test_a_pass_over_meta_tensors_compiles_what_a_real_one_does():
    """With tensors that exist, the kernels stubbed, a training step and inference, optimized or not, launch
    the same variants."""
    for only_real, only_meta, both in run("installed", "passes"):
        assert only_real == only_meta == [] and both > 10


def test_every_part_of_the_check_is_listed():
    """The five cases, a row with the default kernels, and one that tunes."""
    found = run("installed", "parts")
    counts = {name: found[name] for name in ("cases", "inference", "small")}
    assert counts["cases"] > 100 and counts["inference"] > 15 and counts["small"] > 100
    assert found["missing"] == [sum(counts.values()), counts["inference"]]


def put(folder: Path) -> dict:
    """Compiles three variants, moves to an empty cache, and launches them there."""
    import compiled_ahead
    import triton
    from kernel_variants import TARGET, StandIn, recorded
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from unetpp_fast.kernels import read

    x, scale = torch.empty(2, 1, 16, 16, 32, dtype=torch.bfloat16), torch.empty(1, 32)

    def launch(device: str, slope: float) -> None:
        read.read(x.to(device), (scale.to(device), scale.to(device)), slope)

    with recorded() as found:
        for slope in (0.0, 0.1, 0.2):
            launch("meta", slope)
    variants = list(found)
    for variant in variants:
        assert compiled_ahead.compile_into(folder, variant, TARGET) == ""

    os.environ["TRITON_CACHE_DIR"] = str(folder / "second")
    launched = []

    class Driver(StandIn):
        """Launches into a list."""

        utils = SimpleNamespace(
            load_binary=lambda name, binary, *_: (1, (name, len(binary)), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 2**17},
            unload_module=lambda module: None,
        )

        def launcher_cls(self, source, metadata):
            return lambda x, y, z, stream, function, *_: launched.append([function[0], [x, y, z]])

    triton.runtime.driver.set_active(Driver())
    before = [compiled_ahead.is_cached(variant, TARGET) for variant in variants]
    count = compiled_ahead.put(folder)
    after = [compiled_ahead.is_cached(variant, TARGET) for variant in variants]
    ASTSource.make_ir = None  # nothing can be compiled from here on
    for slope in (0.0, 0.1, 0.2):
        launch("cpu", slope)
    other = GPUTarget("cuda", 80, 32)
    result = {
        "wanted": len(variants), "put": count, "before": before, "after": after, "launched": launched,
        "other target": compiled_ahead.is_cached(variants[0], other),
        "other options": compiled_ahead.is_cached(replace(variants[0], options=(("num_warps", 8),)), TARGET),
    }  # fmt: skip
    kernel = read._read_kernel
    kernel._unsafe_update_src(kernel.src.replace("other=0.0", "other=1.0"))
    return result | {"other source": compiled_ahead.is_cached(variants[0], TARGET)}


def passes() -> list[tuple[list[str], list[str], int]]:
    """Of a training step and of inference: variants with real tensors alone, with meta tensors alone, and the rest."""
    import kernel_variants

    import unetpp_fast as uf
    from unetpp_fast.execution.call import Call
    from unetpp_fast.execution.fused import operators

    model = uf.UNetPlusPlus(1, 2, features=(16, 32, 33), norm="batch", deep_supervision=True)
    x = torch.zeros(2, 1, 24, 40)
    optimized = uf.optimize(model, dtype=torch.bfloat16)
    call = Call(optimized.network, x, torch.bfloat16)
    with kernel_variants.recorded() as inference, torch.no_grad():
        optimized._by_engine("triton", call)(x, optimized.network.topology.heads)
        operators.forward(Call(model.eval(), x, torch.bfloat16), "triton")  # composes its weights by kernels too
    model.train()
    with kernel_variants.recorded() as training:
        outputs = operators.forward(Call(model, x, torch.bfloat16), "triton")
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    results = []
    for real, is_training in ((inference, False), (training, True)):
        with kernel_variants.recorded() as meta:
            kernel_variants.run_pass(model, x.to("meta"), torch.bfloat16, "triton", is_training)
        only = [[variant.text() for variant in one if variant not in other] for one, other in ((real, meta), (meta, real))]
        results.append((*only, len(real)))
    return results


def parts() -> dict:
    """By part, how many variants it has; and how many an empty folder lacks."""
    import gpu_check
    import gpu_prepare
    from kernel_variants import TARGET

    every = {part.name: part for part in gpu_check.parts(Path("out"), dry_run=False)}
    gpu_check.parts = lambda out, dry_run: [every[name] for name in ("ahead", "cases", "inference", "small", "sanitizer")]
    listed = list(gpu_prepare.variants(TARGET))
    gpu_prepare.variants = lambda target: listed
    found = {name: len(new) for name, new in listed}
    return found | {"missing": [gpu_prepare.check(Path("nowhere"), TARGET, names) for names in ([], ["inference"])]}


if __name__ == "__main__":
    print(json.dumps(put(Path(sys.argv[2])) if sys.argv[1] == "put" else {"passes": passes, "parts": parts}[sys.argv[1]]()))
