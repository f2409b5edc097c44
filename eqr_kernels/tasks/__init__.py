"""Tasks: how puzzles become tokens, are generated, augmented and checked.

A `Task` is what the commands run on: `builtin` has those of `sudoku` and `maze`, and `registry` finds them and yours.
`sudoku` and `maze` read and write puzzles, know their rules and their symmetries; `sudoku_generator` makes Sudoku with
an exact solver, and `sudoku_symmetry` tells which solutions are the same grid; `views` holds puzzles under symmetries;
`common` and `files` hold what all share. Everything here is NumPy; nothing needs torch.
"""

from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.task import Task

__all__ = ["PuzzleSet", "Task"]
