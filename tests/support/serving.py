"""What the tests of the engine share: a request that never ends by itself, and bounded waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields

import torch

from eqr_kernels import Engine, Recorded, SolveResult

PATIENCE = 60.0
"""Seconds after which a wait has failed."""
ENDLESS = dict(depth=(1 << 24) - 1, halt="none")


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.001)


@contextmanager
def busy(engine: Engine, tokens: torch.Tensor) -> Iterator[Future[SolveResult]]:
    """An engine with max_in_flight=1 that computes a request without end: whatever else comes, waits."""
    assert engine.max_in_flight == 1
    future = engine.submit(tokens, **ENDLESS)
    until(lambda: engine.stats().requests == 1 and engine.stats().steps > 0)
    try:
        yield future
    finally:
        future.cancel()


def assert_equal(got: object, want: object, name: str = "result") -> None:
    """Bit for bit, through results, checkpoints and tensors; NaN equals NaN."""
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor) and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")
    elif isinstance(want, SolveResult | Recorded):
        for field in fields(want):
            assert_equal(getattr(got, field.name), getattr(want, field.name), f"{name}.{field.name}")
    elif isinstance(want, dict):
        assert isinstance(got, dict) and got.keys() == want.keys(), name
        for key in want:
            assert_equal(got[key], want[key], f"{name}[{key}]")
    else:
        assert got == want, name
