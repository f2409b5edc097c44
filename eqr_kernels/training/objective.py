"""The training objective: stablemax cross-entropy of the answers, and binary cross-entropy of the halting head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy under stablemax, s(x) = x + 1 for x >= 0 and 1 / (1 - x) below, in float64 (EqR, section 3).

    Args:
        logits: [n, S, V], any float dtype.
        labels: int64 [n, S]; 0 is padding and adds nothing.

    Returns:
        float64 [n], the mean over each row's labelled tokens (0 for a row without any).
    """
    x = logits.to(torch.float64)
    # The clamps keep the branch that `where` does not take finite, or its gradient would be NaN at x = 1.
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x.clamp(min=0) + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    loss = -log_p.gather(-1, labels[..., None])[..., 0]
    labelled = labels != 0
    return torch.where(labelled, loss, 0).sum(1) / labelled.sum(1).clamp(min=1)


def objective(logits: Tensor, q_halt: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss of a batch: (sum of token losses + 0.5 * halting BCE) / n, and which rows are exactly right.

    Args:
        logits: [n, S, V]; q_halt: float32 [n]; labels: int64 [n, S], 0 is padding.

    Returns:
        The loss, float64 scalar, and bool [n]: every labelled token right (never for an all-pad row).
    """
    with torch.no_grad():
        labelled = labels != 0
        exact = ((logits.argmax(-1) == labels) | ~labelled).all(1) & labelled.any(1)
    halting = F.binary_cross_entropy_with_logits(q_halt, exact.to(q_halt.dtype), reduction="sum")
    return (stablemax_cross_entropy(logits, labels).sum() + 0.5 * halting) / labels.shape[0], exact
