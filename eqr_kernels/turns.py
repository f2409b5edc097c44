"""Depth by the symmetries of a task: what `turns` of `solve` asks of the backends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eqr_kernels.ops import TurnCells
from eqr_kernels.tasks.common import as_tokens
from eqr_kernels.tasks.views import Turns, check_views


def check_turns(turns: object, *, streak: int, states: bool) -> None:
    """That it is what `turns` of `solve` takes.

    Args:
        streak: steps in a row that the halting rule wants. states: final ones are wanted.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(turns, Turns):
        raise TypeError(f"turns must be Turns, as in Turns(4, sudoku.views), got {type(turns).__name__}")
    if streak > turns.every:
        raise ValueError(
            f"patience must be at most turns.every={turns.every}, as it counts anew at each turn, got {streak}; lower "
            "it, or turn less often"
        )
    if states:
        raise ValueError(
            "return_state must be False with turns, as a state would be of cells that have moved; leave one out"
        )


def turn_cells(turns: Turns, tokens: Tensor, depth: int, vocab_size: int) -> TurnCells:
    """The arrangements that the cells of puzzles, int64 [N, S], take in so many outer steps.

    Raises:
        TypeError, ValueError: its task makes no such views.
    """
    count = turn_count(turns, depth)
    if not len(tokens):
        return TurnCells(tokens.new_zeros(0, count, tokens.shape[1]), turns.every)
    puzzles = as_tokens("tokens", tokens.cpu().numpy(), vocab_size)
    try:
        views = turns.views(puzzles, count)
    except ValueError as error:
        raise ValueError(
            f"turns.views cannot make the {count} views of each puzzle that depth {depth} takes: {error}; where there "
            "are fewer, give Turns a cycle of as many (a task says so by its `most_views`)"
        ) from error
    check_views(views, puzzles, count, vocab_size, "turns.views")
    cells = torch.from_numpy(views.cells.astype(np.int64, order="C"))
    return TurnCells(cells.to(tokens.device), turns.every)


def turn_count(turns: Turns, depth: int) -> int:
    """How many arrangements of each puzzle that is."""
    return min(turns.cycle, -(-depth // turns.every))
