"""Texts of a request to tokens, and results back to text."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eqr_kernels.config import EqRConfig
from eqr_kernels.results import SolveResult
from eqr_kernels.tasks.common import Tokens
from eqr_kernels.tasks.task import Task


def read_puzzle(task: Task, config: EqRConfig, text: str) -> Tokens:
    """Tokens, uint8 [S], of one puzzle.

    Raises:
        ValueError: it is none, breaks the rules as it is given, or is of another size than the model's.
    """
    tokens = np.asarray(task.encode(text))
    if tokens.shape != (config.seq_len,):
        raise ValueError(f"the puzzle has {tokens.size} cells, and the model takes {config.seq_len}")
    # What encode takes may still break the rules of the task, which its reader of files says of a row.
    _, errors = task.load(io.StringIO(task.decode(tokens) + "\n"), format="lines")
    if errors:
        raise ValueError(errors[0].message)
    return tokens


def as_row(tokens: Tokens) -> Tensor:
    """int64 [S], as the Engine takes one puzzle."""
    return torch.from_numpy(tokens.astype(np.int64))


def finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def answer(task: Task, tokens: Tokens, result: SolveResult) -> dict[str, Any]:
    """The entry of a puzzle, tokens [S], whose result is that of one row."""
    preds = result.preds[0].cpu().numpy()
    (row,) = result.rows()
    return {
        "prediction": task.decode(preds),
        "valid": bool(np.asarray(task.check(tokens[None], preds[None]))[0]),
        **{name: finite(value) if isinstance(value, float) else value for name, value in row.items()},
    }
