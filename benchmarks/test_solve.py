"""Solving real queries with and without early exit: outer steps spent, time, and answers given.

Puzzles come from the project's own generator and the model is the shipped one. Early exit must not change how many
puzzles are solved by more than one in a hundred, or nothing is timed.
"""

from __future__ import annotations

import pytest
import torch
from conftest import median_seconds

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.tasks import sudoku, sudoku_generator

N, DEPTH = 16, 16


@pytest.mark.parametrize("breadth", [1, 4])
@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_solve(benchmark, difficulty: str, breadth: int) -> None:
    model = EquilibriumReasoner.from_pretrained("sudoku-small")
    puzzles = sudoku_generator.generate(N // breadth, difficulty, seed=1)
    tokens = torch.from_numpy(puzzles.inputs).long()

    def fixed() -> object:
        return model.solve(tokens, depth=DEPTH, breadth=breadth, halt="none")

    def early() -> object:
        return model.solve(tokens, depth=DEPTH, breadth=breadth)

    def race() -> object:
        return model.solve(tokens, depth=DEPTH, breadth=breadth, select="first")

    runs = {"fixed": fixed, "early": early, **({"race": race} if breadth > 1 else {})}
    results = {name: run() for name, run in runs.items()}
    solved = {name: int(sudoku.is_solution(puzzles.inputs, r.preds.numpy()).sum()) for name, r in results.items()}
    assert solved["early"] >= solved["fixed"] - max(1, N // breadth // 100), solved
    seconds = median_seconds(runs, seconds=1.0)
    benchmark.extra_info.update(
        difficulty=difficulty,
        puzzles=len(tokens),
        breadth=breadth,
        depth=DEPTH,
        backend=results["early"].backend,
        tol=model.card.tol,
        solved=solved,
        nfe={name: int(r.nfe.sum()) for name, r in results.items()},
        ms_per_puzzle={name: round(taken / len(tokens) * 1e3, 2) for name, taken in seconds.items()},
        times_faster_by_early_exit=round(seconds["fixed"] / seconds["early"], 2),
    )
    benchmark.pedantic(early, rounds=3, warmup_rounds=0)
