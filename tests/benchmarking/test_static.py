"""The static model's arithmetic, held to small cases that were counted by hand; its program; and what it says of the
configurations that the package takes first."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.sass.listing import decode

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "static"))
import bounds
import candidates
import compiled_cuda
import kept
import recording

from unetpp_fast.kernels import cuda_ops

HAS_NVCC = shutil.which("nvcc") is not None and importlib.util.find_spec("triton") is not None


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_the_slowest_part_bounds_and_the_busiest_multiprocessor_counts():
    """133 blocks on 132 multiprocessors take as long as 264."""
    clocks = 1000 * 1.83
    work = bounds.Work("", 133, flops=4e9, tensor=clocks, issue=2 * clocks, shared=clocks / 2, l2=5.5e6, dram=3.35e6)
    expected = {"tensor": 2e-6, "issue": 4e-6, "shared": 1e-6, "l2": 1e-6, "dram": 1e-6}
    assert work.bounds() == pytest.approx(expected)
    assert (work.binding, work.seconds, work.serial) == ("issue", pytest.approx(4e-6), pytest.approx(9e-6))
    assert work.tflops == pytest.approx(1000)
    assert bounds.tensor_clocks(613e12 / 132, 613e12) == pytest.approx(1.83e9)


def test_other_slots_after_products_and_the_port_of_few_multiprocessors():
    """Products and the other instructions take turns in `in_turn`; two multiprocessors do not get all of L2's bytes."""
    work = bounds.Work("", 2, tensor=1830, issue=2 * 1830, shared=1830, l2=2 * 64 * 4 * 1830, dram=3.35e6)
    assert work.in_turn == pytest.approx(4e-6) and work.bounds()["l2"] == pytest.approx(4e-6)
    assert bounds.Work("", 2, tensor=1830, issue=2 * 1830).in_turn == pytest.approx(3e-6)


def test_instructions_by_phase():
    """Loads end at the wait, the transformation at a barrier, products at the next; the rest finishes the block."""
    names = "LDGSTS.E.BYPASS.128 [R1], R2; DEPBAR.LE SB0, 0x0; LDS.128 R4, [R1]; BAR.SYNC 0x0; LDSM.16.M88.4 R4, [R1]; "
    names += "HMMA.16816.F32 R0, R4, R8, R0; BAR.SYNC 0x0; LDGSTS.E.BYPASS.128 [R1], R2; DEPBAR.LE SB0, 0x0; BAR.SYNC 0x0; "
    names += "HMMA.16816.F32 R0, R4, R8, R0; STG.E.128 [R2], R0"
    code = decode("\n".join(f"/*{16 * k:04x}*/ {text.strip()};" for k, text in enumerate(names.split(";"))))
    guarded = [(instruction, k != 5) for k, instruction in enumerate(code)]  # the first product does not work
    counts = compiled_cuda.Counts(compiled_cuda.by_phase(guarded))
    assert [counts.total(phase) for phase in compiled_cuda.PHASES] == [3, 3, 5, 1]
    assert [counts.of(name) for name in ("HMMA", "off", "LDGSTS")] == [1, 1, 2]
    assert (counts.total(), counts.shared_bytes()) == (12, 32 * (2 * 16 + 16 + 16))


def test_a_triton_convolution_by_its_steps():
    given = {"out_ptr": meta(1, 1, 16, 16, 64), "a_ptr": meta(1, 1, 16, 16, 48), "KA": 48, "KB": 0, "CO": 64, "TAPS": 3}
    given |= {"AXES": 2, "STRIDE": 1, "ADD": True, "PHASED": False, "BLOCK_D": 1, "BLOCK_H": 8, "BLOCK_W": 16}
    given |= {"BLOCK_KA": 32, "BLOCK_KB": 32, "BLOCK_CO": 64, "num_stages": 3}
    work = recording.of_triton("_conv_kernel", 2, given)
    assert work.flops == 2 * 256 * 48 * 64 * 9
    assert work.l2 == 2 * (18 * (128 + 64) * 32 + 128 * 64) * 2
    assert work.dram == 2 * (256 * 64 * 2 + 256 * 48)
    assert work.tensor == pytest.approx(18 * 2 * 128 * 32 * 64 / (989e12 / 132 / 1.83e9))
    assert work.shared == 18 * (2 * (128 + 64) + 64) * 32 * 2 / 128  # copied; read, the weights for each half of the pixels
    plain = recording.of_triton("_conv_kernel", 2, {**given, "num_stages": 1})
    assert plain.l2 == 2 * (2 * 32 * (10 * 18 + 9 * 64) + 128 * 64) * 2  # a tile with its halo, and weights for each tap
    assert plain.shared == 18 * (3 * (128 + 64) + 64) * 32 * 2 / 128


def test_operators_by_bytes_and_views_for_nothing():
    with recording.recorded() as found:
        x = meta(2, 32, 8, 8)
        torch.cat([x, x.new_zeros(2, 32, 8, 8)], 1).view(-1)
        torch.nn.functional.conv2d(x, meta(32, 32, 3, 3), padding=1)
    assert [(work.name, work.dram) for work in found] == [
        ("new_zeros", 8192), ("cat", 4 * 8192), ("convolution", 2 * 8192 + 2 * 32 * 32 * 9),
    ]  # fmt: skip
    assert found[2].seconds == pytest.approx(2 * 128 * 32 * 32 * 9 / 150e12)


@pytest.mark.skipif(not HAS_NVCC, reason="the CUDA kernels need nvcc")
@pytest.mark.parametrize("config", cuda_ops.configs(32, False))
def test_a_cuda_convolution_issues_its_products(config):
    """As many HMMA as the block's flops need, and all bytes of tile and weights by 16."""
    options = {"phased": False, "act": True}
    launch = compiled_cuda.conv(config, meta(1, 1, 64, 64, 32), meta(1, 1, 64, 64, 32), None, options)
    counts = compiled_cuda.counts([launch])[launch.key]
    assert launch.blocks == 64 // config.rows * 2
    assert counts.of("HMMA") * launch.warps * 4096 == 2 * 9 * 32 * 32 * config.rows * 32
    pieces = ((config.rows + 2) * 34 + 9 * 32) * 4
    assert counts.of("LDGSTS") * launch.warps * 32 == pytest.approx(pieces, rel=0.1)
    work = compiled_cuda.work("", launch, counts, 1.0, 0.0)
    assert work.tensor == pytest.approx(bounds.tensor_clocks(2 * 9 * 32 * 32 * config.rows * 32, bounds.MMA_SYNC))


@pytest.mark.skipif(not HAS_NVCC, reason="the CUDA kernels need nvcc")
@pytest.mark.parametrize("phased", [False, True])
def test_a_cuda_weight_gradient_multiplies_as_often_as_its_tiles_ask(phased):
    """Products that a guard keeps off at the tile's borders take no time of the tensor cores."""
    a, dy = meta(1, 1, *((64, 64) if phased else (128, 128)), 32), meta(1, 1, 128, 128, 32)
    partial = torch.empty(4 if phased else 8, 16 if phased else 9, 32, 32, device="meta")
    launch = compiled_cuda.wgrad(a, dy, None, partial, phased)
    longer = compiled_cuda.wgrad(
        *(torch.empty_strided((2, *x.shape[1:]), x.stride(), dtype=x.dtype, device="meta") for x in (a, dy)),
        None,
        partial,
        phased,
    )
    both = compiled_cuda.counts([launch, longer])
    assert (launch.blocks, launch.tiles, longer.tiles) == (4, 16, 32)
    counts = both[launch.key]
    assert both[longer.key].of("HMMA") == 2 * counts.of("HMMA")
    assert counts.of("HMMA") * launch.warps * 4096 == 2 * 32 * 32 * (4 if phased else 9) * 16 * 256


@pytest.mark.skipif(not HAS_NVCC, reason="the CUDA kernels need nvcc")
def test_no_cuda_kernel_issues_more_than_it_did():
    """Within two hundredths of `kept.json`; a change that is meant is kept by `python benchmarks/static --keep`."""
    compiler, before = kept.kept()
    if compiler != kept.compiler():
        pytest.skip(f"the counts were kept for {compiler}")
    now = kept.issued()
    assert now.keys() == before.keys()
    more = {name: (before[name], count) for name, count in now.items() if count > 1.02 * before[name]}
    assert not more, f"instructions of a warp, before and now: {more}"


@pytest.mark.skipif(not HAS_NVCC, reason="the CUDA kernels need nvcc")
def test_the_program_prints_networks_verdicts_and_candidates(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["static", "--size", "32", "--images", "1"])
    spec = importlib.util.spec_from_file_location("static_program", Path(candidates.__file__).with_name("__main__.py"))
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main()
    printed = capsys.readouterr().out
    assert (
        len(re.findall(r"^(?:inference|training), .*ratio \d+\.\d\d, goal \d\.\d: (?:met|missed)", printed, re.MULTILINE))
        == 6
    )
    found = re.findall(
        r"^(\d+→\d+(?: norm stats)?) +(cuda|triton) .* (\d+)  (?:tensor|issue|shared|l2|dram)", printed, re.MULTILINE
    )
    assert {name for name, *_ in found} == {
        f"{k}→{co}{form}" for k, co in candidates.CHANNELS for form in ("", " norm stats")
    }
    assert {engine for _, engine, _ in found} == {"cuda", "triton"} and all(int(rate) > 0 for *_, rate in found)


@pytest.mark.skipif(not HAS_NVCC, reason="the CUDA kernels need nvcc")
@pytest.mark.parametrize("images", [1, 16])
def test_the_first_configurations_are_near_the_best_by_the_model(images):
    """Those that run without tuning, of the paper's widths at 512²: within a tenth of the best bound of their kind."""
    for level, width in enumerate((32, 64, 128, 256, 512)):
        for k, normed in ((width, False), (2 * width, True)):
            found = candidates.candidates(k, width, 512 >> level, images, normed)
            for engine in {one.engine for one in found}:
                seconds = {one.shape: one.work.seconds for one in found if one.engine == engine}
                first = next(iter(seconds))
                assert seconds[first] <= 1.1 * min(seconds.values()), (k, width, engine, seconds)
