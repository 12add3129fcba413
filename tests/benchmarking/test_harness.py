"""The benchmark harness: wrong results get no row, one table has all implementations, page and pictures show the rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.rows import row
from torch import nn

import unetpp_fast as uf
from unetpp_fast.benchmarking import backends, harness, measuring, records, report
from unetpp_fast.benchmarking.case import Case, Unavailable, prepare, with_backend
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS, Implementation, measured_on
from unetpp_fast.cli import parser
from unetpp_fast.execution import acceptance

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
CPU = torch.device("cpu")
CASE = Case("inference", "unet++", 2, "accurate", (16, 24), 2, "float32")
PLAIN = {name: IMPLEMENTATIONS[name] for name in ("eager", "eager-channels-last")}


def small(**options) -> uf.Network:
    torch.manual_seed(0)
    return uf.UNetPlusPlus(1, 1, features=(4, 6, 8), deep_supervision=True, **options)


def wrong(network, x, case, change):
    """An implementation that changes the outputs of eager PyTorch."""
    prepared = backends.eager(network, x, case)
    right = prepared.forward
    prepared.forward = lambda x: [change(output) for output in right(x)]
    return prepared


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is one per cent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.01 * g


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_implementations_get_rows(kind, dtype):
    case = dataclasses.replace(CASE, bench=kind, dtype=dtype)
    outcome = harness.measure(case, small(), PLAIN, CPU, rounds=3)
    assert not outcome.wrong and not outcome.skipped and [kept["impl"] for kept in outcome.rows] == list(PLAIN)
    for kept in outcome.rows:
        assert records.faults(kept) == [] and len(outcome.times[kept["impl"]]) == 3
        assert set(kept["ratio_to"]) == set(PLAIN) - {kept["impl"]}


FAULTS = [lambda y: 1.001 * y, lambda y: y * torch.nan, lambda y: y.roll(1, -1)]


@pytest.mark.parametrize(
    ("kind", "change"),
    [*itertools.product(("inference", "training"), FAULTS), ("inference", lambda y: y[..., 1:, :])],
)
def test_a_wrong_output_gets_no_row(kind, change):
    case = dataclasses.replace(CASE, bench=kind)
    planted = {**PLAIN, "fused": functools.partial(wrong, change=change)}
    outcome = harness.measure(case, small(), planted, CPU, rounds=3)
    assert set(outcome.wrong) == {"fused"} and "fused" not in outcome.times
    assert [kept["impl"] for kept in outcome.rows] == list(PLAIN)
    assert all("fused" not in kept["ratio_to"] for kept in outcome.rows)


def test_a_wrong_gradient_gets_no_row():
    case = dataclasses.replace(CASE, bench="training")
    outcome = harness.measure(case, small(), {"fused": functools.partial(wrong, change=Scaled.apply)}, CPU, rounds=3)
    assert "gradients" in outcome.wrong["fused"] and not outcome.rows


@pytest.mark.parametrize(("tolerance", "measured"), [(None, False), (1e-4, False), (1e-2, True)])
def test_a_tolerated_error_is_stated(tolerance, measured):
    """Of a runtime that is less exact by design: its row states the relative error of its outputs."""
    build = Implementation(functools.partial(wrong, change=lambda y: 1.001 * y), "#000000", tolerance=tolerance)
    outcome = harness.measure(CASE, small(), {**PLAIN, "mnn": build}, CPU, rounds=3)
    assert ("mnn" in outcome.wrong) is not measured
    errors = {kept["impl"]: kept["error"] for kept in outcome.rows}
    assert 0 < errors["eager"] < 1e-5 and ("mnn" in errors) is measured
    if measured:
        assert errors["mnn"] == pytest.approx(1e-3, rel=1e-2)


PLANTED = """
import dataclasses, sys, pytest
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS

def wrong(network, x, case):
    prepared = IMPLEMENTATIONS["eager"](network, x, case)
    forward = prepared.forward
    prepared.forward = lambda x: [1.01 * y for y in forward(x)]
    return prepared

planted = dataclasses.replace(IMPLEMENTATIONS["eager-channels-last"], build=wrong)
IMPLEMENTATIONS["eager-channels-last"] = planted
arguments = ["benchmarks/test_models.py", "-q", "--quick", "--dry-run", "-p", "no:cacheprovider", "-p", "no:benchmark",
             "--results", sys.argv[1]]
sys.exit(pytest.main([*arguments, "-k", "inference-unet-L4 and (-eager or -fused)"]))
"""


def test_a_planted_fault_fails_the_benchmark_and_leaves_no_row(tmp_path):
    """The command as a user runs it, with tiny inputs."""
    done = subprocess.run([sys.executable, "-c", PLANTED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "eager-channels-last   WRONG: outputs are" in done.stdout and "1 failed" in done.stdout
    (path,) = tmp_path.iterdir()
    rows = records.read(path)
    assert {"eager", "fused"} <= {kept["impl"] for kept in rows} and path.name in done.stdout
    assert "eager-channels-last" not in {kept["impl"] for kept in rows}
    assert re.search(r"fused\s+[\d.]+ ms  eager [\d.]+", done.stdout)


def test_the_two_times_rule():
    exact = torch.ones(4, dtype=torch.float64)
    off = 0.01 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for factor, good in ((0.0, True), (1.9, True), (2.5, False), (torch.nan, False)):
        reason = acceptance.disagreement([exact], [exact + off], [exact + factor * off], torch.bfloat16)
        assert (reason == "") is (good or factor == 2.5)  # bfloat16's rounding is allowed too
    assert acceptance.disagreement([exact], [exact + off], [exact + 2.5 * off], torch.float16)
    assert acceptance.disagreement([exact], [exact], [exact + 1e-6], torch.float32) == ""
    assert acceptance.disagreement([exact], [exact], [exact + 1e-4], torch.float32)


def takes_64_megabytes(keep: bool) -> float:
    kept = []

    def run() -> None:
        block = torch.ones(16_000_000)
        if keep and not kept:
            kept.append(block)

    return measuring.resident_peak(lambda: run)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("keep", "megabytes"), [(False, 64), (True, 128)])
def test_peak_memory_counts_kept_and_temporary_memory(keep, megabytes):
    assert megabytes - 2 <= measuring.in_fresh_process(takes_64_megabytes, keep) <= megabytes + 8


def test_a_memory_case_gives_a_row_with_a_peak():
    case = dataclasses.replace(CASE, bench="memory", memory_of="training", size=(32, 32))
    outcome = harness.measure(case, small(), {"eager": backends.eager}, CPU)
    (kept,) = outcome.rows
    assert records.faults(kept) == [] and kept["peak_mb"] > 0 and kept["median_ms"] is None


def test_a_fallback_to_the_reference_gets_no_row():
    """It is skipped, with the reason."""
    network = small(dropout=0.5)
    outcome = harness.measure(dataclasses.replace(CASE, bench="training"), network, {"fused": backends.fused}, CPU, rounds=3)
    assert not outcome.rows and outcome.skipped["fused"]
    outcome = harness.measure(
        CASE, network, {"fused-triton": functools.partial(backends.fused, backend="triton")}, CPU, rounds=3
    )
    assert not outcome.rows and "interpreter" in outcome.skipped["fused-triton"]


def test_every_op_of_the_contract_is_measured_against_an_equivalent():
    import op_cases

    from unetpp_fast.kernels import triton_ops

    assert {name.partition("-")[0] for name in op_cases.OPS} >= {name.partition("_")[0] for name in triton_ops.__all__}
    for size in ((4, 8), (2, 4, 4)):
        for op, (_, levels) in op_cases.OPS.items():
            case = Case("kernel", op, levels[0], None, size, 2, "float32")
            outcome = op_cases.measure(case, ["eager", "fused-triton"], CPU, seconds=0, rounds=2, stand_in=True)
            assert not outcome.wrong and len(outcome.rows) == 2, (case, outcome)
            for kept in outcome.rows:
                assert records.faults(kept) == [] and kept["flop"] > 0 and kept["bytes"] > 0
    outcome = op_cases.measure(case, ["eager", "fused-triton"], CPU, seconds=0)
    assert not outcome.rows and "CUDA device" in outcome.skipped["fused-triton"]


def test_a_wrong_kernel_gets_no_row(monkeypatch):
    import op_cases

    right = op_cases.naive.conv_wgrad
    monkeypatch.setattr(op_cases.naive, "conv_wgrad", lambda *args, **options: 1.001 * right(*args, **options))
    case = Case("kernel", "conv-wgrad", 0, None, (8, 16), 2, "float32")
    outcome = op_cases.measure(case, ["eager", "fused-triton"], CPU, seconds=0, rounds=2, stand_in=True)
    assert set(outcome.wrong) == {"fused-triton"} and [kept["impl"] for kept in outcome.rows] == ["eager"]


def test_the_matrix_names_each_case_once():
    import cases

    whole, quick = cases.matrix(), cases.quick()
    for pairs in (whole, quick):
        names = [f"{case}-{name}" for case, name in pairs]
        assert len(set(names)) == len(names) and {name for _, name in pairs} <= set(IMPLEMENTATIONS)
    assert {case.size for case, _ in whole} == {(96, 96), (224, 224), (512, 512), (64, 64, 64)}
    assert {case.level for case, _ in whole if case.bench == "inference"} == {1, 2, 3, 4}
    assert cases.network(dataclasses.replace(quick[0][0], level=2, mode="fast")).topology.heads == (2,)


def double_precision(network, x, case):
    """An implementation of a test: eager PyTorch in float64."""
    prepared = backends.eager(network.double(), x.double(), case)
    return dataclasses.replace(prepared, x=x.double())


def test_one_entry_adds_an_implementation(monkeypatch):
    """Records accept it, the harness runs it, and the matrix and the pictures have it."""
    import cases
    import drawings

    assert "impl cannot be 'mine'" in records.faults(row(impl="mine"))
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", Implementation(double_precision, "#123456", devices=("cpu",), model="unet"))
    outcome = harness.measure(CASE, small(), {**PLAIN, "mine": IMPLEMENTATIONS["mine"]}, CPU, rounds=3)
    assert [kept["impl"] for kept in outcome.rows] == [*PLAIN, "mine"] and not outcome.wrong
    assert all(records.faults(kept) == [] for kept in outcome.rows) and "mine" in outcome.rows[0]["ratio_to"]
    assert {case.model for case, name in cases.matrix() if name == "mine"} == {"unet"}
    assert "mine" in measured_on("unet") and drawings._in_order({"mine", "eager"}) == ["eager", "mine"]


@pytest.mark.parametrize(
    ("changes", "case", "says"),
    [
        ({"devices": ("cuda",)}, CASE, "it runs on cuda only"),
        ({"trains": False}, dataclasses.replace(CASE, bench="training"), "it does not train"),
        ({"needs": ("no_such_module",)}, CASE, "no_such_module cannot be imported: No module named 'no_such_module'"),
    ],
    ids=["device", "training", "module"],
)
def test_an_implementation_that_cannot_run_gives_the_reason(changes, case, says):
    entry = Implementation(backends.eager, "#123456", **changes)
    with pytest.raises(Unavailable, match=says):
        entry(small(), torch.rand(1, 1, 16, 24), case)
    assert harness.measure(case, small(), {"mine": entry}, CPU, rounds=3).skipped == {"mine": says}


def test_a_training_step_takes_another_loss():
    targets = []

    def loss(outputs, target):
        targets.append(target.dtype)
        return sum(output.square().mean() for output in outputs)

    outcome = harness.measure(dataclasses.replace(CASE, bench="training"), small(), PLAIN, CPU, rounds=3, loss=loss)
    assert len(outcome.rows) == 2 and not outcome.wrong and torch.float64 in targets and torch.float32 in targets


@pytest.mark.parametrize(("capacity", "expected"), [(0, 0), (1, 1), (2, 2), (7, 7), (100, 100), (10**9, 4096)])
def test_the_largest_batch_is_found(capacity, expected):
    assert report.largest_batch(lambda batch: batch <= capacity) == expected


def test_the_bench_command_prints_ten_lines(monkeypatch, capsys):
    monkeypatch.setattr(report, "SHOWN", ("eager", "fused"))
    monkeypatch.setattr(measuring, "in_fresh_process", lambda *_: 5.0)
    arguments = ["bench", "--features", "4,8", "--size", "16x32", "--seconds", "0.01", "--device", "cpu", "--level", "1"]
    assert parser.main(arguments) == 0
    text = capsys.readouterr().out
    assert "16x32, batch 1, float32" in text and re.search(
        r"^eager +[\d.]+ +1.00 +5 +[\d.]+ +1.00 +5 +-$", text, re.MULTILINE
    )
    assert len(text.splitlines()) <= 12
    assert all(re.search(f"^auto, {kind}: (cpu|reference) \\(", text, re.MULTILINE) for kind in ("inference", "training"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "513"], "multiple"),
        (["--size", "x"], "is not a size"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--features", "4"], "features must be"),
        (["--arch", "unet", "--level", "2"], "level"),
        (["--checkpoint", "none.pt"], "none.pt does not exist"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(capsys, arguments, says):
    try:
        code = parser.main(["bench", "--device", "cpu", *arguments])
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr().err
    assert code == 2 and text.count("\n") == 1 and says in text


def test_page_and_pictures_are_up_to_date_with_the_records():
    done = subprocess.run([sys.executable, "benchmarks/figures.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_size < 100_000 for path in (ROOT / "benchmarks/figures").glob("*.png"))


def test_a_changed_row_fails_the_check(tmp_path):
    import figures

    folder, pictures, page = tmp_path / "results", tmp_path / "figures", tmp_path / "performance.md"
    trained, path = tmp_path / "demo.json", folder / "gpu.json"
    pictures.mkdir()
    page.write_text(f"before\n{figures.BEGIN}\n{figures.END}\nafter\n")
    trained.write_text(json.dumps([{"name": f"UNet++ L{level}", "iou": 0.8 + level / 100} for level in (1, 2, 3, 4)]))
    on_gpu = {"cuda": "13.0", "device": "A GPU"}
    kernel = {"bench": "kernel", "model": "conv", "level": 0, "mode": None, "gb_s": 3.0, "share_of_ceiling": 0.5}
    ceilings = {"ceiling_tflops": 700.0, "ceiling_gb_s": 3000.0, "flop": 100, "bytes": 4}
    both = ("compile", "fused")
    rows = [
        row(**on_gpu, level=n, batch=batch, impl=name, peak_mb=5.0)
        for n in (1, 2, 3, 4)
        for batch in (1, 4)
        for name in both
    ]
    rows += [row(**on_gpu, bench="training", level=4, mode="accurate", impl=name, peak_mb=7.0) for name in both]
    rows += [row(**on_gpu, bench="inference", model="smp-unet++-resnet34", level=4, impl=name) for name in both]
    records.merge(folder / "cpu.json", [row()])
    where = page, pictures, folder, trained
    figures.write(*where)
    assert figures.check(*where) == [] and figures.NO_GPU in page.read_text()
    records.merge(path, [*rows, row(**on_gpu, **kernel, **ceilings)])
    assert any("performance.md" in line for line in figures.check(*where))
    figures.write(*where)
    assert figures.check(*where) == [] and figures.NO_GPU not in page.read_text()
    names = {name: (pictures / f"{name}-gpu.png").read_bytes() for name in figures.KINDS}
    records.merge(path, [row(**on_gpu, level=4, batch=1, median_ms=2.5, ratio_to={"eager": 1.2})])
    text = " ".join(figures.check(*where))
    assert all(name in text for name in ("performance.md", "inference-gpu.png", "batch-gpu.png", "levels-gpu.png"))
    assert not any(name in text for name in ("roofline", "training", "encoders", "cpu.png"))
    figures.write(*where)
    assert figures.check(*where) == [] and (pictures / "roofline-gpu.png").read_bytes() == names["roofline"]
    path.unlink()
    assert any("has no records" in line for line in figures.check(*where))


def test_a_module_of_a_peer_is_compared_by_its_outputs():
    case = dataclasses.replace(CASE, bench="training")

    def peer(network, x, case):
        prepared = prepare(nn.Sequential(with_backend(network, "reference")), x, case)
        prepared.ours = False
        return prepared

    outcome = harness.measure(case, small(), {"monai": peer}, CPU, rounds=3)
    assert [kept["impl"] for kept in outcome.rows] == ["monai"]
