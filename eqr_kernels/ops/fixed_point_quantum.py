"""Some outer steps of some trajectories, whose states stay on a CUDA device from one launch to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.fixed_point import check_arguments
from eqr_kernels.ops.library import register_fake, require, require_cuda
from eqr_kernels.ops.operator import PackedWeights
from eqr_kernels.run_rules import RunRules


class Tables(NamedTuple):
    """What becomes of T trajectories. Row i of C + 1 is checkpoint i, the last row how each stands or ended."""

    preds: Tensor  # int64 [C + 1, T, S]
    q_halt: Tensor  # float32 [C + 1, T]
    residual: Tensor  # float32 [C + 1, T]
    score: Tensor  # float32 [C + 1, T]
    steps: Tensor  # int64 [C + 1, T]
    status: Tensor  # int64 [C + 1, T]; -1: going on at that checkpoint, or now
    logits: Tensor  # float32 [T, S, V], the last finite ones
    residuals: Tensor  # float32 [T, depth], NaN where there was no step; [0] without a trace

    @classmethod
    def empty(cls, rules: RunRules, trajectories: int, tokens: int, vocabulary: int, device: torch.device) -> Tables:
        """Of trajectories of `tokens` tokens that have not begun."""
        rows, depth = len(rules.checkpoints) + 1, rules.depth

        def table(dtype: torch.dtype, *sizes: int) -> Tensor:
            return torch.zeros(rows, trajectories, *sizes, dtype=dtype, device=device)

        return cls(
            preds=table(torch.int64, tokens),
            q_halt=table(torch.float32),
            residual=table(torch.float32),
            score=table(torch.float32),
            steps=table(torch.int64),
            status=table(torch.int64),
            logits=torch.zeros(trajectories, tokens, vocabulary, dtype=torch.float32, device=device),
            residuals=torch.full(
                (trajectories, depth) if rules.trace else (0,), torch.nan, dtype=torch.float32, device=device
            ),
        )

    def grown(self, rules: RunRules, trajectories: int) -> Tables:
        """With new ones behind these, `trajectories` in all."""
        tokens, vocabulary = self.logits.shape[1:]
        more = Tables.empty(rules, trajectories - len(self.logits), tokens, vocabulary, self.logits.device)
        pairs = list(zip(self, more, strict=True))
        fields = [*(torch.cat(pair, 1) for pair in pairs[:6]), *(torch.cat(pair) for pair in pairs[6:])]
        return Tables(*fields)

    def forget(self, first: int, count: int) -> None:
        """What a launch writes for some of its steps alone: others may have been there before."""
        if self.residuals.ndim == 2:
            self.residuals[first : first + count] = torch.nan

    def take(self, first: int, count: int) -> Tables:
        """A copy of `count` trajectories, from number `first`."""
        rows = slice(first, first + count)
        *recorded, logits, residuals = self
        traced = residuals[rows].clone() if residuals.ndim == 2 else residuals
        fields = [*(table[:, rows].clone() for table in recorded), logits[rows].clone(), traced]
        return Tables(*fields)


class Parked(NamedTuple):
    """The states of T trajectories between launches."""

    states: Tensor  # uint8 [T * slot_bytes], slot_bytes as of `cuda_plan`
    control: Tensor  # int64 [T, parked_bytes / 8], zeros where one has not begun
    best: Tensor  # int64 [N] in a race, -1 before it; else [0]


def fixed_point_quantum(
    packed: PackedWeights,
    tokens: Tensor,
    ids: Tensor,
    control: Tensor,
    rules: RunRules,
    rows: Tensor,
    quantum: int,
    parked: Parked,
    tables: Tables,
) -> None:
    """Iterates trajectories `rows` from where the launch before has left them, each for at most `quantum` outer steps.

    What comes out in the end is what `fixed_point` gives, bit for bit, whatever the quanta and the order. The op only
    enqueues the launch on the current stream and returns.

    Args:
        packed, tokens, ids, rules: as in `fixed_point`, the same in every launch, but that a puzzle whose trajectories
            have all ended may give its place to another; `rules.slots` is not looked at.
        control: as in `fixed_point`, with zeros before each launch; it counts this launch alone.
        rows: int64 [R], different numbers in 0..T-1 of trajectories that have not ended, on the device.
        quantum: 1 to 2**24 - 1.
        parked, tables: on the device, written.

    Raises:
        RuntimeError: there is no extension, or none for this device.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    require_cuda(tokens)
    check_arguments(packed, tokens, ids, control)
    check.tensor("rows", rows, torch.int64, ("R",), ("tokens", tokens))
    torch.ops.eqr_kernels.fixed_point_quantum.default(
        packed.data, tokens, ids, control, *packed.operator, *rules.in_order(), rows, quantum, *parked, list(tables)
    )


@register_fake("fixed_point_quantum")
def _(*arguments: Any) -> None:
    pass
