"""How good a model is: exact accuracy by depth and breadth, how sure that is, what becomes of its trajectories, and the
loosest tolerance that costs no accuracy.

Everything here returns numbers and prints nothing. Arrays are NumPy: N puzzles, S tokens, K depths, L breadths, R rules
of selection, B trajectories a puzzle.
"""

from eqr_kernels.evaluation.attractors import BROAD, MODES, Diagnosis, diagnose
from eqr_kernels.evaluation.coupling import Coupling, auroc, couple, spearman
from eqr_kernels.evaluation.running import CHUNK, RULES, Evaluation, Trajectories, evaluate, trajectories
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
    "MODES",
    "RATING_BANDS",
    "RULES",
    "SUBSET_SEED",
    "Accuracy",
    "Bools",
    "Calibration",
    "Coupling",
    "Diagnosis",
    "Evaluation",
    "Floats",
    "Ints",
    "Progress",
    "Tolerance",
    "Trajectories",
    "auroc",
    "by_group",
    "calibrate",
    "couple",
    "diagnose",
    "digest",
    "evaluate",
    "exact_match",
    "first_converged",
    "rating_bands",
    "spearman",
    "stratified_subset",
    "token_accuracy",
    "tolerance_grid",
    "trajectories",
    "wilson_interval",
]
