"""Puzzles in text without columns: a line each, or written as grids of as many lines as a grid has rows.

Rows are put together only where nothing else is possible: in a stretch of lines whose rows make up whole grids. A
stretch that has a row too few or too many is refused whole, because its cells could stand one row off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isqrt

from eqr_kernels.tasks.common import UNKNOWN_RATING, ParseError, ParseErrors
from eqr_kernels.tasks.files.codec import Alphabet, Codec, Row, encode_texts
from eqr_kernels.tasks.files.columns import QUESTION_NAMES
from eqr_kernels.tasks.files.lines import Kind, Line, classify, filled, joined, long_fields
from eqr_kernels.tasks.files.spaced import spaced_rows

Grid = tuple[int, str]  # number of its first line, cells

_IN_GRIDS = (Kind.ROW, Kind.SPACED, Kind.RULE, Kind.BARS, Kind.PARTIAL, Kind.CANDIDATES)


def written_grid(text: str, codec: Codec) -> str:
    """The cells of the one grid that a text is, in a line or written; the text itself if it is none."""
    alphabet = codec.alphabet
    lines = text.strip("\r\n").splitlines()
    if len(lines) > 1:
        found = [classify(number, line, alphabet) for number, line in enumerate(lines, 1)]
        grids: list[Grid] = []
        if all(line.kind in (*_IN_GRIDS, Kind.BLANK) for line in found):
            try:
                for stretch in _stretches(found, alphabet):
                    grids += _grids_of(stretch, alphabet, [])
            except _Refused:
                grids = []
        if len(grids) == 1:
            return grids[0][1]
        if any(line.kind is Kind.RULE for line in found):
            return text.strip()  # never its rules as blanks
    return joined(text, alphabet) or text.strip()


def field_cells(text: str, codec: Codec) -> str:
    """The cells in a field of a table: of a grid with a name beside it, or a `written_grid`."""
    if not codec.blanks or len(text) == codec.seq_len or not text:
        return text
    alphabet = codec.alphabet
    runs = alphabet.grid.findall(text)
    return runs[0] if len(runs) == 1 and len(text) < 2 * len(runs[0]) else written_grid(text, codec)


def read_grids(
    lines: Iterable[tuple[int, str]], name: str, codec: Codec, errors: ParseErrors, format: str
) -> list[Row]:
    """The puzzles of a text, by line; with the format "lines" only those that stand in a line each."""
    alphabet = codec.alphabet
    rows: list[Row] = []
    others: list[Line] = []
    for line in _in_sections(lines, alphabet, errors):
        if line.kind is Kind.PUZZLE:
            rows.append(Row(line.number, line.text.strip(), line.cells, line.answer, name, UNKNOWN_RATING))
        else:
            others.append(line)
    in_lines = bool(rows)
    refused: list[Line] = []
    if format == "lines":
        refused = [line for line in others if line.kind not in (Kind.BLANK, Kind.COMMENT, Kind.RULE)]
    else:
        for stretch in _stretches(others, alphabet):
            try:
                for number, cells in _grids_of(stretch, alphabet, refused):
                    rows.append(Row(number, cells, cells, "", name, UNKNOWN_RATING))
            except _Refused as refusal:
                if refusal.message:
                    errors.append(ParseError(refusal.line.number, refusal.line.text.strip(), refusal.message))
                else:
                    refused += stretch
        only_grids = len(rows) > 0 and not in_lines
        titles = _titles(others, only_grids)
        refused += [line for line in others if line.kind is Kind.TEXT and line.number not in titles]
        refused += [line for line in others if line.kind is Kind.DAMAGED]
        if only_grids:  # a short number between grids is one more title
            refused = [line for line in refused if line.kind is Kind.DAMAGED or len(line.text.strip()) > 4]
    for line in refused:
        errors.append(ParseError(line.number, line.text.strip(), _what_is_wrong(line, codec)))
    return sorted(rows, key=lambda row: row.line)


def _in_sections(lines: Iterable[tuple[int, str]], alphabet: Alphabet, errors: ParseErrors) -> Iterator[Line]:
    """The lines; of a file with [Puzzle] and [State] those of [Puzzle] only. Other names in brackets are titles."""
    whole = alphabet.grid.fullmatch
    sections = skipping = puzzle = False
    state = 0
    for number, text in lines:
        if whole(text) and not skipping:  # nearly all lines of a large file
            line = Line(number, text, Kind.PUZZLE, text)
            if text[0] in "-*":
                line = classify(number, text, alphabet)
        else:
            line = classify(number, text, alphabet)
        if line.kind is Kind.SECTION:
            is_puzzle, is_state = line.cells == "puzzle", line.cells == "state"
            puzzle, state = puzzle or is_puzzle, state or (number if is_state else 0)
            sections = sections or is_puzzle or is_state
            skipping = sections and not is_puzzle
        elif not skipping:
            yield line
    if state and not puzzle:
        message = "is a section [State] without a [Puzzle]: a state has more than the givens; name it [Puzzle] if not"
        errors.append(ParseError(state, "[State]", message))


def _titles(lines: list[Line], only_grids: bool) -> set[int]:
    """Numbers of the lines of text that are passed over: all where only grids were found, else those above one."""
    titles: set[int] = set()
    above: list[int] = []
    for line in lines:
        if line.kind is Kind.TEXT:
            above.append(line.number)
            if only_grids:
                titles.add(line.number)
        elif line.kind in (Kind.ROW, Kind.RULE):
            if above and line.number <= above[-1] + 2:
                titles.update(above[-2:])
            above = []
        elif line.kind not in (Kind.BLANK, Kind.COMMENT):
            above = []
    return titles


class _Refused(Exception):
    """A stretch that holds no whole grids; without a message each of its lines is wrong by itself."""

    def __init__(self, line: Line, message: str = "") -> None:
        super().__init__(message)
        self.line, self.message = line, message


def _stretches(lines: list[Line], alphabet: Alphabet) -> Iterator[list[Line]]:
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
        if line.number != last + 1 or line.kind not in (*_IN_GRIDS, Kind.BLANK):
            close = False
        last = line.number
        if line.kind is Kind.BLANK:
            parts.append([])
        elif line.kind in _IN_GRIDS:
            if not close:
                yield from _joined_parts(group, alphabet)
                group = parts = [[]]
            parts[-1].append(line)
            close = True
    yield from _joined_parts(group, alphabet)


def _joined_parts(parts: list[list[Line]], alphabet: Alphabet) -> list[list[Line]]:
    parts = [part for part in parts if any(line.kind is not Kind.RULE for line in part)]
    counts = {sum(line.kind is not Kind.RULE for line in part) for part in parts}
    only_rows = all(line.kind in (Kind.ROW, Kind.RULE) for part in parts for line in part)
    whole = len(parts) > 1 and counts in ({1}, {3}) and sum(counts) * len(parts) % alphabet.side == 0
    return [[line for part in parts for line in part]] if whole and only_rows else parts


def _grids_of(stretch: list[Line], alphabet: Alphabet, aside: list[Line]) -> list[Grid]:
    """The grids of a stretch; short lines above a grid, such as its number, go to `aside`.

    Raises:
        _Refused: its rows do not make up whole grids.
    """
    side = alphabet.side
    rows = [line for line in stretch if line.kind is Kind.ROW]
    kinds = {line.kind for line in stretch}
    if Kind.CANDIDATES in kinds:
        first = next(line for line in stretch if line.kind is Kind.CANDIDATES)
        raise _Refused(
            first, f"is a row of a grid of candidates (pencil marks): give the grid of the {side * side} givens"
        )
    partial = [line for line in stretch if line.kind in (Kind.PARTIAL, Kind.SPACED)]
    width = len(partial)
    if partial and not rows and width > 3 and {len(line.cells) for line in partial} == {width}:
        message = f"begins a grid of {width} rows of {width} cells, a {width}x{width} grid; this is for {side}x{side}"
        raise _Refused(partial[0], message)
    if Kind.SPACED in kinds and all(set(row.cells) <= set(alphabet.digits) for row in rows):
        return _grids_with_spaces(stretch, alphabet)
    if partial and not rows:
        raise _Refused(partial[0])
    stretch, above = _without_numbers(stretch, side)
    partial = [line for line in stretch if line.kind in (Kind.PARTIAL, Kind.SPACED)]
    if partial:
        count = len(partial[0].cells)
        reason = f"line {partial[0].number} has " + (f"{count} cells" if count != side else "other characters")
        raise _Refused(rows[0], f"begins a grid of rows of {side} cells, but {reason}: no cell is guessed")
    if len(rows) < side == len(stretch) and _are_rows(stretch, alphabet):
        rows = stretch
    grids = [_filled(grid, rows[0], alphabet) for grid in _cut(stretch, rows, side)]
    aside += above
    return grids


def _cut(stretch: list[Line], rows: list[Line], side: int) -> list[Grid]:
    """Rows in grids of `side` each; rules may stand between bands only."""
    numbers = {row.number for row in rows}
    band, count, straight = isqrt(side), 0, True
    for line in stretch:
        count += line.number in numbers
        straight = straight and not (line.kind is Kind.RULE and line.number not in numbers and count % band)
    if rows and (len(rows) % side or not straight):
        what = f"begins {len(rows)} rows of {side} cells" + ("" if straight else ", with a rule within three of them")
        raise _Refused(rows[0], f"{what}; a grid has {side}: no cell is guessed")
    return [(rows[i].number, "".join(row.cells for row in rows[i : i + side])) for i in range(0, len(rows), side)]


def _filled(grid: Grid, line: Line, alphabet: Alphabet) -> Grid:
    cells = filled(grid[1], alphabet)
    if not cells:
        raise _Refused(line, "begins a grid that has both empty fields and characters for blanks: no cell is guessed")
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
        if not any(line.kind is Kind.ROW for line in lines) and len(lines) < side:
            raise _Refused(lines[0])
        raise _Refused(lines[0], f"begins {len(lines)} rows; a grid has {side}: no cell is guessed")
    try:
        rows = spaced_rows([line.text for line in lines], alphabet)
    except ValueError as problem:
        raise _Refused(lines[0], str(problem)) from None
    return [(lines[i].number, "".join(rows[i : i + side])) for i in range(0, len(lines), side)]


def _what_is_wrong(line: Line, codec: Codec) -> str:
    """Of a line that is no puzzle."""
    assert codec.seq_len is not None
    body = line.text.partition("#")[0]
    fields = long_fields(body, codec.alphabet)
    whole = [field for field in fields if len(field[0]) == codec.seq_len]
    if len(whole) > 1:
        columns = " and ".join(str(field.start() + 1) for field in whole)
        return f"has {len(whole)} grids (at columns {columns}); a line is one puzzle, or a puzzle and its answer"
    wrong = [field for field in fields if encode_texts([field[0]], codec, codec.seq_len)[1][0]]
    text = wrong[0][0] if wrong else body
    message = encode_texts(["".join(text.split())], codec, codec.seq_len)[1][0]
    if wrong and len(body.split()) > 1:
        return f"{message} (they begin at column {wrong[0].start() + 1} of the line)"
    if "," in body and set(body).isdisjoint("123456789"):
        message = f"has no {codec.seq_len} cells in a row"
        return f"{message}; a header needs a column for the puzzle, named {QUESTION_NAMES} or the like"
    if len(body.split()) > 1 or not message:
        return f"has no {codec.seq_len} cells in a row ({codec.cells})"
    return message
