"""Views of puzzles: the same puzzle under symmetries, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from eqr_kernels.tasks import maze, sudoku, sudoku_generator
from eqr_kernels.tasks.registry import MAZE, SUDOKU
from eqr_kernels.tasks.task import Task, views_of
from eqr_kernels.tasks.views import Views

PUZZLES = sudoku_generator.generate(3, "medium", seed=2)
MAZES = maze.generate(3, size=9, seed=2)
TASKS = {"sudoku": (SUDOKU, PUZZLES, 16), "maze": (MAZE, MAZES, 8)}


@pytest.fixture(params=TASKS)
def known(request):
    return TASKS[request.param]


def test_views_are_puzzles_whose_answers_come_back_as_the_puzzles(known):
    task, puzzles, count = known
    views = task.views(puzzles.inputs, count, seed=4)
    assert views.inputs.shape == (3, count, puzzles.inputs.shape[1]) and views.inputs.dtype == np.uint8
    np.testing.assert_array_equal(views.inputs[:, 0], puzzles.inputs)
    for row in range(3):
        assert len(np.unique(views.inputs[row], axis=0)) == count
        for view in range(count):
            cells, names = views.cells[row, view], views.names[row, view]
            answer = np.array([names[puzzles.labels[row, cell]] for cell in cells])  # by the definition
            assert task.check(views.inputs[row, view][None], answer[None]).all()
            back = views[row : row + 1].restore(np.broadcast_to(answer, (1, count, len(answer))))
            np.testing.assert_array_equal(back[0, view], puzzles.labels[row])
    # What is no answer comes back too: any token.
    noise = np.random.default_rng(0).integers(0, task.vocab_size, views.inputs.shape)
    back = views.restore(noise)
    again = np.take_along_axis(views.names, np.take_along_axis(back, views.cells.astype(np.int64), 2), 2)
    np.testing.assert_array_equal(again, noise)


def test_views_of_a_puzzle_do_not_depend_on_company_or_count(known):
    task, puzzles, count = known
    views = task.views(puzzles.inputs, count, seed=4)
    np.testing.assert_array_equal(task.views(puzzles.inputs, 3, seed=4).inputs, views.inputs[:, :3])
    np.testing.assert_array_equal(task.views(puzzles.inputs[1:2], count, seed=4).inputs, views.inputs[1:2])
    assert len(task.views(puzzles.inputs[:0], count)) == 0


def test_sudoku_views_follow_the_seed_and_move_everything():
    views = sudoku.views(PUZZLES.inputs, 64, seed=1)
    assert not np.array_equal(views.inputs, sudoku.views(PUZZLES.inputs, 64, seed=2).inputs)
    # Each row, column and digit of the puzzle is seen in each place of its kind: 64 draws miss one with 2e-3.
    assert all(len(np.unique(views.cells[0, :, cell])) > 30 for cell in range(81))
    assert all(len(np.unique(views.names[0, :, digit])) > 7 for digit in range(2, 11))
    assert (views.names[:, :, :2] == (0, 1)).all()


class Odd(Task):
    """A task whose views are what `make` makes of two tokens that change places."""

    name, vocab_size = "odd", 4
    encode = decode = check = None

    def __init__(self, make):
        self._make = make

    def views(self, inputs, count, *, seed=0):
        same, n = np.arange(3), len(inputs)
        cells = np.broadcast_to(np.stack([same, [1, 2, 0]])[None, :count], (n, min(count, 2), 3))
        names = np.broadcast_to(np.arange(4, dtype=np.uint8), (n, min(count, 2), 4))
        return self._make(Views.of(inputs, cells, names))


SIX = np.array([[1, 2, 3], [2, 3, 1]], np.uint8)
ODD = {
    "an array": (lambda v: v.inputs, TypeError, "must return Views, got ndarray"),
    "the way back for the way there": (
        lambda v: Views(v.inputs, v.places, v.names),
        ValueError,
        "restore of a view must",
    ),
    "another first": (lambda v: Views(v.inputs[:, ::-1], v.cells[:, ::-1], v.names), ValueError, "first view must be"),
    "no permutation": (lambda v: Views(v.inputs, v.cells * 0, v.names), ValueError, "each of 0 .. 2 once in every row"),
    "floats": (
        lambda v: Views(v.inputs + 0.5, v.cells, v.names),
        TypeError,
        "inputs of views must be uint8 .*, got float64",
    ),
    "shapes": (lambda v: Views(v.inputs, v.cells[:1], v.names), ValueError, "must have inputs and cells"),
    "none": (lambda v: Views(v.inputs[:, :0], v.cells[:, :0], v.names[:, :0]), ValueError, "V at least 1"),
}


@pytest.mark.parametrize("kind", ODD)
def test_views_of_a_task_of_ones_own_are_checked(kind):
    make, error, message = ODD[kind]
    assert len(views_of(Odd(lambda v: v), 0)(SIX, 2)) == 2
    with pytest.raises(error, match=message):
        views_of(Odd(make), 0)(SIX, 2)
    with pytest.raises(ValueError, match=r"must return inputs \[2, 3, 3\]"):
        views_of(Odd(lambda v: v), 0)(SIX, 3)


@pytest.mark.parametrize(
    "wanted, message",
    [
        (lambda: sudoku.views(PUZZLES.inputs, 0), "count is 0; allowed is 1 or more"),
        (lambda: sudoku.views(PUZZLES.inputs, 2, seed=-1), "seed is -1; allowed is 0 or more"),
        (lambda: maze.views(MAZES.inputs, 9), "count must be at most 8, as a square has so many symmetries, got 9"),
    ],
)
def test_what_has_no_such_views_says_so(wanted, message):
    with pytest.raises(ValueError, match=message):
        wanted()
