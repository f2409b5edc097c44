"""A training step's outer step and update by the fused kernels, as `eqr_kernels.training.trainer.Trainer` uses them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels.backends.packing import operator_of
from eqr_kernels.config import PUBLISHED_MULTIPLE
from eqr_kernels.differentiable_step import why_not_trained
from eqr_kernels.modules import EqROperator
from eqr_kernels.training.optim import AdamATan2


class StepResult(NamedTuple):
    """What one outer step of n rows gives the trainer; the gradients of the weights are in their `grad`."""

    loss: Tensor  # float64 []
    z_H: Tensor  # [n, S, d]
    z_L: Tensor  # [n, S, d]
    q_halt: Tensor  # [n]
    exact: Tensor  # bool [n]
    residual: Tensor  # [n]


def why_not_fused(model: EqROperator) -> str | None:
    """Why the fused kernel cannot train a model, with the remedy; None where it can."""
    if model.config.multiple_of % PUBLISHED_MULTIPLE:
        return f"the fused kernel trains hidden units in multiples of {PUBLISHED_MULTIPLE} (multiple_of) only"
    return why_not_trained(model)


class FusedStep:
    """`ops.training_step` on a model's weights as they are at each call.

    Args:
        model: float32, on CPU.
        workers: parts in which the gradients are summed, which decides their last bits; as many as threads are best.
        seed: of the noise, 0 to 2**32 - 1.
    """

    def __init__(self, model: EqROperator, workers: int, seed: int) -> None:
        self.model, self.seed, self.operator = model, seed, operator_of(model)
        shape = (workers, ops.scratch_bytes(self.operator))
        self.scratch = torch.zeros(shape, dtype=torch.uint8, device="cpu")

    def __call__(
        self, tokens: Tensor, labels: Tensor, z_H: Tensor, z_L: Tensor, ids: Tensor, steps: Tensor
    ) -> StepResult:
        """One outer step: tokens, labels int64 [n, S]; z_H, z_L float32 [n, S, d]; ids, steps int64 [n].

        ids and steps, the outer steps that a row has had, key its noise.
        """
        weights = self.model.weights()
        *heads, blocks = weights
        parameters = [*heads, *(tensor for block in blocks for tensor in block)]
        rng = torch.stack([torch.full_like(ids, self.seed), torch.zeros_like(ids), ids, steps], 1)
        batch = ops.TrainingBatch(tokens, labels, z_H, z_L, rng)
        noise_scale = self.model.config.noise_scale
        out = ops.training_step(weights, batch, self.scratch, self.operator, noise_scale)
        summed: dict[Tensor, Tensor] = {}  # blocks may be shared
        for parameter, gradient in zip(parameters, ops.split_gradients(out.gradients, parameters), strict=True):
            if parameter.requires_grad:
                summed[parameter] = summed[parameter] + gradient if parameter in summed else gradient
        for parameter, gradient in summed.items():
            parameter.grad = gradient
        return StepResult(out.loss.mean(), out.z_H, out.z_L, out.q_halt, out.exact, out.residual)


class FusedAdamATan2(AdamATan2):
    """AdamATan2 of float32 parameters on CPU, each of its updates one pass over the weights."""

    def _update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        group: dict[str, Any],
        age: int,
    ) -> None:
        ops.adam_atan2_(
            params, grads, m, v, lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"], step=age
        )
