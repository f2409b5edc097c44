"""The pictures of the page in docs/serving.md, of a server that runs: python -m benchmarks.page_pictures URL"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
HARD = "2.7..4..86..7.....41....6...7..8.1..1..9..7.4...5...8...4....357.5.9.....2....8.7"
ONE_IN_FOUR = "8..6....21..2...5.9.4.816...9....2.43....9....6.1...8....31..26......3......2.87."
END = "() => run && run.results && clock >= run.length && !playing && rest >= COOL"
PICTURES: dict[str, dict[str, Any]] = {
    "serving_running": dict(puzzle=HARD, theme="light", step=7),
    "serving_settled": dict(puzzle=ONE_IN_FOUR, theme="dark"),
    "serving_hard": dict(puzzle=HARD, theme="light"),
    "serving_phone": dict(puzzle=HARD, theme="dark", size=(390, 844)),
}
"""By name; without `step` the end is shown."""
WAIT_MS = 180_000


def take(
    browser: Browser, url: str, puzzle: str, theme: str, step: int | None = None, size: Any = (1280, 848)
) -> bytes:
    """A PNG of at most 256 colours."""
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=theme,  # type: ignore[arg-type]
        device_scale_factor=1.5,
    )
    page = context.new_page()
    page.goto(f"{url}/#puzzle={puzzle}&restarts=4&depth=64&run")
    if not step:
        page.wait_for_function(END, timeout=WAIT_MS)
    else:
        page.wait_for_function("() => run && run.results", timeout=WAIT_MS)
        page.evaluate(f"() => show({step})")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # colours fade
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE)
    context.close()
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of `eqr serve`, on a backend that tells each step")
    parser.add_argument("names", nargs="*", default=list(PICTURES), help=f"which: {', '.join(PICTURES)}; default all")
    options = parser.parse_args()
    url = options.url.rstrip("/")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        for name in options.names:
            data = take(browser, url, **PICTURES[name])
            (FOLDER / f"{name}.png").write_bytes(data)
            print(f"{name}.png: {len(data) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
