"""README and the other pages: the example runs, links lead somewhere, and what the API pages show is there.

The links inside docs/ are checked by `make docs`.
"""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

from tests.support.environment import REPOSITORY

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_example_of(page: str, capsys: pytest.CaptureFixture[str]):
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    exec(compile(code, page, "exec"), {})
    *grid, last = capsys.readouterr().out.splitlines()
    assert grid[0] == "5 3 4 | 6 7 8 | 9 1 2"
    assert re.fullmatch(r"\d+ steps, \d+ spent, settled", last), last


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
