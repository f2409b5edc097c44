"""What every command shares: messages, exit codes, the progress bar, JSON and its file."""

from __future__ import annotations

import functools
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eqr_kernels.atomic import atomic_write

INCOMPLETE = 1
BAD_INPUT = 2
INTERRUPTED = 130
_BAR_AFTER_SECONDS = 2.0

P = ParamSpec("P")
_settings = {"traceback": False}


def show_tracebacks(wanted: bool) -> None:
    """Whether errors end in Python's traceback instead of one line."""
    _settings["traceback"] = wanted


def complain(message: str, kind: str = "error") -> None:
    """One message on stderr."""
    style = {"error": "bold red", "warning": "bold yellow"}.get(kind, "bold")
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    console.print(f"{kind}: ", style=style, end="")
    console.print(message, markup=False)


class _Messages(logging.Handler):
    """What the library logs: warnings, and notes where it logs INFO."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage(), "warning" if record.levelno >= logging.WARNING else "note")


@contextmanager
def _messages_shown() -> Iterator[None]:
    """Shows on stderr what the library warns of and logs, without the line of source it came from."""
    logger, handler = logging.getLogger("eqr_kernels"), _Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_args, **_kwargs: complain(str(message), "warning")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turns the library's errors, and an interruption, into a line on stderr and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt as interrupt:
        complain(str(interrupt) or "interrupted; nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if _settings["traceback"]:
            raise
        complain(str(error) or type(error).__name__)
        raise typer.Exit(BAD_INPUT) from error


def command(function: Callable[P, int | None]) -> Callable[P, None]:
    """Makes a command of a function that returns its exit code (None is 0) and raises the library's errors.

    Exit codes: 0 the work was done, 1 some of it could not be done, 2 nothing could be done, 130 interrupted.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        with _messages_shown(), errors_explained():
            code = function(*args, **kwargs)
        raise typer.Exit(code or 0)

    return wrapped


class Bar:
    """Progress of a piece of work, on stderr: a bar that appears after two seconds.

    Args:
        text: what is being done.
        wanted: None shows it on a terminal only; True always (elsewhere as lines, from the start); False never.
    """

    def __init__(self, text: str, wanted: bool | None = None) -> None:
        self.text = text
        self.console = Console(stderr=True)
        terminal = self.console.is_terminal
        self.live = terminal and wanted is not False
        self.lines = bool(wanted) and not terminal
        self.started = self.last_line = time.monotonic()
        self.progress: Progress | None = None
        self.done = -1.0

    def __enter__(self) -> Bar:
        return self

    def update(self, done: float, total: float, detail: str = "") -> None:
        """`done` of `total` is done."""
        share = done / total if total else 1.0
        now = time.monotonic()
        if self.live:
            if self.progress is None and now - self.started > _BAR_AFTER_SECONDS:
                self._show()
            if self.progress is not None:
                self.progress.update(self.progress.task_ids[0], completed=share, detail=detail)
        elif self.lines and (self.done < 0 or share == 1.0 != self.done or now - self.last_line > _BAR_AFTER_SECONDS):
            self.last_line, self.done = now, share
            print(f"{self.text}: {100 * share:.0f} % {detail}".rstrip(), file=sys.stderr, flush=True)

    def _show(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.progress.start()
        self.progress.add_task(self.text, total=1.0, detail="")

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()


@contextmanager
def busy(text: str, wanted: bool | None = None) -> Iterator[None]:
    """Says on stderr what is being done where the share that is done is not known; on a terminal only."""
    console = Console(stderr=True)
    if wanted is False or not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def check_output(path: Path | None) -> None:
    """Raises before the work begins when its result could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.absolute().parent}; make it first")


def to_json(value: Any) -> str:
    """JSON of dicts, lists, numbers and strings; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def emit(value: Any, as_json: bool, output: Path | None) -> None:
    """The result as JSON: on stdout with `as_json`, and in `output`; at once, so that a stop leaves no half of it."""
    text = to_json(value)
    if output is not None:
        atomic_write(output, text.encode())
    if as_json:
        sys.stdout.write(text)
        sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """Rising numbers, 1 or more, from text such as "1,2,4"."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{option} must be numbers separated by commas, as in 1,2,4, got {text!r}") from None
    if counts[0] < 1:
        raise ValueError(f"{option} must be 1 or more, got {counts[0]}")
    return tuple(counts)


def parse_numbers(option: str, text: str, *, allowed: str = "", zero: bool = False) -> tuple[float, ...]:
    """Rising, finite, positive numbers from text such as "0.02,0.03"; 0 as well where `zero`.

    Args:
        allowed: what the option takes instead of numbers, as in "auto or ", for the message.
    """
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{option} must be {allowed}numbers, as in 0.02,0.03, got {text!r}") from None
    if not all(math.isfinite(value) and (value > 0 or (zero and value == 0)) for value in numbers):
        raise ValueError(f"{option} must be {'0 or ' if zero else ''}positive and finite, got {text!r}")
    return tuple(numbers)


def parse_range(option: str, text: str) -> tuple[int, int | None]:
    """(low, high) from "30", "24-30" or "24-" (no limit)."""
    first, dash, last = text.partition("-")
    try:
        low = int(first)
        high = low if not dash else int(last) if last.strip() else None
    except ValueError:
        raise ValueError(f"{option} must be a number or a range, as in 30, 24-30 or 24-, got {text!r}") from None
    return low, high
