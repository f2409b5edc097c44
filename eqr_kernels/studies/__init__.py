"""What depth, breadth and early exit buy and cost: every study of a model, on trajectories that are recorded once.

`recording` runs the model and nothing else here does, but for `costs` and `checking`, which time it. `replay` is how a
recording answers under another depth, breadth, halting rule or rule of selection; the studies are built on these two:
`dynamics`, `attractors`, `agreement`, `coupling`, `scaling` and `advice` (`eqr diagnose`), `tolerance` and
`noise_choice` (`eqr calibrate`), `points` and `front` (`eqr curve`). `scoring` and `statistics` count.

Everything here returns numbers and prints nothing. Arrays are NumPy: N puzzles, S tokens, K depths, L breadths, R rules
of selection, B trajectories a puzzle, D outer steps. A trajectory is correct when its answer is the given one in every
labelled token, and has settled when its halting rule has fired (see `replay.settled`).
"""

from eqr_kernels.studies.advice import Finding, advise
from eqr_kernels.studies.costs import Price, UnitCosts, measure_costs
from eqr_kernels.studies.front import knee, pareto, recommend
from eqr_kernels.studies.noise_choice import NoiseChoice, NoiseRun, NoiseTrial, choose_noise
from eqr_kernels.studies.points import Point, bend, map_points
from eqr_kernels.studies.recording import Recording, record, recordable_depths
from eqr_kernels.studies.replay import Policy, correct_grid, outcome, policies
from eqr_kernels.studies.scaling import Scaling, recorded_depths, summarise
from eqr_kernels.studies.scoring import Accuracy, exact_match, token_accuracy
from eqr_kernels.studies.store import Store
from eqr_kernels.studies.subset import digest, stratified_subset
from eqr_kernels.studies.tolerance import TRUST, Calibration, calibrate, check_shares

__all__ = [
    "TRUST",
    "Accuracy",
    "Calibration",
    "Finding",
    "NoiseChoice",
    "NoiseRun",
    "NoiseTrial",
    "Point",
    "Policy",
    "Price",
    "Recording",
    "Scaling",
    "Store",
    "UnitCosts",
    "advise",
    "bend",
    "calibrate",
    "check_shares",
    "choose_noise",
    "correct_grid",
    "digest",
    "exact_match",
    "knee",
    "map_points",
    "measure_costs",
    "outcome",
    "pareto",
    "policies",
    "recommend",
    "record",
    "recordable_depths",
    "recorded_depths",
    "stratified_subset",
    "summarise",
    "token_accuracy",
]
