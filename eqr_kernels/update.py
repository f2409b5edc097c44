"""The state update of any operator, with noise and residual: by a fused op where there is one, else in PyTorch."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from eqr_kernels import noise, ops, reference
from eqr_kernels.ops.triton import interpreting


def why_not_fused_update(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `ops.damped_update` cannot serve there, or None when it can."""
    built, reason = ops.extension_status()
    if not built:
        return reason
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"damped_update is compiled for float32 and bfloat16 on CPU, not for {dtype} on {device.type}"
    return None


FusedUpdate = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`ops.damped_update`, or its twin for a GPU."""


def fused_update(device: torch.device, dtype: torch.dtype) -> FusedUpdate | None:
    """The op that updates states there in one pass: compiled on the CPU, in Triton on a GPU; None: there is none."""
    if why_not_fused_update(device, dtype) is None:
        return ops.damped_update
    kept = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if device.type == "cuda" and kept and _triton_compiles() and not interpreting():
        # Here, since Triton is optional.
        from eqr_kernels.ops.triton import damped_update as kernel

        return kernel.damped_update
    return None


@functools.cache
def _triton_compiles() -> bool:
    # It builds what launches a kernel in C, when the kernel is first used.
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return find_spec("triton") is not None and compiler is not None


def damped_update(
    z: Tensor,
    u: Tensor,
    rng: Tensor,
    stream: int,
    lambda_: float,
    noise_scale: float,
    z_prev: Tensor | None,
    fused: FusedUpdate | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - lambda_) z + lambda_ u + noise_scale eps, and how far that is from z_prev.

    Args:
        z, u: [n, ...], of one dtype.
        rng: int64 [n, 4] and stream: key the noise, see `eqr_kernels.noise`.
        z_prev: like z, or None.
        fused: the op to use; None: PyTorch.

    Returns:
        The update, like z, and with z_prev ||out - z_prev||^2 and ||out||^2 of each row, float32 (float64 stays
        float64) [n]; else nothing of use.
    """
    if fused is not None:
        shape = z.shape if z.ndim == 3 else (len(z), 1, z[0].numel() if len(z) else 0)
        prev = None if z_prev is None else z_prev.reshape(shape).contiguous()
        flat = (z.reshape(shape).contiguous(), u.reshape(shape).contiguous())
        out, change, size = fused(*flat, rng, stream, lambda_, noise_scale, prev)
        return out.view(z.shape), change, size
    eps = noise.normal(rng, stream, tuple(z.shape[1:]), z.dtype) if noise_scale else None
    out = reference.damped_update(z, u, eps, lambda_, noise_scale)
    return (out, *((out[:0], out[:0]) if z_prev is None else squares(out, z_prev)))


def squares(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """||after - before||^2 and ||after||^2 of each row [n], of [n, ...]."""
    wide = reference.wide(after).flatten(1)
    return (wide - reference.wide(before).flatten(1)).square().sum(1), wide.square().sum(1)


def residual(squared: list[tuple[Tensor, Tensor]]) -> Tensor:
    """r = ||z - z_prev|| / ||z|| over all tensors of a state, float32 [n] (EqR, arXiv 2605.21488, section 4).

    Args:
        squared: of each tensor ||z - z_prev||^2 and ||z||^2 [n].
    """
    change, size = (sum(parts[1:], parts[0]) for parts in zip(*squared, strict=True))
    # A state that is zero and stays so has settled: 0 / 0 counts as 0.
    return torch.sqrt(change / size).masked_fill((change == 0) & (size == 0), 0.0).float()
