"""The tasks as objects, and which of them a model is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import numpy as np
import numpy.typing as npt

from eqr_kernels.config import EqRConfig
from eqr_kernels.tasks import maze, sudoku
from eqr_kernels.tasks.common import Tokens


@dataclass(frozen=True)
class Task:
    """One of `eqr_kernels.tasks`; open_token is that of a cell to be filled."""

    name: str
    module: ModuleType
    vocab_size: int
    open_token: int

    def is_solution(self, inputs: npt.ArrayLike, preds: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        return cast("npt.NDArray[np.bool_]", self.module.is_solution(inputs, preds))

    def decode(self, tokens: npt.ArrayLike) -> str:
        return cast(str, self.module.decode(tokens))

    def format_grid(self, tokens: npt.ArrayLike, mark: Callable[[int, str], str] | None = None) -> str:
        return cast(str, self.module.format_grid(tokens, mark))

    def wrong_cells(self, inputs: Tokens, preds: Tokens) -> npt.NDArray[np.bool_]:
        """Cells of an answer [S] that break a rule for all to see: a changed given, or a digit twice in a unit."""
        wrong = (inputs != self.open_token) & (preds != inputs)
        if self.name == "sudoku":
            wrong |= sudoku.conflicts(preds) | (preds <= sudoku.BLANK)
        return wrong


SUDOKU = Task("sudoku", sudoku, sudoku.VOCAB_SIZE, sudoku.BLANK)
MAZE = Task("maze", maze, maze.VOCAB_SIZE, maze.OPEN)


def task_of(config: EqRConfig) -> Task:
    """The task whose tokens a model takes.

    Raises:
        ValueError: it is none of ours.
    """
    if (config.seq_len, config.vocab_size) == (sudoku.SEQ_LEN, sudoku.VOCAB_SIZE):
        return SUDOKU
    if config.vocab_size == maze.VOCAB_SIZE:
        return MAZE
    raise ValueError(
        f"the model takes {config.seq_len} tokens of a vocabulary of {config.vocab_size}: neither 9x9 Sudoku (81 "
        "of 11) nor mazes (of 6), the tasks that this command reads; call model.solve(tokens) from Python"
    )
