"""`Task`: what the commands need to know of a kind of puzzle. Subclass it for a task of your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt

from eqr_kernels.config import EqRConfig
from eqr_kernels.tasks.common import ParseErrors, PuzzleSet, Tokens, as_tokens
from eqr_kernels.tasks.files import Codec, Source, load_puzzles
from eqr_kernels.tasks.views import MakeViews, Turns, Views, check_views

Bools = npt.NDArray[np.bool_]


class Task(ABC):
    """A kind of puzzle: how it is written, read, checked, augmented and drawn.

    A task of your own says `name` and `vocab_size`, and defines `encode`, `decode` and `check`; the rest has defaults.
    `eqr train | solve | eval | curve | diagnose | calibrate --task package.module:OBJECT` then run on the object, and
    by its name once a package declares it as an entry point of the group `eqr_kernels.tasks`.

    Tokens are uint8, 0 .. vocab_size - 1. 0 is padding: in an answer it is never scored. N is a number of puzzles, S
    that of the tokens of each. Methods get NumPy arrays and must not change them.

    What some tasks can and others cannot is a method that those alone have: `reveal` (see `Reveals`), `generate`
    (`Generates`), `count_solutions` (`CountsSolutions`), `views` (`HasViews`).

    Attributes:
        name: in reports and in a model's card.
        vocab_size: of the config of its models.
        seq_len: S, when all puzzles have the same; None where it is the model's.
        open_token: the token of a cell to be filled in: what else stands in a puzzle is given, and must stay.
        easier_clues: of a task with `reveal`: with so many clues even a young model solves some, so a learning curve
            measures puzzles with them as well; None where it does not.
        most_views: views of a puzzle there are at most, of a task with `views`; None where they are more than 64.
        written: what a puzzle looks like in a file, for messages, as in "81 of the digits 1-9 and .".
    """

    name: str
    vocab_size: int
    seq_len: int | None = None
    open_token: int = 1
    easier_clues: int | None = None
    most_views: int | None = None
    written: str = ""

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Tokens, uint8 [S], of a written puzzle or answer.

        Raises:
            ValueError: the text is none; what is wrong with it, which the commands report with its line.
        """

    @abstractmethod
    def decode(self, tokens: npt.ArrayLike) -> str:
        """The text of a puzzle or an answer, tokens [S], on one line and as `encode` reads it. A model may answer with
        any token, also with one that no answer holds."""

    @abstractmethod
    def check(self, inputs: npt.ArrayLike, preds: npt.ArrayLike) -> Bools:
        """Whether each answer solves its puzzle by the rules: tokens, integers [N, S] twice -> bool [N].

        The known answer has no say: a puzzle may have several. An answer may hold any token.
        """

    def augment(self, inputs: Tokens, labels: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Each row under a random symmetry of the task, its puzzle and its answer alike, for training.

        Args:
            inputs, labels: tokens, uint8 [N, S]; labels has 0 where the answer is not known.
            rng: the one source of chance.
        Returns:
            uint8 [N, S] twice. By default as they came.
        """
        return inputs, labels

    def load(
        self, source: Source, *, format: str = "auto", split: str | None = None, values: str = "auto"
    ) -> tuple[PuzzleSet, ParseErrors]:
        """Read puzzles; a row that cannot be read is reported and the others are kept.

        By default: lines (a puzzle, or puzzle,answer), and CSV, JSON and Parquet with the columns question, answer,
        source and rating, whose texts go through `encode`; tokens in .npy and .npz; the HRM/EqR folder. An answer that
        `check` refuses is an error of its row.

        Args:
            source: a path or a text stream such as sys.stdin.
            format: "auto", or one of `eqr_kernels.tasks.files.FORMATS`.
            split: "train" or "test" of a folder that has both.
            values: what a lone array holds, where the task knows other numbers than tokens; "auto" if not.
        Returns:
            the puzzles in the file's order, all of one S, and what could not be read.
        Raises:
            OSError, ValueError, TypeError, ImportError: the file as a whole cannot be read.
        """
        if values != "auto":
            raise ValueError(f"values is {values!r}, and arrays of the {self.name} task hold tokens; leave it out")
        codec = Codec(
            table=np.zeros(256, np.uint8),
            vocab_size=self.vocab_size,
            cells=self.written or f"written as the {self.name} task writes them",
            seq_len=self.seq_len,
            blanks="",
            check=self._broken_rules,
            encode=self.encode,
        )
        return load_puzzles(source, codec, format=format, split=split)

    def draw(self, tokens: npt.ArrayLike, mark: Callable[[int, str], str] | None = None) -> str:
        """A puzzle or an answer, tokens [S], for people: one or more lines.

        By default the text of `decode`, and where that has a character for each token of a square, in its rows.

        Args:
            mark: called with the number of each token and its character; returns what to show, e.g. in colour.
        """
        text = self.decode(tokens)
        # Where something stands between the tokens, its length is an accident.
        if len(text) != len(np.asarray(tokens)) or any(c.isspace() or c == "," for c in text):
            return text
        shown = [mark(i, character) if mark else character for i, character in enumerate(text)]
        side = round(len(text) ** 0.5)
        width = side if side * side == len(text) else len(text)
        return "\n".join("".join(shown[i : i + width]) for i in range(0, len(text), width))

    def wrong_cells(self, inputs: Tokens, preds: Tokens) -> Bools:
        """The cells of an answer that break a rule for all to see, for `eqr solve` on a terminal: tokens [S] twice ->
        bool [S]. By default the givens that it changes."""
        wrong: Bools = (inputs != self.open_token) & (preds != inputs)
        return wrong

    def misfit(self, config: EqRConfig) -> str:
        """Why a model of this config cannot take this task's tokens; "" where it can."""
        if self.vocab_size == config.vocab_size and self.seq_len in (None, config.seq_len):
            return ""
        length = "any number of tokens" if self.seq_len is None else f"{self.seq_len} tokens"
        return (
            f"the {self.name} task has {length} of a vocabulary of {self.vocab_size} (seq_len, vocab_size), and the "
            f"model takes {config.seq_len} of {config.vocab_size}"
        )

    def _broken_rules(self, inputs: Tokens, labels: Tokens) -> list[str]:
        messages = [""] * len(inputs)
        rows = np.flatnonzero(labels.any(1))
        for i in rows[~np.asarray(self.check(inputs[rows], labels[rows]), bool)] if len(rows) else ():
            messages[i] = "the answer does not solve the puzzle"
        return messages


@runtime_checkable
class Reveals(Protocol):
    """A task whose puzzles are easier the more of the answer is shown: `--reveal`, `--curriculum`."""

    def reveal(
        self, inputs: Tokens, labels: Tokens, clues: int | npt.NDArray[np.integer], rng: np.random.Generator
    ) -> Tokens:
        """The puzzles, uint8 [N, S], with random cells of their answers shown until row i shows clues[i] or more."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A task that makes puzzles: `eqr generate`, `eqr solve --demo`, `eqr curve` without a file."""

    def generate(
        self, n: int, *, seq_len: int, seed: int = 0, progress: Callable[[int], object] | None = None
    ) -> PuzzleSet:
        """n puzzles of seq_len tokens with their answers, of every kind that there is; the same for the same arguments.

        Args:
            progress: called with the number of puzzles done, now and then.
        """
        ...


class Symmetries(TypedDict):
    """See `symmetries_of`."""

    views: MakeViews | None
    turns: Turns | None


@runtime_checkable
class HasViews(Protocol):
    """A task that is the same under symmetries which a model need not know: `--views`, `--turn-every`."""

    def views(self, inputs: Tokens, count: int, *, seed: int = 0) -> Views:
        """Puzzles, uint8 [N, S], each under `count` symmetries: itself first, and fewer are the first of more.

        Args:
            seed: 0 or more; what is drawn depends on it and on the puzzle alone.
        """
        ...


@runtime_checkable
class CountsSolutions(Protocol):
    """A task that knows whether a puzzle has several solutions: `eqr solve --check`."""

    def count_solutions(self, inputs: Tokens) -> int:
        """0, 1, or 2 for several, of one puzzle, uint8 [S]."""
        ...


def solutions_of(task: CountsSolutions, inputs: Tokens) -> str:
    """How many solutions a puzzle, uint8 [S], has: "none", "one" or "several"."""
    return ("none", "one", "several")[min(2, task.count_solutions(inputs))]


def generated(
    task: Task, seq_len: int, n: int, seed: int, progress: Callable[[int], object] | None = None
) -> PuzzleSet:
    """n puzzles of the task's own generator.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(task, Generates):
        raise ValueError(f"the {task.name} task has no `generate` and makes no puzzles; name a FILE")
    return task.generate(n, seq_len=seq_len, seed=seed, progress=progress)


def views_of(task: Task, seed: int) -> MakeViews:
    """What makes views of the task's puzzles.

    Raises:
        ValueError: the task knows none.
    """
    if not isinstance(task, HasViews):
        raise ValueError(f"the {task.name} task has no `views`; use breadth, which is by random starts")
    return partial(_checked_views, task, task.views, seed)


def turns_of(task: Task, every: int, seed: int) -> Turns:
    """Turns of the task's puzzles, so many outer steps apart.

    Raises:
        ValueError: the task knows no symmetries.
    """
    views = views_of(task, seed)
    return Turns(every, views) if task.most_views is None else Turns(every, views, task.most_views)


def symmetries_of(task: Task, seed: int, *, views: bool, turn_every: int | None) -> Symmetries:
    """`views` and `turns` of `solve_puzzles`.

    Args:
        views: each trajectory gets a view. turn_every: outer steps between turns; None: no turns.

    Raises:
        ValueError: the task knows no symmetries.
    """
    return {
        "views": views_of(task, seed) if views else None,
        "turns": None if turn_every is None else turns_of(task, turn_every, seed),
    }


def _checked_views(task: Task, make: Callable[..., Views], seed: int, inputs: Tokens, count: int) -> Views:
    """What a task gives, if it is what `HasViews` says."""
    views = make(inputs, count, seed=seed)
    check_views(views, inputs, count, task.vocab_size, f"task {task.name!r}: views")
    return views


REQUIRED = ("name", "vocab_size", "encode", "decode", "check")
"""What an object of your own must say to be a task."""


def check_task(value: Any, name: str) -> Task:
    """`value` as the task that it must be; `name` names it in messages.

    Raises:
        TypeError: it is none; which members it lacks.
        ValueError: its sizes are out of range.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} is a class; name an object of it, as in TASK = {value.__name__}() beside the class")
    if not isinstance(value, Task):
        missing = [member for member in REQUIRED if not hasattr(value, member)]
        lacks = f", and lacks {', '.join(missing)}" if missing else ""
        raise TypeError(
            f"{name} is no task but of the type {type(value).__name__}{lacks}; make it an object of a subclass of "
            "eqr_kernels.tasks.Task"
        )
    missing = [member for member in REQUIRED if not hasattr(value, member)]
    if missing:
        raise TypeError(f"{name} is no whole task: its class {type(value).__name__} does not say {', '.join(missing)}")
    if not isinstance(value.name, str) or not value.name:
        raise TypeError(f"{name}: its name must be a str that is not empty, got {value.name!r}")
    for member, low, high in (
        ("vocab_size", 2, 256),
        ("seq_len", 1, None),
        ("open_token", 0, value.vocab_size - 1),
        ("easier_clues", 1, None),
        ("most_views", 1, None),
    ):
        size = getattr(value, member)
        if member in ("seq_len", "easier_clues", "most_views") and size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < low or (high is not None and size > high):
            allowed = f"{low} or more" if high is None else f"{low} .. {high}"
            raise ValueError(f"{name}: its {member} must be an int, {allowed}, got {size!r}")
    return value


def try_task(task: Task, puzzles: PuzzleSet, rows: int = 16) -> None:
    """Tries the task on its first puzzles with answers, so that what is wrong with it is told before training begins.

    Raises:
        TypeError, ValueError: a method returns another type, shape or range than `Task` says, `decode` and `encode` are
            not each other's inverse, or `augment` makes an answer that `check` no longer accepts.
    """
    if puzzles.labels is None or not len(puzzles):
        return
    inputs, labels = puzzles.inputs[:rows], puzzles.labels[:rows]
    right = _checked(task, inputs, labels)
    for written in (inputs[0], labels[0]):
        if (written > 0).all() and not np.array_equal(task.encode(task.decode(written)), written):
            raise ValueError(
                f"task {task.name!r}: encode(decode(tokens)) is not tokens for {written.tolist()}, which decode writes "
                f"as {task.decode(written)!r}"
            )
    before = inputs.copy(), labels.copy()
    result = task.augment(inputs, labels, np.random.default_rng(0))
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(f"task {task.name!r}: augment must return inputs and labels, got {type(result).__name__}")
    if not all(map(np.array_equal, before, (inputs, labels))):
        raise ValueError(f"task {task.name!r}: augment changes the arrays that it is given; let it return new ones")
    for member, array in zip(("inputs", "labels"), result, strict=True):
        tokens = as_tokens(f"task {task.name!r}: augment's {member}", array, task.vocab_size, inputs.shape[1])
        if tokens.shape != inputs.shape or np.asarray(array).dtype != np.uint8:
            raise ValueError(
                f"task {task.name!r}: augment's {member} must be uint8 {list(inputs.shape)}, got "
                f"{np.asarray(array).dtype} {list(tokens.shape)}"
            )
    after = _checked(task, *result)
    if not np.array_equal(right, after):
        row = int(np.flatnonzero(right != after)[0])
        raise ValueError(
            f"task {task.name!r}: check says {right[row]} of puzzle {row + 1} and its answer, and {after[row]} after "
            "augment, which must turn both alike"
        )
    if isinstance(task, Reveals):
        _try_reveal(task, inputs, labels)


def _try_reveal(task: Task, inputs: Tokens, labels: Tokens) -> None:
    assert isinstance(task, Reveals)
    half = np.full(len(inputs), (inputs.shape[1] + 1) // 2)
    shown = np.asarray(task.reveal(inputs, labels, half, np.random.default_rng(0)))
    if shown.dtype != np.uint8 or shown.shape != inputs.shape:
        raise ValueError(
            f"task {task.name!r}: reveal must return uint8 {list(inputs.shape)}, got {shown.dtype} {list(shown.shape)}"
        )
    other = (shown != inputs) & (shown != labels)
    if other.any():
        row, cell = (int(i) for i in np.argwhere(other)[0])
        raise ValueError(
            f"task {task.name!r}: reveal must leave a cell as it is or show its answer; it makes {shown[row, cell]} of "
            f"cell {cell + 1} of puzzle {row + 1}, which is {inputs[row, cell]} and whose answer is {labels[row, cell]}"
        )


def _checked(task: Task, inputs: Tokens, labels: Tokens) -> Bools:
    right = np.asarray(task.check(inputs, labels))
    if right.dtype != bool or right.shape != (len(inputs),):
        raise TypeError(
            f"task {task.name!r}: check must return bool [N] = [{len(inputs)}], got {right.dtype} {list(right.shape)}"
        )
    return right
