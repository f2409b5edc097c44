"""The state update of rows of any shape, with its noise and its residual, in one pass on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eqr_kernels.ops.triton.philox import normals_by_four

_CHUNK = 1024
"""Elements of a program, and partial sums that are added up at a time."""


@triton.jit
def _update(
    z: tl.tensor,  # [n, size], and so are u, z_prev and out
    u: tl.tensor,
    z_prev: tl.tensor,
    rng: tl.tensor,  # int64 [n, 4]: seed, restart, id, step
    out: tl.tensor,
    partial: tl.tensor,  # float32 [2, n, chunks]: of (out - z_prev)^2, of out^2
    size: tl.tensor,
    chunks: tl.tensor,
    stream: tl.tensor,
    lambda_: tl.tensor,
    noise_scale: tl.tensor,
    measures: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    # On one axis: the others end at 65,535.
    row = (tl.program_id(0) // chunks).to(tl.int64)
    number = tl.program_id(0) % chunks
    element = number.to(tl.int64) * chunk + tl.arange(0, chunk)
    inside = element < size
    at = row * size + element
    value = (1.0 - lambda_) * tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    value += lambda_ * tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    if noise_scale != 0.0:
        seed = tl.load(rng + row * 4).to(tl.uint32)
        restart = tl.load(rng + row * 4 + 1).to(tl.uint32)
        ident = tl.load(rng + row * 4 + 2)
        c1 = (tl.load(rng + row * 4 + 3) * 256 + stream).to(tl.uint32)
        low = (ident & 0xFFFFFFFF).to(tl.uint32)
        high = ((ident >> 32) & 0xFFFFFFFF).to(tl.uint32)
        counter = (number * (chunk // 4) + tl.arange(0, chunk // 4)).to(tl.uint32)
        value += noise_scale * normals_by_four(counter, c1, low, high, seed, restart)
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    if measures:
        kept = tl.where(inside, rounded.to(tl.float32), 0.0)
        moved = kept - tl.load(z_prev + at, mask=inside, other=0.0).to(tl.float32)
        place = partial + tl.program_id(0)
        tl.store(place, tl.sum(moved * moved, 0))
        tl.store(place + tl.num_programs(0), tl.sum(kept * kept, 0))


@triton.jit
def _sum(partial: tl.tensor, total: tl.tensor, chunks: tl.tensor, chunk: tl.constexpr) -> None:
    """Of each row, in an order of its own: partial float32 [rows, chunks] -> total [rows]."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.zeros((chunk,), tl.float32)
    for first in range(0, chunks, chunk):
        at = first + tl.arange(0, chunk)
        kept += tl.load(partial + row * chunks + at, mask=at < chunks, other=0.0)
    tl.store(total + row, tl.sum(kept, 0))


def damped_update(
    z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`eqr_kernels.ops.damped_update` for a GPU, of rows of any shape.

    The same numbers to rounding; a row's, bit for bit, do not depend on the other rows.

    Args:
        z, u: [n, ...] contiguous, float32, bfloat16 or float16, the same for both.
        rng: int64 [n, 4] contiguous. stream, lambda_, noise_scale, z_prev: as there.

    Returns:
        As there: out like z, and with z_prev two sums float32 [n], else [0].
    """
    n = len(z)
    size = z[0].numel() if n else 0
    out = torch.empty_like(z)
    measures = z_prev is not None
    sums = torch.zeros(2, n if measures else 0, dtype=torch.float32, device=z.device)
    if n and size:
        chunk = min(_CHUNK, max(16, triton.next_power_of_2(size)))
        chunks = triton.cdiv(size, chunk)
        partial = torch.empty(2, n, chunks, dtype=torch.float32, device=z.device) if measures else sums
        before = z if z_prev is None else z_prev
        with torch.cuda.device_of(z):
            numbers = (size, chunks, stream, lambda_, noise_scale, measures, chunk)
            # Said, because its default changes between versions of Triton.
            _update[(n * chunks,)](z, u, before, rng, out, partial, *numbers, enable_fp_fusion=True)
            if measures:
                _sum[(2 * n,)](partial, sums, chunks, _CHUNK, enable_fp_fusion=True)
    return out, sums[0], sums[1]
