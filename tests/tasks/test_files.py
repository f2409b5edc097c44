"""Puzzle files as they circulate: what is read, what is refused, and by which words."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import re
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eqr_kernels.tasks import maze, sudoku
from eqr_kernels.tasks.common import KEPT_ERRORS, ParseError, ParseErrors, PuzzleSet
from eqr_kernels.tasks.files.container import open_container
from tests.support.puzzle_files import A_ANSWER, B_ANSWER, FORMS, A, B, C, banded, plain, rows_of


def read(text: str, **options: str) -> tuple[PuzzleSet, ParseErrors]:
    return sudoku.load(io.StringIO(text), **options)


def grids(puzzles: PuzzleSet) -> list[str]:
    return [sudoku.decode(row) for row in puzzles.inputs]


# one grid of nine lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_written_grid_is_one_puzzle(text: str) -> None:
    puzzles, errors = read(text)
    assert grids(puzzles) == [A] and errors == []


@pytest.mark.parametrize("grid", [A, B, C, A_ANSWER, "." * 81])
def test_what_is_drawn_can_be_read(grid: str) -> None:
    drawn = sudoku.format_grid(sudoku.encode(grid))
    assert sudoku.decode(sudoku.encode(drawn)) == grid
    assert grids(read(drawn)[0]) == [grid]
    assert grids(read(f"{drawn}\n\n{drawn}\n")[0]) == [grid, grid]


@pytest.mark.parametrize("name", [n for n, text in FORMS.items() if not re.search("[a-w#\x1a]", text)])
def test_encode_takes_written_grids_too(name: str) -> None:
    assert sudoku.decode(sudoku.encode(FORMS[name])) == A


@pytest.mark.parametrize(
    "rule",
    [
        *(
            "---------",
            "-------+-------+------",
            "*********",
            "===",
            "+++++++++",
            "|-|-|",
            "- - - - - - - - -",
            "-" * 81,
        ),
        *(
            "─" * 9,
            "═" * 8,
            "━" * 10,
            "||||||||",
            "||||||||||",
            "├───┼───┼───┤",
            ".-------.-------.",
            "[",
            "~~~",
        ),
    ],
)
@pytest.mark.parametrize("form", ["plain", "spaced", "commas", "tabs with empty cells", "spaces for blanks"])
def test_rules_never_count_as_blanks(rule: str, form: str) -> None:
    lines = FORMS[form].split("\n")
    # the same eight rows with a rule in place of the one that is missing, and rules all around
    damaged = "\n".join([*lines[:4], rule, *lines[5:]])
    puzzles, errors = read(damaged)
    assert len(puzzles) == 0 and errors.total == 1
    with pytest.raises(ValueError, match="^text has"):
        sudoku.encode(damaged)
    whole = "\n".join([rule, *lines[:3], rule, *lines[3:6], rule, *lines[6:], rule])
    assert grids(read(whole)[0]) == [A]


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_empty_rows_of_a_sheet(separator: str) -> None:
    sheets = [separator.join(row).replace(".", "") for grid in (A, C, B) for row in rows_of(grid)]
    parting = separator * 8
    for left, right in (("| ", " |"), (" ", " ")):
        barred = [left + " | ".join(row.replace(".", " ")) + right for row in rows_of(C)]
        assert grids(read("\n".join(barred))[0]) == [C]
    assert grids(read("\n".join(sheets))[0]) == [A, C, B], "the fourth row of C is empty"
    assert grids(read("\n".join([*sheets[:9], parting, *sheets[18:], parting]))[0]) == [A, B], "parted by empty rows"
    assert len(read("\n".join([*sheets[:13], parting, *sheets[13:]]))[0]) == 0


@pytest.mark.parametrize("form", ["plain", "spaced", "bars and dashes"])
def test_bars_alone_are_no_row_where_blanks_are_written(form: str) -> None:
    lines = FORMS[form].split("\n")
    assert grids(read("\n".join(["|   |   |   |", *lines, "|   |   |   |"]))[0]) == [A]
    assert len(read("\n".join([*lines[:-1], "|   |   |   |"]))[0]) == 0


def test_an_empty_row_of_dashes_among_rows_with_dashes() -> None:
    text = plain(C).replace(".", "-")
    assert text.split("\n")[3] == "---------" and grids(read(text)[0]) == [C]
    assert sudoku.decode(sudoku.encode(text)) == C


# many grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"Grid 01\n{plain(A)}\nGrid 02\n{plain(B)}\nGrid 03\n{plain(C)}\n".replace(".", "0"),
        f"{plain(A)}\n\n{plain(B)}\n\n\n{plain(C)}",
        f"{plain(A)}\n{plain(B)}\n{plain(C)}",
        f"{plain(A)}\n---------\n{plain(B)}\n---------\n{plain(C)}\n---------\n",
        f"{plain(A)}\n=====\n{plain(B)}\n=====\n{plain(C)}",
        f"1\n{plain(A)}\n2\n{plain(B)}\n3\n{plain(C)}",
        f"01.\n\n{plain(A)}\n\n02.\n\n{plain(B)}\n\n03.\n\n{plain(C)}",
        f"[Easy]\n{plain(A)}\n[Hard]\n{plain(B)}\n[Mine]\n{plain(C)}",
        f"# one\n{plain(A)}\n# two\n{plain(B)}\n# three\n{plain(C)}",
        f"{A}\n\n{plain(B)}\n\n{C}",
        f"{A} # in a line\nthe next one is written\n{plain(B)}\n{C}",
        "\n\n".join(sudoku.format_grid(sudoku.encode(grid)) for grid in (A, B, C)),
        "\n".join(FORMS["outer bars"].replace(plain(A), plain(g)) for g in (A,)) + f"\n\n{plain(B)}\n\n{plain(C)}",
        "\n\n".join("\n".join(rows_of(g)[i : i + 3]) for g in (A, B, C) for i in (0, 3, 6)),
        "\n\n".join(plain(grid).replace(".", " ") for grid in (A, B, C)),
    ],
)
def test_collections(text: str) -> None:
    puzzles, errors = read(text)
    assert grids(puzzles) == [A, B, C] and errors == []


def test_a_grid_names_the_line_that_it_begins_on() -> None:
    puzzles, errors = read(f"Grid 01\n{plain(A)}\nGrid 02\n{plain(B)[:-1]}\nGrid 03\n{plain(C)}\n{A}\nnonsense\n")
    assert puzzles.line is not None and puzzles.line.tolist() == [2, 22, 31]
    assert [(error.line, error.text) for error in errors] == [(12, rows_of(B)[0]), (32, "nonsense")]
    assert "line 20 has 8 cells" in errors[0].message


@pytest.mark.parametrize("lost", range(9))
@pytest.mark.parametrize("separator", ["\n", "\n\n", "\nGrid 02\n", "\n-----------\n"])
def test_a_lost_row_never_shifts_the_next_grid(lost: int, separator: str) -> None:
    rows = rows_of(A)
    for damaged in (rows[:lost] + rows[lost + 1 :], rows[:lost] + [rows[lost][:-1]] + rows[lost + 1 :]):
        puzzles, errors = read("\n".join(damaged) + separator + plain(B) + "\n\n" + plain(C))
        assert set(grids(puzzles)) <= {B, C} and C in grids(puzzles) and errors


@pytest.mark.parametrize("separator", ["========", "---------", "~~~", "\n", "Grid", "# next"])
@pytest.mark.parametrize("damage", [lambda rows: rows[:8], lambda rows: [*rows[:4], rows[4][1:], *rows[5:]]])
def test_a_damaged_grid_costs_no_neighbour(separator: str, damage: Callable[[list[str]], list[str]]) -> None:
    puzzles, errors = read(f"\n{separator}\n".join([plain(A), "\n".join(damage(rows_of(B))), plain(C)]))
    assert grids(puzzles) == [A, C] and errors.total == 1


def test_two_lost_rows_that_make_up_for_each_other() -> None:
    lines = [*rows_of(A), *rows_of(B), *rows_of(C)]
    lines[2] = "12a3b45.."
    lines[12] = "9x6?75..."
    puzzles, errors = read("\n".join(lines))
    assert not set(grids(puzzles)) - {A, B, C} and errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(rows_of(A)[:8]), "begins 8 rows of 9 cells; a grid has 9: no cell is guessed"),
        (banded(rows_of(A), "-----").replace("-----\n", "", 1).replace("\n8...6", "\n-----\n8...6\n-----"), "line"),
        ("\n".join([*rows_of(A)[:5], "---+---", *rows_of(A)[5:]]), "with a rule within three of them"),
        ("\n".join(" ".join("1234" for _ in range(9)) for _ in range(9)), "grid of candidates"),
        ("12..\n..34\n3.4.\n.1.2", "a 4x4 grid; this is for 9x9"),
        ("\n".join(["1.....", "..2...", "...3..", "....4.", ".....5", "6....."]), "a 6x6 grid"),
        ("\n".join(["1..A...G........"] * 16), "a 16x16 grid"),
        ("\n".join([" ".join(["1", ".", "16", "12"] * 4)] * 16), "a 16x16 grid"),
        ("\n".join(row.replace(".", " ").lstrip() for row in rows_of(A)), "spaces for blanks"),
        (plain(A).replace(".", " ").replace("8   6", "8 6"), "its rows differ in length"),
        (FORMS["bars between all cells, empty ones"][3:], "cells in a row|other characters|[0-9] cells"),
        (FORMS["commas"].replace("5,3", ",3").replace(".", "0"), "both empty fields and characters for blanks"),
        (f"[State]\n{plain(A)}", r"\[State\] without a \[Puzzle\]"),
    ],
)
def test_no_cell_is_guessed(text: str, message: str) -> None:
    puzzles, errors = read(text)
    assert len(puzzles) == 0 and errors.total >= 1
    assert re.search(message, errors[0].message), errors[0].message


# a puzzle a line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        f"10378  5710  {A}  11.0 11.0 2.6   95078 98434 Coloin",
        f"{A} B0 ED=7.2/1.5/1.5",
        f"{A} // from: a repository",
        f"{A};11.9;11.9;11.3;champagne",
        f"{A},hard",
        f"{A}\t7.2\tme",
        f'"{A}", "easy"',
        f"Nr. 17: {A}",
        f"#17 {A} # hard",
        f" #3. {A}",
        f"name={A}",
        f"| {A} | 7.1 |",
        f"[{A}]",
        f"x {A} 000000",
        f"------------------------------------------------------ {A}",
        f"{A.replace('.', '-')}  a-b-c",
        " ".join(A),
        " ".join(rows_of(A)),
        "|".join(rows_of(A)),
        " ".join(A[i : i + 27] for i in (0, 27, 54)),
        ",".join(A),
        ",".join(A).replace(".", ""),
        "\t".join(A).replace(".", "0"),
        f"{A}   ",
        f"{A}\x1a",
        f"\u00a0{A}\u3000",
    ],
)
def test_81_cells_in_a_row_among_other_fields_are_the_puzzle(line: str) -> None:
    puzzles, errors = read(f"{line}\n{B}\n")
    assert grids(puzzles) == [A, B] and errors == [] and puzzles.labels is None


@pytest.mark.parametrize(
    "line",
    [
        f"{A},{A_ANSWER}",
        f"{A} {A_ANSWER}",
        f"1;{A};{A_ANSWER};27",
        f"{A.replace('.', '0')}\t{A_ANSWER}\tme",
        f"7|{A}|{A_ANSWER}",
    ],
)
def test_81_more_are_the_answer(line: str) -> None:
    puzzles, errors = read(line)
    assert grids(puzzles) == [A] and errors == []
    assert puzzles.labels is not None and sudoku.decode(puzzles.labels[0]) == A_ANSWER


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"5710 {A[4:]}", r"has 77 cells.*\(they begin at column 6 of the line\)"),
        (f"10378 {A[5:]}", "has 76 cells"),
        (f"{A[:40]} {A[40:]}", "cells"),
        (f"x{A[1:]}5", "has 82 cells"),
        (f"Hardest-{A}", "has 89 cells"),
        (f"{A}{A_ANSWER}", "has 162 cells"),
        (f"17  5{A[:-1]} 7.1", r"the givens break the rules.* \(its cells begin at column 5 of the line\)"),
        (f"{A},{A_ANSWER[:-1]}", "answer has 80 cells"),
        (f"{A} {A_ANSWER[:-1]}?", r"answer has '\?' at cell 81"),
        (f"{A[:-1]},{A_ANSWER}", "has 80 cells"),
        (f"{A} {B} {C}", r"has 3 grids \(at columns 1 and 83 and 165\)"),
        (A.lstrip("5").replace(".", "0"), "leading zeros or other digits were lost"),
        ("4.3E+78", "a number in a spreadsheet's notation"),
        ("4,30021E+78", "a number in a spreadsheet's notation"),
        ("." * 255 + "G", "has 256 cells.*a 16x16 grid has as many, and this is for 9x9"),
        ("1" + "." * 15, "has 16 cells.*a 4x4 grid"),
        ("1" + "." * 35, "has 36 cells.*a 6x6 grid"),
        ("1" + "." * 63, "has 64 cells.*an? 8x8 grid"),
        ("123456789" * 81, "has 729 cells.*9 candidates for each cell"),
        (A.replace(".", "+"), r"has '\+' at cell 3"),
        ("hello, world", "has no 81 cells in a row"),
    ],
)
def test_a_line_that_is_no_puzzle_says_why(line: str, message: str) -> None:
    puzzles, errors = read(f"{A}\n{line}\n{B}\n")
    assert grids(puzzles) == [A, B]
    assert [error.line for error in errors] == [2] and re.search(message, errors[0].message), errors[0].message


def test_comments_are_passed_over() -> None:
    puzzles, errors = read(f"# {A}\n#{A}\n#DA, 17 {A}\n{B} # {A}\n#5 easy\n//\n")
    assert grids(puzzles) == [B] and [error.line for error in errors] == [6]


def test_a_line_of_81_dashes_is_a_rule() -> None:
    puzzles, errors = read(f"{A}\n{'-' * 81}\n{B}\n{'*' * 81}")
    assert grids(puzzles) == [A, B] and errors == []


# tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize(
    "header",
    [
        "id,puzzle,solution,clues,difficulty",
        "ID,Puzzle,Solution,Clues,Difficulty",
        "n,quizzes,solutions,clues,rating",
        "n,question,answer,clues,Rating",
        "puzzle_id,initial_board,solution,clues,difficulty",
        "puzzle_id,Initial Board,Solution,clues,difficulty",
        '"id","puzzle","solution","clues","difficulty"',
    ],
)
def test_tables(header: str, separator: str) -> None:
    rows = [header, f"1,{A},{A_ANSWER},30,2.2", f"2,{B},{B_ANSWER},23,7", f"3,{C},,25,"]
    puzzles, errors = read("\n".join(row.replace(",", separator) for row in rows))
    assert grids(puzzles) == [A, B, C] and errors == []
    assert puzzles.labels is not None and [sudoku.decode(row) for row in puzzles.labels[:2]] == [A_ANSWER, B_ANSWER]
    assert puzzles.rating.tolist() == [2.2, 7.0, -1.0] and puzzles.rating.dtype == np.float64


@pytest.mark.parametrize(
    ("name", "value", "rating"),
    [
        ("rating", "2.2", 2.2),
        ("rating", "1.0", 1),
        ("rating", "11.9", 11.9),
        ("rating", "1e2", 100),
        ("rating", "-1", -1),
        ("rating", "NaN", -1),
        ("rating", "", -1),
        ("difficulty", "easy", -1),
        ("Difficulty", "0.0", 0),
        ("rating", '"2,5"', 2.5),
        ("rating", str(2**53), 2**53),
        ("rating", "many", None),
        ("rating", "inf", None),
        ("rating", str(2**53 + 2), None),
    ],
)
def test_ratings(name: str, value: str, rating: float | None) -> None:
    puzzles, errors = read(f"question,{name}\n{A},{value}\n{B},3\n")
    assert puzzles.rating.tolist() == ([3] if rating is None else [rating, 3])
    assert [error.line for error in errors] == ([2] if rating is None else [])


def test_quoted_fields_may_have_line_breaks_and_separators() -> None:
    rules = '"Normal rules, and:\n# not a comment\n\nfill the ""grid""."'
    text = f"id,rules,initial_board,solution\na,{rules},{A},{A_ANSWER}\nb,none,{B},\n"
    puzzles, errors = read(text)
    assert grids(puzzles) == [A, B] and errors == []
    assert puzzles.line is not None and puzzles.line.tolist() == [2, 6]


def test_a_stray_quote_costs_its_own_line_only() -> None:
    rows = [f"{i},{A},{A_ANSWER}" for i in range(700)]
    rows[3] = rows[3].replace("3,", '"3,', 1)
    rows[500] = f'500,"{A},{A_ANSWER}'
    puzzles, errors = read("\n".join(["id,puzzle,solution", *rows]))
    assert len(puzzles) == 698 and [error.line for error in errors] == [5, 502]


@pytest.mark.parametrize(
    "field", [f'"{plain(A)}"', f'"{FORMS["bars and dashes"]}"', f'"{rows_of(A)}"', f'="{A}"', f"'{A}"]
)
def test_fields_may_hold_written_grids(field: str) -> None:
    puzzles, errors = read(f"id;puzzle\n1;{field}\n2;{B}\n")
    assert grids(puzzles) == [A, B] and errors == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{A.lstrip('5').replace('.', '0')},{A_ANSWER}", "has 80 cells.*leading zeros or other digits were lost"),
        (f"4.3E+78,{A_ANSWER}", "a number in a spreadsheet's notation"),
        (f"1...............,{'1234' * 4}", "has 16 cells.*a 4x4 grid"),
        (f"{'.' * 256},", "a 16x16 grid"),
        (f"{A},{A_ANSWER},1", "has 3 fields; the header has 2"),
        (f"5 {A[:-2]},", "has ' ' at cell 2"),
        (",x", "has 0 cells"),
    ],
)
def test_a_row_of_a_table_that_is_no_puzzle_says_why(row: str, message: str) -> None:
    puzzles, errors = read(f"puzzle,solution\n{B},\n{row}\n{A},\n")
    assert grids(puzzles) == [B, A]
    assert [error.line for error in errors] == [3] and re.search(message, errors[0].message), errors[0].message


JSON = [
    json.dumps({"question": A, "answer": A_ANSWER, "rating": 2.5}) + "\n" + json.dumps({"question": B, "rating": 3}),
    json.dumps({"Puzzle": A, "solution": A_ANSWER, "difficulty": "2.5"})
    + "\n\n"
    + json.dumps({"Puzzle": B, "difficulty": 3}),
    json.dumps([{"puzzle": A, "answer": A_ANSWER, "rating": 2.5}, {"puzzle": B, "rating": 3}], indent=1),
    json.dumps([{"puzzle": A, "answer": A_ANSWER, "rating": 2.5}, {"puzzle": B, "rating": 3}]),
    json.dumps(
        [
            {
                "puzzle": [[int(c) for c in row.replace(".", "0")] for row in rows_of(A)],
                "solution": A_ANSWER,
                "rating": 2.5,
            },
            {"puzzle": [None if c == "." else int(c) for c in B], "rating": 3},
        ]
    ),
    json.dumps({"quizzes": [A, B], "solutions": [A_ANSWER, None], "rating": [2.5, 3]}),
    json.dumps(
        {"puzzle": {"0": A, "1": B}, "answer": {"0": A_ANSWER, "1": ""}, "rating": {"0": 2.5, "1": 3}}, indent=2
    ),
    json.dumps({"data": [{"puzzle": A, "answer": A_ANSWER, "rating": 2.5}, {"puzzle": B, "rating": 3}], "n": 2}),
]


@pytest.mark.parametrize("text", JSON)
def test_json(text: str) -> None:
    puzzles, errors = read(text)
    assert grids(puzzles) == [A, B] and errors == [] and puzzles.rating.tolist() == [2.5, 3]
    assert puzzles.labels is not None and sudoku.decode(puzzles.labels[0]) == A_ANSWER


@pytest.mark.parametrize("text", [json.dumps([A, B]), f'"{A}"\n"{B}"', json.dumps([A]) + "\n" + json.dumps([B])])
def test_json_of_puzzles_alone(text: str) -> None:
    assert grids(read(text, format="json")[0]) == [A, B]


def test_json_rows_that_are_no_puzzles() -> None:
    rows = ['{"id": 1}', "{", '{"puzzle": 4.3e+78}', '{"puzzle": null}', '{"puzzle": [[10, 3]]}', "7", '{"puzzle": {}}']
    puzzles, errors = read("\n".join([json.dumps({"puzzle": A}), *rows, json.dumps({"puzzle": B})]))
    assert grids(puzzles) == [A, B] and [error.line for error in errors] == [2, 3, 4, 5, 6, 7, 8]
    assert "has the names 'id'" in errors[0].message and "spreadsheet's notation" in errors[2].message
    with pytest.raises(ValueError, match="neither JSON lines nor one JSON document"):
        read("{\n{\n")


# what files hold -----------------------------------------------------------------------------------------------------

TEXT = f"puzzle,solution\n{A},{A_ANSWER}\n{B},{B_ANSWER}\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        gzip.compress(TEXT.encode(), mtime=0),
        gzip.compress(gzip.compress(TEXT.encode(), mtime=0), mtime=0),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-32"),
        gzip.compress(TEXT.encode("utf-16"), mtime=0),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.encode() + b"\x1a",
        TEXT.encode() + b"\n   \n\n",
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.csv.gz", "a", "a.sdm"])
def test_a_file_is_what_its_bytes_say(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    puzzles, errors = sudoku.load(path)
    assert grids(puzzles) == [A, B] and errors == [] and puzzles.source[0] == name
    assert puzzles.labels is not None and sudoku.decode(puzzles.labels[1]) == B_ANSWER


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def database(path: Path) -> bytes:
    with sqlite3.connect(path) as connection:
        connection.execute("create table puzzles (question text)")
    connection.close()
    return path.read_bytes()


NO_PUZZLES = {
    "zip archive": (archive({"sudoku.csv": TEXT.encode()}), "is a zip archive .'sudoku.csv'.: unzip it"),
    "cut zip": (archive({"sudoku.csv": TEXT.encode() * 9})[:100], "a zip archive that is cut"),
    "xlsx": (
        archive({"[Content_Types].xml": b"", "xl/workbook.xml": b""}),
        "an Office document .*save the sheet as CSV",
    ),
    "torch": (archive({"a/data.pkl": b"", "a/version": b"3"}), "is a torch file"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Office document"),
    "bzip2": (bz2.compress(TEXT.encode()), "is a bzip2 archive: unpack it"),
    "xz": (b"\xfd7zXZ\x00\x00\x04", "is an xz archive"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "is a Zstandard archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "is a 7z archive"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "is a tar archive"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "is a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "is a JPEG image"),
    "gif": (b"GIF89a" + bytes(40), "is a GIF image"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document"),
    "pickle": (pickle.dumps([A, B]), "is a Python pickle, which could run code"),
    "sqlite": (None, "is an SQLite database"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
    "feather": (b"ARROW1\x00\x00" + bytes(40), "is an Arrow"),
    "web page": (b"\n<!DOCTYPE html><html>", "is a web page: download the file itself"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of Git LFS.*git lfs pull"),
    "rtf": (b"{\\rtf1\\ansi}", "is an RTF document"),
    "noise": (bytes(np.random.default_rng(0).integers(0, 256, 500_000, np.uint8)), "is no text, nor of a format"),
    "gzipped zip": (gzip.compress(archive({"a.csv": b"1"}), mtime=0), "is a zip archive"),
    "parquet, cut": (b"PAR1" + bytes(100), "is no whole Parquet table"),
    "npy, cut": (b"\x93NUMPY\x01\x00v\x00", "is not a .npy array"),
}


@pytest.mark.parametrize("name", ["puzzles.csv", "puzzles.txt", "puzzles"])
@pytest.mark.parametrize(("data", "message"), NO_PUZZLES.values(), ids=NO_PUZZLES)
def test_what_is_no_text_is_named_at_once(tmp_path: Path, data: bytes | None, message: str, name: str) -> None:
    if data is None:
        data = database(tmp_path / "x.db")
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        sudoku.load(path)
    assert name in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train-00000-of-00001"
    columns = {"question": [A, B, "1...", None], "answer": [A_ANSWER, None, None, None], "rating": [2.5, 3, None, 1]}
    parquet.write_table(pyarrow.table(columns), path)
    puzzles, errors = sudoku.load(path)
    assert grids(puzzles) == [A, B] and puzzles.rating.tolist() == [2.5, 3]
    assert puzzles.labels is not None and sudoku.decode(puzzles.labels[0]) == A_ANSWER
    assert [error.line for error in errors] == [3, 4] and "has 4 cells" in errors[0].message
    digits = [[int(c) for c in A.replace(".", "0")]]
    parquet.write_table(pyarrow.table({"Puzzle": digits}), path)
    assert grids(sudoku.load(path, format="parquet")[0]) == [A]
    parquet.write_table(pyarrow.table({"id": [1]}), path)
    with pytest.raises(ValueError, match="has the columns 'id', none of which is the puzzle"):
        sudoku.load(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"reading it needs pyarrow: pip install 'eqr_kernels\[data\]'"):
        sudoku.load(path)


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "sudoku.npz"
    digits = np.stack([sudoku.encode(A), sudoku.encode(B)]).reshape(2, 9, 9) - 1
    answers = np.stack([sudoku.encode(A_ANSWER), np.ones(81, np.uint8)]).reshape(2, 9, 9) - 1
    for writing in (np.savez, np.savez_compressed):
        writing(path, quizzes=digits, solutions=answers)
        puzzles, errors = sudoku.load(path)
        assert grids(puzzles) == [A, B] and errors == [] and puzzles.labels is not None
        assert sudoku.decode(puzzles.labels[0]) == A_ANSWER and not puzzles.labels[1].any()
    np.savez(path, inputs=digits + 1, labels=answers + 1)
    puzzles, errors = sudoku.load(path, values="tokens")
    assert grids(puzzles) == [A] and errors.total == 1
    np.savez(path, digits)
    assert grids(sudoku.load(path)[0]) == [A, B]
    np.savez(path, a=digits, b=answers)
    with pytest.raises(ValueError, match="holds the arrays 'a', 'b'; name that of the puzzles"):
        sudoku.load(path)
    np.savez(path, puzzles=digits, solutions=answers[:1])
    with pytest.raises(ValueError, match="they must be equal"):
        sudoku.load(path)


def test_the_format_overrides_what_would_be_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(plain(A))
    assert sudoku.load(path, format="lines")[1].total == 9
    assert grids(sudoku.load(path, format="grids")[0]) == [A]
    with pytest.raises(ValueError, match="the CSV header on line 1"):
        sudoku.load(path, format="csv")
    with pytest.raises(ValueError, match="is not a .npy array"):
        sudoku.load(path, format="npy")
    np.save(tmp_path / "b.npy", np.zeros((1, 81), int))
    with pytest.raises(ValueError, match="b.npy is a .npy file, and format is 'csv'"):
        sudoku.load(tmp_path / "b.npy", format="csv")


def test_errors_beyond_the_first_are_counted_and_not_kept() -> None:
    lines = [A, *(f"word {'y' * 2000}" for _ in range(KEPT_ERRORS)), B, *["nonsense"] * (5 * KEPT_ERRORS)]
    puzzles, errors = read("\n".join(lines))
    assert grids(puzzles) == [A, B]
    assert len(errors) == KEPT_ERRORS and errors.total == 6 * KEPT_ERRORS
    assert [error.line for error in errors] == list(range(2, KEPT_ERRORS + 2))
    assert max(len(error.text) for error in errors) <= 1000
    assert errors.before(5).total == 3 and errors.before(KEPT_ERRORS + 2).total == 6 * KEPT_ERRORS


def test_errors_that_come_out_of_order_are_the_first_by_line() -> None:
    errors = ParseErrors(ParseError(line, "", "") for line in range(5 * KEPT_ERRORS, 0, -1))
    assert [error.line for error in errors] == list(range(1, KEPT_ERRORS + 1)) and errors.total == 5 * KEPT_ERRORS


@pytest.mark.parametrize("source", ["\x1b[2J", "\ud800", "a\nb", "\u202e", "y" * 5000])
def test_names_are_printable(source: str) -> None:
    puzzles, _ = read(json.dumps({"question": A, "source": source}))
    assert puzzles.source[0].isprintable() and len(puzzles.source[0]) <= 200
    str(puzzles.source[0]).encode()


# mazes use the same reader -------------------------------------------------------------------------------------------


def test_mazes_in_tables_and_files(tmp_path: Path) -> None:
    made = maze.generate(3, size=9, seed=1)
    assert made.labels is not None
    rows = [(maze.decode(q), maze.decode(a)) for q, a in zip(made.inputs, made.labels, strict=True)]
    texts = [
        "\n".join(question for question, _ in rows),
        "\n".join(",".join(row) for row in rows),
        "puzzle;solution\n" + "\n".join(";".join(row) for row in rows),
        "\n".join(json.dumps({"question": q, "answer": a, "rating": 1.5}) for q, a in rows),
    ]
    for text in texts:
        for data in (text.encode(), gzip.compress(text.encode(), mtime=0), text.encode("utf-16")):
            (tmp_path / "m").write_bytes(data)
            puzzles, errors = maze.load(tmp_path / "m")
            assert errors == [] and np.array_equal(puzzles.inputs, made.inputs)
    (tmp_path / "m").write_bytes(archive({"a": b""}))
    with pytest.raises(ValueError, match="zip archive"):
        maze.load(tmp_path / "m")


def test_gzip_that_is_damaged_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(TEXT.encode(), mtime=0)[:12])
    puzzles, errors = sudoku.load(path)
    assert len(puzzles) == 0 and "cannot be read from here on" in errors[0].message
    with open(path, "rb") as file:
        assert open_container(file, "a.txt", "auto").kind == "text"
