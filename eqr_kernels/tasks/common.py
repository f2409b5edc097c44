"""What every task shares: the set of puzzles that is trained on, solved and scored, and the checks of arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint8]

UNKNOWN_RATING = -1
KEPT_ERRORS = 1000


@dataclass(frozen=True)
class PuzzleSet:
    """N puzzles of one task, all of the same length S.

    Attributes:
        inputs: tokens, uint8 [N, S].
        labels: the answers' tokens, uint8 [N, S], or None when no answer is known; 0 = pad, never scored, so a row of
            zeros is a puzzle without a known answer.
        source: where each puzzle comes from, str [N].
        rating: how hard each puzzle is on its source's own scale, float64 [N]; -1 = unknown.
        line: 1-based line of the file (or row of the array) that each puzzle came from, int64 [N]; None when the set
            was not read from a file.
        id: the name that each puzzle has in a table's column "id", str [N]; None where there is none. It says nothing
            to the solver.
    """

    inputs: Tokens
    labels: Tokens | None
    source: npt.NDArray[np.str_]
    rating: npt.NDArray[np.float64]
    line: npt.NDArray[np.int64] | None = None
    id: npt.NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2:
            raise ValueError(f"PuzzleSet: inputs has shape {self.inputs.shape}; it must be [N, S]")
        if self.labels is not None and self.labels.shape != self.inputs.shape:
            raise ValueError(
                f"PuzzleSet: labels has shape {self.labels.shape}; it must be that of inputs, {self.inputs.shape}"
            )
        for name in ("source", "rating", "line", "id"):
            array = getattr(self, name)
            if array is not None and array.shape != self.inputs.shape[:1]:
                raise ValueError(f"PuzzleSet: {name} has shape {array.shape}; it must be [N] = [{len(self.inputs)}]")

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, index: Any) -> PuzzleSet:
        """The puzzles that `index` (a slice, an int array or a bool mask [N]) picks, in its order."""
        return PuzzleSet(
            self.inputs[index],
            None if self.labels is None else self.labels[index],
            self.source[index],
            self.rating[index],
            None if self.line is None else self.line[index],
            None if self.id is None else self.id[index],
        )


def join(parts: Sequence[PuzzleSet]) -> PuzzleSet:
    """Sets with labels, one after the other; not the lines that they came from."""
    columns = [(part.inputs, part.labels, part.source, part.rating) for part in parts]
    return PuzzleSet(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def rating_number(rating: float) -> int | float | None:
    """A rating as it is written and printed: whole numbers without a point, None when it is unknown (negative)."""
    if rating < 0:
        return None
    return int(rating) if float(rating).is_integer() else float(rating)


@dataclass(frozen=True)
class ParseError:
    """A row that could not be read: its 1-based line (or array row), its text (cut when very long), what is wrong."""

    line: int
    text: str
    message: str

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 100 else self.text[:97] + "..."
        return f"line {self.line}: {self.message}" + (f": {shown!r}" if shown else "")


class ParseErrors(list[ParseError]):
    """The rows that could not be read, by line: the first `KEPT_ERRORS` of them, and how many more there were.

    Attributes:
        omitted: errors that were counted and not kept; all come after those that were.
    """

    def __init__(self, errors: Iterable[ParseError] = (), omitted: int = 0) -> None:
        super().__init__()
        self.omitted = omitted
        for error in errors:
            self.append(error)
        self.cut()

    @property
    def total(self) -> int:
        """Kept or not."""
        return len(self) + self.omitted

    def append(self, error: ParseError) -> None:
        if len(error.text) > 1000:
            error = ParseError(error.line, error.text[:997] + "...", error.message)
        super().append(error)
        # errors may come out of order, so they are cut now and then instead of at the first one too many
        if len(self) >= 2 * KEPT_ERRORS:
            self.cut()

    def cut(self) -> None:
        """Sorts by line and keeps the first."""
        self.sort(key=lambda error: error.line)
        self.omitted += max(0, len(self) - KEPT_ERRORS)
        del self[KEPT_ERRORS:]

    def before(self, line: int) -> ParseErrors:
        """Those of earlier lines; errors that were not kept count when `line` comes after all that were."""
        reaches_omitted = bool(self) and self[-1].line < line
        return ParseErrors((error for error in self if error.line < line), self.omitted if reaches_omitted else 0)


def as_tokens(name: str, value: npt.ArrayLike, vocab_size: int, seq_len: int | None = None, ndim: int = 2) -> Tokens:
    """`value` as uint8 tokens [N, S] (ndim 2) or [S] (ndim 1), checked.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or a token outside 0 .. vocab_size - 1.
    """
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} has dtype {array.dtype}; tokens must be integers: convert it, e.g. .astype('uint8')")
    size = "S" if seq_len is None else str(seq_len)
    if array.ndim != ndim or (seq_len is not None and array.shape[-1] != seq_len):
        expected = f"[N, {size}]" if ndim == 2 else f"[{size}]"
        raise ValueError(f"{name} has shape {array.shape}; it must be {expected}: reshape it")
    # min and max at once would need an upcast; uint8 cannot be negative, which saves the trainer a pass
    if array.size and (array.max() >= vocab_size or (array.dtype != np.uint8 and array.min() < 0)):
        raise ValueError(
            f"{name} holds tokens {array.min()} .. {array.max()}; allowed are 0 .. {vocab_size - 1}: encode it first"
        )
    return array.astype(np.uint8, copy=False)


def as_pair(
    inputs: npt.ArrayLike, labels: npt.ArrayLike, vocab_size: int, seq_len: int | None
) -> tuple[Tokens, Tokens]:
    """Checked inputs and labels [N, S] of one shape."""
    questions = as_tokens("inputs", inputs, vocab_size, seq_len)
    answers = as_tokens("labels", labels, vocab_size, seq_len)
    if questions.shape != answers.shape:
        raise ValueError(f"labels has shape {answers.shape}; it must be that of inputs, {questions.shape}")
    return questions, answers


def check_rng(rng: object) -> None:
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng is a {type(rng).__name__}; it must be a numpy Generator: numpy.random.default_rng(seed)")


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int within low .. high (no bool, no float)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be an integer")
    if value < low or (high is not None and value > high):
        allowed = f"{low} .. {high}" if high is not None else f"{low} or more"
        raise ValueError(f"{name} is {value}; allowed is {allowed}")
    return int(value)


def check_range(name: str, value: object, low: int, high: int | None) -> tuple[int, int | None]:
    """`value` (an int, or a pair least, most; most may be None = no limit) as a pair within low .. high."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{name} is {value!r}; it must be an integer or a pair (least, most)")
        low_end = check_int(f"{name}[0]", value[0], low, high)
        high_end = None if value[1] is None else check_int(f"{name}[1]", value[1], low, high)
        if high_end is not None and low_end > high_end:
            raise ValueError(f"{name} is {value!r}: least is greater than most; swap them")
        return low_end, high_end
    exact = check_int(name, value, low, high)
    return exact, exact


def concise(values: list[int], limit: int = 5) -> str:
    """A list of numbers for a message, cut after `limit`."""
    return ", ".join(map(str, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")
