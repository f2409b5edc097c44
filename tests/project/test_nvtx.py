"""Ranges for profilers: nothing without CUDA, balanced with it."""

from __future__ import annotations

import time

import pytest
import torch

from eqr_kernels import _nvtx
from eqr_kernels._nvtx import nvtx_range


@pytest.fixture
def ranges(monkeypatch) -> list[str]:
    """What is pushed and popped, as on a machine where CUDA is initialised."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    return calls


def test_without_cuda_it_does_nothing_and_costs_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: pytest.fail("pushed a range"))
    assert nvtx_range("a") is nvtx_range("b") is _nvtx._NOTHING
    monkeypatch.undo()
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is initialised in this process: nothing to time")
    seconds = []
    for _ in range(20):  # the best of them: another process may hold the processor
        start = time.perf_counter()
        for _ in range(1000):
            with nvtx_range("a"):
                pass
        seconds.append((time.perf_counter() - start) / 1000)
    assert min(seconds) < 1e-6


def test_ranges_are_balanced_when_an_exception_passes(ranges):
    with pytest.raises(KeyboardInterrupt), nvtx_range("outer"), nvtx_range("inner"):
        raise KeyboardInterrupt
    assert ranges == ["push outer", "push inner", "pop", "pop"]


def test_a_solve_shows_its_parts(contractive, puzzles, ranges):
    contractive.solve(puzzles, depth=2, halt="none", backend="reference")
    pushed = [call.removeprefix("push ") for call in ranges if call != "pop"]
    assert pushed == [
        "eqr solve: 12 x 1 trajectories, reference",
        "eqr fixed point: reference",
        "eqr outer step",
        "eqr outer step",
        "eqr selection",
    ]
    assert ranges.count("pop") == len(pushed)


def test_an_interrupted_solve_leaves_no_range_open(contractive, puzzles, ranges):
    def progress(finished: int, total: int, spent: int) -> bool:
        if spent:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        contractive.solve(puzzles, depth=2, halt="none", backend="reference", progress=progress)
    assert ranges.count("pop") == len(ranges) / 2 == 3
