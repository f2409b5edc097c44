"""Outer steps as they come, and asyncio, on every backend."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from eqr_kernels import DeadlineExceeded, Engine, QueueFull, StepUpdate
from eqr_kernels.serving import Stream
from tests.support.serving import ENDLESS, PATIENCE, assert_equal, busy, until

RULES: dict[str, Any] = dict(depth=6, tol=0.1, breadth=3)


def checked(updates: list[StepUpdate], want: Any) -> None:
    """That they are those of a result with trace and all answers, in order for each trajectory."""
    steps: dict[tuple[int, int], list[int]] = {}
    for update in updates:
        at = update.puzzle, update.restart
        steps.setdefault(at, []).append(update.step)
        assert update.residual == want.residuals[(*at, update.step - 1)]
        assert update.preds.dtype == torch.int64 and update.preds.shape == (6,)
        if update.step == want.all_steps[at]:
            assert torch.equal(update.preds, want.all_preds[at]) and update.q_halt == want.all_q_halt[at]
            assert update.settled == (want.all_status[at] <= 1)
        else:
            assert not update.settled
    n, b = want.all_steps.shape
    last = {(p, r): int(want.all_steps[p, r]) for p in range(n) for r in range(b)}
    assert steps == {at: list(range(1, k + 1)) for at, k in last.items()}


@pytest.mark.parametrize("rows", [None, 2])
def test_a_stream_gives_the_steps_and_then_ends(contractive, puzzles, backend, rows):
    tokens = puzzles[0] if rows is None else puzzles[:rows]
    want = contractive.solve(tokens.reshape(-1, 6), trace=True, return_all=True, backend=backend, **RULES)
    also: list[StepUpdate] = []
    with Engine(contractive, backend=backend, **RULES) as engine:
        with engine.stream(tokens, on_step=also.append) as stream:
            updates = list(stream)
            assert list(stream) == [] and stream.dropped == 0
            result = stream.future.result(0)

        async def read() -> list[StepUpdate]:
            async with engine.stream(tokens) as stream:
                return [update async for update in stream]

        again = asyncio.run(read())
    assert torch.equal(result.logits, want.logits)
    for seen in (updates, again, also):
        checked(seen, want)


def test_a_slow_reader_loses_old_steps_and_never_the_answer(contractive, puzzles, backend):
    with Engine(contractive, backend=backend, depth=5, halt="none", breadth=4) as engine:
        stream = engine.stream(puzzles[0], buffer=3)
        result = stream.future.result(PATIENCE)
        updates = list(stream)
    assert len(updates) == 3 and updates[-1].step == 5
    assert stream.dropped == 5 * 4 - 3
    assert result.steps.tolist() == [5]


def test_a_stream_ends_with_its_request(contractive, puzzles):
    with Engine(contractive, backend="reference", **ENDLESS) as engine:
        with engine.stream(puzzles[0]) as left:
            assert next(left).step == 1
        assert left.future.cancelled() and list(left) == []

        cancelled = engine.stream(puzzles[0])
        next(cancelled)
        assert cancelled.cancel() and len(list(cancelled)) < 1000 and cancelled.future.cancelled()

        late = engine.stream(puzzles[0], deadline=0.05)
        with pytest.raises(DeadlineExceeded):
            list(late)

        def fail(update: StepUpdate) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            list(engine.stream(puzzles[0], on_step=fail))

        waiting: list[Stream] = []
        with engine.stream(puzzles[0]) as stream:
            reader = threading.Thread(target=lambda: waiting.extend(stream))  # type: ignore[arg-type]
            reader.start()
            until(lambda: bool(waiting))
        reader.join(PATIENCE)
        assert not reader.is_alive()
        until(lambda: engine.stats().in_flight == 0)


def test_solve_awaits_the_answer(contractive, puzzles, backend):
    async def ask(engine: Engine) -> list[Any]:
        return await asyncio.gather(*(engine.solve(puzzle) for puzzle in puzzles))

    with Engine(contractive, backend=backend, **RULES) as engine:
        results = asyncio.run(ask(engine))
    for i, result in enumerate(results):
        assert_equal(result, contractive.solve(puzzles[i : i + 1], backend=backend, **RULES))


def test_cancelling_a_task_cancels_its_request(contractive, puzzles, backend):
    async def leave(engine: Engine) -> None:
        task = asyncio.create_task(engine.solve(puzzles[0], **ENDLESS))
        while not engine.stats().requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.solve(puzzles[0], **ENDLESS), 0.05)
        with pytest.raises(DeadlineExceeded):
            await engine.solve(puzzles[0], deadline=0.05, **ENDLESS)
        stream = engine.stream(puzzles[0], **ENDLESS)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.close()
        with pytest.raises((StopAsyncIteration, asyncio.CancelledError)):
            while True:
                await reading
                reading = asyncio.create_task(anext(stream))

    with Engine(contractive, backend=backend) as engine:
        asyncio.run(leave(engine))
        until(lambda: engine.stats().in_flight == 0)
        assert (engine.stats().cancelled, engine.stats().failed) == (3, 1)


def test_solve_awaits_room(contractive, puzzles, backend):
    async def ask(engine: Engine) -> list[int]:
        with busy(engine, puzzles[0]):
            first = engine.submit(puzzles[1])
            with pytest.raises(QueueFull):
                await engine.solve(puzzles[2])
            with pytest.raises(QueueFull):
                await engine.solve(puzzles[2], block=True, timeout=0.01)
            with pytest.raises(DeadlineExceeded):
                await engine.solve(puzzles[2], block=True, deadline=0.01)
            patient = [asyncio.create_task(engine.solve(puzzle, block=True)) for puzzle in puzzles[2:6]]
            await asyncio.sleep(0)
            patient.pop().cancel()
        results = [await asyncio.wait_for(task, PATIENCE) for task in patient]
        assert first.result(PATIENCE).steps.tolist() == [3]
        return [int(result.steps) for result in results]

    with Engine(contractive, backend=backend, max_in_flight=1, max_queued=1, depth=3, halt="none") as engine:
        assert asyncio.run(ask(engine)) == [3, 3, 3]


def test_a_closed_loop_does_not_disturb_the_engine(contractive, puzzles, backend):
    async def forget(engine: Engine) -> None:
        engine.stream(puzzles[0], **ENDLESS)

    with Engine(contractive, backend=backend, depth=2, halt="none") as engine:
        loop = asyncio.new_event_loop()
        stream = engine.stream(puzzles[0], **ENDLESS)
        task = loop.create_task(anext(stream))
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        loop.close()
        stream.close()
        with pytest.raises(CancelledError):
            stream.future.result(0)
        want = contractive.solve(puzzles[:1], depth=2, halt="none", backend=backend)
        assert_equal(engine.submit(puzzles[0]).result(PATIENCE), want)
