"""How engines end that nobody closes, and that nothing hangs: collection, the interpreter's end, forks, Ctrl-C."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter, deque

import pytest

from eqr_kernels import Engine, ops
from eqr_kernels.serving.compiled import CompiledRunner
from eqr_kernels.serving.stepping import SteppingRunner
from tests.support.environment import REPOSITORY
from tests.support.serving import ENDLESS, PATIENCE, assert_equal, until

PROGRAM = """
import os, signal, sys, threading, time
import torch
from eqr_kernels import Engine, EngineClosed
from tests.support.models import make_contractive, tiny_config
from tests.support.serving import ENDLESS, PATIENCE, until

backend = sys.argv[1]
model, tokens = make_contractive(tiny_config()), torch.arange(6)
want = model.solve(tokens[None], depth=3, halt="none", backend=backend)
engine = Engine(model, backend=backend, max_in_flight=1, depth=3, halt="none")

def right(future):
    return torch.equal(future.result(PATIENCE).logits, want.logits)

assert right(engine.submit(tokens))
"""


def outputs(backend: str, program: str) -> str:
    command = [sys.executable, "-W", "error", "-c", PROGRAM + program, backend]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


ENDS = {
    "with work in flight": """
future, waiting = (engine.submit(tokens, **ENDLESS) for _ in range(2))
until(lambda: engine.stats().requests)
for f in (future, waiting):
    f.add_done_callback(lambda f: sys.stdout.write(f"cancelled: {f.cancelled()}\\n"))
""",
    "by sys.exit within a with-block": """
with engine:
    future, waiting = (engine.submit(tokens, **ENDLESS) for _ in range(2))
    for f in (future, waiting):
        f.add_done_callback(lambda f: sys.stdout.write(f"cancelled: {f.cancelled()}\\n"))
    sys.exit(0)
""",
    "with an engine that was dropped": """
future, waiting = (engine.submit(tokens, **ENDLESS) for _ in range(2))
for f in (future, waiting):
    f.add_done_callback(lambda f: sys.stdout.write(f"cancelled: {f.cancelled()}\\n"))
del engine
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_the_interpreter_cancels_what_is_left(backend, end):
    if backend == "reference" and end != "with work in flight":
        pytest.skip("how an engine ends does not depend on who computes, and each takes a process")
    assert outputs(backend, ENDS[end]) == 2 * "cancelled: True\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
def test_a_forked_child_is_told_and_may_make_its_own(backend):
    program = """
running, waiting = engine.submit(tokens, **ENDLESS), engine.submit(tokens)
stream, several = engine.stream(tokens), iter(engine.as_completed([tokens] * 2, deadline=PATIENCE))
running.cancel()
assert torch.equal(next(several)[1].logits, want.logits)
running, waiting, stream = engine.submit(tokens, **ENDLESS), engine.submit(tokens), engine.stream(tokens)
until(lambda: engine.stats().requests == 1)
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    def ends_by(function):
        try:
            function()
        except EngineClosed as error:
            return "forked" in str(error) and "make an Engine here" in str(error)
        return False

    assert ends_by(lambda: engine.submit(tokens))
    assert ends_by(lambda: engine.stream(tokens))
    assert ends_by(lambda: running.result(PATIENCE)) and ends_by(lambda: waiting.result(PATIENCE))
    assert ends_by(lambda: next(stream)) and ends_by(lambda: list(several)) and not running.cancel()
    stats = engine.stats()  # asks no runner, which a thread of the parent may have locked
    assert engine.closed and (stats.in_flight, stats.queued, stats.steps, stats.steps_per_second) == (0, 0, 0, 0)
    engine.close()
    with Engine(model, backend=backend, depth=3, halt="none") as own:
        assert right(own.submit(tokens, deadline=PATIENCE))
    print("child", flush=True)
    del engine, own
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
running.cancel()
assert right(waiting) and right(engine.submit(tokens, deadline=PATIENCE))
engine.close()
print("parent")
"""
    assert outputs(backend, program) == "child\nparent\n"


@pytest.mark.slow
def test_ctrl_c_while_waiting_leaves_the_engine_usable(backend):
    program = """
signal.signal(signal.SIGINT, signal.default_int_handler)
future = engine.submit(tokens, **ENDLESS)
until(lambda: engine.stats().requests == 1)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    future.result(PATIENCE)
except KeyboardInterrupt:
    print("interrupted")
assert not future.done() and future.cancel()
assert right(engine.submit(tokens))
engine.close()
"""
    assert outputs(backend, program) == "interrupted\n"


def test_an_engine_that_is_collected_answers_and_leaves_no_thread(contractive, puzzles, backend):
    before = set(threading.enumerate())
    engine = Engine(contractive, backend=backend, max_in_flight=1, depth=3, halt="none")
    endless, future = engine.submit(puzzles[0], **ENDLESS), engine.submit(puzzles[1])
    gone = weakref.ref(engine)
    (thread,) = set(threading.enumerate()) - before
    del engine
    gc.collect()
    assert gone() is None and not endless.done() and thread.is_alive()
    endless.cancel()
    assert future.result(PATIENCE).steps.tolist() == [3]
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_thread_comes_with_the_first_request_and_sleeps_where_there_is_none(contractive, puzzles, backend):
    before = set(threading.enumerate())
    with Engine(contractive, backend=backend, depth=3, halt="none") as engine:
        assert set(threading.enumerate()) == before
        engine.submit(puzzles[0]).result(PATIENCE)
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before
    until(lambda: engine.stats().requests == 0)


def test_a_submit_that_is_interrupted_stops_what_it_started_and_the_engine_goes_on(
    contractive, puzzles, backend, monkeypatch
):
    owner, name = (ops.OpenRun, "join") if backend == "cpu" else (SteppingRunner, "start")
    start = getattr(owner, name)

    def interrupted(*args, **kwargs):
        start(*args, **kwargs)
        raise KeyboardInterrupt

    with Engine(contractive, backend=backend, depth=3, halt="none") as engine:
        want = engine.submit(puzzles[0]).result(PATIENCE)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.submit(puzzles[0], breadth=4, **ENDLESS)
        assert_equal(engine.submit(puzzles[0]).result(PATIENCE), want)
        until(lambda: engine.stats().in_flight == 0)
        assert engine.stats().submitted == engine.stats().completed == 2


def test_what_is_cancelled_before_it_has_started_does_not_run(contractive, puzzles, backend, monkeypatch):
    with Engine(contractive, backend=backend, depth=3, halt="none") as engine:
        engine.submit(puzzles[0]).result(PATIENCE)
        runner = SteppingRunner if backend == "reference" else CompiledRunner
        start = runner.start

        def late(self, job):
            engine._requests.cancel_all()  # of `close` in another thread
            start(self, job)

        monkeypatch.setattr(runner, "start", late)
        assert engine.submit(puzzles[0], **ENDLESS).cancelled()
        engine.close()


def test_a_collection_may_cancel_while_its_thread_holds_a_lock(contractive, puzzles):
    """As a generator does that nobody finished, when the collector ends it."""

    class Collecting(Counter):
        def copy(self):
            gc.collect()
            return super().copy()

    class CollectingBuffer(deque):
        def append(self, update):
            gc.collect()
            super().append(update)

    def follow(engine, buffer):
        with engine.stream(puzzles[0], **ENDLESS) as stream:
            futures.append(stream.future)
            stream._updates = buffer
            yield

    def abandon(engine, buffer):
        cycle = [follow(engine, buffer)]
        cycle.append(cycle)
        next(cycle[0])

    futures = []
    gc.disable()
    try:
        with Engine(contractive, backend="cpu") as engine:
            abandon(engine, CollectingBuffer())  # in the engine's thread, at the next step
            until(lambda: futures[0].done())
            engine._requests.counts = Collecting(engine._requests.counts)
            abandon(engine, deque())
            client = threading.Thread(target=engine.stats, daemon=True)
            client.start()
            client.join(PATIENCE)
            assert not client.is_alive() and all(future.cancelled() for future in futures)
    finally:
        gc.enable()
