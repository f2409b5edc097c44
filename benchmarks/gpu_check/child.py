"""Programs with a time limit, whose output is read line by line while they run."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GRACE = 3.0


class Ended(NamedTuple):
    """How a program ended.

    Attributes:
        code: its exit code, negative for a signal. seconds: that it took.
        stopped: it ran past its limit and was ended.
        errors: the end of what it wrote to stderr.
    """

    code: int
    seconds: float
    stopped: bool
    errors: str

    @property
    def why(self) -> str:
        """One line on what went wrong; "" where nothing did."""
        if self.stopped:
            return f"stopped after {self.seconds:.0f} s, its time limit"
        if self.code == 0:
            return ""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return f"exit code {self.code}" + (f": {lines[-1].strip()}" if lines else "")


def run(command: Sequence[str], limit: float, on_line: Callable[[str], object], **environment: str) -> Ended:
    """Runs a command in the repository's root, in a process group of its own, for `limit` seconds at most.

    Whatever ends this call, an exception too, ends the whole group.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            errors="replace",
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line.rstrip("\n"))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        stopped = False
        try:
            while True:
                try:
                    line = lines.get(timeout=max(0.0, start + limit - time.monotonic()))
                except queue.Empty:
                    stopped = True
                    break
                if line is None:
                    break
                on_line(line)
            if not stopped:
                try:
                    process.wait(max(0.1, start + limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    stopped = True
        finally:
            _end(process)
        while stopped and not lines.empty():
            if (line := lines.get()) is not None:
                on_line(line)
        errors.seek(0)
        tail = errors.read().decode(errors="replace")[-4000:]
    return Ended(process.returncode, time.monotonic() - start, stopped, tail)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the group: children of a process that has ended may still run, and hold the GPU."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
