"""Which residual counts as settled: the caller's, one of the model's card, or a provisional one."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from eqr_kernels.arguments import check_number
from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.noise import noise_floor

NOISE_MULTIPLE = 2.0
USUAL_NOISE = 0.01
FIRST_ROWS = 8
"""Rows on which a model without noise is measured."""


@dataclass(frozen=True)
class HaltingTolerance:
    """The tolerance of a run.

    Attributes:
        value: a trajectory has converged when its residual is at most this.
        origin: where it comes from.
        caveat: why converged is no promise of a right answer although the caller may think so; "" where it is one, and
            where the caller chose.
    """

    value: float
    origin: str
    caveat: str = ""


def check_tolerance(tol: float | str) -> float | str:
    """`tol` of `solve`, a number as a float.

    Raises:
        TypeError, ValueError: it is neither "auto" or "fast" nor a finite number of at least 0.
    """
    if isinstance(tol, str):
        if tol not in ("auto", "fast"):
            raise ValueError(f'tol must be "auto", "fast" or a number of at least 0, got {tol!r}')
        return tol
    if isinstance(tol, bool) or not isinstance(tol, numbers.Real):
        raise TypeError(f'tol must be "auto", "fast" or a number, got {tol!r} ({type(tol).__name__})')
    return check_number("tol", tol)


def halting_tolerance(
    card: ModelCard | None, tol: float | str, noise_scale: float, residuals_at_rest: Callable[[], Tensor]
) -> HaltingTolerance:
    """What `tol` of `solve` stands for.

    "auto" is the card's `tol`: of the puzzles that met it in calibration at least 99 % were right. Where the model has
    none it is `tol_fast`, with a caveat. "fast" is the card's `tol_fast`, the loosest that cost no answer, else `tol`.
    Where the card has neither, both are `provisional_tolerance`, with a caveat.

    Args:
        card: of the model. noise_scale: of the run.
        residuals_at_rest: called where nothing else is known; see `provisional_tolerance`.

    Raises:
        As `check_tolerance`.
    """
    tol = check_tolerance(tol)
    if not isinstance(tol, str):
        return HaltingTolerance(tol, "the caller")
    known = card_tolerance(card, tol, noise_scale)
    if known is not None:
        return known
    value, origin = provisional_tolerance(noise_scale, residuals_at_rest)
    reason = (card.tol_missing if card else "") or "it was never calibrated"
    caveat = (
        f"converged is no promise for this model: {reason}; halting at the provisional tol={value:.3g}, {origin}; "
        "`eqr calibrate --write` finds one for its card"
    )
    return HaltingTolerance(value, f"provisional, {origin}", caveat)


def card_tolerance(
    card: ModelCard | None, tol: str = "auto", noise_scale: float | None = None
) -> HaltingTolerance | None:
    """What "auto" or "fast" is on the card; None where it has no tolerance.

    Args:
        noise_scale: of the run; None is that of the calibration, for which alone a promise holds.
    """
    trusted, fast = (None, None) if card is None else (card.tol, card.tol_fast)
    if tol == "fast" and fast is not None:
        return HaltingTolerance(fast, "the model's card, tol_fast")
    if card is not None and trusted is not None:
        calibrated = card.inference_noise_scale
        # Below the floor of the noise nothing converges, so nothing is promised either.
        if tol == "fast" or noise_scale is None or noise_scale == calibrated or trusted < noise_floor(noise_scale):
            return HaltingTolerance(trusted, "the model's card")
        caveat = (
            f"converged is no promise in this run: the model's tol={trusted:g} was calibrated with "
            f"noise_scale={calibrated:g}, and this run has {noise_scale:g}; `eqr calibrate --noise-scale` finds another"
        )
        return HaltingTolerance(trusted, "the model's card", caveat)
    if card is None or fast is None:
        return None
    caveat = (
        f"converged is no promise for this model: {card.tol_missing or 'its card has no tol'}; halting at its "
        f'tol_fast={fast:g}, which cost no answer; tol="fast" asks for that'
    )
    return HaltingTolerance(fast, "the model's card, tol_fast", caveat)


def provisional_tolerance(noise_scale: float, residuals_at_rest: Callable[[], Tensor]) -> tuple[float, str]:
    """A tolerance where none was calibrated, and what it is: `NOISE_MULTIPLE` times the residual of a state at rest.

    With noise that is `noise_floor`. Without, it is the median of what the model's own first rows come down to, but no
    more than noise of `USUAL_NOISE` would give: rows that never come to rest should not count as settled.

    Args:
        residuals_at_rest: float32 [n], of rows that ran to the full depth.
    """
    if noise_scale > 0:
        return NOISE_MULTIPLE * noise_floor(noise_scale), "twice the residual that the noise leaves"
    residuals = residuals_at_rest()
    residuals = residuals[residuals.isfinite()]
    limit = NOISE_MULTIPLE * noise_floor(USUAL_NOISE)
    if not len(residuals) or (value := NOISE_MULTIPLE * residuals.median().item()) > limit:
        return limit, f"as with noise of {USUAL_NOISE:g}: its first rows do not come to rest"
    return value, "twice the residual that its first rows come down to"
