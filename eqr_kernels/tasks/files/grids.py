"""Puzzles in text without columns: a line each, or written as grids of as many lines as a grid has rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from eqr_kernels.tasks.common import UNKNOWN_RATING, ParseError, ParseErrors
from eqr_kernels.tasks.files.codec import Alphabet, Codec, Row, encode_texts
from eqr_kernels.tasks.files.columns import QUESTION_NAMES
from eqr_kernels.tasks.files.lines import Kind, Line, classify, joined, long_fields
from eqr_kernels.tasks.files.stretches import IN_GRIDS, Grid, Refused, grids_of, stretches


def written_grid(text: str, codec: Codec) -> str:
    """The cells of the one grid that a text is, in a line or written; the text itself if it is none."""
    if len(text) == codec.seq_len and not any(map(str.isspace, text)):
        return text
    alphabet = codec.alphabet
    lines = text.strip("\r\n").splitlines()
    if len(lines) > 1:
        classified = [classify(number, line, alphabet) for number, line in enumerate(lines, 1)]
        grids: list[Grid] = []
        if all(line.kind in (*IN_GRIDS, Kind.BLANK) for line in classified):
            try:
                for stretch in stretches(classified, alphabet):
                    grids += grids_of(stretch, alphabet, [])
            except Refused:
                grids = []
        if len(grids) == 1:
            return grids[0][1]
        if any(line.kind is Kind.RULE for line in classified):
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
        for stretch in stretches(others, alphabet):
            try:
                for number, cells in grids_of(stretch, alphabet, refused):
                    rows.append(Row(number, cells, cells, "", name, UNKNOWN_RATING))
            except Refused as refusal:
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
