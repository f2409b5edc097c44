"""How good a model is: exact accuracy by depth and breadth, how sure that is, what becomes of its trajectories, why
scaling does not help, and the loosest tolerance that costs no accuracy.

Everything here returns numbers and prints nothing. Arrays are NumPy: N puzzles, S tokens, K depths, L breadths, R rules
of selection, B trajectories a puzzle.
"""

from eqr_kernels.evaluation.advice import Finding, advise
from eqr_kernels.evaluation.agreement import Agreement, agreement, answer_codes
from eqr_kernels.evaluation.attractors import BROAD, MODES, Diagnosis, diagnose
from eqr_kernels.evaluation.convergence import (
    KINDS,
    answer_periods,
    contraction_rates,
    plateau,
    residual_periods,
    tail_depths,
    trajectory_kinds,
)
from eqr_kernels.evaluation.coupling import Coupling, auroc, couple, spearman
from eqr_kernels.evaluation.paired import Paired, mcnemar, pair, tango_interval
from eqr_kernels.evaluation.probing import Probe, doubling_depths, noise_floor, probe, provisional_tolerance
from eqr_kernels.evaluation.running import CHUNK, RULES, Evaluation, Trajectories, evaluate, trajectories
from eqr_kernels.evaluation.scaling import Convergence, Quartiles, Scaling, Trend, quartiles, summarise
from eqr_kernels.evaluation.scoring import (
    RATING_BANDS,
    Accuracy,
    by_group,
    exact_match,
    rating_bands,
    token_accuracy,
    wilson_interval,
)
from eqr_kernels.evaluation.subset import SUBSET_SEED, digest, stratified_subset
from eqr_kernels.evaluation.tolerance import Calibration, Tolerance, calibrate, first_converged, tolerance_grid
from eqr_kernels.evaluation.types import Bools, Floats, Ints, Progress

__all__ = [
    "BROAD",
    "CHUNK",
    "KINDS",
    "MODES",
    "RATING_BANDS",
    "RULES",
    "SUBSET_SEED",
    "Accuracy",
    "Agreement",
    "Bools",
    "Calibration",
    "Convergence",
    "Coupling",
    "Diagnosis",
    "Evaluation",
    "Finding",
    "Floats",
    "Ints",
    "Paired",
    "Probe",
    "Progress",
    "Quartiles",
    "Scaling",
    "Tolerance",
    "Trajectories",
    "Trend",
    "advise",
    "agreement",
    "answer_codes",
    "answer_periods",
    "auroc",
    "by_group",
    "calibrate",
    "contraction_rates",
    "couple",
    "diagnose",
    "digest",
    "doubling_depths",
    "evaluate",
    "exact_match",
    "first_converged",
    "mcnemar",
    "noise_floor",
    "pair",
    "plateau",
    "probe",
    "provisional_tolerance",
    "quartiles",
    "rating_bands",
    "residual_periods",
    "spearman",
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
