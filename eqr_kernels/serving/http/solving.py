"""One request of /v1/solve: its puzzles go to the Engine, and their answers or their steps come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from eqr_kernels.config import EqRConfig
from eqr_kernels.results import SolveResult
from eqr_kernels.serving import DeadlineExceeded, Engine, EngineClosed, QueueFull, StepUpdate
from eqr_kernels.serving.http.errors import Refused, error_body, to_json
from eqr_kernels.serving.http.log import LOGGER
from eqr_kernels.serving.http.metrics import Metrics, Throughput
from eqr_kernels.serving.http.puzzles import answer, as_row, finite, read_puzzle
from eqr_kernels.serving.http.schema import SolveRequest
from eqr_kernels.tasks.common import Tokens
from eqr_kernels.tasks.task import Task, turns_of

_STEPS_KEPT = 4096
"""Lines of a stream that wait for a slow reader, about a kilobyte each; older ones are left out."""
_STEPS_AT_ONCE = 256
"""Lines that are written before other requests have their turn."""


class Steps:
    """Outer steps on their way from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.left_out = 0
        self.arrived = asyncio.Event()
        self._loop, self._lock = loop, threading.Lock()
        self._waiting: list[tuple[int, StepUpdate]] = []

    def put(self, puzzle: int, update: StepUpdate) -> None:
        """From any thread."""
        with self._lock:
            wakes = not self._waiting
            self._waiting.append((puzzle, update))
            if len(self._waiting) > _STEPS_KEPT:
                dropped = _STEPS_KEPT // 10
                del self._waiting[:dropped]
                self.left_out += dropped
        if wakes:
            self.wake()

    def wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self.arrived.set)
        except RuntimeError:
            pass  # the loop is closed: nobody reads any more

    def take(self) -> list[tuple[int, StepUpdate]]:
        with self._lock:
            taken, self._waiting = self._waiting[:_STEPS_AT_ONCE], self._waiting[_STEPS_AT_ONCE:]
            if not self._waiting:
                self.arrived.clear()
        return taken


def why_no_turns(engine: Engine, task: Task) -> str | None:
    """Why the engine cannot turn puzzles of the task; None: it can."""
    try:
        # Deep enough for one turn; what a request leaves out is for the request.
        engine.check(turns=turns_of(task, 1, seed=0), depth=2, patience=1, checkpoints=(), return_state=False)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


@dataclass
class Solving:
    """The puzzles of one request, in the Engine.

    Attributes:
        no_turns: why none of them can turn; None: they can.
        entries: what is known of each puzzle's result.
        outcomes: the same in a word, for the metrics.
        tokens, futures: of the puzzles that could be read, by place.
    """

    engine: Engine
    task: Task
    no_turns: str | None
    config: EqRConfig
    request: SolveRequest
    metrics: Metrics
    throughput: Throughput
    state: MutableMapping[str, Any]
    begun: float = field(default_factory=time.monotonic)
    steps: Steps = field(default_factory=lambda: Steps(asyncio.get_running_loop()))
    tokens: dict[int, Tokens] = field(default_factory=dict)
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[int, str] = field(default_factory=dict)
    futures: dict[int, Future[SolveResult]] = field(default_factory=dict)
    given_up: bool = False

    async def submit(self) -> None:
        """Reads the puzzles, and gives the engine those that could be read.

        Raises:
            Refused: none could be read (400), the engine refuses the options (400), is full (429) or closed (503).
        """
        self.state["puzzles"] = len(self.request.puzzles)
        if self.request.turn_every is not None and self.no_turns is not None:
            raise Refused(400, f"turn_every must be null on this server: {self.no_turns}", "turn_every")
        # Reading and the engine's checks take milliseconds, which the other requests need not wait for.
        work = asyncio.ensure_future(asyncio.to_thread(self._submit))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self.give_up()
            raise

    def _submit(self) -> None:
        for place, text in enumerate(self.request.puzzles):
            try:
                self.tokens[place] = read_puzzle(self.task, self.config, text)
            except Exception as error:  # a task of the user's own may raise anything
                failure = str(error) if isinstance(error, (ValueError, TypeError)) else f"cannot be read ({error!r})"
                self._end(place, "unreadable", error_body(failure[:500], f"puzzles[{place}]"))
        if not self.tokens:
            first = self.entries[0]["error"]
            n = len(self.request.puzzles)
            before = "" if n == 1 else f"none of the {n} puzzles can be read, the first because "
            raise Refused(400, before + first["message"], first["argument"])
        try:
            for place, tokens in self.tokens.items():
                if self.given_up:
                    return
                self._submit_one(place, tokens)
        except BaseException as error:
            self.give_up()
            raise self._refusal(error) from error

    def _submit_one(self, place: int, tokens: Tokens) -> None:
        options = self.request.options()
        if self.request.turn_every is not None:
            options["turns"] = turns_of(self.task, self.request.turn_every, self.request.seed)
        if self.request.ids is not None:
            options["ids"] = torch.tensor([self.request.ids[place]])
        if self.request.stream:
            options["on_step"] = partial(self.steps.put, place)
        future = self.engine.submit(as_row(tokens), **options)
        self.futures[place] = future
        future.add_done_callback(self._one_ended)
        if self.given_up:
            future.cancel()

    def _one_ended(self, future: Future[SolveResult]) -> None:
        if not future.cancelled():
            self.throughput.ended()
        self.steps.wake()

    def _refusal(self, error: BaseException) -> BaseException:
        if isinstance(error, QueueFull):
            seconds = self.throughput.seconds_for(self.engine.stats().queued)
            message = f"the queue is full ({error}); try again in {seconds} s"
            return Refused(429, message, reason="queue_full", headers={"Retry-After": str(seconds)})
        if isinstance(error, EngineClosed):
            return Refused(503, "the server is shutting down", reason="shutting_down", headers={"Retry-After": "5"})
        if isinstance(error, (ValueError, TypeError)):
            message = str(error)
            named = [name for name in type(self.request).model_fields if message.startswith(name)]
            return Refused(400, message, named[0] if named else None)
        return error

    def give_up(self) -> None:
        """Nobody wants the answers any more."""
        self.given_up = True
        for future in list(self.futures.values()):
            future.cancel()

    # answers ---------------------------------------------------------------------------------------------------------

    async def results(self) -> dict[str, Any]:
        """The entries of all puzzles, when each has one.

        Raises:
            Refused: not one was answered: 504 at the deadline, 500 where the computation failed.
        """
        async for _ in self._taken():
            pass
        return await asyncio.to_thread(self._collected)

    async def lines(self) -> AsyncIterator[bytes]:
        """JSON lines: each outer step, then the results, or an error where there are none."""
        async for taken in self._taken():
            yield b"".join(to_json(self._step(*each)) + b"\n" for each in taken)
        try:
            last = await asyncio.to_thread(self._collected)
        except Refused as refused:
            self.state["status"] = refused.status
            last = error_body(refused.message, refused.argument)
        yield to_json(last) + b"\n"

    async def _taken(self) -> AsyncIterator[list[tuple[int, StepUpdate]]]:
        """Steps as they come, until every puzzle has ended or the deadline is there."""
        try:
            while not all(future.done() for future in self.futures.values()) and (left := self._seconds_left()) > 0:
                if taken := self.steps.take():
                    yield taken
                    continue
                try:
                    async with asyncio.timeout(left):
                        await self.steps.arrived.wait()
                except TimeoutError:
                    pass
        finally:
            self.give_up()
        while taken := self.steps.take():
            yield taken

    def _seconds_left(self) -> float:
        return self.begun + self.request.deadline - time.monotonic()

    def _step(self, puzzle: int, update: StepUpdate) -> dict[str, Any]:
        return {
            "puzzle": puzzle,
            "restart": update.restart,
            "step": update.step,
            "prediction": self.task.decode(update.preds.cpu().numpy()),
            "residual": finite(update.residual),
            "q_halt": finite(update.q_halt),
            "settled": bool(update.settled),
        }

    def _end(self, place: int, outcome: str, entry: dict[str, Any]) -> None:
        self.entries[place] = entry
        self.outcomes[place] = outcome
        self.metrics.puzzles.labels(outcome).inc()

    def _collected(self) -> dict[str, Any]:
        for place, future in self.futures.items():
            error = None if future.cancelled() or not future.done() else future.exception()
            if future.cancelled() or not future.done() or isinstance(error, DeadlineExceeded):
                message = f"not answered within the deadline of {self.request.deadline:g} s; raise it or lower depth"
                self._end(place, "deadline", error_body(message, "deadline"))
            elif error is not None:
                fields = {"request_id": self.state["request_id"], "place": place}
                LOGGER.error("solve failed", extra={"fields": fields}, exc_info=error)
                request = f"the server's log says why under the request id {self.state['request_id']}"
                self._end(place, "failed", error_body(f"the computation failed; {request}"))
            else:
                entry = answer(self.task, self.tokens[place], future.result())
                self._end(place, entry["status"], entry)
        answered = [entry for entry in self.entries.values() if "error" not in entry]
        self.state["answered"] = len(answered)
        self.state["nfe"] = sum(entry["nfe"] for entry in answered)
        for outcome, status in (("failed", 500), ("deadline", 504)):
            if not answered and outcome in self.outcomes.values():
                place = next(place for place, each in self.outcomes.items() if each == outcome)
                failure = self.entries[place]["error"]
                raise Refused(status, failure["message"], failure.get("argument"), reason=outcome)
        return {
            "results": [self.entries[place] for place in range(len(self.request.puzzles))],
            "seconds": round(time.monotonic() - self.begun, 4),
            **({"steps_left_out": self.steps.left_out} if self.request.stream else {}),
        }
