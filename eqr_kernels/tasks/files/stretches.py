"""Grids of several lines, out of the lines that may be theirs.

Rows are put together only where nothing else is possible: in a stretch of lines whose rows make up whole grids. A
stretch that has a row too few or too many is refused whole, because its cells could stand one row off.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

from eqr_kernels.tasks.files.codec import Alphabet
from eqr_kernels.tasks.files.lines import Kind, Line, filled
from eqr_kernels.tasks.files.spaced import spaced_rows

Grid = tuple[int, str]  # number of its first line, cells

IN_GRIDS = (Kind.ROW, Kind.SPACED, Kind.RULE, Kind.BARS, Kind.PARTIAL, Kind.CANDIDATES)


class Refused(Exception):
    """A stretch that holds no whole grids; without a message each of its lines is wrong by itself."""

    def __init__(self, line: Line, message: str = "") -> None:
        super().__init__(message)
        self.line, self.message = line, message


def stretches(lines: list[Line], alphabet: Alphabet) -> Iterator[list[Line]]:
    """Lines of grids that follow each other without a break; thirds of grids, or rows, that blank lines part joined."""
    spaces = any(line.kind is Kind.SPACED for line in lines) and not any(
        line.kind is Kind.ROW and not set(line.cells).isdisjoint(alphabet.blanks) for line in lines
    )
    parts: list[list[Line]] = [[]]
    close = False  # whether only blank lines part the next line from those before
    group: list[list[Line]] = []
    last = -1
    for line in lines:
        if line.kind is Kind.BLANK and spaces and len(line.text) >= alphabet.side:
            line = line._replace(kind=Kind.SPACED)
        if line.number != last + 1 or line.kind not in (*IN_GRIDS, Kind.BLANK):
            close = False
        last = line.number
        if line.kind is Kind.BLANK:
            parts.append([])
        elif line.kind in IN_GRIDS:
            if not close:
                yield from _joined_parts(group, alphabet)
                group = parts = [[]]
            parts[-1].append(line)
            close = True
    yield from _joined_parts(group, alphabet)


def _joined_parts(parts: list[list[Line]], alphabet: Alphabet) -> list[list[Line]]:
    """Parts between blank lines, in the stretches that they are."""
    parts = [part for part in parts if any(line.kind is not Kind.RULE for line in part)]
    counts = {sum(line.kind is not Kind.RULE for line in part) for part in parts}
    only_rows = all(line.kind in (Kind.ROW, Kind.RULE) for part in parts for line in part)
    whole = len(parts) > 1 and counts in ({1}, {3}) and sum(counts) * len(parts) % alphabet.side == 0
    if whole and only_rows:
        return [[line for part in parts for line in part]]
    return [stretch for part in parts for stretch in _parted_by_rules(part, alphabet.side)]


def _parted_by_rules(part: list[Line], side: int) -> list[list[Line]]:
    """A part that is not all grids, parted by its rules where that saves some: a damaged grid costs no neighbour."""
    pieces: list[list[Line]] = [[]]
    for line in part:
        if line.kind is Kind.RULE:
            pieces.append([])
        else:
            pieces[-1].append(line)

    def are_grids(piece: list[Line]) -> bool:
        return len(piece) % side == 0 and len(piece) >= side and all(line.kind is Kind.ROW for line in piece)

    damaged = not are_grids([line for piece in pieces for line in piece])
    return [piece for piece in pieces if piece] if damaged and any(map(are_grids, pieces)) else [part]


def grids_of(stretch: list[Line], alphabet: Alphabet, aside: list[Line]) -> list[Grid]:
    """The grids of a stretch; short lines above a grid, such as its number, go to `aside`.

    Raises:
        Refused: its rows do not make up whole grids.
    """
    side = alphabet.side
    rows = [line for line in stretch if line.kind is Kind.ROW]
    kinds = {line.kind for line in stretch}
    if Kind.CANDIDATES in kinds:
        first = next(line for line in stretch if line.kind is Kind.CANDIDATES)
        raise Refused(
            first, f"is a row of a grid of candidates (pencil marks): give the grid of the {side * side} givens"
        )
    partial = [line for line in stretch if line.kind in (Kind.PARTIAL, Kind.SPACED)]
    width = len(partial)
    if partial and not rows and width > 3 and {len(line.cells) for line in partial} == {width}:
        message = f"begins a grid of {width} rows of {width} cells, a {width}x{width} grid; this is for {side}x{side}"
        raise Refused(partial[0], message)
    if Kind.SPACED in kinds and all(set(row.cells) <= set(alphabet.digits) for row in rows):
        return _grids_with_spaces(stretch, alphabet)
    if partial and not rows:
        raise Refused(partial[0])
    stretch, above = _without_numbers(stretch, side)
    partial = [line for line in stretch if line.kind in (Kind.PARTIAL, Kind.SPACED)]
    if partial:
        count = len(partial[0].cells)
        reason = f"line {partial[0].number} has " + (f"{count} cells" if count != side else "other characters")
        raise Refused(rows[0], f"begins a grid of rows of {side} cells, but {reason}: no cell is guessed")
    if len(rows) < side == len(stretch) and _are_rows(stretch, alphabet):
        rows = stretch
    stretch, rows = _without_empty(stretch, rows, side)
    grids = [_filled(grid, rows[0], alphabet) for grid in _cut(stretch, rows, side)]
    aside += above
    return grids


def _cut(stretch: list[Line], rows: list[Line], side: int) -> list[Grid]:
    """Rows in grids of `side` each; rules may stand between bands only."""
    numbers = {row.number for row in rows}
    band, count = isqrt(side), 0
    ruled = set()  # numbers of rows above a rule
    for line in stretch:
        count += line.number in numbers
        if line.kind is Kind.RULE and line.number not in numbers:
            ruled.add(count)
    straight = not any(above % band for above in ruled) or ruled >= set(range(1, len(rows)))
    if rows and (len(rows) % side or not straight):
        what = f"begins {len(rows)} rows of {side} cells" + ("" if straight else ", with a rule within three of them")
        raise Refused(rows[0], f"{what}; a grid has {side}: no cell is guessed")
    return [(rows[i].number, "".join(row.cells for row in rows[i : i + side])) for i in range(0, len(rows), side)]


def _without_empty(stretch: list[Line], rows: list[Line], side: int) -> tuple[list[Line], list[Line]]:
    """Without the rows of empty fields only where these part whole grids, as the empty rows of a sheet do."""
    full: list[Line] = []
    between = True  # whether all empty rows stand between whole grids
    for row in rows:
        if row.cells.isspace():
            between = between and len(full) % side == 0
        else:
            full.append(row)
    if not full or len(full) % side or not between:
        return stretch, rows
    return [line for line in stretch if line.kind is not Kind.ROW or not line.cells.isspace()], full


def _filled(grid: Grid, line: Line, alphabet: Alphabet) -> Grid:
    cells = filled(grid[1], alphabet)
    if not cells:
        raise Refused(line, "begins a grid that has both empty fields and characters for blanks: no cell is guessed")
    return grid[0], cells


def _are_rows(stretch: list[Line], alphabet: Alphabet) -> bool:
    """Whether lines of nothing but dashes are rows: a row beside them has the same character for a blank."""
    marks = {c for line in stretch if line.kind is Kind.RULE for c in line.cells or "?"}
    used = {c for line in stretch if line.kind is Kind.ROW for c in line.cells if c in alphabet.blanks}
    return marks <= used and all(line.cells for line in stretch)


def _without_numbers(stretch: list[Line], side: int) -> tuple[list[Line], list[Line]]:
    """The stretch without the single lines of other than `side` cells above its grids, and these."""
    kept: list[Line] = []
    above: list[Line] = []
    count = 0
    for line, following in zip(stretch, [*stretch[1:], None], strict=True):
        before_row = following is not None and following.kind in (Kind.ROW, Kind.RULE)
        if line.kind in (Kind.SPACED, Kind.PARTIAL) and count % side == 0 and before_row:
            above.append(line)
        else:
            count += line.kind is Kind.ROW
            kept.append(line)
    return kept, above


def _grids_with_spaces(stretch: list[Line], alphabet: Alphabet) -> list[Grid]:
    lines = [line for line in stretch if line.kind is not Kind.RULE]
    side = alphabet.side
    if len(lines) % side:
        if not any(line.kind is Kind.ROW or " " in line.text.strip() for line in lines):
            raise Refused(lines[0])  # numbers, rather than a grid
        raise Refused(lines[0], f"begins {len(lines)} rows; a grid has {side}: no cell is guessed")
    try:
        rows = spaced_rows([line.text for line in lines], alphabet)
    except ValueError as problem:
        raise Refused(lines[0], str(problem)) from None
    return [(lines[i].number, "".join(rows[i : i + side])) for i in range(0, len(lines), side)]
