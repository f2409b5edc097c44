"""Four ways to serve requests, with one interface: `submit` gives a future of the answer, int64 [S], and its steps."""

from __future__ import annotations

import time
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.serving.workload import Workload
from eqr_kernels import Engine, EquilibriumReasoner
from eqr_kernels.results import SolveResult

WINDOW, MOST = 0.005, 32
"""Seconds for which a batch is collected, and its requests at most."""
LEAST_SERVICE, FIFO, BATCHES, FULL_DEPTH = "least service", "fifo", "batches", "full depth"
SERVERS = (LEAST_SERVICE, FIFO, BATCHES, FULL_DEPTH)


class Served(NamedTuple):
    preds: Tensor  # int64 [S]
    steps: int


class Server(Protocol):
    def submit(self, tokens: Tensor) -> Future[Served]: ...

    def close(self) -> None: ...


def make(name: str, model: EquilibriumReasoner, workload: Workload) -> Server:
    options: dict[str, Any] = dict(depth=workload.depth, tol=workload.tol)
    if name in (LEAST_SERVICE, FIFO):
        policy = "least_service" if name == LEAST_SERVICE else "fifo"
        return Continuous(Engine(model, policy=policy, max_queued=100_000, **options))
    if name == FULL_DEPTH:
        options["halt"] = "none"
    return Batches(model, options)


class Continuous:
    """Requests join a running solve."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def submit(self, tokens: Tensor) -> Future[Served]:
        served: Future[Served] = Future()

        def answer(future: Future[SolveResult]) -> None:
            if not future.cancelled():
                result = future.result()
                served.set_result(Served(result.preds[0], int(result.nfe[0])))

        self._engine.submit(tokens).add_done_callback(answer)
        return served

    def close(self) -> None:
        self._engine.close(cancel=True)


class Batches:
    """Requests that have come within a window are solved together, and all are answered when the last one has ended."""

    def __init__(self, model: EquilibriumReasoner, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._queue: SimpleQueue[tuple[Tensor, Future[Served]] | None] = SimpleQueue()
        self._closed = False
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, tokens: Tensor) -> Future[Served]:
        served: Future[Served] = Future()
        self._queue.put((tokens, served))
        return served

    def close(self) -> None:
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed and (first := self._queue.get()) is not None:
            batch, until = [first], time.perf_counter() + WINDOW
            while len(batch) < MOST:
                try:
                    item = self._queue.get(timeout=max(0.0, until - time.perf_counter()))
                except Empty:
                    break
                if item is None:
                    return
                batch.append(item)
            tokens = torch.stack([tokens for tokens, _ in batch])
            # A batch that nobody waits for any more ends early.
            result = self._model.solve(tokens, progress=lambda *_: not self._closed, **self._options)
            for (_, served), preds, nfe in zip(batch, result.preds, result.nfe.tolist(), strict=True):
                served.set_result(Served(preds, nfe))
