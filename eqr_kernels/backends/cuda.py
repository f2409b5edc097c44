"""The CUDA backend: the whole fixed-point loop in one launch of a fused kernel, the host waiting beside it.

Environment:
    EQR_CUDA_REGIME  auto (default), throughput (a trajectory for each multiprocessor) or latency (the whole device on
                     one trajectory at a time).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from eqr_kernels import ops
from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends.base import FixedPointProblem, ParkedRun, Proceed, Recorder, gpu_is_seen, gpu_remedy
from eqr_kernels.backends.cuda_parked import CudaParkedRun
from eqr_kernels.backends.packing import PackArguments, operator_of, wrong_dtype
from eqr_kernels.backends.tables import hand_over
from eqr_kernels.backends.watch import StreamLaunch, Watch
from eqr_kernels.modules import EqROperator
from eqr_kernels.precision import Precision

_REGIMES = ("auto", "throughput", "latency")
_REGIME = "EQR_CUDA_REGIME"


def regime() -> str:
    """What EQR_CUDA_REGIME asks for.

    Raises:
        ValueError: it is none of auto, throughput and latency.
    """
    name = os.environ.get(_REGIME) or "auto"
    if name not in _REGIMES:
        raise ValueError(f"the environment variable {_REGIME} must be one of {', '.join(_REGIMES)}, got {name!r}")
    return name


def plan(operator: ops.Operator, limits: dict[str, int], **run: Any) -> dict[str, Any]:
    """How a run would be launched: kernel, ctas, threads, cluster, shared_bytes, slots, slot_bytes, workspace_bytes.

    Args:
        limits: of a device: major, minor, multiprocessors, shared_bytes.
        run: regime, trajectories, slots, window, depth, puzzles and race.

    Raises:
        ValueError: the kernels do not take the operator, or the device does not run them; with the remedy.
    """
    result: dict[str, Any] = ops.library.require().cuda_plan(*operator, **limits, **run)
    return result


class CudaBackend:
    """The fused fixed-point kernels for compute capability 8.x (mma) and 9.0 (wgmma)."""

    name = "cuda"
    precisions = (Precision.bf16,)
    max_checkpoints: int | None = 64  # kMostCheckpoints of csrc/cuda/problem.h
    keeps_states = False
    turns_cells = False
    runs_modules = False

    def why_not(self, model: EqROperator, precision: Precision) -> str | None:
        why = ops.why_not_cuda()
        if why and (model.device.type == "cuda" or gpu_is_seen()):
            return why
        for name, weight in model.state_dict(keep_vars=True).items():
            if weight.device.type != "cuda":
                return f"weight {name} is on {weight.device}; {gpu_remedy()}"
            if weight.device != model.device:
                return f"weight {name} is on {weight.device} and others on {model.device}; use model.to('cuda:0')"
        if why := wrong_dtype(model):
            return why
        if precision not in self.precisions:
            return (
                f"the kernels compute in bf16, not in {precision.name}; use precision='bf16', or backend='triton' or "
                "backend='reference'"
            )
        operator = operator_of(model)
        if why := ops.library.require().cuda_why_not(*operator, precision.name):
            return str(why)
        try:
            for name in ("throughput", "latency") if regime() == "auto" else (regime(),):
                plan(operator, _limits(model.device), **_run(name, trajectories=1 << 20))
        except (ValueError, RuntimeError) as error:
            return f"{model.device}: {error}"
        return None

    def describe(self, model: EqROperator, precision: Precision) -> str:
        limits, requested = _limits(model.device), regime()
        many = plan(operator_of(model), limits, **_run(requested, trajectories=1 << 20))
        description = f"fused fixed-point kernel, bf16, {many['kernel']}"
        if many["cluster"] > 1:
            description += f" in clusters of {many['cluster']}"
        if requested == "auto":
            description += ", or for few trajectories latency"
        else:
            description += f" ({_REGIME}={requested})"
        name, capability = torch.cuda.get_device_name(model.device), f"{limits['major']}.{limits['minor']}"
        return f"{description}, on {name} ({capability}, {limits['multiprocessors']} multiprocessors)"

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
                packed = PackArguments.of(model).pack(Precision.bf16, launched["kernel"])
            watch = Watch(model.device, proceed)
            with watch.launching():
                rules = replace(p, slots=slots)
                with nvtx_range(f"eqr launch: {launched['kernel']}"):
                    result = ops.fixed_point(packed, p.tokens.contiguous(), p.ids.contiguous(), watch.control, rules)
                if not watch.captured:
                    with nvtx_range("eqr wait"):
                        watch.follow(StreamLaunch())
            hand_over(result, p, recorder)
            if not watch.captured:
                proceed(p.trajectories, int(result.steps.sum()))

    def kernel(self, model: EqROperator, problem: FixedPointProblem) -> str:
        run = _run(regime(), problem.trajectories)
        return str(plan(operator_of(model), _limits(model.device), **run)["kernel"])

    @torch.no_grad()
    def parked_run(self, model: EqROperator, problem: FixedPointProblem, places: int) -> ParkedRun:
        kernel, p = self.kernel(model, problem), problem
        run = _run("latency" if kernel == "latency" else "throughput", trajectories=1 << 20)
        run |= dict(window=p.window, depth=p.depth, puzzles=places, race=p.race)
        with torch.cuda.device(model.device):
            packed = PackArguments.of(model).pack(Precision.bf16, kernel)
            return CudaParkedRun(packed, p, plan(operator_of(model), _limits(model.device), **run), places)


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
