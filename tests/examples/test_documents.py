"""README and the other pages: the example runs; links, paths and the names on API pages lead somewhere.

The links inside docs/ are checked by `make docs`.
"""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.registry import find_task
from eqr_kernels.tasks.task import try_task
from tests.support.environment import REPOSITORY, needs_extension

DOCS = sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_example_of(page: str, capsys: pytest.CaptureFixture[str]):
    code, *_ = examples(page)
    exec(compile(code, page, "exec"), {})
    *grid, last = capsys.readouterr().out.splitlines()
    assert grid[0] == "5 3 4 | 6 7 8 | 9 1 2"
    assert re.fullmatch(r"\d+ steps, \d+ spent, settled", last), last


@pytest.mark.parametrize(("page", "number"), [("README.md", 1), ("docs/any-operator.md", 0)])
def test_example_of_an_operator(page: str, number: int, capsys: pytest.CaptureFixture[str]):
    code = examples(page)[number]
    assert len(code.splitlines()) <= 8
    exec(compile(code, page, "exec"), {})
    low, high, rows = map(
        int, re.fullmatch(r"(\d+) to (\d+) steps, (\d+) rows computed\n", capsys.readouterr().out).groups()
    )
    assert 1 < low < high < 500 and 1000 * low <= rows <= 1000 * high


def test_example_of_a_task():
    (code,) = examples("docs/own-task.md")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/own-task.md", "exec"), names)
    documented, whole = names["LATIN"], find_task(f"{REPOSITORY / 'examples' / 'latin_squares.py'}:LATIN")
    puzzles = whole.generate(20, seq_len=16, seed=0)
    try_task(documented, puzzles)
    for answers in (puzzles.labels, puzzles.labels[::-1], puzzles.inputs):
        assert (documented.check(puzzles.inputs, answers) == whole.check(puzzles.inputs, answers)).all()
    assert documented.check(puzzles.inputs, puzzles.labels).all()
    assert documented.decode(puzzles.inputs[0]) == whole.decode(puzzles.inputs[0])


@pytest.mark.slow
@needs_extension
def test_example_of_serving(capsys: pytest.CaptureFixture[str]):
    (code,) = examples("docs/serving.md")
    exec(compile(code, "docs/serving.md", "exec"), {})
    first, *lines = capsys.readouterr().out.splitlines()
    grid = sudoku.encode(first)[None]
    assert sudoku.is_solution(grid, grid).all() and first.startswith("53")
    assert [int(line.split()[0]) for line in lines[:-1]] == list(range(1, len(lines)))
    assert lines[-1].startswith("EngineStats(in_flight=0, queued=0, requests=0, submitted=2, completed=2")


def examples(page: str) -> list[str]:
    matches: list[str] = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    return matches


def anchors(page: Path) -> set[str]:
    """Of the headings: lower case, without punctuation, with a hyphen for each space."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_of(page: str):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (REPOSITORY / page).read_text())
    dead = []
    for path, anchor in links:
        target = REPOSITORY / page if not path else (REPOSITORY / page).parent / path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{path}#{anchor}")
    assert not dead


@pytest.mark.parametrize("page", sorted(path.name for path in (REPOSITORY / "docs" / "api").glob("*.md")))
def test_names_of_api_page(page: str):
    names = re.findall(r"^::: (\S+)$", (REPOSITORY / "docs" / "api" / page).read_text(), re.MULTILINE)
    assert names
    for name in names:
        pkgutil.resolve_name(name)


# The changelog names what is gone.
@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *DOCS])
def test_paths_in(page: str):
    named = re.findall(
        r"`((?:csrc|eqr_kernels|benchmarks|tests|docs|examples)/[\w./-]*)`", (REPOSITORY / page).read_text()
    )
    placeholders = ("STEM", "TASK", "MIXER")
    paths = [path for path in named if not any(word in path for word in placeholders)]
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
