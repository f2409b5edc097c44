"""One outer step of training, forward and backward, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require


class TrainingStepOutput(NamedTuple):
    """What `training_step` gives: n rows, S tokens, d features."""

    z_H: Tensor  # float32 [n, S, d]
    z_L: Tensor  # float32 [n, S, d]
    loss: Tensor  # float64 [n], a row's token loss + 0.5 * its halting loss; the batch's is their mean
    q_halt: Tensor  # float32 [n]
    residual: Tensor  # float32 [n], ||z - z before|| / ||z|| over both states
    exact: Tensor  # bool [n], every labelled token is right, and there is one
    gradients: Tensor  # float32 [all weights], of the mean loss; see `split_gradients`


def training_step(
    embedding: Tensor,
    lm_head: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    blocks: Sequence[Tensor],
    tokens: Tensor,
    labels: Tensor,
    z_H: Tensor,
    z_L: Tensor,
    rng: Tensor,
    scratch: Tensor,
    *,
    sizes: Sequence[int],
    constants: Sequence[float],
    noise_scale: float,
) -> TrainingStepOutput:
    """One outer step of every row and the gradients of its loss: segmented online training (EqR, section 3).

    All latent recursions but the last run without gradient. The blocks' products and the logits are of bf16 operands
    with float32 sums; states, the residual stream and its gradient are float32. Noise is that of
    `eqr_kernels.noise.normal`, drawn inside. Rows are computed on torch's threads; their gradients are summed by
    worker, so that the result depends on `scratch.shape[0]` and the instruction set, not on the number of threads.

    Args:
        embedding, lm_head, q_weight, q_bias, blocks, sizes, constants: as in `ops.pack_weights`; token mixing (heads 0)
            only.
        tokens, labels: int64 [n, S] in 0..V-1; a label of 0 is not scored.
        z_H, z_L: float32 [n, S, d], the states to begin with.
        rng: int64 [n, 4]: (seed, restart, id, step) of each row.
        scratch: uint8 [workers, scratch_bytes(sizes, constants)], zeros when it is new; it may be used again as it is
            by calls with the same sizes, one at a time. As many workers as threads are best.
        noise_scale: at least 0.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    _check(
        embedding,
        lm_head,
        q_weight,
        q_bias,
        blocks,
        tokens,
        labels,
        z_H,
        z_L,
        rng,
        scratch,
        sizes,
        constants,
        noise_scale,
    )
    with torch.no_grad():
        return TrainingStepOutput(
            *torch.ops.eqr_kernels.training_step.default(
                embedding,
                lm_head,
                q_weight,
                q_bias,
                blocks,
                tokens,
                labels,
                z_H,
                z_L,
                rng,
                scratch,
                sizes,
                constants,
                noise_scale,
            )
        )


def scratch_bytes(sizes: Sequence[int], constants: Sequence[float]) -> int:
    """Bytes of `scratch` for each worker of `training_step`, for the instruction set in use.

    Raises:
        RuntimeError: there is no extension.
        ValueError: the sizes or constants are out of range.
    """
    return int(require().training_scratch_bytes(sizes, constants))


def split_gradients(gradients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `gradients` [all weights] in the shapes of `like`: embedding, lm_head, q_weight, q_bias, *blocks."""
    parts = gradients.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _check(
    embedding: Tensor,
    lm_head: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    blocks: Sequence[Tensor],
    tokens: Tensor,
    labels: Tensor,
    z_H: Tensor,
    z_L: Tensor,
    rng: Tensor,
    scratch: Tensor,
    sizes: Sequence[int],
    constants: Sequence[float],
    noise_scale: float,
) -> None:
    none = (None, None, None, None)
    check.pack_weights(embedding, lm_head, q_weight, q_bias, blocks, *none, sizes, constants, "bf16")
    check.on_cpu("embedding", embedding)
    check.training_batch(tokens, labels, z_H, z_L, rng, scratch, sizes, noise_scale)


@register_fake("training_step")
def _(
    embedding: Tensor,
    lm_head: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    blocks: Sequence[Tensor],
    tokens: Tensor,
    labels: Tensor,
    z_H: Tensor,
    z_L: Tensor,
    rng: Tensor,
    scratch: Tensor,
    sizes: Sequence[int],
    constants: Sequence[float],
    noise_scale: float,
) -> tuple[Tensor, ...]:
    _check(
        embedding,
        lm_head,
        q_weight,
        q_bias,
        blocks,
        tokens,
        labels,
        z_H,
        z_L,
        rng,
        scratch,
        sizes,
        constants,
        noise_scale,
    )
    n = tokens.shape[0]
    weights = sum(math.prod(w.shape) for w in (embedding, lm_head, q_weight, q_bias, *blocks))
    q_halt = z_H.new_empty(n)
    return (
        torch.empty_like(z_H),
        torch.empty_like(z_L),
        z_H.new_empty(n, dtype=torch.float64),
        q_halt,
        torch.empty_like(q_halt),
        z_H.new_empty(n, dtype=torch.bool),
        z_H.new_empty(weights),
    )
