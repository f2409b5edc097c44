"""The tasks that come with the package, as `Task`s."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from eqr_kernels.config import EqRConfig
from eqr_kernels.tasks import maze, sudoku, sudoku_generator
from eqr_kernels.tasks.common import ParseErrors, PuzzleSet, Tokens, join
from eqr_kernels.tasks.files import Source
from eqr_kernels.tasks.task import Bools, Task
from eqr_kernels.tasks.views import Views


class Sudoku(Task):
    """9x9 Sudoku, see `eqr_kernels.tasks.sudoku`."""

    name = "sudoku"
    vocab_size = sudoku.VOCAB_SIZE
    seq_len = sudoku.SEQ_LEN
    open_token = sudoku.BLANK
    written = "81 of the digits 1-9 and ."
    easier_clues = 28

    def encode(self, text: str) -> Tokens:
        return sudoku.encode(text)

    def decode(self, tokens: npt.ArrayLike) -> str:
        return sudoku.decode(tokens)

    def check(self, inputs: npt.ArrayLike, preds: npt.ArrayLike) -> Bools:
        return sudoku.is_solution(inputs, preds)

    def augment(self, inputs: Tokens, labels: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        return sudoku.augment(inputs, labels, rng)

    def load(
        self, source: Source, *, format: str = "auto", split: str | None = None, values: str = "auto"
    ) -> tuple[PuzzleSet, ParseErrors]:
        return sudoku.load(source, format=format, split=split, values=values)

    def draw(self, tokens: npt.ArrayLike, mark: Callable[[int, str], str] | None = None) -> str:
        return sudoku.format_grid(tokens, mark)

    def wrong_cells(self, inputs: Tokens, preds: Tokens) -> Bools:
        """A changed given, a digit twice in a unit, or no digit."""
        return super().wrong_cells(inputs, preds) | sudoku.conflicts(preds) | (preds <= sudoku.BLANK)

    def reveal(
        self, inputs: Tokens, labels: Tokens, clues: int | npt.NDArray[np.integer], rng: np.random.Generator
    ) -> Tokens:
        return sudoku.reveal(inputs, labels, clues, rng)

    def views(self, inputs: Tokens, count: int, *, seed: int = 0) -> Views:
        return sudoku.views(inputs, count, seed=seed)

    def count_solutions(self, inputs: Tokens) -> int:
        return sudoku_generator.count_solutions(inputs)

    def generate(
        self, n: int, *, seq_len: int, seed: int = 0, progress: Callable[[int], object] | None = None
    ) -> PuzzleSet:
        """n puzzles in four difficulties, as many of each, and easy ones first."""
        parts: list[PuzzleSet] = []

        def done(of_this_part: int) -> None:
            if progress is not None:
                progress(sum(map(len, parts)) + of_this_part)

        for i, difficulty in enumerate(sudoku_generator.LEVELS):
            count = (n + len(sudoku_generator.LEVELS) - 1 - i) // len(sudoku_generator.LEVELS)
            # A seed for each difficulty: the same one would thin out the same grids.
            parts.append(sudoku_generator.generate(count, difficulty, seed=seed + i, progress=done))
        return join(parts)


class Maze(Task):
    """Mazes on a square grid, see `eqr_kernels.tasks.maze`."""

    name = "maze"
    vocab_size = maze.VOCAB_SIZE
    open_token = maze.OPEN
    most_views = maze.SYMMETRIES
    written = "the characters # for a wall, space, S and G"

    def encode(self, text: str) -> Tokens:
        return maze.encode(text)

    def decode(self, tokens: npt.ArrayLike) -> str:
        return maze.decode(tokens)

    def check(self, inputs: npt.ArrayLike, preds: npt.ArrayLike) -> Bools:
        return maze.is_solution(inputs, preds)

    def augment(self, inputs: Tokens, labels: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        return maze.augment(inputs, labels, rng)

    def views(self, inputs: Tokens, count: int, *, seed: int = 0) -> Views:
        return maze.views(inputs, count, seed=seed)

    def load(
        self, source: Source, *, format: str = "auto", split: str | None = None, values: str = "auto"
    ) -> tuple[PuzzleSet, ParseErrors]:
        if values != "auto":
            raise ValueError(f"values is {values!r}, and arrays of mazes hold tokens; leave it out")
        return maze.load(source, format=format, split=split)

    def draw(self, tokens: npt.ArrayLike, mark: Callable[[int, str], str] | None = None) -> str:
        return maze.format_grid(tokens, mark)

    def generate(
        self, n: int, *, seq_len: int, seed: int = 0, progress: Callable[[int], object] | None = None
    ) -> PuzzleSet:
        return maze.generate(n, size=round(seq_len**0.5), seed=seed, progress=progress)


SUDOKU = Sudoku()
MAZE = Maze()


def task_of(config: EqRConfig) -> Task:
    """The one of ours whose tokens a model of this config takes.

    Raises:
        ValueError: it is none of ours.
    """
    for task in (SUDOKU, MAZE):
        if not task.misfit(config):
            return task
    raise ValueError(
        f"the model takes {config.seq_len} tokens of a vocabulary of {config.vocab_size}: neither 9x9 Sudoku (81 "
        "of 11) nor mazes (of 6); name its task with --task, or call model.solve(tokens) from Python"
    )
