"""`eqr solve` on puzzle files: what is solved, what is said of the rest, and the exit code."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eqr_kernels import EqRConfig
from tests.support.commands import TINY, eqr, eqr_json, make_copier

SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
GRID = "\n".join(SOLUTION[i : i + 9] for i in range(0, 81, 9))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_copier(tmp_path_factory.mktemp("model"), EqRConfig.sudoku(**TINY, noise_scale=0.0), tol=0.02)


def zipped(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("sudoku.csv", text)
    return buffer.getvalue()


FILES = [
    ("lines", f"{SOLUTION}\n{PUZZLE}\n", 0, 2, 0),
    ("a grid", GRID, 0, 1, 0),
    ("titled grids", f"Grid 01\n{GRID}\nGrid 02\n{GRID}\n", 0, 2, 0),
    ("a sheet", f"id;Puzzle;Difficulty\n1;{PUZZLE};2.2\n2;{SOLUTION};hard\n", 0, 2, 0),
    ("Ctrl-Z", f"{SOLUTION}   \r\n\x1a", 0, 1, 0),
    ("a bad line", f"{SOLUTION}\nrubbish\n", 1, 1, 1),
    ("a bad grid", f"{GRID}\n\n{GRID[:-1]}\n", 1, 1, 1),
    ("digits lost", f"puzzle\n{SOLUTION}\n{SOLUTION[1:]}\n4.3E+78\n", 1, 1, 2),
    ("only bad lines", "rubbish\n123\n", 2, 0, 2),
    ("only a 16x16 grid", "." * 255 + "G\n", 2, 0, 1),
    ("only lost digits", f"puzzle\n{SOLUTION[1:]}\n4.3E+78\n", 2, 0, 2),
    ("a cut grid", GRID[:-9], 2, 0, 1),
]


@pytest.mark.parametrize(
    ("text", "code", "solved", "unread"), [row[1:] for row in FILES], ids=[row[0] for row in FILES]
)
def test_the_exit_code_says_whether_all_some_or_nothing_was_read(model, tmp_path, text, code, solved, unread):
    file = tmp_path / "puzzles.csv"
    file.write_bytes(gzip.compress(text.encode(), mtime=0) if code == 1 else text.encode())
    report = eqr_json("solve", file, "--model", model, "--depth", 4, code=code)
    assert (report["summary"]["puzzles"], report["summary"]["unread"]) == (solved, unread)
    assert len(report["errors"]) == unread


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped(PUZZLE), "puzzles.csv is a zip archive ('sudoku.csv'): unzip it and give the puzzle file in it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(300), "puzzles.csv is a PNG image"),
        (np.random.default_rng(0).bytes(300_000), "puzzles.csv is no text"),
        (b"id,name\n1,me\n", "line 1"),
        (b"\n# only a comment\n", "holds no puzzles"),
    ],
)
@pytest.mark.parametrize("stdin", [False, True])
def test_files_without_puzzles_are_one_message_and_exit_code_2(model, tmp_path, data, message, stdin):
    file = tmp_path / "puzzles.csv"
    file.write_bytes(data)
    if stdin:
        result = eqr("solve", "-", "--model", model, input=data, code=2)
        message = message.replace("puzzles.csv", "stdin")
    else:
        result = eqr("solve", file, "--model", model, code=2)
    assert message in result.stderr and all(c.isprintable() or c == "\n" for c in result.output)
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize("command", ["eval", "diagnose", "calibrate"])
def test_commands_that_need_answers_say_that_nothing_could_be_read(model, tmp_path, command):
    file = tmp_path / "puzzles.csv"
    file.write_text("puzzle,solution\n4.3E+78,\n")
    result = eqr(command, file, "--model", model, code=2)
    assert "none of 1 rows could be read, the first on line 2: is a number in a spreadsheet's notation" in result.stderr


@pytest.mark.parametrize(
    "data",
    [gzip.compress(PUZZLE.encode(), mtime=0), PUZZLE.encode("utf-16"), GRID.encode()],
    ids=["gzip", "utf-16", "grid"],
)
def test_a_pipe_may_hold_what_a_file_may(model, data):
    assert eqr_json("solve", "-", "--model", model, "--depth", 2, input=data)["summary"]["puzzles"] == 1


def test_ratings_print_as_they_were_given(model, tmp_path):
    file = tmp_path / "puzzles.csv"
    file.write_text("question,rating\n" + "".join(f"{SOLUTION},{rating}\n" for rating in ("2.2", "3", "1.0", "")))
    report = eqr("solve", file, "--model", model, "--depth", 2, "--json").stdout
    assert [line.strip() for line in report.splitlines() if '"rating"' in line] == [
        '"rating": 2.2,',
        '"rating": 3,',
        '"rating": 1,',
        '"rating": null,',
    ]


def test_thousands_of_bad_lines_are_counted(model, tmp_path):
    file = tmp_path / "puzzles.txt"
    file.write_text(f"{SOLUTION}\n" + "rubbish\n" * 3000)
    result = eqr("solve", file, "--model", model, "--depth", 2, code=1)
    assert "and 2980 more lines (--json lists the first 1000)" in result.stderr
    assert len(result.stderr.splitlines()) == 21 and "unreadable lines: 3000" in result.stdout
    report = eqr_json("solve", file, "--model", model, "--depth", 2, code=1)
    assert report["summary"]["unread"] == 3000 and len(report["errors"]) == 1000


# An empty board, one that the rules allow and no grid fills, and a proper one.
IMPROPER = {
    "." * 81: "several",
    "..9.287..8.6..4..5..3.....46.........2.71345.........23.....5..9..4..8.7..125.3..": "none",
    PUZZLE: "one",
}


def test_improper_puzzles_are_never_called_solved_and_check_tells_why(model):
    report = eqr_json("solve", "--model", model, "--depth", 4, "--check", input="\n".join(IMPROPER))
    assert [row["solutions"] for row in report["puzzles"]] == list(IMPROPER.values())
    assert not any(row["valid"] for row in report["puzzles"] if row["solutions"] == "none")
    assert report["summary"]["solved"] == 0
    text = eqr("solve", "--model", model, "--depth", 4, "--check", "--no-grids", input="\n".join(IMPROPER)).stdout
    assert text.count("it has no solution") == 1 and text.count("it has several solutions") == 1
    assert eqr_json("solve", "--model", model, "--depth", 4, input=PUZZLE)["puzzles"][0]["solutions"] is None


@pytest.mark.parametrize("check", [["--check"], []])
def test_one_of_two_solutions_fills_a_puzzle_and_does_not_solve_it(check):
    places = {3, 4, 30, 31}  # 6 and 7 twice, which may change places
    ambiguous = "".join("." if cell in places else digit for cell, digit in enumerate(SOLUTION))
    arguments = ["solve", "--model", "sudoku-small", *check]
    report = eqr_json(*arguments, input=ambiguous)
    assert (report["puzzles"][0]["valid"], report["puzzles"][0]["solutions"]) == (True, "several")
    assert (report["summary"]["solved"], report["summary"]["filled_ambiguous"]) == (0, 1)
    text = eqr(*arguments, input=ambiguous).stdout
    assert "filled by the rules, " in text and "it has several solutions" in text and "  solved, " not in text
    assert "solved 0 of 1; filled by the rules, of several solutions: 1" in text
