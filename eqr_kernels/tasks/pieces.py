"""Tables of any size, CSV and Parquet, in pieces of so many rows: each is text that a task's `load` reads by itself."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from eqr_kernels.tasks.common import ParseError, ParseErrors, PuzzleSet
from eqr_kernels.tasks.files import numbered_lines
from eqr_kernels.tasks.files.container import Container, lines_of, open_container
from eqr_kernels.tasks.files.lines import is_comment
from eqr_kernels.tasks.files.records import parquet_records
from eqr_kernels.tasks.files.tables import Header, Numbered, find_header, records, split
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

    A CSV is one whose header has several columns, as many as the line behind it, or that `format` calls so: a name over
    written grids may look like a header of one.

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
        found = _find_table(_text_lines(container, ParseErrors()))
    if found is None:
        return None
    header, _, second = found
    several = header.width > 1 and len(split(second[1], header.delimiter)) == header.width if second else False
    return "csv" if several or format == "csv" else None


def pieces(path: Path, kind: str, rows: int) -> Iterator[Piece]:
    """The file, in its order, in pieces of `rows` rows (good or bad); the last has what is left.

    Args:
        kind: "csv" or "parquet", see `kind_of`.

    Raises:
        OSError, ValueError, ImportError: the file as a whole cannot be read.
    """
    with open(path, "rb") as file:
        size = max(1, path.stat().st_size)
        container = open_container(file, path.name, kind)
        errors = ParseErrors()
        held: list[Numbered] = []
        if kind == "parquet":
            top: tuple[Numbered, ...] = ()
            text, source = "json", _parquet_lines(container.stream, path.name, errors)
        else:
            lines = _text_lines(container, errors)
            found = _find_table(lines)
            if found is None:
                raise ValueError(f"{path.name} holds no CSV header with the puzzle's column")
            header, first, second = found
            top, text = (first,), "csv"
            source = _csv_lines(chain([second] if second else [], lines), header)
        count = 0
        for record in source:
            held += record
            count += 1
            if count == rows:
                yield Piece(path.name, text, (*top, *held), min(1.0, file.tell() / size))
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
    puzzles, found = task.load(text, format=piece.format)
    number = [line for line, _ in piece.lines]
    errors = [ParseError(number[error.line - 1], error.text, error.message) for error in found] + errors
    if not len(puzzles):
        return None, errors
    assert puzzles.line is not None
    puzzles.line[:] = [number[line - 1] for line in puzzles.line.tolist()]
    return puzzles, errors


def _text_lines(container: Container, errors: ParseErrors) -> Iterator[Numbered]:
    with lines_of(container) as stream:
        yield from numbered_lines(stream, errors)


def _find_table(lines: Iterator[Numbered]) -> tuple[Header, Numbered, Numbered | None] | None:
    """The header, its line and the next that is not empty; None where the first line of a text is none."""
    first = next((line for line in lines if line[1].strip() and not is_comment(line[1])), None)
    header = None if first is None else find_header(first[1])
    if first is None or header is None:
        return None
    return header, first, next((line for line in lines if line[1].strip()), None)


def _csv_lines(lines: Iterator[Numbered], header: Header) -> Iterator[list[Numbered]]:
    """The lines of each record. What is a comment is left to the task: one more line in a piece changes nothing."""
    for number, text, _ in records(lines, header, comments=False):
        yield list(enumerate(text.split("\n"), number))


def _parquet_lines(stream: BinaryIO, name: str, errors: ParseErrors) -> Iterator[list[Numbered]]:
    for number, record in parquet_records(stream, name, errors)[1]:
        yield [(number, json.dumps(record, default=_as_text))]


def _as_text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
