"""One outer step and its backward pass, for an objective of the caller's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require
from eqr_kernels.ops.operator import Operator
from eqr_kernels.reference import OperatorWeights


class DifferentiableStepOutput(NamedTuple):
    """What `differentiable_step` gives, all float32: n rows, S tokens, d features, V vocabulary."""

    z_H: Tensor  # [n, S, d]
    z_L: Tensor  # [n, S, d]
    logits: Tensor  # [n, S, V]
    q_halt: Tensor  # [n]
    last_H: Tensor  # [n, S, d], z_H as only the last latent recursion is left, which is all that carries a gradient
    last_L: Tensor  # [n, S, d], z_L likewise


class StepRows(NamedTuple):
    """The n >= 1 rows of a step, in the order of the schemas; contiguous and on CPU."""

    tokens: Tensor  # int64 [n, S] in 0..V-1
    z_H: Tensor  # float32 [n, S, d]
    z_L: Tensor  # float32 [n, S, d]
    rng: Tensor  # int64 [n, 4]: (seed, restart, id, step)


def differentiable_step(
    weights: OperatorWeights, rows: StepRows, operator: Operator, noise_scale: float
) -> DifferentiableStepOutput:
    """One outer step of every row, in the arithmetic of `training_step`, and what its backward pass begins from.

    Rows are independent, and the result does not depend on the number of threads. The op has no autograd formula:
    `eqr_kernels.differentiable_step` is the autograd function of both.

    Args:
        weights: float32, contiguous and on CPU.
        operator: with token mixing (heads 0) only.
        noise_scale: at least 0; the noise is that of `eqr_kernels.noise.normal`, drawn inside.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    flat = _flat(weights)
    check.training_rows("differentiable_step", operator, flat, *rows)
    with torch.no_grad():
        out = torch.ops.eqr_kernels.differentiable_step.default(
            *flat, *rows, operator.sizes, operator.constants, noise_scale
        )
    return DifferentiableStepOutput(*out)


def differentiable_step_backward(
    weights: OperatorWeights,
    rows: StepRows,
    of_logits: Tensor,
    of_q_halt: Tensor,
    operator: Operator,
    noise_scale: float,
    workers: int,
) -> Tensor:
    """The gradients of the weights, float32 [all weights], from those of logits and q_halt; see `split_gradients`.

    The last latent recursion is computed again, bit for bit. Gradients are summed by worker, so that the result depends
    on `workers` and the instruction set, not on the number of threads.

    Args:
        weights, operator, noise_scale: those of the forward pass.
        rows: likewise, with its `last_H` and `last_L` as z_H and z_L.
        of_logits: float32 [n, S, V]. of_q_halt: float32 [n]. Contiguous and on CPU.
        workers: at least 1; as many as threads are best.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    flat = _flat(weights)
    _check_backward(operator, flat, rows, of_logits, of_q_halt)
    with torch.no_grad():
        gradients: Tensor = torch.ops.eqr_kernels.differentiable_step_backward.default(
            *flat, *rows, of_logits, of_q_halt, operator.sizes, operator.constants, noise_scale, workers
        )
    return gradients


def _flat(weights: OperatorWeights) -> tuple[Any, ...]:
    *heads, layers = weights
    return (*heads, [tensor for block in layers for tensor in block])


def _check_backward(
    operator: Operator, weights: tuple[Any, ...], rows: StepRows, of_logits: Tensor, of_q_halt: Tensor
) -> None:
    check.training_rows("differentiable_step_backward", operator, weights, *rows)
    n, length = rows.tokens.shape
    check.tensor("of_logits", of_logits, torch.float32, (n, length, operator.sizes[2]))
    check.tensor("of_q_halt", of_q_halt, torch.float32, (n,))


@register_fake("differentiable_step")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    weights, rows, (sizes, constants, _) = arguments[:5], StepRows(*arguments[5:9]), arguments[9:]
    check.training_rows("differentiable_step", Operator(sizes, constants, False), weights, *rows)
    n, length = rows.tokens.shape
    z_H, z_L = rows.z_H, rows.z_L
    outputs = torch.empty_like(z_H), torch.empty_like(z_L), z_H.new_empty(n, length, sizes[2]), z_H.new_empty(n)
    return (*outputs, torch.empty_like(z_H), torch.empty_like(z_L))


@register_fake("differentiable_step_backward")
def _(*arguments: Any) -> Tensor:
    weights, rows, (of_logits, of_q_halt, sizes, constants, *_) = (
        arguments[:5],
        StepRows(*arguments[5:9]),
        arguments[9:],
    )
    _check_backward(Operator(sizes, constants, False), weights, rows, of_logits, of_q_halt)
    *heads, blocks = weights
    return rows.z_H.new_empty(sum(math.prod(w.shape) for w in (*heads, *blocks)))
