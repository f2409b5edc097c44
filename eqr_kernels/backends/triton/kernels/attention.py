"""Self-attention over tokens with an online softmax: no [S, S] matrix is ever held."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def project_qkv(
    u: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, qkv: tl.tensor, p: tl.constexpr
) -> None:
    """Queries and keys, rotated, and values.

    u: [S, width] in the compute dtype. weight: [3 d, width], rows of q, k and v heads. cos, sin: float32 [S, head_dim].
    qkv: [S, p.qkv], of which 3 d are used.
    """
    M: tl.constexpr = p.tile.tokens
    N: tl.constexpr = p.tile.pairs
    C: tl.constexpr = p.tile.columns
    for t0 in range(0, p.S, M):
        t = t0 + tl.arange(0, M)
        for n0 in range(0, p.rotated // 2, N):
            i = n0 + tl.arange(0, N)
            used = i < p.rotated // 2
            # Pair i turns the features `low` and `high` of its head, half an axis apart.
            half: tl.constexpr = p.rope_half
            low = i // half * (2 * half) + i % half
            at = weight + low[None, :] * p.width
            x0 = tl.zeros((M, N), tl.float32)
            x1 = tl.zeros((M, N), tl.float32)
            for k0 in range(0, p.width, p.inner):
                k = k0 + tl.arange(0, p.inner)
                x = tl.load(u + t[:, None] * p.width + k[None, :], mask=t[:, None] < p.S, other=0.0)
                w0 = tl.load(at + k[:, None], mask=used[None, :], other=0.0)
                w1 = tl.load(at + half * p.width + k[:, None], mask=used[None, :], other=0.0)
                x0 = tl.dot(x, w0, x0, input_precision="ieee")
                x1 = tl.dot(x, w1, x1, input_precision="ieee")
            inside = (t[:, None] < p.S) & used[None, :]
            angle = t[:, None] * p.head_dim + (low % p.head_dim)[None, :]
            c = tl.load(cos + angle, mask=inside, other=0.0)
            s = tl.load(sin + angle, mask=inside, other=0.0)
            to = qkv + t[:, None] * p.qkv + low[None, :]
            tl.store(to, (x0 * c - x1 * s).to(qkv.dtype.element_ty), mask=inside)
            tl.store(to + half, (x1 * c + x0 * s).to(qkv.dtype.element_ty), mask=inside)
        for n0 in range(p.rotated, 3 * p.d, C):
            n = n0 + tl.arange(0, C)
            used = n < 3 * p.d
            acc = tl.zeros((M, C), tl.float32)
            for k0 in range(0, p.width, p.inner):
                k = k0 + tl.arange(0, p.inner)
                x = tl.load(u + t[:, None] * p.width + k[None, :], mask=t[:, None] < p.S, other=0.0)
                w = tl.load(weight + n[None, :] * p.width + k[:, None], mask=used[None, :], other=0.0)
                acc = tl.dot(x, w, acc, input_precision="ieee")
            inside = (t[:, None] < p.S) & used[None, :]
            tl.store(qkv + t[:, None] * p.qkv + n[None, :], acc.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def attend(qkv: tl.tensor, out: tl.tensor, p: tl.constexpr) -> None:
    """out = softmax(q k^T / sqrt(head_dim)) v, head by head.

    qkv: [S, p.qkv] in the compute dtype: q heads, k heads, v heads. out: [S, width], of which d are written.
    """
    M: tl.constexpr = p.tile.queries
    P: tl.constexpr = p.tile_head
    j = tl.arange(0, P)
    in_head = j < p.head_dim
    for head in range(0, p.heads):
        column = head * p.head_dim + j
        for q0 in range(0, p.S, M):
            t = q0 + tl.arange(0, M)
            inside = (t[:, None] < p.S) & in_head[None, :]
            q = tl.load(qkv + t[:, None] * p.qkv + column[None, :], mask=inside, other=0.0)
            most = tl.full((M,), float("-inf"), tl.float32)
            total = tl.zeros((M,), tl.float32)
            acc = tl.zeros((M, P), tl.float32)
            for k0 in range(0, p.S, p.tile.keys):
                key = k0 + tl.arange(0, p.tile.keys)
                at = qkv + p.d + key[None, :] * p.qkv + column[:, None]
                k = tl.load(at, mask=(key[None, :] < p.S) & in_head[:, None], other=0.0)
                score = tl.dot(q, k, input_precision="ieee") * p.softmax_scale
                score = tl.where(key[None, :] < p.S, score, float("-inf"))
                new = tl.maximum(most, tl.max(score, 1))
                weight = tl.exp(score - new[:, None])
                shrink = tl.exp(most - new)
                total = total * shrink + tl.sum(weight, 1)
                at = qkv + 2 * p.d + key[:, None] * p.qkv + column[None, :]
                v = tl.load(at, mask=(key[:, None] < p.S) & in_head[None, :], other=0.0)
                acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
                most = new
            value = (acc / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + t[:, None] * p.width + column[None, :], value, mask=inside)
