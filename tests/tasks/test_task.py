"""`Task`: what it does by default, how one is found, and what is said of an object that is none."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pytest

from eqr_kernels import EqRConfig
from eqr_kernels.tasks import PuzzleSet, Task, registry
from eqr_kernels.tasks.registry import MAZE, SUDOKU, choose_task, find_task, known_tasks
from eqr_kernels.tasks.task import CountsSolutions, Generates, Reveals, check_task, generated, try_task
from tests.support.environment import REPOSITORY

LATIN_FILE = REPOSITORY / "examples" / "latin_squares.py"


class Sums(Task):
    """Additions: "3 4 ." is answered by "3 4 7"; texts of several characters a token, padded to the longest."""

    name = "sums"
    vocab_size = 22
    written = "numbers up to 20 between spaces, . for the sum"

    def encode(self, text):
        return np.array([1 if word == "." else int(word) + 2 for word in text.split()], np.uint8)

    def decode(self, tokens):
        return " ".join("_" if t == 0 else "." if t == 1 else str(int(t) - 2) for t in tokens)

    def check(self, inputs, preds):
        inputs, preds = np.asarray(inputs), np.asarray(preds)
        kept = ((inputs == preds) | (inputs == self.open_token)).all(1)
        numbers = preds.astype(int) - 2
        return kept & (numbers[:, :-1].sum(1) == numbers[:, -1])


SUMS = Sums()
PUZZLES = PuzzleSet(
    np.array([[5, 6, 1], [3, 3, 1]], np.uint8),
    np.array([[5, 6, 9], [3, 3, 4]], np.uint8),
    np.array(["a", "b"]),
    np.array([-1.0, 2.0]),
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "3 4 .,3 4 7\n1 1 .\n"),
        ("p.csv", "question,answer\n3 4 .,3 4 7\n1 1 .,\n"),
        ("p.json", json.dumps([{"puzzle": "3 4 .", "answer": "3 4 7"}, {"puzzle": "1 1 ."}])),
    ],
)
def test_a_task_reads_texts_by_its_encode(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    puzzles, errors = SUMS.load(tmp_path / name)
    assert not errors and puzzles.inputs.tolist() == PUZZLES.inputs.tolist()
    assert puzzles.labels.tolist() == [[5, 6, 9], [0, 0, 0]]


def test_a_task_reads_arrays_of_tokens(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[5, 6, 1], [0, 3, 1], [3, 22, 1]]))
    puzzles, errors = SUMS.load(tmp_path / "p.npy")
    assert puzzles.inputs.tolist() == [[5, 6, 1], [0, 3, 1]]
    assert "holds 1 .. 22; allowed are tokens 0 .. 21" in errors[0].message
    with pytest.raises(ValueError, match="values is 'digits', and arrays of the sums task hold tokens"):
        SUMS.load(tmp_path / "p.npy", values="digits")


def test_rows_that_are_no_puzzles_are_told_and_cost_no_others(tmp_path):
    (tmp_path / "p.txt").write_text("3 4 .,3 4 7\n3 x .\n3 4 .,3 4 8\n3 .\n3 99 .\n1 1 .,1 1 2\n")
    puzzles, errors = SUMS.load(tmp_path / "p.txt")
    assert puzzles.line.tolist() == [1, 6]
    messages = {error.line: error.message for error in errors}
    assert messages.keys() == {2, 3, 4, 5}
    assert "cannot be read: invalid literal" in messages[2] and messages[3] == "the answer does not solve the puzzle"
    assert messages[4].startswith("has 2 tokens; it needs 3 (numbers up to 20") and "allowed are 0 .. 21" in messages[5]


def test_drawing_goes_by_the_text():
    assert SUMS.draw(PUZZLES.labels[0]) == "3 4 7"
    assert SUMS.draw([3, 4, 5, 6, 7]) == "1 2 3 4 5"  # nine characters
    assert SUMS.draw([12, 1, 5, 6]) == "10 . 3 4" and SUMS.draw([5, 6, 7][:3]) == "3 4 5"
    latin = find_task(f"{LATIN_FILE}:LATIN")
    tokens = latin.encode("ab..cd..........")
    assert latin.draw(tokens) == "ab..\ncd..\n....\n...."
    assert latin.draw(tokens, lambda cell, c: f"{cell}" if c == "a" else c).startswith("0b..")
    answer = latin.encode("bbcdcdaabcadadbc")
    assert latin.wrong_cells(tokens, answer).nonzero()[0].tolist() == [0]


def test_capabilities_are_methods():
    latin = find_task(f"{LATIN_FILE}:LATIN")
    having = {
        task.name: [isinstance(task, c) for c in (Reveals, Generates, CountsSolutions)] for task in (SUDOKU, MAZE)
    }
    assert having == {"sudoku": [True, True, True], "maze": [False, True, False]}
    assert isinstance(latin, Generates) and not isinstance(latin, Reveals)
    with pytest.raises(ValueError, match="the sums task has no `generate` and makes no puzzles"):
        generated(SUMS, 3, 2, 0)
    puzzles = generated(latin, 16, 5, 3)
    assert latin.check(puzzles.inputs, puzzles.labels).all() and not latin.check(puzzles.inputs, puzzles.inputs).any()
    assert [p.source.tolist() for p in (generated(SUDOKU, 81, 5, 1),)] == [
        ["generated_easy"] * 2 + ["generated_medium", "generated_hard", "generated_extreme"]
    ]


# finding one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["examples.latin_squares:LATIN", f"{LATIN_FILE}:LATIN", "examples/latin_squares.py:LATIN"]
)
def test_a_task_is_found_by_its_place(spec, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert find_task(spec).name == "latin"


def test_a_file_imports_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_the_task.py").write_text(LATIN_FILE.read_text())
    (tmp_path / "mine.py").write_text("from beside_the_task import LATIN as TASK\n")
    assert find_task(f"{tmp_path / 'mine.py'}:TASK").name == "latin"
    assert str(tmp_path) not in sys.path


def test_a_module_of_the_present_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "a_task_of_mine.py").write_text(LATIN_FILE.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    assert find_task("a_task_of_mine:LATIN").name == "latin"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("suduko", ValueError, "did you mean 'sudoku'? Known are sudoku, maze"),
        (":LATIN", ValueError, "must be a name, package.module:OBJECT or file.py:OBJECT"),
        (
            "nowhere.at_all:X",
            ImportError,
            "nowhere.at_all cannot be imported (ModuleNotFoundError: No module named 'no",
        ),
        ("broken.py:X", ImportError, "broken.py cannot be imported (ZeroDivisionError: division by zero)"),
        ("raising.py:X", ImportError, "raising.py cannot be imported (ValueError: of its own)"),
        ("none.py:X", ValueError, "there is no file none.py"),
        ("latin.py:LATTIN", ValueError, "eqr_task_latin has no LATTIN; did you mean LATIN?"),
        ("latin.py:LatinSquares", TypeError, "is a class; name an object of it, as in TASK = LatinSquares()"),
        (
            "latin.py:SIDE",
            TypeError,
            "is no task but of the type int, and lacks name, vocab_size, encode, decode, check",
        ),
    ],
)
def test_what_is_no_task_is_told(spec, error, message, tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_text(LATIN_FILE.read_text())
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "raising.py").write_text("raise ValueError('of its own')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        find_task(spec)


def changed(**members: object) -> Task:
    return type("Changed", (Sums,), members)()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (SimpleNamespace(name="x", encode=1, decode=2), TypeError, "lacks vocab_size, check"),
        (changed(name=""), TypeError, "its name must be a str that is not empty, got ''"),
        (changed(vocab_size=300), ValueError, "its vocab_size must be an int, 2 .. 256, got 300"),
        (changed(seq_len=0), ValueError, "its seq_len must be an int, 1 or more, got 0"),
        (changed(open_token=22), ValueError, "its open_token must be an int, 0 .. 21, got 22"),
    ],
)
def test_what_an_object_lacks_is_told(value, error, message):
    with pytest.raises(error, match=re.escape(f"--task m:X{'' if 'its' not in message else ': '}")) as raised:
        check_task(value, "--task m:X")
    assert message in str(raised.value)


def test_a_class_without_a_member_says_so():
    half = type("Half", (Sums,), {})
    value = half()
    del_name = type("Nameless", (Task,), {m: getattr(Sums, m) for m in ("encode", "decode", "check")})()
    assert check_task(value, "x") is value
    with pytest.raises(TypeError, match="its class Nameless does not say name, vocab_size"):
        check_task(del_name, "x")


def points(monkeypatch, *values: tuple[str, str]) -> None:
    entries = [EntryPoint(name, value, registry.GROUP) for name, value in values]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])


def test_a_task_is_found_by_the_name_of_its_entry_point(monkeypatch):
    points(monkeypatch, ("sums", "tests.tasks.test_task:SUMS"), ("sudoku", "tests.tasks.test_task:SUMS"))
    assert find_task("sums") is SUMS and find_task("sudoku") is SUDOKU
    assert known_tasks() == ["sudoku", "maze", "sums"]
    assert choose_task(None, EqRConfig(seq_len=3, vocab_size=22, hidden_size=16), name="sums") is SUMS


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([("sums", "nowhere.at_all:X")], ImportError, "the entry point nowhere.at_all:X cannot be loaded"),
        ([("sums", "tests.tasks.test_task:PUZZLES")], TypeError, "is no task but of the type PuzzleSet"),
        ([("sums", "tests.tasks.test_task:SUMS"), ("sums", "a:b")], ValueError, "is the name of 2 tasks"),
    ],
)
def test_an_entry_point_that_is_no_task_is_told(monkeypatch, values, error, message):
    points(monkeypatch, *values)
    with pytest.raises(error, match=message):
        find_task("sums")


def test_an_entry_point_has_its_tasks_name(monkeypatch):
    points(monkeypatch, ("additions", "tests.tasks.test_task:SUMS"))
    with pytest.raises(ValueError, match="is named 'sums', unlike its entry point"):
        find_task("additions")


OF_SUMS = EqRConfig(seq_len=3, vocab_size=22, hidden_size=16)


def test_a_model_has_the_task_that_is_named_else_its_own_else_that_of_its_sizes():
    assert choose_task(None, EqRConfig.sudoku_paper()) is SUDOKU and choose_task(None, EqRConfig.maze()) is MAZE
    assert choose_task("maze", EqRConfig.maze()) is MAZE and choose_task(SUMS, OF_SUMS) is SUMS
    assert choose_task("maze", EqRConfig.maze(), name="sums", place="somewhere:SUMS") is MAZE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(wanted="sudoku"),
            "the sudoku task has 81 tokens of a vocabulary of 11 (seq_len, vocab_size), and the mod",
        ),
        (dict(wanted="maze"), "the maze task has any number of tokens of a vocabulary of 6"),
        (dict(wanted=None, name="sums"), "was trained on the task 'sums', which is not known here (sudoku, maze)"),
        # Neither is imported, though it could be.
        (dict(wanted=None, name="sums", place="tests.tasks.test_task:SUMS"), "give --task tests.tasks.test_task:SUMS"),
        (dict(wanted=None, name="maze", place="antigravity:X"), "give --task antigravity:X"),
        (dict(wanted=None), "neither 9x9 Sudoku (81 of 11) nor mazes (of 6); name its task with --task"),
    ],
)
def test_a_task_that_a_model_cannot_have_is_told(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_task(config=OF_SUMS, **arguments)


# trying one ----------------------------------------------------------------------------------------------------------


def test_tasks_that_keep_the_contract_pass():
    latin = find_task(f"{LATIN_FILE}:LATIN")
    for task, puzzles in ((SUMS, PUZZLES), (latin, generated(latin, 16, 20, 0)), (MAZE, generated(MAZE, 81, 3, 0))):
        try_task(task, puzzles)
    try_task(changed(check=lambda self, inputs, preds: 1 / 0), PUZZLES.subset(slice(0)))


def in_place(self, inputs, labels, rng):
    labels[:, 0] = 2
    return inputs, labels


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (
            dict(check=lambda self, i, p: np.ones(len(i))),
            TypeError,
            "check must return bool [N] = [2], got float64 [2]",
        ),
        (dict(check=lambda self, i, p: True), TypeError, "check must return bool [N] = [2], got bool []"),
        (dict(decode=lambda self, t: "1 1 ."), ValueError, "encode(decode(tokens)) is not tokens for [5, 6, 1]"),
        (dict(augment=lambda self, i, o, rng: i), TypeError, "augment must return inputs and labels, got ndarray"),
        (dict(augment=in_place), ValueError, "augment changes the arrays that it is given"),
        (dict(augment=lambda self, i, o, rng: (i, o + 0.5)), TypeError, "augment's labels has dtype float64"),
        (
            dict(augment=lambda self, i, o, rng: (i[:1], o)),
            ValueError,
            "augment's inputs must be uint8 [2, 3], got uint8",
        ),
        (dict(augment=lambda self, i, o, rng: (i, o.astype(int))), ValueError, "augment's labels must be uint8 [2, 3]"),
        (dict(augment=lambda self, i, o, rng: (i, o + 20)), ValueError, "allowed are 0 .. 21"),
        (
            dict(augment=lambda self, i, o, rng: (i, i)),
            ValueError,
            "check says True of puzzle 1 and its answer, and False",
        ),
        (dict(reveal=lambda self, i, o, clues, rng: i + 0.5), ValueError, "reveal must return uint8 [2, 3], got float"),
        (
            dict(reveal=lambda self, i, o, clues, rng: np.full_like(i, 7)),
            ValueError,
            "reveal must leave a cell as it is or show its answer; it makes 7 of cell 1 of puzzle 1, which is 5",
        ),
    ],
)
def test_what_breaks_the_contract_is_told(members, error, message):
    with pytest.raises(error, match=re.escape(message)):
        try_task(changed(**members), PUZZLES.subset([0, 1]))
