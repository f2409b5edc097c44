"""What depth, breadth and early exit buy and cost: every study of a model, on trajectories that are recorded once.

Everything here returns numbers and prints nothing. Arrays are NumPy: N puzzles, S tokens, K depths, L breadths, R rules
of selection, B trajectories a puzzle, D outer steps.
"""

from eqr_kernels.studies.accuracy import CHUNK, RULES, Evaluation, Trajectories, evaluate, trajectories
from eqr_kernels.studies.advice import Finding, advise
from eqr_kernels.studies.agreement import Agreement, agreement, answer_codes
from eqr_kernels.studies.attractors import BROAD, MODES, Diagnosis, diagnose
from eqr_kernels.studies.checking import Checked, check
from eqr_kernels.studies.costs import Energy, Latency, Memory, Price, UnitCosts, measure_costs
from eqr_kernels.studies.coupling import Coupling, auroc, couple, spearman
from eqr_kernels.studies.dynamics import (
    KINDS,
    answer_periods,
    contraction_rates,
    plateau,
    residual_periods,
    tail_depths,
    trajectory_kinds,
)
from eqr_kernels.studies.front import knee, pareto, recommend
from eqr_kernels.studies.paired import Paired, mcnemar, pair, tango_interval
from eqr_kernels.studies.points import WITHIN_POINTS, Bend, Point, Saving, bend, points, savings, steps_to_settle
from eqr_kernels.studies.policies import POLICIES, Outcome, Policy, grid, outcome
from eqr_kernels.studies.probing import Probe, doubling_depths, noise_floor, probe, provisional_tolerance
from eqr_kernels.studies.recording import Records, chunk_size, record
from eqr_kernels.studies.scaling import Convergence, Quartiles, Scaling, Trend, quartiles, summarise
from eqr_kernels.studies.scoring import (
    RATING_BANDS,
    Accuracy,
    by_group,
    exact_match,
    rating_bands,
    token_accuracy,
    wilson_interval,
)
from eqr_kernels.studies.store import Store
from eqr_kernels.studies.subset import SUBSET_SEED, digest, stratified_subset
from eqr_kernels.studies.tolerance import Calibration, Tolerance, calibrate, first_converged, tolerance_grid
from eqr_kernels.studies.types import Bools, Floats, Ints, Progress

__all__ = [
    "Accuracy",
    "Agreement",
    "BROAD",
    "Bend",
    "Bools",
    "CHUNK",
    "Calibration",
    "Checked",
    "Convergence",
    "Coupling",
    "Diagnosis",
    "Energy",
    "Evaluation",
    "Finding",
    "Floats",
    "Ints",
    "KINDS",
    "Latency",
    "MODES",
    "Memory",
    "Outcome",
    "POLICIES",
    "Paired",
    "Point",
    "Policy",
    "Price",
    "Probe",
    "Progress",
    "Quartiles",
    "RATING_BANDS",
    "RULES",
    "Records",
    "SUBSET_SEED",
    "Saving",
    "Scaling",
    "Store",
    "Tolerance",
    "Trajectories",
    "Trend",
    "UnitCosts",
    "WITHIN_POINTS",
    "advise",
    "agreement",
    "answer_codes",
    "answer_periods",
    "auroc",
    "bend",
    "by_group",
    "calibrate",
    "check",
    "chunk_size",
    "contraction_rates",
    "couple",
    "diagnose",
    "digest",
    "doubling_depths",
    "evaluate",
    "exact_match",
    "first_converged",
    "grid",
    "knee",
    "mcnemar",
    "measure_costs",
    "noise_floor",
    "outcome",
    "pair",
    "pareto",
    "plateau",
    "points",
    "probe",
    "provisional_tolerance",
    "quartiles",
    "rating_bands",
    "recommend",
    "record",
    "residual_periods",
    "savings",
    "spearman",
    "steps_to_settle",
    "stratified_subset",
    "summarise",
    "tail_depths",
    "tango_interval",
    "token_accuracy",
    "tolerance_grid",
    "trajectories",
    "trajectory_kinds",
    "wilson_interval",
]
