"""What an outer step costs in each precision that really runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eqr_kernels.reasoner import EquilibriumReasoner

REFERENCE = "bf16"
_SECONDS = 0.5
_GPU_TRAJECTORIES = 2112
_MOST_DEPTH = 256


def time_precisions(
    model: EquilibriumReasoner, tokens: Tensor, precisions: Sequence[str], *, rounds: int, **options: Any
) -> dict[str, dict[str, float | None]]:
    """Milliseconds of an outer step of one trajectory where the device is saturated, no trajectory halting.

    The precisions take turns, there and back again, so that a slow phase of the machine meets all of them; a time is
    the median over the rounds, and a ratio the median of the rounds' ratios.

    Args:
        tokens: integers [N, S], repeated until the device is full.
        precisions: of `solve`, different ones.
        rounds: at least 1.
        options: further arguments of `solve` (noise_scale, backend, seed, slots).

    Returns:
        For each precision "ms_per_step" and "times_as_fast" (as bf16; None where bf16 is not among them).
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    wanted = 16 * torch.get_num_threads() if model.device.type == "cpu" else _GPU_TRAJECTORIES
    rows = tokens.repeat(-(wanted // -len(tokens)), 1)[:wanted]
    ids = torch.arange(wanted)

    def seconds(precision: str, depth: int) -> float:
        begun = time.perf_counter()
        result = model.solve(rows, depth=depth, halt="none", ids=ids, precision=precision, **options)
        int(result.nfe.sum())  # waits for the device
        return (time.perf_counter() - begun) / (wanted * depth)

    depths = {}
    for precision in precisions:
        seconds(precision, 2)
        depths[precision] = min(_MOST_DEPTH, max(2, round(_SECONDS / (wanted * seconds(precision, 4)))))
    taken: dict[str, list[float]] = {precision: [] for precision in precisions}
    for number in range(rounds):
        for precision in precisions if number % 2 == 0 else reversed(precisions):
            taken[precision].append(seconds(precision, depths[precision]))
    base = taken.get(REFERENCE)
    return {
        precision: {
            "ms_per_step": 1e3 * statistics.median(times),
            "times_as_fast": None if base is None else _ratio(base, times),
        }
        for precision, times in taken.items()
    }


def _ratio(base: Sequence[float], times: Sequence[float]) -> float:
    return statistics.median(b / t for b, t in zip(base, times, strict=True))
