"""Sudoku 9x9: read, write, check, augment.

Tokens: 0 pad, 1 blank, 2..10 the digits 1..9; a grid is 81 of them, row by row (cell = 9 row + column).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import (
    ParseErrors,
    PuzzleSet,
    Tokens,
    as_pair,
    as_tokens,
    check_int,
    check_rng,
    concise,
)
from eqr_kernels.tasks.files import Codec, IntArray, Source, encode_texts, load_puzzles, written_grid
from eqr_kernels.tasks.views import Views

SEQ_LEN = 81
VOCAB_SIZE = 11
BLANK = 1
BLANK_CHARACTERS = ".0_*-xX"

_ROW_UNITS = np.arange(SEQ_LEN).reshape(9, 9)
_BOX_UNITS = _ROW_UNITS.reshape(3, 3, 3, 3).transpose(0, 2, 1, 3).reshape(9, 9)
UNITS = np.concatenate([_ROW_UNITS, _ROW_UNITS.T, _BOX_UNITS])  # [27, 9]: the cells of each row, column and box
_UNIT_NAMES = [f"{kind} {i + 1}" for kind in ("row", "column", "box") for i in range(9)]


def _byte_tokens() -> Tokens:
    table = np.zeros(256, np.uint8)
    table[list(BLANK_CHARACTERS.encode())] = BLANK
    table[ord("1") : ord("9") + 1] = np.arange(2, VOCAB_SIZE)
    return table


# rules ---------------------------------------------------------------------------------------------------------------


def conflicts(grid: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """The cells whose digit stands again in their row, column or box: tokens [..., 81] -> bool [..., 81]."""
    tokens = _grids("grid", grid)
    in_units = tokens[..., UNITS]  # [..., 27, 9]
    equal = (in_units[..., :, None] == in_units[..., None, :]).sum(-1) > 1
    clash = np.zeros(tokens.shape, bool)
    for unit, cells in enumerate(UNITS):
        clash[..., cells] |= equal[..., unit, :] & (in_units[..., unit, :] > BLANK)
    return clash


def is_valid_grid(grid: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether the digits given so far break no rule: tokens [..., 81] -> bool [...].

    A grid with a pad cell is no grid: False. That a solution exists, or only one, is not checked (`count_solutions`).
    """
    tokens = _grids("grid", grid)
    bits = np.where(tokens > BLANK, 1 << tokens.astype(np.int16), 0)[..., UNITS]  # [..., 27, 9]
    # a sum of powers of two equals their union only when all differ
    distinct = bits.sum(-1) == np.bitwise_or.reduce(bits, -1)
    valid: npt.NDArray[np.bool_] = distinct.all(-1) & (tokens > 0).all(-1)
    return valid


def is_solution(inputs: npt.ArrayLike, preds: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether preds fill inputs by the rules: tokens [..., 81] twice (shapes may broadcast) -> bool [...].

    True when every cell holds a digit, every row, column and box holds all nine, and every clue is kept. A row of
    inputs with a pad cell is never solved.
    """
    questions, answers = _grids("inputs", inputs), _grids("preds", preds)
    try:
        np.broadcast_shapes(questions.shape, answers.shape)
    except ValueError:
        raise ValueError(f"preds has shape {answers.shape}; it must fit that of inputs, {questions.shape}") from None
    filled = (answers > BLANK).all(-1)
    clues_kept = ((questions == answers) | (questions == BLANK)).all(-1) & (questions > 0).all(-1)
    solved: npt.NDArray[np.bool_] = filled & clues_kept & is_valid_grid(answers)
    return solved


def _grids(name: str, value: npt.ArrayLike) -> Tokens:
    """`value` as tokens [..., 81]."""
    array = np.asarray(value)
    if array.ndim == 0 or array.shape[-1] != SEQ_LEN:
        raise ValueError(f"{name} has shape {array.shape}; it must be [..., 81]: reshape it")
    return as_tokens(name, array.reshape(-1, SEQ_LEN), VOCAB_SIZE, SEQ_LEN).reshape(array.shape)


def _broken_rules(inputs: Tokens, labels: Tokens) -> list[str]:
    """Per puzzle [N, 81] the rule that its givens or its answer (zeros when unknown) break, or ""."""
    messages = [""] * len(inputs)
    for i in np.flatnonzero(~is_valid_grid(inputs)):
        messages[i] = "the givens break the rules: " + _repeated(inputs[i])
    solved = is_solution(inputs, labels)
    for i in np.flatnonzero(~solved & labels.any(1)):
        messages[i] = messages[i] or "the answer does not solve the puzzle: " + _why_unsolved(inputs[i], labels[i])
    return messages


def _repeated(grid: Tokens) -> str:
    for name, cells in zip(_UNIT_NAMES, UNITS, strict=True):
        digits, counts = np.unique(grid[cells][grid[cells] > BLANK], return_counts=True)
        if (counts > 1).any():
            return f"{name} has the digit {digits[counts > 1][0] - 1} more than once"
    return "it has a pad cell"


def _why_unsolved(question: Tokens, answer: Tokens) -> str:
    open_cells = np.flatnonzero(answer <= BLANK)
    if len(open_cells):
        return f"{len(open_cells)} cells are not filled"
    changed = np.flatnonzero((question > BLANK) & (question != answer))
    if len(changed):
        return f"it changes the givens at cells {concise([int(c) + 1 for c in changed])}"
    return _repeated(answer)


CODEC = Codec(
    table=_byte_tokens(),
    vocab_size=VOCAB_SIZE,
    cells=f"the digits 1-9, and {' '.join(BLANK_CHARACTERS)} for a blank",
    seq_len=SEQ_LEN,
    blanks=BLANK_CHARACTERS,
    check=_broken_rules,
)

# text ----------------------------------------------------------------------------------------------------------------


def encode(text: str) -> Tokens:
    """Tokens [81] of one grid: 81 of the digits 1-9 and, for a blank, any of `. 0 _ * - x X`.

    They stand in one line, or are written as a grid of nine: with white space, bars and rules (such as `format_grid`
    draws), or commas; blanks may be spaces where the columns are clear.

    Raises:
        ValueError: another number of cells, or another character (its place is named).
    """
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; it must be a str of 81 cells")
    tokens, wrong = encode_texts([written_grid(text, CODEC)], CODEC, SEQ_LEN)
    if wrong[0]:
        raise ValueError(f"text {wrong[0]}")
    grid: Tokens = tokens[0]
    return grid


def decode(tokens: npt.ArrayLike) -> str:
    """81 characters of one grid [81]: its digits, '.' for a blank, '?' for a pad."""
    return "".join("?.123456789"[t] for t in as_tokens("tokens", tokens, VOCAB_SIZE, SEQ_LEN, ndim=1))


def format_grid(tokens: npt.ArrayLike, mark: Callable[[int, str], str] | None = None) -> str:
    """One grid [81] drawn for people, eleven lines with rules between the boxes.

    Args:
        mark: called with (cell number 0..80, its character) for every cell; returns what to show, e.g. in colour.
    """
    shown = [mark(cell, c) if mark else c for cell, c in enumerate(decode(tokens))]
    lines = []
    for row in range(9):
        if row in (3, 6):
            lines.append("------+-------+------")
        lines.append(" | ".join(" ".join(shown[9 * row + c : 9 * row + c + 3]) for c in (0, 3, 6)))
    return "\n".join(lines)


# files ---------------------------------------------------------------------------------------------------------------


def load(
    source: Source, *, format: str = "auto", values: str = "auto", split: str | None = None
) -> tuple[PuzzleSet, ParseErrors]:
    """Read puzzles; a row that cannot be read, or breaks the rules, is reported and the others are kept.

    Args:
        source: a path or a text stream such as sys.stdin. Files may be gzipped, and in UTF-8 or UTF-16.
        format: what the source holds; "auto" goes by the first bytes of a file and the first line of a text.
            "lines": a puzzle a line, 81 characters as for `encode` among any other fields; 81 more are its answer.
            "grids": the same, or grids of nine lines, one or many (also .sdk, of which only [Puzzle] is read, and .ss),
            with or without titles.
            "csv": a header with the column question (or puzzle, quizzes, initial_board, ...), and optionally answer
            (or solution, ...), source, rating (or difficulty, whose words are passed over); between commas, tabs,
            semicolons or bars.
            "json": JSON lines, or one JSON document, with the same names.
            "parquet": a table with the same columns; needs pyarrow.
            "npy": integers [N, 81], [N, 9, 9] or [81]. "npz": one such array, or two by the names of the columns.
            "folder": the HRM/EqR layout (dataset.json, all__inputs.npy, all__labels.npy, tokens as here).
            Blank lines and what follows a '#' are skipped.
        values: what a lone array holds: "digits" (0 blank, 1..9), "tokens" (1 blank, 2..10), or "auto": digits when
            more rows hold a 0 than hold a 10, tokens when more hold a 10; a tie raises.
        split: "train" or "test" of a folder that has both.
    Returns:
        the puzzles in the file's order, `line` naming each one's (first) line or row (1-based), and the errors by
        line, of which the first 1,000 are kept and the others counted (`ParseErrors`). An answer that is missing is a
        row of zeros in labels; labels is None when all are missing.
    Raises:
        OSError, ValueError, TypeError: the file as a whole cannot be read; the message names what it is.
        ImportError: it is a Parquet table, and pyarrow is not there.
    """
    if values not in ("auto", "digits", "tokens"):
        raise ValueError(f"values is {values!r}; allowed are 'auto', 'digits', 'tokens'")

    def from_array(inputs: IntArray, labels: IntArray | None) -> tuple[IntArray, IntArray | None, str]:
        return _tokens(inputs, labels, values)

    return load_puzzles(source, CODEC, format=format, split=split, from_array=from_array)


def load_csv(path: str | os.PathLike[str]) -> PuzzleSet:
    """All puzzles of a .csv or .csv.gz; unlike `load`, one bad row raises ValueError (training data must be whole)."""
    puzzles, errors = load(path, format="csv")
    if errors:
        raise ValueError(f"{path}: {errors.total} rows cannot be used, the first on {errors[0]}")
    return puzzles


def _tokens(inputs: IntArray, labels: IntArray | None, values: str) -> tuple[IntArray, IntArray | None, str]:
    """Tokens of arrays of digits or tokens (see `load`), and what they may hold; others become no token.

    An answer's 0 is a cell that is not known, as digit and as token.
    """
    zeros, tens = int((inputs == 0).any(1).sum()), int((inputs == VOCAB_SIZE - 1).any(1).sum())
    if values == "auto":
        if zeros == tens:
            raise ValueError(
                f"values='auto' cannot tell digits from tokens: {zeros} rows hold a 0 and {tens} hold a 10. Say "
                "values='digits' (0 blank, 1..9) or values='tokens' (1 blank, 2..10)"
            )
        values = "digits" if zeros > tens else "tokens"
    if values == "tokens":
        return inputs, labels, "tokens 1 (blank) .. 10"

    def shifted(array: IntArray, zero: int) -> IntArray:
        tokens = np.where((array >= 0) & (array <= 9), array.astype(np.int64) + 1, 255)
        return np.where(array == 0, zero, tokens)

    return shifted(inputs, BLANK), None if labels is None else shifted(labels, 0), "digits 0 (blank) .. 9"


# symmetries and clues ------------------------------------------------------------------------------------------------


@overload
def augment(inputs: npt.ArrayLike, labels: npt.ArrayLike, rng: np.random.Generator) -> tuple[Tokens, Tokens]: ...
@overload
def augment(inputs: npt.ArrayLike, labels: None, rng: np.random.Generator) -> tuple[Tokens, None]: ...
def augment(
    inputs: npt.ArrayLike, labels: npt.ArrayLike | None, rng: np.random.Generator
) -> tuple[Tokens, Tokens | None]:
    """Apply to each row its own uniformly drawn symmetry of Sudoku, the same to question and answer.

    The group: digit relabelling (9!), rows within bands and bands (6^4), columns within stacks and stacks (6^4),
    transposition (2).

    Args:
        inputs, labels: tokens [N, 81]; labels may be None.
    Returns:
        new uint8 arrays [N, 81].
    """
    check_rng(rng)
    if labels is None:
        questions, answers = as_tokens("inputs", inputs, VOCAB_SIZE, SEQ_LEN), None
    else:
        questions, answers = as_pair(inputs, labels, VOCAB_SIZE, SEQ_LEN)
    cells, names = _symmetries([rng.random((len(questions), *shape)) for shape in _DRAWN])

    def moved(grid: Tokens) -> Tokens:
        return np.take_along_axis(names, np.take_along_axis(grid, cells, 1), 1)

    return moved(questions), None if answers is None else moved(answers)


def views(inputs: npt.ArrayLike, count: int, *, seed: int = 0) -> Views:
    """Each puzzle under `count` symmetries of Sudoku (see `augment`): itself, then uniformly drawn ones.

    Those of a puzzle depend on its tokens and the seed alone, and fewer of them are the first of more.

    Args:
        inputs: tokens [N, 81].
        count: V, at least 1.
    """
    puzzles = as_tokens("inputs", inputs, VOCAB_SIZE, SEQ_LEN)
    count, seed = check_int("count", count, 1), check_int("seed", seed, 0)
    cells = np.empty((len(puzzles), count, SEQ_LEN), np.uint8)
    names = np.empty((len(puzzles), count, VOCAB_SIZE), np.uint8)
    cells[:, 0], names[:, 0] = np.arange(SEQ_LEN), np.arange(VOCAB_SIZE)
    ends = np.cumsum([int(np.prod(shape)) for shape in _DRAWN])
    for row, puzzle in enumerate(puzzles):
        key = int.from_bytes(hashlib.blake2b(puzzle.tobytes(), digest_size=8).digest(), "little")
        # One view after the other.
        flat = np.split(np.random.default_rng([seed, key]).random((count - 1, ends[-1])), ends[:-1], 1)
        drawn = [part.reshape(count - 1, *shape) for part, shape in zip(flat, _DRAWN, strict=True)]
        cells[row, 1:], names[row, 1:] = _symmetries(drawn)
    return Views.of(puzzles, cells, names)


_DRAWN = ((3,), (3, 3), (3,), (3, 3), (), (9,))
"""Uniforms of a symmetry: the order of bands and of the rows in them, of stacks and of the columns in them, whether to
transpose, the order of the digits."""


def _symmetries(drawn: Sequence[npt.NDArray[np.float64]]) -> tuple[npt.NDArray[np.int64], Tokens]:
    """The symmetries of uniforms [n, *shape] of the shapes of `_DRAWN`: the old cell of each new one, int64 [n, 81],
    and the new name of each token, uint8 [n, 11]."""
    bands, rows, stacks, columns, flip, digits = drawn
    n = len(digits)
    down, across = _lines(bands, rows), _lines(stacks, columns)
    cells = down[:, :, None] * 9 + across[:, None, :]  # [n, 9, 9]
    cells = np.where(flip[:, None, None] < 0.5, cells.transpose(0, 2, 1), cells).reshape(n, SEQ_LEN)
    names = np.empty((n, VOCAB_SIZE), np.uint8)
    names[:, :2] = (0, BLANK)
    names[:, 2:] = digits.argsort(1) + 2
    return cells, names


def _lines(bands: npt.NDArray[np.float64], within: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Orders of nine lines that keep the three bands together, int [n, 9]: position -> old line; of uniforms [n, 3] and
    [n, 3, 3]."""
    return (bands.argsort(1)[:, :, None] * 3 + within.argsort(2)).reshape(len(bands), 9)


def reveal(
    inputs: npt.ArrayLike, labels: npt.ArrayLike, clues: int | npt.NDArray[np.integer], rng: np.random.Generator
) -> Tokens:
    """Fill random blanks from the answer until row i shows at least clues[i] clues; rows with more stay.

    Args:
        inputs, labels: tokens [N, 81]. A blank whose label is no digit cannot be revealed and stays.
        clues: an int, or ints [N], each 0..81.
    Returns:
        new inputs, uint8 [N, 81].
    """
    check_rng(rng)
    questions, answers = as_pair(inputs, labels, VOCAB_SIZE, SEQ_LEN)
    goal = np.asarray(clues)
    if not np.issubdtype(goal.dtype, np.integer):
        raise TypeError(f"clues has dtype {goal.dtype}; it must be an integer or integers [N]")
    if goal.shape not in ((), (len(questions),)):
        raise ValueError(f"clues has shape {goal.shape}; it must be one integer or [N] = [{len(questions)}]")
    if goal.size and (goal.min() < 0 or goal.max() > SEQ_LEN):
        raise ValueError(f"clues holds {goal.min()} .. {goal.max()}; allowed is 0 .. 81")
    blank = (questions == BLANK) & (answers > BLANK)
    missing = goal.astype(np.int64) - (questions > BLANK).sum(1)  # [n]
    order = np.where(blank, rng.random(blank.shape), 2.0).argsort(1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(SEQ_LEN)[None], 1)
    return np.where(blank & (rank < missing[:, None]), answers, questions)
