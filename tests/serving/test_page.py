"""The page at / in headless Chromium: a grid settles before one's eyes, in both themes and on a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.tasks import Task
from tests.support.http_server import PUZZLE, SOLUTION, Served, serving
from tests.support.models import make_contractive, tiny_config
from tests.support.serving import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Letters(Task):
    """Six letters, a to f, and a dash."""

    name = "letters"
    vocab_size = 7

    def encode(self, text):
        return np.array(["-abcdef".index(c) for c in text], np.uint8)

    def decode(self, tokens):
        return "".join("-abcdef"[t] for t in tokens)

    def check(self, inputs, preds):
        return (np.asarray(inputs) == np.asarray(preds)).all(1)


PATIENCE_MS = 60_000
"""Of each wait."""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as started:
        try:
            running = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        except playwright.Error as error:
            pytest.skip(f"needs Chromium: {str(error).splitlines()[0]}")
        yield running
        running.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    model = EquilibriumReasoner.from_pretrained("sudoku-small").float()
    with serving(model) as it:
        yield it


@pytest.fixture
def opened(browser, served):
    """Opens the page; at the end nothing may have been said on the console, nor fetched from elsewhere."""
    complaints, contexts = [], []

    def open_page(fragment="", *, at=served, width=1280, height=860, expected=(), **context):
        opened = browser.new_context(viewport={"width": width, "height": height}, **context)
        contexts.append(opened)
        page = opened.new_page()
        page.set_default_timeout(PATIENCE_MS)

        def heard(text):
            if not any(re.search(pattern, text) for pattern in expected):
                complaints.append(text)

        page.on("console", lambda message: heard(message.text))
        page.on("pageerror", lambda error: heard(str(error)))
        page.on("request", lambda request: request.url.startswith((at.url, "data:")) or heard(request.url))
        page.goto(f"{at.url}/#{fragment}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def settled(page) -> None:
    page.wait_for_function("() => run && run.results && clock >= run.length && !playing")


def shown(page, restart: int = 0) -> str:
    return page.evaluate("r => boards[r].spans.map((span) => span.textContent).join('')", restart)


@pytest.mark.slow
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 390)])
def test_a_puzzle_settles_on_the_page(opened, theme, width):
    page = opened(width=width, height=844, color_scheme=theme)
    page.get_by_role("button", name="Easy").click()
    page.get_by_text("2", exact=True).first.click()
    page.get_by_role("button", name="Solve").click()
    page.wait_for_function("() => clock >= 1")
    settled(page)
    answer = page.evaluate("() => run.results[0]")
    assert answer["valid"] and answer["prediction"] == SOLUTION
    assert page.locator(".board").count() == 2 and shown(page, answer["restart"]) == SOLUTION
    assert page.get_by_role("status").inner_text().startswith("Solved in ")
    assert page.locator(".board.chosen .seal").inner_text() == "✓ the answer"
    label = page.locator(".board.chosen").get_by_role("img").get_attribute("aria-label")
    assert SOLUTION[:9] in label and f"after {answer['steps']} step" in label
    assert page.locator(".cell.clue").count() == 2 * sum(c != "." for c in PUZZLE)
    assert page.locator("#residual .curve").count() == page.locator("#q .curve").count() == 2
    assert page.get_by_text(re.compile("^tolerance 0.0")).count() == 1
    # Nothing is cut off on a phone, and the theme is that of the system.
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("() => document.documentElement.dataset.theme") == theme
    page.get_by_text("The answer as text").click()
    assert page.locator("#answer").inner_text().replace("\n", "") == SOLUTION


@pytest.mark.slow
def test_the_theme_can_be_chosen_and_is_kept(opened):
    page = opened(color_scheme="light")
    background = "() => getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(background) != before
    page.reload()
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"


@pytest.mark.slow
def test_by_keyboard_and_with_reduced_motion(opened):
    page = opened(reduced_motion="reduce")
    page.get_by_label("or paste one").fill(f"{PUZZLE[:40]}\n{PUZZLE[40:]}")
    page.keyboard.press("Control+Enter")
    settled(page)
    steps = page.evaluate("() => run.length")
    page.get_by_label("Outer step shown").focus()
    page.keyboard.press("Home")
    assert page.locator("#clock").inner_text() == f"step 0 of {steps}" and "." not in shown(page)
    page.keyboard.press("ArrowRight")
    assert page.locator("#clock").inner_text() == f"step 1 of {steps}"
    assert page.evaluate("() => boards[0].spans.some((span) => Number(span.style.getPropertyValue('--heat')) > 0)")
    unnamed = "() => [...document.querySelectorAll('button, input, select, textarea')].filter((e) => !e.hidden && "
    unnamed += "!(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length))).length"
    assert page.evaluate(unnamed) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12345", "Text has 5 cells; it needs 81"),
        ("55" + "." * 79, "The givens break the rules: row 1 has the digit 5 more than once"),
        ("", "Paste a puzzle first, or pick one."),
    ],
)
def test_errors_are_said_in_words(opened, text, said):
    page = opened(expected=["400"], reduced_motion="reduce")
    page.get_by_label("or paste one").fill(text)
    page.get_by_role("button", name="Solve").click()
    page.wait_for_function("said => document.getElementById('title').textContent.startsWith(said)", arg=said)
    assert page.get_by_role("button", name="Solve").is_visible()


@pytest.mark.slow
def test_stop_drops_the_request_and_an_unsettled_puzzle_is_told_as_such(opened, served):
    before = served.engine.stats().cancelled
    everest = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
    page = opened(f"puzzle={everest}&restarts=1", reduced_motion="reduce")
    page.get_by_label("Steps at most").select_option("1024")
    page.get_by_role("button", name="Solve").click()
    page.wait_for_function("() => clock >= 2")
    page.get_by_role("button", name="Stop").click()
    assert page.get_by_role("status").inner_text().startswith("Stopped.")
    page.get_by_label("Steps at most").select_option("16")
    page.get_by_role("button", name="Solve").click()
    settled(page)
    assert page.get_by_role("status").inner_text().startswith("Not solved")
    assert page.locator(".cell.wrong").count() > 0
    until(lambda: served.engine.stats().cancelled == before + 1)


@pytest.mark.slow
def test_a_token_is_asked_for(opened):
    with serving(token="secret") as guarded:
        page = opened(at=guarded, expected=["401"], reduced_motion="reduce")
        page.get_by_label("Token of this server").fill("secret")
        page.get_by_label("Token of this server").press("Tab")
        page.get_by_text(re.compile("tiny on reference")).wait_for()
        page.get_by_label("or paste one").fill(SOLUTION)
        page.get_by_role("button", name="Solve").click()
        settled(page)


@pytest.mark.slow
def test_another_task_is_shown_as_its_text(opened):
    with serving(make_contractive(tiny_config()), Letters()) as other:
        page = opened(at=other, reduced_motion="reduce")
        page.get_by_text(re.compile("This page draws Sudoku. The model solves the letters task")).wait_for()
        page.get_by_label("or paste one").fill("abcabc")
        page.get_by_role("button", name="Solve").click()
        settled(page)
        assert page.evaluate("() => boards[0].grid.textContent") == page.evaluate(
            "() => run.steps[0].at(-1).prediction"
        )
