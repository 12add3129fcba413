"""The order, the limits and the parts of `make gpu-check`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check

ROOT = Path(__file__).parents[2]

SHOW_CACHE = "import os; print(os.environ['UNETPP_FAST_CACHE'])"


def test_it_refuses_a_machine_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_it_continues_where_it_stopped(tmp_path):
    fine, bad, slow = (
        gpu_check.Part(name, limit, (sys.executable, "-c", code))
        for name, limit, code in (("fine", 30, "print('log')"), ("bad", 30, "raise SystemExit(3)"), ("slow", 1, "input()"))
    )
    slow = dataclasses.replace(slow, command=(sys.executable, "-c", "import time; time.sleep(60)"))
    assert gpu_check.run(fine, tmp_path) == "done" and "log" in (tmp_path / "fine.log").read_text()
    assert gpu_check.run(fine, tmp_path) == "done before"
    assert gpu_check.run(bad, tmp_path).startswith("failed (3)") and not (tmp_path / "bad.done").exists()
    assert gpu_check.run(slow, tmp_path) == "out of time after 1 s"
    assert "skipped: why" in gpu_check.run(dataclasses.replace(fine, name="new", obstacle="why"), tmp_path)
    again = dataclasses.replace(fine, always=True)
    assert gpu_check.run(again, tmp_path) == gpu_check.run(again, tmp_path) == "done: log"
    told = dataclasses.replace(fine, name="told", command=(sys.executable, "-c", SHOW_CACHE))
    assert gpu_check.run(told, tmp_path) == "done" and str(tmp_path / "tuning") in (tmp_path / "told.log").read_text()


def test_it_begins_with_kernels_then_five_cases_then_a_row_of_each_kind(tmp_path):
    parts = gpu_check.parts(tmp_path, False)
    assert sum(part.limit for part in parts) <= 590  # of 600 s, with ten to spare
    assert [part.name for part in parts][:4] == ["ahead", "cases", "inference", "training"]
    five, *rows = (
        subprocess.run([*part.command, "--collect-only"], cwd=ROOT, capture_output=True, text=True).stdout
        for part in parts[1:4]
    )
    assert five.count("two_times_rule[") == 5 and five.count("bfloat16") == 5
    for listing, bench in zip(rows, ("inference", "training"), strict=True):
        names = [line for line in listing.splitlines() if "::" in line]
        assert names and all(f"[{bench}-unet++-L4-accurate-512x512-batch16-bfloat16-" in name for name in names)


def test_a_dry_run_keeps_order_and_limits_and_ends_with_the_kernels(tmp_path, capsys, monkeypatch):
    """On a machine where every part takes all of its time, each begins when it was said to, the last before 590 s."""
    clock, ran = [0.0], []

    def run(part, out):
        ran.append((part.name, clock[0]))
        clock[0] += limits[part.name]
        return "out of time" if part.name == "main" else "done"

    limits = {part.name: part.limit for part in gpu_check.parts(tmp_path, True)}
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--out", str(tmp_path)])
    assert gpu_check.main() == 1  # a part was out of time
    assert [path.name for path in tmp_path.iterdir()] == ["dry-run"]  # marks of finished parts too: a real run does them
    printed = [line for line in capsys.readouterr().out.splitlines() if "begins after" in line]
    assert printed == [
        f"{name:<10} begins after {began:.0f} s at the latest and may take {limits[name]} s" for name, began in ran
    ]
    names = [name for name, _ in ran]
    real = [part.name for part in gpu_check.parts(tmp_path, False)]
    assert names == [*real[1:], "ahead"] and dict(ran)["ahead"] <= 590 - 30
    last = gpu_check.parts(tmp_path, True)[-1]
    assert last.command[1:] == ("benchmarks/gpu_prepare.py", "--check")
    monkeypatch.setattr(gpu_check, "run", lambda part, out: "failed (1)" if part.name == "ahead" else "done")
    assert gpu_check.main() == 1  # a kernel is missing
    monkeypatch.setattr(gpu_check, "run", lambda part, out: "done")
    assert gpu_check.main() == 0
