"""Depth by the symmetries of a task: what `turns` of `solve` asks of the backends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eqr_kernels.ops import TurnCells
from eqr_kernels.tasks.views import Turns, check_views


def turn_cells(turns: Turns, tokens: Tensor, depth: int, vocab_size: int) -> TurnCells:
    """The arrangements that the cells of puzzles, int64 [N, S], take in so many outer steps.

    Raises:
        TypeError, ValueError: `turns` is no such thing, or its task makes no such views.
    """
    if not isinstance(turns, Turns):
        raise TypeError(f"turns must be Turns, as in Turns(4, sudoku.views), got {type(turns).__name__}")
    count = min(turns.cycle, -(-depth // turns.every))
    puzzles = tokens.cpu().numpy().astype(np.uint8)
    try:
        views = turns.views(puzzles, count)
    except ValueError as error:
        raise ValueError(
            f"turns at depth {depth} take {count} views of each puzzle, and {error}; give Turns a cycle of as many as "
            "there are (a task says so by its `most_views`)"
        ) from error
    check_views(views, puzzles, count, vocab_size, "turns.views")
    cells = torch.from_numpy(views.cells.astype(np.int64, order="C"))
    return TurnCells(cells.to(tokens.device), turns.every)
