"""The CUDA backend: the whole fixed-point loop in one launch of a fused kernel, the host waiting beside it.

Environment:
    EQR_CUDA_REGIME  auto (default), throughput (a trajectory for each multiprocessor) or latency (the whole device on
                     one trajectory at a time).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends.base import FixedPointProblem, Proceed, Recorder
from eqr_kernels.backends.packing import PRECISIONS, PackArguments, hand_over, operator_of, wrong_dtype

if TYPE_CHECKING:
    from eqr_kernels.modules import EqROperator

_REGIMES = ("auto", "throughput", "latency")
_REGIME = "EQR_CUDA_REGIME"
_SHORT, _LONG = 20e-6, 1e-3
"""Seconds between two looks at whether a run has ended: at first, and when it has gone on for long."""
_TELL = 0.02
"""Seconds between two calls of `proceed`."""


def regime() -> str:
    """What EQR_CUDA_REGIME asks for.

    Raises:
        ValueError: it is none of auto, throughput and latency.
    """
    name = os.environ.get(_REGIME) or "auto"
    if name not in _REGIMES:
        raise ValueError(f"the environment variable {_REGIME} must be one of {', '.join(_REGIMES)}, got {name!r}")
    return name


def plan(operator: dict[str, Any], limits: dict[str, int], **run: Any) -> dict[str, Any]:
    """How a run would be launched: kernel, ctas, threads, cluster, shared_bytes, slots, slot_bytes, workspace_bytes.

    Args:
        operator: of `operator_of`.
        limits: of a device: major, minor, multiprocessors, shared_bytes.
        run: regime, trajectories, slots, window, depth, puzzles and race.

    Raises:
        ValueError: the kernels do not take the operator, or the device does not run them; with the remedy.
    """
    result: dict[str, Any] = ops.library.require().cuda_plan(**operator, **limits, **run)
    return result


class CudaBackend:
    """The fused fixed-point kernels for compute capability 8.x (mma) and 9.0 (wgmma)."""

    name = "cuda"

    def why_not(self, model: EqROperator, dtype: torch.dtype) -> str | None:
        if why := ops.why_not_cuda():
            return why
        for name, weight in model.state_dict(keep_vars=True).items():
            if weight.device.type != "cuda":
                return f"weight {name} is on {weight.device}; move the model with model.cuda()"
            if weight.device != model.device:
                return f"weight {name} is on {weight.device} and others on {model.device}; use model.to('cuda:0')"
        if why := wrong_dtype(model):
            return why
        if dtype not in PRECISIONS:
            return f"the kernels compute in bf16, not in {dtype}; use precision='bf16', or backend='reference'"
        operator = operator_of(model)
        if why := ops.library.require().cuda_why_not(**operator, precision=PRECISIONS[dtype]):
            return str(why)
        try:
            for name in ("throughput", "latency") if regime() == "auto" else (regime(),):
                plan(operator, _limits(model.device), **_run(name, trajectories=1 << 20))
        except (ValueError, RuntimeError) as error:
            return f"{model.device}: {error}"
        return None

    def describe(self, model: EqROperator, dtype: torch.dtype) -> str:
        limits, asked = _limits(model.device), regime()
        many = plan(operator_of(model), limits, **_run(asked, trajectories=1 << 20))
        told = f"fused fixed-point kernel, bf16, {many['kernel']}"
        if many["cluster"] > 1:
            told += f" in clusters of {many['cluster']}"
        if asked == "auto":
            told += ", or for few trajectories latency"
        else:
            told += f" ({_REGIME}={asked})"
        name, capability = torch.cuda.get_device_name(model.device), f"{limits['major']}.{limits['minor']}"
        return f"{told}, on {name} ({capability}, {limits['multiprocessors']} multiprocessors)"

    @torch.no_grad()
    def fixed_point(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed) -> None:
        p, operator = problem, operator_of(model)
        if p.slots_asked:
            slots = p.slots
        else:
            slots = max(p.trajectories, 1)  # as many as the device takes
        with torch.cuda.device(model.device):
            launched = plan(
                operator,
                _limits(model.device),
                regime=regime(),
                trajectories=p.trajectories,
                slots=slots,
                window=p.window,
                depth=p.depth,
                puzzles=len(p.tokens),
                race=p.race,
            )
            recorder.note(f"{launched['kernel']} with {launched['ctas']} CTAs, {launched['slots']} in flight")
            with nvtx_range("eqr pack weights"):
                packed = PackArguments.of(model).pack("bf16", launched["kernel"])
            run = _Run(p, proceed)
            with run.watched(), nvtx_range(f"eqr launch: {launched['kernel']}"):
                result = ops.fixed_point(
                    packed,
                    p.tokens.contiguous(),
                    p.ids.contiguous(),
                    run.control,
                    **operator,
                    seed=p.seed,
                    breadth=p.breadth,
                    depth=p.depth,
                    halt=p.halt,
                    tol=p.tol,
                    patience=p.patience,
                    select=p.select,
                    window=p.window,
                    noise_scale=p.noise_scale,
                    checkpoints=p.checkpoints,
                    slots=slots,
                    trace=p.trace,
                )
            with nvtx_range("eqr wait"):
                run.wait()
            hand_over(result, p, recorder)
            run.tell_the_end(result.steps)


class _Run:
    """A run on the current stream, seen from the host."""

    def __init__(self, problem: FixedPointProblem, proceed: Proceed) -> None:
        self.problem, self.proceed = problem, proceed
        self.capturing = torch.cuda.is_current_stream_capturing()
        # Of no use in a graph, whose replays nobody watches.
        where: dict[str, Any] = dict(device=problem.tokens.device) if self.capturing else dict(pin_memory=True)
        self.control = torch.zeros(3, dtype=torch.int64, **where)
        self.finished = self.spent = 0
        if not proceed(0, 0):
            self.control[0] = 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What fails inside leaves nothing running: the kernel writes to `control` until it has ended."""
        try:
            yield
        except BaseException:
            if not self.capturing:
                self.control[0] = 1
                event = torch.cuda.Event()
                event.record()
                event.synchronize()
            raise

    def wait(self) -> None:
        """Returns when the stream has come to the end of what is on it now; asks `proceed` now and then."""
        if self.capturing:
            return
        with self.watched():
            event = torch.cuda.Event()
            event.record()
            begun = told = time.perf_counter()
            while not event.query():
                now = time.perf_counter()
                if now - told >= _TELL:
                    told = now
                    if not self._ask():
                        self.control[0] = 1
                time.sleep(min(max(_SHORT, (now - begun) / 50), _LONG))

    def _ask(self) -> bool:
        # The counts of different multiprocessors may overtake each other.
        _, finished, spent = self.control.tolist()
        self.finished, self.spent = max(self.finished, finished), max(self.spent, spent)
        return self.proceed(self.finished, self.spent)

    def tell_the_end(self, steps: Tensor) -> None:
        if not self.capturing:
            self.proceed(self.problem.trajectories, int(steps.sum()))


def _limits(device: torch.device) -> dict[str, int]:
    # With torch, so that its context is the current one.
    with torch.cuda.device(device):
        limits: dict[str, int] = ops.library.require().cuda_device(torch.cuda.current_device())
        return limits


def _run(regime: str, trajectories: int) -> dict[str, Any]:
    """Arguments of `plan` for a run that asks for nothing special."""
    return dict(
        regime=regime, trajectories=trajectories, slots=trajectories, window=1, depth=1, puzzles=trajectories, race=True
    )
