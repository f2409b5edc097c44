"""A launch under way, watched from the host: its control words, the caller's progress, and how it is cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from eqr_kernels.backends.base import Proceed

_SHORT, _LONG = 20e-6, 1e-3
"""Seconds between two looks at whether a launch has ended: at first, and when it has gone on for long."""
_REPORT = 0.02
"""Seconds between two calls of `proceed`."""


class Launch(Protocol):
    """Work that goes on beside the host."""

    def done(self) -> bool:
        """Whether it has ended, at once."""

    def wait(self) -> None:
        """Returns when it has ended; raises what it raised."""


class StreamLaunch:
    """All that is on the current CUDA stream now."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()


class Beside:
    """A stream of its own for launches, so that whoever waits for the current one does not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """What is launched inside comes after all that is on the current stream, and has ended afterwards."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield
                ended = torch.cuda.Event(blocking=True)  # sleeps, where others spin
                ended.record()
            ended.synchronize()


class ThreadLaunch:
    """A function in a thread of its own: a kernel that is interpreted on the CPU."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def new_control(device: torch.device) -> Tensor:
    """The control words of a run, int64 [3], zeros: page-locked, where a GPU reads and writes them while it runs.

    [0] is set by the host to cancel; [1] counts trajectories that have finished, [2] outer steps spent.
    """
    return torch.zeros(3, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


class Watch:
    """The host's side of a run.

    Attributes:
        control: see `new_control`; on the device where the stream is captured.
        captured: into a CUDA graph, whose replays nobody watches.
    """

    def __init__(self, device: torch.device, proceed: Proceed) -> None:
        self._proceed = proceed
        self._finished = self._spent = 0
        self.captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        where: dict[str, Any] = dict(dtype=torch.int64, device=device)
        self.control = torch.zeros(3, **where) if self.captured else new_control(device)
        if not proceed(0, 0):
            self.cancel()

    def cancel(self) -> None:
        self.control[0] = 1

    @contextmanager
    def launching(self) -> Iterator[None]:
        """What fails inside leaves nothing on the stream running: the kernel writes to `control` until it has ended."""
        try:
            yield
        except BaseException:
            if not self.captured and self.control.is_pinned():
                self.cancel()
                StreamLaunch().wait()
            raise

    def follow(self, launch: Launch) -> None:
        """Returns when `launch` has ended; calls `proceed` now and then, and cancels where that returns False.

        What `proceed` raises is raised once the launch has ended.
        """
        begun = reported = time.perf_counter()
        try:
            while not launch.done():
                now = time.perf_counter()
                if now - reported >= _REPORT:
                    reported = now
                    if not self.report():
                        self.cancel()
                time.sleep(min(max(_SHORT, (now - begun) / 50), _LONG))
        except BaseException:
            self.cancel()
            launch.wait()
            raise
        launch.wait()

    def report(self) -> bool:
        """What `proceed` says to the counts as they are; they never go back, though programs write in any order."""
        _, finished, spent = self.control.tolist()
        self._finished, self._spent = max(self._finished, finished), max(self._spent, spent)
        return self._proceed(self._finished, self._spent)
