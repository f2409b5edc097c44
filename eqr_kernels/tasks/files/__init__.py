"""Puzzle files of any task: text in its usual forms, tables, arrays, and the HRM/EqR folder of arrays.

What a file is goes by its first bytes (`container`), what a text is by its first line: JSON (`records`), a header
(`tables`), or lines and written grids (`lines`, `grids`, `spaced`). All end as `Row`s, which `assemble` turns into a
set. A row that cannot be read becomes a ParseError and never costs its neighbours; no cell is ever guessed.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from eqr_kernels.tasks.common import UNKNOWN_RATING, ParseError, ParseErrors, PuzzleSet
from eqr_kernels.tasks.files.arrays import ArrayReader, IntArray, load_arrays
from eqr_kernels.tasks.files.assemble import from_rows
from eqr_kernels.tasks.files.codec import Codec, Row, encode_texts
from eqr_kernels.tasks.files.columns import QUESTION_NAMES
from eqr_kernels.tasks.files.container import DAMAGED, lines_of, open_container
from eqr_kernels.tasks.files.folder import load_folder
from eqr_kernels.tasks.files.grids import read_grids, written_grid
from eqr_kernels.tasks.files.lines import is_comment
from eqr_kernels.tasks.files.records import json_values, read_json, read_parquet
from eqr_kernels.tasks.files.tables import find_header, read_csv, starts_table

__all__ = ["FORMATS", "ArrayReader", "Codec", "IntArray", "Source", "encode_texts", "load_puzzles", "written_grid"]

Source = str | os.PathLike[str] | Iterable[str]

FORMATS = ("auto", "lines", "csv", "npy", "folder", "grids", "json", "parquet", "npz")
_NEEDS_PATH = ("npy", "npz", "folder", "parquet")


def load_puzzles(
    source: Source, codec: Codec, *, format: str, split: str | None, from_array: ArrayReader | None = None
) -> tuple[PuzzleSet, ParseErrors]:
    """Read `source`; see the tasks' `load`. `from_array` reads the integers of a lone array; without it, as tokens."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed are {', '.join(FORMATS)}")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if format == "folder" or (format == "auto" and path.is_dir()):
            return load_folder(path, codec, split)
        if split is not None:
            raise ValueError(f"split is {split!r}, but {path} is no folder with train/ and test/: leave it out")
        with open(path, "rb") as file:
            return _load_file(file, path.name, codec, format, from_array)
    if source is sys.stdin and hasattr(sys.stdin, "buffer"):
        # its bytes, so that a pipe may hold what a file may
        return _load_file(io.BytesIO(sys.stdin.buffer.read()), "stdin", codec, format, from_array)
    if format in _NEEDS_PATH:
        raise ValueError(f"format {format!r} needs a path, not a stream")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise TypeError(f"source is a {type(source).__name__}; it must be a path or a text stream")
    return _load_text(source, str(getattr(source, "name", "stream")).strip("<>"), codec, format)


def _load_file(
    file: BinaryIO, name: str, codec: Codec, format: str, from_array: ArrayReader | None
) -> tuple[PuzzleSet, ParseErrors]:
    container = open_container(file, name, format)
    if container.kind in ("npy", "npz"):
        return load_arrays(container.stream, name, codec, from_array)
    if container.kind == "parquet":
        errors = ParseErrors()
        return from_rows(list(read_parquet(container.stream, name, codec, errors)), codec, errors)
    with lines_of(container) as stream:
        return _load_text(stream, name, codec, format)


def _load_text(stream: Iterable[str], name: str, codec: Codec, format: str) -> tuple[PuzzleSet, ParseErrors]:
    errors = ParseErrors()
    return from_rows(_read_rows(numbered_lines(stream, errors), name, codec, format, errors), codec, errors)


def numbered_lines(stream: Iterable[str], errors: ParseErrors) -> Iterator[tuple[int, str]]:
    """(line number, text without its line end and the Ctrl-Z that old programs write at the end)."""
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            if not isinstance(line, str):
                raise TypeError(f"source yields {type(line).__name__}; it must be a text stream: open it in mode 'r'")
            yield number, (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n\x1a")
    except DAMAGED as problem:
        errors.append(ParseError(number + 1, "", f"the file cannot be read from here on ({problem}): fetch it again"))


def _read_rows(
    lines: Iterator[tuple[int, str]], name: str, codec: Codec, format: str, errors: ParseErrors
) -> list[Row]:
    before: list[tuple[int, str]] = []  # blank lines and comments
    first = next(lines, None)
    while first is not None and (not first[1].strip() or (codec.blanks and is_comment(first[1]))):
        before.append(first)
        first = next(lines, None)
    if first is None:
        return read_grids(before, name, codec, errors, format) if codec.blanks else []
    ahead = [first]
    while len(ahead) == 1 or not ahead[-1][1].strip():
        following = next(lines, None)
        if following is None:
            break
        ahead.append(following)
    second = ahead[-1][1] if len(ahead) > 1 else ""
    if format == "json" or (format == "auto" and _is_json(first[1])):
        ahead += lines
        values = json_values(ahead)
        if values is not None:
            return list(read_json(values, name, codec, errors))
        if format == "json" or not re.match(r"[\s\[{(]*\d", first[1] + second):  # which may be rows in brackets
            raise ValueError(f"{name} begins like JSON, and is neither JSON lines nor one JSON document")
    if format in ("auto", "csv"):
        header = starts_table(first[1], second, codec) if format == "auto" else find_header(first[1])
        if header is not None:
            return list(read_csv(chain(ahead[1:], lines), header, name, codec, errors))
        if format == "csv":
            raise ValueError(
                f"the CSV header on line {first[0]} has the columns {first[1][:200]!r}, none of which is the puzzle: "
                f"name one of them {QUESTION_NAMES}"
            )
    if not codec.blanks:
        return _lines_as_they_are(chain(ahead, lines), name, errors)
    return read_grids(chain(before, ahead, lines), name, codec, errors, format)


def _is_json(line: str) -> bool:
    """Whether a text that begins with this line should be JSON: neither "[Puzzle]" nor "[53..7..." is."""
    return re.match(r"""\s*(\{\s*($|["}])|\[\s*($|[\[{"\]]))""", line) is not None


def _lines_as_they_are(lines: Iterable[tuple[int, str]], name: str, errors: ParseErrors) -> list[Row]:
    """A puzzle, or puzzle,answer, a line, of a task whose cells may be spaces."""
    rows = []
    for number, line in lines:
        fields = line.split(",")
        if len(fields) > 2:
            message = (
                f"has {len(fields)} fields; a line is one puzzle or puzzle,answer, and a CSV needs a header with a "
                f"column such as {QUESTION_NAMES}"
            )
            errors.append(ParseError(number, line, message))
        elif line.strip():
            rows.append(Row(number, line, fields[0], fields[1] if len(fields) == 2 else "", name, UNKNOWN_RATING))
    return rows
