"""One outer step of training, forward and backward, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require
from eqr_kernels.ops.operator import Operator
from eqr_kernels.reference import OperatorWeights


class TrainingStepOutput(NamedTuple):
    """What `training_step` gives: n rows, S tokens, d features."""

    z_H: Tensor  # float32 [n, S, d]
    z_L: Tensor  # float32 [n, S, d]
    loss: Tensor  # float64 [n], a row's token loss + 0.5 * its halting loss; the batch's is their mean
    q_halt: Tensor  # float32 [n]
    residual: Tensor  # float32 [n], ||z - z before|| / ||z|| over both states
    exact: Tensor  # bool [n], every labelled token is right, and there is one
    gradients: Tensor  # float32 [all weights], of the mean loss; see `split_gradients`


class TrainingBatch(NamedTuple):
    """The rows of a `training_step`, in the order of its schema."""

    tokens: Tensor  # int64 [n, S] in 0..V-1
    labels: Tensor  # int64 [n, S] in 0..V-1; 0 is not scored
    z_H: Tensor  # float32 [n, S, d], the states to begin with
    z_L: Tensor  # float32 [n, S, d]
    rng: Tensor  # int64 [n, 4]: (seed, restart, id, step)


def training_step(
    weights: OperatorWeights, batch: TrainingBatch, scratch: Tensor, operator: Operator, noise_scale: float
) -> TrainingStepOutput:
    """One outer step of every row and the gradients of its loss: segmented online training (EqR, section 3).

    All latent recursions but the last run without gradient. The blocks' products and the logits are of bf16 operands
    with float32 sums; states, the residual stream and its gradient are float32. Noise is that of
    `eqr_kernels.noise.normal`, drawn inside. Rows are computed on torch's threads; their gradients are summed by
    worker, so that the result depends on `scratch.shape[0]` and the instruction set, not on the number of threads.

    Args:
        weights: float32, contiguous and on CPU.
        batch: contiguous and on CPU.
        scratch: uint8 [workers, scratch_bytes(operator)], zeros when it is new; it may be used again as it is by calls
            with the same sizes, one at a time. As many workers as threads are best.
        operator: with token mixing (heads 0) only.
        noise_scale: at least 0.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    *heads, layers = weights
    flat = (*heads, [tensor for block in layers for tensor in block])
    _check(flat, batch, scratch, operator)
    with torch.no_grad():
        return TrainingStepOutput(
            *torch.ops.eqr_kernels.training_step.default(
                *flat, *batch, scratch, operator.sizes, operator.constants, noise_scale
            )
        )


def scratch_bytes(operator: Operator) -> int:
    """Bytes of `scratch` for each worker of `training_step`, for the instruction set in use.

    Raises:
        RuntimeError: there is no extension.
        ValueError: the sizes or constants are out of range.
    """
    return int(require().training_scratch_bytes(operator.sizes, operator.constants))


def split_gradients(gradients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `gradients` [all weights] in the shapes of `like`: embedding, lm_head, q_weight, q_bias, *blocks."""
    parts = gradients.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _check(weights: Sequence[Any], batch: TrainingBatch, scratch: Tensor, operator: Operator) -> None:
    check.training_rows("training_step", operator, weights, batch.tokens, batch.z_H, batch.z_L, batch.rng)
    check.tensor("labels", batch.labels, torch.int64, tuple(batch.tokens.shape))
    check.tensor("scratch", scratch, torch.uint8, ("workers", "scratch_bytes(operator)"))


@register_fake("training_step")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    weights, batch, (scratch, sizes, constants, _) = arguments[:5], TrainingBatch(*arguments[5:10]), arguments[10:]
    _check(weights, batch, scratch, Operator(sizes, constants, False))
    *heads, blocks = weights
    n, floats = batch.tokens.shape[0], sum(math.prod(w.shape) for w in (*heads, *blocks))
    q_halt = batch.z_H.new_empty(n)
    return (
        torch.empty_like(batch.z_H),
        torch.empty_like(batch.z_L),
        batch.z_H.new_empty(n, dtype=torch.float64),
        q_halt,
        torch.empty_like(q_halt),
        batch.z_H.new_empty(n, dtype=torch.bool),
        batch.z_H.new_empty(floats),
    )
