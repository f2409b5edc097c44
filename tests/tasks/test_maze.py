"""Mazes: reading, rules, symmetries and the generator."""

from __future__ import annotations

import io
import json
import re
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqr_kernels.tasks.common import ParseError, PuzzleSet
from eqr_kernels.tasks.maze import (
    augment,
    decode,
    encode,
    format_grid,
    generate,
    is_solution,
    is_valid_maze,
    load,
    path_lengths,
)

SMALL = """\
#######
#S#   #
# # # #
#   #G#
# #####
#     #
#######"""
SMALL_ANSWER = """\
#######
#S#ooo#
#o#o#o#
#ooo#G#
# #####
#     #
#######"""
# two ways around a block: 4 moves left and below, or above and right
LOOP = """\
#####
#S  #
# # #
#  G#
#####"""


@pytest.fixture(scope="module")
def mazes() -> PuzzleSet:
    return generate(12, path_length=(40, 200), seed=3)


def one_line(grid: str) -> str:
    return grid.replace("\n", "")


def solved(question: str, answer: str) -> bool:
    return bool(is_solution(encode(question)[None], encode(answer)[None])[0])


def bfs(cells: np.ndarray, start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Distances from `start` over everything that is no wall."""
    distance = {start: 0}
    queue = deque([start])
    while queue:
        row, column = queue.popleft()
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= r < len(cells) and 0 <= c < len(cells)
            if inside and cells[r, c] != 1 and (r, c) not in distance:
                distance[r, c] = distance[row, column] + 1
                queue.append((r, c))
    return distance


def cell_of(cells: np.ndarray, token: int) -> tuple[int, int]:
    ((row, column),) = np.argwhere(cells == token)
    return int(row), int(column)


# text ----------------------------------------------------------------------------------------------------------------


def test_tokens_of_characters() -> None:
    assert encode("# SGo    ").tolist() == [1, 2, 3, 4, 5, 2, 2, 2, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_round_trips(side: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(1, 6, side * side)
    assert np.array_equal(encode(decode(tokens)), tokens)
    assert np.array_equal(encode(format_grid(tokens)), tokens)


def test_format_grid_marks() -> None:
    assert format_grid(encode(SMALL)) == SMALL
    assert format_grid(encode(SMALL), mark=lambda cell, c: "*" if cell == 8 else c) == SMALL.replace("S", "*")
    assert decode(np.zeros(4, int)) == "????"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("####", None),
        ("#####", "text has rows of 5 squares; a maze is square"),
        ("###\n##\n###", "text has 3 lines of 2, 3 characters"),
        ("# x ", "has 'x' at cell 3 (row 2, column 1)"),
        ("", "text has 0 cells; it needs a square number"),
    ],
)
def test_encode_says_what_is_wrong(text: str, message: str | None) -> None:
    if message is None:
        assert encode(text).tolist() == [1] * 4
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(text)


def test_encode_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="text is a bytes"):
        encode(b"####")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokens has dtype float64"):
        decode(np.ones(4))
    with pytest.raises(ValueError, match="tokens holds tokens 1 .. 6; allowed are 0 .. 5"):
        decode(np.array([1, 1, 1, 6]))


# rules ---------------------------------------------------------------------------------------------------------------


def test_answer_is_solution() -> None:
    assert solved(SMALL, SMALL_ANSWER)
    assert path_lengths(encode(SMALL)[None]).tolist() == [10]


@pytest.mark.parametrize(
    "answer",
    [
        SMALL,
        SMALL_ANSWER.replace("ooo#G", "oo #G"),  # a gap
        SMALL_ANSWER.replace("# #####", "#o#####"),  # a spur
        SMALL_ANSWER.replace("#     #", "#    o#"),  # a stray mark
        SMALL_ANSWER.replace("#S#", "#o#"),  # the start overwritten
        SMALL_ANSWER.replace("#S#o", "#Soo"),  # through a wall
        SMALL_ANSWER.replace("#     #", "#    ##"),  # a wall more
        SMALL_ANSWER.replace("G", " "),
    ],
)
def test_wrong_answers(answer: str) -> None:
    assert not solved(SMALL, answer)


def test_any_shortest_way_solves_a_maze_with_loops_and_no_longer_one_does() -> None:
    above = LOOP.replace("S  ", "Soo").replace("# # #", "# #o#")
    below = LOOP.replace("# # #", "#o# #").replace("  G", "ooG")
    both = above.replace("# #o#", "#o#o#").replace("  G", "ooG")
    assert solved(LOOP, above) and solved(LOOP, below) and not solved(LOOP, both)
    shorter_below = LOOP.replace("  G", " G ")
    detour = shorter_below.replace("S  ", "Soo").replace("# # #", "# #o#").replace(" G ", " Go")
    assert not solved(shorter_below, detour)
    assert solved(shorter_below, shorter_below.replace("# # #", "#o# #").replace(" G ", "oG "))


def test_start_beside_goal() -> None:
    question = "#####\n#SG #\n### #\n#   #\n#####"
    assert solved(question, question) and path_lengths(encode(question)[None]).tolist() == [1]


def test_separate_ring_of_marks_is_no_solution() -> None:
    """As many marks as the way needs, but not on it."""
    question = "######\n#S  G#\n#    #\n#    #\n######\n######"
    good = question.replace("S  G", "SooG")
    wrong = question.replace("#    #\n#    #", "# oo #\n#    #")
    assert solved(question, good) and not solved(question, wrong)


def test_lengths_and_validity() -> None:
    walled = SMALL.replace("# # # #", "### # #")
    grids = [SMALL, walled, SMALL.replace("S", " "), SMALL.replace("#     #", "#    G#"), SMALL_ANSWER]
    tokens = np.stack([encode(grid) for grid in grids])
    assert path_lengths(tokens[:2]).tolist() == [10, -1]
    assert is_valid_maze(tokens).tolist() == [True, False, False, False, False]
    tokens[0, 0] = 0
    assert not is_valid_maze(tokens[:1])[0]
    assert not is_solution(np.zeros((1, 49), int), np.zeros((1, 49), int))[0], "a row of pads is never solved"


def test_way_at_the_rim_does_not_wrap() -> None:
    grid = "S # \n# # \n# # \n  #G"
    assert path_lengths(encode(grid)[None]).tolist() == [-1]


def test_rules_refuse_bad_shapes() -> None:
    with pytest.raises(ValueError, match="inputs has rows of 5 squares"):
        is_valid_maze(np.ones((1, 5), int))
    with pytest.raises(ValueError, match=r"labels has shape \(1, 9\); it must be that of inputs, \(1, 4\)"):
        is_solution(np.ones((1, 4), int), np.ones((1, 9), int))


# generator -----------------------------------------------------------------------------------------------------------


def test_mazes_are_perfect_and_their_way_unique(mazes: PuzzleSet) -> None:
    assert mazes.labels is not None and mazes.inputs.shape == (12, 900) and mazes.inputs.dtype == np.uint8
    for question, answer, length in zip(mazes.inputs, mazes.labels, mazes.rating, strict=True):
        cells = question.reshape(30, 30)
        free = np.argwhere(cells != 1)
        start, goal = cell_of(cells, 3), cell_of(cells, 4)
        from_start, from_goal = bfs(cells, start), bfs(cells, goal)
        edges = sum(
            int(cells[r, c] != 1 and cells[r + dr, c + dc] != 1)
            for dr, dc in ((0, 1), (1, 0))
            for r in range(30 - dr)
            for c in range(30 - dc)
        )
        assert len(from_start) == len(free) == edges + 1, "connected and without a loop: a tree, one way for any two"
        assert from_start[goal] == length and 40 <= length <= 200
        way = {square for square in from_start if from_start[square] + from_goal[square] == length}
        expected = cells.copy()
        for square in way - {start, goal}:
            expected[square] = 5
        assert np.array_equal(answer.reshape(30, 30), expected)
    assert is_valid_maze(mazes.inputs).all() and is_solution(mazes.inputs, mazes.labels).all()
    assert np.array_equal(path_lengths(mazes.inputs), mazes.rating)


def test_layout_of_an_even_grid(mazes: PuzzleSet) -> None:
    cells = mazes.inputs.reshape(-1, 30, 30)
    for wall in (cells[:, 0], cells[:, :, 0], cells[:, 28:], cells[:, :, 28:]):
        assert (wall == 1).all()
    assert (cells[:, 1:28:2, 1:28:2] != 1).all(), "every room is open"
    assert Counter(mazes.inputs[0].tolist()).keys() == {1, 2, 3, 4}


@pytest.mark.parametrize(("size", "length"), [(30, 1), (30, 2), (30, 111), (30, 200), (5, 6), (9, 30), (10, 17)])
def test_exact_lengths(size: int, length: int) -> None:
    mazes = generate(2, size=size, path_length=length, seed=1)
    assert mazes.inputs.shape == (2, size * size)
    assert mazes.rating.tolist() == [length] * 2 == path_lengths(mazes.inputs).tolist()
    assert mazes.labels is not None and (mazes.labels == 5).sum(1).tolist() == [length - 1] * 2


def test_open_ranges() -> None:
    assert (generate(3, path_length=(120, None), seed=0).rating >= 120).all()
    assert len(set(generate(5, seed=0).rating)) > 1


def test_generator_is_deterministic(mazes: PuzzleSet) -> None:
    calls: list[int] = []
    again = generate(2, path_length=(40, 200), seed=3, progress=calls.append)
    assert np.array_equal(again.inputs, mazes.inputs[:2]) and calls == [1, 2]
    assert not np.array_equal(generate(1, path_length=(40, 200), seed=4).inputs[0], mazes.inputs[0])
    assert len({decode(maze) for maze in mazes.inputs}) == len(mazes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_length": 391}, "path_length is 391; a maze of size 30 has no way longer than 390 moves"),
        ({"size": 5, "path_length": (7, None)}, "has no way longer than 6 moves: ask for less or enlarge size"),
        ({"path_length": 390, "attempts": 2}, "of 390 moves or more did not come up in attempts=2 mazes of size 30"),
        ({"path_length": 0}, "path_length is 0; allowed is 1 or more"),
        ({"path_length": (9, 3)}, "least is greater than most"),
        ({"size": 4}, "size is 4; allowed is 5 or more"),
        ({"n": -1}, "n is -1; allowed is 0 or more"),
        ({"seed": -1}, "seed is -1; allowed is 0 or more"),
    ],
)
def test_generator_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(**{"n": 1, **arguments})  # type: ignore[arg-type]


def test_generator_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="size is 9.0"):
        generate(1, size=9.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="n is True"):
        generate(True)


# symmetries ----------------------------------------------------------------------------------------------------------


def test_augmentation_keeps_the_answer(mazes: PuzzleSet) -> None:
    assert mazes.labels is not None
    questions, answers = augment(mazes.inputs, mazes.labels, np.random.default_rng(0))
    assert is_solution(questions, answers).all() and questions.dtype == np.uint8
    assert np.array_equal(path_lengths(questions), mazes.rating)
    alone, none = augment(mazes.inputs, None, np.random.default_rng(0))
    assert none is None and np.array_equal(alone, questions)


def test_all_eight_symmetries_are_equally_likely() -> None:
    n = 4000
    maze = encode("S oo #G  ")
    square = maze.reshape(3, 3)
    expected = {np.rot90(s, k).tobytes() for s in (square, square[::-1]) for k in range(4)}
    moved, _ = augment(np.tile(maze, (n, 1)), None, np.random.default_rng(2))
    counts = Counter(grid.tobytes() for grid in moved)
    assert counts.keys() == expected and len(expected) == 8
    assert max(abs(count - n / 8) for count in counts.values()) < 4 * (n * 7 / 64) ** 0.5


def test_augment_refuses_bad_arguments(mazes: PuzzleSet) -> None:
    with pytest.raises(TypeError, match="rng is a NoneType; it must be a numpy Generator"):
        augment(mazes.inputs, None, None)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="inputs has rows of 5 squares"):
        augment(np.ones((1, 5), int), None, np.random.default_rng(0))


# files ---------------------------------------------------------------------------------------------------------------


def read(text: str, **options: str) -> tuple[PuzzleSet, list[ParseError]]:
    return load(io.StringIO(text), **options)


def test_lines() -> None:
    question, answer = one_line(SMALL), one_line(SMALL_ANSWER)
    bad = [
        question[1:],
        question.replace("S", " "),
        f"{question},{question}",
        question.replace("S", "s"),
        one_line(LOOP),
    ]
    puzzles, errors = read("\n".join([question, *bad, "", f"{question},{answer}"]))
    assert puzzles.line is not None and puzzles.line.tolist() == [1, 8]
    assert puzzles.labels is not None and not puzzles.labels[0].any() and decode(puzzles.labels[1]) == answer
    assert [error.line for error in errors] == [2, 3, 4, 5, 6]
    for error, message in zip(
        errors,
        [
            "has 48 cells; it needs 49",
            "it has 0 S, 1 G",
            "the answer is not the maze",
            "has 's' at cell 9",
            "has 25 cells",
        ],
        strict=True,
    ):
        assert message in error.message


def test_walled_in_start_is_reported() -> None:
    _, errors = read(one_line(SMALL.replace("# # # #", "### # #")))
    assert [error.message for error in errors] == ["no way leads from S to G"]


def test_csv_and_empty_input() -> None:
    question, answer = one_line(SMALL), one_line(SMALL_ANSWER)
    puzzles, errors = read(f"source,question,answer,rating\nx,{question},{answer},10\ny,{question},,\n")
    assert not errors and puzzles.source.tolist() == ["x", "y"] and puzzles.rating.tolist() == [10, -1]
    puzzles, errors = read("")
    assert len(puzzles) == 0 and not errors
    puzzles, errors = read("abc\n")
    assert len(puzzles) == 0 and "has 3 cells; it needs a square number" in errors[0].message


def test_folder_of_npy(tmp_path: Path, mazes: PuzzleSet) -> None:
    assert mazes.labels is not None
    folder = tmp_path / "test"
    folder.mkdir()
    inputs = mazes.inputs.copy()
    inputs[2, 0] = 6
    np.save(folder / "all__inputs.npy", inputs)
    np.save(folder / "all__labels.npy", mazes.labels)
    card = {"seq_len": 900, "vocab_size": 6, "pad_id": 0, "ignore_label_id": 0, "sets": ["all"]}
    (folder / "dataset.json").write_text(json.dumps(card))
    for source in (tmp_path, folder):
        puzzles, errors = load(source)
        assert [error.line for error in errors] == [3] and "holds 1 .. 6; allowed are tokens 1 .. 5" in errors[
            0
        ].message
        assert np.array_equal(puzzles.inputs, np.delete(mazes.inputs, 2, 0))
        assert puzzles.labels is not None and is_solution(puzzles.inputs, puzzles.labels).all()


def test_npy_of_tokens(tmp_path: Path, mazes: PuzzleSet) -> None:
    np.save(tmp_path / "a.npy", mazes.inputs.reshape(-1, 30, 30))
    puzzles, errors = load(tmp_path / "a.npy")
    assert not errors and np.array_equal(puzzles.inputs, mazes.inputs)
    np.save(tmp_path / "a.npy", np.ones((2, 7), int))
    with pytest.raises(ValueError, match="rows of 7 squares; a maze is square"):
        load(tmp_path / "a.npy")
