"""A backward pass through an encoder that computes normed and activated maps again instead of keeping them.

Of `act(norm(conv(x)))` PyTorch keeps three maps: the convolution's, which the norm needs, the normed one, which the
activation needs, and the activated one, which the next convolution needs. The latter two follow from the first. Inside
`recomputing`, autograd keeps for them how they are computed (a `Recipe`), so the gradients are those of the plain modules,
to the last bit. Functions are recognised as they are called; what is not recognised is kept as always.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ACTIVATIONS: set[Callable] = {F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.hardswish}
RELUS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
OTHERS = {F.gelu, F.pad}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
GATE = 16  # times as many values as a gate has the map that it scales, at least
SIGNATURES = {function: inspect.signature(function) for function in ACTIVATIONS}


class Stored:
    """A tensor that is kept. Raises RuntimeError if it has changed when it is needed."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor.detach(), tensor._version

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that the backward pass of an encoder needs has been modified by an inplace operation: it is at"
                f" version {self.tensor._version}, version {self.version} is needed"
            )
        return self.tensor


class Recipe:
    """How a map is computed. left: of the tensors that autograd keeps as this recipe, those that it has not taken yet; until
    it has, the value stays once it is computed."""

    def __init__(self, compute: Callable[[], Tensor]):
        self.compute, self.left = compute, 0
        self._value: Tensor | None = None

    @torch.no_grad()
    def value(self) -> Tensor:
        value = self.compute() if self._value is None else self._value
        self._value = value if self.left > 0 else None
        return value


class Kept:
    """What autograd keeps of a tensor: itself, or its recipe."""

    def __init__(self, tensor: Tensor):
        self.source: Any = Stored(tensor)  # or a Recipe

    def become(self, recipe: Recipe) -> None:
        self.source = recipe
        recipe.left += 1

    def value(self) -> Tensor:
        if isinstance(self.source, Recipe):
            self.source.left -= 1
        return self.source.value()


class Known(NamedTuple):
    """The recipe of a tensor as long as it is what it was: of this storage, version and layout."""

    storage: StorageWeakRef  # as long as there is a reference no other storage has its address
    version: int
    layout: tuple
    recipe: Recipe


class Recomputing(TorchFunctionMode):
    """Recognises functions as they are called, and what autograd keeps of each."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Known] = {}  # by address of the storage
        self._kept: list[Kept] | None = None  # of the function that runs

    def pack(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        if self._kept is not None:
            self._kept.append(kept)
        return kept

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._kept = []
        try:
            result, recipe = self._called(func, args, kwargs)
        finally:
            kept, self._kept = self._kept, None
        if recipe is not None:
            storage = result.untyped_storage()
            self._known[storage._cdata] = Known(StorageWeakRef(storage), result._version, _layout(result), recipe)
        if kept:
            self._settle(kept, [result, *args, *kwargs.values()])
        return result

    def _called(self, func: Callable, args: tuple, kwargs: dict) -> tuple[Any, Recipe | None]:
        """The result of a function, and its recipe if it has one."""
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        again: Any = None
        if func in ACTIVATIONS:
            given = SIGNATURES[func].bind(*args, **kwargs).arguments
            source, options = self._recipe(given.pop("input")), {**given, "inplace": False}
            options = options if "inplace" in SIGNATURES[func].parameters else given
            again = source and (lambda: func(source.value(), **options))
            if source and given.get("inplace"):
                return self._in_place(func, args, kwargs, source), Recipe(again)
        elif func in RELUS:
            source = self._recipe(args[0])
            again = source and (lambda: source.value().relu())
        elif func in PRODUCTS and len(args) == 2 and all(isinstance(one, Tensor) for one in args):
            again = self._product(*args)
        elif func in OTHERS and args:
            source, rest = self._recipe(args[0]), args[1:]
            again = source and (lambda: func(source.value(), *rest, **kwargs))
        return func(*args, **kwargs), Recipe(again) if again else None

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> tuple[Tensor, Recipe | None]:  # fmt: skip
        usual = input.dtype in (torch.float32, torch.float64) and weight is not None and bias is not None
        if not training or not usual or weight.dtype != input.dtype or input.numel() <= input.shape[1]:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps), None
        source = self._recipe(input) or Stored(input)
        y, mean, inverse = torch.native_batch_norm(input, weight, bias, running_mean, running_var, True, momentum, eps)
        # With a variance of one, what it multiplies the map with is `scale`, rounded as it was.
        shift, scale, one = bias.detach().clone(), inverse.detach() * weight.detach(), torch.ones_like(inverse)
        mean = mean.detach()
        return y, Recipe(lambda: torch.native_batch_norm(source.value(), scale, shift, mean, one, False, 0.0, 0.0)[0])

    def _in_place(self, func: Callable, args: tuple, kwargs: dict, source: Recipe) -> Tensor:
        """The result of an activation that writes it to its argument, a copy of which some of them keep."""
        result = func(*args, **kwargs)
        mine = result.untyped_storage()._cdata
        for kept in self._kept:
            if kept.source.tensor.shape == result.shape and kept.source.tensor.untyped_storage()._cdata != mine:
                kept.become(source)
        self._kept = [kept for kept in self._kept if isinstance(kept.source, Stored)]
        return result

    def _product(self, x: Tensor, y: Tensor) -> Callable[[], Tensor] | None:
        """Of a map that has a recipe and a gate, which has a value for each of its channels."""
        gate, whole = (x, y) if x.numel() < y.numel() else (y, x)
        source = self._recipe(whole) if gate.numel() * GATE <= whole.numel() and gate.dtype == whole.dtype else None
        kept = source and Stored(gate)
        return (lambda: kept.value() * source.value()) if source else None

    def _recipe(self, tensor: Tensor) -> Recipe | None:
        known = self._known.get(tensor.untyped_storage()._cdata) if type(tensor) is Tensor else None
        same = known is not None and known.version == tensor._version and known.layout == _layout(tensor)
        return known.recipe if same and not known.storage.expired() else None

    def _settle(self, kept: list[Kept], tensors: list) -> None:
        """Gives what a function has kept the recipes of its arguments and its result. Autograd keeps a tensor of its own for
        a result, which does not count the changes of the result."""
        mine = {_identity(one): one for one in tensors if isinstance(one, Tensor)}
        for one in kept:
            tensor = mine.get(_identity(one.source.tensor))
            if tensor is not None and (recipe := self._recipe(tensor)):
                one.become(recipe)
            elif tensor is not None:
                one.source = Stored(tensor)


def _layout(tensor: Tensor) -> tuple:
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _identity(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, *_layout(tensor)


def _may_recompute(x: Tensor) -> bool:
    """Whether autograd runs as usual: others' hooks, such as those of checkpoints, see only what no hooks of ours keep."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    autograd: Any = torch._C._autograd
    top = getattr(autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)
    return (
        not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and autograd._saved_tensors_hooks_is_enabled()
        and top(False) is None
    )


@contextmanager
def recomputing(x: Tensor) -> Iterator[None]:
    """Inside, a pass over the image `x` keeps recipes where it can: on a CPU, with gradients, without autocast, and where no
    hooks on saved tensors are set."""
    if not _may_recompute(x):
        yield
        return
    mode = Recomputing()
    with torch.autograd.graph.saved_tensors_hooks(mode.pack, Kept.value), mode:
        yield
