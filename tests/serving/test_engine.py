"""The engine's contract, on every backend: solve's answers in any company, and how else a request may end."""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations

from eqr_kernels import DeadlineExceeded, Engine, EngineClosed, EqRConfig, QueueFull, SolveResult, StepUpdate
from tests.support.models import make_contractive, tiny_config
from tests.support.serving import ENDLESS, PATIENCE, assert_equal, busy, until

CASES: list[dict[str, Any]] = [
    dict(),
    dict(depth=1),
    dict(depth=6, halt="none", trace=True),
    dict(breadth=3, return_all=True),
    dict(breadth=4, select="vote", checkpoints=(1, 2, 4)),
    dict(breadth=2, halt="q", select="q", window=2),
    dict(halt="residual+q", patience=2),
    dict(halt="residual|q", tol=0.3, seed=2**32 - 1),
    dict(noise_scale=0.02, tol=0.05, return_state=True),
    dict(breadth=70, depth=2, halt="none"),  # more than solve's slots
]
DEFAULTS = dict(depth=5, tol=0.1)


@pytest.mark.slow
def test_answers_are_those_of_solve_in_any_company_and_order(contractive, puzzles, backend):
    generator, count = random.Random(0), 1000 if backend == "cpu" else 40  # a step in PyTorch takes a millisecond
    cases = [(n, first, case) for case in CASES for n, first in ((None, 0), (None, 5), (3, 2))]
    tokens = [puzzles[first] if n is None else puzzles[first : first + n] for n, first, _ in cases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tolerances are below the noise
        rows = [t.reshape(-1, 6) for t in tokens]
        want = [
            contractive.solve(t, **{**DEFAULTS, **case}, backend=backend)
            for t, (_, _, case) in zip(rows, cases, strict=True)
        ]
        order = [generator.randrange(len(cases)) for _ in range(count)]
        with Engine(contractive, backend=backend, **DEFAULTS, quantum=2) as engine:
            with ThreadPoolExecutor(16) as clients:
                futures = list(clients.map(lambda i: engine.submit(tokens[i], **cases[i][2]), order))
            for i, future in zip(order, futures, strict=True):
                assert_equal(future.result(PATIENCE), want[i], str(cases[i]))
        stats = engine.stats()
    assert (stats.submitted, stats.completed, stats.failed, stats.cancelled) == (count, count, 0, 0)
    assert stats.steps == sum(int(want[i].nfe.sum()) for i in order)
    assert sum(stats.steps_histogram.values()) == sum(want[i].all_steps.numel() for i in order)
    assert stats.in_flight == stats.queued == stats.requests == 0


@pytest.mark.parametrize("policy", ["least_service", "fifo"])
def test_none_is_lost_where_clients_do_anything(contractive, puzzles, backend, policy):
    """Cancelled, late, refused, failing and raced requests of several threads: each ends once, and all room is free."""

    def fail(update: StepUpdate) -> None:
        raise ZeroDivisionError

    kinds: list[dict[str, Any]] = [
        dict(),
        dict(deadline=0.002),
        dict(deadline=0.02, **ENDLESS),
        dict(on_step=fail),
        dict(breadth=7, select="first"),
        dict(block=True),
        dict(block=True, deadline=0.01),
    ]

    def client(number: int) -> Counter[str]:
        generator, ends = random.Random(number), Counter[str]()
        for _ in range(25):
            try:
                future = engine.submit(puzzles[generator.randrange(12)], **generator.choice(kinds))
            except (QueueFull, DeadlineExceeded):
                continue
            if generator.random() < 0.3:
                future.cancel()
            assert future in wait([future], PATIENCE).done
            error = CancelledError() if future.cancelled() else future.exception(0)
            ends[type(error).__name__] += 1
        return ends

    with Engine(
        contractive, backend=backend, policy=policy, max_in_flight=6, max_queued=3, quantum=2, **DEFAULTS
    ) as engine:
        with ThreadPoolExecutor(8) as clients:
            ends = sum(clients.map(client, range(8)), Counter[str]())
        until(lambda: engine.stats().in_flight == 0)
        stats = engine.stats()
    assert set(ends) <= {"NoneType", "CancelledError", "DeadlineExceeded", "ZeroDivisionError"}
    assert (stats.completed, stats.cancelled) == (ends["NoneType"], ends["CancelledError"])
    assert stats.failed == ends["DeadlineExceeded"] + ends["ZeroDivisionError"]
    assert stats.submitted == sum(ends.values()) and (stats.queued, stats.requests) == (0, 0)


def test_a_race_has_the_winner_of_solve(contractive, puzzles, backend):
    rules = dict(breadth=6, select="first", halt="residual", tol=0.05, depth=12, backend=backend)
    with Engine(contractive, **rules) as engine:
        futures = [engine.submit(puzzle) for puzzle in puzzles[:6]]
        for i, future in enumerate(futures):
            result, want = future.result(PATIENCE), contractive.solve(puzzles[i : i + 1], **rules)
            for name in ("preds", "logits", "steps", "restart", "residual", "score", "converged"):
                assert_equal(getattr(result, name), getattr(want, name), name)


def test_ids_and_states_are_a_requests_own(contractive, puzzles, backend):
    first = contractive.solve(puzzles[:2], depth=3, halt="none", return_state=True, backend=backend)
    start = contractive.initial_state(puzzles[:2])._replace(
        z_H=first.z_H.clone(), z_L=first.z_L, step=torch.full((2,), 3, dtype=torch.int64)
    )
    cases = [dict(initial_state=start), dict(ids=torch.tensor([7, -1]), noise_scale=0.01)]
    with Engine(contractive, backend=backend, depth=4, halt="none") as engine:
        futures = [engine.submit(puzzles[:2], **case) for case in cases]
        start.z_H.fill_(torch.nan)  # the engine has a copy
    start.z_H.copy_(first.z_H)
    for case, future in zip(cases, futures, strict=True):
        want = contractive.solve(puzzles[:2], depth=4, halt="none", backend=backend, **case)
        assert_equal(future.result(PATIENCE), want)


def test_an_empty_batch_gives_an_empty_result(contractive, puzzles, backend):
    with Engine(contractive, backend=backend, tol=0.1) as engine:
        assert_equal(engine.submit(puzzles[:0]).result(0), contractive.solve(puzzles[:0], tol=0.1, backend=backend))


def test_weights_are_read_at_submit(puzzles, backend):
    model = make_contractive(tiny_config())
    rules = dict(depth=4, halt="none", backend=backend)
    with Engine(model, **rules, max_in_flight=1) as engine, busy(engine, puzzles[0]):
        want, futures = [], []
        for _ in range(3):
            want.append(model.solve(puzzles[:1], **rules))
            futures.append(engine.submit(puzzles[0]))
            with torch.no_grad():
                model.lm_head.weight.data.mul_(-1.5)  # leaves no trace but the bytes
            model.config = EqRConfig.from_dict({**model.config.to_dict(), "lambda_": 0.5 + 0.1 * len(want)})
        until(lambda: engine.stats().queued == 3)
    for future, result in zip(futures, want, strict=True):
        assert_equal(future.result(PATIENCE), result)


MODELS: dict[str, dict[str, Any]] = {
    "attention": dict(mlp_t=False),
    "rope2d": dict(mlp_t=False, pos_encodings="rope2d", seq_len=9),
    "noise": dict(noise_scale=0.02),
    "fixed start": dict(fixed_init=True, lambda_=1.0),
}


@pytest.mark.parametrize("kind", [*MODELS, "parametrised", "float64"])
def test_every_kind_of_operator_is_read_whole(kind):
    model = make_contractive(tiny_config(**MODELS.get(kind, {})))
    if kind == "parametrised":
        parametrizations.weight_norm(model.lm_head)
    if kind == "float64":
        model.double()
    tokens, rules = torch.arange(model.config.seq_len)[None] % 7, dict(depth=3, halt="none", backend="reference")
    state = torch.get_rng_state()
    with Engine(model, **rules) as engine:
        want = model.solve(tokens, **rules)
        assert_equal(engine.submit(tokens).result(PATIENCE), want)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_modified_model_runs_through_its_modules_and_a_raising_hook_fails_its_request_alone(puzzles):
    model = make_contractive(tiny_config())
    rules = dict(depth=6, tol=0.02)
    with Engine(model, **rules) as engine:
        plain = engine.submit(puzzles[0])
        assert plain.result(PATIENCE).backend == engine.backend
        handle = model.lm_head.register_forward_hook(lambda module, inputs, output: -output)
        hooked = engine.submit(puzzles[0]).result(PATIENCE)
        assert_equal(hooked, model.solve(puzzles[:1], **rules))
        assert hooked.backend == "reference" and "lm_head has a forward hook" in hooked.backend_reason
        handle.remove()

        def fail(module: object, inputs: object, output: object) -> None:
            raise SystemExit("of the hook")

        handle = model.lm_head.register_forward_hook(fail)
        poisoned = engine.submit(puzzles[0])
        with pytest.raises(SystemExit, match="of the hook"):
            poisoned.result(PATIENCE)
        handle.remove()
        assert_equal(engine.submit(puzzles[0]).result(PATIENCE), plain.result())
        assert (engine.stats().failed, engine.stats().in_flight) == (1, 0)


def test_a_short_request_overtakes_a_long_one_and_not_with_fifo(contractive, puzzles):
    """By counts of steps: what had been spent on the long one when the short one was answered."""
    long, short = dict(depth=2000, breadth=8, halt="none"), dict(depth=3, halt="none")
    for policy in ("least_service", "fifo"):
        seen: list[StepUpdate] = []
        done_at: list[int] = []
        begun = threading.Event()

        def watch(update: StepUpdate, seen: list[StepUpdate] = seen, begun: threading.Event = begun) -> None:
            seen.append(update)
            if len(seen) == 1:
                begun.wait(PATIENCE)  # until the short one is in the queue

        with Engine(contractive, backend="reference", policy=policy, quantum=4) as engine:
            first = engine.submit(puzzles[0], on_step=watch, **{**long, "depth": 2000 if policy != "fifo" else 50})
            until(lambda seen=seen: bool(seen))
            second = engine.submit(puzzles[1], **short)
            second.add_done_callback(lambda _, seen=seen, done_at=done_at: done_at.append(len(seen)))
            begun.set()
            assert_equal(second.result(PATIENCE), contractive.solve(puzzles[1:2], backend="reference", **short))
            if policy == "least_service":
                assert done_at[0] == 8 and not first.done()  # after the outer step that was going on when it came
                first.cancel()
            else:
                assert done_at[0] == 50 * 8 and first.done()


def test_what_runs_beside_each_other_is_bounded(contractive, puzzles):
    with Engine(contractive, backend="reference", max_in_flight=5, **ENDLESS) as engine:
        futures = [engine.submit(puzzles[i], breadth=2) for i in range(4)]
        until(lambda: engine.stats().in_flight == 4 and engine.stats().queued == 2)
        futures[0].cancel()
        until(lambda: engine.stats().queued == 1 and engine.stats().in_flight == 4)
        for future in futures:
            future.cancel()
        more_than_fits = engine.submit(puzzles[0], breadth=9, depth=2)
        assert more_than_fits.result(PATIENCE).all_steps.tolist() == [[2] * 9]


@pytest.mark.parametrize("begun", [True, False])
def test_a_cancelled_request_stops_and_others_go_on(contractive, puzzles, backend, begun):
    with Engine(contractive, backend=backend, max_in_flight=1, depth=3, halt="none") as engine:
        with busy(engine, puzzles[0]) as running:
            waiting = engine.submit(puzzles[1])
            last = engine.submit(puzzles[2])
            future = running if begun else waiting
            assert future.cancel() and future.cancel() and future.cancelled() and future in wait([future]).done
            with pytest.raises(CancelledError):
                future.result(0)
        assert last.result(PATIENCE).steps.tolist() == [3] and not last.cancel()
        until(lambda: engine.stats().requests == 0)
        stats = engine.stats()
        assert (stats.cancelled, stats.completed, stats.in_flight, stats.queued) == (
            1 if begun else 2,
            2 - (not begun),
            0,
            0,
        )


@pytest.mark.parametrize("begun", [True, False])
def test_a_deadline_is_kept_also_by_one_that_waits(contractive, puzzles, backend, begun):
    with Engine(contractive, backend=backend, max_in_flight=1, depth=3, halt="none") as engine:
        if begun:
            late = engine.submit(puzzles[0], deadline=0.05, **ENDLESS)
            with pytest.raises(DeadlineExceeded, match="deadline"):
                late.result(PATIENCE)
        else:
            with busy(engine, puzzles[0]) as running:
                late = engine.submit(puzzles[1], deadline=0.05)
                assert isinstance(late.exception(PATIENCE), TimeoutError) and not running.done()
                assert engine.stats().queued == 0
        in_time = engine.submit(puzzles[2], deadline=PATIENCE)
        assert in_time.result(PATIENCE).steps.tolist() == [3]
        assert engine.stats().failed == 1


def test_a_full_queue_refuses_or_lets_wait(contractive, puzzles, backend):
    with Engine(contractive, backend=backend, max_in_flight=1, max_queued=2, depth=3, halt="none") as engine:
        with busy(engine, puzzles[0]):
            waiting = [engine.submit(puzzle) for puzzle in puzzles[1:3]]
            with pytest.raises(QueueFull, match="2 requests wait, and max_queued=2 may; .*block=True"):
                engine.submit(puzzles[3])
            with pytest.raises(QueueFull):
                engine.submit(puzzles[3], block=True, timeout=0.01)
            with pytest.raises(DeadlineExceeded, match="waited for room"):
                engine.submit(puzzles[3], block=True, deadline=0.01)
            waiting[0].cancel()
            refilled = engine.submit(puzzles[3], block=True, timeout=0)
            with ThreadPoolExecutor(1) as client:
                patient = client.submit(engine.submit, puzzles[4], block=True)
                assert not patient.done()
                waiting[1].cancel()
                last = patient.result(PATIENCE)
        assert refilled.result(PATIENCE).steps.tolist() == last.result(PATIENCE).steps.tolist() == [3]
        assert engine.stats().submitted == 5


@pytest.mark.parametrize("cancel", [False, True])
def test_close_answers_what_was_submitted_or_cancels_it(contractive, puzzles, backend, cancel):
    engine = Engine(contractive, backend=backend, max_in_flight=1, max_queued=3, depth=3, halt="none")
    with ThreadPoolExecutor(2) as client:
        with busy(engine, puzzles[0]) as running:
            waiting = [engine.submit(puzzle) for puzzle in puzzles[1:4]]
            without_room = client.submit(engine.submit, puzzles[4], block=True)
            closing = client.submit(engine.close, cancel=cancel)
            with pytest.raises(EngineClosed):
                without_room.result(PATIENCE)
            assert engine.closed and (cancel or not closing.done())
            with pytest.raises(EngineClosed, match="the engine is closed; make another"):
                engine.submit(puzzles[0])
        closing.result(PATIENCE)
    assert running.cancelled() and [future.cancelled() for future in waiting] == [cancel] * 3
    engine.close()
    engine.close(cancel=True)
    Engine(contractive, depth=3).close()  # one that nobody asked anything


def test_leaving_the_with_block_by_an_error_cancels(contractive, puzzles, backend):
    with pytest.raises(KeyError), Engine(contractive, backend=backend, **ENDLESS) as engine:
        future = engine.submit(puzzles[0])
        raise KeyError
    assert future.cancelled() and engine.closed


def test_a_raising_callback_fails_its_request_alone(contractive, puzzles, backend):
    def fail(update: StepUpdate) -> None:
        raise ZeroDivisionError(update.step)

    def ends_the_program(_: object) -> None:
        raise SystemExit

    with Engine(contractive, backend=backend, depth=3, halt="none") as engine:
        other, poisoned = engine.submit(puzzles[0]), engine.submit(puzzles[1], on_step=fail)
        with pytest.raises(ZeroDivisionError):
            poisoned.result(PATIENCE)
        other.add_done_callback(ends_the_program) if not other.done() else None
        assert other.result(PATIENCE).steps.tolist() == engine.submit(puzzles[1]).result(PATIENCE).steps.tolist() == [3]
        assert (engine.stats().failed, engine.stats().completed) == (1, 2)


def test_callbacks_may_use_the_engine(contractive, puzzles, backend):
    """In its own thread: submit, which does not wait for room there, cancel and close."""
    results: list[Future[SolveResult]] = []

    def again(update: StepUpdate) -> None:
        if not results:
            results.append(engine.submit(puzzles[1]))
            with pytest.raises(QueueFull):
                engine.submit(puzzles[1], block=True)
            assert engine.stats().queued == 1
            engine.close()

    engine = Engine(contractive, backend=backend, max_in_flight=1, max_queued=1, depth=3, halt="none")
    first = engine.submit(puzzles[0], on_step=again)
    assert first.result(PATIENCE).steps.tolist() == [3]
    assert results[0].result(PATIENCE).steps.tolist() == [3]
    engine.close()


def test_as_completed_gives_each_once_and_keeps_the_queue_short(contractive, puzzles, backend):
    many = puzzles.repeat(2, 1)
    with Engine(contractive, backend=backend, max_in_flight=2, max_queued=3, depth=8, tol=0.05) as engine:
        got = dict(engine.as_completed(many, breadth=2))
        assert sorted(got) == list(range(24))
        for i in range(12):
            want = contractive.solve(puzzles[i : i + 1], depth=8, tol=0.05, breadth=2, backend=backend)
            assert_equal(got[i], want)
            assert_equal(got[i + 12], want)
        assert list(engine.as_completed([])) == []
        for _, result in engine.as_completed(iter(many[:9]), depth=2, halt="none"):
            assert result.steps.tolist() == [2]
            break
        with pytest.raises(ValueError, match=r"tokens must be in 0\.\.6, got 9"):
            list(engine.as_completed([puzzles[0], torch.full((6,), 9)]))
        with pytest.raises(TypeError, match="as_completed waits for room as long as it takes; leave out block"):
            list(engine.as_completed(many, block=True))
        stats = engine.stats()
    stats = engine.stats()
    assert stats.submitted == stats.completed + stats.cancelled and stats.failed == 0


def test_engines_do_not_meet(contractive, puzzles, backend):
    other = make_contractive(tiny_config(), seed=1)
    with Engine(contractive, backend=backend, **DEFAULTS) as one, Engine(other, backend=backend, **DEFAULTS) as two:
        futures = [
            (model, engine.submit(puzzles[0])) for _ in range(5) for model, engine in ((contractive, one), (other, two))
        ]
        for model, future in futures:
            assert_equal(future.result(PATIENCE), model.solve(puzzles[:1], backend=backend, **DEFAULTS))


ERRORS = [
    (dict(depht=3), "submit has no option 'depht'. Options: depth, breadth"),
    (dict(slots=3), "submit has no option 'slots'; max_in_flight"),
    (dict(progress=print), "submit has no option 'progress'; a request is followed with on_step"),
    (dict(backend="cpu"), "backend is the engine's, not a request's"),
    (dict(on_step=3), "on_step must be a function or None, got 3"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_what_is_no_option_is_named(contractive, puzzles, options, message):
    with Engine(contractive, tol=0.1) as engine, pytest.raises(TypeError, match=message.replace(".", r"\.")):
        engine.submit(puzzles[0], **options)


def test_the_engine_checks_its_own_arguments(contractive):
    for options, message in [
        (dict(ids=None), "ids is a request's, not the engine's"),
        (dict(on_step=print), "Engine has no option 'on_step'"),
        (dict(depth=True), "depth must be an int"),
    ]:
        with pytest.raises(TypeError, match=message):
            Engine(contractive, **options)
    for options, message in [
        (dict(max_in_flight=0), "max_in_flight must be at least 1"),
        (dict(max_queued=0), "max_queued must be at least 1"),
        (dict(quantum=0), "quantum must be at least 1"),
        (dict(policy="lifo"), "policy must be one of least_service, fifo, got 'lifo'"),
        (dict(backend="none"), "backend='none' is not a backend"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine(contractive, **options)


REFUSED: list[dict[str, Any]] = [
    dict(depth=0),
    dict(tol=-1.0),
    dict(tol="slow"),
    dict(select="best"),
    dict(checkpoints=3),
    dict(checkpoints=(99,)),
    dict(seed=-1),
    dict(ids=torch.zeros(2)),
    dict(select="first", halt="none"),
    dict(window=0),
]


@pytest.mark.parametrize("options", REFUSED)
def test_arguments_are_refused_in_the_words_of_solve(contractive, puzzles, options):
    """And a tensor of a wrong kind is too."""
    with Engine(contractive, tol=0.1) as engine:
        for tokens in (puzzles[:1], puzzles.float(), puzzles[:, :5], None):
            with pytest.raises((TypeError, ValueError)) as theirs:
                contractive.solve(tokens, **{"tol": 0.1, **options})
            with pytest.raises(theirs.type) as ours:
                engine.submit(tokens, **options)
            assert str(ours.value) == str(theirs.value)
        assert engine.stats().submitted == 0


def test_weights_without_sound_values_are_refused_as_by_solve(puzzles):
    model = make_contractive(tiny_config())
    with Engine(model, depth=2, halt="none") as engine:
        for broken in (True, True, False):
            with torch.no_grad():
                model.lm_head.weight[0, 0] = torch.nan if broken else 0.0
            if not broken:
                want = model.solve(puzzles[:1], depth=2, halt="none")
                assert_equal(engine.submit(puzzles[0]).result(PATIENCE), want)
                continue
            for ask in (engine.submit, model.solve, lambda _: Engine(model)):
                with pytest.raises(RuntimeError, match="weight lm_head.weight holds 1 non-finite values"):
                    ask(puzzles[:1])
    with pytest.raises(RuntimeError, match="the model's weights are on the meta device and hold no values"):
        Engine(model.to("meta"))


def test_limits_may_be_larger_than_any_count(contractive, puzzles, backend):
    limits = dict(max_in_flight=2**64, max_queued=2**64, quantum=2**64)
    with Engine(contractive, backend=backend, **limits, depth=2, halt="none") as engine:
        assert engine.submit(puzzles[0]).result(PATIENCE).preds.shape == (1, 6)


def test_times_are_checked(contractive, puzzles):
    with Engine(contractive, tol=0.1) as engine:
        for options, message in [
            (dict(deadline=-1), "deadline must be finite and not negative, got -1"),
            (dict(timeout=1), "timeout is for block=True, got timeout=1 without it"),
            (dict(timeout=-1, block=True), "timeout must be finite and not negative"),
        ]:
            with pytest.raises(ValueError, match=message):
                engine.submit(puzzles[0], **options)


def test_warnings_are_those_of_solve_and_name_the_callers_line(contractive, puzzles):
    rules = dict(tol=1e-9, noise_scale=0.1, depth=2)
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        contractive.solve(puzzles[:1], **rules)
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        engine = Engine(contractive, **rules)
        assert not ours
        engine.submit(puzzles[0])
        engine.stream(puzzles[0])
        list(engine.as_completed(puzzles[:1]))
        engine.close()
    assert [str(w.message) for w in ours] == [str(theirs[0].message)] * 3
    assert {w.filename for w in (*ours, *theirs)} == {__file__}


def test_requests_of_any_thread_state_are_answered(contractive, puzzles, backend):
    """Inference mode, autocast and gradients of the caller's thread do not reach the engine's."""
    want = contractive.solve(puzzles[:1], backend=backend, **DEFAULTS)
    with Engine(contractive, backend=backend, **DEFAULTS) as engine:
        with torch.inference_mode():
            inferred = engine.submit(puzzles.clone()[0])
        with torch.autocast("cpu", torch.bfloat16):
            cast = engine.submit(puzzles[0])
        for future in (inferred, cast):
            result = future.result(PATIENCE)
            assert_equal(result, want)
            assert not result.logits.is_inference() and not result.logits.requires_grad
