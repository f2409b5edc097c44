"""A whole training step on the CPU, with optimizer and averages: time, samples/s, share of the registers' peak, ratios.
And the step of a user's own loop, which is a call of the model, the objective and backward.

Every contender has a process of its own, freshly started; it checks its gradients against float64 autograd of the
reference before it times anything, and the processes take turns, the meter of the peak among them. Wrong gradients
fail; slowness does not. The goal is recorded beside what was measured.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from measure import Contender, Field, quotients, ratios, spread
from oplevel import Peak, op_info, op_rows, op_table, turns
from peers.trainer import CONTENDERS, check_gradients, check_step, random_model, trainer_of
from peers.workload import PRESETS, has_bf16, relative_error
from rich.table import Table
from torch import Tensor

from eqr_kernels import EquilibriumReasoner, LatentState, ops
from eqr_kernels.training.objective import objective
from eqr_kernels.training.throughput import training_operations

OURS = "fused"
KERNELS = (OURS, "recursions")
"""Contenders that use kernels of this package."""
CASES = [("sudoku-small", 96), ("sudoku-trm", 16), ("sudoku-trm", 32), ("sudoku-trm", 64), ("sudoku-paper", 16)]
"""Preset and rows."""
OP_CASES = [("sudoku-small", 16), ("sudoku-small", 96), *CASES[1:4]]
QUICK = [("sudoku-small", 96), ("sudoku-small", 16), ("sudoku-trm", 32)]
ROUNDS = {False: 7, True: 5}  # by --quick
GOALS = {("sudoku-small", 96): 0.5, ("sudoku-trm", 32): 0.8, ("sudoku-paper", 16): 0.5}
"""Share of the registers' peak."""


class TrainingField(Field):
    """The contenders of `peers.trainer` for one preset."""

    ours = frozenset({OURS})

    def __init__(self, preset: str, batch: int, threads: int, names: list[str]) -> None:
        super().__init__(preset, batch, threads, [], [])
        self.sample = training_operations(PRESETS[preset]())
        self.wanted = [("meter", "all"), *((name, CONTENDERS[name][0]) for name in names)]

    def _command(self, name: str, precision: str) -> list[str]:
        if name == "meter":
            return super()._command(name, precision)
        return ["benchmarks.peers.trainer", name]

    def _row(self, contender: Contender) -> dict[str, Any]:
        row: dict[str, Any] = {key: value for key, value in contender.info.items() if key != "dtype"}
        row |= {"contender": contender.name, "precision": contender.precision, "threads": self.threads}
        row |= {"preset": self.preset, "batch": self.batch, "peer": contender.name not in KERNELS}
        if not contender.turns:
            return row
        row["rounds"] = len(contender.turns)
        row |= spread("ms_per_step", [1e3 * seconds for seconds in contender.seconds()])
        row |= spread("samples_per_s", [self.batch / seconds for seconds in contender.seconds()])
        if contender.name == OURS:
            others = [c for c in self.contenders if c.name not in (OURS, "meter") and c.turns]
            row |= ratios({c.name: quotients(c.seconds(), contender.seconds()) for c in others})
            if goal := GOALS.get((self.preset, self.batch)):
                row["goal"] = {"share_of_peak": goal}
                row["goal_is_for_this_machine"] = has_bf16() and self.threads == 2
        return row

    def _share(self, contender: Contender, peaks: list[dict[str, float]]) -> dict[str, Any]:
        rates = [self.sample * self.batch / seconds for seconds in contender.seconds()]
        mine = [peak[contender.precision] for peak in peaks]
        return {
            "gop_per_sample": round(self.sample / 1e9, 4),
            "peak_gop_per_s": spread("median", [peak / 1e9 for peak in mine]),
            **spread("gop_per_s", [rate / 1e9 for rate in rates]),
            **spread("share_of_peak", [rate / peak for rate, peak in zip(rates, mine, strict=True)]),
        }


def ids(cases: list[tuple[str, int]], plain: dict[str, str]) -> list[str]:
    """Names of cases; `plain` are those of presets whose results had other names before there were more."""
    return [plain.get(preset, f"{preset}-{batch}").format(batch) for preset, batch in cases]


@pytest.mark.parametrize(
    ("preset", "batch"), CASES, ids=ids(CASES, {"sudoku-small": "sudoku-small", "sudoku-paper": "sudoku-paper"})
)
def test_training_step(benchmark, tables: list[Table], quick: bool, preset: str, batch: int) -> None:
    if quick and (preset, batch) not in QUICK:
        pytest.skip("left out by --quick")
    # Compiling takes most of a minute: of a preset's sizes the first alone meets it.
    few = quick or any(batch > other for name, other in CASES if name == preset)
    names = [OURS, "eager"] if few else list(CONTENDERS)
    baseline = names[1]
    with TrainingField(preset, batch, torch.get_num_threads(), names) as field:
        ours = field.find(OURS, "bf16")
        if ours.process is None:
            pytest.skip(ours.info["skipped"])
        field.take_turns(ROUNDS[quick])
        rows = field.rows()
        tables.append(table(preset, rows))
        benchmark.extra_info.update(preset=preset, batch=field.batch, baseline=baseline, rows=rows)
        benchmark.pedantic(ours.process.request, rounds=1)


def table(preset: str, rows: list[dict[str, Any]]) -> Table:
    """A line for each contender; the last column says how many times as fast as it the fused step is."""
    ours = next(row for row in rows if row["contender"] == OURS)
    shown = Table(title=f"training step of {preset}, {ours['batch']} rows, {ours['threads']} threads")
    peaks = {row["precision"]: row["peak_gop_per_s"] for row in rows if "peak_gop_per_s" in row}
    shown.caption = "peak: " + ", ".join(
        f"{p} {g['median']:.0f} ({g['median_p20']:.0f}-{g['median_p80']:.0f}) Gop/s" for p, g in peaks.items()
    )
    shown.add_column("contender")
    for name in ("ms a step", "its 20-80 %", "samples/s", "Gop/s", "share of peak", "fused is faster"):
        shown.add_column(name, justify="right")
    for row in rows:
        label = f"{row['contender']} {row['precision']}"
        if "ms_per_step" not in row:
            reason = row.get("skipped", "not measured").splitlines()[-1]
            shown.add_row(label, "-", reason if len(reason) < 60 else reason[:57] + "...")
            continue
        share = f"{row['share_of_peak']:.1%}"
        if "goal" in row:
            share += f" (goal {row['goal']['share_of_peak']:.0%})"
        ratio = ours["times_as_fast_as"].get(row["contender"])
        shown.add_row(
            label,
            f"{row['ms_per_step']:.0f}",
            f"{row['ms_per_step_p20']:.0f}-{row['ms_per_step_p80']:.0f}",
            f"{row['samples_per_s']:.1f}",
            f"{row['gop_per_s']:.0f}",
            share,
            "" if ratio is None else f"{ratio:.2f}x",
        )
    return shown


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize(("preset", "batch"), OP_CASES, ids=ids(OP_CASES, {"sudoku-small": "{}"}))
def test_op(benchmark, tables: list[Table], quick: bool, preset: str, batch: int) -> None:
    """The op training_step: outer step, objective and backward pass of a batch, without optimizer and averages."""
    if quick and ((preset, batch) not in QUICK or batch == 96):
        pytest.skip("left out by --quick")
    threads = torch.get_num_threads()
    model = random_model(PRESETS[preset]())
    errors = check_gradients(OURS, PRESETS[preset](), threads)
    ours = trainer_of(OURS, model, batch, threads)
    calls: dict[str, Any] = {"op": ours}
    if has_bf16():  # PyTorch's bf16 is a hundred times as slow without
        calls["eager"] = trainer_of("eager", model, batch, threads)
    errors |= check_step(OURS, ours)
    for trainer in calls.values():
        trainer._replace_halted()
    meter = Peak(("bf16",))
    try:
        candidates = {name: trainer._outer_step for name, trainer in calls.items()} | meter.candidate
        times = turns(candidates, ROUNDS[quick])
        benchmark.pedantic(candidates["op"], rounds=5, warmup_rounds=1)
    finally:
        for trainer in calls.values():
            trainer.close()
    operations = training_operations(PRESETS[preset]()) * batch
    floor = [operations / rates["bf16"] for rates in meter.of(ROUNDS[quick])]
    rows = op_rows(times, "bf16", floor=floor)
    tables.append(op_table(f"training_step, {preset}, {batch} rows", rows))
    benchmark.extra_info.update(
        op="training_step", preset=preset, batch=batch, meter=meter.missing, **op_info(), **errors, rows=rows
    )


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize(("preset", "batch"), OP_CASES, ids=ids(OP_CASES, {"sudoku-small": "{}"}))
def test_own_loop(benchmark, tables: list[Table], quick: bool, preset: str, batch: int) -> None:
    """`model(tokens, state)` under autocast, the objective and backward; beside it the same through the modules."""
    if quick and ((preset, batch) not in QUICK or batch == 96):
        pytest.skip("left out by --quick")
    config = PRESETS[preset]()
    errors = check_own_loop(random_model(config, H_cycles=2, L_cycles=1))
    model = random_model(config)
    rows = OwnRows.of(model, batch)
    calls: dict[str, Any] = {"op": lambda: rows.step(model, torch.bfloat16, True)}
    if has_bf16():  # PyTorch's bf16 is a hundred times as slow without
        calls["eager"] = lambda: rows.step(model, torch.bfloat16, False)
    calls["eager-fp32"] = lambda: rows.step(model, torch.float32, False)
    times = turns(calls, ROUNDS[quick])
    benchmark.pedantic(calls["op"], rounds=1)
    op_results = op_rows(times, "bf16")
    for row in op_results:
        row["precision"] = "fp32" if row["contender"] == "eager-fp32" else row["precision"]
        row["samples_per_s"] = round(1e6 * batch / row["us"], 1)
    shown = op_table(f"own loop, {preset}, {batch} rows", op_results)
    shown.caption = ", ".join(f"{row['contender']}: {row['samples_per_s']:.1f} samples/s" for row in op_results)
    tables.append(shown)
    benchmark.extra_info.update(
        op="differentiable_step", preset=preset, batch=batch, **op_info(), **errors, rows=op_results
    )


class OwnRows(NamedTuple):
    """What a user's loop has: n rows."""

    tokens: Tensor  # int64 [n, S]
    labels: Tensor  # int64 [n, S]
    state: LatentState

    @classmethod
    def of(cls, model: EquilibriumReasoner, n: int) -> OwnRows:
        generator = torch.Generator().manual_seed(0)
        shape = (n, model.config.seq_len)
        tokens, labels = (torch.randint(1, model.config.vocab_size, shape, generator=generator) for _ in range(2))
        return cls(tokens, labels, model.initial_state(n, seed=0))

    def step(self, model: EquilibriumReasoner, dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor]:
        """z_H after a step of the loop, and all gradients in one."""
        model.fused = fused
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            assert model.step_kernel(self.tokens, self.state).startswith("fused") == fused
            state, logits, q_halt = model(self.tokens, self.state)
        gradients = torch.autograd.grad(objective(logits, q_halt, self.labels)[0], list(model.parameters()))
        return state.z_H, torch.cat([g.flatten() for g in gradients])


def check_own_loop(model: EquilibriumReasoner) -> dict[str, float]:
    """Errors of a short step of the loop, of three rows, against the modules in float64.

    Raises:
        AssertionError: they are greater than those of the modules in bfloat16, so that nothing may be timed.
    """
    rows, exact = OwnRows.of(model, 3), copy.deepcopy(model).double()
    state = rows.state._replace(z_H=rows.state.z_H.double(), z_L=rows.state.z_L.double())
    want = rows._replace(state=state).step(exact, torch.float64, False)
    theirs, ours = (rows.step(model, torch.bfloat16, fused) for fused in (False, True))
    errors = {}
    for name, a, b, c in zip(("z_H", "gradient"), ours, theirs, want, strict=True):
        error, limit = relative_error(a, c), 1.1 * relative_error(b, c)
        assert error <= limit, f"the error of {name} is {error:.2g}, the limit {limit:.2g}"
        errors[f"{name}_error"] = error
    return errors
