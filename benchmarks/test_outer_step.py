"""One outer step of the reference backend: milliseconds a trajectory-step, and the share of the machine's GEMM rate.

A call is `solve` at a fixed depth, divided by that depth, so the starts, heads and noise of a query are in it. The GEMM
rate is that of `torch.mm` on 2048 x 2048 matrices in float32, measured in the same run.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import cpu, median_seconds

from eqr_kernels import EqRConfig, EquilibriumReasoner, noise, reference
from eqr_kernels.config import swiglu_size

PRESETS = {"sudoku-small": EqRConfig.sudoku_small(), "sudoku": EqRConfig.sudoku()}
DEPTH = 2


def flops(config: EqRConfig) -> int:
    """Multiply-adds, counted twice, of the matrix products of one outer step of one trajectory."""
    s, d = config.seq_len, config.hidden_size
    assert config.mlp_t, "counts the token SwiGLU"
    token = 3 * s * swiglu_size(s, config.expansion) * d
    channel = 3 * d * swiglu_size(d, config.expansion) * s
    return 2 * (token + channel) * config.layers_per_step


def has_bf16() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))


def error(model: EquilibriumReasoner, tokens: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative error of z after one update of z_L against float64, from the same start and the same noise."""
    rng = noise.make_rng(0, 0, torch.arange(len(tokens)), 0)
    z_H, z_L = model.start(rng)

    def module(dtype: torch.dtype) -> torch.Tensor:
        weights = model.weights().to(dtype)
        u = z_L.to(dtype) + z_H.to(dtype) + reference.embed(tokens, weights)
        for block in weights.blocks:
            u = reference.block(u, block, None, model.config)
        eps = noise.normal(rng, noise.FIRST_UPDATE, tuple(u.shape[1:]), dtype)
        return reference.damped_update(z_L.to(dtype), u, eps, model.config.lambda_, model.config.noise_scale)

    exact = module(torch.float64)
    return ((module(dtype).double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_outer_step(benchmark, preset: str, batch: int, dtype: str) -> None:
    slow = dtype == "bf16" and not has_bf16()
    if slow and (preset == "sudoku" or batch > 1):
        pytest.skip(f"{cpu()} has no bf16 instructions, and emulating them would take minutes a call")
    torch.manual_seed(0)
    model = EquilibriumReasoner(PRESETS[preset]).eval()
    tokens = torch.randint(1, model.config.vocab_size, (batch, model.config.seq_len))
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    relative = error(model, tokens, torch_dtype)
    assert relative < {"fp32": 1e-6, "bf16": 2e-2}[dtype], "the output is wrong: nothing is timed"

    def query() -> object:
        return model.solve(tokens, depth=DEPTH, halt="none", precision=dtype, ids=torch.arange(batch), slots=batch)

    a = torch.randn(2048, 2048)
    seconds = median_seconds({"step": query, "gemm": lambda: a @ a}, seconds=0.5)
    per_step = seconds["step"] / DEPTH / batch
    gemm_rate = 2 * 2048**3 / seconds["gemm"]
    benchmark.extra_info.update(
        preset=preset,
        batch=batch,
        dtype=dtype,
        backend="reference",
        threads=torch.get_num_threads(),
        relative_error=float(f"{relative:.2g}"),
        ms_per_trajectory_step=round(per_step * 1e3, 3),
        gflop_per_s=round(flops(model.config) / per_step / 1e9, 1),
        fp32_gemm_gflop_per_s=round(gemm_rate / 1e9, 1),
        share_of_fp32_gemm_rate=round(flops(model.config) / per_step / gemm_rate, 3),
    )
    rounds = max(1, min(5, math.ceil(1.0 / seconds["step"])))
    benchmark.pedantic(query, rounds=rounds, warmup_rounds=0)
