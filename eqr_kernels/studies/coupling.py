"""Whether a small residual means a right answer: rank statistics, with no assumption on how residuals are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.statistics import auroc, spearman


@dataclass(frozen=True)
class Coupling:
    """How far residual and score tell right from wrong among the trajectories at one depth.

    Attributes:
        depth: outer steps.
        trajectories: how many were compared; right: those of them whose answer is right in every labelled token.
        diverged: those that are ranked last, whatever their residual and score.
        residual_auroc, score_auroc: see `auroc`; NaN where all or none are right.
        residual_spearman, score_spearman: rank correlation with the share of a trajectory's labelled tokens (givens
            included) that are right; -1 where less residual always means more of them. NaN where either is constant.
    """

    depth: int
    trajectories: int
    right: int
    diverged: int
    residual_auroc: float
    residual_spearman: float
    score_auroc: float
    score_spearman: float


def couple(recording: Recording, depth: int) -> Coupling:
    """The coupling over all trajectories of all labelled puzzles at a recorded depth; a NaN ranks last."""
    at, counted = recording.place(depth), recording.labelled

    def every(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values[counted, :, at].reshape(-1)

    lost, correct, share = every(recording.diverged), every(recording.correct), every(recording.accuracy)
    measured: list[float] = []
    for values in (recording.residual, recording.score):
        cost = every(values)
        cost = np.where(lost | np.isnan(cost), np.inf, cost)
        measured += [auroc(cost, correct), spearman(cost, share)]
    return Coupling(depth, len(correct), int(correct.sum()), int(lost.sum()), *measured)
