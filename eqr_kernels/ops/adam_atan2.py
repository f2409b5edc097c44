"""One update of the weights by AdamATan2, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eqr_kernels.ops.library import register_fake, require


def adam_atan2_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    step: int,
) -> None:
    """Update number `step` (from 1 on) of `weights` as in `eqr_kernels.training.optim.AdamATan2`, in place.

    The angle is within 3e-7 of its value. Runs on torch's threads, whose number does not change the result.

    Args:
        weights: contiguous float32 tensors on CPU.
        gradients, means, squares: of each weight; the means and squares (`exp_avg`, `exp_avg_sq`) are moved as well.
        lr, betas, weight_decay: as in `AdamATan2`.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    with torch.no_grad():
        torch.ops.eqr_kernels.adam_atan2_.default(
            weights, gradients, means, squares, lr, betas[0], betas[1], weight_decay, step
        )


@register_fake("adam_atan2_")
def _(*args: object) -> None:
    return None
