"""The processes that train one model together."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; control agrees on what to do next without waiting for a GPU."""

    rank: int
    world: int
    device: torch.device
    control: Any = None

    def agree(self, order: int) -> int:
        """The greatest of all processes' wishes."""
        if self.world == 1:
            return order
        shared = torch.tensor([order], device="cpu")
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return int(shared)

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0)


@contextlib.contextmanager
def processes(device: str) -> Iterator[Process]:
    """Joins the process group when torchrun (RANK, WORLD_SIZE in the environment) started this process.

    Args:
        device: "auto" takes CUDA where there is some; under torchrun each process takes its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, torch.device(device))
        return
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        # Others wait while one process evaluates or reads, however long that takes.
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        yield Process(dist.get_rank(), dist.get_world_size(), chosen, control)
    finally:
        dist.destroy_process_group()
