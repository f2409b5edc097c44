"""An endless stream of augmented training puzzles, with a curriculum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import PuzzleSet, Tokens

Augment = Callable[[Tokens, Tokens, np.random.Generator], tuple[Tokens, Tokens]]
Reveal = Callable[[Tokens, Tokens, Any, np.random.Generator], Tokens]


@dataclass(frozen=True)
class RevealPoint:
    """From training step `step` on, puzzles show at least a number of clues drawn from `low`..`high`."""

    step: int
    low: int
    high: int


def parse_curriculum(text: str) -> tuple[RevealPoint, ...]:
    """A curriculum from text such as "0:34-50,2500:30-48,6000:17-42"; between points, the ends are interpolated.

    Raises:
        ValueError: text of another form, or steps that do not rise from 0.
    """
    points = []
    for part in text.split(","):
        try:
            step, clues = part.split(":")
            low, high = clues.split("-")
            points.append(RevealPoint(int(step), int(low), int(high)))
        except ValueError:
            raise ValueError(f'curriculum: {part!r} is not STEP:LOW-HIGH, as in "0:34-50,2500:17-42"') from None
    steps = [point.step for point in points]
    if steps[0] != 0 or sorted(set(steps)) != steps:
        raise ValueError(f"curriculum: steps must rise from 0, got {steps}")
    for point in points:
        if not 0 <= point.low <= point.high:
            raise ValueError(f"curriculum: clues must be 0 <= LOW <= HIGH, got {point.low}-{point.high}")
    return tuple(points)


def same_clues(first: Sequence[RevealPoint], second: Sequence[RevealPoint], steps: int) -> bool:
    """Whether two curricula show as many clues at each of the first `steps` training steps."""
    if not steps or not first or not second:
        return not steps or not (first or second)
    # Between these both are linear.
    corners = {0, steps - 1, *(point.step for point in (*first, *second) if point.step < steps)}
    return all(_ends(first, step) == _ends(second, step) for step in corners)


def _ends(curriculum: Sequence[RevealPoint], step: int) -> tuple[float, float]:
    steps = [point.step for point in curriculum]
    low = np.interp(step, steps, [point.low for point in curriculum])
    high = np.interp(step, steps, [point.high for point in curriculum])
    return float(low), float(high)


def parse_mix(text: str) -> dict[str, float]:
    """Shares by source from text such as "17_clue=0.3,forum=0.7"; "" has none.

    Raises:
        ValueError: text of another form, a source twice, or a share that is not positive.
    """
    shares: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        source, equals, share = part.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not (equals and source and 0 < value < math.inf) or source in shares:
            raise ValueError(
                f'mix: {part!r} is not SOURCE=SHARE with a positive share and a source of its own, as in "17_clue=0.3"'
            )
        shares[source] = value
    return shares


class PuzzleStream:
    """Draws puzzles at random, each under a random symmetry and, with a curriculum, with more clues revealed.

    Args:
        puzzles: with labels.
        augment: applies a random symmetry to each row.
        reveal, curriculum: `reveal(inputs, labels, clues, rng)` and when to show how many clues; empty shows none.
        mix: shares of the draws by source, in any unit; a source that it does not name is not drawn. Empty draws all
            puzzles alike.
        seed: int or ints that key the stream.

    Raises:
        ValueError: puzzles without labels, an empty set, or a source that no puzzle has.
    """

    def __init__(
        self,
        puzzles: PuzzleSet,
        augment: Augment,
        *,
        reveal: Reveal | None = None,
        curriculum: Sequence[RevealPoint] = (),
        mix: Mapping[str, float] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> None:
        if puzzles.labels is None or not len(puzzles):
            raise ValueError(f"puzzles must have labels and not be empty to train on, got {len(puzzles)} puzzles")
        if curriculum and reveal is None:
            raise ValueError("curriculum needs a task that can reveal clues (sudoku)")
        self.inputs, self.labels = puzzles.inputs, puzzles.labels
        self.augment, self.reveal, self.curriculum = augment, reveal, tuple(curriculum)
        self.rng = np.random.default_rng(seed)
        self._groups, self._shares = self._by_source(puzzles, mix or {})

    @staticmethod
    def _by_source(puzzles: PuzzleSet, mix: Mapping[str, float]) -> tuple[list[npt.NDArray[np.int64]], list[float]]:
        """The rows of each source of the mix, and its share of the draws."""
        rows = {source: np.flatnonzero(puzzles.source == source) for source in mix}
        for source, group in rows.items():
            if not len(group):
                known = ", ".join(sorted(set(puzzles.source.tolist())))
                raise ValueError(f"mix: no puzzle is of the source {source!r}; there are {known}")
        total = sum(mix.values())
        return list(rows.values()), [share / total for share in mix.values()]

    def _index(self, n: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Rows of n puzzles, int64 [n]."""
        if not self._groups:
            return rng.integers(len(self.inputs), size=n)
        sizes = np.array([len(group) for group in self._groups])
        drawn = rng.choice(len(sizes), size=n, p=self._shares)
        within = rng.integers(sizes[drawn])
        return np.array([self._groups[g][i] for g, i in zip(drawn, within, strict=True)], np.int64)

    def clue_range(self, step: int) -> tuple[int, int]:
        """The least and the greatest number of clues to show at training step `step`."""
        low, high = _ends(self.curriculum, step)
        return round(low), round(high)

    def draw(self, n: int, step: int, rng: np.random.Generator | None = None) -> tuple[Tokens, Tokens]:
        """n fresh puzzles for training step `step`: inputs and labels, uint8 [n, S].

        Args:
            rng: draws them in place of the stream's own generator, which then stays as it is.
        """
        rng = self.rng if rng is None else rng
        index = self._index(n, rng)
        inputs, labels = self.augment(self.inputs[index], self.labels[index], rng)
        if self.reveal is not None and self.curriculum:
            low, high = self.clue_range(step)
            inputs = self.reveal(inputs, labels, rng.integers(low, high + 1, size=n), rng)
        return inputs, labels

    @property
    def state(self) -> dict[str, Any]:
        """The generator's state, ready for JSON; assign it to continue the same stream."""
        return dict(self.rng.bit_generator.state)

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self.rng.bit_generator.state = value
