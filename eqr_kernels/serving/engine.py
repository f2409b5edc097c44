"""`Engine`: requests that join a running solve."""

from __future__ import annotations

import asyncio
import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from eqr_kernels.arguments import check_choice, check_count, check_function, check_number
from eqr_kernels.backends import Backend, Stepping
from eqr_kernels.backends.cpu import CpuBackend
from eqr_kernels.modifications import modification
from eqr_kernels.modules import EqROperator, LatentState
from eqr_kernels.results import SolveResult
from eqr_kernels.serving import lifetime
from eqr_kernels.serving.compiled import CompiledRunner
from eqr_kernels.serving.errors import QueueFull
from eqr_kernels.serving.launching import LaunchingRunner
from eqr_kernels.serving.requests import OnStep, Request, Requests, finish_on
from eqr_kernels.serving.runner import Job, Runner, StepUpdate
from eqr_kernels.serving.stats import EngineStats, Meter
from eqr_kernels.serving.stepping import POLICIES, SteppingRunner
from eqr_kernels.serving.stream import Stream, waker
from eqr_kernels.serving.weights import FrozenWeights
from eqr_kernels.solver import PreparedSolve, prepare, solve

# The options and their defaults have one home, the signature of `solve`.
_SOLVE = {p.name: p.default for p in inspect.signature(solve).parameters.values() if p.kind is p.KEYWORD_ONLY}
_ENGINES = ("backend", "precision")
_NOBODYS = ("slots", "on_finished", "progress")
_PER_PUZZLES = ("ids", "initial_state")
OPTIONS = tuple(name for name in _SOLVE if name not in (*_ENGINES, *_NOBODYS, *_PER_PUZZLES))
"""Options of `solve` that an engine takes as defaults of its requests."""


class Engine:
    """Requests that join a running solve: each is answered, bit for bit, as `model.solve` would, in any company.

    Threads of the engine compute; they start with the first request and wait, at no cost, while there is none. By the
    "cpu" backend the trajectories of all requests take turns of `quantum` outer steps in compiled code, on as many
    threads as torch was set to when the first request came; who comes has his first turn at the next outer step, and a
    lone trajectory has all threads. By the "reference" backend (also of a model that is run through its modules)
    requests take turns on one thread. By "cuda" and "triton" the trajectories of requests with the same
    rules share launches of `quantum` outer steps, and their states wait on the device between them; who comes is in the
    next launch of these rules (requests of different options take turns), and who is cancelled stops at its end.

    A model's weights are read at `submit`: one that is changed in place between two gives the new weights' answers. A
    model that was modified (see `SolveResult.backend_reason`) is called as it is while its request runs.

    The engine may be used from any number of threads, as a context manager, and beside others in one process. Leaving
    its with-block closes it, cancelling what is left where an exception leaves it. One that is collected without
    `close` answers what it has and ends its thread; the end of the interpreter cancels what is left; in a forked child
    it is closed.

    Args:
        model: the reasoner, as for `solve`.
        max_in_flight: trajectories that have a state at most, of requests that run beside each other. What has more by
            itself runs alone: by "reference" a request (`solve` has 64 at a time at most), by "cuda" and "triton" the
            trajectories of one puzzle.
        max_queued: requests that wait at most.
        policy: "least_service" (the next turn is of the request that has had the fewest outer steps so far, so that a
            long one does not hold up the short) or "fifo" (the oldest to its end).
        quantum: outer steps of a turn.
        backend, precision: as for `solve`.
        options: defaults for `submit`, those of `solve`: depth, breadth, halt, tol, patience, select, window,
            noise_scale, seed, checkpoints, return_all, trace, return_state, turns.

    Attributes:
        backend, backend_reason: what it chose when it was made, and why. Each request has its own in its result: it
            differs where the model was modified meanwhile, or where states or turns are wanted that a backend has not.
        precision: as it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as `solve`; a TypeError names an unknown option.
    """

    def __init__(
        self,
        model: EqROperator,
        *,
        max_in_flight: int = 256,
        max_queued: int = 10_000,
        policy: str = "least_service",
        quantum: int = 4,
        backend: str = "auto",
        precision: str = "auto",
        **options: Any,
    ) -> None:
        self.model = model
        self.max_in_flight = check_count("max_in_flight", max_in_flight)
        self.max_queued = check_count("max_queued", max_queued)
        check_choice("policy", policy, POLICIES)
        self.policy, self.quantum = policy, check_count("quantum", quantum)
        _check_names("Engine", options, OPTIONS)
        self._options = {**_SOLVE, **options, "backend": backend, "precision": precision}
        del self._options["progress"]
        self._meter, self._weights = Meter(), FrozenWeights()
        chosen = self._prepare_no_puzzles({})
        self.backend, self.backend_reason, self.precision = chosen.backend.name, chosen.reason, precision
        self._requests = Requests(self.max_queued)
        lifetime.watch(self, self._requests)

    def submit(
        self,
        tokens: Tensor,
        *,
        deadline: float | None = None,
        block: bool = False,
        timeout: float | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Future[SolveResult]:
        """A request joins the running solve.

        Args:
            tokens: integers [S], one puzzle, or [N, S] as for `solve`: one request with one answer. They are copied.
            deadline: seconds from now, at least 0; the future raises DeadlineExceeded then, and the request stops.
            block: wait for room where `max_queued` requests wait, for `timeout` seconds at most (None: for ever), and
                not beyond the deadline. The engine's own thread, which makes the room, never waits.
            on_step: called in the engine's thread with a `StepUpdate` of each trajectory after each outer step. What it
                raises is what its request fails with. One that takes longer than an outer step holds up the answers of
                others.
            options: those of the engine, which they override, and ids and initial_state.

        Returns:
            A future of the `SolveResult`, N = 1 for a puzzle. Its `cancel` stops the request at its next outer step,
            whether it waits or runs, and is true unless it has ended. It fails with what its own computation raised.

        Raises:
            TypeError, ValueError, RuntimeError: as `solve`; a TypeError names an unknown option.
            QueueFull: `max_queued` requests wait.
            DeadlineExceeded: the deadline passed while it waited for room.
            EngineClosed: after `close`.
        """
        until = _until(block, timeout)
        request = self._request(tokens, deadline, on_step, options)
        self._requests.enter(request, wait=block, until=until)
        return request.answer

    async def solve(
        self,
        tokens: Tensor,
        *,
        deadline: float | None = None,
        block: bool = False,
        timeout: float | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> SolveResult:
        """As `submit`, for asyncio: cancelling the task cancels the request, and `block=True` awaits room."""
        until = _until(block, timeout)
        request = self._request(tokens, deadline, on_step, options)
        limit = min((t for t in (until, request.job.deadline) if t is not None), default=None)
        while True:
            try:
                self._requests.enter(request, wait=False)
                return await asyncio.wrap_future(request.answer)
            except QueueFull:
                if not block or (until is not None and time.monotonic() >= until):
                    raise
                left = None if limit is None else max(0.0, limit - time.monotonic())
            loop = asyncio.get_running_loop()
            room = loop.create_future()
            self._requests.when_room(waker(loop, room))
            with suppress(TimeoutError):
                await asyncio.wait_for(room, left)

    def stream(
        self,
        tokens: Tensor,
        *,
        buffer: int = 256,
        deadline: float | None = None,
        block: bool = False,
        timeout: float | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Stream:
        """As `submit`, and gives the updates as they come, by `for` or `async for`: see `Stream`.

        Args:
            buffer: updates that wait for a slow reader at most; the oldest is dropped then.
        """
        until = _until(block, timeout)
        stream = Stream(check_count("buffer", buffer))
        check_function("on_step", on_step)

        def step(update: StepUpdate) -> None:
            stream.put(update)
            if on_step is not None:
                on_step(update)

        request = self._request(tokens, deadline, step, options)
        stream.follow(request.answer)
        self._requests.enter(request, wait=block, until=until)
        return stream

    def as_completed(self, puzzles: Iterable[Tensor], **as_submit: Any) -> Iterator[tuple[int, SolveResult]]:
        """Submits each of `puzzles` and gives (its index, its result) as they are answered.

        It feeds the queue as there is room, and keeps it short, with twice `max_in_flight` unanswered at most: requests
        of others then wait behind few. A request that fails ends it with its error; ending it cancels what is left.

        Args:
            puzzles: tokens [S] or [N, S] each, so also all of them as one tensor [M, S].
            as_submit: as for `submit`, of each, but for `block` and `timeout`: it waits as long as it takes.
        """
        for name in ("block", "timeout"):
            if name in as_submit:
                raise TypeError(f"as_completed waits for room as long as it takes; leave out {name}")
        deadline, on_step = as_submit.pop("deadline", None), as_submit.pop("on_step", None)
        answered: SimpleQueue[int] = SimpleQueue()
        waiting: dict[int, Future[SolveResult]] = {}
        left = enumerate(puzzles)
        following = next(left, None)
        try:
            while waiting or following is not None:
                while following is not None and len(waiting) < 2 * self.max_in_flight:
                    index, tokens = following
                    request = self._request(tokens, deadline, on_step, as_submit)
                    try:
                        # Where all that wait are others', there is nothing of its own to wait for.
                        self._requests.enter(request, wait=not waiting)
                    except QueueFull:
                        break
                    waiting[index] = request.answer
                    request.answer.add_done_callback(lambda _, index=index: answered.put(index))  # type: ignore[misc]
                    following = next(left, None)
                if self._requests.in_child:
                    self._requests.check_open()
                index = answered.get()
                yield index, waiting.pop(index).result()
        finally:
            for future in waiting.values():
                future.cancel()

    def check(self, **options: Any) -> str:
        """The backend that requests with these options would get.

        Raises:
            TypeError, ValueError, RuntimeError: as `submit`.
        """
        _check_names("check", options, OPTIONS)
        return self._prepare_no_puzzles(options).backend.name

    def stats(self) -> EngineStats:
        """The load now; see `EngineStats`."""
        runners = [runner.stats() for runner in list(self._requests.runners.values())]
        queued, requests, counts, histogram = self._requests.sizes()
        steps_per_second, utilisation = self._meter.rates(runners)
        return EngineStats(
            in_flight=sum(r.in_flight for r in runners),
            queued=queued,
            requests=requests,
            submitted=counts["submitted"],
            completed=counts["completed"],
            cancelled=counts["cancelled"],
            failed=counts["failed"],
            steps=sum(r.steps for r in runners),
            steps_per_second=steps_per_second,
            utilisation=utilisation,
            steps_histogram=dict(sorted(histogram.items())),
        )

    @property
    def closed(self) -> bool:
        """It takes no more requests."""
        return bool(self._requests.why_closed)

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more requests, answers those that it has, or cancels them, and returns when its threads have ended.

        It may be called again, with `cancel` after a call that was interrupted. Called in the engine's own thread, by a
        callback, it does not wait.
        """
        lifetime.close(self._requests, "the engine is closed; make another", cancel=cancel)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _request(
        self, tokens: Tensor, deadline: float | None, on_step: OnStep | None, options: dict[str, Any]
    ) -> Request:
        """A request that is ready to enter. Each public method calls it itself: warnings name its caller's line."""
        now = time.monotonic()
        self._requests.check_open()
        until = None if deadline is None else now + check_number("deadline", deadline)
        _check_names("submit", options, (*OPTIONS, *_PER_PUZZLES))
        check_function("on_step", on_step)
        warn = partial(warnings.warn, stacklevel=6)  # behind _tolerance, prepare, _prepare, here and the public method
        prepared = self._prepare(tokens, options, warn, on_step is not None)
        number = next(self._requests.numbers)
        job = Job(number, prepared, until, on_step is not None)
        return Request(job, self._requests.answer(number), self._runner(prepared.backend), on_step)

    def _prepare_no_puzzles(self, options: dict[str, Any]) -> PreparedSolve:
        """Checks the options, and is silent since every request will tell."""
        none = torch.zeros(0, self.model.config.seq_len, dtype=torch.int64, device=self.model.device)
        return self._prepare(none, options, warn=lambda _: None)

    def _prepare(
        self, tokens: Tensor, options: dict[str, Any], warn: Callable[[str], object], report_steps: bool = False
    ) -> PreparedSolve:
        # What the caller does to its tensors afterwards is not for the engine's thread to see, nor inference mode.
        with torch.inference_mode(False):
            if isinstance(tokens, Tensor):
                tokens = tokens.clone()
                if tokens.shape == (self.model.config.seq_len,):
                    tokens = tokens[None]
            options = {name: _copied(value) for name, value in options.items()}
            model, choices = self.model, None
            # One that was modified is called as it is: what its hooks and layers do cannot be copied.
            if modification(model) is None:
                model, choices = self._weights.of(model)
            options = {**self._options, **options}
            prepared = prepare(model, tokens, **options, warn=warn, report_steps=report_steps, choices=choices)
            finish_on(model.device)
            return prepared

    def _runner(self, backend: Backend) -> Runner:
        """Who computes requests of a backend; made when the first comes."""
        make = runner_class(backend)
        limits: dict[str, Any] = dict(max_in_flight=self.max_in_flight, policy=self.policy, quantum=self.quantum)
        return self._requests.runner(make.__name__, lambda: make(self._requests, **limits))


def runner_class(backend: Backend) -> type[CompiledRunner | SteppingRunner | LaunchingRunner]:
    """What computes the requests of a backend."""
    if isinstance(backend, CpuBackend):
        return CompiledRunner
    return SteppingRunner if isinstance(backend, Stepping) else LaunchingRunner


def _check_names(function: str, options: dict[str, Any], allowed: tuple[str, ...]) -> None:
    for name in options:
        if name in allowed:
            continue
        why = f"{function} has no option {name!r}"
        if name in _ENGINES:
            why = f"{name} is the engine's, not a request's; make another Engine with it"
        elif name in _PER_PUZZLES:
            why = f"{name} is a request's, not the engine's; give it to submit"
        elif name == "on_finished" or name == "progress":
            why += "; a request is followed with on_step"
        elif name == "slots":
            why += "; max_in_flight of the engine bounds what is in flight"
        raise TypeError(f"{why}. Options: {', '.join(allowed)}")


def _until(block: bool, timeout: float | None) -> float | None:
    """The `time.monotonic()` to which a request waits for room; None: for ever, or not at all."""
    if timeout is None:
        return None
    if not block:
        raise ValueError(f"timeout is for block=True, got timeout={timeout!r} without it")
    return time.monotonic() + check_number("timeout", timeout)


def _copied(value: Any) -> Any:
    if isinstance(value, LatentState):
        return LatentState(*(_copied(field) for field in value))
    return value.clone() if isinstance(value, Tensor) else value
