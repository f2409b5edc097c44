"""Puzzle files of any task: one puzzle a line, CSV, .npy arrays, and the HRM/EqR folder of .npy files.

A row that cannot be read becomes a ParseError and never costs its neighbours.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import UNKNOWN_RATING, ParseError, PuzzleSet, Tokens

Source = str | os.PathLike[str] | Iterable[str]
IntArray = npt.NDArray[np.integer]
Checker = Callable[[Tokens, Tokens], list[str]]
ArrayReader = Callable[[IntArray], tuple[IntArray, str]]  # integers as found -> tokens, and what was allowed

FORMATS = ("auto", "lines", "csv", "npy", "folder")
QUESTION_COLUMNS = ("question", "puzzle", "puzzles", "quiz", "quizzes", "problem", "input")
ANSWER_COLUMNS = ("answer", "answers", "solution", "solutions", "label")


@dataclass(frozen=True)
class Codec:
    """How one task's text becomes tokens.

    Attributes:
        table: byte -> token, uint8 [256]; 0 where the byte is no cell.
        vocab_size: tokens are 0 .. vocab_size - 1.
        cells: the allowed characters, for messages.
        seq_len: cells of a puzzle, or None when any square number will do (the same for all rows of a file).
        spaces_are_cells: then lines are not stripped and '#' starts no comment.
            Otherwise it starts one anywhere in lines, and in a CSV at the start of a line.
        check: (inputs [N, S], labels [N, S], zeros where unknown) -> per row what breaks the rules, or "".
    """

    table: Tokens
    vocab_size: int
    cells: str
    seq_len: int | None
    spaces_are_cells: bool
    check: Checker


class Row(NamedTuple):
    line: int
    text: str
    question: str
    answer: str
    source: str
    rating: int


def encode_texts(texts: Sequence[str], codec: Codec, seq_len: int) -> tuple[Tokens, list[str]]:
    """Tokens [N, seq_len] of N texts, and per text what is wrong with it, or ""."""
    tokens = np.zeros((len(texts), seq_len), np.uint8)
    wrong = [""] * len(texts)
    if not codec.spaces_are_cells:
        texts = [text if len(text) == seq_len else "".join(text.split()) for text in texts]
    fitting = [i for i, text in enumerate(texts) if len(text) == seq_len > 0]
    needed = str(seq_len) if seq_len else "a square number of cells"
    for i, text in enumerate(texts):
        if len(text) != seq_len or not text:
            wrong[i] = f"has {len(text)} cells; it needs {needed} ({codec.cells})"
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


def load_puzzles(
    source: Source, codec: Codec, *, format: str, split: str | None, from_array: ArrayReader | None = None
) -> tuple[PuzzleSet, list[ParseError]]:
    """Read `source`; see the tasks' `load`. `from_array` reads the integers of a lone .npy; without it, as tokens."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed are {', '.join(FORMATS)}")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if format == "folder" or (format == "auto" and path.is_dir()):
            return _load_folder(path, codec, split)
        if split is not None:
            raise ValueError(f"split is {split!r}, but {path} is no folder with train/ and test/: leave it out")
        if format == "npy" or (format == "auto" and path.suffix == ".npy"):
            array = _read_array(path)
            tokens, allowed = (array, "") if from_array is None else from_array(array)
            return _from_arrays(tokens, None, [path.name] * len(array), codec, array, allowed)
        with _open_text(path) as stream:
            return _load_text(stream, path.name, codec, format)
    if format in ("npy", "folder"):
        raise ValueError(f"format {format!r} needs a path, not a stream")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise TypeError(f"source is a {type(source).__name__}; it must be a path or a text stream")
    return _load_text(source, str(getattr(source, "name", "stream")).strip("<>"), codec, format)


# text ----------------------------------------------------------------------------------------------------------------


def _open_text(path: Path) -> io.TextIOWrapper:
    opener = gzip.open if path.suffix == ".gz" else open
    stream = opener(path, "rt", encoding="utf-8", errors="replace", newline=None)
    assert isinstance(stream, io.TextIOWrapper)
    return stream


def _load_text(stream: Iterable[str], name: str, codec: Codec, format: str) -> tuple[PuzzleSet, list[ParseError]]:
    errors: list[ParseError] = []
    rows = _read_rows(_content_lines(stream, codec, errors), name, codec, format, errors)
    seq_len = codec.seq_len or _usual_length(rows)
    inputs, wrong = encode_texts([row.question for row in rows], codec, seq_len)
    labels = np.zeros_like(inputs)
    answered = [i for i, row in enumerate(rows) if row.answer.strip()]
    labels[answered], wrong_answers = encode_texts([rows[i].answer for i in answered], codec, seq_len)
    for i, message in zip(answered, wrong_answers, strict=True):
        wrong[i] = wrong[i] or (message and f"answer {message}")
    rating = np.array([row.rating for row in rows], np.int64)
    puzzles = PuzzleSet(
        inputs,
        labels,
        np.array([row.source for row in rows], np.str_),
        rating,
        np.array([row.line for row in rows], np.int64),
    )
    return _checked(puzzles, wrong, [row.text for row in rows], errors, codec)


def _content_lines(stream: Iterable[str], codec: Codec, errors: list[ParseError]) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that are neither blank nor comments as a whole."""
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            if not isinstance(line, str):
                raise TypeError(f"source yields {type(line).__name__}; it must be a text stream: open it in mode 'r'")
            line = (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")
            if not codec.spaces_are_cells:
                line = line.strip()
            if line.strip() and (codec.spaces_are_cells or not line.startswith("#")):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as problem:
        errors.append(ParseError(number + 1, "", f"the file cannot be read from here on ({problem}): fetch it again"))


def _read_rows(
    lines: Iterator[tuple[int, str]], name: str, codec: Codec, format: str, errors: list[ParseError]
) -> list[Row]:
    rows: list[Row] = []
    header: dict[str, int] | None = None
    width = 0
    for position, (number, line) in enumerate(lines):
        fields = _split(line)
        if position == 0 and format in ("auto", "csv"):
            header = _header(fields)
            if header is not None:
                width = len(fields)
                continue
            if format == "csv":
                raise ValueError(
                    f"the CSV header on line {number} has the columns {line!r}, none of which is the puzzle: name one "
                    f"of them {', '.join(QUESTION_COLUMNS)}"
                )
        if header is None and not codec.spaces_are_cells:
            line = line.partition("#")[0].strip()
            fields = _split(line)
        try:
            if header is None:
                rows.append(_plain_row(number, line, fields, name))
            else:
                rows.append(_csv_row(number, line, fields, header, width, name))
        except ValueError as problem:
            errors.append(ParseError(number, line, str(problem)))
    return rows


def _split(line: str) -> list[str]:
    # a line at a time, so that a stray quote spoils its own row and not all that follow
    return next(csv.reader([line]), []) if '"' in line else line.split(",")


def _header(fields: list[str]) -> dict[str, int] | None:
    """Column numbers by role, or None when no column is the question."""
    names = [field.strip().lower() for field in fields]
    roles = {"question": QUESTION_COLUMNS, "answer": ANSWER_COLUMNS, "source": ("source",), "rating": ("rating",)}
    columns = {role: next((i for i, n in enumerate(names) if n in known), -1) for role, known in roles.items()}
    return columns if columns["question"] >= 0 else None


def _plain_row(number: int, line: str, fields: list[str], name: str) -> Row:
    if len(fields) > 2:
        raise ValueError(
            f"has {len(fields)} fields; a line is one puzzle or puzzle,answer, and a CSV needs a header with a column "
            f"{QUESTION_COLUMNS[0]!r} or {QUESTION_COLUMNS[1]!r}"
        )
    return Row(number, line, fields[0], fields[1] if len(fields) == 2 else "", name, UNKNOWN_RATING)


def _csv_row(number: int, line: str, fields: list[str], header: dict[str, int], width: int, name: str) -> Row:
    if len(fields) != width:
        raise ValueError(f"has {len(fields)} fields; the header has {width}")
    rating = fields[header["rating"]].strip() if header["rating"] >= 0 else ""
    try:
        number_of_rating = int(rating) if rating else UNKNOWN_RATING
    except ValueError:
        raise ValueError(f"has the rating {rating!r}; it must be an integer or empty") from None
    if not -(2**63) <= number_of_rating < 2**63:
        raise ValueError(f"has the rating {rating}; it must fit 64 bits")
    answer = fields[header["answer"]] if header["answer"] >= 0 else ""
    source = fields[header["source"]] if header["source"] >= 0 else name
    return Row(number, line, fields[header["question"]], answer, source, number_of_rating)


def _usual_length(rows: list[Row]) -> int:
    """The commonest square length; 0 when there is none."""
    lengths = Counter(len(row.question) for row in rows)
    square = [n for n in lengths if n and int(n**0.5 + 0.5) ** 2 == n]
    return max(square, key=lambda n: lengths[n], default=0)


def _checked(
    puzzles: PuzzleSet, wrong: list[str], texts: Sequence[str], errors: list[ParseError], codec: Codec
) -> tuple[PuzzleSet, list[ParseError]]:
    """The rows that are well-formed and keep the rules; the others join `errors`."""
    assert puzzles.labels is not None and puzzles.line is not None
    whole = np.flatnonzero([not message for message in wrong])
    for i, message in zip(whole, codec.check(puzzles.inputs[whole], puzzles.labels[whole]), strict=True):
        wrong[i] = message
    errors.extend(ParseError(int(puzzles.line[i]), texts[i], message) for i, message in enumerate(wrong) if message)
    kept = puzzles.subset(np.flatnonzero([not message for message in wrong]))
    assert kept.labels is not None
    if not kept.labels.any():
        kept = PuzzleSet(kept.inputs, None, kept.source, kept.rating, kept.line)
    return kept, sorted(errors, key=lambda error: error.line)


# arrays --------------------------------------------------------------------------------------------------------------


def _read_array(path: Path) -> IntArray:
    try:
        array: IntArray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as problem:
        raise ValueError(f"{path} is not a .npy array of plain numbers ({problem}): save it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds several arrays (.npz); save the puzzles alone with numpy.save")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{path} has dtype {array.dtype}; puzzles must be integers: convert it, e.g. .astype('uint8')")
    if array.ndim == 1:
        array = array[None]
    if array.ndim == 3:
        array = array.reshape(len(array), -1)
    if array.ndim != 2:
        raise ValueError(f"{path} has shape {array.shape}; it must be [N, S], [N, side, side] or [S]")
    return array


def _from_arrays(
    inputs: IntArray,
    labels: IntArray | None,
    source: list[str],
    codec: Codec,
    values: IntArray | None = None,
    allowed: str = "",
) -> tuple[PuzzleSet, list[ParseError]]:
    seq_len = inputs.shape[1]
    if codec.seq_len is not None and seq_len != codec.seq_len:
        raise ValueError(f"the arrays hold rows of {seq_len} cells; this task needs {codec.seq_len}")
    wrong = [""] * len(inputs)
    values = inputs if values is None else values
    allowed = allowed or f"tokens 1 .. {codec.vocab_size - 1}"
    parts = [inputs] if labels is None else [inputs, labels]
    for i in np.flatnonzero(((inputs < 1) | (inputs >= codec.vocab_size)).any(1)):
        wrong[i] = f"holds {values[i].min()} .. {values[i].max()}; allowed are {allowed}"
    for i in np.flatnonzero(((parts[-1] < 0) | (parts[-1] >= codec.vocab_size)).any(1)):
        wrong[i] = wrong[i] or (
            f"its labels hold {parts[-1][i].min()} .. {parts[-1][i].max()}; allowed are 0 .. {codec.vocab_size - 1}"
        )
    valid = np.array([not message for message in wrong], bool)[:, None]
    tokens = [np.where(valid, part, 0).astype(np.uint8) for part in parts]
    puzzles = PuzzleSet(
        tokens[0],
        np.zeros_like(tokens[0]) if labels is None else tokens[1],
        np.array(source, np.str_),
        np.full(len(inputs), UNKNOWN_RATING, np.int64),
        np.arange(1, len(inputs) + 1),
    )
    return _checked(puzzles, wrong, _LazyRows(values), [], codec)


class _LazyRows(Sequence[str]):
    """The rows of an array as text, made only for the rows that are reported."""

    def __init__(self, array: IntArray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return " ".join(map(str, self.array[index]))


def _load_folder(path: Path, codec: Codec, split: str | None) -> tuple[PuzzleSet, list[ParseError]]:
    folder = _split_folder(path, split)
    card = _read_card(folder)
    sets = card.get("sets") or sorted(f.name.removesuffix("__inputs.npy") for f in folder.glob("*__inputs.npy"))
    if not isinstance(sets, list):
        raise ValueError(f"{folder / 'dataset.json'} says sets {sets!r}; it must be a list of names")
    parts = [(str(name), _read_set(folder, str(name), card)) for name in sets]
    widths = {part[0].shape[1] for _, part in parts}
    if len(widths) != 1:
        raise ValueError(
            f"{folder} has {len(parts)} sets with rows of {sorted(widths)}; it needs at least one, of one length"
        )
    inputs, labels = (np.concatenate([part[k] for _, part in parts]) for k in (0, 1))
    return _from_arrays(inputs, labels, [name for name, part in parts for _ in part[0]], codec)


def _split_folder(path: Path, split: str | None) -> Path:
    def holds_puzzles(folder: Path) -> bool:
        return folder.is_dir() and ((folder / "dataset.json").exists() or any(folder.glob("*__inputs.npy")))

    if split is None and holds_puzzles(path):
        return path
    splits = [name for name in ("train", "test") if holds_puzzles(path / name)]
    if split is not None and split not in splits:
        raise ValueError(f"split is {split!r}; {path} has {' and '.join(splits) or 'neither train nor test'}")
    if split is None and len(splits) > 1:
        raise ValueError(f"{path} has train and test: choose with split='train' or split='test', or give that folder")
    if not splits:
        raise ValueError(f"{path} has no dataset.json and no *__inputs.npy, nor has its train or test folder")
    return path / (split or splits[0])


def _read_card(folder: Path) -> dict[str, object]:
    file = folder / "dataset.json"
    if not file.exists():
        return {}
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file} is not JSON ({problem}): fetch or build the data set again") from None
    if not isinstance(card, dict):
        raise ValueError(f"{file} holds a {type(card).__name__}; it must be a JSON object")
    return card


def _read_set(folder: Path, name: str, card: dict[str, object]) -> tuple[IntArray, IntArray]:
    """Tokens and labels [N, S] of one set of the folder; labels that are to be ignored become 0."""
    files = [folder / f"{name}__{part}.npy" for part in ("inputs", "labels")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; dataset.json names the set {name!r}: fetch it again")
    inputs, labels = map(_read_array, files)
    if inputs.shape != labels.shape:
        raise ValueError(f"{files[0]} has shape {inputs.shape}, {files[1]} has {labels.shape}; they must be equal")
    if isinstance(card.get("seq_len"), int) and card["seq_len"] != inputs.shape[1]:
        raise ValueError(f"{files[0]} has rows of {inputs.shape[1]}, dataset.json says seq_len {card['seq_len']}")
    ignored = card.get("ignore_label_id")
    if isinstance(ignored, int) and ignored != 0:
        labels = np.where(labels == ignored, 0, labels)
    return inputs, labels
