"""Puzzles and models as the commands take them."""

from __future__ import annotations

import dataclasses
import os
import sys
from itertools import chain
from typing import Any

import numpy as np
import torch

from eqr_kernels.cli.console import busy, complain
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.subset import stratified_subset
from eqr_kernels.tasks.common import KEPT_ERRORS, ParseError, ParseErrors, PuzzleSet
from eqr_kernels.tasks.registry import MAZE, SUDOKU, choose_task
from eqr_kernels.tasks.task import CountsSolutions, Reveals, Task, solutions_of, turns_of, views_of
from eqr_kernels.tasks.views import MakeViews, Turns

__all__ = [
    "ParseErrors",
    "Task",
    "errors_as_json",
    "load_model",
    "read_answered",
    "read_puzzles",
    "report_errors",
    "reveal_clues",
    "solutions",
    "stratified",
    "task_for",
    "that_counts",
    "turns_for",
    "views_for",
    "with_answers",
]

_SHOWN_ERRORS = 20


def load_model(source: str, device: str, show: bool | None = None) -> EquilibriumReasoner:
    """The model, in eval mode on its device.

    Raises:
        As `EquilibriumReasoner.from_pretrained`; RuntimeError: no such device here.
    """
    with busy(f"loading {source}", show):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return EquilibriumReasoner.from_pretrained(source).to(device)


def task_for(wanted: str | None, model: EquilibriumReasoner) -> Task:
    """The task that --task names, else that of the model's card, else what its sizes say.

    Raises:
        As `choose_task`.
    """
    card = model.card
    remembered = {} if card is None else dict(name=card.task, place=card.task_object)
    return choose_task(wanted, model.config, **remembered)


def read_puzzles(
    task: Task,
    seq_len: int,
    file: str | None,
    *,
    format: str = "auto",
    values: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    show: bool | None = None,
) -> tuple[PuzzleSet, ParseErrors]:
    """The puzzles of `file` ("-" or, when it is piped, None: stdin), and the rows up to there that are none.

    Raises:
        OSError, ValueError, TypeError, ImportError: the file as a whole cannot be read, is empty, or holds puzzles of
            another size.
    """
    if file is None and sys.stdin.isatty():
        made = f"; `eqr generate {task.name}` makes some" if task in (SUDOKU, MAZE) else ""
        raise ValueError(f"no puzzles: name a FILE, or - for those on stdin{made}")
    stdin = file in (None, "-")
    name = "stdin" if stdin else str(file)
    if not stdin and not os.path.exists(name):
        raise FileNotFoundError(f"{name}: no such file or folder")
    with busy(f"reading {name}", show):
        puzzles, errors = task.load(
            sys.stdin if file is None or stdin else file, format=format, split=split, values=values
        )
    if not len(puzzles) and not errors:
        such_as = f", such as {task.written}" if task.written else ""
        raise ValueError(f"{name} holds no puzzles; a line is one puzzle{such_as}")
    if len(puzzles) and puzzles.inputs.shape[1] != seq_len:
        raise ValueError(f"{name} holds puzzles of {puzzles.inputs.shape[1]} cells, and the model takes {seq_len}")
    if limit is not None and limit < len(puzzles):
        puzzles = puzzles.subset(slice(limit))
        assert puzzles.line is not None
        errors = errors.before(int(puzzles.line[-1]))
    return puzzles, errors


def report_errors(errors: ParseErrors) -> None:
    """Names the rows that could not be used, on stderr."""
    for error in errors[:_SHOWN_ERRORS]:
        complain(str(error))
    if errors.total > _SHOWN_ERRORS:
        listed = f"the first {KEPT_ERRORS}" if errors.omitted else "all"
        complain(f"and {errors.total - _SHOWN_ERRORS} more lines (--json lists {listed})")


def errors_as_json(errors: ParseErrors) -> list[dict[str, Any]]:
    return [dataclasses.asdict(error) for error in errors]


def reveal_clues(task: Task, puzzles: PuzzleSet, clues: int | None, seed: int) -> PuzzleSet:
    """The puzzles with random clues of their answers shown until there are `clues`; None shows none.

    Raises:
        ValueError: a task that reveals none, or no answers to show clues of.
    """
    if clues is None or not len(puzzles):
        return puzzles
    if not isinstance(task, Reveals):
        raise ValueError(
            f"--reveal is for Sudoku and tasks with a `reveal`, and this model solves the {task.name} task; "
            "leave it out"
        )
    if puzzles.labels is None:
        raise ValueError("--reveal shows clues of the answers, and the puzzles come without; give a CSV with answers")
    inputs = task.reveal(puzzles.inputs, puzzles.labels, clues, np.random.default_rng(seed))
    return dataclasses.replace(puzzles, inputs=inputs)


def solutions(task: Task, puzzles: PuzzleSet, show: bool | None = None) -> list[str]:
    """How many solutions each puzzle has, by the task's exact solver: "none", "one" or "several".

    Raises:
        ValueError: the task has none.
    """
    counting = that_counts(task)
    with busy("counting solutions", show):
        return [solutions_of(counting, grid) for grid in puzzles.inputs]


def that_counts(task: Task) -> CountsSolutions:
    """The task, which has an exact solver.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(task, CountsSolutions):
        raise ValueError(
            f"--check is for Sudoku and tasks with a `count_solutions`, and this model solves the {task.name} task; "
            "leave it out"
        )
    return task


def read_answered(task: Task, seq_len: int, file: str | None, **reading: Any) -> tuple[PuzzleSet, ParseErrors]:
    """The puzzles of `file` that come with their answers, and the rows that are none, which are named on stderr.

    Args:
        reading: further arguments of `read_puzzles`, which see.

    Raises:
        As `read_puzzles` and `with_answers`.
    """
    puzzles, errors = with_answers(*read_puzzles(task, seq_len, file, **reading), task)
    report_errors(errors)
    return puzzles, errors


def views_for(task: Task, seq_len: int, count: int, seed: int, option: str) -> MakeViews:
    """What makes so many views of each puzzle.

    Args:
        option: as the user gave it, for messages.

    Raises:
        ValueError: the task knows no views, or not so many.
    """
    make = views_of(task, seed)
    try:
        make(np.zeros((0, seq_len), np.uint8), count)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from None
    return make


def turns_for(task: Task, every: int | None, depth: int, seed: int) -> Turns | None:
    """What `--turn-every` asks for; None: no turns.

    Args:
        depth: outer steps at most.

    Raises:
        ValueError: the task knows no symmetries, or none would be taken.
    """
    if every is None:
        return None
    if every >= depth:
        raise ValueError(
            f"--turn-every must be less than the depth, {depth}, or nothing turns, got {every}; leave it out"
        )
    try:
        return turns_of(task, every, seed)
    except ValueError as error:
        raise ValueError(f"--turn-every {every}: {error}") from None


def stratified(puzzles: PuzzleSet, subset: int | None) -> PuzzleSet:
    """Only so many of the puzzles, see `studies.stratified_subset`; None takes all."""
    if subset is None:
        return puzzles
    return puzzles.subset(stratified_subset(puzzles.inputs, puzzles.source, puzzles.rating, subset))


def with_answers(puzzles: PuzzleSet, errors: ParseErrors, task: Task) -> tuple[PuzzleSet, ParseErrors]:
    """The puzzles whose answers are known; the others join the errors, in the order of their lines.

    Raises:
        ValueError: no answer is known.
    """
    known = np.zeros(len(puzzles), bool) if puzzles.labels is None else puzzles.labels.any(1)
    if not known.any():
        if not len(puzzles) and errors:
            raise ValueError(f"none of {errors.total} rows could be read, the first on {errors[0]}")
        first = f"; the first unreadable row is {errors[0]}" if errors else ""
        raise ValueError(f"no puzzle comes with its answer, which accuracy needs; give a CSV question,answer{first}")
    missing = (
        ParseError(_line(puzzles, i), task.decode(puzzles.inputs[i]), "has no answer, which accuracy needs")
        for i in np.flatnonzero(~known).tolist()
    )
    return puzzles.subset(known), ParseErrors(chain(errors, missing), errors.omitted)


def _line(puzzles: PuzzleSet, row: int) -> int:
    return row + 1 if puzzles.line is None else int(puzzles.line[row])
