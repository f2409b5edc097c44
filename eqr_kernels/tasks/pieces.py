"""Tables of any size, CSV and Parquet, in pieces of so many rows: each is text that a task's `load` reads by itself."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqr_kernels.tasks.common import ParseError, ParseErrors, PuzzleSet
from eqr_kernels.tasks.files import numbered_lines
from eqr_kernels.tasks.files.container import Container, lines_of, open_container
from eqr_kernels.tasks.files.lines import is_comment
from eqr_kernels.tasks.files.records import parquet_records
from eqr_kernels.tasks.files.tables import Header, Numbered, find_header, records
from eqr_kernels.tasks.task import Task


@dataclass(frozen=True)
class Piece:
    """Rows of a table that follow each other.

    Attributes:
        name: of the file.
        format: of the text, "csv" or "json".
        lines: the header where there is one, and the rows; each with its line of the file (of Parquet its row).
        share: of the file, read so far.
        errors: rows that could not even be found.
    """

    name: str
    format: str
    lines: tuple[Numbered, ...]
    share: float
    errors: tuple[ParseError, ...] = ()


class _Text(io.StringIO):
    """A text stream with a name, from which rows without a source have theirs."""

    name = ""


def kind_of(path: Path, format: str = "auto") -> str | None:
    """How a file is read in pieces: "csv" or "parquet"; None where it can only be read whole.

    A CSV is one whose header names two things that are known here, or has as many columns (two or more) as the row
    behind it, or that `format` calls so: a title over written grids may look like a header.

    Args:
        format: as for `Task.load`.

    Raises:
        OSError, ValueError: it cannot be read, see `open_container`.
    """
    if format not in ("auto", "csv", "parquet") or path.is_dir():
        return None
    with open(path, "rb") as file:
        container = open_container(file, path.name, format)
        if container.kind != "text":
            return "parquet" if container.kind == "parquet" else None
        lines = _text_lines(container, ParseErrors())
        located = _find_table(lines)
        if located is None:
            return None
        header = located[0]
        row = next(records(lines, header, comments=True), None)
    known = sum(column >= 0 for column in (header.question, header.answer, header.source, header.rating, header.id))
    wide = header.width > 1 and row is not None and len(row[2]) == header.width
    return "csv" if known > 1 or wide or format == "csv" else None


def pieces(path: Path, kind: str, rows: int) -> Iterator[Piece]:
    """The file, in its order, in pieces of `rows` rows (good or bad); the last has what is left.

    Args:
        kind: "csv" or "parquet", see `kind_of`.

    Raises:
        OSError, ValueError, ImportError: the file as a whole cannot be read.
    """
    with open(path, "rb") as file:
        container = open_container(file, path.name, kind)
        errors = ParseErrors()
        held: list[Numbered] = []
        if kind == "parquet":
            top: tuple[Numbered, ...] = ()
            _, size, table = parquet_records(container.stream, path.name, errors)
            text, source = "json", ([(n, json.dumps(record, default=_as_text))] for n, record in table)
        else:
            lines = _text_lines(container, errors)
            located = _find_table(lines)
            if located is None:
                raise ValueError(f"{path.name} holds no CSV header with the puzzle's column")
            header, first = located
            top, text, size = (first,), "csv", path.stat().st_size
            # What is a comment is left to the task: one more line in a piece changes nothing.
            source = (list(enumerate(record.split("\n"), n)) for n, record, _ in records(lines, header, comments=False))
        count = 0
        for record in source:
            held += record
            count += 1
            if count == rows:
                # An open quote is looked for to the end, where the file is closed.
                done = held[-1][0] if kind == "parquet" else size if file.closed else file.tell()
                yield Piece(path.name, text, (*top, *held), min(1.0, done / max(1, size)))
                held, count = [], 0
        if held or errors:
            yield Piece(path.name, text, (*top, *held) if held else (), 1.0, tuple(errors))


def load_piece(task: Task, piece: Piece) -> tuple[PuzzleSet | None, list[ParseError]]:
    """What `task.load` makes of a piece; lines are those of the file. None where no row is a puzzle."""
    errors = list(piece.errors)
    if not piece.lines:
        return None, errors
    text = _Text("".join(f"{line}\n" for _, line in piece.lines))
    text.name = piece.name
    puzzles, unread = task.load(text, format=piece.format)
    number = [line for line, _ in piece.lines]
    errors = [ParseError(number[error.line - 1], error.text, error.message) for error in unread] + errors
    if not len(puzzles):
        return None, errors
    assert puzzles.line is not None
    puzzles.line[:] = [number[line - 1] for line in puzzles.line.tolist()]
    return puzzles, errors


def _text_lines(container: Container, errors: ParseErrors) -> Iterator[Numbered]:
    with lines_of(container) as stream:
        yield from numbered_lines(stream, errors)


def _find_table(lines: Iterator[Numbered]) -> tuple[Header, Numbered] | None:
    """The header and its line; None where the first line of a text is none. The lines go on behind it."""
    first = next((line for line in lines if line[1].strip() and not is_comment(line[1])), None)
    header = None if first is None else find_header(first[1])
    return None if first is None or header is None else (header, first)


def _as_text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
