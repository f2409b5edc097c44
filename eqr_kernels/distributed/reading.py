"""The input in units: tables read as they are needed, or puzzles that were read whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eqr_kernels.arguments import check_count
from eqr_kernels.distributed.units import MOST_ROWS, Key, Unit
from eqr_kernels.tasks.common import ParseError, ParseErrors, PuzzleSet
from eqr_kernels.tasks.pieces import Piece, kind_of, load_piece, pieces
from eqr_kernels.tasks.registry import find_task
from eqr_kernels.tasks.task import Task

_TABLES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")


class Reader(Protocol):
    """An input: some files, each read in its order, in units of `rows` rows. It is data, and travels as such."""

    @property
    def rows(self) -> int: ...

    @property
    def files(self) -> int:
        """How many; each can be read by itself."""
        ...

    def identity(self) -> Any:
        """What tells this input from others, as JSON values."""
        ...

    def read(self, file: int, skip: Set[Key]) -> Iterator[Unit]:
        """The units of a file but for those to be skipped."""
        ...


def check_rows(rows: int) -> int:
    """Rows of a unit.

    Raises:
        TypeError, ValueError: there are none, or too many.
    """
    if check_count("rows", rows) > MOST_ROWS:
        raise ValueError(f"rows of a shard must be 1 to {MOST_ROWS}, got {rows}")
    return rows


def find_tables(source: str, format: str) -> tuple[tuple[Path, str], ...]:
    """The tables that a path is, and the kind of each: a CSV, a Parquet file or a folder of such; () for other forms.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(_TABLES) and not file.name.startswith("."))
        kinds = [kind_of(file, format) for file in files]
        if not files or any(path.glob("*__inputs.npy")):
            return ()
        for file, kind in zip(files, kinds, strict=True):
            if kind is None:
                raise ValueError(
                    f"{file} is no table with a header and the puzzle's column, as the folder's others are"
                )
    else:
        files, kinds = [path], [kind_of(path, format)]
    return tuple((file.absolute(), kind) for file, kind in zip(files, kinds, strict=True) if kind is not None)


@dataclass(frozen=True)
class TableReader:
    """CSV and Parquet files of any size.

    Attributes:
        tables: path and kind of each, see `find_tables`.
        task: as `find_task` takes it.
        seq_len: of the puzzles that the model takes; a row with others is an error.
        rows: of a unit.
    """

    tables: tuple[tuple[Path, str], ...]
    task: str
    seq_len: int
    rows: int

    def __post_init__(self) -> None:
        check_rows(self.rows)

    @property
    def files(self) -> int:
        return len(self.tables)

    def identity(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of each file."""
        known = []
        for path, _ in self.tables:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            known.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        return known

    def read(self, file: int, skip: Set[Key]) -> Iterator[Unit]:
        task = find_task(self.task)
        path, kind = self.tables[file]
        for place, piece in enumerate(pieces(path, kind, self.rows)):
            key = Key(file, place)
            if key not in skip:
                puzzles, errors = _fitting(task, piece, self.seq_len)
                if len(puzzles) or errors:
                    yield Unit(key, path.name, puzzles, tuple(errors), (file + piece.share) / self.files)


def _fitting(task: Task, piece: Piece, seq_len: int) -> tuple[PuzzleSet, list[ParseError]]:
    """The puzzles of a piece that the model takes, and the other rows."""
    puzzles, errors = load_piece(task, piece)
    if puzzles is None:
        return _no_puzzles(seq_len), errors
    if puzzles.inputs.shape[1] == seq_len:
        return puzzles, errors
    # Most rows are of another size, which the task took for that of all: each is asked by itself.
    head, rows = (piece.lines[:1], piece.lines[1:]) if piece.format == "csv" else ((), piece.lines)
    good: list[PuzzleSet] = []
    errors = list(piece.errors)
    for row in rows:
        one, wrong = load_piece(task, Piece(piece.name, piece.format, (*head, row), piece.share))
        errors += wrong
        if one is not None and one.inputs.shape[1] == seq_len:
            good.append(one)
        elif one is not None:
            size = one.inputs.shape[1]
            errors.append(ParseError(row[0], row[1], f"is a puzzle of {size} cells, and the model takes {seq_len}"))
    return _joined(good) if good else _no_puzzles(seq_len), errors


def _joined(parts: list[PuzzleSet]) -> PuzzleSet:
    """Parts of one table, with all that is known of them."""
    labels = [np.zeros_like(part.inputs) if part.labels is None else part.labels for part in parts]
    known = np.concatenate(labels)
    ids = [np.full(len(part), "") if part.id is None else part.id for part in parts]
    return PuzzleSet(
        np.concatenate([part.inputs for part in parts]),
        known if known.any() else None,
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.rating for part in parts]),
        np.concatenate([part.line for part in parts if part.line is not None]),
        np.concatenate(ids) if any(part.id is not None for part in parts) else None,
    )


def _no_puzzles(seq_len: int) -> PuzzleSet:
    tokens = np.zeros((0, seq_len), np.uint8)
    return PuzzleSet(tokens, None, np.zeros(0, np.str_), np.zeros(0), np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class PuzzleReader:
    """Puzzles that were read whole, in any form that the commands take.

    Attributes:
        puzzles, errors: in the order of their lines.
        name: of the file.
        rows: of a unit.
    """

    puzzles: PuzzleSet
    errors: ParseErrors
    name: str
    rows: int

    @property
    def files(self) -> int:
        return 1

    def __post_init__(self) -> None:
        check_count("rows", self.rows)

    def identity(self) -> list[dict[str, Any]]:
        """SHA-256 of the puzzles, the answers and where they stood."""
        p = self.puzzles
        hashed = hashlib.sha256(p.inputs.tobytes() + (b"" if p.labels is None else p.labels.tobytes()))
        hashed.update(self._lines().tobytes() + repr(list(self.errors)).encode())
        return [{"name": self.name, "rows": len(p) + len(self.errors), "sha256": hashed.hexdigest()}]

    def _lines(self) -> Any:
        return np.arange(1, len(self.puzzles) + 1) if self.puzzles.line is None else self.puzzles.line

    def read(self, file: int, skip: Set[Key]) -> Iterator[Unit]:
        lines = self._lines()
        of_errors = np.array([error.line for error in self.errors], np.int64)
        order = np.argsort(np.concatenate([lines, of_errors]), kind="stable")
        for place, start in enumerate(range(0, len(order), self.rows)):
            if Key(file, place) in skip:
                continue
            chosen = order[start : start + self.rows]
            rows = chosen[chosen < len(lines)]
            subset = self.puzzles.subset(rows)
            puzzles = PuzzleSet(subset.inputs, subset.labels, subset.source, subset.rating, lines[rows], subset.id)
            errors = tuple(self.errors[i - len(lines)] for i in chosen[chosen >= len(lines)])
            share = min(1.0, (start + self.rows) / len(order))
            yield Unit(Key(file, place), self.name, puzzles, errors, share)
