"""What the answers of a run depend on, in words and numbers: two runs that agree on it give the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

import eqr_kernels
from eqr_kernels import backends, ops
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.solver import precision_of


def weights_digest(model: EquilibriumReasoner) -> str:
    """SHA-256 of the weights by name: the same for the same weights in whatever kind of file they came."""
    hashed = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        hashed.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def what_decides(model: EquilibriumReasoner, options: Mapping[str, Any], *, turns: bool = False) -> dict[str, Any]:
    """What decides the answers of a run beside weights, puzzles, sizes and seed; no defaults are left in it.

    Args:
        options: of `solve`: window, noise_scale, backend, precision. turns: whether there are any.
    """
    precision = precision_of(model, options["precision"])
    backend = backends.choose(options["backend"], model, precision, turns=turns)[0].name
    noise_scale, window = options["noise_scale"], options["window"]
    return {
        "config": model.config.to_dict(),
        "noise_scale": model.inference_noise_scale if noise_scale is None else noise_scale,
        "window": model.inference_window if window is None else window,
        "backend": backend,
        "precision": str(precision.dtype).removeprefix("torch."),
        "instruction_set": ops.cpu_isa() if backend == "cpu" else None,
        "device": str(model.device),
        "torch": torch.__version__,
        "eqr_kernels": eqr_kernels.__version__,
    }
