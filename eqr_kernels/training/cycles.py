"""How an outer step's recursions grow along a training run; the weights do not depend on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from eqr_kernels.config import EqRConfig


@dataclass(frozen=True)
class CyclePoint:
    """From training step `step` on, an outer step has these cycles, and a row at most `halt_max_steps` of them."""

    step: int
    H_cycles: int
    L_cycles: int
    halt_max_steps: int


def parse_cycles(text: str) -> tuple[CyclePoint, ...]:
    """Points from text such as "0:1x3x16,20000:1x6x16", STEP:H_CYCLESxL_CYCLESxHALT_MAX_STEPS; "" has none.

    Raises:
        ValueError: text of another form, steps that do not rise from 0, or a count below 1.
    """
    points = []
    for part in filter(None, text.split(",")):
        try:
            step, cycles = part.split(":")
            counts = CyclePoint(int(step), *map(int, cycles.split("x")))
        except (ValueError, TypeError):
            raise ValueError(f'cycles: {part!r} is not STEP:HxLxSTEPS, as in "0:1x3x16,20000:1x6x16"') from None
        if min(counts.H_cycles, counts.L_cycles, counts.halt_max_steps) < 1:
            raise ValueError(f"cycles: H_cycles, L_cycles and halt_max_steps must be at least 1, got {cycles}")
        points.append(counts)
    steps = [point.step for point in points]
    if steps and (steps[0] != 0 or sorted(set(steps)) != steps):
        raise ValueError(f"cycles: steps must rise from 0, got {steps}")
    return tuple(points)


def config_at(points: Sequence[CyclePoint], config: EqRConfig, step: int) -> EqRConfig:
    """The config that training step `step` (0 is the first) runs with; `config` itself where there are no points."""
    started = [point for point in points if point.step <= step]
    if not started:
        return config
    fields = dataclasses.asdict(started[-1])
    del fields["step"]
    return dataclasses.replace(config, **fields)


def stretches(points: Sequence[CyclePoint], config: EqRConfig, steps: int) -> list[tuple[EqRConfig, int]]:
    """The first `steps` training steps as (config, number of steps that run with it), in their order."""
    begins = [point.step for point in points if point.step < steps] or [0]
    ends = [*begins[1:], steps]
    return [(config_at(points, config, b), e - b) for b, e in zip(begins, ends, strict=True)]
