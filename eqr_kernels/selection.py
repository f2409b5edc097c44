"""Which of a puzzle's B trajectories is the answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels.run_rules import SELECTION_RULES
from eqr_kernels.trajectory import Snapshot, Status, settled

RULES = SELECTION_RULES


def sort_key(rule: str, status: Tensor, score: Tensor, q_halt: Tensor, steps: Tensor) -> Tensor:
    """What a rule compares, least first, float64 [..., 3]; ties go to the lower restart.

    Trajectories that DIVERGED come last, and those CANCELLED just before them. Then:
    "residual" prefers settled ones and among them the lowest score; "q" the highest q_halt; "first" settled ones and
    among them the fewest steps, else the lowest score; "vote" the lowest score (among the most common answers).

    Args:
        rule: one of `RULES`.
        status, steps: int64 [...]; score, q_halt: float32 [...], of the same shape.
    """
    rank = (status == Status.DIVERGED) * 2 + (status == Status.CANCELLED) * 1
    low_score = score.double().nan_to_num(nan=torch.inf)
    unsettled = (~settled(status)).double()
    if rule == "residual":
        keys = unsettled, low_score
    elif rule == "q":
        keys = -q_halt.double().nan_to_num(nan=-torch.inf), low_score
    elif rule == "first":
        keys = unsettled, torch.where(unsettled.bool(), low_score, steps.double())
    elif rule == "vote":
        keys = low_score, torch.zeros_like(low_score)
    else:
        raise ValueError(f"select must be one of {', '.join(RULES)}, got {rule!r}")
    return torch.stack([rank.double(), *keys], -1)


def select(rule: str, preds: Tensor, status: Tensor, score: Tensor, q_halt: Tensor, steps: Tensor) -> Tensor:
    """The winning restart of each puzzle, int64 [N].

    Args:
        rule: one of `RULES`; see `sort_key`.
        preds: int64 [N, B, S].
        status, steps: int64 [N, B]; score, q_halt: float32 [N, B].
    """
    key = sort_key(rule, status, score, q_halt, steps)  # [N, B, 3]
    if rule == "vote":
        key = torch.cat([key[..., :1], -_votes(preds, status)[..., None], key[..., 1:]], -1)
    winner = torch.arange(key.shape[1], device=key.device).expand(key.shape[:2])
    # Stable sorts from the least significant key on sort lexicographically and keep lower restarts first.
    for column in reversed(range(key.shape[-1])):
        order = key[..., column].gather(1, winner).argsort(dim=1, stable=True)
        winner = winner.gather(1, order)
    return winner[:, 0]


def _votes(preds: Tensor, status: Tensor) -> Tensor:
    """How many trajectories that neither diverged nor were cancelled give the same answer, float64 [N, B]."""
    counts = (status != Status.DIVERGED) & (status != Status.CANCELLED)  # [N, B]
    if not len(preds):
        return counts.double()
    rows = []
    for answers, valid in zip(preds, counts, strict=True):  # [B, S], [B]
        same = torch.unique(answers, dim=0, return_inverse=True)[1]  # [B]
        tally = torch.zeros(len(answers), dtype=torch.float64, device=preds.device).index_add_(0, same, valid.double())
        rows.append(tally[same])
    return torch.stack(rows)


class Kept(NamedTuple):
    """What is kept of a trajectory that may win."""

    logits: Tensor  # float32 [S, V]
    z_H: Tensor | None  # float32 [S, d], or None where states are not kept
    z_L: Tensor | None


class Candidates:
    """Keeps the logits and states of the trajectories that may still win, so that memory does not grow with breadth.

    Under "vote" that is the best of each distinct answer, under the other rules one trajectory a puzzle.

    Args:
        rule: one of `RULES`.
        breadth: trajectories B of a puzzle.
    """

    def __init__(self, rule: str, breadth: int) -> None:
        self.rule, self.breadth = rule, breadth
        self._kept: dict[int, dict[bytes, tuple[list[float], Kept]]] = {}

    def offer(self, rows: Snapshot) -> None:
        """Takes in trajectories that have ended, with their logits."""
        assert rows.logits is not None
        keys = sort_key(self.rule, rows.status, rows.score, rows.q_halt, rows.steps).tolist()
        for i, index in enumerate(rows.number.tolist()):
            puzzle, restart = divmod(index, self.breadth)
            answer = rows.preds[i].cpu().numpy().tobytes() if self.rule == "vote" else b""
            candidates = self._kept.setdefault(puzzle, {})
            entry = [*keys[i], restart]
            if answer not in candidates or entry < candidates[answer][0]:
                fields: list[Any] = [None if f is None else f[i].clone() for f in (rows.logits, rows.z_H, rows.z_L)]
                candidates[answer] = (entry, Kept(*fields))

    def winner(self, puzzle: int, restart: int) -> Kept:
        """Of the trajectory that `select` chose."""
        for entry, kept in self._kept[puzzle].values():
            if entry[-1] == restart:
                return kept
        raise RuntimeError(f"puzzle {puzzle}: restart {restart} was dropped; selection and keeping disagree")
