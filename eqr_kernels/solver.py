"""`solve`: every row to its fixed point, deeper and broader, each trajectory stopping when it has settled."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eqr_kernels import backends, noise, selection
from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends import FixedPointProblem, Snapshot, Status
from eqr_kernels.modules import EqROperator, check_ids, check_tokens
from eqr_kernels.precision import NAMED, Precision, names
from eqr_kernels.run_rules import HALTING_RULES
from eqr_kernels.trajectory import settled

DEFAULT_DEPTH = 64
"""Outer steps at most, of `solve` and of the commands."""
DEFAULT_SLOTS = 64

Progress = Callable[[int, int, int], "bool | None"]
"""(trajectories finished, trajectories, outer steps spent) -> False to cancel what is left."""


@dataclass
class Recorded:
    """All trajectories at one checkpoint: as they were after that many outer steps, or as they ended before.

    Attributes:
        preds: int64 [N, S], the answer selected at this depth; restart: int64 [N], the trajectory it comes from.
        converged: bool [N], its halting rule had fired.
        all_preds: int64 [N, B, S]. all_score, all_q_halt, all_residual: float32 [N, B]. all_steps: int64 [N, B].
        all_status: int64 [N, B]; one that was still going counts as MAX_DEPTH.
    """

    preds: Tensor
    restart: Tensor
    converged: Tensor
    all_preds: Tensor
    all_score: Tensor
    all_q_halt: Tensor
    all_residual: Tensor
    all_steps: Tensor
    all_status: Tensor


@dataclass
class SolveResult:
    """Answers of N puzzles from B trajectories each. S tokens, V vocabulary; on the model's device.

    Attributes:
        preds: int64 [N, S], the selected answers.
        logits: float32 [N, S, V] of the selected trajectories.
        q_halt, residual, score: float32 [N], of the selected trajectories when they ended.
        steps: int64 [N], outer steps of the selected trajectories.
        restart: int64 [N], which trajectory was selected.
        converged: bool [N], its halting rule had fired.
        nfe: int64 [N], outer steps really spent on each puzzle, all trajectories together.
        backend, backend_reason: what ran, and why.
        all_steps, all_status: int64 [N, B]; all_residual, all_score, all_q_halt: float32 [N, B].
        all_preds: int64 [N, B, S] with `return_all`, else None.
        at: for each of `checkpoints`, all trajectories at that depth.
        residuals: float32 [N, B, depth] with `trace`, NaN after a trajectory's end; else None.
    """

    preds: Tensor
    logits: Tensor
    q_halt: Tensor
    residual: Tensor
    score: Tensor
    steps: Tensor
    restart: Tensor
    converged: Tensor
    nfe: Tensor
    backend: str
    backend_reason: str
    all_steps: Tensor
    all_residual: Tensor
    all_score: Tensor
    all_q_halt: Tensor
    all_status: Tensor
    all_preds: Tensor | None = None
    at: dict[int, Recorded] = field(default_factory=dict)
    residuals: Tensor | None = None


def solve(
    model: EqROperator,
    tokens: Tensor,
    *,
    depth: int = DEFAULT_DEPTH,
    breadth: int = 1,
    halt: str = "residual",
    tol: float | str = "auto",
    patience: int = 1,
    select: str = "residual",
    window: int | None = None,
    noise_scale: float | None = None,
    seed: int = 0,
    ids: Tensor | None = None,
    checkpoints: Sequence[int] = (),
    slots: int | None = None,
    backend: str = "auto",
    precision: str = "auto",
    return_all: bool = False,
    trace: bool = False,
    progress: Progress | None = None,
) -> SolveResult:
    """Iterates `breadth` trajectories of every row until each has settled, and selects one answer a row.

    The residual of outer step k is r_k = ||z_k - z_{k-1}|| / ||z_k|| over (z_H, z_L); the score of a trajectory is the
    mean over its last `window` steps of mean over tokens of ||logits_k - logits_{k-1}||_2 (EqR, arXiv 2605.21488,
    section 4). Memory does not grow with depth, and only `slots` trajectories are in flight at a time.

    Args:
        model: the reasoner; its mode (train or eval) does not matter, no gradient is taken.
        tokens: integers [N, S] in 0..V-1.
        depth: outer steps at most, for each trajectory.
        breadth: trajectories B a row, from different random starts.
        halt: a rule of `run_rules.Halt`: "residual" (r <= tol for `patience` steps in a row), "q" (q_halt > 0), "none".
        tol: for "residual"; "auto" takes the tolerance of the model's card.
        patience: see `halt`.
        select: "residual" (settled first, then the lowest score), "vote" (the most common answer, then the score),
            "q" (highest q_halt) or "first" (fewest steps: a race, whose losers are cancelled).
        window: of the score; None takes the card's, else 3.
        noise_scale: of the noise injection; None takes the card's, else the config's.
        seed: 0 to 2**32 - 1.
        ids: int64 [N], key the random stream; by default a hash of each row's tokens, so that a puzzle gets the same
            trajectories in any company.
        checkpoints: depths at which all trajectories are also recorded, see `SolveResult.at`.
        slots: trajectories in flight at most; None takes 64, or what keeps a device busy. (The cpu backend has one for
            each thread, the cuda backend one for each multiprocessor, or one in its latency regime.)
        backend: "auto", "cpu", "reference", ...; see `eqr_kernels.backends`.
        precision: "auto" (the dtype of the weights), "fp32", "bf16" or "int8" (channel GEMMs with weights scaled per
            output channel and activations per row; the rest as in "bf16").
        return_all: also return every trajectory's answer.
        trace: also return every residual (the one thing that grows with depth).
        progress: called with (trajectories finished, of how many, outer steps spent) at the beginning, now and then (by
            the reference backend at every step), and at the end; returning False cancels what is left, and the result
            holds what there is.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; the message says what is allowed.
        RuntimeError: no calibrated tolerance for tol="auto", non-finite weights, or a backend that cannot run here.
    """
    tokens = check_tokens(tokens, model.config).to(model.device)
    n = tokens.shape[0]
    for name, value in (("depth", depth), ("breadth", breadth), ("patience", patience)):
        _check_count(name, value)
    if slots is not None:
        _check_count("slots", slots)
    if depth >= 1 << 24 or breadth >= 1 << 32:
        raise ValueError(f"depth must be below 2**24 and breadth below 2**32, got {depth} and {breadth}")
    window = _check_count("window", model.inference_window if window is None else window)
    _check_choice("halt", halt, HALTING_RULES)
    _check_choice("select", select, selection.RULES)
    if select == "first" and halt == "none":
        raise ValueError('select="first" needs a halting rule, got halt="none"; use halt="residual" or halt="q"')
    seed = noise.check_word("seed", seed, 32)
    if noise_scale is None:
        noise_scale = model.inference_noise_scale
    _check_number("noise_scale", noise_scale)
    tolerance = _tolerance(model, halt, tol, noise_scale)
    checkpoints = tuple(sorted({_check_count("checkpoints", c) for c in checkpoints}))
    if checkpoints and checkpoints[-1] > depth:
        raise ValueError(f"checkpoints must be at most depth={depth}, got {checkpoints[-1]}; raise depth")
    computed_in = precision_of(model, precision)
    _check_finite(model)
    ids = noise.hash_tokens(tokens) if ids is None else check_ids(ids, n).to(model.device)
    chosen, reason = backends.choose(backend, model, computed_in)
    problem = FixedPointProblem(
        tokens=tokens,
        ids=ids,
        seed=seed,
        breadth=breadth,
        depth=depth,
        halt=halt,
        tol=tolerance,
        patience=patience,
        select=select,
        window=min(window, depth),
        noise_scale=noise_scale,
        checkpoints=checkpoints,
        slots=min(slots or DEFAULT_SLOTS, n * breadth),
        trace=trace,
        precision=computed_in,
        slots_asked=slots is not None,
    )
    collector = _Collector(problem)

    def proceed(finished: int, spent: int) -> bool:
        return progress is None or progress(finished, problem.trajectories, spent) is not False

    with nvtx_range(f"eqr solve: {n} x {breadth} trajectories, {chosen.name}"):
        with nvtx_range(f"eqr fixed point: {chosen.name}"):
            chosen.fixed_point(model, problem, collector, proceed)
        with nvtx_range("eqr selection"):
            return collector.result(chosen.name, "; ".join([reason, *collector.notes]), return_all)


def _check_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return float(value)


def _tolerance(model: EqROperator, halt: str, tol: float | str, noise_scale: float) -> float:
    if halt != "residual":
        return 0.0
    if tol == "auto":
        if model.card is None or model.card.tol is None:
            raise RuntimeError(
                'tol="auto" needs a calibrated tolerance, and this model\'s card has none; find one with '
                '`eqr calibrate --model MODEL PUZZLES`, or pass tol=, or halt="none" for a fixed depth'
            )
        tol = model.card.tol
    if isinstance(tol, str):
        raise ValueError(f'tol must be "auto" or a positive number, got {tol!r}')
    tol = _check_number("tol", tol)
    floor = noise.noise_floor(noise_scale)
    if tol < floor:
        warnings.warn(
            f"tol={tol:g} is below {floor:g}, about the residual that noise_scale={noise_scale:g} alone leaves: no "
            "trajectory will converge; raise tol or lower noise_scale",
            stacklevel=4,
        )
    return tol


def precision_of(model: EqROperator, name: str) -> Precision:
    """What `precision=` of `solve` stands for: "auto" for the dtype of the model's weights.

    Raises:
        ValueError: no such precision.
        RuntimeError: no backend has it.
    """
    if name == "auto":
        return Precision.of_weights(model.dtype)
    if name == "fp8":
        raise RuntimeError(f"precision='fp8' has no backend in this version; use auto, {names(NAMED)}")
    _check_choice("precision", name, ("auto", *(precision.name for precision in NAMED)))
    return Precision[name]


def _check_finite(model: EqROperator) -> None:
    for name, weight in model.state_dict().items():
        # One pass, and no copy: NaN and infinities are among the extremes.
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise RuntimeError(
                f"weight {name} holds {int((~weight.isfinite()).sum())} non-finite values; load a sound checkpoint"
            )


class _Table:
    """What is known of every trajectory, flat [N * B, ...]."""

    def __init__(self, problem: FixedPointProblem) -> None:
        t, device = problem.trajectories, problem.tokens.device
        self.preds = torch.zeros(t, problem.tokens.shape[1], dtype=torch.int64, device=device)
        self.q_halt, self.residual, self.score = torch.full((3, t), torch.nan, device=device)
        self.steps = torch.zeros(t, dtype=torch.int64, device=device)
        self.status = torch.full((t,), int(Status.MAX_DEPTH), dtype=torch.int64, device=device)

    def put(self, rows: Snapshot) -> None:
        for name in ("preds", "q_halt", "residual", "score", "steps", "status"):
            getattr(self, name)[rows.number] = getattr(rows, name)


class _Collector:
    """Records trajectories as they come, and selects at the end."""

    def __init__(self, problem: FixedPointProblem) -> None:
        self.problem = problem
        self.table = _Table(problem)
        self.at = {depth: _Table(problem) for depth in problem.checkpoints}
        self.logits = selection.WinnerLogits(problem.select, problem.breadth)
        self.won: tuple[Tensor, Tensor] | None = None  # restart [N] and logits [N, S, V], where the backend chose
        self.notes: list[str] = []
        self.residuals = None
        if problem.trace:
            self.residuals = torch.full((problem.trajectories, problem.depth), torch.nan, device=problem.tokens.device)

    def finished(self, rows: Snapshot) -> None:
        self.table.put(rows)
        if rows.logits is not None:
            self.logits.offer(rows)

    def checkpoint(self, depth: int, rows: Snapshot) -> None:
        # One that is cancelled at this very depth had reached it, as a run of this depth would have.
        here = (rows.status < 0) | ((rows.status == Status.CANCELLED) & (rows.steps == depth))
        status = torch.where(here, int(Status.MAX_DEPTH), rows.status)
        self.at[depth].put(rows._replace(status=status))

    def residual(self, index: Tensor, step: Tensor, residual: Tensor) -> None:
        assert self.residuals is not None
        self.residuals[index, step] = residual

    def winners(self, restart: Tensor, logits: Tensor) -> None:
        self.won = restart, logits

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _grid(self, flat: Tensor) -> Tensor:
        return flat.unflatten(0, (-1, self.problem.breadth))

    def _select(self, table: _Table) -> Tensor:
        fields = (table.preds, table.status, table.score, table.q_halt, table.steps)
        return selection.select(self.problem.select, *(self._grid(f) for f in fields))

    def result(self, backend: str, reason: str, return_all: bool) -> SolveResult:
        table, b = self.table, self.problem.breadth
        restart, logits = self.won or self._choose()
        puzzles = torch.arange(len(restart), device=restart.device)
        row = puzzles * b + restart
        return SolveResult(
            preds=table.preds[row],
            logits=logits,
            q_halt=table.q_halt[row],
            residual=table.residual[row],
            score=table.score[row],
            steps=table.steps[row],
            restart=restart,
            converged=settled(table.status[row]),
            nfe=self._grid(table.steps).sum(1),
            backend=backend,
            backend_reason=reason,
            all_steps=self._grid(table.steps),
            all_residual=self._grid(table.residual),
            all_score=self._grid(table.score),
            all_q_halt=self._grid(table.q_halt),
            all_status=self._grid(table.status),
            all_preds=self._grid(table.preds) if return_all else None,
            at={depth: self._recorded(at) for depth, at in self.at.items()},
            residuals=None if self.residuals is None else self._grid(self.residuals),
        )

    def _choose(self) -> tuple[Tensor, Tensor]:
        """The selected trajectories, restart [N], and their logits [N, S, V], where the backend leaves that to us."""
        restart = self._select(self.table)
        return restart, torch.stack([self.logits.winner(p, r) for p, r in enumerate(restart.tolist())])

    def _recorded(self, table: _Table) -> Recorded:
        restart = self._select(table)
        row = torch.arange(len(restart), device=restart.device) * self.problem.breadth + restart
        fields = (table.preds, table.score, table.q_halt, table.residual, table.steps, table.status)
        grids = (self._grid(f) for f in fields)
        return Recorded(table.preds[row], restart, settled(table.status[row]), *grids)
