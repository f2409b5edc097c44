"""`eqr generate`."""

from __future__ import annotations

import csv
import gzip
import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from eqr_kernels.atomic import atomic_write
from eqr_kernels.cli import options as opt
from eqr_kernels.cli.console import Bar, check_output, command, parse_range, to_json
from eqr_kernels.tasks import maze, sudoku, sudoku_generator
from eqr_kernels.tasks.common import PuzzleSet, rating_number
from eqr_kernels.tasks.registry import MAZE, SUDOKU, find_task
from eqr_kernels.tasks.task import Task, generated


class Written(StrEnum):
    text = "text"
    csv = "csv"
    npy = "npy"
    json = "json"


@command
def generate(
    what: Annotated[
        str, typer.Argument(metavar="TASK", help="sudoku, maze, or a task of your own, as --task of other commands.")
    ],
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="Number of puzzles.")] = 10,
    difficulty: Annotated[str | None, typer.Option(help="Sudoku: easy, medium (default), hard or extreme.")] = None,
    clues: Annotated[str | None, typer.Option(help="Sudoku, instead of --difficulty: as in 30 or 24-30.")] = None,
    guesses: Annotated[
        str | None, typer.Option(help="Sudoku, likewise: the exact solver's guesses, as in 0 or 5-20 or 10-.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Maze: side of the grid; else tokens.", show_default="30")] = None,
    path_length: Annotated[str | None, typer.Option(help="Maze: moves to the goal, as in 100 or 60-90 or 60-.")] = None,
    seed: Annotated[int, typer.Option(help="Puzzle i depends on the seed and i alone.")] = 0,
    answers: Annotated[bool, typer.Option("--answers", help="Write the answers too.")] = False,
    format: Annotated[
        Written, typer.Option(help="text (a puzzle a line, or puzzle,answer), csv, npy (tokens [N, S]) or json.")
    ] = Written.text,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, whole or not at all; .gz compresses. Default stdout."),
    ] = None,
    progress: opt.ShowProgress = None,
) -> None:
    """Make puzzles that have exactly one solution.

    A task of your own makes what its `generate` makes; --size is then the number of tokens, where the task leaves that
    open.
    """
    check_output(output)
    task = find_task(what)
    written = Written.json if as_json else format
    if written is Written.npy and (output is None or output.suffix != ".npy"):
        raise ValueError(f"--format npy needs --output FILE.npy, got {output}")
    with Bar("generating", progress) as bar:

        def done(count: int) -> None:
            bar.update(count, n)

        of_sudoku: dict[str, object] = {"--difficulty": difficulty, "--clues": clues, "--guesses": guesses}
        if task is SUDOKU:
            _refuse(task, {"--size": size, "--path-length": path_length})
            puzzles = _sudoku(n, difficulty, clues, guesses, seed, done)
        elif task is MAZE:
            _refuse(task, of_sudoku)
            puzzles = _mazes(n, size, path_length, seed, done)
        else:
            _refuse(task, {**of_sudoku, "--path-length": path_length})
            puzzles = generated(task, _seq_len(task, size), n, seed, done)
    if written is Written.npy:
        assert output is not None and puzzles.labels is not None
        if answers:
            atomic_write(output.with_name(f"{output.stem}.answers.npy"), _npy(puzzles.labels))
        atomic_write(output, _npy(puzzles.inputs))
        return
    text = _text(task, puzzles, written, answers)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        data = text.encode()
        atomic_write(output, gzip.compress(data, mtime=0) if output.suffix == ".gz" else data)


def _seq_len(task: Task, size: int | None) -> int:
    """Tokens of a puzzle of a task that is none of ours."""
    if task.seq_len is not None:
        _refuse(task, {"--size": size})
        return task.seq_len
    if size is None:
        raise ValueError(f"the {task.name} task has puzzles of any length; say with --size how many tokens")
    return size


def _refuse(task: Task, given: dict[str, object]) -> None:
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not for {task.name}; leave out")


def _sudoku(
    n: int, difficulty: str | None, clues: str | None, guesses: str | None, seed: int, progress: Any
) -> PuzzleSet:
    clue_range = None
    if clues is not None:
        low, high = parse_range("--clues", clues)
        clue_range = (low, sudoku.SEQ_LEN if high is None else high)
    guess_range = None if guesses is None else parse_range("--guesses", guesses)
    return sudoku_generator.generate(n, difficulty, clues=clue_range, guesses=guess_range, seed=seed, progress=progress)


def _mazes(n: int, size: int | None, path_length: str | None, seed: int, progress: Any) -> PuzzleSet:
    length = None if path_length is None else parse_range("--path-length", path_length)
    return maze.generate(n, size=30 if size is None else size, path_length=length, seed=seed, progress=progress)


def _text(task: Task, puzzles: PuzzleSet, format: Written, answers: bool) -> str:
    assert puzzles.labels is not None
    questions = [task.decode(row) for row in puzzles.inputs]
    solutions = [task.decode(row) for row in puzzles.labels]
    ratings = [rating_number(rating) for rating in puzzles.rating.tolist()]
    rows = list(zip(questions, solutions, puzzles.source.tolist(), ratings, strict=True))
    if format is Written.json:
        return to_json(
            [
                {"puzzle": question, **({"answer": answer} if answers else {}), "source": source, "rating": rating}
                for question, answer, source, rating in rows
            ]
        )
    if format is Written.csv:
        header = ["source", "question", *(["answer"] * answers), "rating"]
        cells = [[source, question, *([answer] * answers), str(rating)] for question, answer, source, rating in rows]
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([header, *cells])
        return file.getvalue()
    if any("," in text for text in (*questions, *solutions)):
        raise ValueError(f"a line may hold no comma, and {task.name} writes them in its puzzles; use --format csv")
    return "".join((f"{question},{answer}" if answers else question) + "\n" for question, answer, _, _ in rows)


def _npy(tokens: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    return buffer.getvalue()
