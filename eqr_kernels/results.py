"""The result of a solve, and how it is collected from what a backend gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import selection
from eqr_kernels.backends import FixedPointProblem, Snapshot, Status
from eqr_kernels.config import EqRConfig
from eqr_kernels.trajectory import FinishedTrajectory, settled

ROW_FIELDS = ("converged", "steps", "nfe", "restart", "residual", "score", "q_halt")
"""Of a `SolveResult`, what reports tell of each puzzle."""

OnFinished = Callable[[FinishedTrajectory], object]


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
        converged: bool [N], its halting rule had fired: CONVERGED, of which alone `tol="auto"` is a promise, or HALTED.
        nfe: int64 [N], outer steps really spent on each puzzle, all trajectories together.
        backend, backend_reason: what ran, and why.
        all_steps, all_status: int64 [N, B]; all_residual, all_score, all_q_halt: float32 [N, B].
        all_preds: int64 [N, B, S] with `return_all`, else None.
        at: for each of `checkpoints`, all trajectories at that depth.
        residuals: float32 [N, B, depth] with `trace`, NaN after a trajectory's end; else None.
        z_H, z_L: float32 [N, S, d] with `return_state`, of the selected trajectories when they ended (zero where one
            was cancelled before it ran); else None.
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
    z_H: Tensor | None = None
    z_L: Tensor | None = None

    def rows(self) -> list[dict[str, Any]]:
        """What became of each puzzle, in plain Python: "status" (of the selected trajectory, in lower case) and the
        fields of `ROW_FIELDS`."""
        status = self.all_status.gather(1, self.restart[:, None])[:, 0].tolist()
        fields = {name: getattr(self, name).tolist() for name in ROW_FIELDS}
        return [
            {"status": Status(each).name.lower(), **{name: values[i] for name, values in fields.items()}}
            for i, each in enumerate(status)
        ]


class _Table:
    """What is known of every trajectory, flat [N * B, ...]."""

    def __init__(self, problem: FixedPointProblem) -> None:
        t, device = problem.trajectories, problem.tokens.device
        self.preds = torch.zeros(t, problem.tokens.shape[1], dtype=torch.int64, device=device)
        self.q_halt, self.residual, self.score = torch.full((3, t), torch.nan, dtype=torch.float32, device=device)
        self.steps = torch.zeros(t, dtype=torch.int64, device=device)
        self.status = torch.full((t,), int(Status.MAX_DEPTH), dtype=torch.int64, device=device)

    def put(self, rows: Snapshot) -> None:
        for name in ("preds", "q_halt", "residual", "score", "steps", "status"):
            getattr(self, name)[rows.number] = getattr(rows, name)


class Collector:
    """Records trajectories as they come, and selects at the end.

    Attributes:
        on_stepped: called with trajectories after an outer step, as `Recorder.stepped` is.
    """

    on_stepped: Callable[[Snapshot], object] | None = None

    def __init__(self, problem: FixedPointProblem, config: EqRConfig, on_finished: OnFinished | None) -> None:
        self.problem, self.config, self.on_finished = problem, config, on_finished
        self.table = _Table(problem)
        self.at = {depth: _Table(problem) for depth in problem.checkpoints}
        self.candidates = selection.Candidates(problem.select, problem.breadth)
        self.won: tuple[Tensor, selection.Kept] | None = None  # restart [N] and [N, ...], where the backend chose
        self.reported: set[int] = set()  # trajectories that `on_finished` has been called with before `finished`
        self.notes: list[str] = []
        self.residuals = None
        if problem.trace:
            size, device = (problem.trajectories, problem.depth), problem.tokens.device
            self.residuals = torch.full(size, torch.nan, dtype=torch.float32, device=device)

    def ended(self, trajectory: FinishedTrajectory) -> None:
        if self.on_finished is not None:
            self.reported.add(trajectory.puzzle * self.problem.breadth + trajectory.restart)
            self.on_finished(trajectory)

    def stepped(self, rows: Snapshot) -> None:
        if self.on_stepped is not None:
            self.on_stepped(rows)

    def finished(self, rows: Snapshot) -> None:
        self.table.put(rows)
        if rows.logits is not None:
            self.candidates.offer(rows)
        if self.on_finished is not None:
            self._report(rows, self.on_finished)

    def _report(self, rows: Snapshot, on_finished: OnFinished) -> None:
        numbers, statuses, steps = torch.stack([rows.number, rows.status, rows.steps]).tolist()
        floats = torch.stack([rows.residual, rows.score, rows.q_halt], 1).tolist()
        for i, preds in enumerate(rows.preds.cpu()):
            if numbers[i] not in self.reported:
                puzzle, restart = divmod(numbers[i], self.problem.breadth)
                residual, score, q_halt = floats[i]
                numbered = (puzzle, restart, Status(statuses[i]), steps[i], residual, score, q_halt)
                on_finished(FinishedTrajectory(*numbered, preds))

    def checkpoint(self, depth: int, rows: Snapshot) -> None:
        # One that is cancelled at this very depth had reached it, as a run of this depth would have.
        here = (rows.status < 0) | ((rows.status == Status.CANCELLED) & (rows.steps == depth))
        status = torch.where(here, int(Status.MAX_DEPTH), rows.status)
        self.at[depth].put(rows._replace(status=status))

    def residual(self, index: Tensor, step: Tensor, residual: Tensor) -> None:
        assert self.residuals is not None
        self.residuals[index, step] = residual

    def winners(self, restart: Tensor, logits: Tensor, states: tuple[Tensor, Tensor] | None = None) -> None:
        self.won = restart, selection.Kept(logits, *(states or (None, None)))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _grid(self, flat: Tensor) -> Tensor:
        return flat.unflatten(0, (-1, self.problem.breadth))

    def _select(self, table: _Table) -> Tensor:
        fields = (table.preds, table.status, table.score, table.q_halt, table.steps)
        return selection.select(self.problem.select, *(self._grid(f) for f in fields))

    def result(self, backend: str, reason: str, return_all: bool) -> SolveResult:
        table, b = self.table, self.problem.breadth
        restart, kept = self.won or self._choose()
        puzzles = torch.arange(len(restart), device=restart.device)
        row = puzzles * b + restart
        return SolveResult(
            preds=table.preds[row],
            logits=kept.logits,
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
            z_H=kept.z_H,
            z_L=kept.z_L,
        )

    def _choose(self) -> tuple[Tensor, selection.Kept]:
        """The selected trajectories, restart [N], and what is kept of them [N, ...], where no backend chose."""
        restart = self._select(self.table)
        if not len(restart):
            return restart, self._nothing()
        kept = [self.candidates.winner(p, r) for p, r in enumerate(restart.tolist())]
        fields: list[Any] = [None if each[0] is None else torch.stack(each) for each in zip(*kept, strict=True)]
        return restart, selection.Kept(*fields)

    def _nothing(self) -> selection.Kept:
        """Of no puzzles."""
        c, p = self.config, self.problem
        empty = p.tokens.new_empty
        logits = empty((0, c.seq_len, c.vocab_size), dtype=torch.float32)
        states = empty((0, c.seq_len, c.hidden_size), dtype=torch.float32) if p.keep_states else None
        return selection.Kept(logits, states, states)

    def _recorded(self, table: _Table) -> Recorded:
        restart = self._select(table)
        row = torch.arange(len(restart), device=restart.device) * self.problem.breadth + restart
        fields = (table.preds, table.score, table.q_halt, table.residual, table.steps, table.status)
        grids = (self._grid(f) for f in fields)
        return Recorded(table.preds[row], restart, settled(table.status[row]), *grids)
