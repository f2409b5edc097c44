"""A job that waits at some unit until it is let go on, so that something can be broken meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eqr_kernels.distributed.answers import Answering
from eqr_kernels.distributed.units import Unit
from eqr_kernels.reasoner import EquilibriumReasoner


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """What the condition gives once it is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)
    return value


@dataclass(frozen=True)
class Gated:
    """Answers units, and from one on waits until the folder has a file "open".

    Attributes:
        job: what is done. folder: where a worker that waits leaves a file "waiting-PID" with the number of its threads.
        place: of the first unit that waits.
    """

    job: Answering
    folder: Path
    place: int

    @property
    def settings(self) -> dict[str, Any]:
        return self.job.settings

    def work(self, model: EquilibriumReasoner) -> Callable[[Unit], Any]:
        answers = self.job.work(model)

        def gated(unit: Unit) -> Any:
            if unit.key.place >= self.place:
                (self.folder / f"waiting-{os.getpid()}").write_text(str(torch.get_num_threads()))
                wait_for((self.folder / "open").exists, "the gate to open")
            return answers(unit)

        return gated


def waiting(folder: Path, count: int) -> list[int]:
    """The processes that wait at the gate of that folder, once so many do."""

    def pids() -> list[int]:
        processes = [int(path.name.removeprefix("waiting-")) for path in folder.glob("waiting-*")]
        return processes if len(processes) >= count else []

    return wait_for(pids, f"{count} workers at the gate")
