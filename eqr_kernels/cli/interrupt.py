"""Stopping a long command between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a wish to stop between two steps; a later second one stops at once, unsaved."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._asked_at is not None

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere the caller's own stay.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            # print may be what was interrupted, and must not be entered twice.
            os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
        elif time.monotonic() - self._asked_at > 1:  # torchrun passes on the Ctrl-C that the terminal has sent already
            raise KeyboardInterrupt("stopped at once; the state is that of the last save")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
