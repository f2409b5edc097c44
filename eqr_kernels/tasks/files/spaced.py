"""Grids whose blanks are spaces: a cell is where it stands, so they are read only where that is beyond doubt."""

from __future__ import annotations

from collections.abc import Sequence

from eqr_kernels.tasks.files.codec import Alphabet

_REMEDY = "write the blanks as . or 0"


def spaced_rows(texts: Sequence[str], alphabet: Alphabet) -> list[str]:
    """The cells of rows, blanks as '.'.

    Raises:
        ValueError: the digits of the rows do not stand in the same columns, or the spaces before them may be lost.
    """
    if any("\t" in text for text in texts):
        raise ValueError(f"has tabs among the spaces that stand for blanks: {_REMEDY}")
    if any(text.endswith(" ") for text in texts) and len({len(text) for text in texts}) > 1:
        # where ends were not trimmed, a shorter row has lost a cell
        raise ValueError(f"has spaces for blanks, and its rows differ in length: {_REMEDY}")
    blank = alphabet.blanks[0]
    if any("|" in text for text in texts):
        rows = [_between_bars(text, alphabet) for text in texts]
    else:
        start, step = _columns(texts, alphabet)
        rows = [text.rstrip().ljust(start + step * alphabet.side)[start::step][: alphabet.side] for text in texts]
    return [row.replace(" ", blank) for row in rows]


def _columns(texts: Sequence[str], alphabet: Alphabet) -> tuple[int, int]:
    """Where the first cell of each row stands, and how far the next one is."""
    places = {i for text in texts for i, c in enumerate(text) if c != " "}
    width, side = max(places) + 1, alphabet.side
    even = len({place % 2 for place in places}) == 1
    margin = min(places)
    if width > side == width - margin and any(text[margin : margin + 1] == " " for text in texts):
        return margin, 1
    # two columns a cell, the first at 0 or 1
    step = 1 if width <= side else 2
    start = 0 if step == 1 else min(places) % 2
    if (step == 1 and even and width > 1) or (step == 2 and (not even or width > start + 2 * side - 1)):
        raise ValueError(f"has spaces for blanks, and its digits stand in no clear columns: {_REMEDY}")
    if all(text[start : start + 1].strip() for text in texts):
        raise ValueError(f"has spaces for blanks, and those at the start of its rows seem lost: {_REMEDY}")
    return start, step


def _between_bars(text: str, alphabet: Alphabet) -> str:
    """The cells of one row "d d d | d d d | d d d", with or without outer bars, or tight."""
    parts = text.rstrip().split("|")
    if len(parts) == 5 and not parts[0].strip() and not parts[4].strip():
        outer, parts = True, parts[1:4]
    else:
        outer = False
    middle = len(parts[1]) if len(parts) == 3 else 0
    start, step = {3: (0, 1), 5: (0, 2), 7: (1, 2)}.get(middle, (0, 0))
    if not step or alphabet.side != 9:
        raise ValueError(f"has spaces for blanks, and its bars stand in no clear columns: {_REMEDY}")
    # without an outer bar the first part may lack the space before it, and the last one those behind it
    first = 0 if not outer and len(parts[0]) == middle - 1 else start
    if len(parts[0]) != middle - (start - first):
        raise ValueError(f"has spaces for blanks, and some at the start of a row seem lost: {_REMEDY}")
    cells = ""
    for part, at in zip(parts, (first, start, start), strict=True):
        wide = part.ljust(at + 3 * step)
        taken = wide[at : at + 3 * step : step]
        if len(taken.replace(" ", "")) != len(part.replace(" ", "")):
            raise ValueError(f"has spaces for blanks, and its digits stand in no clear columns: {_REMEDY}")
        cells += taken
    return cells
