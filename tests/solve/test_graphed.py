"""The reference backend's outer steps as graphs, with a stand-in for CUDA's that runs here."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eqr_kernels import EquilibriumReasoner, SolveResult, Status, scheduler
from eqr_kernels.backends import reference, steps
from eqr_kernels.backends.graphed import KEPT, GraphedStep, StepOutputs
from eqr_kernels.backends.reference import ReferenceBackend
from eqr_kernels.precision import Precision
from tests.support.environment import BUILT
from tests.support.graphs import CASES, inputs, install, solve, step
from tests.support.models import make_contractive, tiny_config


class Tape:
    """Stands in for CUDA graphs: a capture leaves its outputs unwritten, a replay runs the step again into them."""

    def __init__(self, why_not: str | None = None, failure: BaseException | None = None) -> None:
        self.reason, self.failure = why_not, failure
        self.warmed: list[int] = []
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def why_not(self) -> str | None:
        return self.reason

    def warm_up(self, run: Callable[[], StepOutputs]) -> StepOutputs:
        outputs = run()
        self.warmed.append(len(outputs.z_H))
        return outputs

    def capture(self, run: Callable[[], StepOutputs]) -> tuple[Callable[[], None], StepOutputs]:
        if self.failure is not None:
            raise self.failure
        outputs = StepOutputs(*(output.clone().fill_(torch.nan) for output in run()))
        n = len(outputs.z_H)
        self.captured.append(n)

        def replay() -> None:
            self.replayed.append(n)
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        return replay, outputs


@pytest.fixture
def tape(monkeypatch) -> Tape:
    """The graphs of backend="reference" in this test."""
    tape = Tape()
    install(monkeypatch, lambda device: tape)
    return tape


def assert_equal(got: object, want: object, name: str = "") -> None:
    """Equal bit for bit, tables at checkpoints too."""
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=name)
    elif isinstance(want, dict):
        assert isinstance(got, dict) and got.keys() == want.keys()
        for key in want:
            assert_equal(got[key], want[key], f"{name} {key}")
    elif hasattr(want, "__dataclass_fields__"):
        for field in want.__dataclass_fields__:
            if not field.startswith("backend"):
                assert_equal(getattr(got, field), getattr(want, field), f"{name} {field}")
    else:
        assert got == want, name


@pytest.mark.slow
@pytest.mark.parametrize("noise_scale", [0.0, 0.002])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=pytest.mark.skipif(not BUILT, reason="")), False])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_replayed_steps_are_the_eager_ones(puzzles, monkeypatch, options, compiled, noise_scale):
    model = make_contractive(tiny_config(noise_scale=noise_scale))
    if not compiled:
        monkeypatch.setattr(steps, "why_not_fused_update", lambda *_: "switched off by the test")
    want = solve(model, puzzles, **options)
    tape = Tape()
    install(monkeypatch, lambda device: tape)
    got = solve(model, puzzles, **options)
    assert_equal(got, want)
    assert got.backend_reason == want.backend_reason
    assert tape.replayed, "nothing was replayed"
    assert len(set(tape.captured)) == len(tape.captured), "a bucket was captured twice"
    assert set(tape.captured) <= set(tape.warmed) and len(set(tape.warmed)) == len(tape.warmed)


def test_rows_that_end_and_join_change_the_bucket(contractive, puzzles, tape):
    solve(contractive, puzzles, slots=12)
    assert tape.warmed[0] == 16 and tape.warmed == sorted(tape.warmed, reverse=True) and len(tape.warmed) > 2
    assert all(n == scheduler.bucket(n) for n in tape.warmed)


def test_few_sizes_and_little_padding():
    sizes = [scheduler.bucket(n) for n in range(1, 5000)]
    assert all(n <= size == scheduler.bucket(size) for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert sorted(set(sizes[:64])) == [1, 2, 4, 8, 16, 32, 64] and len(set(sizes)) < 70
    assert all(size < 1.13 * n for n, size in enumerate(sizes, 1) if n > 64)


def test_a_diverging_row_does_not_reach_the_others(contractive, puzzles, monkeypatch):
    with torch.no_grad():
        contractive.embed_tokens.embedding_weight[6] = 3e38
    puzzles = puzzles.clamp(max=5)
    puzzles[4, 2] = 6
    want = solve(contractive, puzzles, slots=5)
    tape = Tape()
    install(monkeypatch, lambda device: tape)
    assert_equal(solve(contractive, puzzles, slots=5), want)


def test_the_losers_of_a_race_stop_when_it_is_won(contractive, puzzles):
    seen: list[tuple[int, int, int]] = []
    race = solve(contractive, puzzles, breadth=6, slots=72, select="first", progress=lambda *now: seen.append(now))
    lost = race.all_status == Status.CANCELLED
    assert lost.any() and torch.equal(race.all_steps[lost], race.steps[:, None].expand_as(lost)[lost])
    assert seen[0] == (0, 72, 0) and seen[-1] == (72, 72, int(race.nfe.sum()))
    assert [finished for finished, _, _ in seen] == sorted(finished for finished, _, _ in seen)


def test_cancelling_keeps_what_there_is(contractive, puzzles, monkeypatch):
    def run() -> SolveResult:
        calls: list[int] = []
        return solve(contractive, puzzles, slots=8, progress=lambda *_: calls.append(1) or len(calls) < 7)

    want = run()
    tape = Tape()
    install(monkeypatch, lambda device: tape)
    assert_equal(run(), want)
    assert tape.replayed


def test_inputs_are_copied_to_buffers_that_stay():
    tape = Tape()
    graphed = GraphedStep(step, tape, 8, pytest.fail)
    addresses, outputs = set(), {}
    for call, n in enumerate([8, 8, 4, 4, 8, 2, 4, 2, 2, 8]):
        given = inputs(n, 10.0 * call)
        got = graphed(given)
        assert_equal(tuple(t.tolist() for t in got), tuple(t.tolist() for t in step(given)))
        if graphed.buffers is not None:
            addresses.add(tuple(t.data_ptr() for t in graphed.buffers))
        if n in tape.captured:
            assert outputs.setdefault(n, got) is got
    assert len(addresses) == 1
    assert tape.warmed == tape.captured == [8, 4, 2] and tape.replayed == [8, 4, 8, 4, 2, 2, 8]


def test_few_graphs_are_kept():
    tape = Tape()
    graphed = GraphedStep(step, tape, 8, pytest.fail, kept=2)
    for call, n in enumerate([8, 8, 4, 4, 8, 2, 2, 8, 4]):  # 4 is the one used least lately when 2 is captured
        given = inputs(n, float(call))
        assert torch.equal(graphed(given).z_H, step(given).z_H)
        assert len(graphed._captured) <= 2
    assert tape.captured == [8, 4, 2, 4] and KEPT >= 2


@pytest.mark.parametrize(
    ("tape", "reason"),
    [
        (Tape(why_not="the current stream is itself being captured"), "the current stream is itself being captured"),
        (Tape(failure=RuntimeError("a hook waits\nfor the device")), "an outer step cannot be captured: a hook waits"),
    ],
    ids=["captured already", "capture fails"],
)
def test_what_cannot_be_captured_runs_eagerly_and_says_so(contractive, puzzles, monkeypatch, tape, reason):
    want = solve(contractive, puzzles)
    install(monkeypatch, lambda device: tape)
    got = solve(contractive, puzzles)
    assert_equal(got, want)
    assert got.backend_reason == f"{want.backend_reason}; outer steps ran eagerly: {reason}"
    assert not tape.replayed


def test_a_solve_leaves_no_graph_behind(contractive, puzzles, tape):
    def alive() -> int:
        return sum(type(o) in (GraphedStep, reference._Trajectories) for o in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()  # a cycle would hold the graphs' memory until the next collection
    try:
        solve(contractive, puzzles, slots=5)
        assert tape.replayed and alive() == before
    finally:
        gc.enable()


def test_an_interrupt_in_a_capture_passes(contractive, puzzles, monkeypatch):
    tape = Tape(failure=KeyboardInterrupt())
    install(monkeypatch, lambda device: tape)
    with pytest.raises(KeyboardInterrupt):
        solve(contractive, puzzles)


class NoWaiting(TorchDispatchMode):
    """Raises where an operator needs a value on the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_cpu", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.seen.add(name)
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{name} by a mask waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [False, True])
def test_the_captured_step_never_waits_for_the_device(puzzles, monkeypatch, attention):
    monkeypatch.setattr(steps, "why_not_fused_update", lambda *_: "as on a GPU")
    positions = dict(mlp_t=False, pos_encodings="rope") if attention else {}
    model = make_contractive(tiny_config(noise_scale=0.01, **positions))
    seen: set[str] = set()

    class Watched(Tape):
        def capture(self, run: Callable[[], StepOutputs]) -> tuple[Callable[[], None], StepOutputs]:
            def watched() -> StepOutputs:
                with NoWaiting() as mode:
                    outputs = run()
                seen.update(mode.seen)
                return outputs

            return super().capture(watched)

    install(monkeypatch, lambda device: Watched())
    solve(model, puzzles, depth=3)
    assert {"mm", "log", "cos", "erfinv"} & seen == {"mm", "log", "cos"}


def test_int8_names_the_remedy_for_the_device():
    model = EquilibriumReasoner(tiny_config())
    assert "use backend='cpu', or" in str(ReferenceBackend().why_not(model, Precision.int8))
    assert "use backend='cpu' after model.cpu(), or" in str(
        ReferenceBackend().why_not(model.to("meta"), Precision.int8)
    )
