"""Measures the kernels on the user's own GPU, once, and remembers what was found.

`tune(model, x)` times the candidates of every convolution of a pass, checks the fused result against float64 and times
the whole pass against the reference. `backend="auto"` uses the kernels where such a measurement says that they are
right and faster there. What was found is kept in a file for each GPU, torch, triton and state of the kernels' sources.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import fused, reference
from .files import need, write_atomic
from .kernels import tuning as kernel_tuning

if TYPE_CHECKING:
    from .models import Network

ROUNDS = 15
_verdicts: dict[str, dict] = {}  # by setting and key
_latest: dict[str, dict] = {}  # by the key without device and size, for graphs that are being compiled
_loaded: set[str] = set()


@lru_cache
def source_hash() -> str:
    """Of the kernels and the engine: a measurement of other sources does not count."""
    here, kernels = Path(__file__).parent, Path(kernel_tuning.__file__).parent
    files = sorted(kernels.glob("*.py")) + [
        here / name for name in ("compose.py", "engine.py", "engine_backward.py", "fused.py")
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@lru_cache
def setting(device: torch.device) -> str:
    """A name for all that a measurement depends on besides the model and its input; every call of a model asks for it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = importlib.metadata.version("triton")
    parts = f"{name}-torch{torch.__version__}-triton{triton}-{source_hash()}"
    return re.sub(r"[^\w.+-]+", "_", parts)


def cache_file(device: torch.device) -> Path:
    """Where what was measured on a device is kept: under `UNETPP_FAST_CACHE`, else the user's cache folder."""
    root = (
        os.environ.get("UNETPP_FAST_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unetpp_fast"
    )
    return Path(root) / f"{setting(device)}.json"


def load(device: torch.device) -> None:
    """Reads what is known of a device, once a process; a file that cannot be read counts as none."""
    if setting(device) in _loaded:
        return
    _loaded.add(setting(device))
    try:
        content = json.loads(cache_file(device).read_text())
        table, verdicts = dict(content["configurations"]), dict(content["verdicts"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    kernel_tuning.table.update(table)
    for key, value in verdicts.items():
        _keep(device, key, value)


def save(device: torch.device) -> Path:
    """Writes what is known of a device, atomically."""
    path = cache_file(device)
    verdicts = {key.split("|", 1)[1]: value for key, value in _verdicts.items() if key.startswith(f"{setting(device)}|")}
    text = json.dumps({"configurations": kernel_tuning.table, "verdicts": verdicts}, indent=1, sort_keys=True)
    write_atomic(path, lambda stream: stream.write(text.encode()))
    return path


def _keep(device: torch.device, key: str, found: dict) -> None:
    _verdicts[f"{setting(device)}|{key}"] = found
    _latest[key.rpartition(" ")[0]] = found


def verdict(network: Network, x: Tensor, dtype: torch.dtype, training: bool) -> dict | None:
    """What `tune` found for such a pass on this device, or None: keys "right" and "ratio" (above 1: faster).

    While a graph is compiled, whatever was found last for such a pass at any size: sizes may be symbols then.
    """
    if torch.compiler.is_compiling():
        return _latest.get(_structure(network, dtype, training))
    load(x.device)
    return _verdicts.get(f"{setting(x.device)}|{_key(network, x, dtype, training)}")


def _structure(network: Network, dtype: torch.dtype, training: bool) -> str:
    return f"{fused.key_of(network)} {dtype} {'training' if training else 'inference'}"


def _key(network: Network, x: Tensor, dtype: torch.dtype, training: bool) -> str:
    sizes = "x".join(str(kernel_tuning.bucket(size)) for size in (x.shape[0], *x.shape[2:]))
    return f"{_structure(network, dtype, training)} {sizes}"


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median time of `run`, after two calls that do not count."""
    run(), run()
    times = []
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tune(network: Network, x: Tensor, dtype: torch.dtype, training: bool, progress: bool) -> dict[str, dict]:
    """See `backends.tune`."""
    load(x.device)
    found = {}
    for name in ("inference", "training")[: 1 + training]:
        found[name] = _tune_pass(copy.deepcopy(network).train(name == "training"), x.detach(), dtype, name, progress)
        _keep(x.device, _key(network, x, dtype, name == "training"), found[name])
    save(x.device)
    return found


def _tune_pass(network: Network, x: Tensor, dtype: torch.dtype, name: str, progress: bool) -> dict:
    training = name == "training"

    def kernels(network: Network, x: Tensor) -> list[Tensor]:
        return fused.forward(network, x, dtype, "triton")

    with need("tqdm", "commands").tqdm(desc=f"tuning {name}", unit="candidate", disable=None if progress else True) as bar:

        def measure(launch: Callable[[], None]) -> float:
            bar.update()
            return milliseconds(launch, x.device)

        with kernel_tuning.measuring(measure):
            _run(kernels, network, x, training)
    times = [milliseconds(lambda f=f: _run(f, network, x, training), x.device) for f in (reference.forward, kernels)]
    right = _is_right(network, x[:2], dtype, training, kernels)
    return {"right": right, "ratio": times[0] / times[1], "reference_ms": times[0], "fused_ms": times[1]}


def _run(forward: Callable, network: Network, x: Tensor, training: bool) -> list[Tensor]:
    """The outputs of a pass, as one vector, and in training the gradients of all parameters, as another."""
    with torch.set_grad_enabled(training):
        outputs = forward(network, x)
        results = [outputs]
        if training:
            loss = sum(output.to(torch.promote_types(output.dtype, torch.float32)).square().mean() for output in outputs)
            results.append(torch.autograd.grad(loss, list(network.parameters())))
    return [torch.cat([value.detach().flatten().double() for value in values]) for values in results]


def _is_right(network: Network, x: Tensor, dtype: torch.dtype, training: bool, kernels: Callable) -> bool:
    """Whether outputs (and gradients) are as near to float64 as twice the reference's in this precision, and rounding."""
    with torch.autocast(x.device.type, enabled=False):
        exact = _run(reference.forward, copy.deepcopy(network).double(), x.double(), training)
    usual = _run(reference.forward, copy.deepcopy(network), x, training)
    found = _run(kernels, copy.deepcopy(network), x, training)
    return all(
        bool((f - e).norm() <= 2 * (u - e).norm() + torch.finfo(dtype).eps * e.norm())
        for e, u, f in zip(exact, usual, found, strict=True)
    )
