"""The registry of backends: which there are, which can run a model here, and why another cannot."""

from __future__ import annotations

import os

from eqr_kernels.backends.base import Backend, FixedPointProblem, ParkedRun, Parking, Recorder, Stepping
from eqr_kernels.backends.cpu import CpuBackend
from eqr_kernels.backends.cuda import CudaBackend
from eqr_kernels.backends.reference import ReferenceBackend
from eqr_kernels.backends.triton.adapter import TritonBackend
from eqr_kernels.modifications import modification
from eqr_kernels.modules import EqROperator
from eqr_kernels.precision import Precision
from eqr_kernels.trajectory import Snapshot, Status

__all__ = [
    "Backend",
    "FixedPointProblem",
    "ParkedRun",
    "Parking",
    "Recorder",
    "Snapshot",
    "Status",
    "Stepping",
    "available",
    "choose",
]

# In the order in which "auto" prefers them.
_BACKENDS: tuple[Backend, ...] = (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())


def available(
    model: EqROperator, precision: Precision, *, states: bool = False, turns: bool = False
) -> dict[str, str | None]:
    """Every backend's name, with None where it can run `model` in `precision`, else the reason why not.

    Args:
        states: it must take start states and give final ones. turns: it must move cells between outer steps.
    """
    return _reasons(model, precision, states, turns, modification(model))


def _reasons(
    model: EqROperator, precision: Precision, states: bool, turns: bool, modified: str | None
) -> dict[str, str | None]:
    def why_not(backend: Backend) -> str | None:
        if modified is not None and not backend.runs_modules:
            return (
                f"{modified}, and the kernels compute the plain operator; undo it (merge an adapter, remove a hook) "
                "or use backend='reference'"
            )
        why = backend.why_not(model, precision)
        if why is None and states and not backend.keeps_states:
            keeping = " or ".join(repr(b.name) for b in _BACKENDS if b.keeps_states)
            return f"it takes no initial_state and gives no final one (return_state); use backend={keeping}"
        if why is None and turns and not backend.turns_cells:
            turning = " or ".join(repr(b.name) for b in _BACKENDS if b.turns_cells)
            return f"it moves no cells between outer steps (turns); use backend={turning}"
        return why

    return {b.name: why_not(b) for b in _BACKENDS}


def choose(
    name: str, model: EqROperator, precision: Precision, *, states: bool = False, turns: bool = False
) -> tuple[Backend, str]:
    """The backend for `model` and the reason for it.

    Args:
        name: a backend, or "auto": the environment variable EQR_BACKEND where it is set, else the fastest that can run.
        states, turns: see `available`.

    Raises:
        ValueError: no such backend.
        RuntimeError: the named backend cannot run here; the message says why and what to do.
    """
    request = f"backend={name!r}"
    preferred = os.environ.get("EQR_BACKEND") or "auto"
    if name == "auto" and preferred != "auto":
        name = preferred
        request = f"EQR_BACKEND={name!r}"
    # Looked at once: it takes as long as the rest of a choice.
    modified = modification(model)
    reasons = _reasons(model, precision, states, turns, modified)
    if name == "auto":
        for backend in _BACKENDS:
            if reasons[backend.name] is None:
                # What makes it run through its modules is told once, not by every kernel.
                others = {} if modified else reasons
                passed = [f"{other}: {why}" for other, why in others.items() if why]
                return backend, "; ".join([f"auto chose {backend.name}: {backend.describe(model, precision)}", *passed])
        listed = "; ".join(f"{other}: {why}" for other, why in reasons.items())
        raise RuntimeError(f"{request} finds no backend that can run here: {listed}")
    if name not in reasons:
        raise ValueError(f"{request} is not a backend; known: auto, {', '.join(reasons)}")
    if reasons[name] is not None:
        usable = [other for other, why in reasons.items() if why is None]
        raise RuntimeError(f"{request} cannot run here: {reasons[name]}; can run: {', '.join(usable) or 'none'}")
    backend = next(b for b in _BACKENDS if b.name == name)
    return backend, f"{request}: {backend.describe(model, precision)}"
