"""Functions run in two processes of one group."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from support import interpreter

SECONDS = 300


def run_processes(work, folder: Path, *args) -> list:
    """`work(rank, *args)` in two processes of one group; what each returned."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_process, args=(work, rank, str(folder), args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
    errors = "".join(path.read_text() for path in sorted(folder.glob("error*")))
    assert not errors, errors
    return [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(2)]


def _process(work, rank: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.quicken()
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        torch.save(work(rank, *args), f"{folder}/result{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        raise
