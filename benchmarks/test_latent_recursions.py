"""The op latent_recursions in every precision: one latent recursion, with noise, against the same lines of PyTorch.

The error against float64 is at most that of the reference in the same dtype, by the limits of peers/workload.py, before
anything is timed; the eager lines run in the op's precision, or where PyTorch has none in the main one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import PRECISIONS, main_precision, share_of_peak
from oplevel import ROUNDS, Peak, op_info, op_rows, op_table, turns
from peers.workload import DTYPES, ERROR_LIMIT, PRESETS, Operations, Workload, has_bf16, operations, relative_error
from rich.table import Table
from torch import Tensor

from eqr_kernels import ops, reference
from eqr_kernels.backends.packing import PackArguments
from eqr_kernels.precision import Precision

SIZES = {"sudoku-paper": [1, 8], "sudoku-small": [8, 96]}  # batches


def inputs(work: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """z_H, z_L [n, S, d] and the noise eps [L_cycles + 1, n, S, d] of one latent recursion."""
    state = work.model.initial_state(work.batch, ids=torch.arange(work.batch))
    generator = torch.Generator().manual_seed(2)
    eps = torch.randn((work.model.config.L_cycles + 1, *state.z_H.shape), generator=generator)
    return state.z_H, state.z_L, eps


def in_pytorch(work: Workload, z_H: Tensor, z_L: Tensor, eps: Tensor, dtype: torch.dtype) -> Any:
    """One latent recursion of the reference in `dtype`, to call: z_H and z_L [n, S, d], eps as in `inputs`."""
    model, config = work.model, work.model.config
    weights, rope = model.weights().to(dtype), model.rope()
    z_H, z_L, eps = z_H.to(dtype), z_L.to(dtype), eps.to(dtype)
    if rope is not None:
        rope = tuple(table.to(torch.promote_types(dtype, torch.float32)) for table in rope)  # type: ignore[assignment]
    e, blocks = reference.embed(work.tokens, weights), reference.all_blocks(weights, rope, config)

    def update(z: Tensor, u: Tensor, number: int) -> Tensor:
        return reference.damped_update(z, u, eps[number], config.lambda_, config.noise_scale)

    return lambda: reference.latent_recursion(z_H, z_L, e, blocks, config, update, 0)


def check(work: Workload, precision: str) -> dict[str, float]:
    """The op's error after two updates, which amplify little, against float64.

    Raises:
        AssertionError: it is too large, so that nothing may be timed.
    """
    short = Workload(work.preset, 2)
    short.__dict__["model"] = short.short
    z_H, z_L, eps = inputs(short)
    packed = PackArguments.of(short.model).pack(Precision[precision])
    noise_scale = short.model.config.noise_scale
    got = ops.latent_recursions(packed, short.tokens, z_H, z_L, eps, noise_scale=noise_scale, count=1)
    exact = in_pytorch(short, z_H, z_L, eps, torch.float64)()
    errors = {"error": max(relative_error(a, b) for a, b in zip(got, exact, strict=True))}
    limit = ERROR_LIMIT.get(precision, 0.0)
    if precision == "bf16":
        plain = in_pytorch(short, z_H, z_L, eps, torch.bfloat16)()
        errors["error_of_reference"] = max(relative_error(a, b) for a, b in zip(plain, exact, strict=True))
        limit = 1.1 * errors["error_of_reference"]
    assert errors["error"] <= limit, f"the error of a latent recursion is {errors['error']:.2g}, the limit {limit:.2g}"
    return errors


def cost_of_recursion(preset: str) -> Operations:
    """Operations of the matrix products of one latent recursion of one row."""
    config = PRESETS[preset]()
    whole = operations(config)
    return Operations(whole.mixer // config.H_cycles, whole.channel // config.H_cycles)


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("preset", "batch"), [(p, n) for p, batches in SIZES.items() for n in batches])
@torch.no_grad()
def test_latent_recursions(
    benchmark, tables: list[Table], quick: bool, preset: str, batch: int, precision: str
) -> None:
    if quick and (preset, batch) != ("sudoku-small", 8):
        pytest.skip("left out by --quick")
    work = Workload(preset, batch)
    errors = check(work, precision)
    z_H, z_L, eps = inputs(work)
    packed, noise_scale = PackArguments.of(work.model).pack(Precision[precision]), work.model.config.noise_scale

    def op() -> object:
        return ops.latent_recursions(packed, work.tokens, z_H, z_L, eps, noise_scale=noise_scale, count=1)

    theirs = precision if precision == "fp32" or (precision == "bf16" and has_bf16()) else main_precision()
    meter = Peak(("bf16", "int8") if precision == "int8" else (precision,))
    candidates = {"op": op, "eager": in_pytorch(work, z_H, z_L, eps, DTYPES[theirs]), **meter.candidate}
    times = turns(candidates, ROUNDS[quick])
    cost = cost_of_recursion(preset)
    floor = [batch * share_of_peak(cost, precision, rates, 1.0) for rates in meter.of(ROUNDS[quick])]
    rows = op_rows(times, precision, floor=floor)
    tables.append(op_table(f"latent_recursions, {preset}, {batch} rows, eager in {theirs}", rows))
    benchmark.extra_info.update(
        op="latent_recursions",
        preset=preset,
        batch=batch,
        eager_precision=theirs,
        meter=meter.missing,
        **op_info(),
        **errors,
        rows=rows,
    )
    benchmark.pedantic(op, rounds=5, warmup_rounds=1)
