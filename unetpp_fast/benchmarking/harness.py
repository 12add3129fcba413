"""One network, one input, several implementations: each is checked against float64, then timed in interleaved runs.

`unetpp-fast bench` and `benchmarks/` both measure through `measure`. Inputs are two images, repeated to the batch: the
loss and the gradients of the repeated batch are those of the two, so float64 computes only two.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common import timing
from ..execution import acceptance
from ..models.architectures import UNet
from ..models.network import Network
from ..training.losses import BCEDiceLoss
from . import backends, measuring, records
from .case import Builder, Case, Prepared, Unavailable, captured, prepare, with_backend

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
WARM_UP_SIZE = 64  # pixels per axis; as many as every peer's network needs


@dataclass
class Outcome:
    """What measuring a case gave.

    rows: of the implementations with right results.
    wrong, skipped: why the others have no row.
    times: milliseconds of each round.
    errors: of the outputs against float64, relative.
    """

    rows: list[dict] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def make_input(network: Network, case: Case, device: torch.device) -> tuple[Tensor, int]:
    """`[batch, in_channels, *size]`, and the number of different images in it."""
    count = 2 if case.batch % 2 == 0 else 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, network.topology.in_channels, *case.size, generator=generator)
    return images.to(device).repeat(case.batch // count, *[1] * (images.ndim - 1)), count


class Pass:
    """A forward pass of an implementation, or a whole training step.

    Args:
        count: the number of different images in the batch.
        loss: of the list of outputs and the target, a mean over the images; default `BCEDiceLoss()`.
    """

    def __init__(self, prepared: Prepared, case: Case, count: int, loss: Loss | None = None) -> None:
        self.prepared, self.case, self.count = prepared, case, count
        if case.training:
            if not prepared.parameters:
                raise Unavailable("it does not train")
            self.loss, self.target = loss or BCEDiceLoss(), (prepared.x[:, :1] > 0).to(prepared.x.dtype)
            capturable = prepared.x.device.type == "cuda"
            self.optimizer = torch.optim.Adam(prepared.parameters, lr=3e-4, capturable=capturable)

    def results(self) -> list[Tensor]:
        """The outputs and, in training, the gradients, each as one float64 vector."""
        outputs = self._outputs()
        vectors = [acceptance.as_vector([output[-self.count :] for output in outputs])]
        if self.case.training and self.prepared.ours:
            gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in self.prepared.parameters]
            vectors.append(acceptance.as_vector(gradients))
        return vectors

    def _outputs(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.case.training):
            outputs = self.prepared.forward(self.prepared.x)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            if self.case.training:
                self.optimizer.zero_grad()
                self.loss(outputs, self.target.expand_as(outputs[0])).backward()
        return outputs

    def __call__(self) -> None:
        self._outputs()
        if self.case.training:
            self.optimizer.step()


def float64(network: Network, x: Tensor, case: Case, loss: Loss | None = None) -> list[Tensor]:
    """The exact results: those of the reference in double precision."""
    exact = dataclasses.replace(case, dtype="float32")
    return Pass(prepare(with_backend(network, "reference").double(), x.double(), exact), exact, len(x), loss).results()


def measure(
    case: Case,
    network: Network,
    chosen: Mapping[str, Builder],
    device: torch.device,
    *,
    seconds: float = 5.0,
    rounds: int | None = None,
    begin: Callable[[str], object] = str,
    loss: Loss | None = None,
) -> Outcome:
    """Checks the chosen implementations of a network against float64, times them in interleaved runs and makes their rows.

    An implementation with a wrong result is listed in `wrong`, one that cannot run here in `skipped`.

    Args:
        network: a model of this package; it is not changed.
        chosen: by name, entries of `implementations.IMPLEMENTATIONS` or other builders.
        seconds, rounds: as in `timing.interleaved_times`.
        begin: called with the name of each implementation before it is prepared.
        loss: as in `Pass`; for memory cases on a CPU it must be picklable.
    """
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()  # drops the code of earlier cases: the number of recompilations is limited
    network = copy.deepcopy(network).to(device)
    x, count = make_input(network, case, device)
    expected = _expected(network, x[:count], case, loss)
    outcome, runs, peaks = Outcome(), {}, {}
    for name, build in chosen.items():
        begin(name)
        before = measuring.allocated(device) if device.type == "cuda" else 0
        try:
            run = Pass(build(network, x, case), case, count, loss)
            wrong, outcome.errors[name] = _judged(run, expected)
            tolerance = getattr(build, "tolerance", None)
            if wrong and not (tolerance and outcome.errors[name] <= tolerance):
                outcome.wrong[name] = wrong
                continue
            if device.type == "cuda":
                peaks[name] = measuring.allocated_peak(run, device, before)
            elif case.memory_of:
                peaks[name] = measuring.in_fresh_process(_resident_peak, build, network, case, loss)
            if not case.memory_of:
                runs[name] = measuring.graphed(run, device) if captured(case, device) and run.prepared.capturable else run
        except Unavailable as reason:
            outcome.skipped[name] = str(reason)
        except (MemoryError, torch.OutOfMemoryError):
            outcome.skipped[name] = "out of memory"
        except OSError as error:
            outcome.skipped[name] = f"peak memory cannot be read here: {error}"
    outcome.times = timing.interleaved_times(runs, device, seconds, rounds) if runs else {}
    gflop = case.batch * network.gflop(case.size) * (3 if case.training else 1)  # a backward pass counts as two forward
    outcome.rows = rows_of(case, device, outcome.times, peaks, gflop, outcome.errors)
    return outcome


def _expected(network: Network, x: Tensor, case: Case, loss: Loss | None) -> tuple[list[Tensor], list[Tensor]]:
    """The results in float64 and PyTorch's own, of its two layouts the one that is farther off."""
    exact = float64(network, x, case, loss)
    layouts = [Pass(backends.eager(network, x, case, layout), case, len(x), loss).results() for layout in (False, True)]
    return exact, acceptance.farther_off(exact, *layouts)


def _judged(run: Pass, expected: tuple[list[Tensor], list[Tensor]]) -> tuple[str, float]:
    """Why the results of a pass are wrong, given float64's and eager PyTorch's, "" if they are right; and the relative error
    of its outputs."""
    results = run.results()
    exact, usual = (vectors[: len(results)] for vectors in expected)
    same = results[0].shape == exact[0].shape
    error = float((results[0] - exact[0]).norm() / exact[0].norm()) if same else float("inf")
    return acceptance.disagreement(exact, usual, results, run.case.torch_dtype), error


def _resident_peak(build: Builder, network: Network, case: Case, loss: Loss | None) -> float:
    """MB that an implementation needs beside the network it is built from; for a fresh process."""
    axes = len(case.size)
    tiny = dataclasses.replace(case, size=(WARM_UP_SIZE,) * axes, batch=1)
    small = UNet(network.topology.in_channels, network.out_channels, spatial_dims=axes, features=(2, 2))
    with contextlib.suppress(Unavailable):  # the modules that it imports do not count as its memory
        Pass(build(small, make_input(small, tiny, torch.device("cpu"))[0], tiny), tiny, 1, loss)()
    x, count = make_input(network, case, torch.device("cpu"))
    return measuring.resident_peak(lambda: Pass(build(network, x, case), case, count, loss))


def rows_of(
    case: Case,
    device: torch.device,
    times: Mapping[str, list[float]],
    peaks: Mapping[str, float],
    gflop: float,
    errors: Mapping[str, float] | None = None,
) -> list[dict]:
    """A row for each implementation that has times or, in a memory case, a peak."""
    facts, what = records.facts(device), dataclasses.asdict(case)
    memory_of = what.pop("memory_of")
    rows = []
    for name in peaks if case.memory_of else times:
        timed = timing.quantiles(times[name]) if name in times else dict.fromkeys(records.TIMES)
        rows.append({
            **what, "size": list(case.size), "impl": name, **timed,
            "peak_mb": peaks.get(name),
            "ratio_to": timing.ratios(times, name) if name in times else {},
            "peak_ratio_to": {
                other: peaks[name] / peak for other, peak in peaks.items() if other != name and min(peak, peaks[name]) > 0
            },
            "tflops": gflop / timed["median_ms"] if name in times else None,
            **facts, **({"memory_of": memory_of} if memory_of else {}),
            **({"error": errors[name]} if errors and name in errors and math.isfinite(errors[name]) else {}),
        })  # fmt: skip
    return rows
