"""Trajectories that were solved one by one, as a `SolveResult` of their puzzles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eqr_kernels import selection
from eqr_kernels.results import Recorded, SolveResult
from eqr_kernels.trajectory import Status, settled


class Outcomes(NamedTuple):
    """What became of the B trajectories of N puzzles; preds int64 [N, B, S], of the puzzle, the others [N, B]."""

    preds: Tensor
    status: Tensor
    score: Tensor
    q_halt: Tensor
    steps: Tensor
    residual: Tensor

    @classmethod
    def empty(cls, n: int, count: int, seq_len: int, device: torch.device) -> Outcomes:
        """Of trajectories that have not run."""
        nan = torch.full((3, n, count), torch.nan, dtype=torch.float32, device=device)
        status = torch.full((n, count), int(Status.CANCELLED), device=device)
        preds, steps = torch.zeros(n, count, seq_len, dtype=torch.int64, device=device), torch.zeros_like(status)
        return cls(preds, status, nan[0], nan[1], steps, nan[2])

    @classmethod
    def of(cls, preds: Tensor, ran: SolveResult | Recorded) -> Outcomes:
        """Of n trajectories that ran as puzzles of their own, with breadth 1: each field [n, ...].

        Args:
            preds: int64 [n, S], of the puzzles that they belong to.
        """
        numbers = (ran.all_status, ran.all_score, ran.all_q_halt, ran.all_steps, ran.all_residual)
        return cls(preds, *(column[:, 0] for column in numbers))

    def put(self, puzzle: Tensor, trajectory: int, these: Outcomes) -> None:
        """Replaces those of one trajectory of some puzzles, int64 [n]; these: [n, ...]."""
        for field, values in zip(self, these, strict=True):
            field[puzzle, trajectory] = values

    def winner(self, select: str) -> Tensor:
        """int64 [N], the trajectory that answers."""
        return selection.select(select, self.preds, self.status, self.score, self.q_halt, self.steps)

    def recorded(self, select: str) -> Recorded:
        """At one depth."""
        won = self.winner(select)
        converged = settled(of_winners(self.status, won))
        numbers = (self.score, self.q_halt, self.residual, self.steps, self.status)
        return Recorded(of_winners(self.preds, won), won, converged, self.preds, *numbers)

    def result(self, won: Tensor, logits: Tensor, ran: SolveResult, return_all: bool) -> SolveResult:
        """Of the trajectories won, int64 [N], with their logits, float32 [N, S, V]; `ran` says by what."""
        of = Outcomes(*(of_winners(field, won) for field in self))
        return SolveResult(
            preds=of.preds,
            logits=logits,
            q_halt=of.q_halt,
            residual=of.residual,
            score=of.score,
            steps=of.steps,
            restart=won,
            converged=settled(of.status),
            nfe=self.steps.sum(1),
            backend=ran.backend,
            backend_reason=ran.backend_reason,
            all_steps=self.steps,
            all_residual=self.residual,
            all_score=self.score,
            all_q_halt=self.q_halt,
            all_status=self.status,
            all_preds=self.preds if return_all else None,
        )


def of_winners(values: Tensor, won: Tensor) -> Tensor:
    """[N, B, ...] -> [N, ...], of the trajectories won, int64 [N]."""
    return values[torch.arange(len(won), device=won.device), won]
