"""How the text of one task becomes tokens, and what is wrong with text that does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import NamedTuple

import numpy as np

from eqr_kernels.tasks.common import Tokens, as_tokens

Checker = Callable[[Tokens, Tokens], list[str]]

FENCE = r"""\s,;:|"'()\[\]{}<>=/\\"""
"""What parts a grid in a row from its neighbours, as the inside of a character class."""

_SPREADSHEET_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)?[eE]\+?\d+")
_OTHER_SIDES = (4, 6, 8, 10, 12, 15, 16, 25)


@dataclass(frozen=True)
class Codec:
    """How one task's text becomes tokens.

    Attributes:
        table: byte -> token, uint8 [256]; 0 where the byte is no cell.
        vocab_size: tokens are 0 .. vocab_size - 1.
        cells: the allowed characters, for messages.
        seq_len: cells of a puzzle, or None when any square number will do (the same for all rows of a file).
        blanks: the characters of an open cell where white space and rules are no cells, so that grids in their usual
            forms can be read. "" where a puzzle is one line, white space is cells and '#' starts no comment.
        check: (inputs [N, S], labels [N, S], zeros where unknown) -> per row what breaks the rules, or "".
        encode: text -> tokens [S] where a cell is not one character of `table`, which then has no say; such puzzles may
            hold pads, and be of any one length where seq_len is None.
    """

    table: Tokens
    vocab_size: int
    cells: str
    seq_len: int | None
    blanks: str
    check: Checker
    encode: Callable[[str], Tokens] | None = None

    @property
    def alphabet(self) -> Alphabet:
        """Of a task with grids; raises ValueError for others."""
        if not self.blanks or self.seq_len is None:
            raise ValueError("the puzzles of this task have no written grids: they are read a line each")
        known = "".join(map(chr, np.flatnonzero(self.table)))
        return _alphabet("".join(c for c in known if c not in self.blanks), self.blanks, isqrt(self.seq_len))


class Row(NamedTuple):
    """A puzzle as it was found: its 1-based line, the text that an error quotes, and its parts."""

    line: int
    text: str
    question: str
    answer: str
    source: str
    rating: float
    id: str = ""


@dataclass(frozen=True)
class Alphabet:
    """The characters of written grids of side x side cells.

    Attributes:
        grid: finds a whole grid in a row that nothing but white space, separators, quotes or brackets touches.
    """

    digits: str
    blanks: str
    side: int
    grid: re.Pattern[str]

    @property
    def cells(self) -> str:
        return self.digits + self.blanks


@cache
def _alphabet(digits: str, blanks: str, side: int) -> Alphabet:
    cells = re.escape(digits + blanks)
    return Alphabet(digits, blanks, side, re.compile(f"(?<![^{FENCE}])[{cells}]{{{side * side}}}(?![^{FENCE}])"))


def encode_texts(texts: Sequence[str], codec: Codec, seq_len: int) -> tuple[Tokens, list[str]]:
    """Tokens [N, seq_len] of N texts, a character a cell, and per text what is wrong with it, or ""."""
    if codec.encode is not None:
        return _encode_one_by_one(texts, codec, codec.encode, seq_len)
    tokens = np.zeros((len(texts), seq_len), np.uint8)
    wrong = [""] * len(texts)
    fitting = [i for i, text in enumerate(texts) if len(text) == seq_len > 0]
    for i, text in enumerate(texts):
        if len(text) != seq_len or not text:
            wrong[i] = _wrong_length(text, codec, seq_len)
    if fitting:
        # latin-1 with "replace" keeps one byte for each character, whatever it is
        data = "".join(texts[i] for i in fitting).encode("latin-1", "replace")
        block = codec.table[np.frombuffer(data, np.uint8)].reshape(-1, seq_len)
        tokens[fitting] = block
        for j in np.flatnonzero((block == 0).any(1)):
            cell, side = int((block[j] == 0).argmax()), int(seq_len**0.5)
            wrong[fitting[j]] = (
                f"has {texts[fitting[j]][cell]!r} at cell {cell + 1} (row {cell // side + 1}, column "
                f"{cell % side + 1}); allowed are {codec.cells}"
            )
    return tokens, wrong


def _encode_one_by_one(
    texts: Sequence[str], codec: Codec, encode: Callable[[str], Tokens], seq_len: int
) -> tuple[Tokens, list[str]]:
    tokens = np.zeros((len(texts), seq_len), np.uint8)
    wrong = [""] * len(texts)
    for i, text in enumerate(texts):
        try:
            row = as_tokens("encode's result", encode(text), codec.vocab_size, ndim=1)
        except ValueError as problem:
            wrong[i] = f"cannot be read: {problem}"
            continue
        if len(row) == seq_len:
            tokens[i] = row
        else:
            wrong[i] = f"has {len(row)} tokens; it needs {seq_len} ({codec.cells})"
    return tokens, wrong


def _wrong_length(text: str, codec: Codec, seq_len: int) -> str:
    needed = str(seq_len) if seq_len else "a square number of cells"
    if not codec.blanks:
        return f"has {len(text)} cells; it needs {needed} ({codec.cells})"
    text = text.strip()
    if _SPREADSHEET_NUMBER.fullmatch(text):
        return (
            "is a number in a spreadsheet's notation, whose digits are lost: take the original file, or export the "
            "column as text"
        )
    text = "".join(text.split())
    return f"has {len(text)} cells; it needs {needed} ({codec.cells})" + _guess(text, seq_len)


def _guess(text: str, seq_len: int) -> str:
    """What a text of another length probably is, as the end of a message, or ""."""
    side = isqrt(seq_len)
    if not re.fullmatch(r"[0-9A-Pa-p.*_xX-]+", text) or not re.search(r"[0-9.*_-]", text):
        return ""
    if len(text) == seq_len * side:
        return f": these are {side} candidates for each cell; give the grid of the givens instead"
    lost = text.isdigit() and seq_len // 2 < len(text) < seq_len
    advice = (
        ": leading zeros or other digits were lost, as a spreadsheet does; export the column as text" if lost else ""
    )
    other = isqrt(len(text))
    if other * other == len(text) and other in _OTHER_SIDES:
        return advice + f": a {other}x{other} grid has as many, and this is for {side}x{side}"
    return advice
