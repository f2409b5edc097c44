"""One run without halting, and what is kept of it to tell why more depth or breadth does not help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.solver import SolveResult
from eqr_kernels.studies import dynamics as convergence
from eqr_kernels.studies.accuracy import Evaluation, evaluate
from eqr_kernels.studies.agreement import Codes, answer_codes
from eqr_kernels.studies.tolerance import first_converged
from eqr_kernels.studies.types import Bools, Ints, Progress
from eqr_kernels.trajectory import Status

ASKED = ("residual", "vote", "q", "any")
NOISE_MULTIPLE = 2.0


def noise_floor(noise_scale: float) -> float:
    """The residual that the injected noise leaves, about: sqrt(2) noise_scale.

    Independent noise in the two states of a difference, relative to states whose components have a mean square of 1.
    """
    return math.sqrt(2) * noise_scale


def provisional_tolerance(noise_scale: float) -> float:
    """A tolerance where none was calibrated: `NOISE_MULTIPLE` times `noise_floor`.

    Raises:
        ValueError: there is no noise, so nothing to take it from.
    """
    if not noise_scale > 0:
        raise ValueError(
            "nothing tells when a trajectory has settled: no --tol, no tolerance in the model's card, and no noise "
            "whose floor could stand in for it; give --tol, or find one with `eqr calibrate` (--write stores it)"
        )
    return NOISE_MULTIPLE * noise_floor(noise_scale)


@dataclass(frozen=True)
class Probe:
    """N puzzles, B trajectories each, run to depth D without halting.

    Attributes:
        evaluation: accuracy at `depths`, breadths 1 and B, by the rules `ASKED`; residuals and steps to `tol`.
        tol: residual that counts as settled.
        noise_scale: that was injected.
        kind: [N, B], of `convergence.KINDS`; period: int64 [N, B], of those that cycle, else 0.
        level: float64 [N, B], where the residual came to rest, see `convergence.plateau`.
        rate: float64 [N, B], see `convergence.contraction_rates`.
        codes: uint64 [N, B], of the last answers, see `answer_codes`.
        unsteady: bool [N, B], settled, but the answer changed after the tolerance was met.
    """

    evaluation: Evaluation
    tol: float
    noise_scale: float
    kind: npt.NDArray[np.str_]
    period: Ints
    level: npt.NDArray[np.float64]
    rate: npt.NDArray[np.float64]
    codes: Codes
    unsteady: Bools


def doubling_depths(depth: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the depth, half of it (rounded down), and the depth."""
    return tuple(sorted({*(1 << k for k in range(depth.bit_length())), max(1, depth // 2), depth}))


def probe(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depth: int,
    breadth: int,
    tol: float,
    noise_scale: float,
    chunk: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Probe:
    """Runs every trajectory to the full depth, and keeps of each what the diagnosis needs.

    Residuals of all steps and answers of the last ones are looked at a chunk of puzzles at a time and dropped: what is
    kept grows with N, B and log D.

    Args:
        inputs, labels: integers [N, S]; a label of 0 is not scored.
        chunk: puzzles in memory at a time, by default what takes some 256 MB; it changes nothing.
        options: further arguments of `solve` (window, seed, slots, backend, precision).

    Raises:
        As `evaluate`; ValueError: depth or breadth is below 1.
    """
    if depth < 1 or breadth < 1:
        raise ValueError(f"depth and breadth must be at least 1, got {depth} and {breadth}")
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    tail = convergence.tail_depths(depth)

    def observe(_labels: npt.NDArray[np.integer], result: SolveResult) -> None:
        parts.append(_observed(result, tail, tol, noise_scale))

    found = evaluate(
        model,
        inputs,
        labels,
        depths=doubling_depths(depth),
        breadth=sorted({1, breadth}),
        select=ASKED,
        tol=tol,
        noise_scale=noise_scale,
        chunk=chunk,
        progress=progress,
        record=tail,
        observe=observe,
        **options,
    )
    fields = [np.concatenate(field) for field in zip(*parts, strict=True)]
    return Probe(found, tol, noise_scale, *fields)


def _observed(result: SolveResult, tail: Sequence[int], tol: float, noise_scale: float) -> tuple[npt.NDArray[Any], ...]:
    """kind, period, level, rate, codes and unsteady [n, B] of a chunk."""
    assert result.residuals is not None
    r = result.residuals.cpu().numpy()  # [n, B, D]
    shape, flat = r.shape[:2], r.reshape(-1, r.shape[2])
    codes = np.stack([answer_codes(result.at[k].all_preds.cpu().numpy()).reshape(-1) for k in tail], 1)  # [T, W]
    diverged = (result.all_status == Status.DIVERGED).cpu().numpy().reshape(-1)
    settled = ~diverged & (result.all_residual.cpu().numpy().reshape(-1) <= np.float32(tol))
    kind, period = convergence.trajectory_kinds(flat, codes, settled, diverged)
    level = convergence.plateau(flat)
    # Without noise a trajectory may contract all the way down, and has no floor until it rests.
    floor = np.where(np.isnan(level) & (noise_scale == 0), 0.0, level)
    rate = np.where(settled, convergence.contraction_rates(flat, floor), np.nan)
    met = first_converged(flat, tol)[0]
    changed = ((codes != codes[:, -1:]) & (np.asarray(tail) >= met[:, None])).any(1)
    fields = (kind, period, level, rate, codes[:, -1], settled & changed)
    return tuple(field.reshape(shape) for field in fields)
