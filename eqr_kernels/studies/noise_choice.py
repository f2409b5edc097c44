"""Which noise to inject at inference: the trained one, unless another answers more puzzles than chance explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eqr_kernels.studies.advice import SIGNIFICANT
from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import ANY, correct_grid
from eqr_kernels.studies.statistics import Paired, pair
from eqr_kernels.studies.types import Bools


@dataclass(frozen=True)
class NoiseRun:
    """How the labelled puzzles ended at the full depth under one noise.

    Attributes:
        selected, any, first: bool [M], the answer that the rule selects is right, that of some trajectory, and that of
            the first.
        single: share of all trajectories that ended right.
    """

    selected: Bools
    any: Bools
    first: Bools
    single: float

    @classmethod
    def of(cls, recording: Recording, select: str) -> NoiseRun:
        """Of a recording without halting; select: how one of a puzzle's trajectories is chosen, see `correct_grid`."""
        known = recording.labelled
        grid = correct_grid(recording, [recording.depth], [recording.breadth], (select, ANY))[known, 0, 0]
        right = recording.correct[known, :, -1]
        return cls(grid[:, 0], grid[:, 1], right[:, 0], float(right.mean()))


@dataclass(frozen=True)
class NoiseTrial:
    """What the puzzles came to under one noise.

    Attributes:
        noise_scale: that was injected.
        selected, any, first: puzzles that are right, see `NoiseRun`. single: see there.
        by_selected, by_first: against the trained noise.
    """

    noise_scale: float
    selected: int
    any: int
    first: int
    single: float
    by_selected: Paired
    by_first: Paired


@dataclass(frozen=True)
class NoiseChoice:
    """The trials, by rising noise; the noise that was trained, and the one that was chosen."""

    trials: tuple[NoiseTrial, ...]
    trained: float
    chosen: float


def choose_noise(runs: Mapping[float, NoiseRun], trained: float) -> NoiseChoice:
    """The noise whose selected answers are right most often, if that is more than chance.

    Each is compared with the trained noise on the same puzzles, and can be chosen only where McNemar's exact p is at
    most `SIGNIFICANT`, shared among all that are compared, and where the first trajectories, which are the answers at
    breadth 1, gain at least as many as they lose. The smallest of those that are equally good is chosen.

    Args:
        runs: by their noise, of the same puzzles with the same starts; that of `trained` too.
        trained: the noise that the model was trained with.

    Raises:
        ValueError: no run of the trained noise, or runs of different numbers of puzzles.
    """
    if trained not in runs:
        raise ValueError(f"runs must have the trained noise {trained:g}, got {sorted(runs)}; run that as well")
    before = runs[trained]
    trials = []
    for scale, run in sorted(runs.items()):
        if len(run.first) != len(before.first):
            raise ValueError(
                f"runs must be of the same puzzles, got {len(run.first)} with noise {scale:g} and {len(before.first)} "
                f"with the trained {trained:g}; run all of them with both"
            )
        selected, any_, first = (int(right.sum()) for right in (run.selected, run.any, run.first))
        against = pair(before.selected, run.selected), pair(before.first, run.first)
        trials.append(NoiseTrial(scale, selected, any_, first, run.single, *against))
    level = SIGNIFICANT / max(1, len(trials) - 1)
    better = [t for t in trials if t.by_selected.net > 0 and t.by_selected.p <= level and t.by_first.net >= 0]
    best = max(better, key=lambda t: (t.selected, -t.noise_scale), default=None)
    return NoiseChoice(tuple(trials), trained, trained if best is None else best.noise_scale)
