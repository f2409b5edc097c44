"""The Triton backend: every outer step of every trajectory in one launch of a persistent kernel."""

from __future__ import annotations

import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends.base import FixedPointProblem, Proceed, Recorder, Snapshot

if TYPE_CHECKING:
    from eqr_kernels.backends.triton.launch import Tables
    from eqr_kernels.backends.triton.plan import Plan
    from eqr_kernels.modules import EqROperator

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LEAST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


class TritonBackend:
    """The persistent Triton kernel, on the GPU that holds the model and on the current stream."""

    name = "triton"

    def why_not(self, model: EqROperator, dtype: torch.dtype) -> str | None:
        if dtype not in _PRECISIONS:
            known = ", ".join(_PRECISIONS.values())
            return (
                f"the Triton kernel computes in {known}, not in {str(dtype).removeprefix('torch.')}; use "
                "precision='bf16', or backend='cpu' for int8"
            )
        if find_spec("triton") is None:
            return "Triton is not installed; pip install triton (Linux only)"
        return _no_device(model)

    def describe(self, model: EqROperator, dtype: torch.dtype) -> str:
        told = f"persistent Triton kernel, {_PRECISIONS[dtype]}, "
        if model.device.type == "cpu":
            return told + "in Triton's interpreter on the CPU: for tests, slow"
        from eqr_kernels.backends.triton.tuner import known_plan

        plan = known_plan(model, dtype)
        tiles = "tiles not chosen yet" if plan is None else f"{plan.tile.warps} warps, tiles {plan.tile}"
        return f"{told}on {torch.cuda.get_device_name(model.device)}, {tiles}"

    @torch.no_grad()
    def fixed_point(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed) -> None:
        from eqr_kernels.backends.triton import launch

        p, device = problem, model.device
        plan = _plan(model, p.dtype, recorder)
        control = launch.new_control(device)
        if not proceed(0, 0):
            control[0] = 1
        with _on(device):
            # `solve`'s own default is too few for a GPU.
            programs = min(p.trajectories, p.slots) if p.slots_asked else p.trajectories
            if device.type == "cuda":
                programs = min(programs, launch.resident_programs(model, p.dtype, plan))
            with nvtx_range("eqr launch: fixed_point"):
                values, tables = launch.arguments(model, p, plan, control, programs)
                running = _Running(values, plan, programs, device)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return _deliver(p, tables, recorder)
            with nvtx_range("eqr wait"):
                _follow(running, control, proceed)
            _deliver(p, tables, recorder)
        finished, spent = tables.counters[2:].tolist()
        proceed(finished, spent)


def _no_device(model: EqROperator) -> str | None:
    weights = model.state_dict(keep_vars=True).items()
    device = model.device
    for name, weight in weights:
        if weight.device != device:
            return f"weight {name} is on {weight.device}, others are on {device}; move the model with model.cuda()"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"the model is on {device}, and Triton needs a GPU; move it with model.cuda()"
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


def _plan(model: EqROperator, dtype: torch.dtype, recorder: Recorder) -> Plan:
    from eqr_kernels.backends.triton.plan import INTERPRETED, Plan

    if model.device.type == "cpu":
        return Plan.of(model.config, INTERPRETED)
    from eqr_kernels.backends.triton.tuner import known_plan, plan_for

    known = known_plan(model, dtype)
    if known is not None:
        return known
    plan = plan_for(model, dtype)
    recorder.note(f"chosen now: {plan.tile.warps} warps, tiles {plan.tile}")
    return plan


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Running:
    """A launch under way: on the current stream, or in a thread of its own where Triton interprets."""

    # The interpreter keeps its state in globals.
    _interpreter = threading.Lock()

    def __init__(self, values: dict[str, Any], plan: Plan, programs: int, device: torch.device) -> None:
        from eqr_kernels.backends.triton.launch import launch

        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if device.type == "cuda":
            launch(values, plan, programs)
            self._event = torch.cuda.Event()
            self._event.record()
            return

        def work() -> None:
            try:
                with self._interpreter:
                    launch(values, plan, programs)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="eqr_kernels-triton", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        return self._event.query() if self._thread is None else not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when it has ended; raises what it raised."""
        if self._thread is None:
            self._event.synchronize()
        else:
            self._thread.join()
            if self._error is not None:
                raise self._error


def _follow(running: _Running, control: Tensor, proceed: Proceed) -> None:
    """Asks `proceed` now and then until the launch has ended."""
    pause, told = 1e-4, (0, 0)
    try:
        while not running.done():
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)
            _, finished, spent = control.tolist()
            # Programs write their counts in any order.
            told = max(finished, told[0]), max(spent, told[1])
            if not running.done() and not proceed(*told):
                control[0] = 1
    except BaseException:
        control[0] = 1
        running.wait()
        raise
    running.wait()


def _deliver(problem: FixedPointProblem, tables: Tables, recorder: Recorder) -> None:
    from eqr_kernels.selection import select

    p, t = problem, tables
    number = torch.arange(p.trajectories, device=t.preds.device)

    def snapshot(row: int) -> Snapshot:
        rows = (t.preds, t.q_halt, t.residual, t.score, t.steps, t.status)
        preds, *rest = (table[row] for table in rows)
        return Snapshot(number, preds, None, *rest)

    for i, depth in enumerate(p.checkpoints):
        recorder.checkpoint(depth, snapshot(i))
    if p.trace:
        recorder.residual(number[:, None], torch.arange(p.depth, device=number.device), t.residuals)
    end = snapshot(-1)
    recorder.finished(end)
    grids = (field.unflatten(0, (-1, p.breadth)) for field in (end.preds, end.status, end.score, end.q_halt, end.steps))
    restart = select(p.select, *grids)
    winner = torch.arange(len(restart), device=number.device) * p.breadth + restart
    recorder.winners(restart, t.logits[winner])
