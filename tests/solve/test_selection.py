"""Selection on cases made by hand."""

from __future__ import annotations

import pytest
import torch

from eqr_kernels.backends import Snapshot, Status
from eqr_kernels.selection import Candidates, select

C, H, M, X, D = (int(s) for s in (Status.CONVERGED, Status.HALTED, Status.MAX_DEPTH, Status.CANCELLED, Status.DIVERGED))
NAN = float("nan")

# One puzzle, four trajectories: answers, status, score, q_halt, steps -> winners by residual, vote, first, q (- any).
CASES = [
    pytest.param("aabb", [C, C, C, C], [3, 2, 1, 4], [0, 0, 0, 0], [5, 4, 3, 2], "2232", id="plain"),
    pytest.param("abbc", [C, C, C, C], [1, 3, 2, 4], [9, 1, 2, 3], [5, 4, 3, 2], "0230", id="vote"),
    pytest.param("abcd", [M, C, M, C], [1, 8, 2, 9], [5, 5, 5, 5], [16, 7, 16, 7], "1010", id="unsettled"),
    pytest.param("abcd", [M, M, M, M], [4, 3, 3, 5], [1, 2, 3, 3], [16] * 4, "1112", id="ties"),
    pytest.param("abcd", [D, D, H, M], [0, 0, 9, 1], [9, 9, -1, 0], [1, 1, 5, 16], "2323", id="diverged"),
    pytest.param("aaab", [D, D, D, M], [0, 0, 0, 7], [9, 9, 9, -9], [1, 1, 1, 16], "3333", id="votes of the diverged"),
    pytest.param("abcd", [D, D, D, D], [NAN, 2, 1, NAN], [NAN] * 4, [1, 2, 3, 4], "222-", id="all diverged"),
    pytest.param("abcd", [X, X, M, D], [0, 0, 9, 0], [9, 9, -9, 9], [0, 0, 16, 1], "2222", id="cancelled"),
    pytest.param("abcd", [C, C, C, C], [NAN, 2, 1, 1], [0, 0, 0, 0], [3, 3, 2, 2], "222-", id="nan score"),
]


def by_rule(winners: str) -> list[tuple[str, int]]:
    return [(rule, int(w)) for rule, w in zip(("residual", "vote", "first", "q"), winners, strict=True) if w != "-"]


def table(answers, status, score, q_halt, steps):
    preds = torch.tensor([[ord(a), 1] for a in answers])[None]
    score, q_halt = (torch.tensor([x], dtype=torch.float32) for x in (score, q_halt))
    return preds, torch.tensor([status]), score, q_halt, torch.tensor([steps])


@pytest.mark.parametrize(("answers", "status", "score", "q_halt", "steps", "winners"), CASES)
def test_rules(answers, status, score, q_halt, steps, winners):
    for rule, winner in by_rule(winners):
        assert select(rule, *table(answers, status, score, q_halt, steps)).tolist() == [winner], rule


@pytest.mark.parametrize(("answers", "status", "score", "q_halt", "steps", "winners"), CASES)
def test_kept_logits_are_the_winners_in_whatever_order_they_come(answers, status, score, q_halt, steps, winners):
    preds, statuses, scores, q, step = table(answers, status, score, q_halt, steps)
    b = len(answers)
    logits = torch.arange(b).float()[:, None, None]
    for rule, winner in by_rule(winners):
        for shift in range(b):
            keeper = Candidates(rule, b)
            for i in [(shift + j) % b for j in range(b)]:
                row = slice(i, i + 1)
                number = torch.tensor([b + i])  # puzzle 1
                fields = (q[0, row], scores[0, row], scores[0, row], step[0, row], statuses[0, row])
                keeper.offer(Snapshot(number, preds[0, row], logits[row], *fields))
            assert keeper.winner(1, winner).logits.item() == winner, rule


def test_many_puzzles_at_once():
    score = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    status = torch.full((3, 2), C)
    preds = torch.zeros(3, 2, 4, dtype=torch.long)
    assert select("residual", preds, status, score, score, status).tolist() == [1, 0, 0]


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="select must be one of residual, vote, q, first, got 'best'"):
        select("best", *table("ab", [C, C], [1, 2], [0, 0], [1, 1]))
