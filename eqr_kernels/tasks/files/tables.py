"""Tables with named columns: the roles of their columns, the values of their cells, and CSV itself."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from eqr_kernels.tasks.common import UNKNOWN_RATING, ParseError, ParseErrors
from eqr_kernels.tasks.files.codec import Codec, Row
from eqr_kernels.tasks.files.columns import roles
from eqr_kernels.tasks.files.container import printable
from eqr_kernels.tasks.files.grids import field_cells
from eqr_kernels.tasks.files.lines import is_comment, is_grid_row

Numbered = tuple[int, str]  # line number, text without its line end

_DELIMITERS = ",\t;|"
_LONGEST_RECORD = 200  # lines, after which an open quote is a stray one
_WHOLE = 2**53  # greater whole numbers would change in float64


class Header(NamedTuple):
    """Where the columns are; -1 for a role that no column has. `words` tells that ratings may be words, passed over."""

    delimiter: str
    width: int
    question: int
    answer: int
    source: int
    rating: int
    id: int
    words: bool


def find_header(line: str, delimiters: str = _DELIMITERS) -> Header | None:
    """The header that a line is, or None when no column is the question."""
    best = None
    for delimiter in delimiters:
        fields = split(line, delimiter)
        columns = roles(fields)
        if columns["question"] >= 0 and (best is None or len(fields) > best.width):
            rating = columns["rating"]
            words = rating >= 0 and "difficulty" in fields[rating].lower()
            best = Header(delimiter, len(fields), **columns, words=words)
    return best


def split(line: str, delimiter: str) -> list[str]:
    """The fields of one line of CSV; of a quote that is not closed, those of csv's guess."""
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a field beyond csv's limit
        return line.split(delimiter)


def read_csv(lines: Iterable[Numbered], header: Header, name: str, codec: Codec, errors: ParseErrors) -> Iterator[Row]:
    """The rows behind the header. A stray quote spoils its own line, not those that follow."""
    for number, text, fields in records(lines, header, comments=bool(codec.blanks)):
        if codec.blanks and not text.strip(header.delimiter + " "):
            continue  # a spreadsheet's empty row
        while len(fields) > header.width and not fields[-1].strip():
            fields.pop()
        try:
            if len(fields) != header.width:
                raise ValueError(f"has {len(fields)} fields; the header has {header.width}")
            question = fields[header.question]
            answer = fields[header.answer] if header.answer >= 0 else ""
            source = fields[header.source] if header.source >= 0 else name
            rating = fields[header.rating] if header.rating >= 0 else ""
            its_id = fields[header.id] if header.id >= 0 else None
            yield table_row(number, text, question, answer, source, rating, its_id, codec, header.words)
        except ValueError as problem:
            errors.append(ParseError(number, text, str(problem)))


def records(lines: Iterable[Numbered], header: Header, *, comments: bool) -> Iterator[tuple[int, str, list[str]]]:
    """(line number, text, fields) of each record; a quoted field may hold line breaks.

    Args:
        comments: lines that begin with '#' are none, and white space around a line says nothing.
    """
    ahead: list[Numbered] = []  # lines to be read again, the next last
    stream = iter(lines)

    def following() -> Numbered | None:
        return ahead.pop() if ahead else next(stream, None)

    while (first := following()) is not None:
        number, line = first
        if not line.strip() or (comments and is_comment(line)):
            continue
        if comments:
            line = line.strip(" \r") if header.delimiter == "\t" else line.strip()
        taken = [first]
        fields = None
        while line.count('"') % 2 and fields is None and len(taken) < _LONGEST_RECORD:
            another = following()
            if another is None:
                break
            taken.append(another)
            if another[1].count('"') % 2:
                fields = _joined(taken, header)
                break
        if fields is not None:
            yield number, "\n".join(text for _, text in taken), fields
        else:
            ahead.extend(reversed(taken[1:]))
            yield number, line, split(line, header.delimiter)


def _joined(taken: list[Numbered], header: Header) -> list[str] | None:
    """The fields of lines that are one record, or None when they are not."""
    text = "\n".join(text for _, text in taken)
    try:
        records = list(csv.reader(text.splitlines(keepends=True), delimiter=header.delimiter, strict=True))
    except csv.Error:
        return None
    return records[0] if len(records) == 1 and len(records[0]) == header.width else None


def starts_table(line: str, following: str, codec: Codec) -> Header | None:
    """The header that the first line of a file is; a name over a written grid is its title and no header."""
    header = find_header(line)
    titled = header is not None and codec.blanks and is_grid_row(following, codec.alphabet)
    return None if titled else header


def table_row(
    number: int,
    text: str,
    question: Any,
    answer: Any,
    source: Any,
    rating: Any,
    its_id: Any,
    codec: Codec,
    words: bool,
) -> Row:
    """A row from the values of a table, CSV or other.

    Raises:
        ValueError: the rating is no number.
    """
    return Row(
        number,
        text,
        field_cells(cell_text(question), codec),
        field_cells(cell_text(answer), codec),
        printable(source),
        parse_rating(rating, words),
        "" if its_id is None else str(its_id),
    )


def cell_text(value: Any) -> str:
    """A puzzle as a table has it: text, or numbers and None in lists (of lists), 0 and None a blank."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, list | tuple):
        return "".join(_flat(value))
    return str(value)


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif value is None or value == "":
        yield "."
    else:
        text = str(value)
        yield text if len(text) == 1 or isinstance(value, str) else f"[{text}]"  # a number of two digits is no cell


def parse_rating(value: Any, words: bool = False) -> float:
    """A rating as float64; -1 where there is none, or a word (such as "easy") where `words` are allowed.

    Raises:
        ValueError: no number, or a whole number that float64 would change.
    """
    text = "" if value is None else str(value).strip()
    if text.lower() in ("", "nan", "null", "none", "na", "n/a"):
        return UNKNOWN_RATING
    try:
        number = float(text.replace(",", ".") if text.count(",") == 1 else text)
    except ValueError:
        if words:
            return UNKNOWN_RATING
        raise ValueError(f"has the rating {text!r}; it must be a number or empty") from None
    if not math.isfinite(number) or abs(number) > _WHOLE:
        raise ValueError(f"has the rating {text}; it must lie within 2^53 of zero")
    return number
