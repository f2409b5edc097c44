"""From rows as they were found to a set of puzzles: encode, check the rules, part the good rows from the bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from eqr_kernels.tasks.common import ParseError, ParseErrors, PuzzleSet, Tokens
from eqr_kernels.tasks.files.codec import Codec, Row, encode_texts


def from_rows(rows: list[Row], codec: Codec, errors: ParseErrors) -> tuple[PuzzleSet, ParseErrors]:
    """The rows that are puzzles; the others join `errors`. A codec without a length takes the usual one."""
    seq_len = codec.seq_len or _usual_length(rows, codec)
    inputs, wrong = encode_texts([row.question for row in rows], codec, seq_len)
    labels = np.zeros_like(inputs)
    answered = [i for i, row in enumerate(rows) if row.answer.strip()]
    labels[answered], wrong_answers = encode_texts([rows[i].answer for i in answered], codec, seq_len)
    for i, message in zip(answered, wrong_answers, strict=True):
        wrong[i] = wrong[i] or (message and f"answer {message}")
    puzzles = PuzzleSet(
        inputs,
        labels,
        np.array([row.source for row in rows], np.str_),
        np.array([row.rating for row in rows], np.float64),
        np.array([row.line for row in rows], np.int64),
        np.array([row.id for row in rows], np.str_) if any(row.id for row in rows) else None,
    )
    return checked(puzzles, wrong, [row.text for row in rows], errors, codec, lambda i: _place(rows[i]))


def checked(
    puzzles: PuzzleSet,
    wrong: list[str],
    texts: Sequence[str],
    errors: ParseErrors,
    codec: Codec,
    place: Callable[[int], str] = lambda row: "",
) -> tuple[PuzzleSet, ParseErrors]:
    """The rows that are well-formed and keep the rules; the others join `errors`, with their `place` in the line."""
    assert puzzles.labels is not None and puzzles.line is not None
    whole = np.flatnonzero([not message for message in wrong])
    for i, message in zip(whole.tolist(), codec.check(puzzles.inputs[whole], puzzles.labels[whole]), strict=True):
        wrong[i] = message and message + place(i)
    for row, message in enumerate(wrong):
        if message:
            errors.append(ParseError(int(puzzles.line[row]), texts[row], message))
    errors.cut()
    kept = puzzles.subset(np.flatnonzero([not message for message in wrong]))
    assert kept.labels is not None
    if not kept.labels.any():
        kept = replace(kept, labels=None)
    return kept, errors


def _place(row: Row) -> str:
    """Where the cells of a puzzle stand among other fields of its line."""
    if row.text in (row.question, f"{row.question},{row.answer}") or row.question not in row.text:
        return ""
    return f" (its cells begin at column {row.text.index(row.question) + 1} of the line)"


def _usual_length(rows: list[Row], codec: Codec) -> int:
    """The commonest length, a square where a cell is a character; 0 when there is none."""
    if codec.encode is not None:
        encoded = Counter(filter(None, (_encoded_length(row.question, codec.encode) for row in rows)))
        return max(encoded, key=lambda n: encoded[n], default=0)
    lengths = Counter(len(row.question) for row in rows)
    square = [n for n in lengths if n and int(n**0.5 + 0.5) ** 2 == n]
    return max(square, key=lambda n: lengths[n], default=0)


def _encoded_length(text: str, encode: Callable[[str], Tokens]) -> int:
    try:
        return len(encode(text))
    except ValueError:
        return 0
