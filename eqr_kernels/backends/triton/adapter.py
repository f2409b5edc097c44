"""The Triton backend: every outer step of every trajectory in one launch of a persistent kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch

from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends.base import FixedPointProblem, ParkedRun, Proceed, Recorder, gpu_remedy
from eqr_kernels.backends.tables import deliver
from eqr_kernels.backends.triton.plan import INTERPRETED, Plan
from eqr_kernels.backends.watch import Launch, StreamLaunch, ThreadLaunch, Watch
from eqr_kernels.config import PUBLISHED_MULTIPLE
from eqr_kernels.modules import EqROperator
from eqr_kernels.ops.triton import interpreting
from eqr_kernels.precision import Precision, names

_LEAST_CAPABILITY = (8, 0)


class TritonBackend:
    """The persistent Triton kernel, on the GPU that holds the model and on the current stream."""

    name = "triton"
    precisions = (Precision.fp32, Precision.bf16)
    max_checkpoints: int | None = None
    keeps_states = False
    turns_cells = False
    runs_modules = False

    def why_not(self, model: EqROperator, precision: Precision) -> str | None:
        if precision not in self.precisions:
            return (
                f"the Triton kernel computes in {names(self.precisions)}, not in {precision.name}; use "
                "precision='bf16', or backend='cpu' for int8"
            )
        if model.config.multiple_of % PUBLISHED_MULTIPLE:
            return (
                f"the Triton kernel takes hidden units in multiples of {PUBLISHED_MULTIPLE}, and the config's "
                f"multiple_of is {model.config.multiple_of}; use backend='reference', or backend='cpu'"
            )
        if find_spec("triton") is None:
            return "Triton is not installed; pip install triton (Linux only)"
        return _no_device(model)

    def describe(self, model: EqROperator, precision: Precision) -> str:
        description = f"persistent Triton kernel, {precision.name}, "
        if model.device.type == "cpu":
            return description + "in Triton's interpreter on the CPU: for tests, slow"
        from eqr_kernels.backends.triton import tuner

        plan = tuner.known_plan(model, precision.dtype)
        tiles = "tiles not chosen yet" if plan is None else f"{plan.tile.warps} warps, tiles {plan.tile}"
        return f"{description}on {torch.cuda.get_device_name(model.device)}, {tiles}"

    @torch.no_grad()
    def fixed_point(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed) -> None:
        # Here, since Triton is optional.
        from eqr_kernels.backends.triton import launch

        p, device = problem, model.device
        plan = _plan(model, p.dtype, recorder)
        with _on(device):
            watch = Watch(device, proceed)
            # `solve`'s own default is too few for a GPU.
            programs = min(p.trajectories, p.slots) if p.slots_asked else p.trajectories
            if device.type == "cuda":
                programs = min(programs, launch.resident_programs(model, p.dtype, plan))
            values, tables = launch.arguments(model, p, plan, watch.control, programs)

            def interpret() -> None:
                with launch.INTERPRETER:
                    launch.launch(values, plan, programs)

            running: Launch
            with watch.launching():
                with nvtx_range("eqr launch: fixed_point"):
                    if device.type == "cuda":
                        launch.launch(values, plan, programs)
                        running = StreamLaunch()
                    else:
                        running = ThreadLaunch(interpret, "eqr_kernels-triton")
                if not watch.captured:
                    with nvtx_range("eqr wait"):
                        watch.follow(running)
            deliver(tables, p, recorder)
            if not watch.captured:
                finished, spent = values["counters"][2:].tolist()
                proceed(finished, spent)

    def kernel(self, model: EqROperator, problem: FixedPointProblem) -> str:
        return self.name

    def parked_run(self, model: EqROperator, problem: FixedPointProblem, places: int) -> ParkedRun:
        # Here, since Triton is optional.
        from eqr_kernels.backends.triton.parked import TritonParkedRun

        plan = _plan(model, problem.dtype, None)
        with _on(model.device):
            return TritonParkedRun(model, problem, plan, places)


def _no_device(model: EqROperator) -> str | None:
    weights = model.state_dict(keep_vars=True).items()
    device = model.device
    for name, weight in weights:
        if weight.device != device:
            return f"weight {name} is on {weight.device}, others are on {device}; {gpu_remedy()}"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"the model is on {device}, and Triton needs a GPU; {gpu_remedy()}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            has, needs = (".".join(map(str, c)) for c in (capability, _LEAST_CAPABILITY))
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {has}, and the kernel needs {needs}; use "
                "backend='reference'"
            )
    if interpreting():
        return "TRITON_INTERPRET is set, and the interpreter takes no GPU tensors here; unset it, or use model.cpu()"
    return None


def _plan(model: EqROperator, dtype: torch.dtype, recorder: Recorder | None) -> Plan:
    if model.device.type == "cpu":
        return Plan.of(model.config, INTERPRETED)
    from eqr_kernels.backends.triton import tuner

    plan = tuner.known_plan(model, dtype)
    if plan is None:
        plan = tuner.plan_for(model, dtype)
        if recorder is not None:
            recorder.note(f"chosen now: {plan.tile.warps} warps, tiles {plan.tile}")
    return plan


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
