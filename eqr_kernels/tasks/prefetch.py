"""Draws the puzzles of the training steps to come while the present one runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from eqr_kernels.tasks.stream import PuzzleStream


class Prefetcher:
    """Puzzles for every row of a batch, drawn in a thread of its own `depth` steps ahead, and taken without waiting.

    A step's puzzles depend on `seed`, `rank` and the step alone, whatever was taken before. So what was drawn ahead
    belongs to no run's state: a resumed run draws it again. The stream's own generator is left as it is.

    The thread starts with the first `take`, and ends with `close` or when nothing refers to the prefetcher any more.

    Args:
        stream: whose puzzles; its `draw` is called from the thread.
        n: rows of a batch.
        seed, rank: of the run and of this process, both not negative; processes draw different puzzles.
        device: where the puzzles go; to CUDA from pinned memory, so that the host does not wait for the copy.
        depth: steps that are drawn ahead of the one taken.

    Raises:
        ValueError: n or depth below 1, seed or rank below 0.
    """

    def __init__(
        self, stream: PuzzleStream, n: int, *, seed: int, rank: int, device: torch.device, depth: int = 2
    ) -> None:
        for name, value, least in (("n", n, 1), ("depth", depth, 1), ("seed", seed, 0), ("rank", rank, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least} to draw puzzles ahead, got {value}")
        self.device, self.depth = device, depth
        self._source = (stream, n, seed, rank, device)
        self._ahead: dict[int, Future[Tensor]] = {}  # by step
        self._thread: ThreadPoolExecutor | None = None

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels for training step `step`, int64 [n, S] on the device; starts on the steps after it.

        Raises:
            whatever drawing them raised in the thread.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="eqr-puzzles")
        wanted = range(step, step + self.depth + 1)
        for other in [s for s in self._ahead if s not in wanted]:
            self._ahead.pop(other).cancel()
        for s in wanted:
            if s not in self._ahead:
                # Not a bound method: a thread that refers to the prefetcher would keep it, and so itself, for ever.
                self._ahead[s] = self._thread.submit(_draw, *self._source, s)
        drawn = self._ahead.pop(step).result()
        # One byte a token goes over, and is widened there: the host would widen it in memory that is not pinned.
        tokens, labels = drawn.to(self.device, non_blocking=True).to(torch.int64).unbind()
        return tokens, labels

    def close(self) -> None:
        """Ends the thread and forgets what it drew; a later `take` starts another."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = None
        self._ahead.clear()


def _draw(stream: PuzzleStream, n: int, seed: int, rank: int, device: torch.device, step: int) -> Tensor:
    """Inputs and labels of one step, uint8 [2, n, S] on the host, pinned for CUDA."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(rank, step)))
    drawn = torch.from_numpy(np.stack(stream.draw(n, step, rng)))
    if device.type != "cuda":
        return drawn
    # Threads begin on GPU 0, where pinning would make every other process of the machine a context too.
    torch.cuda.set_device(device)
    return drawn.pin_memory()
