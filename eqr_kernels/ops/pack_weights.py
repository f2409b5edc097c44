"""The operator's weights in the order in which the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require, require_cuda


def pack_weights(
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
    precision: str,
    layout: str = "",
) -> Tensor:
    """The weights of an operator in the order in which `fixed_point` reads them, for the instruction set in use.

    S tokens, d features, V vocabulary, k(m) hidden units of the SwiGLU on an axis of m, h heads. All tensors are
    float32, contiguous and on CPU, or all on one CUDA device, which packs them in the order of its current stream;
    "bf16" and "int8" round here.

    Args:
        embedding, lm_head: [V, d]. q_weight: [2, d]. q_bias: [2].
        blocks: for each layer mixer_in ([2 k(S), S], gate rows first; with attention [3 d, d]: q, k and v heads),
            mixer_out ([S, k(S)]; with attention [d, d]), gate_up [2 k(d), d] (gate rows first) and down [d, k(d)].
        rope_cos, rope_sin: [S, d / h], or None.
        H_start, L_start: [d], the start state of every token, or None for random ones.
        sizes: tokens, features, vocabulary, mixer_hidden (k(S); 0 with attention), hidden (k(d)), heads (0 without
            attention), layers, H_cycles, L_cycles, rope_parts (0: no rotation; 1: of whole heads; 2: of their halves).
        constants: lambda_, rms_norm_eps, H_init_std, L_init_std.
        precision: "fp32"; "bf16" (operands, with float32 sums and state); "int8" (channel GEMMs, the rest as "bf16").
            On a CUDA device "bf16".
        layout: on a CUDA device the kernel that is to read them: "throughput_mma", "throughput_wgmma" or "latency".
            Without meaning on CPU.

    Returns:
        uint8 [bytes], good on this machine and for this instruction set or layout only.

    Raises:
        RuntimeError: there is no extension, or none for this device, or a gradient is asked for.
        TypeError, ValueError: an argument is not as above, or the CUDA kernels do not take the operator.
    """
    require()
    require_cuda(embedding)
    optional = (rope_cos, rope_sin, H_start, L_start)
    check.pack_weights(embedding, lm_head, q_weight, q_bias, blocks, *optional, sizes, constants, precision)
    named = dict(embedding=embedding, lm_head=lm_head, q_weight=q_weight, q_bias=q_bias)
    named |= {f"blocks[{i}]": tensor for i, tensor in enumerate(blocks)}
    check.no_gradient("pack_weights", "backend='reference'", **named, H_start=H_start, L_start=L_start)
    packed: Tensor = torch.ops.eqr_kernels.pack_weights.default(
        embedding, lm_head, q_weight, q_bias, blocks, *optional, sizes, constants, precision, layout
    )
    return packed


@register_fake("pack_weights")
def _(
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
    precision: str,
    layout: str = "",
) -> Tensor:
    optional = (rope_cos, rope_sin, H_start, L_start)
    check.pack_weights(embedding, lm_head, q_weight, q_bias, blocks, *optional, sizes, constants, precision)
    layout = layout if embedding.device.type == "cuda" else ""
    size = require().packed_bytes(sizes, constants, H_start is not None, precision, layout)
    return embedding.new_empty(size, dtype=torch.uint8)
