"""Which noise to inject at inference: the trained one, unless another answers more puzzles than chance would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import ANY, correct_grid
from eqr_kernels.studies.statistics import mcnemar
from eqr_kernels.studies.types import Bools

LEVEL = 0.05
"""Chance, over all that are compared, of taking another noise than the trained one although it is no better."""


@dataclass(frozen=True)
class NoiseTrial:
    """What the puzzles came to under one noise.

    Attributes:
        noise_scale: that was injected.
        right: puzzles whose selected trajectory ended right. any: those of which some trajectory did.
        single: share of all trajectories that ended right.
        gained, lost: puzzles that are right here and not with the trained noise, and the other way round.
        chance: of a difference as great or greater between two noises that are equally good, see `mcnemar`.
    """

    noise_scale: float
    right: int
    any: int
    single: float
    gained: int
    lost: int
    chance: float


@dataclass(frozen=True)
class NoiseChoice:
    """The trials, by rising noise, and the noise that was chosen."""

    trials: tuple[NoiseTrial, ...]
    chosen: float


def choose_noise(recordings: Mapping[float, Recording], trained: float, select: str = "residual") -> NoiseChoice:
    """The noise that answers most puzzles, if by more than chance, at the full depth and breadth.

    Each is compared with the trained noise on the same puzzles, and taken only where `chance` is below `LEVEL` shared
    among all that are compared. The smallest of those that are equally good is taken.

    Args:
        recordings: by their noise, of the same puzzles with the same starts, without halting; that of `trained` too.
        trained: the noise that the model was trained with.
        select: how one of a puzzle's trajectories is chosen, see `correct_grid`.

    Raises:
        ValueError: no recording of the trained noise, or `select` is no rule.
    """
    if trained not in recordings:
        raise ValueError(f"recordings must have the trained noise {trained:g}, got {sorted(recordings)}")

    known, trials = recordings[trained].labelled, []

    def ends(recording: Recording, rule: str) -> Bools:
        grid = correct_grid(recording, [recording.depth], [recording.breadth], (rule,))
        return np.asarray(grid[known, 0, 0, 0])

    reference = ends(recordings[trained], select)
    for scale, recording in sorted(recordings.items()):
        right = ends(recording, select)
        gained, lost = int((right & ~reference).sum()), int((reference & ~right).sum())
        trials.append(
            NoiseTrial(
                noise_scale=scale,
                right=int(right.sum()),
                any=int(ends(recording, ANY).sum()),
                single=float(recording.correct[known, :, -1].mean()),
                gained=gained,
                lost=lost,
                chance=mcnemar(gained, lost),
            )
        )
    share = LEVEL / max(1, len(trials) - 1)
    better = [t for t in trials if t.gained > t.lost and t.chance < share]
    best = max(better, key=lambda t: (t.right, -t.noise_scale), default=None)
    return NoiseChoice(tuple(trials), trained if best is None else best.noise_scale)
