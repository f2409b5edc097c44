"""The rules of a fixed-point run, which `solve` checks and the backends and `ops.fixed_point` take.

csrc/common/run_rules.h has the same of the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any


class Halt(IntEnum):
    """When a trajectory ends before the whole depth; csrc/common/run_rules.h has the same numbers."""

    residual = 1
    """Its residual was at most tol for `patience` consecutive outer steps."""
    q = 2
    """q_halt was positive."""
    residual_and_q = 3
    """Both held at the same outer step."""
    residual_or_q = 4
    """Either held; where both did at the same step, it has converged."""
    none = 0


HALTING_RULES = {
    "residual": Halt.residual,
    "q": Halt.q,
    "residual+q": Halt.residual_and_q,
    "residual|q": Halt.residual_or_q,
    "none": Halt.none,
}
"""The rules by the names that `halt=` takes."""
RULES_WITH_TOLERANCE = tuple(name for name in HALTING_RULES if "residual" in name)
SELECTION_RULES = ("residual", "vote", "q", "first")


@dataclass(frozen=True)
class RunRules:
    """How every trajectory of a run starts, when it ends, and which one is a puzzle's answer; see `solve`.

    Attributes:
        seed: 0 to 2**32 - 1, of the random numbers.
        breadth: trajectories of a puzzle, at least 1 and below 2**32.
        depth: outer steps of a trajectory at most, at least 1 and below 2**24.
        halt: one of HALTING_RULES: "residual" (residual <= tol for `patience` consecutive steps), "q" (q_halt > 0),
            "residual+q" (both at the same step), "residual|q" (either) or "none" (the whole depth).
        tol: at least 0. patience: at least 1.
        select: one of SELECTION_RULES.
        window: differences of the logits in a score, at least 1.
        noise_scale: of the noise injection, at least 0; 0 draws none.
        checkpoints: rising depths, each in 1..depth, at which all trajectories are also recorded.
        slots: trajectories in flight at most, at least 1.
        trace: whether every residual is recorded.
    """

    seed: int
    breadth: int
    depth: int
    halt: str
    tol: float
    patience: int
    select: str
    window: int
    noise_scale: float
    checkpoints: Sequence[int]
    slots: int
    trace: bool

    @property
    def race(self) -> bool:
        """Siblings that cannot be the first to halt may be cancelled."""
        return self.select == "first"

    def in_order(self) -> tuple[Any, ...]:
        """The rules alone, in the order of the op's schema."""
        return tuple(getattr(self, name) for name in RULE_FIELDS)


RULE_FIELDS = tuple(field.name for field in fields(RunRules))
"""Their names, in the order of the op's schema."""
