"""Work on a GPU that is captured as a CUDA graph, whose replay is one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
one_at_a_time = threading.RLock()  # held while a process captures a graph


def on_side_stream(stream: torch.cuda.Stream, run: Callable[[], Result]) -> Result:
    """`run()` on another stream: after what the current one was given before, and before what it is given next."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            return run()
    finally:
        current.wait_stream(stream)


def capture(run: Callable[[], Result], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `run()` launches, which is not computed yet, and what `run` returned: each replay writes its tensors.

    Args:
        run: must have run on this stream before, so that kernels are compiled and choices are made.
        stream: not the current one.
        pool: of the memory of other graphs on this stream (`CUDAGraph.pool`), which is then shared: a replay may overwrite
            the results of graphs that were captured after it.

    Raises:
        Exception: whatever `run` raised, or torch: something in it cannot be captured.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
    failure: Exception | None = None
    with one_at_a_time:
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    result = run()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:  # the end of a broken capture raises an error of its own, which says less
            raise failure or error from None
        finally:
            torch.cuda.set_stream(current)  # that error leaves the other one
    return graph, result


def room_for(x: Tensor, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A tensor like `x` for a graph to read; any call may write to it, also one in inference mode."""
    with torch.inference_mode(False):
        return torch.empty_like(x, device=device, memory_format=memory_format)
