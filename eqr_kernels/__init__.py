"""Fixed-point iteration for Equilibrium Reasoners: deeper and broader, and stopping when a row has settled."""

from eqr_kernels.backends import Status
from eqr_kernels.config import EqRConfig
from eqr_kernels.modules import EquilibriumReasoner, LatentState
from eqr_kernels.solve import Recorded, SolveResult, solve

__all__ = ["EqRConfig", "EquilibriumReasoner", "LatentState", "Recorded", "SolveResult", "Status", "solve"]
__version__ = "0.1.0"
