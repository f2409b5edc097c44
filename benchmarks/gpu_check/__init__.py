"""One command that builds, tests and measures the package on a GPU in under nine minutes: `make gpu-check`."""

PRESET = "sudoku-paper"
SMALL = "sudoku-small"
GOALS = {"share_of_gemm": 0.70, "times_best_peer": 1.6, "from": 528, "ms_one_trajectory": 0.30}
"""Of an outer step of PRESET in bf16: the first two at `from` and more trajectories, the last at one."""
