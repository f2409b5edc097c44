"""What the residuals and answers of a trajectory say of its dynamics: its floor, its contraction rate, and its kind.

Noise is drawn anew at each step and has thousands of components, so it is all but orthogonal to the motion and adds to
it in quadrature: r_k^2 = m_k^2 + f^2, with m_k the residual of the motion alone and f the floor that the noise leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import first_converged, settled
from eqr_kernels.studies.types import Bools, Doubles, Ints

KINDS = {
    "settled": "the residual is at most the tolerance at the full depth",
    "decaying": "above it, and the residual still falls",
    "growing": "above it, and the residual rises",
    "cycling": "above it, and the answers or the residuals repeat with a period of 2 steps or more",
    "steady": "above it, with an even residual and one answer: at a floor of its own",
    "wandering": "above it: the residual neither falls nor evens out",
    "diverged": "the state became non-finite",
    "undecided": "above it, in too few steps to tell more",
}
"""What becomes of a trajectory; each is of one kind."""

LEAST_DEPTH = 16
"""Fewest steps from which anything but settled and diverged is told: quarters of 4 steps."""

TREND = 1.5
"""How many times the median residual changes from a run's second quarter to its last, at least, to rise or fall."""

EVEN = 0.1
"""Greatest spread (interquartile range over median) of the residual in a run's last quarter that is a plateau."""

PERIODIC = 0.1
"""Greatest mean square of r_{k+p} - r_k, over that of independent r, that counts as repeating after p steps."""

_ABOVE_FLOOR = 1.1
_LEAST_DROP = 2.0
_LEAST_POINTS = 3
_LEAST_SWING = 0.05
_LONGEST_TAIL = 32


def doubling_depths(depth: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the depth, half of it (rounded down), and the depth."""
    return tuple(sorted({*(1 << k for k in range(depth.bit_length())), max(1, depth // 2), depth}))


def tail_depths(depth: int) -> range:
    """The last depths of a run, half of it or 32 at most: those at which all answers are wanted to see a cycle."""
    return range(depth - max(1, min(depth // 2, _LONGEST_TAIL)) + 1, depth + 1)


def plateau(residuals: npt.ArrayLike) -> Doubles:
    """The level at which each residual has come to rest: [T, D] -> float64 [T], NaN where it has not.

    That is the median of the last quarter, if its spread is at most `EVEN` and the median of the quarter before is
    within `EVEN` of it. NaN in runs of fewer than `LEAST_DEPTH` steps.
    """
    r = _trace(residuals)
    depth, quarter = r.shape[1], r.shape[1] // 4
    if depth < LEAST_DEPTH:
        return np.full(len(r), np.nan)
    before, last = r[:, -2 * quarter : -quarter], r[:, -quarter:]
    with np.errstate(invalid="ignore"):
        low, level, high = np.quantile(last, (0.25, 0.5, 0.75), axis=1)
        rests = (high - low <= EVEN * level) & (np.abs(np.median(before, 1) - level) <= EVEN * level)
    return np.where(rests, level, np.nan)


def contraction_rates(residuals: npt.ArrayLike, floor: npt.ArrayLike) -> Doubles:
    """By what factor the motion shrinks in a step while a trajectory comes to rest: [T, D], [T] -> float64 [T].

    The slope of log m_k over k by least squares, m_k = sqrt(r_k^2 - f^2), exponentiated. It is fitted to the decaying
    part: the run of falling residuals that ends where r first comes within 10 % of the floor f (at the end of the run
    where f is 0 or r does not get there). NaN where that part has fewer than 3 steps, falls by less than half, or f is
    NaN. Where the motion has several rates, this is their mean in the log over that part, not the slowest.

    Args:
        residuals: [T, D], NaN after a trajectory diverged.
        floor: [T], of each trajectory, 0 for none and NaN for unknown.

    Raises:
        ValueError: the shapes do not fit.
    """
    r, f = _trace(residuals), np.asarray(floor, np.float64)
    if f.shape != r.shape[:1]:
        raise ValueError(f"floor must be [T] = [{len(r)}], got shape {f.shape}")
    step = np.arange(r.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        usable = np.isfinite(r) & (r > 0) & (r > _ABOVE_FLOOR * f[:, None])
        end = np.where(usable.all(1), r.shape[1], np.argmin(usable, 1))  # the first step that is not
        rises = np.zeros(r.shape, bool)
        rises[:, 1:] = ~(r[:, 1:] < r[:, :-1])
        start = np.where(rises & (step < end[:, None]), step, 0).max(1)
        part = (step >= start[:, None]) & (step < end[:, None])
        motion = np.where(part, 0.5 * np.log(np.square(r) - np.square(f)[:, None]), 0.0)
        count = part.sum(1)
        middle = (step * part).sum(1) / count
        away = np.where(part, step - middle[:, None], 0.0)
        slope = (away * motion).sum(1) / np.square(away).sum(1)
        rows = np.arange(len(r))
        drop = r[rows, np.minimum(start, r.shape[1] - 1)] / r[rows, np.maximum(end - 1, 0)]
    shown = (count >= _LEAST_POINTS) & (drop >= _LEAST_DROP) & np.isfinite(f)
    rates: Doubles = np.where(shown, np.exp(np.where(shown, slope, 0.0)), np.nan)
    return rates


def answer_periods(codes: npt.ArrayLike) -> Ints:
    """After how many steps answers repeat: codes of the answers at W consecutive depths [T, W] -> int64 [T].

    The least p up to W / 2 with the answer p steps later the same throughout: 1 for one answer, 0 for no period.
    """
    answers = np.asarray(codes)
    period = np.zeros(len(answers), np.int64)
    for p in range(1, answers.shape[1] // 2 + 1):
        repeats = (answers[:, p:] == answers[:, :-p]).all(1)
        period = np.where((period == 0) & repeats, p, period)
    return period


def residual_periods(residuals: npt.ArrayLike) -> Ints:
    """After how many steps residuals repeat: W consecutive ones [T, W] -> int64 [T].

    The least p of 2 to W / 3 for which the mean of (r_{k+p} - r_k)^2 is at most `PERIODIC` times 2 var(r), what it is
    for independent r, while neighbours differ by three times as much at least; 0 for no period, and where the standard
    deviation of r is below 5 % of its mean, as noise makes it.
    """
    r = _trace(residuals)
    period = np.zeros(len(r), np.int64)
    if r.shape[1] < 6:
        return period
    with np.errstate(invalid="ignore", over="ignore"):
        twice = 2 * r.var(1)
        swings = r.std(1) > _LEAST_SWING * r.mean(1)
        next_ = np.square(r[:, 1:] - r[:, :-1]).mean(1)
        for p in range(2, r.shape[1] // 3 + 1):
            apart = np.square(r[:, p:] - r[:, :-p]).mean(1)
            repeats = swings & (apart <= PERIODIC * twice) & (next_ >= 3 * apart)
            period = np.where((period == 0) & repeats, p, period)
    return period


def trajectory_kinds(
    residuals: npt.ArrayLike, codes: npt.ArrayLike, settled: npt.ArrayLike, diverged: npt.ArrayLike
) -> tuple[npt.NDArray[np.str_], Ints]:
    """The kind of each trajectory, of `KINDS` [T], and the period of those that cycle, int64 [T], else 0.

    The first that holds of: diverged; settled; decaying or growing (the medians of the second, third and last quarter
    fall or rise, by `TREND` in all); cycling (over the last W depths `answer_periods`, or with one answer
    `residual_periods`); steady (`plateau`, with one answer throughout the last quarter); wandering.

    Args:
        residuals: [T, D]; codes: [T, W], see `answer_codes`, at the last W depths (`tail_depths`).
        settled, diverged: bool [T], at the full depth.

    Raises:
        ValueError: the shapes do not fit.
    """
    r, answers = _trace(residuals), np.asarray(codes)
    still, lost = np.asarray(settled, bool), np.asarray(diverged, bool)
    depth, quarter = r.shape[1], r.shape[1] // 4
    if answers.ndim != 2 or not len(answers) == len(still) == len(lost) == len(r) or not 1 <= answers.shape[1] <= depth:
        raise ValueError(
            f"residuals must be [T, D], codes [T, 1 <= W <= D], settled and diverged [T], got shapes {r.shape}, "
            f"{answers.shape}, {still.shape} and {lost.shape}"
        )
    if depth < LEAST_DEPTH:
        kind = np.select([lost, still], ["diverged", "settled"], "undecided")
        return kind, np.zeros(len(r), np.int64)
    second, third, last = (np.median(r[:, depth - k * quarter :][:, :quarter], 1) for k in (3, 2, 1))
    with np.errstate(invalid="ignore"):
        decays = (second > third) & (third > last) & (second >= TREND * last)
        grows = (second < third) & (third < last) & (last >= TREND * second)
    period = answer_periods(answers)
    # States that repeat repeat their answers: among changing answers without a period, one of the residual is chance.
    period = np.where(period == 1, residual_periods(r[:, depth - answers.shape[1] :]), period)
    one: Bools = (answers[:, -quarter:] == answers[:, -1:]).all(1)
    steady = one & ~np.isnan(plateau(r))
    kind = np.select(
        [lost | ~np.isfinite(r[:, -1]), still, decays, grows, period > 1, steady],
        ["diverged", "settled", "decaying", "growing", "cycling", "steady"],
        "wandering",
    )
    return kind, np.where(kind == "cycling", period, 0)


def _trace(residuals: npt.ArrayLike) -> Doubles:
    r = np.asarray(residuals, np.float64)
    if r.ndim != 2 or not r.shape[1]:
        raise ValueError(f"residuals must be [T, D >= 1], got shape {r.shape}")
    return r


@dataclass(frozen=True)
class Dynamics:
    """What each of the B trajectories of N puzzles does.

    Attributes:
        kind: [N, B], of `KINDS`; period: int64 [N, B], of those that cycle, else 0.
        level: float64 [N, B], where the residual came to rest, see `plateau`.
        rate: float64 [N, B], see `contraction_rates`; NaN of those that have not settled.
        unsteady: bool [N, B], settled, but the answer changed after the tolerance was met.
    """

    kind: npt.NDArray[np.str_]
    period: Ints
    level: Doubles
    rate: Doubles
    unsteady: Bools


def describe(recording: Recording, *, tol: float, noise_scale: float) -> Dynamics:
    """The dynamics of a recording without halting that has at least the depths of `tail_depths`.

    Args:
        tol: residual that counts as settled. noise_scale: that was injected.
    """
    tail = tail_depths(recording.depth)
    places = [recording.place(depth) for depth in tail]
    shape, flat = recording.correct.shape[:2], recording.residuals.reshape(-1, recording.depth)
    codes = recording.answer[..., places].reshape(-1, len(tail))
    still, lost = (x[..., -1].reshape(-1) for x in (settled(recording, tol), recording.diverged))
    kind, period = trajectory_kinds(flat, codes, still, lost)
    level = plateau(flat)
    # Without noise a trajectory may contract all the way down, and has no floor until it rests.
    floor = np.where(np.isnan(level) & (noise_scale == 0), 0.0, level)
    rate = np.where(still, contraction_rates(flat, floor), np.nan)
    met = first_converged(flat, tol)[0]
    changed = ((codes != codes[:, -1:]) & (np.asarray(tail) >= met[:, None])).any(1)
    fields: Any = (field.reshape(shape) for field in (kind, period, level, rate, still & changed))
    return Dynamics(*fields)
