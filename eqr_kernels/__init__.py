"""Fixed-point iteration for Equilibrium Reasoners: deeper and broader, and stopping when a row has settled."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eqr_kernels.checkpoint import ModelCard
    from eqr_kernels.config import EqRConfig
    from eqr_kernels.implicit import FixedPoint
    from eqr_kernels.iteration import FixedPointResult, fixed_point
    from eqr_kernels.modules import LatentState
    from eqr_kernels.reasoner import EquilibriumReasoner
    from eqr_kernels.results import Recorded, SolveResult
    from eqr_kernels.serving import (
        DeadlineExceeded,
        Engine,
        EngineClosed,
        EngineStats,
        QueueFull,
        StepUpdate,
    )
    from eqr_kernels.solver import solve
    from eqr_kernels.tasks.views import Turns
    from eqr_kernels.trajectory import FinishedTrajectory, Status
    from eqr_kernels.views import solve_views

__version__ = "0.1.0"
__all__ = [
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "EqRConfig",
    "EquilibriumReasoner",
    "FinishedTrajectory",
    "FixedPoint",
    "FixedPointResult",
    "LatentState",
    "ModelCard",
    "QueueFull",
    "Recorded",
    "SolveResult",
    "Status",
    "StepUpdate",
    "Turns",
    "fixed_point",
    "solve",
    "solve_views",
]

_HOMES = {
    "DeadlineExceeded": "serving",
    "Engine": "serving",
    "EngineClosed": "serving",
    "EngineStats": "serving",
    "EqRConfig": "config",
    "EquilibriumReasoner": "reasoner",
    "LatentState": "modules",
    "ModelCard": "checkpoint",
    "FinishedTrajectory": "trajectory",
    "FixedPoint": "implicit",
    "FixedPointResult": "iteration",
    "QueueFull": "serving",
    "Recorded": "results",
    "SolveResult": "results",
    "Status": "trajectory",
    "StepUpdate": "serving",
    "Turns": "tasks.views",
    "fixed_point": "iteration",
    "solve": "solver",
    "solve_views": "views",
}


# Names are imported when they are first asked for: `eqr --help` then costs no import of torch.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eqr_kernels' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"eqr_kernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
