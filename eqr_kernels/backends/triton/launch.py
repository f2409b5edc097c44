"""Prepares weights, scratch space and tables, and launches the persistent kernel; waits for nothing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.triton.kernels import fixed_point as kernel
from eqr_kernels.backends.triton.plan import Plan
from eqr_kernels.backends.watch import new_control
from eqr_kernels.forking import fork_safe_lock
from eqr_kernels.modules import EqROperator
from eqr_kernels.ops import Tables
from eqr_kernels.precision import Precision
from eqr_kernels.run_rules import HALTING_RULES

NOBODY = torch.iinfo(torch.int64).max
"""In `best`: none of a puzzle's trajectories has settled."""


class Weights(NamedTuple):
    """The model's weights as the kernel reads them: contiguous, in the compute dtype, padded with zeros."""

    embedding: Tensor  # [V, width]
    lm_head: Tensor  # [V, width]
    q_weight: Tensor  # [2, width]
    q_bias: Tensor  # [2]
    mixer_in: Tensor  # [layers, 2 token_hidden, span]; attention: [layers, 3 d, width]
    mixer_out: Tensor  # [layers, S, token_hidden]; attention: [layers, width, width]
    gate_up: Tensor  # [layers, 2 hidden, width]
    down: Tensor  # [layers, width, hidden]
    cos: Tensor  # float32 [S, head_dim], or [1]
    sin: Tensor
    H_start: Tensor  # float32 [width], or [1]
    L_start: Tensor

    @classmethod
    def of(cls, model: EqROperator, dtype: torch.dtype, plan: Plan) -> Weights:
        """Cast and copied anew: that is little work next to a solve, and later changes of the model cannot harm."""
        w, rope = model.weights().to(dtype), model.rope()
        nothing = torch.zeros(1, dtype=torch.float32, device=model.device)
        columns, rows = plan.width - plan.d, plan.width - plan.d
        heads = [pad(weight, (0, columns)) for weight in (w.embedding, w.lm_head, w.q_weight)]
        if plan.heads:
            mixer_in = [pad(block.mixer_in, (0, columns)) for block in w.blocks]
            mixer_out = [pad(block.mixer_out, (0, columns, 0, rows)) for block in w.blocks]
        else:
            mixer_in = [pad(block.mixer_in, (0, plan.span - plan.S)) for block in w.blocks]
            mixer_out = [block.mixer_out for block in w.blocks]
        gate_up = [pad(block.gate_up, (0, columns)) for block in w.blocks]
        down = [pad(block.down, (0, 0, 0, rows)) for block in w.blocks]
        angles = (nothing, nothing) if rope is None else tuple(angle.float().contiguous() for angle in rope)
        starts = (nothing, nothing)
        if model.H_init is not None and model.L_init is not None:
            starts = (pad(model.H_init.float(), (0, columns)), pad(model.L_init.float(), (0, columns)))
        stacked = [torch.stack(weights) for weights in (mixer_in, mixer_out, gate_up, down)]
        return cls(*(weight.contiguous() for weight in (*heads, w.q_bias, *stacked, *angles, *starts)))


def compile_options(plan: Plan) -> dict[str, Any]:
    """Keyword arguments of a launch besides those of the kernel."""
    # Said, because its default changes between versions of Triton.
    return dict(num_warps=plan.tile.warps, num_stages=plan.tile.stages, enable_fp_fusion=True)


def arguments(
    model: EqROperator,
    problem: FixedPointProblem,
    plan: Plan,
    control: Tensor,
    programs: int,
    *,
    parked: bool = False,
) -> tuple[dict[str, Any], Tables]:
    """The kernel's arguments, and the tables among them that it fills.

    Args:
        control: int64 [3], zeros in memory that both host and device reach: [0] is set by the host to cancel, [1]
            and [2] tell how many trajectories have finished and how many outer steps are spent.
        programs: how many run at a time, at least 1.
        parked: for launches of quanta, whose `rows`, `count`, `quantum` and `counters` are set before each.
    """
    p, device = problem, model.device
    n, t = p.tokens.shape[0], p.trajectories
    window = min(p.window, p.depth)  # an older difference does not exist
    w = Weights.of(model, p.dtype, plan)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(programs, *shape, dtype=dtype, device=device)

    def slots(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(t if parked else programs, *shape, dtype=dtype, device=device)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    tables = Tables.empty(p, t, plan.S, plan.V, device)
    c = model.config
    values = dict(
        **w._asdict(),
        tokens=p.tokens.contiguous(),
        ids=p.ids.contiguous(),
        a=scratch(plan.S, plan.width),
        squares=scratch(plan.squares_size),
        u=scratch(plan.S, plan.width, dtype=p.dtype),
        # Zeros where attention's output has padding, which is never written.
        h=scratch(plan.work, dtype=p.dtype).zero_(),
        z=slots(4, plan.S, plan.width),
        logits=slots(2, plan.S, plan.V),
        ring=slots(window),
        parked=integers(0, 0, 0).repeat(t, 1),
        rows=integers(0),
        **table_arguments(tables),
        checkpoints=integers(*(p.checkpoints or (0,))),
        counters=integers(0, 0, 0, 0),
        best=torch.full((n,), NOBODY, device=device),
        control=control,
        trajectories=t,
        count=t,
        quantum=0,
        breadth=p.breadth,
        depth=p.depth,
        seed=p.seed - (1 << 32) if p.seed >> 31 else p.seed,
        halt=int(HALTING_RULES[p.halt]),
        patience=min(p.patience, p.depth + 1),  # more than the depth never comes about, and fits an int32
        window=window,
        race=int(p.race),
        checkpoint_count=len(p.checkpoints),
        trace=int(p.trace),
        layers=plan.layers,
        tol=float(p.tol),
        noise_scale=float(p.noise_scale),
        lambda_=c.lambda_,
        norm_eps=c.rms_norm_eps,
        H_std=c.H_init_std,
        L_std=c.L_init_std,
        p=plan,
    )
    return values, tables


def table_arguments(tables: Tables) -> dict[str, Tensor]:
    """Tables by the names of the kernel's arguments."""
    named = tables._asdict()
    final, residuals = named.pop("logits"), named.pop("residuals")
    return dict(**named, final=final, residuals=residuals if residuals.numel() else residuals.new_empty(1))


# The interpreter keeps its state in globals.
INTERPRETER = fork_safe_lock()


def launch(values: dict[str, Any], plan: Plan, programs: int) -> None:
    """Starts the kernel on the current stream of the current device; in Triton's interpreter, runs it."""
    kernel.fixed_point[(programs,)](**values, **compile_options(plan))


def trial(model: EqROperator, dtype: torch.dtype, trajectories: int = 1, depth: int = 1) -> FixedPointProblem:
    """A problem of one puzzle that runs to its whole depth."""
    tokens = torch.arange(model.config.seq_len, device=model.device)[None] % model.config.vocab_size
    ids = torch.zeros(1, dtype=torch.int64, device=model.device)
    return FixedPointProblem(
        tokens=tokens,
        ids=ids,
        seed=0,
        breadth=trajectories,
        depth=depth,
        halt="none",
        tol=0.0,
        patience=1,
        select="residual",
        window=1,
        noise_scale=model.config.noise_scale,
        checkpoints=(),
        slots=trajectories,
        trace=False,
        precision=Precision(dtype),
    )


_resident: dict[tuple[Plan, torch.dtype, torch.device], int] = {}


def resident_programs(model: EqROperator, dtype: torch.dtype, plan: Plan) -> int:
    """How many programs the model's device, the current one, holds at a time; compiles the kernel if it is not.

    Raises:
        Exception: Triton's reason why the plan cannot be compiled or does not fit; there is no common class.
    """
    key = plan, dtype, model.device
    if key not in _resident:
        values, _ = arguments(model, trial(model, dtype), plan, new_control(model.device), 1)
        compiled = kernel.fixed_point.warmup(**values, **compile_options(plan), grid=(1,))
        compiled._init_handles()
        card = torch.cuda.get_device_properties(model.device)
        threads = plan.tile.warps * 32
        # Registers are given out in steps of 8 a thread; a program takes 1 KiB of shared memory more than it asks for.
        registers = threads * math.ceil(max(compiled.n_regs, 1) / 8) * 8
        by_registers = getattr(card, "regs_per_multiprocessor", 65536) // registers
        by_shared = card.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024)
        by_threads = card.max_threads_per_multi_processor // threads
        _resident[key] = int(card.multi_processor_count * max(1, min(by_registers, by_shared, by_threads)))
    return _resident[key]


VERSION = str(triton.__version__)
