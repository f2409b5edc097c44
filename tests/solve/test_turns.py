"""`turns` of `solve` against `solve` for each part between turns, moved by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner, Status, Turns, ops, solve_views
from eqr_kernels.serving import Engine
from eqr_kernels.studies.recording import record
from eqr_kernels.tasks import maze, sudoku, sudoku_generator
from eqr_kernels.tasks.registry import MAZE
from eqr_kernels.tasks.task import turns_of
from tests.support.commands import TINY

PUZZLES = sudoku_generator.generate(5, "medium", seed=3)
TOKENS = torch.from_numpy(PUZZLES.inputs.astype(np.int64))
EVERY, DEPTH = 3, 8
TURNS = Turns(EVERY, sudoku.views)
STILL = Turns(EVERY, lambda inputs, count: sudoku.views(inputs, 1), cycle=1)
SAME = ("preds", "status", "q_halt", "steps", "residual")
needs_extension = pytest.mark.skipif(not ops.extension_status()[0], reason="needs the compiled extension")
BACKENDS = [pytest.param("cpu", marks=needs_extension), "reference"]


@pytest.fixture(scope="module")
def model() -> EquilibriumReasoner:
    torch.manual_seed(0)
    return EquilibriumReasoner(EqRConfig.sudoku(**TINY)).eval()


def between(model, turns, options) -> dict:
    """Options, with a tolerance that half of the trajectories meet at some step and the others never."""
    if options["halt"] != "residual":
        return options
    run = {"depth": DEPTH, **options, "halt": "none"}
    least = model.solve(TOKENS, turns=turns, trace=True, **run).residuals.amin(2).flatten().sort().values
    middle = len(least) // 2
    return {**options, "tol": float((least[middle - 1] + least[middle]) / 2)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("breadth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [dict(halt="none"), dict(halt="residual", patience=1), dict(halt="q"), dict(halt="none", precision="bf16")],
)
def test_without_a_move_it_is_solve_from_the_same_start(model, backend, breadth, options):
    options = between(model, STILL, {**options, "backend": backend})
    rows, restart = torch.arange(5).repeat_interleave(breadth), torch.arange(breadth).repeat(5)
    start = model.initial_state(TOKENS[rows], 2, restart=restart)
    want = model.solve(
        TOKENS[rows], depth=DEPTH, initial_state=start, checkpoints=(2, 3, 7), trace=True, return_all=True, **options
    )
    got = model.solve(
        TOKENS,
        turns=STILL,
        depth=DEPTH,
        breadth=breadth,
        initial_state=start,
        checkpoints=(2, 3, 7),
        trace=True,
        return_all=True,
        **options,
    )
    for name in SAME:
        here, there = getattr(got, f"all_{name}").flatten(0, 1), getattr(want, f"all_{name}")[:, 0]
        assert torch.equal(here, there), name
        for depth in (2, 3, 7):
            at, want_at = getattr(got.at[depth], f"all_{name}"), getattr(want.at[depth], f"all_{name}")
            assert torch.equal(at.flatten(0, 1), want_at[:, 0]), (name, depth)
    assert torch.equal(got.residuals.flatten(0, 1).nan_to_num(), want.residuals[:, 0].nan_to_num())
    assert torch.equal(got.logits, want.logits.unflatten(0, (5, breadth))[torch.arange(5), got.restart])
    assert torch.equal(got.nfe, got.all_steps.sum(1)) and torch.equal(got.preds, got.logits.argmax(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_turn_moves_the_cells_of_puzzle_and_state_alike(model, backend):
    how = dict(halt="none", backend=backend)
    views = sudoku.views(PUZZLES.inputs, 3)
    assert not np.array_equal(views.cells[:, 1], views.cells[:, 0])
    state = model.initial_state(TOKENS, 2)
    z = {"z_H": state.z_H, "z_L": state.z_L}  # by the puzzles' own cells
    for part, length in enumerate((3, 3, 2)):
        cells = torch.from_numpy(views.cells[:, part].astype(np.int64))
        moved = {name: values.gather(1, cells[:, :, None].expand_as(values)) for name, values in z.items()}
        ran = model.solve(
            TOKENS.gather(1, cells),
            depth=length,
            **how,
            initial_state=state._replace(**moved, step=torch.full((5,), 3 * part)),
            return_state=True,
        )
        for name in z:
            z[name] = torch.empty_like(z[name]).scatter(1, cells[:, :, None].expand_as(z[name]), getattr(ran, name))
    want = torch.empty_like(TOKENS).scatter(1, cells, ran.preds)
    how["initial_state"] = state
    got = model.solve(TOKENS, turns=TURNS, depth=DEPTH, **how)
    assert torch.equal(got.preds, want) and torch.equal(got.residual, ran.residual)
    still = model.solve(TOKENS, turns=STILL, depth=DEPTH, **how)
    assert not torch.equal(got.residual, still.residual), "the turns change nothing: the test shows little"


def test_rows_do_not_depend_on_their_company_nor_a_depth_on_a_greater_one(model):
    options = between(model, TURNS, dict(halt="residual", breadth=2, seed=1))
    whole = model.solve(TOKENS, turns=TURNS, depth=DEPTH, checkpoints=iter((4,)), return_all=True, **options)
    assert 0 < int((whole.all_status == Status.CONVERGED).sum()) < 10, "all end alike: the test shows little"
    alone = model.solve(TOKENS[3:4], turns=TURNS, depth=DEPTH, return_all=True, **options)
    shallow = model.solve(TOKENS, turns=TURNS, depth=4, return_all=True, **options)
    for name in SAME:
        assert torch.equal(getattr(alone, f"all_{name}")[0], getattr(whole, f"all_{name}")[3]), name
        assert torch.equal(getattr(shallow, f"all_{name}"), getattr(whole.at[4], f"all_{name}")), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_a_puzzle_that_settles_ends_its_siblings(model, backend):
    options = between(model, TURNS, dict(halt="residual", breadth=3, depth=DEPTH, seed=1, backend=backend))
    whole = model.solve(TOKENS, turns=TURNS, return_all=True, **options)
    race = model.solve(TOKENS, turns=TURNS, select="first", return_all=True, **options)
    met = whole.all_status == Status.CONVERGED
    least = torch.where(met, whole.all_steps, DEPTH + 1).min(1).values
    assert met.any() and (race.all_status == Status.CANCELLED).any()
    for row, steps in enumerate(least.tolist()):
        if steps <= DEPTH:
            assert int(race.steps[row]) == steps and bool(race.converged[row])
        else:
            assert torch.equal(race.all_steps[row], whole.all_steps[row])


def test_a_race_of_views_that_turn_runs_no_view_behind_the_first_that_settles(model):
    views = sudoku.views(PUZZLES.inputs, 3)
    options = between(model, TURNS, dict(halt="residual", depth=DEPTH))
    race = solve_views(model, views, turns=TURNS, select="first", **options)
    rows = [
        model.solve(torch.from_numpy(views.inputs[:, k].astype(np.int64)), turns=TURNS, **options) for k in range(3)
    ]
    settled = torch.stack([ran.converged for ran in rows], 1)
    first = torch.where(settled.any(1), settled.int().argmax(1), 2)
    for row, last in enumerate(first.tolist()):
        assert race.all_steps[row, : last + 1].tolist() == [int(ran.steps[row]) for ran in rows[: last + 1]]
        assert not race.all_steps[row, last + 1 :].any()


def test_a_call_that_is_cancelled_between_two_turns_keeps_what_there_is(model):
    options = dict(turns=TURNS, halt="none", seed=1, backend="reference")
    got = model.solve(TOKENS, depth=DEPTH, checkpoints=(2, 7), progress=lambda _, __, spent: spent < 25, **options)
    want = model.solve(TOKENS, depth=5, **options)
    assert (got.all_status == Status.CANCELLED).all() and (got.steps == 5).all()
    for name in ("preds", "logits", "q_halt", "score"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.at[7].preds, want.preds)


def test_a_row_that_diverges_at_a_turn_keeps_its_answer_and_hurts_no_other(model):
    class Broken(EquilibriumReasoner):
        broken = False

        def forward(self, tokens, state, **keywords):
            after, logits, q_halt = super().forward(tokens, state, **keywords)
            bad = (state.ids == 2) & (state.step == EVERY) & self.broken
            return after, logits.masked_fill(bad[:, None, None], torch.nan), q_halt

    broken = Broken(model.config).eval()
    broken.load_state_dict(model.state_dict())
    options = dict(turns=TURNS, halt="none", ids=torch.arange(5))
    first, whole = (broken.solve(TOKENS, depth=depth, **options) for depth in (EVERY, DEPTH))
    plain = model.solve(TOKENS, depth=DEPTH, backend="reference", **options)
    torch.testing.assert_close(whole.logits, plain.logits, rtol=1e-4, atol=1e-4)
    broken.broken = True
    got = broken.solve(TOKENS, depth=DEPTH, **options)
    others = [0, 1, 3, 4]
    assert int(got.all_status[2]) == Status.DIVERGED and (got.all_status[others] == Status.MAX_DEPTH).all()
    assert torch.equal(got.logits[2], first.logits[2]) and torch.equal(got.preds[2], first.preds[2])
    torch.testing.assert_close(got.logits[others], whole.logits[others], rtol=1e-5, atol=1e-6)


@needs_extension
def test_the_backends_agree_as_well_as_without_turns(model):
    options = dict(depth=DEPTH, breadth=2, checkpoints=(4, 7), trace=True, return_all=True, halt="none")

    def error(turns) -> float:
        cpu, reference = (model.solve(TOKENS, turns=turns, backend=b, **options) for b in ("cpu", "reference"))
        for got, want in ((cpu, reference), *((cpu.at[d], reference.at[d]) for d in (4, 7))):
            assert torch.equal(got.all_preds, want.all_preds) and torch.equal(got.all_status, want.all_status)
            torch.testing.assert_close(got.all_score, want.all_score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cpu.residuals, reference.residuals, rtol=1e-4, atol=1e-5)
        return float((cpu.logits - reference.logits).abs().max())

    assert error(TURNS) <= 4 * error(None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_races_with_turns_of_its_own(model, backend):
    options = between(model, TURNS, dict(halt="residual", depth=DEPTH, breadth=3, backend=backend))
    want = model.solve(TOKENS, turns=TURNS, select="first", **options)
    options.pop("backend")
    with Engine(model, backend=backend, quantum=1, turns=TURNS, select="first", **options) as engine:
        assert engine.check() == backend
        answers = [future.result() for future in [engine.submit(puzzle) for puzzle in TOKENS]]
    assert torch.equal(torch.cat([answer.preds for answer in answers]), want.preds)
    assert torch.equal(torch.cat([answer.steps for answer in answers]), want.steps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_answers_as_solve_does(model, backend):
    options = between(model, TURNS, dict(halt="residual", depth=DEPTH, breadth=2, backend=backend))
    engine_options = {name: value for name, value in options.items() if name != "backend"}
    want = [model.solve(TOKENS[k : k + 1], turns=TURNS, return_all=True, **options) for k in range(5)]
    with Engine(model, backend=backend, quantum=1, return_all=True, **engine_options) as engine:
        futures = [engine.submit(TOKENS[k], turns=TURNS) for k in range(5)]
        still = engine.submit(TOKENS[0]).result()
        for future, each in zip(futures, want, strict=True):
            got = future.result()
            for name in SAME:
                assert torch.equal(getattr(got, f"all_{name}"), getattr(each, f"all_{name}")), name
    assert not torch.equal(still.all_residual, want[0].all_residual)


def by_hand(model, turns, depth, tol, patience, **options):
    """Scores [5, depth] and the step at which each halts [5], from logits at each depth and residuals of a run."""
    whole = model.solve(TOKENS, turns=turns, depth=depth, halt="none", trace=True, **options)
    at = [model.solve(TOKENS, turns=turns, depth=k, halt="none", **options).logits for k in range(1, depth + 1)]
    residuals = whole.residuals[:, 0]
    scores, halts = torch.full((5, depth), torch.nan), torch.full((5,), depth)
    for row in range(5):
        changes, streak = [], 0
        for step in range(1, depth + 1):
            since = (step - 1) % turns.every
            change = residuals[row, 0] if step == 1 else (at[step - 1][row] - at[step - 2][row]).norm(dim=1).mean()
            # What stands in for a difference leaves with the first one; a turn drops those before it.
            changes = [change] if since <= 1 else [*changes, change][-options["window"] :]
            scores[row, step - 1] = torch.stack(changes).mean()
            streak = (streak if since else 0) + 1 if residuals[row, step - 1] <= tol else 0
            if streak >= patience:
                halts[row] = min(int(halts[row]), step)
    return scores, halts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("every", "share"), [(1, 0.5), (2, 0.7), (5, 0.5)])
def test_scores_and_streaks_begin_anew_at_each_turn(model, backend, every, share):
    turns, depth, patience = Turns(every, sudoku.views), 12, min(2, every)
    options = dict(backend=backend, window=2, seed=3)
    trace = model.solve(TOKENS, turns=turns, depth=depth, halt="none", trace=True, **options).residuals
    tol = float(trace[:, :, 2:].flatten().quantile(share))
    scores, halts = by_hand(model, turns, depth, tol, patience, **options)
    marks = tuple(range(1, depth + 1))
    got = model.solve(TOKENS, turns=turns, depth=depth, halt="none", checkpoints=marks, **options)
    recorded = torch.stack([got.at[k].all_score[:, 0] for k in marks], 1)
    torch.testing.assert_close(recorded, scores, rtol=1e-5, atol=0)
    ran = model.solve(TOKENS, turns=turns, depth=depth, tol=tol, patience=patience, **options)
    assert ran.steps.tolist() == halts.tolist() and len(set(halts.tolist())) > 1


def test_rows_that_turn_at_different_times_do_so_by_their_own_steps(model):
    options = between(model, TURNS, dict(halt="residual", depth=DEPTH, breadth=2, backend="reference"))
    few, many = (model.solve(TOKENS, turns=TURNS, slots=slots, return_all=True, **options) for slots in (3, 64))
    assert few.all_steps.unique().numel() > 2, "all turn together: the test shows little"
    for name in ("preds", "status", "steps"):
        assert torch.equal(getattr(few, f"all_{name}"), getattr(many, f"all_{name}")), name
    torch.testing.assert_close(few.all_residual, many.all_residual, rtol=1e-4, atol=1e-6)


@needs_extension
def test_a_backend_that_moves_no_cells_is_passed_over_and_named(model, monkeypatch):
    monkeypatch.setattr("eqr_kernels.backends.cpu.CpuBackend.turns_cells", False)
    assert model.solve(TOKENS, depth=2, halt="none").backend == "cpu"
    result = model.solve(TOKENS, turns=TURNS, depth=2, halt="none")
    assert result.backend == "reference" and "cpu: it moves no cells between outer steps" in result.backend_reason
    with pytest.raises(RuntimeError, match="moves no cells between outer steps .turns.; use backend='reference'"):
        model.solve(TOKENS, turns=TURNS, depth=2, halt="none", backend="cpu")


def test_what_is_recorded_of_turns_is_what_solve_gives(model):
    whole = record(model, PUZZLES.inputs, PUZZLES.labels, depths=(1, 4, DEPTH), breadth=2, turns=TURNS, chunk=2)
    for k, depth in enumerate((1, 4, DEPTH)):
        alone = model.solve(TOKENS, turns=TURNS, depth=depth, breadth=2, halt="none")
        np.testing.assert_array_equal(whole.q_halt[:, :, k], alone.all_q_halt)
        np.testing.assert_array_equal(whole.steps[:, :, k], depth)


def test_a_maze_turns_through_its_eight_symmetries_again_and_again():
    torch.manual_seed(0)
    model = EquilibriumReasoner(EqRConfig.maze(**TINY, seq_len=81)).eval()
    mazes = torch.from_numpy(maze.generate(2, size=9, seed=1).inputs.astype(np.int64))
    turns = turns_of(MAZE, 1, seed=0)
    assert turns.cycle == 8
    with pytest.raises(
        ValueError,
        match="cannot make the 20 views .*: .* at most 8.*; where there are fewer",
    ):
        model.solve(mazes, turns=Turns(1, maze.views), depth=20, halt="none")
    result = model.solve(mazes, turns=turns, depth=20, halt="none", trace=True)
    assert result.residuals.isfinite().all() and int(result.nfe.sum()) == 40


def test_no_puzzles_are_no_answers(model):
    assert model.solve(TOKENS[:0], turns=TURNS, breadth=2, halt="none", checkpoints=(1,)).preds.shape == (0, 81)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_turns_do_not_depend_on_the_default_dtype(model, dtype):
    want = model.solve(TOKENS, turns=TURNS, depth=DEPTH, halt="none", trace=True)
    torch.set_default_dtype(dtype)
    try:
        got = model.solve(TOKENS, turns=TURNS, depth=DEPTH, halt="none", trace=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.residuals, want.residuals)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(turns=3), TypeError, "turns must be Turns, as in Turns.4, sudoku.views., got int"),
        (dict(patience=4, halt="residual", tol=0.1), ValueError, "patience must be at most turns.every=3"),
        (dict(return_state=True), ValueError, "return_state must be False with turns"),
        (dict(progress=3), TypeError, "progress must be a function or None, got 3"),
        (dict(depth=0), ValueError, "depth must be"),
        (dict(checkpoints=(9,)), ValueError, "checkpoints must be at most depth=8"),
        (dict(select="first", halt="none"), ValueError, "needs a halting rule"),
        (dict(ids=torch.zeros(4, dtype=torch.long)), ValueError, "ids"),
        (dict(beam=2), TypeError, "beam"),
        (dict(tol=-5.0), ValueError, "tol"),
        (dict(turns=Turns(3, lambda inputs, count: None)), TypeError, "turns.views must return Views, got NoneType"),
        (
            dict(turns=Turns(3, lambda inputs, count: sudoku.views(inputs[:1], count))),
            ValueError,
            r"inputs \[5, 3, 81\]",
        ),
        (dict(turns=Turns(3, lambda inputs, count: sudoku.views(inputs, 1))), ValueError, r"inputs \[5, 3, 81\]"),
    ],
)
def test_what_turns_cannot_be_asked_is_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        model.solve(TOKENS, **{"turns": TURNS, "depth": DEPTH, "halt": "q", **options})


@pytest.mark.parametrize(
    "fields, error",
    [
        (dict(every=0), ValueError),
        (dict(every=1.5), TypeError),
        (dict(cycle=0), ValueError),
        (dict(views=None), TypeError),
    ],
)
def test_turns_are_checked_when_they_are_made(fields, error):
    with pytest.raises(error, match="of turns"):
        Turns(**{"every": 2, "views": sudoku.views, **fields})
