"""`Views`: puzzles under symmetries of their task, and the way back; `Turns`: by which of them a puzzle moves when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import Tokens, check_int

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Views:
    """V views of each of N puzzles. A view moves the puzzle's cells and renames its tokens.

    Attributes:
        inputs: tokens, uint8 [N, V, S], of the views.
        cells: integers [N, V, S], the puzzle's cell that each cell of a view shows.
        names: uint8 [N, V, vocab_size], what a view calls each token of the puzzle.

    Raises:
        TypeError, ValueError: the arrays are no such, or a row of cells or names leaves some out.
    """

    inputs: Tokens
    cells: Ints
    names: Tokens

    def __post_init__(self) -> None:
        kinds = {"inputs": (np.uint8, "uint8"), "cells": (np.integer, "integers"), "names": (np.uint8, "uint8")}
        for field, (kind, called) in kinds.items():
            array = getattr(self, field)
            if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, kind):
                got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise TypeError(f"{field} of views must be {called} [N, V, ...], got {got}")
        shapes = [getattr(self, field).shape for field in kinds]
        if shapes[0] != shapes[1] or any(len(s) != 3 or s[:2] != shapes[0][:2] for s in shapes) or shapes[0][1] < 1:
            raise ValueError(
                "views must have inputs and cells [N, V, S] and names [N, V, vocab_size] with V at least 1, got "
                + ", ".join(map(str, shapes))
            )
        for field in ("cells", "names"):
            array = getattr(self, field)
            if not np.array_equal(np.sort(array, 2), np.broadcast_to(np.arange(array.shape[2]), array.shape)):
                raise ValueError(f"{field} of views must hold each of 0 .. {array.shape[2] - 1} once in every row")

    @classmethod
    def of(cls, inputs: Tokens, cells: Ints, names: Tokens) -> Views:
        """The views of puzzles, tokens uint8 [N, S], by their cells and names."""
        moved = np.take_along_axis(inputs[:, None], cells, 2)
        return cls(np.take_along_axis(names, moved, 2), cells, names)

    def __len__(self) -> int:
        """N."""
        return len(self.inputs)

    def __getitem__(self, rows: slice) -> Views:
        """Those of some of the puzzles."""
        return Views(self.inputs[rows], self.cells[rows], self.names[rows])

    def at(self, rows: Ints, view: int) -> Views:
        """One view of each of the puzzles rows, integers [n]: V is 1."""
        one = slice(view, view + 1)
        return Views(self.inputs[rows, one], self.cells[rows, one], self.names[rows, one])

    @property
    def places(self) -> Ints:
        """int64 [N, V, S], the cell of a view that shows each cell of the puzzle."""
        return self.cells.argsort(2)

    @property
    def meanings(self) -> Ints:
        """int64 [N, V, vocab_size], the puzzle's token that each token of a view stands for."""
        return self.names.argsort(2)

    def restore(self, preds: npt.ArrayLike) -> Ints:
        """Answers to the views as answers to the puzzles: tokens, integers [N, V, S] -> int64 [N, V, S]."""
        return np.take_along_axis(self.meanings, np.take_along_axis(np.asarray(preds), self.places, 2), 2)


MakeViews = Callable[[Tokens, int], Views]
"""(puzzles, uint8 [N, S], how many views of each) -> those"""


@dataclass(frozen=True)
class Turns:
    """That a puzzle and its latent state move every few outer steps, see `turns` of `solve`.

    Attributes:
        every: outer steps between two turns, at least 1.
        views: makes the symmetries, of which the cells move; tokens keep their names, as a state has none. So a puzzle
            must stay one when its cells alone move.
        cycle: symmetries of each puzzle, at least 1, which follow each other in turn; the first is the puzzle itself.

    Raises:
        TypeError, ValueError: a field is no such.
    """

    every: int
    views: MakeViews
    cycle: int = 64

    def __post_init__(self) -> None:
        for field in ("every", "cycle"):
            check_int(f"{field} of turns", getattr(self, field), 1)
        if not callable(self.views):
            raise TypeError(f"views of turns must be a function, as sudoku.views is, got {self.views!r}")


def check_views(views: object, inputs: Tokens, count: int, vocab_size: int, maker: str) -> None:
    """That it is what `MakeViews` gives of inputs, uint8 [N, S]: a wrong way back would answer other puzzles.

    Args:
        count: of views of each puzzle. maker: what made them, for messages.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(views, Views):
        raise TypeError(f"{maker} must return Views, got {type(views).__name__}")
    wanted = (len(inputs), count, inputs.shape[1])
    if views.inputs.shape != wanted or views.names.shape[2] != vocab_size:
        raise ValueError(
            f"{maker} must return inputs {list(wanted)} and names of {vocab_size} tokens, got "
            f"{list(views.inputs.shape)} and {views.names.shape[2]}"
        )
    if not np.array_equal(views.inputs[:, 0], inputs):
        raise ValueError(f"{maker}: the first view must be the puzzle itself")
    if not np.array_equal(views.restore(views.inputs), np.broadcast_to(inputs[:, None], wanted)):
        raise ValueError(
            f"{maker}: restore of a view must give the puzzle back; cells holds the puzzle's cell for each cell of the "
            "view, and names the view's token for each token of the puzzle"
        )
