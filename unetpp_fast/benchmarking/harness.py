"""One network, one input, several implementations: each checked against float64, then timed in turns, as rows.

`unetpp-fast bench` and `benchmarks/` both measure through `measure`. Inputs are two images, repeated to the batch: the
loss and its gradients of the repeated batch are those of the two, so that float64 has to compute no more than two.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..architecture.precision import autocast
from ..deployment.optimized import optimize
from ..execution import acceptance, dispatch
from ..execution.call import Call
from ..models.architectures import UNet
from ..models.network import Network
from ..training.losses import BCEDiceLoss
from . import measuring, records

LAUNCH_BOUND = 128 * 128  # pixels of a batch below which launching takes longer than computing: graphs on all sides


class Unavailable(Exception):
    """An implementation cannot do a case on this machine; the message says why."""


@dataclass(frozen=True)
class Case:
    """What is measured, in the words of a row (`records.FIELDS`)."""

    bench: str
    model: str
    level: int
    mode: str | None
    size: tuple[int, ...]
    batch: int
    dtype: str
    memory_of: str | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        parts = [self.bench, self.model, f"L{self.level}", self.mode, size, f"batch{self.batch}", self.dtype, self.memory_of]
        return "-".join(part for part in parts if part)

    @property
    def training(self) -> bool:
        return "training" in (self.bench, self.memory_of)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Prepared:
    """An implementation ready to run: `forward(x)` gives logits; `parameters` are what training changes.

    capturable: by a CUDA graph; ours: its parameters are those of the reference, in that order.
    """

    forward: Callable[[Tensor], Tensor | Sequence[Tensor]]
    x: Tensor
    parameters: list[Tensor] = field(default_factory=list)
    capturable: bool = True
    ours: bool = True


Builder = Callable[[Network, Tensor, Case], Prepared]


@dataclass
class Outcome:
    """`rows` for the implementations that were right; why the others have none; the times of each round."""

    rows: list[dict] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)


def prepare(model: nn.Module, x: Tensor, case: Case, channels_last: bool = False) -> Prepared:
    """A module as PyTorch runs it, under autocast in half precision."""
    model.train(case.training)
    if channels_last:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    return Prepared(under_autocast(model, x.device, case), x, list(model.parameters()))


def under_autocast(model: Callable, device: torch.device, case: Case) -> Callable:
    """`model` in the case's precision."""

    def forward(x: Tensor):
        with autocast(device, case.dtype):
            return model(x)

    return forward


def with_backend(network: Network, backend: str) -> Network:
    """An independent copy that runs on one backend."""
    network = copy.deepcopy(network)
    network.backend = backend
    return network


def eager(network: Network, x: Tensor, case: Case, channels_last: bool = False) -> Prepared:
    """Plain PyTorch."""
    return prepare(with_backend(network, "reference"), x, case, channels_last)


def compiled(network: Network, x: Tensor, case: Case, mode: str = "default") -> Prepared:
    """`torch.compile` of the channels-last network; with frozen weights at inference on a CPU, where that helps it."""
    options = dict(torch._inductor.list_mode_options(mode))
    if x.device.type == "cpu" and not case.training:
        options["freezing"] = True
    if captured(case, x.device):
        options["triton.cudagraphs"] = False  # it is captured as a whole, like the others
    prepared = prepare(with_backend(network, "reference"), x, case, channels_last=True)
    prepared.forward = torch.compile(prepared.forward, options=options, dynamic=False)
    return prepared


def ours(network: Network, x: Tensor, case: Case, backend: str = "auto") -> Prepared:
    """This package's own: through `uf.optimize` at inference where this version has it.

    Raises:
        Unavailable: the reference would take over; or kernels would run in Triton's interpreter.
    """
    network = with_backend(network, backend).train(case.training)
    with autocast(x.device, case.dtype), torch.set_grad_enabled(case.training):
        name, reason = dispatch.choose(Call(network, x))
    if name == "triton" and x.device.type != "cuda":
        raise Unavailable("the time of Triton's interpreter means nothing")
    if not case.training and backend in ("auto", name):
        return Prepared(optimize(network, dtype=case.torch_dtype), x, capturable=False)
    if name == "reference":
        raise Unavailable(reason)
    return prepare(network, x, case)


def builders() -> dict[str, Builder]:
    """The implementations that need nothing but this package, by the names that rows give them."""
    found: dict[str, Builder] = {
        "eager": eager,
        "eager-channels-last": functools.partial(eager, channels_last=True),
        "compile": compiled,
        "compile-max-autotune": functools.partial(compiled, mode="max-autotune"),
        "fused": ours,
    }
    names = (name for name in dispatch.BACKENDS if name != "reference")
    return found | {f"fused-{name}": functools.partial(ours, backend=name) for name in names}


def captured(case: Case, device: torch.device) -> bool:
    """Whether the runs of a case are replays of CUDA graphs."""
    pixels = case.batch * functools.reduce(int.__mul__, case.size)
    return device.type == "cuda" and pixels <= LAUNCH_BOUND


def make_input(network: Network, case: Case, device: torch.device) -> tuple[Tensor, int]:
    """`[batch, in_channels, *size]`, and how many different images are in it."""
    count = 2 if case.batch % 2 == 0 else 1
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(count, network.topology.in_channels, *case.size, generator=generator)
    return few.to(device).repeat(case.batch // count, *[1] * (few.ndim - 1)), count


class Pass:
    """A forward pass, or a whole training step, of an implementation."""

    def __init__(self, prepared: Prepared, case: Case, count: int) -> None:
        self.prepared, self.case, self.count = prepared, case, count
        if case.training:
            if not prepared.parameters:
                raise Unavailable("it does not train")
            self.loss, self.target = BCEDiceLoss(), (prepared.x[:, :1] > 0).to(prepared.x.dtype)
            capturable = prepared.x.device.type == "cuda"
            self.optimizer = torch.optim.Adam(prepared.parameters, lr=3e-4, capturable=capturable)

    def results(self) -> list[Tensor]:
        """The outputs, and in training the gradients, each as one float64 vector."""
        outputs = self._outputs()
        found = [acceptance.as_vector([output[-self.count :] for output in outputs])]
        if self.case.training and self.prepared.ours:
            given = [torch.zeros_like(value) if value.grad is None else value.grad for value in self.prepared.parameters]
            found.append(acceptance.as_vector(given))
        return found

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


def float64(network: Network, x: Tensor, case: Case) -> list[Tensor]:
    """What is right: the reference in double precision."""
    exact = dataclasses.replace(case, dtype="float32")
    return Pass(prepare(with_backend(network, "reference").double(), x.double(), exact), exact, len(x)).results()


def measure(
    case: Case,
    network: Network,
    chosen: Mapping[str, Builder],
    device: torch.device,
    *,
    seconds: float = 5.0,
    rounds: int | None = None,
    begin: Callable[[str], object] = str,
) -> Outcome:
    """Checks the chosen implementations of a network against float64, times them in turns, makes their rows.

    A wrong result gives no row and stands in `wrong`; what cannot run here stands in `skipped`.

    Args:
        network: a model of this package; it is not changed.
        seconds, rounds: as in `measuring.times_in_turns`.
        begin: called with the name of each implementation before it is prepared.
    """
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()  # of earlier cases: it recompiles one code object only so often
    network = copy.deepcopy(network).to(device)
    x, count = make_input(network, case, device)
    right = float64(network, x[:count], case), Pass(eager(network, x[:count], case), case, count).results()
    outcome, runs, peaks = Outcome(), {}, {}
    for name, build in chosen.items():
        begin(name)
        before = measuring.allocated(device) if device.type == "cuda" else 0
        try:
            run = _checked(name, build, network, x, case, count, right, outcome)
            if run is None:
                continue
            if device.type == "cuda":
                peaks[name] = measuring.allocated_peak(run, device, before)
            elif case.memory_of:
                peaks[name] = measuring.in_fresh_process(_resident_peak, build, network, case)
            if not case.memory_of:
                runs[name] = measuring.graphed(run, device) if captured(case, device) and run.prepared.capturable else run
        except Unavailable as reason:
            outcome.skipped[name] = str(reason)
        except (MemoryError, torch.OutOfMemoryError):
            outcome.skipped[name] = "out of memory"
        except OSError as error:
            outcome.skipped[name] = f"peak memory cannot be read here: {error}"
    outcome.times = measuring.times_in_turns(runs, device, seconds, rounds) if runs else {}
    gflop = case.batch * network.gflop(case.size) * (3 if case.training else 1)  # a backward pass is two forward ones
    outcome.rows = rows_of(case, device, outcome.times, peaks, gflop)
    return outcome


def _checked(
    name: str, build: Builder, network: Network, x: Tensor, case: Case, count: int, right: tuple, outcome: Outcome
) -> Pass | None:
    """The pass, if its results are right."""
    run = Pass(build(network, x, case), case, count)
    found = run.results()
    exact, usual = (vectors[: len(found)] for vectors in right)
    if wrong := acceptance.disagreement(exact, usual, found, case.torch_dtype):
        outcome.wrong[name] = wrong
        return None
    return run


def _resident_peak(build: Builder, network: Network, case: Case) -> float:
    """In a process of its own: MB that an implementation takes beside the network it is made from."""
    tiny = dataclasses.replace(case, size=(8,) * len(case.size), batch=1)
    small = UNet(network.topology.in_channels, network.out_channels, spatial_dims=len(case.size), features=(2, 2))
    with contextlib.suppress(Unavailable):  # what it imports to build itself is not its memory
        Pass(build(small, make_input(small, tiny, torch.device("cpu"))[0], tiny), tiny, 1)()
    x, count = make_input(network, case, torch.device("cpu"))
    return measuring.resident_peak(lambda: Pass(build(network, x, case), case, count))


def rows_of(
    case: Case,
    device: torch.device,
    times: Mapping[str, list[float]],
    peaks: Mapping[str, float],
    gflop: float,
    extra: Mapping[str, float] | None = None,
) -> list[dict]:
    """A row for each implementation with times or, of a memory case, with a peak."""
    facts, what = records.facts(device), dataclasses.asdict(case)
    memory_of = what.pop("memory_of")
    rows = []
    for name in peaks if case.memory_of else times:
        timed = measuring.quantiles(times[name]) if name in times else dict.fromkeys(records.TIMES)
        rows.append({
            **what, "size": list(case.size), "impl": name, **timed,
            "peak_mb": peaks.get(name),
            "ratio_to": measuring.ratios(times, name) if name in times else {},
            "peak_ratio_to": {
                other: peaks[name] / peak for other, peak in peaks.items() if other != name and min(peak, peaks[name]) > 0
            },
            "tflops": gflop / timed["median_ms"] if name in times else None,
            **(extra or {}), **facts, **({"memory_of": memory_of} if memory_of else {}),
        })  # fmt: skip
    return rows
