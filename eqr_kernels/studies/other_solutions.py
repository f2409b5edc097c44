"""Answers that solve a puzzle and are not the given one: the puzzle has several solutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from eqr_kernels.results import SolveResult
from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import ANY, correct_grid
from eqr_kernels.studies.scoring import exact_match
from eqr_kernels.studies.types import Bools

IsSolution = Callable[[npt.NDArray[np.integer], npt.NDArray[np.integer]], Bools]
"""(inputs [n, S], answers [n, S]) -> bool [n], as `tasks.Task.check`"""


class OtherSolutions:
    """Watches a recording being made, as its `observe`.

    Args:
        is_solution: the rules.
        inputs: tokens [N, S] of the puzzles that are recorded, in order.
    """

    def __init__(self, is_solution: IsSolution, inputs: npt.NDArray[np.integer]) -> None:
        self._is_solution, self._inputs = is_solution, inputs
        self._parts: list[Bools] = []

    @property
    def marks(self) -> Bools:
        """bool [N, B, K], the answer is such a solution; of the puzzles that have been recorded."""
        return np.concatenate(self._parts)

    def known(self, marks: Bools) -> None:
        """Of the next n puzzles, bool [n, B, K], where they were recorded elsewhere."""
        self._parts.append(marks)

    def observe(self, labels: npt.NDArray[np.integer], result: SolveResult) -> None:
        """Of the next n puzzles: labels [n, S] and what came of them."""
        start = sum(map(len, self._parts))
        inputs = self._inputs[start : start + len(labels)]
        depths = []
        for _, at in sorted(result.at.items()):
            restarts = at.all_preds.cpu().numpy().swapaxes(0, 1)  # [B, n, S]
            depths.append([self._is_solution(inputs, preds) & ~exact_match(preds, labels) for preds in restarts])
        self._parts.append(np.array(depths).transpose(2, 1, 0))

    def counts(self, recording: Recording, rule: str) -> list[int]:
        """At each of the recording's depths, the puzzles that are answered so at its breadth, by a rule of selection.

        With the rule "any", those that some trajectory answers so and none answers right.
        """
        cells = recording.depths, [recording.breadth], [rule]
        other = correct_grid(dataclasses.replace(recording, correct=self.marks), *cells)
        if rule == ANY:
            other &= ~correct_grid(recording, *cells)
        return [int(count) for count in other[:, :, 0, 0].sum(0)]
