"""Tables that name their columns in every row, or keep them apart: JSON lines, JSON and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from eqr_kernels.tasks.common import ParseError, ParseErrors
from eqr_kernels.tasks.files.codec import Codec, Row
from eqr_kernels.tasks.files.columns import QUESTION_NAMES, roles
from eqr_kernels.tasks.files.container import DAMAGED, printable
from eqr_kernels.tasks.files.tables import table_row

Value = tuple[int, str, Any]  # line (of a document: number), text, parsed


def read_json(values: list[Value], name: str, codec: Codec, errors: ParseErrors) -> Iterator[Row]:
    """The rows that the values of `json_values` are."""
    for number, text, value in values:
        try:
            yield _row(number, text, value, name, codec)
        except ValueError as problem:
            errors.append(ParseError(number, text, str(problem)))


def json_values(lines: Iterable[tuple[int, str]]) -> list[Value] | None:
    """The puzzles of JSON lines (an object, or a puzzle, a line) or of one document; None where it is neither.

    A document is a list of objects or puzzles, such a list by a name, an object of columns, or one puzzle.
    """
    numbered = [(number, line) for number, line in lines if line.strip()]
    first = _parsed(numbered[0][1])
    if len(numbered) > 1 and isinstance(first, dict | list | str):
        return [(number, line, _parsed(line)) for number, line in numbered]
    document = _parsed("\n".join(line for _, line in numbered))
    if document is None:
        return None
    return [(number, json.dumps(value), value) for number, value in enumerate(_elements(document), 1)]


def _parsed(text: str) -> Any:
    """None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _elements(document: Any) -> list[Any]:
    if isinstance(document, list) and document and isinstance(document[0], dict | list | str):
        return [document] if _is_grid(document) else document
    if not isinstance(document, dict):
        return [document]
    columns = {key: list(value.values()) if isinstance(value, dict) else value for key, value in document.items()}
    named = roles(list(columns))["question"]
    puzzles = list(columns.values())[named] if named >= 0 else None
    if isinstance(puzzles, list) and puzzles and isinstance(puzzles[0], str) and len(puzzles[0]) > 9:
        lists = {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == len(puzzles)}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    records = [value for value in columns.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return records[0] if len(records) == 1 else [document]


def _is_grid(value: list[Any]) -> bool:
    """Whether a list is the nine rows of one grid, and not several puzzles."""
    rows = len(value) == 9 and all(isinstance(row, list | str) and len(row) == 9 for row in value)
    return rows and not any(isinstance(cell, list | dict) for row in value for cell in row)


def _row(number: int, text: str, value: Any, name: str, codec: Codec) -> Row:
    if isinstance(value, str | list):
        return table_row(number, text, value, "", name, "", None, codec, False)
    if not isinstance(value, dict):
        raise ValueError('is no JSON object, such as {"question": "53..7...", "answer": "5346789..."}')
    keys = list(value)
    columns = roles(keys)
    if columns["question"] < 0:
        names = ", ".join(repr(key) for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise ValueError(f"has the names {names or '(none)'}; the puzzle's must be one of {QUESTION_NAMES}")
    cells = {role: value[keys[column]] if column >= 0 else None for role, column in columns.items()}
    words = columns["rating"] >= 0 and "difficulty" in keys[columns["rating"]].lower()
    source = name if cells["source"] is None else cells["source"]
    parts = cells["question"], cells["answer"], source, cells["rating"], cells["id"]
    return table_row(number, text, *parts, codec, words)


def read_parquet(stream: BinaryIO, name: str, codec: Codec, errors: ParseErrors) -> Iterator[Row]:
    """The rows of a Parquet table.

    Raises:
        ImportError: pyarrow is not there.
        ValueError: it is no Parquet table, or no column is the puzzle.
    """
    question, _, records = parquet_records(stream, name, errors)
    for number, record in records:
        try:
            yield _row(number, str(record[question]), record, name, codec)
        except ValueError as problem:
            errors.append(ParseError(number, str(record), str(problem)))


def parquet_records(
    stream: BinaryIO, name: str, errors: ParseErrors
) -> tuple[str, int, Iterator[tuple[int, dict[str, Any]]]]:
    """A Parquet table, read as it is needed.

    Returns:
        the column with the puzzles, the number of rows, and of each row (number, the columns that say something here).

    Raises:
        As `read_parquet`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"{name} is a Parquet table, and reading it needs pyarrow: pip install 'eqr_kernels[data]', or save the "
            "table as CSV"
        ) from None
    broken = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, *DAMAGED)
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = table.schema_arrow.names
    except broken as problem:
        raise ValueError(f"{name} is no whole Parquet table ({printable(problem)}): fetch it again") from None
    columns = {role: names[i] for role, i in roles(names).items() if i >= 0}
    if "question" not in columns:
        raise ValueError(
            f"{name} has the columns {', '.join(map(repr, names))}, none of which is the puzzle: name one of them "
            f"{QUESTION_NAMES}"
        )

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            for batch in table.iter_batches(columns=list(columns.values())):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except broken as problem:
            message = f"the table cannot be read from here on ({printable(problem)}): fetch it again"
            errors.append(ParseError(number + 1, "", message))

    return columns["question"], table.metadata.num_rows, rows()
