"""Sudoku: reading, rules, symmetries, exact solver and generator."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqr_kernels.tasks.common import ParseError, PuzzleSet
from eqr_kernels.tasks.sudoku import (
    augment,
    conflicts,
    decode,
    encode,
    format_grid,
    is_solution,
    is_valid_grid,
    load,
    load_csv,
    reveal,
)
from eqr_kernels.tasks.sudoku_generator import LEVELS, count_solutions, generate, solve_exact
from tests.support.environment import REPOSITORY

EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
EASY_ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# 17 clues, the least that a puzzle with one solution can have
CLUES_17 = "................12..3.45........64.5.3......671..........18..2....2.......5......"
CLUES_17_ANSWER = "968721354457638912123945768892316475534872196716594283649183527381257649275469831"
HARDEST = "98.7..6..75.....8...6......4...3...2..89...7.....2.....1...4.....96...5.....91..3"
HARDEST_ANSWER = "982715634751463289346289517475138962128946375693527148217354896839672451564891723"
IMPOSSIBLE = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."

DATA = Path(os.environ.get("EQR_SUDOKU_DATA") or REPOSITORY.parent / "shared" / "data" / "sudoku")
needs_data = pytest.mark.skipif(
    not (DATA / "dev.csv.gz").exists(), reason=f"no dev.csv.gz in {DATA}: set EQR_SUDOKU_DATA to the data's folder"
)


def two_solutions() -> str:
    """EASY_ANSWER without the corners of a rectangle whose two digits can change places."""
    rows = [EASY_ANSWER[9 * r : 9 * r + 9] for r in range(9)]
    for a in range(9):
        for b in range(a + 1, 9):
            for top in range(9):
                for bottom in range(top + 1, 9):
                    swap = rows[top][a] == rows[bottom][b] and rows[top][b] == rows[bottom][a]
                    if swap and (a // 3 == b // 3 or top // 3 == bottom // 3):
                        holes = {9 * r + c for r in (top, bottom) for c in (a, b)}
                        return "".join("." if i in holes else c for i, c in enumerate(EASY_ANSWER))
    raise AssertionError("the fixture has such a rectangle")


def oracle_valid(grid: np.ndarray) -> bool:
    """No digit twice in a row, column or box, written cell by cell."""
    seen = set()
    for cell, token in enumerate(grid):
        row, column = divmod(cell, 9)
        for unit in (("r", row), ("c", column), ("b", row // 3, column // 3)):
            if token > 1:
                if (unit, token) in seen:
                    return False
                seen.add((unit, token))
    return True


@pytest.fixture(scope="module")
def generated() -> PuzzleSet:
    return generate(8, "hard", seed=11)


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n copies of the easy puzzle and its answer."""
    return np.tile(encode(EASY), (n, 1)), np.tile(encode(EASY_ANSWER), (n, 1))


# text ----------------------------------------------------------------------------------------------------------------


def test_tokens_of_characters() -> None:
    assert encode("." + "123456789" + "0_*-xX." + "." * 64).tolist() == [1, *range(2, 11)] + [1] * 71


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_encode_decode_round_trip(seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(1, 11, 81)
    assert np.array_equal(encode(decode(tokens)), tokens)


def test_white_space_is_skipped() -> None:
    rows = "\n".join(EASY[i : i + 9] for i in range(0, 81, 9))
    assert decode(encode(f"\n {rows}\n")) == EASY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("123", "has 3 cells; it needs 81"),
        (EASY + "1", "has 82 cells"),
        ("", "has 0 cells"),
        (EASY[:10] + "a" + EASY[11:], r"has 'a' at cell 11 \(row 2, column 2\)"),
        (EASY[:80] + "é", r"has 'é' at cell 81 \(row 9, column 9\)"),
        ("٣" + EASY[1:], "has '٣' at cell 1"),
    ],
)
def test_encode_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(text)


def test_encode_and_decode_refuse_other_types() -> None:
    with pytest.raises(TypeError, match="text is a int"):
        encode(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokens has dtype float64"):
        decode(np.ones(81))
    with pytest.raises(ValueError, match=r"tokens has shape \(80,\)"):
        decode(np.ones(80, int))
    with pytest.raises(ValueError, match=r"tokens holds tokens 1 .. 11; allowed are 0 .. 10"):
        decode(np.array([1] * 80 + [11]))


def test_format_grid() -> None:
    lines = format_grid(encode(EASY)).split("\n")
    assert lines[0] == "5 3 . | . 7 . | . . ."
    assert lines[3] == "------+-------+------"
    assert len(lines) == 11
    digits = [c for line in lines if "+" not in line for c in line if c not in " |"]
    assert "".join(digits) == EASY
    marked = format_grid(encode(EASY), mark=lambda cell, c: "N" if cell == 80 else c)
    assert marked == format_grid(encode(EASY))[:-1] + "N"


# rules ---------------------------------------------------------------------------------------------------------------


def test_answer_is_solution() -> None:
    assert is_solution(encode(EASY), encode(EASY_ANSWER))
    assert not is_solution(encode(HARDEST), encode(EASY_ANSWER)), "a full valid grid that changes the clues"
    assert not is_solution(encode(EASY), encode(EASY))


@pytest.mark.parametrize("cell", [0, 2, 40, 80])
def test_any_wrong_cell_is_seen(cell: int) -> None:
    answer = encode(EASY_ANSWER)
    for token in set(range(11)) - {int(answer[cell])}:
        wrong = answer.copy()
        wrong[cell] = token
        assert not is_solution(np.ones(81, int), wrong)


def test_pad_rows_are_never_solved() -> None:
    inputs, answers = pairs(3)
    inputs[1] = 0
    answers[1] = 0
    assert is_solution(inputs, answers).tolist() == [True, False, True]
    assert not is_solution(np.zeros(81, int), encode(EASY_ANSWER))
    assert is_valid_grid(inputs).tolist() == [True, False, True]


def test_solution_shapes_broadcast() -> None:
    inputs = np.stack([encode(EASY), encode(HARDEST)])[:, None]
    answers = np.stack([encode(EASY_ANSWER), encode(HARDEST_ANSWER)])[None]
    assert is_solution(inputs, answers).tolist() == [[True, False], [False, True]]
    with pytest.raises(ValueError, match=r"preds has shape \(3, 81\); it must fit that of inputs, \(2, 81\)"):
        is_solution(inputs[:, 0], np.ones((3, 81), int))
    with pytest.raises(ValueError, match=r"inputs has shape \(80,\)"):
        is_solution(np.ones(80, int), np.ones(80, int))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_validity_agrees_with_the_oracle(seed: int, digits: int) -> None:
    rng = np.random.default_rng(seed)
    grid = np.ones(81, np.uint8)
    grid[rng.permutation(81)[:digits]] = rng.integers(2, 11, digits)
    assert bool(is_valid_grid(grid)) == oracle_valid(grid)
    assert conflicts(grid).any() != oracle_valid(grid)


def test_conflicts_names_the_cells() -> None:
    grid = np.ones((2, 81), np.uint8)
    grid[0, [0, 8, 40]] = 5  # one row; the middle cell sees neither
    grid[1, [0, 10, 72]] = 7  # one box, one column
    assert [np.flatnonzero(c).tolist() for c in conflicts(grid)] == [[0, 8], [0, 10, 72]]


# files ---------------------------------------------------------------------------------------------------------------


def read(text: str, **options: str) -> tuple[PuzzleSet, list[ParseError]]:
    return load(io.StringIO(text), **options)


def test_lines_keep_their_numbers() -> None:
    text = f"# a comment\n\n{EASY}\r\nrubbish\n  {HARDEST} # hard\n{EASY.replace('.', '0')},{EASY_ANSWER}\n"
    puzzles, errors = read("\ufeff" + text)
    assert [decode(grid) for grid in puzzles.inputs] == [EASY, HARDEST, EASY]
    assert puzzles.line is not None and puzzles.line.tolist() == [3, 5, 6]
    assert puzzles.labels is not None and puzzles.labels.any(1).tolist() == [False, False, True]
    assert decode(puzzles.labels[2]) == EASY_ANSWER
    assert puzzles.rating.tolist() == [-1, -1, -1]
    assert [(error.line, error.text) for error in errors] == [(4, "rubbish")]
    assert str(errors[0]).startswith("line 4: has 7 cells; it needs 81") and str(errors[0]).endswith("'rubbish'")


MALFORMED = [
    (EASY[:-1], "has 80 cells"),
    (EASY[:-1] + "?", r"has '\?' at cell 81"),
    ("11" + "." * 79, "the givens break the rules: row 1 has the digit 1 more than once"),
    ("1" + "." * 8 + "1" + "." * 71, "column 1 has the digit 1 more than once"),
    ("1" + "." * 9 + "1" + "." * 70, "box 1 has the digit 1 more than once"),
    (f"{EASY},{EASY_ANSWER[:-1]}", "answer has 80 cells"),
    (f"{EASY},{EASY}", "the answer does not solve the puzzle: 51 cells are not filled"),
    (f"{HARDEST},{EASY_ANSWER}", "the answer does not solve the puzzle: it changes the givens at cells 1, 2, 4"),
    (f"{EASY},{EASY_ANSWER},{EASY}", "has 3 grids \\(at columns 1 and 83 and 165\\)"),
    (f"{'.' * 81},{'1' * 81}", "row 1 has the digit 1 more than once"),
    ("\x00" * 81, r"has '\\x00' at cell 1 \(row 1, column 1\)"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_malformed_line_is_reported_and_its_neighbours_live(line: str, message: str) -> None:
    puzzles, errors = read(f"{EASY}\n{line}\n{HARDEST}\n")
    assert [decode(grid) for grid in puzzles.inputs] == [EASY, HARDEST]
    assert [error.line for error in errors] == [2]
    assert re.search(message, errors[0].message)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), max_size=20), max_size=4))
def test_no_line_costs_its_neighbours(rubbish: list[str]) -> None:
    lines = [EASY] + [line for r in rubbish for line in (r, HARDEST)]
    puzzles, errors = read("\n".join(lines), format="lines")
    assert puzzles.line is not None
    assert set(puzzles.line) >= {1, *range(3, 2 * len(rubbish) + 2, 2)}
    assert len({*puzzles.line, *(error.line for error in errors)}) == len(puzzles) + len(errors)


HEADERS = ["source,question,answer,rating", "puzzle,solution", "quizzes,solutions", "id,Puzzle, Solution ,clues"]


@pytest.mark.parametrize("header", HEADERS)
def test_csv_headers(header: str) -> None:
    values = {"source": "me", "rating": "7", "id": "1", "clues": "30"}
    names = [name.strip().lower() for name in header.split(",")]
    question = names.index(next(n for n in names if n[0] in "pq"))
    answer = names.index(next(n for n in names if n[0] == "s" and n != "source" or n == "answer"))
    fields = [values.get(name, "") for name in names]
    fields[question], fields[answer] = EASY, EASY_ANSWER
    puzzles, errors = read(f"{header}\n{','.join(fields)}\n")
    assert not errors
    assert decode(puzzles.inputs[0]) == EASY
    assert puzzles.labels is not None and decode(puzzles.labels[0]) == EASY_ANSWER
    assert puzzles.source[0] == ("me" if "source" in names else "stream")
    assert puzzles.rating[0] == (7 if "rating" in names else -1)


def test_csv_bad_rows() -> None:
    rows = [
        f"a,{EASY},{EASY_ANSWER},1",
        f"b,{EASY},{EASY_ANSWER}",
        f"c,{EASY},{EASY_ANSWER},many",
        f"d,{EASY},{EASY_ANSWER},{10**30}",
        f'e,"{EASY},{EASY_ANSWER},1',
        f"f,{EASY},,",
        f'"g, with a comma","{HARDEST}",{HARDEST_ANSWER},2',
        f"h,,{EASY_ANSWER},1",
    ]
    puzzles, errors = read("source,question,answer,rating\n" + "\n".join(rows))
    assert puzzles.source.tolist() == ["a", "f", "g, with a comma"]
    assert puzzles.rating.tolist() == [1, -1, 2]
    assert {error.line: error.message.split(";")[0] for error in errors} == {
        3: "has 3 fields",
        4: "has the rating 'many'",
        5: f"has the rating {10**30}",
        6: "has 2 fields",
        9: "has 0 cells",
    }


def test_csv_comments_are_whole_lines() -> None:
    rows = [f"set#1,{EASY},{EASY_ANSWER}", "# a comment", f" # {EASY}", f"b,{HARDEST},{HARDEST_ANSWER}"]
    puzzles, errors = read("# made by hand\nsource,question,answer\n" + "\n".join(rows))
    assert errors == [] and puzzles.source.tolist() == ["set#1", "b"]
    assert puzzles.line is not None and puzzles.line.tolist() == [3, 6]
    assert [decode(grid) for grid in puzzles.inputs] == [EASY, HARDEST]


def test_labels_are_none_without_answers() -> None:
    assert read(EASY)[0].labels is None
    assert read(f"question\n{EASY}")[0].labels is None


def test_empty_input() -> None:
    puzzles, errors = read("")
    assert len(puzzles) == 0 and puzzles.inputs.shape == (0, 81) and errors == []
    assert [error.line for error in read("nonsense")[1]] == [1]


def test_csv_without_a_question_column() -> None:
    with pytest.raises(ValueError, match="none of which is the puzzle: name one of them question, puzzle"):
        read(f"id,grid\n1,{EASY}", format="csv")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".csv", ".csv.gz"])
def test_paths_and_gzip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"puzzles{suffix}"
    text = f"question,answer\n{EASY},{EASY_ANSWER}\n" if "csv" in suffix else f"{EASY},{EASY_ANSWER}\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if suffix.endswith("gz") else text.encode())
    for source in (path, str(path)):
        puzzles, errors = load(source)
        assert not errors and decode(puzzles.inputs[0]) == EASY and puzzles.source[0] == path.name


def test_bytes_that_are_not_utf8_cost_one_line(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.txt"
    path.write_bytes(EASY.encode() + b"\n\xff\xfe\n" + HARDEST.encode())
    puzzles, errors = load(path)
    assert len(puzzles) == 2 and [error.line for error in errors] == [2]


def test_truncated_gzip_keeps_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.txt.gz"
    rng = np.random.default_rng(0)
    grids = augment(*pairs(2000), rng)[0]
    data = gzip.compress("\n".join(map(decode, grids)).encode())
    path.write_bytes(data[: len(data) // 2])
    puzzles, errors = load(path)
    assert 100 < len(puzzles) < 2000 and np.array_equal(puzzles.inputs, grids[: len(puzzles)])
    assert len(errors) == 1 and "cannot be read from here on" in errors[0].message


def test_load_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="format is 'xml'; allowed are auto, lines, csv, npy, folder"):
        read("", format="xml")
    with pytest.raises(ValueError, match="values is 'x'; allowed are"):
        read("", values="x")
    with pytest.raises(ValueError, match="needs a path, not a stream"):
        read("", format="npy")
    with pytest.raises(TypeError, match="source is a int; it must be a path or a text stream"):
        load(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source yields bytes"):
        load(io.BytesIO(EASY.encode()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split is 'train', but .* is no folder"):
        load(tmp_path / "none.txt", split="train")


def test_load_csv_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(f"question,answer\n{EASY},{EASY_ANSWER}\n")
    assert len(load_csv(path)) == 1
    path.write_text(f"question,answer\n{EASY},{EASY_ANSWER}\nrubbish\n")
    with pytest.raises(ValueError, match="1 rows cannot be used, the first on line 3: has 1 fields"):
        load_csv(path)


# arrays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int8])
@pytest.mark.parametrize("offset", [0, 1])
def test_npy_of_digits_or_tokens(tmp_path: Path, dtype: type, offset: int) -> None:
    grids = np.stack([encode(EASY), encode(HARDEST)])
    path = tmp_path / "grids.npy"
    np.save(path, (grids - 1 + offset).astype(dtype))
    for values in ("auto", ["digits", "tokens"][offset]):
        puzzles, errors = load(path, values=values)
        assert not errors and np.array_equal(puzzles.inputs, grids) and puzzles.labels is None


@pytest.mark.parametrize("shape", [(81,), (1, 9, 9)])
def test_npy_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", (encode(EASY) - 1).reshape(shape))
    assert decode(load(tmp_path / "a.npy")[0].inputs[0]) == EASY


def test_npy_bad_rows(tmp_path: Path) -> None:
    grids = np.tile(encode(EASY).astype(np.int64) - 1, (5, 1))
    grids[1, 0] = -1
    grids[2, 80] = 10
    grids[3, :2] = 7
    np.save(tmp_path / "a.npy", grids)
    puzzles, errors = load(tmp_path / "a.npy")
    assert puzzles.line is not None and puzzles.line.tolist() == [1, 5]
    assert [error.line for error in errors] == [2, 3, 4]
    assert errors[0].message == "holds -1 .. 9; allowed are digits 0 (blank) .. 9"
    assert errors[1].text.endswith(" 10")
    assert "row 1 has the digit 7" in errors[2].message


def test_npy_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.full((2, 81), 5))
    with pytest.raises(ValueError, match="cannot tell digits from tokens.*Say values='digits'"):
        load(path)
    np.save(path, np.ones((2, 81)))
    with pytest.raises(TypeError, match="has dtype float64"):
        load(path)
    np.save(path, np.zeros((2, 80), int))
    with pytest.raises(ValueError, match="rows of 80 cells; this task needs 81"):
        load(path)
    np.save(path, np.zeros((2, 2, 2, 81), int))
    with pytest.raises(ValueError, match=r"has shape \(2, 2, 2, 81\)"):
        load(path)
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="is not a .npy array of plain numbers"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a .npy array of plain numbers"):
        load(path)


def write_folder(folder: Path, inputs: np.ndarray, labels: np.ndarray, **card: object) -> None:
    folder.mkdir(parents=True)
    np.save(folder / "all__inputs.npy", inputs)
    np.save(folder / "all__labels.npy", labels)
    np.save(folder / "all__puzzle_identifiers.npy", np.zeros(len(inputs), np.int32))
    full = {"seq_len": 81, "vocab_size": 11, "pad_id": 0, "ignore_label_id": 0, "sets": ["all"], **card}
    (folder / "dataset.json").write_text(json.dumps(full))


def test_folder_of_npy(tmp_path: Path) -> None:
    inputs, labels = augment(*pairs(6), np.random.default_rng(0))
    write_folder(tmp_path / "train", inputs[:4], labels[:4])
    write_folder(tmp_path / "test", inputs[4:], labels[4:])
    for source, split in ((tmp_path, "train"), (tmp_path / "train", None)):
        puzzles, errors = load(source, split=split)
        assert not errors and np.array_equal(puzzles.inputs, inputs[:4])
        assert puzzles.labels is not None and np.array_equal(puzzles.labels, labels[:4])
        assert puzzles.source.tolist() == ["all"] * 4
    assert np.array_equal(load(tmp_path, split="test")[0].inputs, inputs[4:])
    with pytest.raises(ValueError, match="choose with split='train' or split='test'"):
        load(tmp_path)
    with pytest.raises(ValueError, match="split is 'dev'; .* has train and test"):
        load(tmp_path, split="dev")


def test_folder_bad_rows_and_ignored_labels(tmp_path: Path) -> None:
    inputs, labels = (a.astype(np.int64) for a in augment(*pairs(5), np.random.default_rng(0)))
    inputs[1, 3] = 11
    labels[2, 5] = -7
    labels[3] = -100
    inputs[4, 0] = 0
    write_folder(tmp_path / "a", inputs, labels, ignore_label_id=-100)
    puzzles, errors = load(tmp_path / "a")
    assert puzzles.line is not None and puzzles.line.tolist() == [1, 4]
    assert puzzles.labels is not None and not puzzles.labels[1].any()
    assert [error.line for error in errors] == [2, 3, 5]
    assert errors[0].message.endswith("; allowed are tokens 1 .. 10")
    assert errors[1].message == "its labels hold -7 .. 10; allowed are 0 .. 10"


def test_folder_that_does_not_fit(tmp_path: Path) -> None:
    inputs, labels = pairs(2)
    with pytest.raises(ValueError, match="has no dataset.json and no"):
        load(tmp_path)
    write_folder(tmp_path / "a", inputs, labels, seq_len=900)
    with pytest.raises(ValueError, match="rows of 81, dataset.json says seq_len 900"):
        load(tmp_path / "a")
    write_folder(tmp_path / "b", inputs, labels, sets=["all", "more"])
    with pytest.raises(FileNotFoundError, match="more__inputs.npy is missing"):
        load(tmp_path / "b")
    write_folder(tmp_path / "c", inputs, labels[:1])
    with pytest.raises(ValueError, match="they must be equal"):
        load(tmp_path / "c")
    (tmp_path / "c" / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path / "c")


def test_puzzle_set_checks_and_subset() -> None:
    puzzles = read(f"{EASY}\n{HARDEST}\n{EASY}")[0]
    for index in ([2, 0], np.array([2, 0])):
        part = puzzles.subset(index)
        assert len(part) == 2 and part.line is not None and part.line.tolist() == [3, 1]
    assert len(puzzles.subset(np.array([True, False, False]))) == 1
    with pytest.raises(ValueError, match=r"labels has shape \(1, 81\)"):
        PuzzleSet(puzzles.inputs, puzzles.inputs[:1], puzzles.source, puzzles.rating)
    with pytest.raises(ValueError, match=r"rating has shape \(1,\); it must be \[N\] = \[3\]"):
        PuzzleSet(puzzles.inputs, None, puzzles.source, puzzles.rating[:1])


# symmetries and clues ------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_augmentation_keeps_the_puzzle(seed: int) -> None:
    inputs, labels = pairs(4)
    questions, answers = augment(inputs, labels, np.random.default_rng(seed))
    assert questions.dtype == answers.dtype == np.uint8
    assert is_solution(questions, answers).all()
    assert np.array_equal((questions > 1).sum(1), (inputs > 1).sum(1))
    alone, none = augment(inputs, None, np.random.default_rng(seed))
    assert none is None and np.array_equal(alone, questions)


def test_augmentation_keeps_uniqueness() -> None:
    inputs, labels = (np.tile(encode(grid), (5, 1)) for grid in (HARDEST, HARDEST_ANSWER))
    questions, answers = augment(inputs, labels, np.random.default_rng(1))
    for question, answer in zip(questions, answers, strict=True):
        result = solve_exact(question)
        assert result.complete and np.array_equal(result.solutions, answer[None])


def test_augmentation_leaves_pads_and_its_arguments() -> None:
    inputs, labels = pairs(3)
    labels[1] = 0
    before = inputs.copy(), labels.copy()
    questions, answers = augment(inputs, labels, np.random.default_rng(0))
    assert not answers[1].any() and answers[[0, 2]].all() and questions.all()
    assert np.array_equal(inputs, before[0]) and np.array_equal(labels, before[1])


def chi_squared(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_every_cell_goes_everywhere_and_every_digit_becomes_any() -> None:
    n = 8100
    marked = np.ones((n, 81), np.uint8)
    marked[:, 0], marked[:, 1] = 2, 3
    moved, _ = augment(marked, None, np.random.default_rng(5))
    row, column = np.divmod(np.nonzero(moved > 1)[1].reshape(n, 2), 9)
    upright = row[:, 0] == row[:, 1]
    assert (column[~upright, 0] == column[~upright, 1]).all(), "neighbours stay in one line"
    assert abs(upright.mean() - 0.5) < 4 * 0.5 / n**0.5, "half are transposed"
    places = np.bincount((9 * row + column)[np.arange(n), np.arange(n) % 2], minlength=81)
    assert chi_squared(places) < 80 + 5 * 160**0.5
    digits = np.bincount(moved[np.arange(n), (9 * row + column)[:, 0]], minlength=11)[2:]
    assert chi_squared(digits) < 8 + 5 * 16**0.5


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_every_order_of_lines_is_equally_likely(axis: str) -> None:
    """All 6^4 = 1,296 orders: line k is known by its k marks, while every crossing line has four."""
    n = 26_000
    marks = np.ones((9, 9), np.uint8)
    first = 0
    for line in range(9):
        marks[line, (first + np.arange(line)) % 9] = 2
        first += line
    assert (marks > 1).sum(0).tolist() == [4] * 9
    grid = (marks if axis == "rows" else marks.T).reshape(-1)
    moved, _ = augment(np.tile(grid, (n, 1)), None, np.random.default_rng(6))
    filled = moved.reshape(n, 9, 9) > 1
    by_row, by_column = filled.sum(2), filled.sum(1)
    lying = (by_row == 4).all(1)
    order = np.where(lying[:, None], by_column, by_row)  # [n, 9]: position -> old line
    bands = order // 3
    assert (bands[:, ::3] == bands[:, 1::3]).all() and (bands[:, ::3] == bands[:, 2::3]).all()
    counts = Counter(map(tuple, order.tolist()))
    assert len(counts) == 1296
    assert chi_squared(np.array(list(counts.values()))) < 1295 + 5 * 2590**0.5


def test_reveal_counts() -> None:
    inputs, labels = pairs(60)
    wanted = np.arange(22, 82)
    shown = reveal(inputs, labels, wanted, np.random.default_rng(0))
    assert shown.dtype == np.uint8
    assert np.array_equal((shown > 1).sum(1), np.maximum(wanted, 30)), "the puzzle has 30 clues, which stay"
    assert ((shown == labels) | (shown == 1)).all() and (shown[inputs > 1] == inputs[inputs > 1]).all()
    alike = [reveal(inputs, labels, clues, np.random.default_rng(0)) for clues in (40, np.full(60, 40))]
    assert np.array_equal(alike[0], alike[1]) and ((alike[0] > 1).sum(1) == 40).all()


def test_reveal_picks_evenly() -> None:
    inputs, labels = pairs(5100)
    shown = reveal(inputs, labels, 40, np.random.default_rng(3)) > inputs
    counts = shown.sum(0)[inputs[0] == 1]  # 51 blanks, 10 of which are shown: 1,000 +- 28 each
    assert abs(counts - 1000).max() < 5 * 28


def test_reveal_skips_unknown_answers() -> None:
    inputs, labels = pairs(2)
    labels[0] = 0
    shown = reveal(inputs, labels, 50, np.random.default_rng(0))
    assert np.array_equal(shown[0], inputs[0]) and (shown[1] > 1).sum() == 50


def test_augment_and_reveal_refuse_bad_arguments() -> None:
    inputs, labels = pairs(2)
    rng = np.random.default_rng(0)
    with pytest.raises(TypeError, match="rng is a int; it must be a numpy Generator"):
        augment(inputs, labels, 0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"labels has shape \(1, 81\); it must be that of inputs, \(2, 81\)"):
        augment(inputs, labels[:1], rng)
    with pytest.raises(ValueError, match=r"inputs has shape \(81,\); it must be \[N, 81\]"):
        augment(inputs[0], None, rng)
    with pytest.raises(ValueError, match=r"inputs holds tokens -1 .. 9; allowed are 0 .. 10"):
        augment(np.where(inputs == 10, -1, inputs.astype(int)), None, rng)
    with pytest.raises(TypeError, match="clues has dtype float64"):
        reveal(inputs, labels, 2.0, rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"clues has shape \(3,\); it must be one integer or \[N\] = \[2\]"):
        reveal(inputs, labels, np.array([1, 2, 3]), rng)
    with pytest.raises(ValueError, match="clues holds 82 .. 82; allowed is 0 .. 81"):
        reveal(inputs, labels, 82, rng)


# exact solver --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "answer"), [(EASY, EASY_ANSWER), (HARDEST, HARDEST_ANSWER)])
def test_known_puzzles(question: str, answer: str) -> None:
    result = solve_exact(encode(question))
    assert result.complete and [decode(s) for s in result.solutions] == [answer]
    assert (result.guesses == 0) == (question == EASY)


def test_17_clues() -> None:
    result = solve_exact(encode(CLUES_17))
    assert result.complete and len(result.solutions) == 1
    assert decode(result.solutions[0]) == CLUES_17_ANSWER


def test_two_solutions() -> None:
    grid = encode(two_solutions())
    result = solve_exact(grid, limit=10)
    assert result.complete and len(result.solutions) == 2 and result.guesses == 2
    assert is_solution(grid, result.solutions).all() and not np.array_equal(*result.solutions)
    first = solve_exact(grid, limit=1)
    assert len(first.solutions) == 1 and not first.complete
    assert count_solutions(grid, limit=1) == 1


def test_unsolvable() -> None:
    assert count_solutions(encode(IMPOSSIBLE)) == 0, "no rule is broken yet, a long search finds nothing"
    assert bool(is_valid_grid(encode(IMPOSSIBLE)))
    assert count_solutions(encode("11" + "." * 79)) == 0
    result = solve_exact(encode("12345678." + "........9" + "." * 63))
    assert result.complete and len(result.solutions) == 0 and result.guesses == 0


def test_empty_grid_has_many_and_the_count_is_limited() -> None:
    result = solve_exact(np.ones(81, np.uint8), limit=7)
    assert len(result.solutions) == 7 and not result.complete
    assert is_solution(np.ones(81, np.uint8), result.solutions).all()
    assert len({decode(s) for s in result.solutions}) == 7


def test_full_grid() -> None:
    result = solve_exact(encode(EASY_ANSWER))
    assert result.complete and len(result.solutions) == 1 and result.guesses == 0


def test_solver_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"grid has a pad \(0\) at cell 1"):
        solve_exact(np.zeros(81, int))
    with pytest.raises(ValueError, match="limit is 0; allowed is 1 or more"):
        solve_exact(encode(EASY), limit=0)
    with pytest.raises(TypeError, match="limit is 1.5"):
        solve_exact(encode(EASY), limit=1.5)  # type: ignore[arg-type]


# generator -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_levels_keep_their_bounds(level: str) -> None:
    puzzles = generate(3, level, seed=2)
    (least, most), (easiest, hardest) = LEVELS[level]
    assert most is not None and puzzles.labels is not None
    assert is_solution(puzzles.inputs, puzzles.labels).all()
    assert puzzles.source.tolist() == [f"generated_{level}"] * 3
    for question, answer, rating in zip(puzzles.inputs, puzzles.labels, puzzles.rating, strict=True):
        result = solve_exact(question)
        assert result.complete and np.array_equal(result.solutions, answer[None]), "one solution, the label"
        assert result.guesses == rating and easiest <= rating <= (rating if hardest is None else hardest)
        assert least <= (question > 1).sum() <= most


def test_generator_is_deterministic(generated: PuzzleSet) -> None:
    again = generate(3, "hard", seed=11)
    assert np.array_equal(again.inputs, generated.inputs[:3]), "a longer set begins with the shorter one"
    assert not np.array_equal(generate(1, "hard", seed=12).inputs, generated.inputs[:1])
    assert len({decode(grid) for grid in generated.inputs}) == len(generated)
    assert generated.labels is not None and len({decode(grid) for grid in generated.labels}) == len(generated)


def test_clues_and_guesses_instead_of_difficulty() -> None:
    calls: list[int] = []
    puzzles = generate(3, clues=40, seed=0, progress=calls.append)
    assert (puzzles.inputs > 1).sum(1).tolist() == [40] * 3 and calls == [1, 2, 3]
    assert set((generate(4, clues=(50, 52)).inputs > 1).sum(1)) <= {50, 51, 52}
    assert set(generate(2, guesses=(2, 6)).rating) <= {2, 3, 4, 5, 6}
    assert generate(0).inputs.shape == (0, 81)


def test_generator_without_guesses_leaves_a_minimal_puzzle() -> None:
    question = generate(1, guesses=0, seed=4).inputs[0]
    for cell in np.flatnonzero(question > 1):
        fewer = question.copy()
        fewer[cell] = 1
        assert count_solutions(fewer) == 2, "every clue is needed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": "brutal"}, "difficulty is 'brutal'; allowed are easy, medium, hard, extreme"),
        ({"difficulty": "easy", "clues": 30}, "leave one out"),
        ({"clues": 16}, "clues is 16; allowed is 17 .. 81"),
        ({"clues": (30, 20)}, "least is greater than most"),
        ({"clues": (1, 2, 3)}, "must be an integer or a pair"),
        ({"guesses": -1}, "guesses is -1; allowed is 0 or more"),
        ({"n": -1}, "n is -1; allowed is 0 or more"),
        ({"seed": -1}, "seed is -1; allowed is 0 or more"),
        ({"attempts": 0}, "attempts is 0; allowed is 1 or more"),
        ({"clues": 17, "attempts": 2}, "clues 17..17 with guesses 0.. did not come up in attempts=2 puzzles"),
        ({"clues": 60, "guesses": (5, None), "attempts": 2}, "at most 0 guesses: allow more clues or fewer guesses"),
    ],
)
def test_generator_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(**{"n": 1, **arguments})  # type: ignore[arg-type]


# real data -----------------------------------------------------------------------------------------------------------


@needs_data
def test_real_data_loads_whole() -> None:
    puzzles, errors = load(DATA / "dev.csv.gz")
    assert not errors and len(puzzles) == 2500
    assert puzzles.line is not None and np.array_equal(puzzles.line, np.arange(2, 2502))
    assert puzzles.labels is not None and is_solution(puzzles.inputs, puzzles.labels).all()
    assert "17_clue" in set(puzzles.source) and puzzles.rating.min() >= 0


@needs_data
def test_solver_agrees_with_real_answers() -> None:
    puzzles = load_csv(DATA / "dev.csv.gz").subset(slice(None, None, 125))
    assert puzzles.labels is not None
    for question, answer in zip(puzzles.inputs, puzzles.labels, strict=True):
        result = solve_exact(question)
        assert result.complete and np.array_equal(result.solutions, answer[None])
