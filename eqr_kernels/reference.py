"""The operator in plain PyTorch: the oracle that every kernel is measured against.

Functions of tensors, without state. n is the batch, S the tokens, d the features, V the vocabulary, k the hidden
units of a SwiGLU, h the heads. RMS-norms and rotary embeddings are computed in float32 (float64 stays float64);
everything else in the dtype of the activations, to which weights must already be cast.
Source: EqR, arXiv 2605.21488, section 3, and the official code's conventions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eqr_kernels.config import EqRConfig

Update = Callable[[Tensor, Tensor, int], Tensor]
"""(z [n, S, d], u [n, S, d], number of the update in its outer step) -> the next z [n, S, d]."""

Layer = Callable[[Tensor], Tensor]
"""x -> y of the same shape: a mixer on the last axis, or all blocks of the module on [n, S, d]."""


class BlockWeights(NamedTuple):
    """Weights of one block. `mixer_in`, `mixer_out` belong to the token SwiGLU or to the attention."""

    mixer_in: Tensor  # mlp_t: [2k(S), S] gate rows first; attention: [3 * h * head_dim, d] q, k, v heads
    mixer_out: Tensor  # mlp_t: [S, k(S)]; attention: [d, h * head_dim]
    gate_up: Tensor  # [2k(d), d] gate rows first
    down: Tensor  # [d, k(d)]


class OperatorWeights(NamedTuple):
    """All weights of the operator, in one dtype."""

    embedding: Tensor  # [V, d]
    lm_head: Tensor  # [V, d]
    q_weight: Tensor  # [2, d]
    q_bias: Tensor  # [2]
    blocks: tuple[BlockWeights, ...]

    def to(self, dtype: torch.dtype) -> OperatorWeights:
        """The same weights in `dtype`; differentiable."""
        blocks = tuple(BlockWeights(*(w.to(dtype) for w in block)) for block in self.blocks)
        heads = (self.lm_head.to(dtype), self.q_weight.to(dtype), self.q_bias.to(dtype))
        return OperatorWeights(self.embedding.to(dtype), *heads, blocks)


class Rope(NamedTuple):
    """Rotary angles' cosine and sine, [S, head_dim], float32 or wider."""

    cos: Tensor
    sin: Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already; any shape."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, any shape; no learned weight."""
    high = wide(x)
    return (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [..., 2k], the gates first -> [..., k]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """W_down (silu(gate) * up) over the last axis: x [..., m], gate_up [2k, m], down [m, k] -> [..., m]."""
    return F.linear(gated(F.linear(x, gate_up)), down)


def rope_angles(
    config: EqRConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Rope | None:
    """Rotary angles of every position, or None where the config has none.

    "rope" rotates the whole head by the token's index; "rope2d" its first half by the row, its second by the column.
    """
    if config.mlp_t or config.pos_encodings == "none":
        return None
    index = torch.arange(config.seq_len, device=device)
    if config.pos_encodings == "rope":
        angles = _rope_axis(config.head_dim, index, config.rope_theta, dtype)
    else:
        width = config.board[1]
        half = config.head_dim // 2
        axes = [_rope_axis(half, position, config.rope_theta, dtype) for position in (index // width, index % width)]
        angles = torch.cat(axes, -1)
    return Rope(angles.cos(), angles.sin())


def _rope_axis(size: int, position: Tensor, theta: float, dtype: torch.dtype) -> Tensor:
    frequency = theta ** -(torch.arange(0, size, 2, dtype=dtype, device=position.device) / size)
    angles = position.to(dtype)[:, None] * frequency
    return torch.cat([angles, angles], -1)  # [S, size]


def _rotate(x: Tensor, rope: Rope, config: EqRConfig) -> Tensor:
    """Rotate-half RoPE of x [n, S, h, head_dim]."""
    parts = 2 if config.pos_encodings == "rope2d" else 1
    high = wide(x)
    split = high.unflatten(-1, (parts, 2, -1))
    half = torch.stack([-split[..., 1, :], split[..., 0, :]], -2).flatten(-3)
    cos, sin = (angle.to(high.dtype)[:, None] for angle in rope)  # [S, 1, head_dim]
    return (high * cos + half * sin).to(x.dtype)


def attend(qkv: Tensor, rope: Rope | None, config: EqRConfig) -> Tensor:
    """Non-causal attention of packed queries, keys and values [n, S, 3d] -> [n, S, d]."""
    n, tokens, _ = qkv.shape
    q, k, v = qkv.view(n, tokens, 3, config.num_heads, config.head_dim).unbind(2)  # [n, S, h, head_dim] each
    if rope is not None:
        q, k = _rotate(q, rope, config), _rotate(k, rope, config)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).reshape(n, tokens, -1)


def attention(x: Tensor, weights: BlockWeights, rope: Rope | None, config: EqRConfig) -> Tensor:
    """Self-attention of x [n, S, d] -> [n, S, d]."""
    return F.linear(attend(F.linear(x, weights.mixer_in), rope, config), weights.mixer_out)


def mix(u: Tensor, mixer: Layer, mlp: Layer, config: EqRConfig) -> Tensor:
    """Token mixing, then channel mixing, each with its residual and RMS-norm. u [n, S, d] -> [n, S, d].

    Args:
        mixer: on [n, d, S] where `mlp_t`, else on [n, S, d].
        mlp: on [n, S, d].
    """
    eps = config.rms_norm_eps
    if config.mlp_t:
        t = u.transpose(1, 2).contiguous()  # [n, d, S]
        u = rms_norm(t + mixer(t), eps).transpose(1, 2).contiguous()
    else:
        u = rms_norm(u + mixer(u), eps)
    return rms_norm(u + mlp(u), eps)


def block(u: Tensor, weights: BlockWeights, rope: Rope | None, config: EqRConfig) -> Tensor:
    """One block of `mix` with its weights. u [n, S, d] -> [n, S, d]."""

    def mixer(x: Tensor) -> Tensor:
        if config.mlp_t:
            return swiglu(x, weights.mixer_in, weights.mixer_out)
        return attention(x, weights, rope, config)

    return mix(u, mixer, lambda x: swiglu(x, weights.gate_up, weights.down), config)


def all_blocks(weights: OperatorWeights, rope: Rope | None, config: EqRConfig) -> Layer:
    """The blocks of the module one after another, as `outer_step` takes them."""

    return lambda u: _through(u, weights.blocks, rope, config)


def _through(u: Tensor, blocks: tuple[BlockWeights, ...], rope: Rope | None, config: EqRConfig) -> Tensor:
    for layer in blocks:
        u = block(u, layer, rope, config)
    return u


def moved(
    z: Tensor,
    u: Tensor,
    eps: Tensor | None,
    blocks: tuple[BlockWeights, ...],
    rope: Rope | None,
    config: EqRConfig,
) -> Tensor:
    """z moved towards the module's output for u, all [n, S, d]: an application and its update in one function."""
    return damped_update(z, _through(u, blocks, rope, config), eps, config.lambda_, config.noise_scale)


def latent_recursion(
    z_H: Tensor, z_L: Tensor, e: Tensor, blocks: Layer, config: EqRConfig, update: Update, first: int
) -> tuple[Tensor, Tensor]:
    """`L_cycles` updates of z_L, then one of z_H. All [n, S, d]; `first` numbers the first update in its outer step."""
    for cycle in range(config.L_cycles):
        z_L = update(z_L, blocks(z_L + (z_H + e)), first + cycle)
    return update(z_H, blocks(z_H + z_L), first + config.L_cycles), z_L


def outer_step(
    z_H: Tensor, z_L: Tensor, e: Tensor, blocks: Layer, config: EqRConfig, update: Update
) -> tuple[Tensor, Tensor]:
    """One outer step, z_H and z_L [n, S, d] -> the next; only its last latent recursion carries a gradient."""
    with torch.no_grad():
        for cycle in range(config.H_cycles - 1):
            z_H, z_L = latent_recursion(z_H, z_L, e, blocks, config, update, cycle * (config.L_cycles + 1))
    return last_recursion(z_H, z_L, e, blocks, config, update)


def last_recursion(
    z_H: Tensor, z_L: Tensor, e: Tensor, blocks: Layer, config: EqRConfig, update: Update
) -> tuple[Tensor, Tensor]:
    """The latent recursion that ends an outer step, and alone carries its gradient. All states [n, S, d]."""
    return latent_recursion(z_H, z_L, e, blocks, config, update, (config.H_cycles - 1) * (config.L_cycles + 1))


def scaled(embedding: Tensor) -> Tensor:
    """Input injection e = sqrt(d) * embedding of the tokens: [n, S, d] -> the same."""
    return math.sqrt(embedding.shape[-1]) * embedding


def embed(tokens: Tensor, weights: OperatorWeights) -> Tensor:
    """Input injection of tokens [n, S] -> [n, S, d]."""
    return scaled(F.embedding(tokens, weights.embedding))


def heads(z_H: Tensor, weights: OperatorWeights) -> tuple[Tensor, Tensor]:
    """Logits [n, S, V] in the forward dtype and the halting logit q_halt [n] in float32 (float64 stays float64)."""
    q = F.linear(z_H[:, 0], weights.q_weight, weights.q_bias)
    return F.linear(z_H, weights.lm_head), wide(q)[:, 0]


def damped_update(z: Tensor, u: Tensor, eps: Tensor | None, lambda_: float, noise_scale: float) -> Tensor:
    """(1 - lambda_) z + lambda_ u + noise_scale eps, all [n, S, d]; eps None adds no noise."""
    out = (1 - lambda_) * z + lambda_ * u
    return out if eps is None or noise_scale == 0 else out + noise_scale * eps
