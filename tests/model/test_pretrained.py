"""The shipped models do what their cards say, on puzzles that the project generates and on real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.studies.maze_sizes import resized
from eqr_kernels import EquilibriumReasoner
from eqr_kernels.checkpoint import PRETRAINED, available_models
from eqr_kernels.cli import options
from eqr_kernels.tasks import maze, sudoku, sudoku_generator
from eqr_kernels.tasks.common import join
from eqr_kernels.tasks.registry import find_task
from eqr_kernels.tasks.task import generated

MEBIBYTES = {"sudoku-small": 3, "sudoku": 12, "sudoku-paper": 12, "maze-small": 1}
CLUES = {"sudoku-small": 32, "sudoku": 28}
"""Of those that are quick enough for tests by the dozen."""


@pytest.fixture(scope="module", params=CLUES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name) -> EquilibriumReasoner:
    return EquilibriumReasoner.from_pretrained(name)


def test_these_are_all_and_one_is_what_the_commands_take():
    assert set(available_models()) == set(MEBIBYTES) and options.MODEL in MEBIBYTES


@pytest.mark.parametrize("name", MEBIBYTES)
def test_it_is_small_and_its_card_is_complete(name):
    assert (PRETRAINED / f"{name}.safetensors").stat().st_size <= MEBIBYTES[name] * 2**20
    model = EquilibriumReasoner.from_pretrained(name)
    card = model.card
    assert bool(card.tol) != bool(card.tol_missing) and card.tol_fast
    assert card.steps and card.data and card.accuracies and card.licence == "Apache-2.0"
    assert card.config == model.config


@pytest.mark.slow
def test_easy_puzzles_are_solved_in_a_few_steps_and_hard_ones_need_more(model):
    steps = {}
    for difficulty in ("easy", "hard"):
        puzzles = sudoku_generator.generate(16, difficulty, seed=5)
        result = model.solve(torch.from_numpy(puzzles.inputs).long(), depth=64, tol="fast")
        solved = torch.from_numpy(sudoku.is_solution(puzzles.inputs, result.preds.numpy()))
        steps[difficulty] = result.steps.float().mean().item()
        if difficulty == "easy":
            assert solved.all() and result.converged.all() and result.steps.max() <= 16
    assert steps["hard"] > 1.5 * steps["easy"]


@pytest.mark.slow
def test_converged_is_a_promise_or_the_card_says_that_it_is_none(model, recwarn):
    puzzles = join([sudoku_generator.generate(24, difficulty, seed=11) for difficulty in ("easy", "medium", "hard")])
    result = model.solve(torch.from_numpy(puzzles.inputs).long(), depth=64)
    solved = torch.from_numpy(sudoku.is_solution(puzzles.inputs, result.preds.numpy()))
    assert result.converged.sum() >= 24
    assert solved[result.converged].all() if model.card.tol else "converged is no promise" in str(recwarn[0].message)
    stored = model.card.extra["calibration"]["tol"]
    assert stored is None or stored["right_when_converged"] >= 0.99 * stored["converged"] >= 99


@pytest.mark.slow
def test_five_puzzles_together_and_one_by_one(model):
    tokens = torch.from_numpy(sudoku_generator.generate(5, "medium", seed=2).inputs).long()
    together = model.solve(tokens, depth=32, breadth=2)
    assert together.converged.any()
    for i in range(5):
        alone = model.solve(tokens[i : i + 1], depth=32, breadth=2)
        for field in ("preds", "steps", "residual", "restart", "converged", "nfe", "all_steps"):
            assert torch.equal(getattr(alone, field)[0], getattr(together, field)[i]), (i, field)


@pytest.mark.slow
def test_the_published_size_solves_all_of_the_demonstration_and_the_default_does_not():
    puzzles = generated(find_task("sudoku"), 81, 12, 2026)
    tokens = torch.from_numpy(puzzles.inputs).long()
    solved = {}
    for name in ("sudoku", "sudoku-paper"):
        result = EquilibriumReasoner.from_pretrained(name).solve(tokens, depth=16, halt="q")
        solved[name] = int(sudoku.is_solution(puzzles.inputs, result.preds.numpy()).sum())
    assert solved["sudoku-paper"] == 12 > solved["sudoku"]


@pytest.mark.slow
def test_real_puzzles_gain_from_depth(name, model, sudoku_data):
    puzzles = sudoku.load_csv(sudoku_data / "dev.csv.gz").subset(slice(0, 2500, 50))
    inputs = sudoku.reveal(puzzles.inputs, puzzles.labels, CLUES[name], np.random.default_rng(0))
    result = model.solve(torch.from_numpy(inputs).long(), depth=32, halt="none", checkpoints=(1, 4, 32))
    exact = {d: (at.preds.numpy() == puzzles.labels).all(1).mean() for d, at in result.at.items()}
    assert exact[1] < exact[4] < exact[32] and exact[32] > 0.6, exact


@pytest.mark.slow
@pytest.mark.parametrize(("size", "share"), [(7, 0.95), (11, 0.9)])
def test_mazes_gain_from_depth(size, share):
    model = EquilibriumReasoner.from_pretrained("maze-small")
    model = resized(model, size)
    puzzles = maze.generate(100, size=size, seed=2027)
    at = model.solve(torch.from_numpy(puzzles.inputs).long(), depth=16, halt="none", checkpoints=(1, 4, 16)).at
    right = {d: maze.is_solution(puzzles.inputs, r.preds.numpy()) for d, r in at.items()}
    assert right[1].mean() < right[4].mean() and right[16].mean() > share
    if size == 11:
        long = puzzles.rating >= 20
        assert right[4][long].mean() < 0.1 < right[16][long].mean(), "long ways take many steps"
        result = EquilibriumReasoner.from_pretrained("maze-small").solve(torch.from_numpy(puzzles.inputs).long())
        assert maze.is_solution(puzzles.inputs, result.preds.numpy())[result.converged.numpy()].all()
        assert result.converged.float().mean() > 0.9
