"""Results of `solve` compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqr_kernels import SolveResult

FIELDS = (
    "preds",
    "logits",
    "q_halt",
    "residual",
    "score",
    "steps",
    "restart",
    "nfe",
    "all_steps",
    "all_residual",
    "all_score",
    "all_q_halt",
    "all_status",
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of the same dtype, shape and bits, NaN included."""

    def bits(t: Tensor) -> Tensor:
        return t.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu()

    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def same(a: SolveResult, b: SolveResult, rows: Any = slice(None)) -> bool:
    """Equal bit for bit, NaN included; `rows` of b."""
    return all(same_bits(getattr(a, field), getattr(b, field)[rows]) for field in FIELDS)
