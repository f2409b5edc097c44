"""Mazes on a square grid: generate, read, write, check, augment.

Tokens: 0 pad, then the characters of "# SGo": 1 wall, 2 open, 3 start, 4 goal, 5 path (S = side^2, row by row). The
answer is the grid with a shortest path from start to goal marked, start and goal themselves staying as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import overload

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import (
    ParseErrors,
    PuzzleSet,
    Tokens,
    as_pair,
    as_tokens,
    check_int,
    check_range,
    check_rng,
)
from eqr_kernels.tasks.files import Codec, Source, encode_texts, load_puzzles
from eqr_kernels.tasks.views import Views

CHARACTERS = "# SGo"
VOCAB_SIZE = 6
WALL, OPEN, START, GOAL, PATH = range(1, VOCAB_SIZE)
SYMMETRIES = 8
"""Of a square."""

_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


def _byte_tokens() -> Tokens:
    table = np.zeros(256, np.uint8)
    table[list(CHARACTERS.encode())] = np.arange(1, VOCAB_SIZE)
    return table


# rules ---------------------------------------------------------------------------------------------------------------


def is_valid_maze(inputs: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether a grid is a puzzle: no pad, no path yet, one start, one goal, and a way between: [N, S] -> bool [N]."""
    tokens = _mazes("inputs", inputs)
    valid: npt.NDArray[np.bool_] = _well_formed(tokens) & (path_lengths(tokens) > 0)
    return valid


def is_solution(inputs: npt.ArrayLike, preds: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether preds are inputs with a shortest path from start to goal marked: tokens [N, S] twice -> bool [N].

    In a perfect maze that path is the only one. A row of inputs that is no valid maze is never solved.
    """
    questions, answers = as_pair(inputs, preds, VOCAB_SIZE, None)
    _mazes("inputs", questions)
    marked = answers == PATH
    good: npt.NDArray[np.bool_] = _well_formed(questions) & np.where(
        marked, questions == OPEN, questions == answers
    ).all(1)
    rows = np.flatnonzero(good)
    steps = marked[rows].sum(1) + 1
    on_path = np.where(answers[rows] == OPEN, WALL, answers[rows])
    # as many squares as the shortest way needs, and start and goal joined by them: none is off the way
    good[rows] = (path_lengths(questions[rows]) == steps) & (path_lengths(on_path) == steps)
    return good


def path_lengths(inputs: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Moves on a shortest way from start to goal that crosses no wall and no pad: [N, S] -> int64 [N]; -1 = none."""
    tokens = _mazes("inputs", inputs)
    n, side = len(tokens), _side(tokens.shape[1])
    free = (tokens > WALL).reshape(n, side, side)
    goal = (tokens == GOAL).reshape(n, side, side)
    reached = (tokens == START).reshape(n, side, side)
    length = np.full(n, -1, np.int64)
    searching = np.arange(n)
    moves = 0
    while len(searching):
        arrived = (reached & goal).any((1, 2))
        length[searching[arrived]] = moves
        grown = reached.copy()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= free
        going = ~arrived & (grown != reached).any((1, 2))
        searching, reached, free, goal = searching[going], grown[going], free[going], goal[going]
        moves += 1
    return length


def _well_formed(tokens: Tokens) -> npt.NDArray[np.bool_]:
    counted = [(tokens == token).sum(1) for token in (0, START, GOAL, PATH)]
    well: npt.NDArray[np.bool_] = (counted[0] == 0) & (counted[1] == 1) & (counted[2] == 1) & (counted[3] == 0)
    return well


def _broken_rules(inputs: Tokens, labels: Tokens) -> list[str]:
    """Per maze [N, S] what is wrong with it or with its answer (zeros when unknown), or ""."""
    messages = [""] * len(inputs)
    if not len(inputs):
        return messages
    for i in np.flatnonzero(~is_valid_maze(inputs)):
        counts = Counter(inputs[i].tolist())
        messages[i] = (
            f"it has {counts[START]} S, {counts[GOAL]} G, {counts[PATH]} o and {counts[0]} pads; a maze has one S, one "
            "G and neither o nor pads"
            if not _well_formed(inputs[i : i + 1])[0]
            else "no way leads from S to G"
        )
    for i in np.flatnonzero(~is_solution(inputs, labels) & labels.any(1)):
        messages[i] = messages[i] or "the answer is not the maze with a shortest path from S to G marked with o"
    return messages


def _mazes(name: str, value: npt.ArrayLike) -> Tokens:
    tokens = as_tokens(name, value, VOCAB_SIZE)
    _side(tokens.shape[1], name)
    return tokens


def _side(seq_len: int, name: str = "inputs") -> int:
    side = int(seq_len**0.5 + 0.5)
    if side * side != seq_len:
        raise ValueError(f"{name} has rows of {seq_len} squares; a maze is square, so it must be a square number")
    return side


CODEC = Codec(
    table=_byte_tokens(),
    vocab_size=VOCAB_SIZE,
    cells="# wall, space open, S start, G goal, o path",
    seq_len=None,
    blanks="",
    check=_broken_rules,
)

# text and files ------------------------------------------------------------------------------------------------------


def encode(text: str) -> Tokens:
    """Tokens [S] of one maze: its side lines of side characters "# SGo" each, or all of them in one line."""
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; it must be a str of the characters {CHARACTERS!r}")
    lines = [line for line in text.split("\n") if line]
    if len(lines) > 1 and {len(line) for line in lines} != {len(lines)}:
        widths = ", ".join(str(w) for w in sorted({len(line) for line in lines}))
        raise ValueError(f"text has {len(lines)} lines of {widths} characters; a maze is square: keep trailing spaces")
    cells = "".join(lines)
    seq_len = _side(len(cells), "text") ** 2
    tokens, wrong = encode_texts([cells], CODEC, seq_len)
    if wrong[0]:
        raise ValueError(f"text {wrong[0]}")
    maze: Tokens = tokens[0]
    return maze


def decode(tokens: npt.ArrayLike) -> str:
    """The maze [S] as one line of "# SGo"; '?' for a pad."""
    return "".join(("?" + CHARACTERS)[t] for t in as_tokens("tokens", tokens, VOCAB_SIZE, ndim=1))


def format_grid(tokens: npt.ArrayLike, mark: Callable[[int, str], str] | None = None) -> str:
    """The maze [S] as side lines; `mark` gets (square number, its character) and returns what to show for it."""
    text = decode(tokens)
    side = _side(len(text), "tokens")
    shown = [mark(square, c) if mark else c for square, c in enumerate(text)]
    return "\n".join("".join(shown[row * side : (row + 1) * side]) for row in range(side))


def load(source: Source, *, format: str = "auto", split: str | None = None) -> tuple[PuzzleSet, ParseErrors]:
    """Read mazes of one size; a row that cannot be read, or is no maze, is reported and the others are kept.

    Args:
        source: a path or a text stream such as sys.stdin. Files may be gzipped, and in UTF-8 or UTF-16.
        format: "lines": a maze a line, S characters "# SGo", or maze,answer (no comments: '#' is a wall). "csv": a
            header with the column question, and optionally answer, source, rating. "json", "parquet": tables with the
            same names. "npy", "npz": tokens [N, S], [N, side, side] or [S]. "folder": the HRM/EqR layout. "auto" goes
            by the first bytes of a file and the first line of a text. In text the commonest square size counts; mazes
            of another size are reported.
        split: "train" or "test" of a folder that has both.
    Returns:
        the puzzles in the file's order, `line` naming each one's line or row (1-based), and the errors by line, of
        which the first 1,000 are kept and the others counted (`ParseErrors`).
    Raises:
        OSError, ValueError, TypeError: the file as a whole cannot be read.
    """
    return load_puzzles(source, CODEC, format=format, split=split)


# symmetries ----------------------------------------------------------------------------------------------------------


@overload
def augment(inputs: npt.ArrayLike, labels: npt.ArrayLike, rng: np.random.Generator) -> tuple[Tokens, Tokens]: ...
@overload
def augment(inputs: npt.ArrayLike, labels: None, rng: np.random.Generator) -> tuple[Tokens, None]: ...
def augment(
    inputs: npt.ArrayLike, labels: npt.ArrayLike | None, rng: np.random.Generator
) -> tuple[Tokens, Tokens | None]:
    """Turn and mirror each row by its own uniformly drawn one of the square's 8 symmetries, its answer likewise.

    Args:
        inputs, labels: tokens [N, S]; labels may be None.
    Returns:
        new uint8 arrays [N, S].
    """
    check_rng(rng)
    if labels is None:
        questions, answers = _mazes("inputs", inputs), None
    else:
        questions, answers = as_pair(inputs, labels, VOCAB_SIZE, None)
    cells = _turned(questions.shape[1])[rng.integers(SYMMETRIES, size=len(questions))]
    moved = np.take_along_axis(questions, cells, 1)
    return moved, None if answers is None else np.take_along_axis(answers, cells, 1)


def views(inputs: npt.ArrayLike, count: int, *, seed: int = 0) -> Views:
    """Each maze turned and mirrored in `count` ways of eight: itself, then the others in a fixed order.

    Args:
        inputs: tokens [N, S].
        count: V, 1 to 8.
        seed: without meaning here, as nothing is drawn.
    """
    mazes = _mazes("inputs", inputs)
    if check_int("count", count, 1) > SYMMETRIES:
        raise ValueError(
            f"count must be at most {SYMMETRIES}, as a square has so many symmetries, got {count}; ask for fewer"
        )
    cells = _turned(mazes.shape[1])[:count]
    names = np.arange(VOCAB_SIZE, dtype=np.uint8)
    n, v = len(mazes), len(cells)
    return Views.of(mazes, np.broadcast_to(cells, (n, *cells.shape)), np.broadcast_to(names, (n, v, VOCAB_SIZE)))


def _turned(seq_len: int) -> npt.NDArray[np.int64]:
    """The square's eight symmetries, int64 [8, S], none of them first: new square -> old square."""
    side = _side(seq_len)
    square = np.arange(seq_len).reshape(side, side)
    return np.stack([np.rot90(s, k).reshape(-1) for s in (square, square.T) for k in range(4)])


# generator -----------------------------------------------------------------------------------------------------------


def generate(
    n: int,
    *,
    size: int = 30,
    path_length: int | tuple[int, int | None] | None = None,
    seed: int = 0,
    attempts: int = 200,
    progress: Callable[[int], object] | None = None,
) -> PuzzleSet:
    """Generate n perfect mazes (one way between any two squares) with the way from start to goal marked in labels.

    The maze lies on the largest odd square of the grid: its squares at odd rows and columns are rooms, joined by a
    random depth-first walk; with an even size the last row and column are wall. rating = moves from start to goal.
    Maze i depends on (seed, i) alone. A 30x30 maze takes about 3 ms.

    Args:
        size: side of the grid, 5 or more.
        path_length: moves from start to goal (the o's are one fewer): a number, (least, most), or (least, None); by
            default start and goal are any two squares.
        attempts: mazes to try for each one that is asked for before giving up.
        progress: called with the number of mazes done after each.
    Raises:
        ValueError: an argument out of range, or a length that cannot be had (it says how long the ways were).
    """
    n, size, seed = check_int("n", n, 0), check_int("size", size, 5), check_int("seed", seed, 0)
    attempts = check_int("attempts", attempts, 1)
    rooms = (size - 1) // 2
    longest = 2 * (rooms * rooms - 1)
    low_end, high_end = (1, None) if path_length is None else check_range("path_length", path_length, 1, None)
    if low_end > longest:
        raise ValueError(
            f"path_length is {path_length}; a maze of size {size} has no way longer than {longest} moves: ask for less "
            "or enlarge size"
        )
    inputs = np.zeros((n, size * size), np.uint8)
    labels = np.zeros_like(inputs)
    rating = np.zeros(n, np.float64)
    for i in range(n):
        way, grid = _generate_one(size, low_end, high_end, np.random.default_rng([seed, i]), attempts)
        grid[way[0]], grid[way[-1]] = START, GOAL
        inputs[i] = grid
        grid[way[1:-1]] = PATH
        labels[i] = grid
        rating[i] = len(way) - 1
        if progress is not None:
            progress(i + 1)
    return PuzzleSet(inputs, labels, np.full(n, "generated_maze"), rating)


def _generate_one(
    size: int, low_end: int, high_end: int | None, rng: np.random.Generator, attempts: int
) -> tuple[list[int], Tokens]:
    """Squares of the way from start to goal, and the maze [S] without them marked."""
    longest_seen = 0
    for _ in range(attempts):
        grid = _carve(size, rng)
        free = np.flatnonzero(grid == OPEN).tolist()
        end = next(reversed(_walk(grid, size, free[0])[0]))  # the farthest square from any is an end of a longest way
        diameter = max(_walk(grid, size, end)[0].values())
        longest_seen = max(longest_seen, diameter)
        if diameter < low_end:
            continue
        # from an end of a longest way there are squares at every distance, so the last start always works
        for start in [*rng.permutation(free)[:20].tolist(), end]:
            distance, parent = _walk(grid, size, start)
            fitting = [square for square, d in distance.items() if d >= low_end and (high_end is None or d <= high_end)]
            if fitting:
                way = [fitting[rng.integers(len(fitting))]]
                while way[-1] != start:
                    way.append(parent[way[-1]])
                return way[::-1], grid
    raise ValueError(
        f"path_length of {low_end} moves or more did not come up in attempts={attempts} mazes of size {size}; the "
        f"longest way had {longest_seen}: ask for less, enlarge size, or raise attempts"
    )


def _carve(size: int, rng: np.random.Generator) -> Tokens:
    """A perfect maze [size^2] of walls and open squares, by a random depth-first walk over the rooms."""
    rooms = (size - 1) // 2
    grid = np.full((size, size), WALL, np.uint8)
    entered = np.zeros((rooms, rooms), bool)
    stack = [(int(rng.integers(rooms)), int(rng.integers(rooms)))]
    entered[stack[0]] = True
    grid[2 * stack[0][0] + 1, 2 * stack[0][1] + 1] = OPEN
    while stack:
        row, column = stack[-1]
        doors = [
            (row + dr, column + dc)
            for dr, dc in _MOVES
            if 0 <= row + dr < rooms and 0 <= column + dc < rooms and not entered[row + dr, column + dc]
        ]
        if not doors:
            stack.pop()
            continue
        r, c = doors[rng.integers(len(doors))]
        entered[r, c] = True
        grid[2 * r + 1, 2 * c + 1] = OPEN
        grid[row + r + 1, column + c + 1] = OPEN
        stack.append((r, c))
    return grid.reshape(-1)


def _walk(grid: Tokens, size: int, start: int) -> tuple[dict[int, int], dict[int, int]]:
    """Moves from `start` to each open square, nearest first, and the square before it on the way."""
    cells = grid.tolist()
    distance, parent = {start: 0}, {start: start}
    front = [start]
    for square in front:
        for neighbour in (square - size, square + size, square - 1, square + 1):  # the rim is wall
            if cells[neighbour] == OPEN and neighbour not in distance:
                distance[neighbour] = distance[square] + 1
                parent[neighbour] = square
                front.append(neighbour)
    return distance, parent
