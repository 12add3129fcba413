"""A pass on a GPU as the replay of a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..common import cuda_graphs
from ..common.errors import first_line
from ..execution.fused import tuning

KEPT_GRAPHS = 4
Run = Callable[[Tensor], list[Tensor]]


class Graph:
    """A captured pass for one input size, with static input and output tensors; calls wait for one another."""

    def __init__(self, run: Run, x: Tensor):
        self.x = cuda_graphs.room_for(x, x.device)
        self.x.copy_(x)
        self.done = torch.cuda.Event()
        self.lock = threading.Lock()
        stream = torch.cuda.Stream(x.device)
        for _ in range(2):  # compile kernels and choose between them
            cuda_graphs.on_side_stream(stream, lambda: run(self.x))
        self.graph, self.outputs = cuda_graphs.capture(lambda: run(self.x), stream)

    def replay(self, x: Tensor) -> list[Tensor]:
        """Copies of the outputs for `x`."""
        with self.lock:
            stream = torch.cuda.current_stream(x.device)
            stream.wait_event(self.done)  # a replay on another stream may still read the input that the next line writes
            self.x.copy_(x)
            self.graph.replay()
            outputs = [output.clone() for output in self.outputs]
            self.done.record(stream)
        return outputs


class Graphs:
    """The graphs of the latest sizes. Where capturing fails, `reason` says why, and kernels are launched one by one for that
    size; others are captured all the same."""

    def __init__(self, kept: int = KEPT_GRAPHS):
        self.kept = kept
        self._failed: dict[tuple, str] = {}
        self._fastest: dict[tuple, str | None] = {}
        self._measuring = threading.Lock()
        self._graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def reason(self) -> str:
        """Why passes are not captured, a line for each size; "" if all are."""
        return "\n".join(dict.fromkeys(self._failed.values()))

    def run(self, run: Run, x: Tensor, key: tuple) -> list[Tensor]:
        """`run(x)`; `key` distinguishes passes that differ in more than the input size."""
        key = (*key, x.dtype, x.device, tuple(x.shape))
        if key in self._failed or x.numel() == 0 or torch.cuda.is_current_stream_capturing():
            return run(x)
        with torch.cuda.device(x.device):
            try:
                graph = self._find(run, x, key)
            except Exception as error:  # of Triton's own kind or torch's
                size = "x".join(map(str, x.shape))
                self._failed[key] = f"{size} is not captured: {type(error).__name__}: {first_line(error)}"
                return run(x)
            return graph.replay(x)

    def fastest(self, runs: Mapping[str, Run], x: Tensor, key: tuple) -> str | None:
        """Of passes by name that compute the same, the one whose replay takes the least time, measured once for each size;
        None if not all can be captured. The graphs of the others are dropped.

        A replay leaves out the time of launching kernels one by one, so a pass that is slower without graphs may win.
        """
        place = (*key, x.dtype, x.device, tuple(x.shape))
        with self._measuring:
            if place not in self._fastest:
                self.kept += len(runs) - 1  # so that what is dropped here takes the place of no other size
                try:
                    self._fastest[place] = self._measured(runs, x, key, place)
                finally:
                    self.kept -= len(runs) - 1
            return self._fastest[place]

    def _measured(self, runs: Mapping[str, Run], x: Tensor, key: tuple, place: tuple) -> str | None:
        times = {}
        for name, run in runs.items():
            times[name] = tuning.milliseconds(lambda name=name, run=run: self.run(run, x, (name, *key)), x.device)
        all_captured = not any((name, *place) in self._failed for name in runs)
        best = min(times, key=times.get) if all_captured else None
        for name in runs:
            with self._lock:
                graph = None if name == best else self._graphs.pop((name, *place), None)
                if graph is not None:
                    graph.done.synchronize()
        return best

    def _find(self, run: Run, x: Tensor, key: tuple) -> Graph:
        with self._lock:
            if key not in self._graphs:
                while len(self._graphs) >= self.kept:
                    self._graphs.popitem(last=False)[1].done.synchronize()  # its memory may be in use until then
                with cuda_graphs.one_at_a_time:
                    self._graphs[key] = Graph(run, x)
            self._graphs.move_to_end(key)
            return self._graphs[key]
