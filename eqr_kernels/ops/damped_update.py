"""The state update of one module application, with its noise and its residual, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require


def damped_update(
    z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The state update of one module application, in one pass: out = (1 - lambda_) z + lambda_ u + noise_scale eps.

    eps are the standard normals of (`rng`, `stream`) as `eqr_kernels.noise.normal` defines them (equal to rounding, the
    words behind them bit for bit), drawn inside. All arithmetic is in float32, with one rounding to the dtype of z. The
    result does not depend, bit for bit, on the number of threads, on the instruction set or on the other rows.

    Args:
        z, u: [n, S, d] contiguous, float32 or bfloat16, the same for both.
        rng: [n, 4] int64: (seed, restart, id, step) of each row.
        stream: 0..255.
        lambda_, noise_scale: finite; noise_scale >= 0, and 0 draws nothing.
        z_prev: like z, the state to measure the residual against, or None.

    Returns:
        out, like z; with z_prev also diff_sq and norm_sq, float32 [n]: sum (out - z_prev)^2 and sum out^2 over the
        rounded out, accumulated in float32 in a fixed order; else both are of shape [0]. Values that are not finite
        pass through, each in its own row.

    Raises:
        RuntimeError: there is no extension, or a gradient is asked for.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    _check(z, u, rng, z_prev)
    check.no_gradient("damped_update", "eqr_kernels.reference.damped_update to train", z=z, u=u, z_prev=z_prev)
    for name, tensor in (("z", z), ("u", u), ("z_prev", z_prev)):
        if tensor is not None:
            check.on_cpu(name, tensor)
    out, diff_sq, norm_sq = torch.ops.eqr_kernels.damped_update.default(z, u, rng, stream, lambda_, noise_scale, z_prev)
    return out, diff_sq, norm_sq


def _check(z: Tensor, u: Tensor, rng: Tensor, z_prev: Tensor | None) -> None:
    if not isinstance(z, Tensor) or z.dtype not in (torch.float32, torch.bfloat16):
        got = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"z must be a float32 or bfloat16 tensor, got {got}; convert it, or use backend='reference'")
    if z.ndim != 3 or not z.is_contiguous():
        raise ValueError(f"z must be contiguous [n, S, d], got shape {list(z.shape)}, strides {z.stride()}")
    for name, tensor in (("u", u), ("z_prev", z_prev)):
        if tensor is None and name == "z_prev":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != z.dtype:
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of the dtype of z, {z.dtype}, got {got}")
        if tensor.shape != z.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and of the shape of z, {list(z.shape)}, got shape {list(tensor.shape)}, "
                f"strides {tensor.stride()}; use {name}.contiguous()"
            )
    check.rng(rng)
    if rng.shape[0] != z.shape[0]:
        raise ValueError(f"rng must have one row for each of the {z.shape[0]} rows of z, got {rng.shape[0]}")


@register_fake("damped_update")
def _(
    z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(z, u, rng, z_prev)
    rows = 0 if z_prev is None else z.shape[0]
    sums = z.new_empty(rows, dtype=torch.float32)
    return torch.empty_like(z), sums, torch.empty_like(sums)
