"""Tables that name their columns in every row, or keep them apart: JSON lines, JSON and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from eqr_kernels.tasks.common import ParseError, ParseErrors
from eqr_kernels.tasks.files.codec import Codec, Row
from eqr_kernels.tasks.files.container import DAMAGED, printable
from eqr_kernels.tasks.files.tables import QUESTION_NAMES, roles, table_row


def read_json(lines: Iterable[tuple[int, str]], name: str, codec: Codec, errors: ParseErrors) -> Iterator[Row]:
    """The rows of JSON lines (an object, or a puzzle, a line) or of one JSON document (a list of such, or one).

    Raises:
        ValueError: it is neither.
    """
    numbered = [(number, line) for number, line in lines if line.strip()]
    values = [(number, line, _parsed(line)) for number, line in numbered]
    whole = values[0][2] if len(values) == 1 else None
    if len(values) > 1 and not isinstance(values[0][2], dict | list | str):  # no JSON lines
        whole = _parsed("\n".join(line for _, line in numbered))
        if whole is None:
            raise ValueError(f"{name} begins like JSON, and is neither JSON lines nor one JSON document")
    if isinstance(whole, list) and whole and isinstance(whole[0], dict | list | str) and not _is_grid(whole):
        # of an element of a document there is no line, so it is counted
        values = [(number, json.dumps(value), value) for number, value in enumerate(whole, 1)]
    elif isinstance(whole, dict):
        values = [(numbered[0][0], json.dumps(whole), whole)]
    for number, text, value in values:
        try:
            yield _row(number, text, value, name, codec)
        except ValueError as problem:
            errors.append(ParseError(number, text, str(problem)))


def _parsed(text: str) -> Any:
    """None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_grid(value: list[Any]) -> bool:
    """Whether a list of lists is one grid, and not several puzzles."""
    return isinstance(value[0], list) and all(isinstance(cell, int | None) for cell in value[0]) and len(value) == 9


def _row(number: int, text: str, value: Any, name: str, codec: Codec) -> Row:
    if isinstance(value, str | list):
        return table_row(number, text, value, "", name, "", codec, False)
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
    return table_row(number, text, cells["question"], cells["answer"], source, cells["rating"], codec, words)


def read_parquet(stream: BinaryIO, name: str, codec: Codec, errors: ParseErrors) -> Iterator[Row]:
    """The rows of a Parquet table.

    Raises:
        ImportError: pyarrow is not there.
        ValueError: it is no Parquet table, or no column is the puzzle.
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
    number = 0
    try:
        for batch in table.iter_batches(columns=list(columns.values())):
            for record in batch.to_pylist():
                number += 1
                try:
                    yield _row(number, str(record[columns["question"]]), record, name, codec)
                except ValueError as problem:
                    errors.append(ParseError(number, str(record), str(problem)))
    except broken as problem:
        message = f"the table cannot be read from here on ({printable(problem)}): fetch it again"
        errors.append(ParseError(number + 1, "", message))
