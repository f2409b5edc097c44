"""`solve_turned` against `solve` for each part between turns, moved by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner, Status, Turns, solve_turned, solve_views
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


@pytest.fixture(scope="module")
def model() -> EquilibriumReasoner:
    torch.manual_seed(0)
    return EquilibriumReasoner(EqRConfig.sudoku(**TINY)).eval()


def between(model, turns, options) -> dict:
    """Options, with a tolerance that half of the trajectories meet at some step and the others never."""
    if options["halt"] != "residual":
        return options
    run = {"depth": DEPTH, **options, "halt": "none"}
    least = solve_turned(model, PUZZLES.inputs, turns, trace=True, **run).residuals.amin(2).flatten().sort().values
    middle = len(least) // 2
    return {**options, "tol": float((least[middle - 1] + least[middle]) / 2)}


@pytest.mark.parametrize("breadth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [dict(halt="none"), dict(halt="residual", patience=1), dict(halt="q"), dict(halt="none", precision="bf16")],
)
def test_without_a_move_it_is_solve_from_the_same_start(model, breadth, options):
    options = between(model, STILL, options)
    rows, restart = torch.arange(5).repeat_interleave(breadth), torch.arange(breadth).repeat(5)
    start = model.initial_state(TOKENS[rows], 2, restart=restart)
    want = model.solve(
        TOKENS[rows], depth=DEPTH, initial_state=start, checkpoints=(2, 3, 7), trace=True, return_all=True, **options
    )
    got = solve_turned(
        model,
        PUZZLES.inputs,
        STILL,
        depth=DEPTH,
        breadth=breadth,
        seed=2,
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


def test_a_turn_moves_the_cells_of_puzzle_and_state_alike(model):
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
            halt="none",
            initial_state=state._replace(**moved, step=torch.full((5,), 3 * part)),
            return_state=True,
        )
        for name in z:
            z[name] = torch.empty_like(z[name]).scatter(1, cells[:, :, None].expand_as(z[name]), getattr(ran, name))
    want = torch.empty_like(TOKENS).scatter(1, cells, ran.preds)
    got = solve_turned(model, PUZZLES.inputs, TURNS, depth=DEPTH, halt="none", seed=2)
    assert torch.equal(got.preds, want) and torch.equal(got.residual, ran.residual)
    still = solve_turned(model, PUZZLES.inputs, STILL, depth=DEPTH, halt="none", seed=2)
    assert not torch.equal(got.residual, still.residual), "the turns change nothing: the test shows little"


def test_rows_do_not_depend_on_their_company_nor_a_depth_on_a_greater_one(model):
    options = between(model, TURNS, dict(halt="residual", breadth=2, seed=1))
    whole = solve_turned(model, PUZZLES.inputs, TURNS, depth=DEPTH, checkpoints=iter((4,)), return_all=True, **options)
    assert 0 < int((whole.all_status == Status.CONVERGED).sum()) < 10, "all end alike: the test shows little"
    alone = solve_turned(model, PUZZLES.inputs[3:4], TURNS, depth=DEPTH, return_all=True, **options)
    shallow = solve_turned(model, PUZZLES.inputs, TURNS, depth=4, return_all=True, **options)
    for name in SAME:
        assert torch.equal(getattr(alone, f"all_{name}")[0], getattr(whole, f"all_{name}")[3]), name
        assert torch.equal(getattr(shallow, f"all_{name}"), getattr(whole.at[4], f"all_{name}")), name


def test_the_first_of_a_puzzle_ends_its_siblings_at_the_next_turn(model):
    options = between(model, TURNS, dict(halt="residual", breadth=3, depth=DEPTH, seed=1))
    whole = solve_turned(model, PUZZLES.inputs, TURNS, return_all=True, **options)
    race = solve_turned(model, PUZZLES.inputs, TURNS, select="first", return_all=True, **options)
    met = whole.all_status == Status.CONVERGED
    least = torch.where(met, whole.all_steps, DEPTH + 1).min(1).values
    assert met.any() and (race.all_status == Status.CANCELLED).any()
    for row, steps in enumerate(least.tolist()):
        if steps <= DEPTH:
            assert int(race.steps[row]) == steps and bool(race.converged[row])
            turn = -(-steps // EVERY) * EVERY
            assert int(race.all_steps[row].max()) <= turn
        else:
            assert torch.equal(race.all_steps[row], whole.all_steps[row])


def test_a_race_of_views_that_turn_runs_no_view_behind_the_first_that_settles(model):
    views = sudoku.views(PUZZLES.inputs, 3)
    options = between(model, TURNS, dict(halt="residual", depth=DEPTH))
    race = solve_views(model, views, turns=TURNS, select="first", **options)
    rows = [solve_turned(model, views.inputs[:, view], TURNS, **options) for view in range(3)]
    settled = torch.stack([ran.converged for ran in rows], 1)
    first = torch.where(settled.any(1), settled.int().argmax(1), 2)
    for row, last in enumerate(first.tolist()):
        assert race.all_steps[row, : last + 1].tolist() == [int(ran.steps[row]) for ran in rows[: last + 1]]
        assert not race.all_steps[row, last + 1 :].any()


def test_progress_counts_up_and_cancels(model):
    seen = []
    result = solve_turned(
        model, PUZZLES.inputs, TURNS, depth=DEPTH, halt="none", progress=lambda *counts: seen.append(counts)
    )
    assert seen[-1] == (5, 5, int(result.nfe.sum())) and [s for *_, s in seen] == sorted(s for *_, s in seen)
    stopped = solve_turned(
        model, PUZZLES.inputs, TURNS, depth=DEPTH, halt="none", progress=lambda _, __, spent: spent < 15
    )
    assert (stopped.all_status == Status.CANCELLED).all() and int(stopped.steps.max()) < DEPTH


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_call_that_is_cancelled_in_a_later_part_keeps_what_there_is(model, backend):
    options = dict(halt="none", seed=1, backend=backend, precision="fp32")
    first = solve_turned(model, PUZZLES.inputs, TURNS, depth=EVERY, **options)
    got = solve_turned(
        model,
        PUZZLES.inputs,
        TURNS,
        depth=DEPTH,
        checkpoints=(2, 5),
        progress=lambda _, __, spent: spent < 5 * EVERY,
        slots=2,
        **options,
    )
    assert (got.all_status == Status.CANCELLED).all() and (got.steps >= EVERY).all()
    still = got.steps == EVERY
    assert still.any(), "all went on: the test shows little"
    for name in ("preds", "logits", "q_halt", "score", "residual"):
        assert torch.equal(getattr(got, name)[still], getattr(first, name)[still]), name
    assert torch.equal(got.at[5].preds[still], first.preds[still])


def test_a_row_that_diverges_at_a_turn_keeps_its_answer_and_hurts_no_other(model, monkeypatch):
    options = dict(halt="none", backend="reference", precision="fp32", ids=torch.arange(5))
    first, whole = (solve_turned(model, PUZZLES.inputs, TURNS, depth=depth, **options) for depth in (EVERY, DEPTH))
    solve = model.solve

    def solve_broken(tokens, **arguments):
        state = arguments.get("initial_state")
        if state is not None:
            state.z_H[(state.ids == 2) & (state.step == EVERY)] = torch.nan
        return solve(tokens, **arguments)

    monkeypatch.setattr(model, "solve", solve_broken, raising=False)
    got = solve_turned(model, PUZZLES.inputs, TURNS, depth=DEPTH, **options)
    others = [0, 1, 3, 4]
    assert int(got.all_status[2]) == Status.DIVERGED and (got.all_status[others] == Status.MAX_DEPTH).all()
    for name in ("preds", "logits", "score", "q_halt", "residual"):
        assert torch.equal(getattr(got, name)[2], getattr(first, name)[2]), name
    assert torch.equal(got.logits[others], whole.logits[others])


def test_the_score_one_step_after_a_turn_is_the_change_of_the_logits_over_it(model):
    before, after, whole = (
        solve_turned(model, PUZZLES.inputs, TURNS, depth=depth, halt="none", checkpoints=marks)
        for depth, marks in ((EVERY, ()), (EVERY + 1, (EVERY + 1,)), (DEPTH, (EVERY + 1,)))
    )
    change = (after.logits - before.logits).norm(dim=2).mean(1)
    torch.testing.assert_close(after.score, change, rtol=0, atol=0)
    for ran in (after, whole):
        torch.testing.assert_close(ran.at[EVERY + 1].all_score[:, 0], change, rtol=0, atol=0)


def test_what_is_recorded_of_turns_is_what_solve_turned_gives(model):
    whole = record(model, PUZZLES.inputs, PUZZLES.labels, depths=(1, 4, DEPTH), breadth=2, turns=TURNS, chunk=2)
    for k, depth in enumerate((1, 4, DEPTH)):
        alone = solve_turned(model, PUZZLES.inputs, TURNS, depth=depth, breadth=2, halt="none")
        np.testing.assert_array_equal(whole.q_halt[:, :, k], alone.all_q_halt)
        np.testing.assert_array_equal(whole.steps[:, :, k], depth)


def test_a_maze_turns_through_its_eight_symmetries_again_and_again():
    torch.manual_seed(0)
    model = EquilibriumReasoner(EqRConfig.maze(**TINY, seq_len=81)).eval()
    mazes = maze.generate(2, size=9, seed=1).inputs
    turns = turns_of(MAZE, 1, seed=0)
    assert turns.cycle == 8
    with pytest.raises(ValueError, match="take 20 views of each puzzle, .* at most 8.*; give Turns a cycle"):
        solve_turned(model, mazes, Turns(1, maze.views), depth=20, halt="none")
    result = solve_turned(model, mazes, turns, depth=20, halt="none", trace=True)
    assert result.residuals.isfinite().all() and int(result.nfe.sum()) == 40


def test_no_puzzles_are_no_answers(model):
    assert solve_turned(model, PUZZLES.inputs[:0], TURNS, breadth=2, halt="none", checkpoints=(1,)).preds.shape == (
        0,
        81,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_turns_do_not_depend_on_the_default_dtype(model, dtype):
    want = solve_turned(model, PUZZLES.inputs, TURNS, depth=DEPTH, halt="none", trace=True)
    torch.set_default_dtype(dtype)
    try:
        got = solve_turned(model, PUZZLES.inputs, TURNS, depth=DEPTH, halt="none", trace=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.residuals, want.residuals)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(turns=3), TypeError, "turns must be Turns, as in Turns.4, sudoku.views., got int"),
        (dict(patience=4, halt="residual", tol=0.1), ValueError, "patience must be at most turns.every=3"),
        (dict(initial_state=None), TypeError, "takes no initial_state"),
        (dict(on_finished=print), TypeError, "takes no on_finished"),
        (dict(return_state=True), TypeError, "takes no return_state"),
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
        solve_turned(model, **{"inputs": PUZZLES.inputs, "turns": TURNS, "depth": DEPTH, "halt": "q", **options})


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
