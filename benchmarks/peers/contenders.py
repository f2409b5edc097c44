"""A contender checks its output against the reference once, then takes turns: a few timed outer steps each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import EquilibriumReasoner, backends
from eqr_kernels.precision import Precision

from .steppers import State, Steps, stepper
from .workload import DTYPES, ERROR_LIMIT, STEP_LIMIT, Unavailable, Workload, expected_logits, relative_error

SECONDS = 0.25
"""Roughly what is timed in a turn, in whole outer steps."""
MOST_STEPS = {"cpu": 64, "cuda": 2048}


def elapsed(device: str, run: Callable[[], object]) -> float:
    """Seconds that `run` takes: between events of the device's own where there are any, else of the wall clock."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


class Stepping:
    """A peer, whose outer steps are called one by one from the state that the turn before left."""

    def __init__(self, name: str, work: Workload, precision: str) -> None:
        self.work, self.dtype = work, DTYPES[precision]
        self.peer = stepper(name, self.dtype, work.model.config.layers_per_step, work.device)
        self.info = self.peer.info
        self.noise_scale = work.model.config.noise_scale
        self.steps: Steps = self.peer.steps(work.model)
        self.short: Steps = self.peer.steps(work.short)
        self.state = self._start(work.model)

    def _start(self, model: EquilibriumReasoner) -> State:
        state = model.initial_state(self.work.batch, ids=torch.arange(self.work.batch))
        return state.z_H.to(self.dtype), state.z_L.to(self.dtype)

    def logits(self, short: bool, noise_scale: float) -> Tensor:
        """Logits [n, S, V] after one outer step from the start."""
        model, steps = (self.work.short, self.short) if short else (self.work.model, self.steps)
        return steps(self._start(model), self.work.tokens, noise_scale, 1)[1]

    def _timed(self, count: int) -> float:
        def run() -> None:
            self.state, _ = self.steps(self.state, self.work.tokens, self.noise_scale, count)

        return elapsed(self.work.device, run) / count

    def warm_up(self) -> None:
        self._timed(1)
        self.count = max(1, min(MOST_STEPS[self.work.device], math.ceil(SECONDS / self._timed(1))))

    def turn(self) -> dict[str, Any]:
        self._timed(1)
        return {"seconds": self._timed(self.count)}

    def query(self, depth: int) -> Tensor:
        """Answers [n, S] after `depth` outer steps from the start."""
        return self.steps(self._start(self.work.model), self.work.tokens, self.noise_scale, depth)[1].argmax(-1)


class Solving:
    """This package: `solve` at a fixed depth. A step costs what a deeper solve takes longer than one of depth 1."""

    def __init__(self, backend: str, work: Workload, precision: str) -> None:
        if why_not := backends.available(work.model, Precision[precision])[backend]:
            raise Unavailable(f"backend={backend!r} cannot run: {why_not}")
        self.work = work
        self.options: dict[str, Any] = dict(
            halt="none", backend=backend, precision=precision, ids=torch.arange(work.batch), slots=work.batch
        )
        self.info: dict[str, Any] = {}

    def _solve(self, model: EquilibriumReasoner, depth: int, **options: Any) -> Tensor:
        result = model.solve(self.work.tokens, depth=depth, **self.options, **options)
        self.info["backend"] = result.backend_reason
        return result.logits

    def logits(self, short: bool, noise_scale: float) -> Tensor:
        """Logits [n, S, V] after one outer step from the start."""
        return self._solve(self.work.short if short else self.work.model, 1, noise_scale=noise_scale)

    def _timed(self, depth: int) -> float:
        return elapsed(self.work.device, lambda: self._solve(self.work.model, depth))

    def warm_up(self) -> None:
        self._timed(1)
        per_step = self._timed(1)
        if self.work.device == "cuda":
            # A launch costs more than a step, and the host learns of its end a little late.
            per_step = max((self._timed(9) - per_step) / 8, 1e-5)
        # The difference of two solves is the noisier, the fewer steps it spans.
        self.count = max(4, min(MOST_STEPS[self.work.device], math.ceil(SECONDS / per_step)))

    def turn(self) -> dict[str, Any]:
        self._timed(1)
        shallow, deep = self._timed(1), self._timed(1 + self.count)
        return {"seconds": (deep - shallow) / self.count, "solve_seconds": deep / (1 + self.count)}

    def query(self, depth: int) -> Tensor:
        return self._solve(self.work.model, depth).argmax(-1)


def check(contender: Stepping | Solving, precision: str) -> dict[str, float]:
    """The contender's errors, as relative norms of the logits against float64.

    Raises:
        AssertionError: its output is wrong, so that nothing may be timed.
    """
    work, ours = contender.work, isinstance(contender, Solving)
    rows = work.checked_rows()
    tokens = work.tokens[rows]
    quiet = contender.logits(short=True, noise_scale=0.0)
    exact = expected_logits(work.short, tokens, rows, torch.float64)
    error = relative_error(quiet[rows], exact)
    errors = {"error": error}
    if precision == "bf16":
        errors["error_of_reference"] = relative_error(expected_logits(work.short, tokens, rows, torch.bfloat16), exact)
        limit = (1.1 if ours else 1.3) * errors["error_of_reference"]
    else:
        limit = ERROR_LIMIT[precision]
    assert error <= limit, f"the error after two applications of the module is {error:.2g}, the limit {limit:.2g}"
    noisy = contender.logits(short=True, noise_scale=work.model.config.noise_scale)
    change = relative_error(noisy, quiet)
    assert 1e-3 < change < 1, f"the noise changes the logits by {change:.2g}: it is not the config's"
    step = relative_error(
        contender.logits(short=False, noise_scale=0.0)[rows], expected_logits(work.model, tokens, rows, torch.float64)
    )
    assert step <= STEP_LIMIT[precision], f"the error after an outer step is {step:.2g}: it is not the same operator"
    return {**errors, "error_of_step": step}
