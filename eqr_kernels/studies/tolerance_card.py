"""A tolerance in a model's card: where it is written, and what it was chosen on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from eqr_kernels.atomic import atomic_write
from eqr_kernels.checkpoint import load_checkpoint
from eqr_kernels.studies.tolerance import Calibration

_KEPT = ("correct", "mean_steps", "converged", "right_when_converged")


def store_tolerance(weights: Path, calibration: Calibration, settings: dict[str, Any], data: str) -> Path:
    """Writes the chosen tolerance into the card beside the weights, which stay untouched; the card's path.

    Args:
        weights: the model's safetensors file.
        settings: what it was chosen with: depth, reveal, seed, max_loss, trust, patience and noise_scale.
        data: name of the puzzles.
    """
    assert calibration.chosen is not None
    card = load_checkpoint(weights).card
    names = ("depth", "reveal", "seed", "max_loss", "trust", "patience", "noise_scale")
    record = {
        "data": data,
        "puzzles": calibration.puzzles,
        **{name: settings[name] for name in names},
        "correct_at_full_depth": calibration.correct,
        **{name: getattr(calibration.chosen, name) for name in _KEPT},
    }
    # The tolerance holds for this noise only, so the card recommends both together.
    scale = settings["noise_scale"]
    card = dataclasses.replace(
        card,
        tol=calibration.chosen.tol,
        noise_scale=None if scale == card.config.noise_scale else scale,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        extra={**card.extra, "calibration": record},
    )
    path = weights.with_suffix(".json")
    atomic_write(path, card.to_json().encode())
    return path
