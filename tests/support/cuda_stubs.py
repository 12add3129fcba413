"""CUDA streams and graphs on the CPU: a capture notes operators without computing them, a replay computes them anew.

As on a GPU, a replay reads and writes the memory that was there at the capture, whatever tensors point to it by then, and no
version counter tells of it; between a capture and its first replay the results are NaN; reading a value back ends a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

READS_BACK = ("_local_scalar_dense", "equal", "is_nonzero")


@dataclass(eq=False)
class Stream:
    """A stream that notes in `log` whom it waits for."""

    name: str
    log: list[tuple]
    device: str = "cpu"

    def wait_stream(self, other: Stream) -> None:
        self.log.append(("wait", self.name, other.name))


@dataclass(eq=False)
class Graph:
    """Notes operators; `pool_of` is the graph whose memory this one shares, itself if none was named."""

    stubs: Stubs
    operators: list[tuple[Callable, tuple, dict, list[Tensor]]] = field(default_factory=list)
    pool_of: Any = None

    def pool(self) -> Any:
        return self.pool_of

    @torch.no_grad()
    def replay(self) -> None:
        self.stubs.log.append(("replay", self.stubs.current.name))
        for func, args, kwargs, outputs in self.operators:
            for output, result in zip(outputs, _fresh(func, func(*args, **kwargs)), strict=True):
                output.copy_(result)


def _returned(func, results: Any) -> list[tuple[Any, Any]]:
    """Each result with its schema."""
    returns = func._schema.returns
    results = results if len(returns) > 1 else (results,) if returns else ()
    return list(zip(returns, results, strict=True))


def _fresh(func, results: Any) -> list[Tensor]:
    """The tensors among the results that are not the operator's arguments."""
    fresh = [result for schema, result in _returned(func, results) if schema.alias_info is None]
    return [one for result in fresh for one in (result if isinstance(result, (list, tuple)) else [result]) if _is(one)]


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


class _Noting(TorchDispatchMode):
    """Gives operators that compute nothing: NaN in memory of their own, arguments that are written come back unwritten."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS_BACK:
            raise RuntimeError("operation not permitted when stream is capturing")
        aliases = [schema.alias_info for schema in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return func(*args, **kwargs)  # a view
        written = {argument.name: argument.alias_info for argument in func._schema.arguments if argument.alias_info}
        copies = tree_map_only(Tensor, torch.clone, (args, kwargs))
        results = func(*copies[0], **copies[1])
        fresh = _fresh(func, results)
        for one in fresh:
            one.fill_(float("nan") if one.is_floating_point() else 0)
        here = tree_map_only(Tensor, lambda tensor: tensor.data, (args, kwargs))
        self.graph.operators.append((func, *here, [one.data for one in fresh]))
        if not written or all(alias is None for alias in aliases):
            return results
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        back = []
        for schema, result in _returned(func, results):
            mine = [n for n, a in written.items() if schema.alias_info and a.before_set == schema.alias_info.before_set]
            back.append(given[mine[0]] if mine else result)
        return back[0] if len(back) == 1 else tuple(back)


class Watching(TorchDispatchMode):
    """Lists operators in `calls`. PyTorch's gradients of some losses take another route, with other rounding, inside any
    such mode as in a capture: runs that are compared bit for bit are both watched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class Stubs:
    """What stands for `torch.cuda`.

    log: in order ("wait", who, for whom), ("capture", stream) and ("replay", stream). graphs: all that were captured, with
    the `modes` of their captures. broken: if set, raised at the end of a capture, as by one that cannot go on.
    """

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.graphs: list[Graph] = []
        self.current = self.main = Stream("main", self.log)
        self.broken: Exception | None = None
        self.modes: list[str] = []

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream is not self.current
        graph.pool_of = graph if pool is None else pool
        self.log.append(("capture", stream.name))
        self.modes.append(capture_error_mode)
        before, self.current = self.current, stream
        random = torch.get_rng_state()
        try:
            with _Noting(graph):
                yield
        finally:
            torch.set_rng_state(random)
            if self.broken:
                raise self.broken  # as torch does, with the stream of the capture left current
            self.current = before
        self.graphs.append(graph)

    @property
    def capturing(self) -> bool:
        return self.current is not self.main and any(
            isinstance(mode, _Noting) for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        )


@contextlib.contextmanager
def stubbed() -> Iterator[Stubs]:
    """Inside, the CPU stands for a GPU whose work can be captured."""
    stubs, count = Stubs(), iter(range(1, 100))
    cuda = {
        "Stream": lambda device: Stream(f"side {next(count)}", stubs.log),
        "current_stream": lambda device=None: stubs.current,
        "set_stream": stubs.set_stream,
        "stream": stubs.stream,
        "graph": stubs.graph,
        "CUDAGraph": lambda: Graph(stubs),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: stubs.capturing,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr("unetpp_fast.training.captured.DEVICE", "cpu")
        yield stubs
