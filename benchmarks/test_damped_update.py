"""The op damped_update against the eager PyTorch lines that it replaces, and against a copy of as many bytes.

Ratios and bandwidths are medians of interleaved calls in this run. The op draws its own counter-based noise and rounds
once; the eager lines draw with `torch.randn_like`.
"""

from __future__ import annotations

import pytest
import torch
from oplevel import NAMES, ROUNDS, copying, op_info, op_rows, op_table, turns
from rich.table import Table
from torch import Tensor

from eqr_kernels import noise, ops, reference

LAMBDA, STREAM = 0.95, 2
SHAPES = {"sudoku-paper": (8, 81, 512), "sudoku-small": (32, 81, 128), "sudoku-paper-alone": (1, 81, 512)}


def eager(
    z: Tensor, u: Tensor, noise_scale: float, z_prev: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z, u, z_prev [n, S, d] -> out [n, S, d] and the two squared norms [n]"""
    out = (1 - LAMBDA) * z + LAMBDA * u
    if noise_scale:
        out = out + noise_scale * torch.randn_like(z)
    if z_prev is None:
        return out, None, None
    wide = out.float()
    return out, (wide - z_prev.float()).square().sum((1, 2)), wide.square().sum((1, 2))


def check(z: Tensor, u: Tensor, rng: Tensor, noise_scale: float, z_prev: Tensor | None) -> None:
    """The op's error against float64 is at most 1.1 times that of the reference in the same dtype."""
    shape = tuple(z.shape[1:])
    exact = reference.damped_update(
        z.double(), u.double(), noise.normal(rng, STREAM, shape, torch.float64), LAMBDA, noise_scale
    )
    same = reference.damped_update(z, u, noise.normal(rng, STREAM, shape, z.dtype), LAMBDA, noise_scale)
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, STREAM, LAMBDA, noise_scale, z_prev)
    assert (out - exact).norm() <= 1.1 * (same - exact).norm()
    if z_prev is not None:
        torch.testing.assert_close(norm_sq.double(), out.double().square().sum((1, 2)), rtol=1e-6, atol=0)
        torch.testing.assert_close(diff_sq.double(), (out.double() - z_prev).square().sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("residual", [False, True], ids=["update", "update+norms"])
@pytest.mark.parametrize("noise_scale", [0.01, 0.0], ids=["noise", "quiet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SHAPES)
@torch.no_grad()
def test_damped_update(
    benchmark, tables: list[Table], quick: bool, size: str, dtype: torch.dtype, noise_scale: float, residual: bool
) -> None:
    if quick and (size != "sudoku-paper" or not noise_scale):
        pytest.skip("left out by --quick")
    torch.manual_seed(0)
    n = SHAPES[size][0]
    z, u, z_prev = (torch.randn(SHAPES[size]).to(dtype) for _ in range(3))
    previous = z_prev if residual else None
    rng = noise.make_rng(0, 0, torch.arange(n), 0)
    check(z, u, rng, noise_scale, previous)

    def op() -> object:
        return ops.damped_update(z, u, rng, STREAM, LAMBDA, noise_scale, previous)

    moved = (4 if residual else 3) * z.nbytes  # read z, u and perhaps z_prev, write out
    candidates = {"op": op, "eager": lambda: eager(z, u, noise_scale, previous), "copy": copying(moved)}
    times = turns(candidates, ROUNDS[quick])
    rows = op_rows(times, NAMES[dtype], moved=moved)
    noisy, norms = "with noise" if noise_scale else "without noise", " and norms" if residual else ""
    tables.append(op_table(f"damped_update, {size} {list(SHAPES[size])}, {noisy}{norms}", rows))
    benchmark.extra_info.update(op="damped_update", shape=list(SHAPES[size]), **op_info(), rows=rows)
    benchmark.pedantic(op, rounds=5, warmup_rounds=1)
