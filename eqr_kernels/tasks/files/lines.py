"""One line of a text with puzzles: what it is, and the cells in it.

Nothing is guessed here: cells are taken only where their number is exactly that of a grid, or of a row of one.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from eqr_kernels.tasks.files.codec import FENCE, Alphabet

_BARS = "|\u00a6!:" + "".join(map(chr, range(0x2500, 0x2580)))
_SEPARATORS = str.maketrans(dict.fromkeys(_BARS + "[](){}>,;'\"`", " "))
_UPRIGHT = "|\u00a6!:\u2502\u2503\u2551"
_ONE_BAR = str.maketrans(dict.fromkeys(_UPRIGHT, "|"))
_RULE = frozenset("-+*|=_~ \t\u2014\u2013" + _BARS)
_CORNERED_RULE = re.compile(rf"[-+*|=_~\s.'`,{_BARS}]*[-=_~\u2500-\u257f]{{3}}[-+*|=_~\s.'`,{_BARS}]*")
FIELD = rf"[^{FENCE}]+"
_NUMBERED = re.compile(r"\s*#\d{1,7}[.:)]?\s")
_SECTION = re.compile(r"\[\s*([A-Za-z][A-Za-z ]*?)\s*\]")


class Kind(Enum):
    PUZZLE = "a whole grid in a row, with or without its answer"
    ROW = "a row of a written grid"
    SPACED = "digits and spaces: a row where spaces are the blanks, or too few cells"
    RULE = "a line drawn between rows"
    BARS = "upright bars and spaces only: between rows, or a row where spaces are the blanks"
    BLANK = "nothing"
    COMMENT = "a comment"
    SECTION = "a name in brackets"
    PARTIAL = "cells, but not as many as a row has"
    CANDIDATES = "a row of candidates"
    DAMAGED = "so many cells in a row that it must be meant as a puzzle"
    TEXT = "anything else"


class Line(NamedTuple):
    """A line, its kind and what the kind needs: cells (of a row), parts (question and answer) or a name."""

    number: int
    text: str
    kind: Kind
    cells: str = ""
    answer: str = ""


def is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def is_grid_row(line: str, alphabet: Alphabet) -> bool:
    """Whether a line is one of a written grid."""
    return classify(0, line, alphabet).kind in (Kind.ROW, Kind.RULE, Kind.SPACED)


def classify(number: int, text: str, alphabet: Alphabet) -> Line:
    """What a line is. What follows a '#' is a comment, but "#12 53..7..." is the twelfth puzzle."""
    body = text
    if "#" in text:
        numbered = _NUMBERED.match(text) and alphabet.grid.search(text)
        body = (text.replace("#", " ", 1) if numbered else text).partition("#")[0].rstrip(" \r\n")
    stripped = body.strip()
    if not stripped:
        if body.count("\t") == alphabet.side - 1:
            return Line(number, text, Kind.ROW, " " * alphabet.side)
        return Line(number, text, Kind.COMMENT if text.strip() else Kind.BLANK)
    section = _SECTION.fullmatch(stripped)
    if section:
        return Line(number, text, Kind.SECTION, section[1].lower())
    if set(stripped) <= _RULE or _CORNERED_RULE.fullmatch(stripped):
        return _rule(number, text, stripped, alphabet)
    return _puzzle(number, text, body, alphabet) or _part_of_grid(number, text, body, alphabet)


def joined(text: str, alphabet: Alphabet) -> str:
    """All cells of a grid, in equal groups between white space or bars, or in a field each; "" where they are not."""
    size = alphabet.side**2
    for delimiter in ",;\t":
        cells = _fields(text, delimiter, alphabet, size)
        if cells:
            return filled(cells, alphabet)
    groups = text.translate(_SEPARATORS).split()
    return _equal_groups(groups, alphabet, size)


def _fields(text: str, delimiter: str, alphabet: Alphabet, count: int) -> str:
    """The cells of `count` fields, ' ' for an empty one; "" when the text has another number, or no such fields."""
    if text.count(delimiter) != count - 1:
        return ""
    fields = [field.strip() for field in text.split(delimiter)]
    fit = all(len(field) <= 1 and field in alphabet.cells for field in fields)
    return "".join(field or " " for field in fields) if fit else ""


def _between_bars(body: str, side: int) -> str:
    """What stands between upright bars, without the outer ones; "" where a cell has not even its space: it is lost."""
    bars = body.translate(_ONE_BAR)
    inner = bars.strip()
    if inner.startswith("|") and inner.endswith("|") and inner.count("|") == side + 1:
        bars = inner[1:-1]
    return "" if "||" in bars or bars.startswith("|") or bars.endswith("|") else bars


def filled(cells: str, alphabet: Alphabet) -> str:
    """The cells with blanks for empty fields; "" where blanks are written too: an empty field has lost its digit."""
    if " " not in cells:
        return cells
    return cells.replace(" ", alphabet.blanks[0]) if set(cells).isdisjoint(alphabet.blanks) else ""


def _equal_groups(groups: list[str], alphabet: Alphabet, count: int) -> str:
    """The `count` cells of groups of one length; unequal ones may be a number or a name beside too few cells."""
    cells = "".join(groups)
    equal = len({len(group) for group in groups}) == 1
    return cells if len(cells) == count and equal and set(cells) <= set(alphabet.cells) else ""


def _rule(number: int, text: str, stripped: str, alphabet: Alphabet) -> Line:
    """Rules never count as blanks; one of as many cells as a row keeps them for a grid that shows it is none."""
    marks = "".join(stripped.translate(_SEPARATORS).split())
    if not marks:
        empty = _between_bars(text, alphabet.side)  # cells with a bar between any two
        if empty and empty.count("|") == alphabet.side - 1:
            return Line(number, text, Kind.ROW, " " * alphabet.side)
        drawn = "||" in stripped or not set(stripped) <= set(_UPRIGHT + " \t")
        return Line(number, text, Kind.RULE if drawn else Kind.BARS)
    if marks == "_" * alphabet.side:
        return Line(number, text, Kind.ROW, marks)
    cells = marks if len(marks) == alphabet.side and set(marks) <= set(alphabet.blanks) else ""
    return Line(number, text, Kind.RULE, cells)


def _puzzle(number: int, text: str, body: str, alphabet: Alphabet) -> Line | None:
    """A whole grid in a row among other fields, or what must be meant as one."""
    runs = [run for run in alphabet.grid.finditer(body) if not set(run[0]) <= _RULE]
    spans = {run.span() for run in runs}
    other = [long for long in long_fields(body, alphabet) if long.span() not in spans]
    if len(runs) == 2 and not other:
        return Line(number, text, Kind.PUZZLE, runs[0][0], runs[1][0])
    if len(runs) == 1 and not other:
        return Line(number, text, Kind.PUZZLE, runs[0][0])
    if len(runs) == 1 and len(other) == 1 and other[0].start() > runs[0].start():
        return Line(number, text, Kind.PUZZLE, runs[0][0], other[0][0])  # encoding it tells what is wrong
    if not runs:
        cells = joined(body, alphabet)
        if cells:
            return Line(number, text, Kind.PUZZLE, cells)
    if runs or other:
        return Line(number, text, Kind.DAMAGED)
    return None


def long_fields(body: str, alphabet: Alphabet) -> list[re.Match[str]]:
    """The fields of a line that are puzzles, or must be meant as such: long, and mostly cells with digits."""
    return [
        field
        for field in re.finditer(FIELD, body)
        if len(field[0]) >= 3 * alphabet.side
        and sum(c in alphabet.cells for c in field[0]) >= 0.8 * len(field[0])
        and not set(field[0]).isdisjoint(alphabet.digits)
    ]


def _part_of_grid(number: int, text: str, body: str, alphabet: Alphabet) -> Line:
    side = alphabet.side
    for fields, delimiter in ((body, ","), (body, ";"), (body, "\t"), (_between_bars(body, side), "|")):
        cells = _fields(fields, delimiter, alphabet, side)
        if cells:
            return Line(number, text, Kind.ROW, cells)
    groups = body.translate(_SEPARATORS).split()
    cells = "".join(groups)
    row = _equal_groups(groups, alphabet, side)
    if row:
        return Line(number, text, Kind.ROW, row)
    if not groups and not set(body).isdisjoint("[](){}'\"`"):
        return Line(number, text, Kind.RULE)
    if len(groups) == side and all(set(g) <= set(alphabet.cells) for g in groups) and cells.strip(alphabet.blanks):
        return Line(number, text, Kind.CANDIDATES)
    if set(body) <= set(alphabet.digits + " " + _BARS) and len(cells) < side:
        return Line(number, text, Kind.SPACED, cells)
    if set(cells) <= set(alphabet.cells):
        return Line(
            number, text, Kind.PARTIAL, "." * (len(groups) if max(map(len, groups), default=0) <= 2 else len(cells))
        )
    damaged = side - 2 <= len(cells) <= side + 2 and sum(c in alphabet.cells for c in cells) >= 0.6 * len(cells)
    if damaged:
        return Line(number, text, Kind.PARTIAL, "." * len(cells))
    # of a larger grid, whose digits go on with letters or numbers
    if re.fullmatch(r"[0-9A-Pa-p.*_-]+", cells) and re.search(r"[0-9.*_-]", cells):
        if len(groups) > side and max(map(len, groups)) <= 2:
            return Line(number, text, Kind.PARTIAL, "." * len(groups))
        if len(groups) == 1 and len(cells) > side:
            return Line(number, text, Kind.PARTIAL, "." * len(cells))
    return Line(number, text, Kind.TEXT)
