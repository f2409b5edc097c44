"""The ops pack_weights, fixed_point, trajectory_bytes and fingerprint: checks, torch's own op checks, threads, control.

What they compute is tested in test_outer_step.py and, against the reference backend, in tests/solve.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from eqr_kernels import Status, ops, selection
from eqr_kernels.precision import NAMED, Precision
from eqr_kernels.reference import BlockWeights, OperatorWeights
from eqr_kernels.run_rules import RunRules
from tests.support.environment import BUILT, REPOSITORY, WHY_NOT_BUILT, needs_compiler
from tests.support.fixed_point_op import (
    FOREVER,
    D,
    S,
    V,
    call,
    endless,
    grids,
    operator,
    pack,
    problem,
    run,
    same,
    weights,
    with_size,
)

pytestmark = pytest.mark.skipif(not BUILT, reason=WHY_NOT_BUILT)

ISAS = ops.cpu_isas() if BUILT else []
PRECISIONS = tuple(precision.name for precision in NAMED)


# ---- torch's own checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(checkpoints=(), trace=False, breadth=1),
        # NaN is not equal to itself: what ended early leaves none behind without a trace.
        dict(halt="residual", tol=0.3, select="vote", trace=False, noise_scale=0.0),
        dict(halt="q", select="q", trace=False),
    ],
    ids=["all", "least", "vote", "q"],
)
def test_opcheck_of_fixed_point(changes: dict[str, Any]) -> None:
    arguments = (pack(**weights()).data, *problem(**changes).values())
    torch.library.opcheck(torch.ops.eqr_kernels.fixed_point.default, arguments)


@pytest.mark.parametrize("started", [False, True])
def test_opcheck_of_states(started: bool) -> None:
    given = tuple(starts(12)) if started else (None, None, None)
    arguments = (pack(**weights()).data, *problem(trace=False).values(), *given, True)
    torch.library.opcheck(torch.ops.eqr_kernels.fixed_point.default, arguments)


def starts(trajectories: int) -> ops.StartStates:
    z_H, z_L = torch.ones(2, trajectories, S, D)
    return ops.StartStates(z_H, z_L, torch.zeros(trajectories, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(z_H=torch.ones(12, S, D + 1)), r"start_H must be .*\[12, 6, 16\]"),
        (dict(z_L=torch.ones(12, S, D, dtype=torch.float64)), "start_L must be .*float32"),
        (dict(rng=torch.zeros(11, 4, dtype=torch.int64)), r"start_rng must be .*\[12, 4\]"),
        (dict(rng=None), "start_H, start_L and start_rng must all be given or all be None"),
    ],
)
def test_start_states_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = (pack(**weights()).data, *problem().values(), *starts(12)._replace(**changes), False)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        torch.ops.eqr_kernels.fixed_point.default(*arguments)


def turns(every: int = 2, **changes: Any) -> ops.TurnCells:
    cells = torch.stack([torch.randperm(S, generator=torch.Generator().manual_seed(k)) for k in range(12)])
    return ops.TurnCells(cells.unflatten(0, (4, 3)), every)._replace(**changes)


def test_opcheck_of_turns() -> None:
    arguments = (pack(**weights()).data, *problem(trace=False).values(), None, None, None, False, *turns())
    torch.library.opcheck(torch.ops.eqr_kernels.fixed_point.default, arguments)


@pytest.mark.parametrize(
    ("changes", "keep_states", "message"),
    [
        (dict(cells=torch.arange(S).expand(4, 1, S)), False, "turn_cells must be .*contiguous"),
        (dict(cells=torch.zeros(4, 0, S, dtype=torch.int64)), False, r"turn_cells must be .*\[N, V >= 1, S\]"),
        (dict(cells=torch.zeros(3, 2, S, dtype=torch.int64)), False, r"turn_cells must be .*\[4, 2, 6\]"),
        (dict(cells=torch.zeros(4, 2, S)), False, "turn_cells must be .*int64"),
        (dict(cells=torch.zeros(4, 2, S, dtype=torch.int64)), False, "each of 0..5 once in every row, got 0 in row 0"),
        (dict(cells=torch.arange(1, S + 1).repeat(4, 2, 1)), False, "once in every row, got 6 in row 0"),
        (dict(every=0), False, "turn_every must be at least 1 with turn_cells, and 0 without, got 0"),
        (dict(every=-1), False, "turn_every"),
        (dict(), True, "keep_states must be False with turn_cells"),
    ],
)
def test_turns_that_make_no_sense_are_named(changes: dict[str, Any], keep_states: bool, message: str) -> None:
    given = (None, None, None, keep_states, *turns(**changes))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        torch.ops.eqr_kernels.fixed_point.default(pack(**weights()).data, *problem().values(), *given)


def test_opcheck_of_trajectory_bytes_and_fingerprint() -> None:
    packed = pack(**weights()).data
    torch.library.opcheck(torch.ops.eqr_kernels.trajectory_bytes.default, (packed, 3))
    tensors = [packed, torch.ones(2, 3, dtype=torch.bfloat16)]
    torch.library.opcheck(torch.ops.eqr_kernels.fingerprint.default, (tensors,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", True, marks=needs_compiler)],
)
def test_compiles_in_one_graph(backend: str, dynamic: bool) -> None:
    w, rules = weights(), RunRules(*list(problem().values())[6:])
    described = ops.Operator(**operator())
    names = ("embedding", "lm_head", "q_weight", "q_bias")

    def answer(heads: list[Tensor], blocks: list[Tensor], tokens: Tensor, ids: Tensor, control: Tensor) -> Any:
        doubled = OperatorWeights(*heads, (BlockWeights(*(2 * b for b in blocks)),))
        packed = ops.pack_weights(doubled, described, Precision.bf16)
        result = ops.fixed_point(packed, tokens + 0, ids, control, rules)
        return result, result.logits.sum() + control.sum()

    compiled = torch.compile(answer, fullgraph=True, backend=backend, dynamic=dynamic)
    try:
        for n in (4, 7):
            p, controls = problem(n), [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
            arguments = ([w[name] for name in names], w["blocks"], p["tokens"], p["ids"])
            (got, total), (want, expected) = compiled(*arguments, controls[0]), answer(*arguments, controls[1])
            assert same(got, want) and controls[0].tolist() == controls[1].tolist() == [0, 3 * n, 18 * n]
            torch.testing.assert_close(total, expected)
    finally:
        torch._dynamo.reset()


def test_gradient_is_refused() -> None:
    arguments = weights()
    arguments["blocks"][2].requires_grad_()
    expected = r"blocks\[2\] requires a gradient, and pack_weights has none; call it under torch.no_grad"
    with pytest.raises(RuntimeError, match=expected):
        pack(**arguments)
    with torch.no_grad():
        assert not pack(**arguments).data.requires_grad


# ---- arguments -----------------------------------------------------------------------------------------------------


BAD_PROBLEMS = [
    (dict(tokens=torch.zeros(4, S)), TypeError, r"tokens must be a torch.int64 tensor \[N, 6\], got torch.float32"),
    (dict(tokens=torch.zeros(4, dtype=torch.int64)), ValueError, r"tokens must have shape \[N, 6\], got \[4\]"),
    (
        dict(tokens=torch.zeros(4, S + 1, dtype=torch.int64)),
        ValueError,
        r"tokens must have shape \[N, 6\], got \[4, 7\]",
    ),
    (dict(sizes=(S, D)), ValueError, r"sizes must be 10 integers .*, got 2"),
    (dict(constants=(0.5,)), ValueError, r"constants must be 4 numbers .*, got 1"),
    (dict(tokens=torch.zeros(S, 4, dtype=torch.int64).T), ValueError, "tokens must be contiguous"),
    (dict(ids=torch.zeros(3, dtype=torch.int64)), ValueError, r"ids must have shape \[4\], got \[3\]"),
    (dict(control=torch.zeros(2, dtype=torch.int64)), ValueError, r"control must have shape \[3\], got \[2\]"),
    (dict(control=torch.zeros(3)), TypeError, "control must be a torch.int64 tensor"),
    (dict(seed=-1), ValueError, "seed must be in 0..4294967295, got -1"),
    (dict(breadth=0), ValueError, "breadth must be in 1..4294967295, got 0"),
    (dict(depth=2**24), ValueError, "depth must be in 1..16777215, got 16777216"),
    (dict(patience=0), ValueError, "patience must be in 1.."),
    (dict(window=0), ValueError, "window must be in 1.."),
    (dict(slots=0), ValueError, "slots must be in 1.."),
    (dict(halt="never"), ValueError, r"halt must be one of residual, q, residual\+q, residual\|q, none, got 'never'"),
    (dict(select="best"), ValueError, "select must be one of residual, vote, q, first, got 'best'"),
    (dict(select="first"), ValueError, "select='first' needs a halting rule, got halt='none'"),
    (dict(tol=-1.0), ValueError, "tol must be at least 0, got -1"),
    (dict(tol=float("nan")), ValueError, "tol must be at least 0, got nan"),
    (dict(noise_scale=float("inf")), ValueError, "noise_scale must be finite and at least 0, got inf"),
    (dict(checkpoints=(5, 2)), ValueError, r"checkpoints must rise and be in 1..depth=6, got \[5, 2\]"),
    (dict(checkpoints=(2, 2)), ValueError, "checkpoints must rise"),
    (dict(checkpoints=(7,)), ValueError, r"checkpoints must rise and be in 1..depth=6, got \[7\]"),
    (dict(depth=2.5), RuntimeError, "Expected a value of type 'int' for argument 'depth'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_PROBLEMS, ids=[str(list(b[0])) for b in BAD_PROBLEMS])
def test_bad_problems_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    packed = pack(**weights())
    with pytest.raises(error, match=message):
        run(packed, **change)
    if not any(isinstance(value, (float, bool)) for value in change.values()) or error is ValueError:
        name = next(iter(change))
        with pytest.raises(ValueError, match=f"{name}.* must |{name}='first' needs"):
            torch.ops.eqr_kernels.fixed_point(packed.data, *problem(**change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=torch.full((4, S), V)), "tokens must be in 0..6, got 7 in row 0"),
        (dict(tokens=torch.tensor([[0] * S] * 3 + [[0, -1, 0, 0, 0, 0]])), "tokens must be in 0..6, got -1 in row 3"),
        (with_size(2, V + 1), r"sizes must be those of the packed weights, \[6, 16, 7, .*\], got \[6, 16, 8, "),
        (with_size(8, 3), r"sizes must be those of the packed weights"),
        (with_size(3, 1), r"\(mixer_hidden\) must be a multiple of 256, got 1"),
        (
            dict(constants=(0.5, 1e-5, 1.0, 1.0)),
            r"constants must be those of the packed weights, \[0.95, .*got \[0.5, ",
        ),
        (dict(fixed_start=True), "fixed_start must be that of the packed weights, 0, got 1"),
        (dict(breadth=2**32 - 1, n=2**9), r"N \* breadth must be at most 2\*\*40"),
    ],
)
def test_values_are_checked_in_the_op(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(pack(**weights()), **change)


def test_what_is_not_packed_weights_is_refused() -> None:
    packed, described = pack(**weights())
    longer = torch.cat([packed, packed])
    for bad, error, message in (
        (packed.float(), TypeError, "packed must be a uint8 tensor"),
        (packed.view(2, -1), ValueError, r"packed must have shape \[bytes\]"),
        (longer[::2], ValueError, "packed must be contiguous"),
        (torch.cat([packed[:1], packed])[1:], ValueError, r"multiple of 64 bytes.*use packed.clone\(\)"),
        (packed[: len(packed) // 2], ValueError, "pack"),
        (packed[:8], ValueError, "pack"),
        (packed[:0], ValueError, "pack"),
        (longer, ValueError, "pack"),
        (torch.zeros_like(packed), ValueError, "pack"),
        (torch.full_like(packed, 255), ValueError, "pack"),
    ):
        with pytest.raises(error, match=message):
            call(bad, problem())
        with pytest.raises(error, match=message):
            ops.trajectory_bytes(ops.PackedWeights(bad, described))


def test_no_rows_are_no_mistake() -> None:
    out = run(pack(**weights()), n=0)
    assert out.logits.shape == (0, S, V) and out.at_preds.shape == (2, 0, S) and out.residuals.shape == (0, 6)


# How trajectories end: the rules of the run, whether a word is not a number, and the statuses that then occur.
ENDS: dict[str, tuple[dict[str, Any], bool, set[Status]]] = {
    "at the depth": ({}, False, {Status.MAX_DEPTH}),
    "all alike": (dict(fixed_start=True, noise_scale=0.0), False, {Status.MAX_DEPTH}),
    "settled or not": (dict(halt="residual", tol=0.06, noise_scale=0.0), False, {Status.CONVERGED, Status.MAX_DEPTH}),
    "halted or not": (dict(halt="q"), False, {Status.HALTED, Status.MAX_DEPTH}),
    "settled by both": (dict(halt="residual+q", tol=0.06), False, {Status.CONVERGED, Status.MAX_DEPTH}),
    "settled by either": (
        dict(halt="residual|q", tol=0.06),
        False,
        {Status.CONVERGED, Status.HALTED, Status.MAX_DEPTH},
    ),
    "diverged": (dict(halt="residual", tol=0.3), True, {Status.CONVERGED, Status.DIVERGED}),
    "cancelled": (dict(control=[1, 0, 0]), False, {Status.CANCELLED}),
}


@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("end", ENDS)
def test_the_winner_is_the_one_that_selection_chooses(end: str, rule: str, restore: None) -> None:
    rules, no_number, statuses = ENDS[end]
    n, breadth, race = 12, 8, rule == "first"
    changes: dict[str, Any] = {**(dict(halt="q") if race else {}), **rules}
    w = weights(fixed_start=changes.get("fixed_start", False))
    if no_number:
        w["embedding"][V - 1] = torch.nan
    control = torch.tensor(changes.pop("control", [0, 0, 0]))
    torch.set_num_threads(2)
    out = run(pack(**w), n=n, breadth=breadth, select=rule, slots=5, control=control, **changes)
    assert torch.equal(out.winner, selection.select(rule, *grids(out, breadth)))
    assert torch.equal(out.logits.argmax(-1), out.preds[torch.arange(n) * breadth + out.winner])
    occurred = set(map(Status, out.status.tolist()))
    assert occurred <= statuses | {Status.HALTED, Status.CANCELLED} if race else occurred == statuses


# ---- packing -------------------------------------------------------------------------------------------------------


def test_trajectory_bytes_grow_with_the_window_alone() -> None:
    packed = pack(**weights())
    state = 2 * 4 * S * D
    assert ops.trajectory_bytes(packed, 1) > state
    assert ops.trajectory_bytes(packed) < ops.trajectory_bytes(packed, 1000)
    with pytest.raises(ValueError, match="window must be in 1.."):
        ops.trajectory_bytes(packed, 0)


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mixer", ["mlp_t", "attention"])
def test_same_bits_for_any_threads_and_slots(isa: str, precision: str, mixer: str, restore: None) -> None:
    ops.set_cpu_isa(isa)
    packed, settings = pack(**weights(mixer, precision=precision)), operator(mixer)
    torch.set_num_threads(1)
    expected = run(packed, **settings)
    for threads, slots in ((1, 1), (2, 1), (2, 64), (3, 2), (64, 2)):
        torch.set_num_threads(threads)
        assert same(run(packed, slots=slots, **settings), expected), (threads, slots)
    alone = run(packed, n=1, **settings)
    assert torch.equal(alone.logits[0], expected.logits[0]) and torch.equal(alone.residuals, expected.residuals[:3])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pins a process to CPUs")
def test_same_bits_where_the_process_is_pinned(restore: None) -> None:
    packed, cpus = pack(**weights()), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    expected = run(packed)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        for threads, slots in ((1, 64), (2, 1), (3, 64), (64, 2)):
            torch.set_num_threads(threads)
            assert same(run(packed, slots=slots), expected), (threads, slots)
    finally:
        os.sched_setaffinity(0, cpus)


def test_each_threads_treatment_of_denormals_is_out_of_it(restore: None) -> None:
    arguments = weights()
    arguments["lm_head"] = arguments["lm_head"] * 1e-39
    packed = pack(**arguments)
    expected = run(packed)
    assert (expected.logits != 0).any(), "the logits should be denormal, not zero"
    torch.set_flush_denormal(True)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert same(run(packed), expected), threads
        assert (torch.tensor([1e-39]) * 0.5).item() == 0, "the caller's own setting should stay"
    finally:
        torch.set_flush_denormal(False)


THREADS = """
import os, sys, torch
sys.path.insert(0, {repository!r})
from eqr_kernels import ops
from tests.support.fixed_point_op import pack, run, weights
packed = pack(**weights())
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
for n in (1, 3, 2):
    torch.set_num_threads(n)
    run(packed, n=8)
    print(n, threads() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_the_number_of_threads_is_torchs() -> None:
    script = THREADS.format(repository=str(REPOSITORY))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    # The pool of OpenMP keeps at most what the last region needed.
    counts = {int(n): int(more) for n, more in (line.split() for line in done.stdout.splitlines())}
    assert counts[1] == 0 and counts[3] == 2 and counts[2] <= 2, (counts, done.stderr)


def test_inside_a_parallel_region_it_runs_on_one_thread(restore: None) -> None:
    # The outer op asks from inside torch's parallel region; what it asks for is another op.
    packed = pack(**weights())
    expected, inner = run(packed), []
    torch.set_num_threads(2)
    outer_control = torch.zeros(3, dtype=torch.int64)

    def ask() -> bool:
        inner.append(run(packed))
        return False

    run(packed, ask=ask, depth=FOREVER, checkpoints=(), trace=False, control=outer_control)
    assert len(inner) == 1 and same(inner[0], expected)
    assert same(run(packed), expected)


def test_concurrent_calls_get_the_answers_they_get_alone(restore: None) -> None:
    packs = [pack(**weights(precision=precision)) for precision in PRECISIONS]
    options: dict[str, Any] = dict(n=4, depth=20, checkpoints=(2, 9))
    alone = [run(packed, **options) for packed in packs]
    torch.set_num_threads(2)
    results: dict[tuple[int, int], ops.FixedPointOutput] = {}

    def work(i: int) -> None:
        for repeat in range(4):
            results[i, repeat] = run(packs[i], **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(packs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 12 and all(same(result, alone[i]) for (i, _), result in results.items())


# ---- control, asking and interrupts --------------------------------------------------------------------------------


def test_control_counts_what_is_done() -> None:
    control = torch.zeros(3, dtype=torch.int64)
    out = run(pack(**weights()), control=control, halt="residual", tol=0.3, noise_scale=0.0)
    assert control.tolist() == [0, 12, int(out.steps.sum())] and out.steps.sum() < 72


def test_cancelled_before_it_began() -> None:
    control = torch.tensor([1, 0, 0])
    out = run(pack(**weights()), **endless(control))
    assert (out.status == Status.CANCELLED).all() and (out.steps == 0).all() and (out.preds == 0).all()
    assert out.residual.isnan().all() and out.score.isnan().all() and (out.logits == 0).all()
    assert control.tolist() == [1, 12, 0]


@pytest.mark.parametrize("threads", [1, 2])
def test_another_thread_reads_and_cancels(threads: int, restore: None) -> None:
    torch.set_num_threads(threads)
    packed, control, spent = pack(**weights()), torch.zeros(3, dtype=torch.int64), []

    def watch() -> None:
        while len(set(spent)) < 5:
            spent.append(int(control[2]))
            time.sleep(0.001)
        control[0] = 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = run(packed, **endless(control))
    watcher.join(60)
    assert spent == sorted(spent) and len(set(spent)) == 5, "the op should let other threads run and see its progress"
    assert (out.status == Status.CANCELLED).all() and control[1] == 12 and int(control[2]) == int(out.steps.sum()) > 0
    assert (out.logits[(out.steps.view(4, 3) > 0).any(1)] != 0).any()


@pytest.mark.parametrize("threads", [1, 2])
def test_asking_can_cancel(threads: int, restore: None) -> None:
    torch.set_num_threads(threads)
    control, calls = torch.zeros(3, dtype=torch.int64), []

    def ask() -> bool:
        calls.append((threading.get_ident(), int(control[2])))
        return len(calls) < 3

    out = run(pack(**weights()), ask=ask, **endless(control))
    assert {ident for ident, _ in calls} == {threading.get_ident()} and len(calls) == 3
    assert [spent for _, spent in calls] == sorted({spent for _, spent in calls})
    assert (out.status == Status.CANCELLED).all() and int(out.steps.sum()) == int(control[2])


def test_what_asking_raises_is_raised_again() -> None:
    control, calls = torch.zeros(3, dtype=torch.int64), []

    def ask() -> bool:
        calls.append(0)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        run(pack(**weights()), ask=ask, **endless(control))
    assert len(calls) == 1 and control[1] == 12
    # A later call of the same thread asks nobody.
    assert (run(pack(**weights())).steps == 6).all() and len(calls) == 1


def test_an_error_of_the_caller_is_not_lost_behind_that_of_asking() -> None:
    def ask() -> bool:
        raise LookupError("no more")

    def call() -> None:
        p = problem(**endless(torch.zeros(3, dtype=torch.int64)))
        torch.ops.eqr_kernels.fixed_point(pack(**weights()).data, *p.values())
        raise ZeroDivisionError

    with pytest.raises(LookupError) as caught:
        ops.library.require().with_poll(call, ask)
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        ops.library.require().with_poll(lambda: 1 / 0, None)


INTERRUPT = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from the start
sys.path.insert(0, {repository!r})
from eqr_kernels import ops
from tests.support.fixed_point_op import endless, pack, run, weights
torch.set_num_threads({threads})
packed = pack(**weights())
print("ready", flush=True)
try:
    run(packed, **endless(torch.zeros(3, dtype=torch.int64), n={n}))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(("threads", "n"), [(1, 1), (2, 1), (2, 4)])
def test_ctrl_c_stops_it_at_once(threads: int, n: int) -> None:
    script = INTERRUPT.format(repository=str(REPOSITORY), threads=threads, n=n)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # into the loop, which would take some twenty minutes
        begun = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        # An outer step takes a tenth of a millisecond here, and signals are looked for every 20 ms.
        assert time.perf_counter() - begun < 5
        assert process.wait(60) == 0, process.stderr.read() if process.stderr else ""
    finally:
        process.kill()
        process.wait()
