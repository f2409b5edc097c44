"""One outer step by the fused kernels as an autograd function: in bfloat16 on CPU, for the user's own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eqr_kernels import ops
from eqr_kernels.backends.cpu import why_not_cpu
from eqr_kernels.backends.packing import operator_of, padded_block
from eqr_kernels.modifications import modification
from eqr_kernels.modules import EqROperator, LatentState, has_values
from eqr_kernels.precision import Precision
from eqr_kernels.reference import BlockWeights, OperatorWeights


class StepOutput(NamedTuple):
    """What an outer step of n rows gives: S tokens, d features, V vocabulary."""

    z_H: Tensor  # [n, S, d], detached
    z_L: Tensor  # [n, S, d], detached
    logits: Tensor  # [n, S, V]
    q_halt: Tensor  # float32 [n]


def why_not_trained(model: EqROperator) -> str | None:
    """Why the kernels of training have no operator such as the model's, with the remedy; None where they have."""
    if not model.config.mlp_t:
        return "the fused kernel trains token mixing by a SwiGLU only (mlp_t=True)"
    return why_not_cpu(model, Precision.bf16)


def why_not_differentiable(model: EqROperator, tokens: Tensor, state: LatentState) -> str | None:
    """Why `differentiable_step` cannot stand for a step through the modules at this place; None where it can.

    Args:
        tokens: int64 [n, S]. state: of the same n rows. Both checked.
    """
    if torch.compiler.is_compiling():
        return "torch.compile compiles the modules"
    parameters = list(model.parameters())
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
        return "no gradient of a weight is wanted"
    if (dtype := _arithmetic(model)) != torch.bfloat16:
        return (
            f"the arithmetic is {dtype}, and that of the fused kernel bfloat16; use torch.autocast('cpu', "
            "torch.bfloat16) or model.bfloat16()"
        )
    if why := why_not_trained(model):
        return why
    if len(tokens) == 0:
        return "there are no rows"
    if model.config.H_cycles == 1 and (state.z_H.requires_grad or state.z_L.requires_grad):
        return "a gradient of the state is wanted, and the fused kernel has those of the weights only"
    for tensor in (tokens, *state, *parameters):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not has_values(tensor):
            return f"a {type(tensor).__module__}.{type(tensor).__qualname__} is no plain tensor with values"
        if tensor.is_floating_point() and tensor.dtype != model.dtype:
            return f"weights are {model.dtype} and {tensor.dtype}; convert the model with model.to(dtype)"
    if forward_ad._current_level >= 0:
        return "forward-mode gradients are wanted, and the fused kernel has those of backward only"
    return modification(model, training=True)


def _arithmetic(model: EqROperator) -> torch.dtype:
    """The dtype in which the model's linear layers compute now."""
    device = model.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.dtype


def differentiable_step(model: EqROperator, tokens: Tensor, state: LatentState, noise_scale: float) -> StepOutput:
    """One outer step, whose logits and q_halt have gradients by the model's weights (`why_not_differentiable`).

    Of the forward pass only the states before the last latent recursion are kept, float32 [n, S, d] twice (and float32
    copies of weights that are not); backward computes that recursion again.

    Args:
        tokens: int64 [n, S]. state: of the same n rows.
        noise_scale: at least 0.

    Returns:
        States in the dtype of the weights, logits in bfloat16 as a linear layer's.
    """
    weights = list(_float32(model))
    z_H, z_L = (z.detach().float().contiguous() for z in (state.z_H, state.z_L))
    rows = ops.StepRows(tokens.contiguous(), z_H, z_L, state.rng)
    with torch.autocast("cpu", enabled=False):
        new_H, new_L, logits, q_halt = _Step.apply(rows, operator_of(model), float(noise_scale), *weights)
    return StepOutput(new_H.to(model.dtype), new_L.to(model.dtype), logits.bfloat16(), q_halt)


def _float32(model: EqROperator) -> Iterator[Tensor]:
    """The weights as the op takes them, each with its history."""
    w = model.weights()
    blocks = (padded_block(block, model.config) for block in w.blocks)
    for tensor in (w.embedding, w.lm_head, w.q_weight, w.q_bias, *(tensor for block in blocks for tensor in block)):
        yield tensor.float().contiguous()


def _named(flat: tuple[Tensor, ...]) -> OperatorWeights:
    embedding, lm_head, q_weight, q_bias, *blocks = flat
    return OperatorWeights(
        embedding, lm_head, q_weight, q_bias, tuple(BlockWeights(*blocks[i : i + 4]) for i in range(0, len(blocks), 4))
    )


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: ops.StepRows, operator: ops.Operator, noise_scale: float, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = ops.differentiable_step(_named(weights), rows, operator, noise_scale)
        ctx.save_for_backward(rows.tokens, out.last_H, out.last_L, rows.rng, *weights)
        ctx.operator, ctx.noise_scale, ctx.workers = operator, noise_scale, torch.get_num_threads()
        ctx.mark_non_differentiable(out.z_H, out.z_L)
        ctx.set_materialize_grads(False)
        return out.z_H, out.z_L, out.logits, out.q_halt

    @staticmethod
    def backward(ctx: Any, _H: None, _L: None, of_logits: Tensor | None, of_q_halt: Tensor | None) -> tuple[Any, ...]:
        # Who asked for a graph of the gradient would get one in which this part is missing.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused step of a model gives first derivatives only, and a graph of the gradient was asked for "
                "(create_graph=True); set model.fused = False before the step"
            )
        saved = ctx.saved_tensors
        rows, weights = ops.StepRows(*saved[:4]), saved[4:]
        n, length = rows.tokens.shape
        # An objective need not look at both.
        of_logits = rows.z_H.new_zeros(n, length, len(weights[0])) if of_logits is None else of_logits.contiguous()
        of_q_halt = rows.z_H.new_zeros(n) if of_q_halt is None else of_q_halt.contiguous()
        flat = ops.differentiable_step_backward(
            _named(weights), rows, of_logits, of_q_halt, ctx.operator, ctx.noise_scale, ctx.workers
        )
        gradients = ops.split_gradients(flat, weights)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *(g if want else None for g, want in zip(gradients, wanted, strict=True))
