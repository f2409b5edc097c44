"""--tol of the commands: what counts as settled, and whether that is a promise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy.typing as npt
import torch

from eqr_kernels.cli.console import complain
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.solver import card_in, tolerance_of
from eqr_kernels.tolerance import HaltingTolerance


def parse_tolerance(text: str) -> float | str:
    """What --tol says: a positive number, "auto" or "fast"."""
    if text in ("auto", "fast"):
        return text
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"--tol must be auto, fast or a positive number, got {text!r}") from None
    if not 0 < value < math.inf:
        raise ValueError(f"--tol must be positive and finite, got {text!r}")
    return value


def refuse_tolerance(wanted: float | str, halt: str) -> None:
    """For a halting rule that has no use for --tol.

    Raises:
        ValueError: one was given.
    """
    if wanted != "auto":
        raise ValueError(f"--tol is for halting by the residual, and --halt is {halt}; leave one out")


def settling_tolerance(
    model: EquilibriumReasoner, inputs: npt.NDArray[Any], wanted: float | str, noise_scale: float | None, **run: Any
) -> HaltingTolerance:
    """The tolerance of a command; on stderr, why converged is no promise with it where the user may think so.

    Args:
        inputs: tokens [N, S] of the puzzles.
        run: further arguments of `tolerance_of`.
    """
    tokens = torch.from_numpy(inputs.astype("int64"))
    chosen = tolerance_of(model, tokens, wanted, noise_scale=noise_scale, **run)
    if chosen.caveat:
        complain(chosen.caveat, "warning")
    return chosen if isinstance(wanted, str) else dataclasses.replace(chosen, origin="--tol")


def as_settings(chosen: HaltingTolerance | None) -> dict[str, Any]:
    """For the settings of a report."""
    if chosen is None:
        return {"tol": None, "tol_from": None, "tol_caveat": None}
    return {"tol": chosen.value, "tol_from": chosen.origin, "tol_caveat": chosen.caveat or None}


def card_as_json(model: EquilibriumReasoner, precision: str) -> dict[str, Any] | None:
    """What the card recommends for a precision, named as for `solve`."""
    card = card_in(model, precision)
    names = ("tol", "tol_fast", "tol_missing", "noise_scale", "window")
    return None if card is None else {name: getattr(card, name) for name in names}
