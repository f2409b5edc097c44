"""The outer steps of a request as they are done."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

from eqr_kernels.forking import fork_safe_rlock
from eqr_kernels.results import SolveResult
from eqr_kernels.serving.runner import StepUpdate


class Stream(Iterator[StepUpdate], AsyncIterator[StepUpdate]):
    """Iterates over the updates of one request, by `for` or `async for`, in one place.

    It ends when the request has ended, with what the request failed with; where it was cancelled, it just ends.
    Leaving its with-block closes it, which cancels the request.

    Attributes:
        future: of the answer, which no slow reader loses.
        dropped: updates that nobody read in time; of those that wait the oldest is dropped.
    """

    future: Future[SolveResult]

    def __init__(self, buffer: int) -> None:
        self.dropped = 0
        self._buffer = buffer
        self._updates: deque[StepUpdate] = deque()
        self._ended = False
        self._changed = threading.Condition(fork_safe_rlock())
        self._readers: list[Callable[[], object]] = []

    def follow(self, future: Future[SolveResult]) -> None:
        """Says whose the updates are."""
        self.future = future
        future.add_done_callback(lambda _: self._tell(end=True))

    def put(self, update: StepUpdate) -> None:
        """From the engine's thread; never waits for the reader."""
        self._tell(update)

    def _tell(self, update: StepUpdate | None = None, *, end: bool = False) -> None:
        with self._changed:
            self._ended |= end
            if update is not None and not self._ended:
                if len(self._updates) == self._buffer:
                    self._updates.popleft()
                    self.dropped += 1
                self._updates.append(update)
            self._changed.notify_all()
            readers, self._readers = self._readers, []
        for wake in readers:
            wake()

    def _next(self) -> StepUpdate | None:
        """What is there now, with the lock held; None: nothing yet.

        Raises:
            EOFError: nothing will come.
        """
        if self._updates:
            return self._updates.popleft()
        if self._ended or self.future.done():
            raise EOFError
        return None

    def _raise_error(self) -> None:
        if not self.future.cancelled() and (error := self.future.exception()) is not None:
            raise error

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StepUpdate:
        try:
            with self._changed:
                while (update := self._next()) is None:
                    self._changed.wait()
                return update
        except EOFError:
            self._raise_error()
            raise StopIteration from None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> StepUpdate:
        loop = asyncio.get_running_loop()
        try:
            while True:
                come = loop.create_future()
                with self._changed:
                    if (update := self._next()) is not None:
                        return update
                    self._readers.append(waker(loop, come))
                await come
        except EOFError:
            self._raise_error()
            raise StopAsyncIteration from None

    def cancel(self) -> bool:
        """Stops the request at its next outer step; what has come can still be read. False where it had ended."""
        return self.future.cancel()

    def close(self) -> None:
        """Cancels the request and drops what was not read."""
        self.future.cancel()
        with self._changed:
            self._updates.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def waker(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> Callable[[], object]:
    """What ends a future of a loop, from any thread; nothing where nobody waits any more."""

    def end() -> None:
        if not future.done():
            future.set_result(None)

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end)

    return wake
