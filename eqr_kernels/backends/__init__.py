"""The registry of backends: which there are, which can run a model here, and why another cannot."""

from __future__ import annotations

import os

from eqr_kernels.backends.base import Backend, FixedPointProblem, Recorder
from eqr_kernels.backends.cpu import CpuBackend
from eqr_kernels.backends.cuda import CudaBackend
from eqr_kernels.backends.reference import ReferenceBackend
from eqr_kernels.backends.triton.adapter import TritonBackend
from eqr_kernels.modules import EqROperator
from eqr_kernels.precision import Precision
from eqr_kernels.trajectory import Snapshot, Status

__all__ = ["Backend", "FixedPointProblem", "Recorder", "Snapshot", "Status", "available", "choose"]

# In the order in which "auto" prefers them.
_BACKENDS: tuple[Backend, ...] = (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())


def available(model: EqROperator, precision: Precision) -> dict[str, str | None]:
    """Every backend's name, with None where it can run `model` in `precision`, else the reason why not."""
    return {b.name: b.why_not(model, precision) for b in _BACKENDS}


def choose(name: str, model: EqROperator, precision: Precision) -> tuple[Backend, str]:
    """The backend for `model` and the reason for it.

    Args:
        name: a backend, or "auto": the environment variable EQR_BACKEND where it is set, else the fastest that can run.

    Raises:
        ValueError: no such backend.
        RuntimeError: the named backend cannot run here; the message says why and what to do.
    """
    request = f"backend={name!r}"
    preferred = os.environ.get("EQR_BACKEND") or "auto"
    if name == "auto" and preferred != "auto":
        name = preferred
        request = f"EQR_BACKEND={name!r}"
    reasons = available(model, precision)
    if name == "auto":
        for backend in _BACKENDS:
            if reasons[backend.name] is None:
                passed = [f"{other}: {why}" for other, why in reasons.items() if why]
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
