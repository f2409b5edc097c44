"""Tables in pieces: whatever their size, the rows are those of the whole file, with their lines."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from eqr_kernels.distributed.reading import PuzzleReader, TableReader, find_tables
from eqr_kernels.distributed.units import MOST_ROWS, Key, Unit
from eqr_kernels.tasks.pieces import kind_of, load_piece, pieces
from eqr_kernels.tasks.registry import MAZE, SUDOKU
from tests.support.puzzle_files import A_ANSWER, B_ANSWER, A, B, C, plain
from tests.support.tables import write_parquet

CSVS = {
    "answers": f"question,answer\n{A},{A_ANSWER}\n{B},{B_ANSWER}\n{C},\n",
    "every column": f"id,source,question,answer,rating\nx,s,{A},{A_ANSWER},1.5\ny,t,{B},{B_ANSWER},2\nz,s,{C},,\n",
    "bad rows": f"question,answer\n{A},{B_ANSWER}\nrubbish,\n{B},{B_ANSWER}\n{A}\n{C},,,,\n1,2,3\n{B},\n",
    "comments and blank lines": f'# a "table"\n\nquestion,rating\n{A},1\n\n# between\n{B},2\n   \n{C},hard\n',
    "semicolons, Windows": f"Puzzle;Difficulty\r\n{A};1,5\r\n{B};2,5\r\n{C};\r\n\x1a",
    "line breaks in quotes": f'note,question\n"first\nline",{A}\n"a\n\n""b""",{B}\nc,{C}\n',
    "a stray quote": f'id,question\n"first,{A}\nb,{B}\nc,{C}\n',
    "no end of line": f"id,question\n1,{A}\n2,{B}",
    "only bad rows": "id,question\n1,rubbish\n2,123\n",
    "a byte-order mark": f"\ufeffid,question\n1,{A}\n2,{B}\n",
}


def assert_same_rows(path: Path, kind: str, rows: int, task=SUDOKU) -> None:
    whole, wrong = task.load(path)
    parts = [load_piece(task, piece) for piece in pieces(path, kind, rows)]
    got = [part for part, _ in parts if part is not None]
    errors = sorted((error.line, error.message) for _, wrong_lines in parts for error in wrong_lines)
    assert errors == [(error.line, error.message) for error in wrong]
    assert sum(map(len, got)) == len(whole)
    for name in ("inputs", "source", "rating", "line", "id"):
        parts_of = [getattr(part, name) for part in got]
        if len(whole) and getattr(whole, name) is not None:
            np.testing.assert_array_equal(np.concatenate(parts_of), getattr(whole, name), name)
        else:
            assert all(part is None for part in parts_of)
    labels = [np.zeros_like(part.inputs) if part.labels is None else part.labels for part in got]
    if len(whole):
        known = np.zeros_like(whole.inputs) if whole.labels is None else whole.labels
        np.testing.assert_array_equal(np.concatenate(labels), known)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("form", CSVS)
def test_a_csv_in_pieces_is_the_csv(tmp_path, form, rows):
    path = tmp_path / "puzzles.csv"
    path.write_bytes(gzip.compress(CSVS[form].encode()) if rows == 2 else CSVS[form].encode())
    assert kind_of(path) == "csv"
    assert_same_rows(path, "csv", rows)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_parquet_table_in_pieces_is_the_table(tmp_path, rows):
    pytest.importorskip("pyarrow")
    digits = [int(c) for c in A.replace(".", "0")]
    tables = {
        "texts": [dict(id=i, question=q, answer=a, rating=i / 2) for i, (q, a) in enumerate([(A, A_ANSWER), (B, "")])],
        "lists": [dict(Puzzle=digits, Difficulty="hard"), dict(Puzzle=digits[:80], Difficulty="1")],
        "bytes and nulls": [dict(question=A.encode(), source=None), dict(question=None, source="s")],
    }
    for name, table in tables.items():
        path = write_parquet(tmp_path / f"{name}.parquet", table)
        assert kind_of(path) == "parquet"
        assert_same_rows(path, "parquet", rows)


def test_a_damaged_end_is_an_error_and_costs_no_row_before(tmp_path):
    path = tmp_path / "puzzles.csv.gz"
    text = "id,question\n" + "".join(f"{i},{A}\n" for i in range(2000))
    path.write_bytes(gzip.compress(text.encode(), mtime=0)[:-50])
    assert_same_rows(path, "csv", 300)


@pytest.mark.parametrize(
    "text", [f"{A}\n{B}\n", plain(A), "Sudoku, puzzle\n" + plain(A), f"Puzzle\n{A}\n", f'[{{"question": "{A}"}}]', ""]
)
def test_other_forms_are_read_whole(tmp_path, text):
    path = tmp_path / "puzzles.txt"
    path.write_text(text)
    assert kind_of(path) is None
    assert find_tables(str(path), "auto") == ()


def test_a_csv_of_one_column_is_named(tmp_path):
    path = tmp_path / "puzzles.csv"
    path.write_text(f"puzzle\n{A}\n{B}\n")
    assert kind_of(path, "csv") == "csv" and kind_of(path, "lines") is None
    assert_same_rows(path, "csv", 1)


def test_puzzles_of_another_size_are_errors_and_those_between_are_kept(tmp_path):
    small, large = "S  G" + "#" * 12, "S   G" + "#" * 20
    path = tmp_path / "mazes.csv"
    path.write_text("id,question\n" + "".join(f"{i},{maze}\n" for i, maze in enumerate([large, small, large, large])))
    reader = TableReader(find_tables(str(path), "auto"), "maze", len(small), 4)
    (unit,) = reader.read(0, frozenset())
    assert unit.puzzles.line.tolist() == [3] and unit.puzzles.id.tolist() == ["1"]
    assert np.array_equal(unit.puzzles.inputs[0], MAZE.encode(small))
    assert [error.line for error in unit.errors] == [2, 4, 5]
    assert all("25 cells, and the model takes 16" in error.message for error in unit.errors)


def test_a_folder_of_tables_is_read_file_by_file(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "b.csv").write_text(CSVS["bad rows"])
    (tmp_path / "notes.txt").write_text("no table")
    write_parquet(tmp_path / "a.parquet", [dict(question=A), dict(question=B), dict(question=C)])
    reader = TableReader(find_tables(str(tmp_path), "auto"), "sudoku", 81, 2)
    units = [unit for file in range(reader.files) for unit in reader.read(file, {Key(1, 0)})]
    assert [unit.key for unit in units] == [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]
    assert [unit.file for unit in units] == ["a.parquet"] * 2 + ["b.csv"] * 3
    assert [entry["name"] for entry in reader.identity()] == ["a.parquet", "b.csv"]
    (tmp_path / "c.csv").write_text("name\nx\n")
    with pytest.raises(ValueError, match="c.csv is no table with a header and the puzzle's column"):
        find_tables(str(tmp_path), "auto")


@pytest.mark.parametrize("form", ["every column", "bad rows", "only bad rows"])
def test_a_unit_travels_whole(tmp_path, form):
    pytest.importorskip("pyarrow")
    path = tmp_path / "puzzles.csv"
    path.write_text(CSVS[form])
    reader = TableReader(find_tables(str(path), "auto"), "sudoku", 81, 2)
    for unit in reader.read(0, frozenset()):
        other = Unit.from_bytes(unit.to_bytes())
        assert (other.key, other.file, other.errors, other.share) == (unit.key, unit.file, unit.errors, unit.share)
        for name in ("inputs", "labels", "source", "rating", "line", "id"):
            want, got = getattr(unit.puzzles, name), getattr(other.puzzles, name)
            assert (want is None and got is None) or (want.tolist() == got.tolist() and want.shape == got.shape), name


def test_puzzles_read_whole_come_in_the_order_of_their_lines(tmp_path):
    path = tmp_path / "puzzles.txt"
    path.write_text(f"{A}\nrubbish of a line\n{B}\n12345678\n{C}\n")
    puzzles, errors = SUDOKU.load(path)
    units = list(PuzzleReader(puzzles, errors, "puzzles.txt", 2).read(0, frozenset()))
    results = [(unit.puzzles.line.tolist(), [error.line for error in unit.errors]) for unit in units]
    assert results == [([1], [2]), ([3], [4]), ([5], [])] or sum(map(len, units)) == len(puzzles) + len(errors)


@pytest.mark.parametrize("rows", [0, MOST_ROWS + 1])
def test_the_rows_of_a_unit_are_bounded(rows):
    with pytest.raises(ValueError, match="rows"):
        TableReader((), "sudoku", 81, rows)
