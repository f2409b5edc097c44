"""A tolerance in a model's card: where it is written, and what it was found on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from eqr_kernels.checkpoint import load_checkpoint
from eqr_kernels.cli.console import write_atomically
from eqr_kernels.studies import Calibration

_KEPT = ("correct", "mean_steps", "converged", "right_when_converged")


def store_tolerance(weights: Path, found: Calibration, settings: dict[str, Any], data: str) -> Path:
    """Writes the chosen tolerance into the card beside the weights, which stay untouched; the card's path.

    Args:
        weights: the model's safetensors file.
        settings: what it was found with: depth, reveal, seed, max_loss, trust, patience and noise_scale.
        data: name of the puzzles.
    """
    assert found.chosen is not None
    card = load_checkpoint(weights).card
    names = ("depth", "reveal", "seed", "max_loss", "trust", "patience", "noise_scale")
    calibration = {
        "data": data,
        "puzzles": found.puzzles,
        **{name: settings[name] for name in names},
        "correct_at_full_depth": found.correct,
        **{name: getattr(found.chosen, name) for name in _KEPT},
    }
    # The tolerance holds for this noise only, so the card recommends both together.
    scale = settings["noise_scale"]
    card = dataclasses.replace(
        card,
        tol=found.chosen.tol,
        noise_scale=None if scale == card.config.noise_scale else scale,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        extra={**card.extra, "calibration": calibration},
    )
    path = weights.with_suffix(".json")
    write_atomically(path, card.to_json().encode())
    return path
