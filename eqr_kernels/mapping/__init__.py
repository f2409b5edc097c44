"""The map of a model: what depth, breadth and early exit cost, what they buy, and where the curve bends.

One run without halting to the greatest depth and breadth holds every shallower, narrower and earlier-stopped one, as a
trajectory depends on its puzzle, seed and restart alone. So `record` runs once, `outcome` replays any way of stopping
and selecting on what was recorded, `UnitCosts` says what an outer step costs on this machine, and `points` puts the two
together. Everything here returns numbers and prints nothing. Arrays are NumPy: N puzzles, B trajectories of each, D
outer steps.
"""

from eqr_kernels.mapping.checking import Checked, check
from eqr_kernels.mapping.costs import Energy, Latency, Memory, Price, UnitCosts, measure_costs
from eqr_kernels.mapping.front import knee, pareto, recommend
from eqr_kernels.mapping.points import WITHIN_POINTS, Bend, Point, Saving, bend, points, savings, steps_to_settle
from eqr_kernels.mapping.policies import POLICIES, Outcome, Policy, grid, outcome
from eqr_kernels.mapping.records import Records, chunk_size, record
from eqr_kernels.mapping.store import Store

__all__ = [
    "POLICIES",
    "WITHIN_POINTS",
    "Bend",
    "Checked",
    "Energy",
    "Latency",
    "Memory",
    "Outcome",
    "Point",
    "Policy",
    "Price",
    "Records",
    "Saving",
    "Store",
    "UnitCosts",
    "bend",
    "check",
    "chunk_size",
    "grid",
    "knee",
    "measure_costs",
    "outcome",
    "pareto",
    "points",
    "recommend",
    "record",
    "savings",
    "steps_to_settle",
]
