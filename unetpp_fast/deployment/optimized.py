"""A trained network as an inference-only module: pruned, folded, fused, with preallocated memory and captured launches."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.output_forms import Outputs
from ..architecture.precision import PRECISIONS, compute_dtype
from ..architecture.wrappers import unwrapped
from ..common import torch_files
from ..common.errors import InputError, first_line
from ..converters.converter import convert
from ..execution import dispatch, reference
from ..execution.call import Call
from ..execution.explanation import describe
from ..execution.fused import tuning
from ..kernels.naive import dot_precision
from ..models.encoder_network import EncodedNetwork
from ..models.network import Network
from ..models.normalisation import prepared_tensor
from ..models.own_forward import check_prunable
from ..models.prediction import (
    MODES,
    activation_of,
    check_image,
    evaluating,
    logits_of_any_size,
    mean_probabilities,
    over_flips,
    small_image,
)
from . import encoder_layers
from .engine import Engine
from .folding import folded, folded_encoder

FORMAT = 1
DTYPES = tuple(precision.dtype for precision in PRECISIONS.values())


class Optimized(Engine):
    """What `optimize` returns. It stays in eval mode and gives no gradients.

    Its `state_dict()` holds the weights and everything that `unetpp_fast.load_optimized` needs to rebuild it. Do not change
    weights in any other way than by `load_state_dict` and `to`. Several threads and streams may call it at once.
    """

    network: Network

    def __init__(self, network: Network, *, pruned: bool, dtype: torch.dtype | None, mode: str):
        super().__init__(network, dtype)
        self.pruned, self.mode = pruned, mode

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
        if self.as_is:
            return self._called(network, x)
        heads = network.topology.heads
        columns = heads if network.deep_supervision and not self.pruned else heads[-1:]
        return network.shaped(self._logits(x, columns))

    def predict(self, x: Tensor, activation: str | None = None, flips: bool = False) -> Tensor:
        """Probabilities `[N, out_channels, *S]`, at least in float32, for `[N, C, *S]` of any size.

        In mode "accurate" the mean over the heads up to this module's level, in mode "fast" the head at that level.
        activation: "sigmoid" (classes overlap) or "softmax" (classes exclude one another); default as the model was trained.
        flips: as of `Network.predict`.

        Raises:
            TypeError, ValueError: x has the wrong type, rank or channels, or contains NaN; an argument is unknown.
        """
        x, activation = self._cast(prepared_tensor(self.network, x)), activation_of(self.network, activation)
        check_image(self.network, x, activation)
        if flips:
            return over_flips(lambda image: self.predict(image, activation), x)
        if self.as_is:
            return self._called(self.network.predict, x, mode=self.mode, activation=activation)
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
        text += self._why_as_is()
        if x.is_cuda and self._graphs.reason:
            print(self._graphs.reason)
            text = f"{text}\n{self._graphs.reason}"
        return text

    @torch.no_grad()
    def _logits(self, x: Tensor, columns: Sequence[int]) -> list[Tensor]:
        """Of the heads at `columns`, `[N, classes, *S]`."""
        with self._precision(x):
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

    def _beside(self, image: Tensor) -> Outputs:
        call, heads = Call(self.network, image, image.dtype), self.network.topology.heads
        columns = heads if self.network.deep_supervision and not self.pruned else heads[-1:]
        return self.network.shaped(self._by(self._name_beside(call), call, columns)(image))

    def _by(self, name: str, call: Call, columns: Sequence[int]) -> Callable[[Tensor], list[Tensor]]:
        run = self._plain if name == "reference" else self._by_engine(name, call)
        return lambda image: run(image, columns)

    def _plain(self, x: Tensor, columns: Sequence[int]) -> list[Tensor]:
        wanted = [column in columns for column in self.network.topology.heads]
        logits = reference.forward(self._once(("plain",), lambda: folded(self.network)), x)
        return [head for head, one in zip(logits, wanted, strict=True) if one]


class OptimizedModule(Engine):
    """What `optimize` returns for a network over an encoder. The encoder runs in PyTorch, channels-last and with its batch
    norms folded, on a CPU with those convolutions by the kernels that were measured to be faster so; the rest as in
    `Optimized`. Its `state_dict()` holds the weights, not the code of the encoder."""

    network: EncodedNetwork

    def __init__(self, network: EncodedNetwork, *, pruned: bool, dtype: torch.dtype | None, mode: str):
        super().__init__(network, dtype)
        self.pruned, self.mode = pruned, mode
        self.layout = torch.channels_last if network.topology.spatial_dims == 2 else torch.channels_last_3d
        network.encoder, self.norms = folded_encoder(network.encoder, network.sample())
        encoder: Any = network.encoder.requires_grad_(False)
        network.encoder = encoder.to(memory_format=self.layout)
        if dispatch.CPU_KERNELS[0] and network.sample().device.type == "cpu":
            network.encoder = encoder_layers.with_layers(network.encoder, network.sample())

    def forward(self, x: Tensor) -> Outputs:
        """What the original model, pruned, returns for `x` `[N, C, *S]` in eval mode, in this module's precision.

        Raises:
            TypeError, ValueError: the network does not take `x`.
        """
        x = self._cast(x)
        self.network.check(x)
        if self.as_is:
            return self._called(self.network, x)
        return self.network.shaped(self._logits(x, all_heads=self.network.deep_supervision and not self.pruned))

    def predict(self, x: Tensor, activation: str | None = None, flips: bool = False) -> Tensor:
        """Probabilities for any size; see `Optimized.predict`."""
        x, activation = self._cast(prepared_tensor(self.network, x)), activation_of(self.network, activation)
        check_image(self.network, x, activation)
        if flips:
            return over_flips(lambda image: self.predict(image, activation), x)
        if self.as_is:
            return self._called(self.network.predict, x, mode=self.mode, activation=activation)
        all_heads = self.mode == "accurate"
        logits = logits_of_any_size(self.network, x, lambda padded: self._logits(padded, all_heads))
        return mean_probabilities(logits, activation)

    @torch.no_grad()
    def explain(self, x: Tensor) -> str:
        """Prints and returns what computes each node for `x`, and why; only the encoder runs."""
        x = self._cast(x)
        self.network.check(x)
        with self._precision(x):
            call = self._call(self.network, x)
            text = describe(call, *dispatch.choose(call))
        encoder = f"PyTorch    encoder, channels-last: {self.norms}{self._layers_in_words(x)}"
        print(encoder)
        return f"{text}\n{encoder}{self._why_as_is()}"

    def _call(self, network: EncodedNetwork, x: Tensor) -> Call:
        x = x.to(memory_format=self.layout)
        layers = self._layers(x)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        with encoder_layers.running(encoder_layers.Pass(layers) if layers or not traced else None):
            return Call(network.nest, network.maps(x))

    def _layers(self, x: Tensor) -> tuple[int, ...]:
        """The places of the encoder's layers that the CPU kernels compute."""
        if torch.compiler.is_compiling():
            return ()
        key = ("encoder", x.shape, x.device, compute_dtype(x), torch.get_num_threads())
        return self._once(key, lambda: encoder_layers.fastest(self.network.encoder, x, self.network.multiple))

    def _layers_in_words(self, x: Tensor) -> str:
        if not (layers := encoder_layers.layers_of(self.network.encoder)):
            return ""
        return f"; {len(self._layers(x))} of {len(layers)} convolutions of 1 or 3 taps by the CPU kernels (measured)"

    @torch.no_grad()
    def _logits(self, x: Tensor, all_heads: bool) -> list[Tensor]:
        """`[N, classes, *S]` of every head, or only of the deepest, for a size that the network takes."""
        network = self.network if all_heads else self.network.part(self.network.topology.heads[-1], keep_heads=False)
        with self._precision(x):
            call = self._call(network, x)
            return self._by(dispatch.choose(call)[0], call)

    def _beside(self, image: Tensor) -> Outputs:
        call = Call(self.network.nest, self.network.maps(image))
        return self.network.shaped(self._by(self._name_beside(call), call))

    def _by(self, name: str, call: Call) -> list[Tensor]:
        heads = call.network.topology.heads
        if name == "reference":
            nest = self._once(("plain", heads), lambda: folded(call.network))
            return reference.forward(nest, call.inputs)
        return self._by_engine(name, call)(call.inputs, heads)


def optimize(
    model: nn.Module, *, level: int | None = None, dtype: torch.dtype | None = None, mode: str = "accurate"
) -> Optimized | OptimizedModule:
    """An inference-only module that computes what `model` computes in eval mode, as fast as this machine can.

    Batch norms are folded into weights and up-sampling into convolutions, at least in float32 and with the exact eps; memory
    is kept between calls; on a GPU each size is captured as a CUDA graph. What cannot be fused runs unchanged, and
    `explain(x)` says why: layers that were replaced, patched or hooked after building, hooks on the model, a subclass's
    `forward`. The result is run beside the model once. The model is copied: training it further does not change the result.

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
    model = unwrapped(model)
    if not isinstance(model, (Network, EncodedNetwork)):
        with evaluating(model):
            model = convert(model)
    topology, pruned = model.topology, level is not None
    if pruned:
        check_prunable(model)
    if "forward" not in model.__dict__:
        kept = topology.pruned(topology.heads[-1] if level is None else level, keep_heads=True)
        model = model.subnetwork(kept, deep_supervision=model.deep_supervision and not pruned, form=model.form)
    own, kind = next(model.parameters()).dtype, OptimizedModule if model.over_encoder else Optimized
    fast = kind(_own_copy(model, dtype), pruned=pruned, dtype=dtype or (own if own.itemsize < 4 else None), mode=mode)
    fast.compare(model, fast.network.sample() if model.over_encoder else small_image(fast.network, fast.network.multiple))
    return fast


def _own_copy(network: Any, dtype: torch.dtype | None) -> Any:
    """A copy, at least in float32: weights are rounded only after folding."""
    with torch.inference_mode(False), torch.no_grad():
        network = copy.deepcopy(network)
        wide = dtype if dtype == torch.float64 else torch.float32
        half = next(network.parameters()).dtype.itemsize < 4
        return network.to(wide) if half or dtype is not None else network


def load_optimized(source: Mapping[str, Any] | str | os.PathLike, device: str | torch.device = "cpu") -> Optimized:
    """Rebuilds a module from its `state_dict()` or a file with it; no code in a file can run (`weights_only`).

    Args:
        source: the dictionary, or the file's path.
        device: to put the module on; texts as PyTorch takes them, "cuda:1".

    Raises:
        InputError: the file does not exist, is damaged, or is not of an optimized module.
    """
    state: Any = source
    if not isinstance(source, Mapping):
        state = torch_files.read(source, "state_dict", device)
    extra = state.get("_extra_state") if isinstance(state, Mapping) else None
    if not isinstance(extra, Mapping) or extra.get("unetpp_fast_optimized") != FORMAT:
        if isinstance(state, Mapping) and any(str(key).startswith("network.encoder.") for key in state):
            raise InputError("an optimized network over an encoder is not loaded: load the original and optimize that")
        raise InputError(f"this is not a state_dict of an optimized module (format {FORMAT}): save fast.state_dict()")
    if isinstance(extra.get("config"), Mapping) and extra["config"].get("changed"):
        raise InputError(
            f"this is a state_dict of a network that was changed after it was built ({extra['config']['changed']}), which no"
            " file describes: make the model as you did, then optimize(model).load_state_dict(state_dict)"
        )
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
