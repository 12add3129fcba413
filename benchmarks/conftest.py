"""Options, selection, records and the closing table of `pytest benchmarks`.

Each test is one implementation of one case. The first test of a case measures all of its selected implementations
interleaved; each test then shows its own times, or the reason that it has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import defaultdict
from pathlib import Path

import cases
import op_cases
import op_makers
import pytest
import torch

from unetpp_fast.architecture.precision import autocast
from unetpp_fast.benchmarking import backends, harness, records
from unetpp_fast.benchmarking.case import Case, Unavailable
from unetpp_fast.benchmarking.harness import Outcome
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.common.devices import device_name
from unetpp_fast.execution.dispatch import tune


def pytest_addoption(parser):
    group = parser.getgroup("unetpp_fast")
    group.addoption("--quick", action="store_true", help="the part that takes two minutes on two cores")
    group.addoption(
        "--results", type=Path, default=Path(os.environ.get("UNETPP_FAST_RESULTS") or records.RESULTS),
        help="folder for the records (default: UNETPP_FAST_RESULTS, or benchmarks/results)",
    )  # fmt: skip
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    group.addoption(
        "--seconds",
        type=float,
        help="time per case, for at least 7 rounds (default: 5, or 2 with --quick)",
    )
    group.addoption("--tune", action="store_true", help="on a GPU, run unetpp_fast.tune before the fused implementations")
    group.addoption(
        "--dry-run", action="store_true", help="tiny sizes, the reference in place of the kernels: tests the benchmark"
    )


def pytest_configure(config):
    if hasattr(config.option, "benchmark_columns"):  # of pytest-benchmark: those that interleaved times give
        config.option.benchmark_columns = ["median", "min", "max", "rounds"]
    config.addinivalue_line("markers", "benchmark: read by pytest-benchmark if it is installed")
    config.suite = Suite(config)


def pytest_generate_tests(metafunc):
    suite = metafunc.config.suite
    if metafunc.function.__name__ == "test_kernel":
        pairs = op_cases.quick() if suite.quick else op_cases.matrix()
    elif metafunc.function.__name__ == "test_model":
        pairs = cases.quick() if suite.quick else cases.matrix()
    else:
        return
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


def pytest_collection_finish(session):
    chosen = session.config.suite.chosen
    for item in session.items:
        if hasattr(item, "callspec") and "case" in item.callspec.params:
            case, name = item.callspec.params["case"], item.callspec.params["name"]
            chosen[case].append(name)


class Suite:
    """The selected implementations of each case, and the outcomes so far."""

    def __init__(self, config) -> None:
        self.quick, self.dry_run = config.getoption("quick"), config.getoption("dry_run")
        self.folder, self.seconds = config.getoption("results"), config.getoption("seconds") or (2.0 if self.quick else 5.0)
        self.device, self.tune = torch.device(config.getoption("device")), config.getoption("tune")
        self.rounds = 3 if self.dry_run else None
        if self.dry_run:
            cases.WIDTHS = op_makers.WIDTHS = (4, 4, 8, 8, 8)
            torch.set_num_threads(1)  # with tiny maps a second thread only adds waiting
        self.chosen: dict[Case, list[str]] = defaultdict(list)
        self.outcomes: dict[Case, Outcome] = {}

    @property
    def path(self) -> Path:
        return self.folder / f"{records.machine(self.device)}.json"

    def outcome(self, case: Case) -> Outcome:
        """The outcome of a case with its selected implementations; the first call measures it and records the rows."""
        if case not in self.outcomes:
            names = list(dict.fromkeys(["eager", *self.chosen[case]]))
            self.outcomes[case] = self._kernel(case, names) if case.bench == "kernel" else self._model(case, names)
            if self.outcomes[case].rows:
                records.merge(self.path, self.outcomes[case].rows)
        return self.outcomes[case]

    def _model(self, case: Case, names: list[str]) -> Outcome:
        chosen = {name: IMPLEMENTATIONS[name] for name in names}
        if self.dry_run:
            case = tiny(case)
            chosen = {name: backends.eager if name.startswith("fused") else build for name, build in chosen.items()}
        try:
            network = cases.network(case)
        except Unavailable as reason:
            return Outcome(skipped=dict.fromkeys(names, str(reason)))
        if self.tune and self.device.type == "cuda" and any(name.startswith("fused") for name in names):
            network = network.to(self.device)
            x, _ = harness.make_input(network, case, self.device)
            # If tuning fails, the kernels run untuned, and the outcome gives the reason if they fail too.
            with autocast(self.device, case.dtype), contextlib.suppress(RuntimeError):
                tune(network, x, training=case.training, progress=False)
        return harness.measure(case, network, chosen, self.device, seconds=self.seconds, rounds=self.rounds)

    def _kernel(self, case: Case, names: list[str]) -> Outcome:
        return op_cases.measure(
            tiny(case) if self.dry_run else case, names, self.device, seconds=self.seconds, rounds=self.rounds,
            stand_in=self.dry_run, tune=self.tune,
        )  # fmt: skip


def tiny(case: Case) -> Case:
    """A case of the same kind that runs in a moment."""
    return dataclasses.replace(case, size=(32,) * len(case.size), batch=min(case.batch, 2))


@pytest.fixture
def suite(request) -> Suite:
    return request.config.suite


class Replay:
    """A clock that replays times measured earlier, for the tables and files of pytest-benchmark."""

    def __init__(self) -> None:
        self.now, self.steps = 0.0, iter(())

    def load(self, milliseconds: list[float]) -> None:
        self.steps = iter([step for time in milliseconds for step in (0.0, time / 1e3)])

    def __call__(self) -> float:
        self.now += next(self.steps, 0.0)
        return self.now


replay = Replay()


@pytest.fixture
def show(request):
    """Passes an implementation's times to pytest-benchmark if it is installed."""

    def give(case: Case, times: list[float]) -> None:
        if request.config.pluginmanager.hasplugin("benchmark"):
            request.node.add_marker(pytest.mark.benchmark(timer=replay))
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = str(case)
            replay.load(times)
            benchmark.pedantic(lambda: None, rounds=len(times), iterations=1)

    return give


def pytest_terminal_summary(terminalreporter, config):
    suite = config.suite
    if not suite.outcomes:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"ratios on {device_name(suite.device)}")
    write("time ratios: the other's time / the row's (above 1 the row is faster); memory ratios: the row's / the other's")
    left_out: dict[str, list[str]] = defaultdict(list)
    for case, outcome in suite.outcomes.items():
        if not outcome.rows and not outcome.wrong:
            left_out["; ".join(dict.fromkeys(outcome.skipped.values()))].append(str(case))
            continue
        write(str(case))
        for row in outcome.rows:
            figure = f"{row['peak_mb']:>9.1f} MB" if case.memory_of else f"{row['median_ms']:>9.2f} ms"
            ratios = row["peak_ratio_to"] if case.memory_of else row["ratio_to"]
            write(f"  {row['impl']:<22}{figure}  " + "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
        for name, reason in outcome.wrong.items():
            write(f"  {name:<22}WRONG: {reason}", red=True)
        for name, reason in outcome.skipped.items():
            write(f"  {name:<22}skipped: {reason}")
    for reason, names in left_out.items():
        write(f"{len(names)} case(s) skipped, {names[0]}{' to ' + names[-1] if len(names) > 1 else ''}: {reason}")
    write(f"records: {suite.path}")
