"""Tasks: how puzzles become tokens, are generated, augmented and checked.

`sudoku` and `maze` read and write puzzles, know their rules and their symmetries; `sudoku_generator` makes Sudoku with
an exact solver, and `sudoku_symmetry` tells which solutions are the same grid; `common` and `files` hold what all
share. Everything here is NumPy; nothing needs torch.
"""
