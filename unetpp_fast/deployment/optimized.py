"""A trained network as an inference-only module: pruned, folded, fused, with preallocated memory and captured launches."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.options import norm_name
from ..architecture.output_forms import Outputs
from ..architecture.precision import PRECISIONS
from ..common.errors import InputError, first_line
from ..converters.converter import convert
from ..execution import dispatch, reference
from ..execution.call import Call
from ..execution.cpu import inference
from ..execution.explanation import describe
from ..execution.fused import tuning
from ..execution.fused.forward import Forward
from ..execution.fused.ops import load_ops
from ..execution.plan import weight_composition
from ..execution.plan.operands import all_operands
from ..kernels.naive import dot_precision
from ..models.encoder_network import EncodedNetwork
from ..models.network import Network
from ..models.prediction import MODES, check_image, evaluating, logits_of_any_size, mean_probabilities
from .cuda_graphs import Graphs

FORMAT = 1
DTYPES = tuple(precision.dtype for precision in PRECISIONS.values())


class Optimized(nn.Module):
    """What `optimize` returns. It stays in eval mode and gives no gradients.

    Its `state_dict()` holds the weights and everything that `unetpp_fast.load_optimized` needs to rebuild it. Weights are
    composed at the first call with a precision and device, and again after `load_state_dict` and `to`; do not change them
    in any other way. Several threads and streams may call it at once.
    """

    def __init__(self, network: Network, *, pruned: bool, dtype: torch.dtype | None, mode: str):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        if network.backend == "reference":
            network.backend = "auto"
        self.pruned, self.dtype, self.mode = pruned, dtype, mode
        self._forget()

    def _forget(self) -> None:
        """Drops what was composed or captured: the weights have changed or moved."""
        self._composed: dict[tuple, Any] = {}
        self._graphs = Graphs()
        self._lock = threading.Lock()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._forget()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_composed", "_graphs", "_lock")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    def train(self, mode: bool = True) -> Optimized:
        """Does nothing: this module is for inference only."""
        return self

    def get_extra_state(self) -> dict[str, Any]:
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        settings = {"pruned": self.pruned, "dtype": dtype, "mode": self.mode}
        return {"unetpp_fast_optimized": FORMAT, "config": self.network.config, **settings}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        if state["config"] != self.network.config:
            raise ValueError("this state_dict is of another network: rebuild it with unetpp_fast.load_optimized(state_dict)")
        self.pruned, self.dtype, self.mode = _settings(state)

    def forward(self, x: Tensor) -> Outputs:
        """What the original model, pruned, returns for `x` `[N, C, *S]` in eval mode, in this module's precision.

        Raises:
            TypeError, ValueError: the network does not take `x`.
        """
        network = self.network
        x = self._cast(x)
        odd = network.options["odd_sizes"]
        check_input(network, x, any_size=odd)
        heads = network.topology.heads
        columns = heads if network.deep_supervision and not self.pruned else heads[-1:]
        return network.shaped(self._logits(x, columns))

    def predict(self, x: Tensor, activation: str = "sigmoid") -> Tensor:
        """Probabilities `[N, out_channels, *S]`, at least in float32, for `[N, C, *S]` of any size.

        In mode "accurate" the mean over the heads up to this module's level, in mode "fast" the head at that level.
        activation: "sigmoid" (classes overlap) or "softmax" (classes exclude one another).

        Raises:
            TypeError, ValueError: x has the wrong type, rank or channels, or contains NaN; an argument is unknown.
        """
        x = self._cast(x)
        check_image(self.network, x, activation)
        heads = self.network.topology.heads
        columns = heads if self.mode == "accurate" else heads[-1:]
        logits = logits_of_any_size(self.network, x, lambda padded: self._logits(padded, columns))
        return mean_probabilities(logits, activation)

    def explain(self, x: Tensor) -> str:
        """Prints and returns what computes each node for `x`, and why; nothing is computed."""
        x = self._cast(x)
        with self._precision(x), torch.no_grad():
            check_input(self.network, x, any_size=self.network.options["odd_sizes"])
            call = Call(self.network, x)
            text = describe(call, *dispatch.choose(call))
        if x.is_cuda and self._graphs.reason:
            print(self._graphs.reason)
            text = f"{text}\n{self._graphs.reason}"
        return text

    def _cast(self, x: Tensor) -> Tensor:
        """Images in the precision of the stored weights; autocast chooses that of the maps."""
        weight = next(self.network.parameters())
        return x.to(weight.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def _precision(self, x: Tensor) -> torch.autocast:
        """Autocast to this module's precision; the caller's if it has none."""
        return _autocast(x.device.type, self.dtype)

    @torch.no_grad()
    def _logits(self, x: Tensor, columns: Sequence[int]) -> list[Tensor]:
        """Of the heads at `columns`, `[N, classes, *S]`."""
        with self._precision(x):
            if any(size % self.network.topology.multiple for size in x.shape[2:]):
                return self._plain(x, columns)
            call = Call(self.network, x)
            name, _ = dispatch.choose(call)
            if not x.is_cuda:
                return self._by(name, call, columns)(x)
            key = (*columns, call.dtype, dot_precision(call.dtype))
            kernels = dispatch.right_kernels(call) if self.network.backend == "auto" else None
            if kernels and tuning.may_measure(x):
                runs = {one: self._by(one, call, columns) for one in ("reference", kernels)}
                name = self._graphs.fastest(runs, x, key) or name
            return self._graphs.run(self._by(name, call, columns), x, (name, *key))

    def _by(self, name: str, call: Call, columns: Sequence[int]) -> Callable[[Tensor], list[Tensor]]:
        run = self._plain if name == "reference" else self._by_engine(name, call)
        return lambda image: run(image, columns)

    def _plain(self, x: Tensor, columns: Sequence[int]) -> list[Tensor]:
        wanted = [column in columns for column in self.network.topology.heads]
        logits = reference.forward(self._once(("plain",), lambda: folded(self.network)), x)
        return [head for head, one in zip(logits, wanted, strict=True) if one]

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._composed:
                with torch.inference_mode(False), torch.no_grad():
                    self._composed[key] = make()
            return self._composed[key]

    def _by_engine(self, name: str, call: Call) -> Callable[[Tensor, Sequence[int]], list[Tensor]]:
        """A fused pass with the ops `name` and operands composed once."""
        structure, dtype = self.network.structure, call.dtype
        modes = structure.modes("0" * len(structure.norms), keep=False)

        def make() -> tuple[dict[str, Tensor], dict]:
            with torch.autocast(call.x.device.type, enabled=False):
                tensors = call.tensors()
                return tensors, all_operands(structure.plan, tensors, modes, dtype)

        tensors, composed = self._once(("engine", dtype, call.x.device), make)

        def run(image: Tensor, columns: Sequence[int]) -> list[Tensor]:
            if name == "cpu":
                return inference.run(structure, composed, tensors, modes, image, dtype, columns)
            with torch.autocast(image.device.type, enabled=False):
                forward = Forward(structure.plan, load_ops(name), modes, tensors, dtype, operands=composed)
                return forward.run(image, keep=False, columns=columns)[0]

        return run


def folded(network: Network) -> Network:
    """The network with its batch norms folded into the convolutions before them, as they compute in eval mode."""
    if norm_name(network.options["norm"]) != "batch":
        return network
    with torch.device("meta"):
        result = Network.from_config({**network.config, "norm": None, "bias": True}, "reference")
    values = {name: value for name, value in network.state_dict().items() if ".norm" not in name}
    for name, node in network.nodes.items():
        for place in ("1", "2"):
            conv, norm = getattr(node, f"conv{place}"), getattr(node, f"norm{place}")
            bias = None if conv.bias is None else conv.bias.double()
            parts = tuple(part.double() for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
            key = f"nodes.{name}.conv{place}"
            folded_values = weight_composition.fold(conv.weight.double(), bias, parts, norm.eps)
            values[f"{key}.weight"], values[f"{key}.bias"] = (value.to(conv.weight.dtype) for value in folded_values)
    result.load_state_dict(values, assign=True)
    return result.requires_grad_(False).eval()


class OptimizedModule(nn.Module):
    """A converted network over an encoder, which has no plan yet: in eval mode, without gradients, in the given precision.
    `explain` says why nothing is fused."""

    def __init__(self, network: EncodedNetwork, dtype: torch.dtype | None):
        super().__init__()
        self.network, self.dtype = network.requires_grad_(False).eval(), dtype

    def train(self, mode: bool = True) -> OptimizedModule:
        """Does nothing: this module is for inference only."""
        return self

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad(), _autocast(x.device.type, self.dtype):
            return function(x.to(next(self.network.parameters()).dtype))

    def forward(self, x: Tensor) -> Tensor:
        """What the network returns in eval mode."""
        return self._run(self.network, x)

    def predict(self, x: Tensor, activation: str = "sigmoid") -> Tensor:
        """Probabilities for any size; see `EncodedNetwork.predict`."""
        return self._run(lambda image: self.network.predict(image, activation), x)

    def explain(self, x: Tensor) -> str:
        """Prints and returns why nothing is fused."""
        text = "reference: a network over another library's encoder runs in plain PyTorch"
        print(text)
        return text


def _autocast(kind: str, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on a type of device; the caller's for None, disabled for float32 and float64."""
    if dtype is None:
        return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
    return torch.autocast(kind, dtype) if dtype.itemsize < 4 else torch.autocast(kind, enabled=False)


def optimize(
    model: nn.Module, *, level: int | None = None, dtype: torch.dtype | None = None, mode: str = "accurate"
) -> Optimized | OptimizedModule:
    """An inference-only module that computes what `model` computes in eval mode, as fast as this machine can.

    Batch norms are folded into weights and up-sampling into convolutions, at least in float32 and with the exact eps; memory
    is kept between calls; on a GPU each size is captured as a CUDA graph. What cannot be fused runs unchanged, and
    `explain(x)` says why. The model is copied: training it further does not change the result.

    Args:
        model: a model of this package, or one that `unetpp_fast.convert` knows.
        level: compute only the nodes that X(0,level) needs, and return its head, as `model.prune(level)` does.
        dtype: the precision of the maps, and so of the logits: float32, bfloat16, float16 or float64. Inputs of any
            precision are cast. Default: the model's, or autocast's if a call is under autocast.
        mode: of `predict`: "accurate", the mean over the heads up to `level`, or "fast", only the head at `level`.

    Raises:
        TypeError: the model is not a module.
        ValueError: an argument is unknown, there is no head at `level`, or `convert` does not know the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a module, not {type(model).__name__}: give weights to unetpp_fast.convert first")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(known) for known in DTYPES]}, not {dtype!r}")
    if not isinstance(model, (Network, EncodedNetwork)):
        with evaluating(model):
            model = convert(model)
    if isinstance(model, EncodedNetwork):
        if level is not None:
            raise ValueError("a network over an encoder has one head: leave level=None")
        own = next(model.parameters()).dtype
        return OptimizedModule(_own_copy(model, dtype), dtype or (own if own.itemsize < 4 else None))
    topology, pruned = model.topology, level is not None
    kept = topology.pruned(topology.heads[-1] if level is None else level, keep_heads=True)
    part = model.subnetwork(kept, deep_supervision=model.deep_supervision and not pruned, form=model.form)
    own = next(model.parameters()).dtype
    return Optimized(_own_copy(part, dtype), pruned=pruned, dtype=dtype or (own if own.itemsize < 4 else None), mode=mode)


def _own_copy(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy, at least in float32: weights are rounded only after folding."""
    with torch.inference_mode(False), torch.no_grad():
        network = copy.deepcopy(network)
        wide = dtype if dtype == torch.float64 else torch.float32
        half = next(network.parameters()).dtype.itemsize < 4
        return network.to(wide) if half or dtype is not None else network


def load_optimized(source: Mapping[str, Any] | str | os.PathLike, device: str | torch.device = "cpu") -> Optimized:
    """Rebuilds a module from its `state_dict()` or a file with it; no code in a file can run (`weights_only`).

    Raises:
        InputError: the file does not exist, is damaged, or is not of an optimized module.
    """
    state = source
    if not isinstance(source, Mapping):
        if not Path(source).is_file():
            raise InputError(f"{source} does not exist")
        try:
            state = torch.load(source, map_location=device, weights_only=True)
        except Exception as error:  # a damaged file can make the reader fail in any way
            what = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{source} cannot be read as a state_dict: {what}") from error
    extra = state.get("_extra_state") if isinstance(state, Mapping) else None
    if not isinstance(extra, Mapping) or extra.get("unetpp_fast_optimized") != FORMAT:
        raise InputError(f"this is not a state_dict of an optimized module (format {FORMAT}): save fast.state_dict()")
    try:
        pruned, dtype, mode = _settings(extra)
        own = next(value.dtype for name, value in state.items() if name.endswith("conv1.weight"))
        fast = Optimized(Network.from_config(extra["config"]).to(own), pruned=pruned, dtype=dtype, mode=mode)
        fast.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"this state_dict of an optimized module is damaged: {what}") from error
    return fast.to(device)


def _settings(extra: Mapping[str, Any]) -> tuple[bool, torch.dtype | None, str]:
    dtype = None if extra["dtype"] is None else PRECISIONS[extra["dtype"]].dtype
    return extra["pruned"], dtype, extra["mode"]
