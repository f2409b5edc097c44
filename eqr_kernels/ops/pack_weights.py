"""The operator's weights in the order in which the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require, require_cuda
from eqr_kernels.ops.operator import Operator, PackedWeights
from eqr_kernels.precision import Precision
from eqr_kernels.reference import OperatorWeights, Rope


def pack_weights(
    weights: OperatorWeights,
    operator: Operator,
    precision: Precision,
    *,
    rope: Rope | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    layout: str = "",
) -> PackedWeights:
    """The weights of an operator as `fixed_point` and `latent_recursions` take them, for the instruction set in use.

    S tokens, d features. All tensors are float32, contiguous and on CPU, or all on one CUDA device, which packs them in
    the order of its current stream; "bf16" and "int8" round here.

    Args:
        weights: with the shapes that `OperatorWeights` has.
        operator: its sizes, of which the shapes follow, and its constants.
        precision: fp32, bf16 or int8; on a CUDA device bf16.
        rope: [S, d / heads] each, where rope_parts of the sizes is not 0.
        start: H_start, L_start [d], the start state of every token, where `operator.fixed_start`.
        layout: on a CUDA device the kernel that is to read them: "throughput_mma", "throughput_wgmma" or "latency".
            Without meaning on CPU.

    Returns:
        Packed weights, good on this machine and for this instruction set or layout only.

    Raises:
        RuntimeError: there is no extension, or none for this device, or a gradient is asked for.
        TypeError, ValueError: an argument is not as above, or the CUDA kernels do not take the operator.
    """
    require()
    if not isinstance(precision, Precision):
        raise TypeError(f"precision must be a Precision, got {precision!r}; use Precision['bf16']")
    embedding, lm_head, q_weight, q_bias, layers = weights
    require_cuda(embedding)
    blocks = [tensor for block in layers for tensor in block]
    cos_sin, starts = rope or (None, None), start or (None, None)
    if operator.fixed_start != (start is not None):
        raise ValueError(f"start must be given where fixed_start, and only there, got {operator.fixed_start}")
    arguments = (embedding, lm_head, q_weight, q_bias, blocks, *cos_sin, *starts, operator.sizes, operator.constants)
    _check(*arguments)
    named = dict(embedding=embedding, lm_head=lm_head, q_weight=q_weight, q_bias=q_bias)
    named |= {f"blocks[{i}]": tensor for i, tensor in enumerate(blocks)}
    check.no_gradient("pack_weights", "backend='reference'", **named, H_start=starts[0], L_start=starts[1])
    data: Tensor = torch.ops.eqr_kernels.pack_weights.default(*arguments, precision.name, layout)
    return PackedWeights(data, operator)


def _check(
    embedding: Tensor,
    lm_head: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    blocks: Sequence[Tensor],
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    H_start: Tensor | None,
    L_start: Tensor | None,
    sizes: Sequence[int],
    constants: Sequence[float],
) -> Operator:
    operator = Operator(sizes, constants, H_start is not None)
    check.weights(operator, embedding, lm_head, q_weight, q_bias, blocks)
    tokens, features, heads, rope_parts = sizes[0], sizes[1], sizes[5], sizes[9]
    angles = (tokens, features // heads if heads else 0)
    twins = (
        ("rope_cos", rope_cos, "rope_sin", rope_sin, angles),
        ("H_start", H_start, "L_start", L_start, (features,)),
    )
    for name, one, twin_name, twin, _ in twins:
        if (one is None) != (twin is None):
            raise ValueError(f"{name} and {twin_name} must both be given or both be None, got one of them")
    if rope_parts != 0 if rope_cos is None else rope_parts == 0:
        raise ValueError(
            f"rope_cos and rope_sin must be given where rope_parts is not 0 and only there, got rope_parts {rope_parts}"
        )
    for name, one, twin_name, twin, shape in twins:
        if one is not None and twin is not None:
            check.tensor(name, one, torch.float32, shape, ("embedding", embedding))
            check.tensor(twin_name, twin, torch.float32, shape, ("embedding", embedding))
    return operator


@register_fake("pack_weights")
def _(embedding: Tensor, *arguments: Any) -> Tensor:
    *others, precision, layout = (*arguments, "")[:12]  # torch leaves out a last argument that is the default
    operator = _check(embedding, *others)
    layout = layout if embedding.device.type == "cuda" else ""
    return embedding.new_empty(require().packed_bytes(*operator, precision, layout), dtype=torch.uint8)
