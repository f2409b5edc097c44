"""Tolerances in a model's card: where they are written, and what they were chosen on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from eqr_kernels.atomic import atomic_write
from eqr_kernels.checkpoint import ModelCard, load_checkpoint
from eqr_kernels.precision import Precision
from eqr_kernels.studies.tolerance import Calibration, Tolerance

_KEPT = ("correct", "mean_steps", "converged", "right_when_converged")


def store_tolerance(
    weights: Path,
    calibration: Calibration,
    settings: dict[str, Any],
    data: str,
    noise: dict[str, Any] | None = None,
) -> Path:
    """Writes the chosen tolerances, or why there are none, into the card beside the weights, which stay untouched.

    Accuracies that were measured at another noise are dropped.

    Args:
        weights: the model's safetensors file.
        settings: what they were chosen with: depth, reveal, seed, max_loss, trust, patience and noise_scale; precision,
            where it is another than that of the weights: int8 has tolerances of its own.
        data: name of the puzzles.
        noise: what the noise was chosen by; None keeps what the card has of the same noise.

    Returns:
        The card's path.

    Raises:
        ValueError: those of int8 were found with another noise than the card's.
    """
    card = load_checkpoint(weights).card
    check_noise(card, settings.get("precision", "auto"), settings["noise_scale"])
    names = ("depth", "reveal", "seed", "max_loss", "trust", "patience", "noise_scale")
    record = {
        "data": data,
        "puzzles": calibration.puzzles,
        **{name: settings[name] for name in names},
        "correct_at_full_depth": calibration.correct,
        "tol": _counts(calibration.trusted),
        "tol_fast": _counts(calibration.fast),
    }
    # A tolerance holds for this noise only, so the card recommends both together.
    scale = settings["noise_scale"]
    before = card.extra.get("calibration", {}).get("noise")
    noise = before if noise is None and before is not None and before["chosen"] == scale else noise
    if noise is not None:
        record["noise"] = noise
    found: dict[str, Any] = {
        "tol": None if calibration.trusted is None else calibration.trusted.tol,
        "tol_fast": None if calibration.fast is None else calibration.fast.tol,
        "tol_missing": calibration.missing,
    }
    same_noise = scale == card.inference_noise_scale
    precision = settings.get("precision", "auto")
    if _is_float(precision):
        changes = {
            **found,
            "noise_scale": None if scale == card.config.noise_scale else scale,
            "accuracies": card.accuracies if same_noise else {},
            "tol_by_precision": card.tol_by_precision if same_noise else {},
            "extra": {**_extra_of(card, same_noise), "calibration": record},
        }
    else:
        records = {**card.extra.get("calibration_by_precision", {}), precision: record}
        changes = {
            "tol_by_precision": {**card.tol_by_precision, precision: found},
            "extra": {**card.extra, "calibration_by_precision": records},
        }
    card = dataclasses.replace(card, **changes, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    path = weights.with_suffix(".json")
    atomic_write(path, card.to_json().encode())
    return path


def check_noise(card: ModelCard | None, precision: str, noise_scale: float) -> None:
    """That tolerances of this precision, found with this noise, can stand in the card.

    Raises:
        ValueError: those of int8 go with the noise of the others.
    """
    if card is None or _is_float(precision) or noise_scale == card.inference_noise_scale:
        return
    raise ValueError(
        f"tolerances of {precision} go with the noise_scale of the card, {card.inference_noise_scale:g}, got "
        f"{noise_scale:g}; calibrate without --precision first, which may change it"
    )


def _is_float(precision: str) -> bool:
    return precision == "auto" or Precision[precision].dtype.is_floating_point


def _extra_of(card: ModelCard, same_noise: bool) -> dict[str, Any]:
    """What stays: records of other precisions hold for their noise only."""
    return {name: value for name, value in card.extra.items() if same_noise or name != "calibration_by_precision"}


def _counts(t: Tolerance | None) -> dict[str, Any] | None:
    return None if t is None else {**{name: getattr(t, name) for name in _KEPT}, "wilson95": list(t.interval)}
