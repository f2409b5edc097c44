"""Fresh processes that take turns: each has its own malloc, and a slow phase of the machine meets them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT, TURN_TIMEOUT = 1800.0, 900.0  # seconds; compiling takes minutes


class Failed(Exception):
    """The process ended when it should not have; holds the end of what it wrote to stderr."""


class Process:
    """`python -m MODULE ARGUMENTS --serve`: answers requests, JSON lines both ways.

    Attributes:
        about: its first line, what it says of itself; with the key "skipped" where it cannot run here.
    """

    def __init__(self, module: str, *arguments: str, threads: int, cache: Path | None = None) -> None:
        self.name = " ".join([module, *arguments])
        self._errors = tempfile.TemporaryFile()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        if cache is not None:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--serve"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.info = self._answer(START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def request(self, **what: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            Failed: the process ended.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._end()) from None
        return self._answer(TURN_TIMEOUT)

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(timeout, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise Failed(self._end())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{self.name}: exit code {code}\n" + "\n".join(lines[-15:])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextmanager
def started(module: str, names: Iterable[str], *, threads: int) -> Iterator[tuple[dict[str, Process], dict[str, str]]]:
    """A process for each contender that can run here, and why the others cannot, by name."""
    processes, skipped = {}, {}
    with ExitStack() as stack:
        for name in names:
            process = stack.enter_context(Process(module, name, threads=threads))
            if "skipped" in process.info:
                skipped[name] = str(process.info["skipped"])
            else:
                processes[name] = process
        yield processes, skipped


def take_turns(processes: Mapping[str, Process], rounds: int, **what: Any) -> dict[str, list[dict[str, Any]]]:
    """The answers of each to the same request, round by round, there and back again."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
    for number in range(rounds):
        for name in processes if number % 2 == 0 else reversed(list(processes)):
            answers[name].append(processes[name].request(**what))
    return answers
