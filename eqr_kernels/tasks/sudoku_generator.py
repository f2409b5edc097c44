"""Exact Sudoku solver, and a generator of puzzles with one solution on top of it.

The solver propagates singles on 9-bit candidate masks (bit d = digit d + 1) and searches where they end; the number of
values that it had to try is the rating of a puzzle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import PuzzleSet, Tokens, as_tokens, check_int, check_range
from eqr_kernels.tasks.sudoku import BLANK, SEQ_LEN, UNITS, VOCAB_SIZE

_ALL = 0b111_111_111
_CELLS = [[int(cell) for cell in unit] for unit in UNITS]
_PEERS = [sorted({c for unit in _CELLS if cell in unit for c in unit} - {cell}) for cell in range(SEQ_LEN)]

Candidates = list[int]  # [81] masks; 0 = contradiction


@dataclass(frozen=True)
class ExactSolution:
    """What the exact solver found.

    Attributes:
        solutions: tokens, uint8 [K, 81], K <= limit.
        complete: True when there are no others.
        guesses: values tried where singles ended, wrong ones included; 0 = singles alone decide the puzzle.
    """

    solutions: Tokens
    complete: bool
    guesses: int


def solve_exact(grid: npt.ArrayLike, limit: int = 2) -> ExactSolution:
    """Find up to `limit` solutions of one grid, tokens [81]; the default tells unique from ambiguous.

    Naked and hidden singles first; then the cell with the fewest candidates, or the digit with the fewest places in a
    row, column or box where that is fewer, is tried value by value. `guesses` counts the whole search, the proof that
    no other solution exists included, so it does not depend on the order of the values.
    """
    tokens = as_tokens("grid", grid, VOCAB_SIZE, SEQ_LEN, ndim=1)
    if not tokens.all():
        raise ValueError(f"grid has a pad (0) at cell {int(tokens.argmin()) + 1}; a blank is {BLANK}")
    search = _Search(check_int("limit", limit, 1))
    candidates = _start(tokens)
    if candidates is not None:
        search.run(candidates)
    solutions = np.array([_tokens(masks) for masks in search.solutions], np.uint8).reshape(-1, SEQ_LEN)
    return ExactSolution(solutions, search.complete, search.guesses)


def count_solutions(grid: npt.ArrayLike, limit: int = 2) -> int:
    """How many solutions one grid [81] has, counting no further than `limit`."""
    return len(solve_exact(grid, limit).solutions)


# solver --------------------------------------------------------------------------------------------------------------


def _start(tokens: Tokens) -> Candidates | None:
    """Candidates after the givens and all singles; None when they contradict."""
    candidates = [_ALL] * SEQ_LEN
    givens = [cell for cell in range(SEQ_LEN) if tokens[cell] > BLANK]
    for cell in givens:
        candidates[cell] = 1 << (int(tokens[cell]) - 2)
    return candidates if _propagate(candidates, givens) else None


def _propagate(candidates: Candidates, decided: list[int]) -> bool:
    """Take `decided` cells' digits from their peers and follow all singles, in place; False on a contradiction."""
    while True:
        while decided:
            cell = decided.pop()
            bit = candidates[cell]
            for peer in _PEERS[cell]:
                mask = candidates[peer]
                if mask & bit:
                    mask ^= bit
                    if not mask:
                        return False
                    candidates[peer] = mask
                    if not mask & (mask - 1):
                        decided.append(peer)
        for unit in _CELLS:
            once = twice = 0
            for cell in unit:
                mask = candidates[cell]
                twice |= once & mask
                once |= mask
            if once != _ALL:
                return False
            single = once & ~twice
            for cell in unit:
                mask = candidates[cell]
                hidden = mask & single
                if hidden and hidden != mask:
                    if hidden & (hidden - 1):
                        return False
                    candidates[cell] = hidden
                    decided.append(cell)
        if not decided:
            return True


def _branches(candidates: Candidates) -> list[tuple[int, int]]:
    """The fewest (cell, bit) choices of which one must hold; [] when every cell is decided."""
    best: list[tuple[int, int]] = []
    fewest = 10
    for cell, mask in enumerate(candidates):
        if mask & (mask - 1) and mask.bit_count() < fewest:
            fewest = mask.bit_count()
            best = [(cell, 1 << d) for d in range(9) if mask >> d & 1]
            if fewest == 2:
                return best
    if not best:
        return best
    for unit in _CELLS:
        for digit in range(9):
            bit = 1 << digit
            places = [cell for cell in unit if candidates[cell] & bit]
            if 1 < len(places) < fewest:
                fewest = len(places)
                best = [(cell, bit) for cell in places]
                if fewest == 2:
                    return best
    return best


class _Search:
    """Depth-first search that stops at `limit` solutions."""

    def __init__(self, limit: int, rng: np.random.Generator | None = None) -> None:
        self.limit = limit
        self.rng = rng  # shuffles the values tried
        self.solutions: list[Candidates] = []
        self.guesses = 0
        self.complete = True

    def run(self, candidates: Candidates) -> None:
        """Search below propagated `candidates`."""
        choices = _branches(candidates)
        if not choices:
            self.solutions.append(candidates)
            return
        if self.rng is not None:
            choices = [choices[i] for i in self.rng.permutation(len(choices))]
        for cell, bit in choices:
            if len(self.solutions) >= self.limit:
                self.complete = False
                return
            self.guesses += 1
            trial = candidates.copy()
            trial[cell] = bit
            if _propagate(trial, [cell]):
                self.run(trial)


# generator -----------------------------------------------------------------------------------------------------------


def _random_solution(rng: np.random.Generator) -> Candidates:
    """A random full grid, as masks (random search; near to uniform, not exactly)."""
    search = _Search(1, rng)
    search.run([_ALL] * SEQ_LEN)
    return search.solutions[0]


def _thin_out(solution: Candidates, clues: int, rng: np.random.Generator) -> Candidates:
    """Take clues away in random order while one solution remains, until `clues` are left or none can go; 0 = blank."""
    grid = solution.copy()
    left = SEQ_LEN
    for cell in rng.permutation(SEQ_LEN):
        if left == clues:
            break
        candidates = [mask or _ALL for mask in grid]
        # a second solution must differ here: it was the only one with this clue
        candidates[cell] = _ALL ^ solution[cell]
        search = _Search(1)
        if _propagate(candidates, [c for c in range(SEQ_LEN) if grid[c] and c != cell]):
            search.run(candidates)
        if not search.solutions:
            grid[cell] = 0
            left -= 1
    return grid


class Level(NamedTuple):
    """Bounds (least, most) that a puzzle of one difficulty keeps; most = None is no limit."""

    clues: tuple[int, int | None]
    guesses: tuple[int, int | None]


LEVELS = {
    "easy": Level(clues=(36, 45), guesses=(0, 0)),
    "medium": Level(clues=(28, 33), guesses=(0, 0)),
    "hard": Level(clues=(22, 28), guesses=(1, 9)),
    "extreme": Level(clues=(20, 28), guesses=(10, None)),
}


def generate(
    n: int,
    difficulty: str | None = None,
    *,
    clues: int | tuple[int, int] | None = None,
    guesses: int | tuple[int, int | None] | None = None,
    seed: int = 0,
    attempts: int = 400,
    progress: Callable[[int], object] | None = None,
) -> PuzzleSet:
    """Generate n puzzles that have exactly one solution; rating = the exact solver's guesses.

    Puzzle i depends on (seed, i) alone, so a longer set begins with the shorter one. One attempt takes about 50 ms.

    Args:
        difficulty: "easy" (36..45 clues, 0 guesses), "medium" (28..33 clues, 0 guesses; the default), "hard" (22..28
            clues, 1..9 guesses) or "extreme" (20..28 clues, at least 10 guesses); see LEVELS.
        clues: instead of difficulty: number of clues, or (least, most), the aim drawn evenly between. Below 22 an
            attempt seldom gets there.
        guesses: instead of difficulty, alone or with clues: guesses, or (least, most), most = None for no limit;
            without clues, as few clues as possible are left.
        attempts: puzzles to try for each one that is asked for before giving up.
        progress: called with the number of puzzles done after each.
    Raises:
        ValueError: an argument out of range, or no puzzle within the bounds in `attempts` tries.
    """
    n, seed = check_int("n", n, 0), check_int("seed", seed, 0)
    attempts = check_int("attempts", attempts, 1)
    name, level = _level(difficulty, clues, guesses)
    inputs = np.zeros((n, SEQ_LEN), np.uint8)
    labels = np.zeros((n, SEQ_LEN), np.uint8)
    rating = np.zeros(n, np.float64)
    for i in range(n):
        inputs[i], labels[i], rating[i] = _generate_one(level, np.random.default_rng([seed, i]), attempts)
        if progress is not None:
            progress(i + 1)
    return PuzzleSet(inputs, labels, np.full(n, name), rating)


def _level(
    difficulty: str | None, clues: int | tuple[int, int] | None, guesses: int | tuple[int, int | None] | None
) -> tuple[str, Level]:
    if clues is None and guesses is None:
        difficulty = "medium" if difficulty is None else difficulty
        if difficulty not in LEVELS:
            raise ValueError(f"difficulty is {difficulty!r}; allowed are {', '.join(LEVELS)}, or give clues or guesses")
        return f"generated_{difficulty}", LEVELS[difficulty]
    if difficulty is not None:
        raise ValueError(f"difficulty is {difficulty!r} and clues or guesses is given too: leave one out")
    clue_bounds = (17, SEQ_LEN) if clues is None else check_range("clues", clues, 17, SEQ_LEN)
    return "generated", Level(clue_bounds, (0, None) if guesses is None else check_range("guesses", guesses, 0, None))


def _generate_one(level: Level, rng: np.random.Generator, attempts: int) -> tuple[Tokens, Tokens, int]:
    """One puzzle [81], its answer [81] and its guesses."""
    (low_end, high_end), (easiest, hardest) = level.clues, level.guesses
    high_end = SEQ_LEN if high_end is None else high_end
    anything_goes = (low_end, high_end) == (17, SEQ_LEN)
    seen: list[tuple[int, int]] = []
    for _ in range(attempts):
        aim = low_end if anything_goes else int(rng.integers(low_end, high_end + 1))
        solution = _random_solution(rng)
        puzzle = _tokens(_thin_out(solution, aim, rng))
        guesses = solve_exact(puzzle).guesses
        seen.append((int((puzzle > BLANK).sum()), guesses))
        if low_end <= seen[-1][0] <= high_end and easiest <= guesses and (hardest is None or guesses <= hardest):
            return puzzle, _tokens(solution), guesses
    raise ValueError(
        f"clues {low_end}..{high_end} with guesses {easiest}..{'' if hardest is None else hardest} did not come up in "
        f"attempts={attempts} puzzles, which had {min(seen)[0]} or more clues and at most {max(g for _, g in seen)} "
        "guesses: allow more clues or fewer guesses, or raise attempts"
    )


def _tokens(masks: Candidates) -> Tokens:
    """Tokens [81] of a grid of single bits; 0 = blank."""
    return np.array([mask.bit_length() + 1 for mask in masks], np.uint8)
