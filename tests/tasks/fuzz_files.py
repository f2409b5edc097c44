"""Mutated puzzle files: `python -m tests.tasks.fuzz_files --examples 100000`; test_files_fuzz.py runs a few.

Whatever a file holds, `load` must return or raise an error of its own, and may accept no grid that is not in the file:
the digits of an accepted grid stand in it in their order, and a small damage changes no more cells than it has bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import linecache
import re
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eqr_kernels.tasks import maze, sudoku
from eqr_kernels.tasks.common import ParseErrors, PuzzleSet
from eqr_kernels.tasks.files.container import DAMAGED, lines_of, open_container
from tests.support.puzzle_files import A_ANSWER, B_ANSWER, FORMS, A, B, C, plain

OWN = (ValueError, TypeError, ImportError, FileNotFoundError)
ORIGINALS = [sudoku.encode(grid) for grid in (A, B, C, A_ANSWER, B_ANSWER)]
ALPHABET = b"\x00\x1a\xff\xfe\x80\n\r\t ,;|\"'#[]{}:-+*=_.0123456789xXaEe"
# A cell that is a space where line ends are trimmed leaves no trace when it is lost.
UNSEEN_SHIFTS = ("spaces for blanks, none at the end",)


class Mutation(NamedTuple):
    """What is done at a place (a share of the file), to so many bytes or lines."""

    kind: str
    place: float
    size: int
    data: bytes


KINDS = ("delete", "insert", "replace", "double", "swap", "cut", "delete line", "double line", "swap lines", "append")


def mutate(data: bytes, mutation: Mutation) -> bytes:
    kind, at, size, new = mutation.kind, int(mutation.place * len(data)), mutation.size, mutation.data
    if kind == "delete":
        return data[:at] + data[at + size :]
    if kind == "insert":
        return data[:at] + new + data[at:]
    if kind == "replace":
        return data[:at] + new + data[at + len(new) :]
    if kind == "double":
        return data[: at + 9 * size] + data[at:]
    if kind == "swap":
        return data[:at] + data[at + size : at + 2 * size] + data[at : at + size] + data[at + 2 * size :]
    if kind == "cut":
        return data[:at]
    if kind == "append":
        return data + SOURCES[sorted(SOURCES)[at % len(SOURCES)]].data
    lines = data.split(b"\n")
    i = int(mutation.place * len(lines))
    if kind == "delete line":
        del lines[i]
    elif kind == "double line":
        lines.insert(i, lines[i])
    else:
        lines[i : i + 2] = reversed(lines[i : i + 2])
    return b"\n".join(lines)


class Source(NamedTuple):
    """A file as it should be: its task, its bytes, and whether these are its text as it stands."""

    task: Any
    data: bytes
    text: bool


def _sources() -> dict[str, Source]:
    def of_text(text: str) -> Source:
        return Source(sudoku, text.encode(), True)

    rows = f"{A},{A_ANSWER},2.2\n{B},{B_ANSWER},7\n{C},,\n"
    records = [{"question": A, "answer": A_ANSWER, "rating": 2.5}, {"question": [int(c) for c in A_ANSWER]}]
    drawn = "\n\n".join(sudoku.format_grid(sudoku.encode(grid)) for grid in (A, B, C))
    texts = {
        "lines": f"{A}\n{B}\n# comment\n{C}\n",
        "answers": f"{A},{A_ANSWER}\n{B},{B_ANSWER}\n",
        "forum": f"10378  5710  {A}  11.0 11.0 2.6   95078 Coloin\n{B} ED=7.2/1.5\n{C};11.9;11.3;champagne\n",
        "csv": "question,answer,rating\n" + rows,
        "tsv": ("Puzzle,Solution,Difficulty\n" + rows).replace(",", "\t"),
        "quoted": f'id,rules,initial_board\n1,"Fill, so that\n""all"" is well",{A}\n2,"",{B}\n',
        "json lines": "\n".join(map(json.dumps, records)),
        "json": json.dumps(records, indent=1),
        "titles": f"Grid 01\n{plain(A)}\nGrid 02\n{plain(B)}\nGrid 03\n{plain(C)}\n",
        "close": f"{plain(A)}\n{plain(B)}\n{plain(C)}\n",
        "drawn": drawn,
    }
    sources = {name: of_text(text) for name, text in {**FORMS, **texts}.items()}
    sources["gzip"] = Source(sudoku, gzip.compress(texts["csv"].encode(), mtime=0), False)
    sources["utf-16"] = Source(sudoku, texts["drawn"].encode("utf-16"), False)
    digits = np.stack([sudoku.encode(A), sudoku.encode(B)]) - 1
    for name, write in {
        "npy": lambda file: np.save(file, digits),
        "npz": lambda file: np.savez_compressed(file, puzzles=digits, solutions=digits * 0),
        "zip": lambda file: zipfile.ZipFile(file, "w").writestr("a.csv", rows),
        "parquet": _write_parquet,
    }.items():
        buffer = io.BytesIO()
        write(buffer)
        sources[name] = Source(sudoku, buffer.getvalue(), False)
    mazes = maze.generate(3, size=7, seed=1)
    assert mazes.labels is not None
    pairs = [(maze.decode(q), maze.decode(a)) for q, a in zip(mazes.inputs, mazes.labels, strict=True)]
    sources["mazes"] = Source(maze, "\n".join(q for q, _ in pairs).encode(), True)
    sources["maze table"] = Source(maze, ("puzzle,answer\n" + "\n".join(map(",".join, pairs))).encode(), True)
    return sources


def _write_parquet(file: io.BytesIO) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        file.write(b"PAR1")
    else:
        parquet.write_table(pyarrow.table({"question": [A, B], "rating": [1.5, None]}), file)


SOURCES = _sources()

places = st.floats(0, 1, exclude_max=True)
telling = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=2).map(bytes)
mutations = st.builds(
    Mutation, st.sampled_from(KINDS), places, st.integers(1, 12), telling | st.binary(min_size=1, max_size=4)
)
slight = st.builds(Mutation, st.sampled_from([k for k in KINDS if k != "cut"]), places, st.integers(1, 2), telling)
changes = st.lists(slight, min_size=1, max_size=1) | st.lists(mutations, min_size=1, max_size=4)
cases = st.tuples(st.sampled_from(sorted(SOURCES)), changes)
formats = st.sampled_from(["auto"] * 9 + ["lines", "grids", "csv", "json", "npy", "npz", "parquet"])


def check(path: Path, name: str, changes: list[Mutation], format: str, counts: Counter[str]) -> None:
    """Loads the mutated file and judges what comes of it."""
    source = SOURCES[name]
    data = source.data
    for change in changes:
        data = mutate(data, change)
    path.write_bytes(data)
    counts["files"] += 1
    try:
        puzzles, errors = source.task.load(path, format=format)
    except OWN as problem:
        counts["refused whole"] += 1
        _check_message(problem)
        return
    counts["grids accepted"] += len(puzzles)
    counts["rows refused"] += errors.total
    _check_errors(errors)
    if source.task is sudoku and len(puzzles):
        text = _text_of(path)
        if text is not None:
            _check_digits(puzzles, text)
            appended = any(change.kind == "append" for change in changes)
            if not appended and not set(name.split()) & {"empty", "spaces", "semicolons"}:
                _check_cells(puzzles, text)
                counts["grids found cell for cell"] += len(puzzles)
        if source.text and len(changes) == 1 and name not in UNSEEN_SHIFTS:
            _check_nearness(puzzles, changes[0], counts)


def _check_message(problem: BaseException) -> None:
    """It was raised by the package on purpose, and can be shown."""
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    assert "eqr_kernels" in frame.filename and line.startswith("raise"), f"not raised on purpose: {line}"
    assert str(problem).isprintable() and 0 < len(str(problem)) < 1000, str(problem)


def _check_errors(errors: ParseErrors) -> None:
    assert [error.line for error in errors] == sorted(error.line for error in errors)
    for error in errors:
        assert error.message and str(error).isprintable() and len(error.text) <= 1000


def _text_of(path: Path) -> str | None:
    """The text of a file as far as it can be read; None when it is none."""
    with open(path, "rb") as file:
        container = open_container(file, path.name, "auto")
        lines = []
        if container.kind != "text":
            return None
        try:
            for line in lines_of(container):
                lines.append(line.rstrip("\n"))
        except DAMAGED:
            pass
        return "\n".join(lines)


def _check_digits(puzzles: PuzzleSet, text: str) -> None:
    """The digits of each grid stand in the text in their order, with no other digit between but in a comment."""
    plain_text = re.sub("#.*", "", text)
    in_text = [re.sub("[^1-9]", "", each) for each in (text, plain_text)]
    for grid in puzzles.inputs:
        digits = "".join(c for c in sudoku.decode(grid) if c != ".")
        assert any(digits in each for each in in_text), f"{sudoku.decode(grid)} is not in the file"


def _check_cells(puzzles: PuzzleSet, text: str) -> None:
    """The cells of each grid, blanks and all, stand in the text one after the other, but for rules and comments."""
    blanks = str.maketrans("0_*-xX", "......")
    variants = []
    for pattern in ("(?!)", "#.*", r"(?m)^[^1-9.0xX\n]*$|#.*", r"(?m)^[^1-9\n]*[-=─═]{3}[^1-9\n]*$|#.*"):
        variants.append(re.sub("[^1-9.]", "", re.sub(pattern, "", text).translate(blanks)))
    for grid in puzzles.inputs:
        assert any(sudoku.decode(grid) in each for each in variants), f"{sudoku.decode(grid)} is not in the file"


def _check_nearness(puzzles: PuzzleSet, change: Mutation, counts: Counter[str]) -> None:
    """A change of a few bytes, or of a line, changes no more cells than bytes: none was shifted."""
    touched = {"delete": change.size, "insert": len(change.data), "replace": len(change.data)}
    allowed = touched.get(change.kind, 0 if "line" in change.kind else None)
    if allowed is None or change.kind == "swap lines" or allowed > 4:
        return
    for grid in puzzles.inputs:
        nearest = min(int((grid != original).sum()) for original in ORIGINALS)
        assert nearest <= allowed, f"{sudoku.decode(grid)} differs from all that was in the file by {nearest} cells"
        counts["grids compared with the undamaged"] += 1


def run(examples: int, folder: Path, counts: Counter[str], **options: Any) -> None:
    """Checks so many mutated files.

    Raises:
        AssertionError: one was read wrongly; hypothesis names the smallest such.
    """

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        **options,
    )
    @given(cases, formats)
    def fuzz(case: tuple[str, list[Mutation]], format: str) -> None:
        check(folder / "fuzzed", *case, format, counts)

    fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000)
    arguments = parser.parse_args()
    tally: Counter[str] = Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run(arguments.examples, Path(folder), tally)
    for what, count in tally.items():
        print(f"{count:>10,} {what}")
    print(f"{time.monotonic() - begun:>10,.0f} seconds; no wrong grid, no foreign exception")
