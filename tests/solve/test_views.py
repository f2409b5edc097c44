"""`solve_views` against one solve for each view, mapped back by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner, Status, solve_views
from eqr_kernels.studies.recording import record
from eqr_kernels.tasks import sudoku, sudoku_generator
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.tasks.task import views_of
from eqr_kernels.tasks.views import Views
from eqr_kernels.views import solve_puzzles
from tests.support.commands import TINY

PUZZLES = sudoku_generator.generate(5, "medium", seed=3)
COUNT, DEPTH = 4, 6
OPTIONS = dict(depth=DEPTH, halt="residual", tol=0.3, seed=2)
SAME = np.arange(81)[None, None], np.arange(12, dtype=np.uint8)[None, None]


@pytest.fixture(scope="module")
def model() -> EquilibriumReasoner:
    torch.manual_seed(0)
    return EquilibriumReasoner(EqRConfig.sudoku(**TINY)).eval()


@pytest.fixture(scope="module")
def views():
    return sudoku.views(PUZZLES.inputs, COUNT, seed=1)


def one_by_one(model, views, row, select):
    """The view that wins, and the answer and logits of the puzzle by it."""
    answers, logits, keys = [], [], []
    for view in range(COUNT):
        tokens = torch.from_numpy(views.inputs[row, view : view + 1].astype(np.int64))
        alone = model.solve(tokens, **OPTIONS)
        answer, scores = np.zeros(81, int), torch.zeros(81, 11)
        meaning = {int(name): token for token, name in enumerate(views.names[row, view])}
        for cell, of in enumerate(views.cells[row, view]):
            answer[of] = meaning[int(alone.preds[0, cell])]
            for name, token in meaning.items():
                scores[of, token] = alone.logits[0, cell, name]
        answers.append(answer)
        logits.append(scores)
        settled, score, q = bool(alone.converged), float(alone.score), float(alone.q_halt)
        keys.append((not settled, score, view) if select == "residual" else (-q, score, view))
    if select == "vote":
        votes = [sum(np.array_equal(a, b) for b in answers) for a in answers]
        keys = [(-n, key[1], view) for view, (n, key) in enumerate(zip(votes, keys, strict=True))]
    won = min(keys)[-1]
    return won, answers[won], logits[won], answers


@pytest.mark.parametrize("select", ["residual", "vote", "q"])
def test_views_are_solved_as_if_alone_and_answer_the_puzzle(model, views, select):
    result = solve_views(model, views, select=select, return_all=True, trace=True, checkpoints=(2,), **OPTIONS)
    assert set(result.restart.tolist()) - {0}, "no view but the puzzle itself was selected: the test shows little"
    for row in range(len(PUZZLES)):
        won, answer, logits, answers = one_by_one(model, views, row, select)
        assert int(result.restart[row]) == won
        np.testing.assert_array_equal(result.preds[row], answer)
        torch.testing.assert_close(result.logits[row], logits, rtol=0, atol=0)
        np.testing.assert_array_equal(result.all_preds[row], answers)
    assert torch.equal(result.logits.argmax(2), result.preds)
    assert torch.equal(result.nfe, result.all_steps.sum(1)) and result.all_steps.shape == (5, COUNT)
    assert result.residuals.shape == (5, COUNT, DEPTH) and result.at[2].all_preds.shape == (5, COUNT, 81)
    shallow = solve_views(model, views, select=select, **{**OPTIONS, "depth": 2})
    assert torch.equal(result.at[2].preds, shallow.preds) and torch.equal(result.at[2].restart, shallow.restart)


def test_the_first_view_that_settles_answers_and_later_ones_are_not_run(model, views):
    # A tolerance that some views meet and some puzzles never do.
    whole = solve_views(model, views, return_all=True, **OPTIONS)
    low = whole.all_residual.double().min(1).values
    options = {**OPTIONS, "tol": float((low.sort().values[2] + low.sort().values[3]) / 2), "halt": "residual"}
    whole = solve_views(model, views, return_all=True, **options)
    seen = []
    result = solve_views(
        model, views, select="first", return_all=True, progress=lambda *counts: seen.append(counts), **options
    )
    met = whole.all_status == Status.CONVERGED
    assert 0 < int(met.any(1).sum()) < len(PUZZLES) and bool((met.any(1) & ~met[:, 0]).any())
    for row in range(len(PUZZLES)):
        settled = bool(met[row].any())
        ran = int(met[row].int().argmax()) + 1 if settled else COUNT
        won = ran - 1 if settled else int(whole.all_score[row].argmin())
        assert int(result.restart[row]) == won and bool(result.converged[row]) == settled
        assert torch.equal(result.preds[row], whole.all_preds[row, won])
        assert torch.equal(result.logits[row].argmax(1), result.preds[row])
        assert torch.equal(result.all_steps[row, :ran], whole.all_steps[row, :ran])
        assert not result.all_steps[row, ran:].any() and (result.all_status[row, ran:] == Status.CANCELLED).all()
    finished, of, spent = zip(*seen, strict=True)
    assert set(of) == {len(PUZZLES) * COUNT} and sorted(finished) == list(finished) and finished[-1] == of[0]
    assert spent[-1] == int(result.nfe.sum()) < int(whole.nfe.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_views_in_turn_do_not_depend_on_the_default_dtype(model, views, dtype):
    want = solve_views(model, views, select="first", **OPTIONS)
    torch.set_default_dtype(dtype)
    try:
        got = solve_views(model, views, select="first", **OPTIONS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.logits, want.logits) and torch.equal(
        got.all_residual.nan_to_num(), want.all_residual.nan_to_num()
    )


def test_views_that_all_settle_at_once_end_the_progress(model, views):
    seen = []
    solve_views(model, views, select="first", progress=lambda *counts: seen.append(counts), **{**OPTIONS, "tol": 100.0})
    of = len(PUZZLES) * COUNT
    assert seen[-1] == (of, of, len(PUZZLES))


@pytest.mark.parametrize("select", ["residual", "first"])
def test_a_tolerance_that_is_found_out_is_that_of_the_puzzles(views, select):
    torch.manual_seed(0)
    quiet = EquilibriumReasoner(EqRConfig.sudoku(**TINY, noise_scale=0.0)).eval()
    tokens = torch.from_numpy(PUZZLES.inputs.astype(np.int64))
    with pytest.warns(UserWarning, match="no promise") as warned:
        alone = quiet.solve(tokens, depth=DEPTH)
        result = solve_views(quiet, views, select=select, depth=DEPTH, return_all=True)
    ours = [w for w in warned if "no promise" in str(w.message)]
    assert len(ours) == 2 and str(ours[0].message) == str(ours[1].message) and ours[1].filename == __file__
    assert torch.equal(result.all_steps[:, 0], alone.steps) and torch.equal(result.all_residual[:, 0], alone.residual)


def test_views_in_turn_can_be_cancelled(model, views):
    result = solve_views(model, views, select="first", progress=lambda *_: False, **OPTIONS)
    assert (result.all_status == Status.CANCELLED).all() and not result.nfe.any()


def test_the_first_view_is_the_plain_solve_and_no_puzzles_are_none(model, views):
    one = solve_views(model, sudoku.views(PUZZLES.inputs, 1), **OPTIONS)
    plain = model.solve(torch.from_numpy(PUZZLES.inputs.astype(np.int64)), **OPTIONS)
    for name in ("preds", "logits", "steps", "residual", "score", "q_halt", "nfe", "converged"):
        assert torch.equal(getattr(one, name), getattr(plain, name)), name
    assert solve_views(model, views[:0], **OPTIONS).preds.shape == (0, 81)


def test_a_recording_of_views_holds_the_cells_of_its_grid(model):
    make = views_of(SUDOKU, 1)
    whole = record(model, PUZZLES.inputs, PUZZLES.labels, depths=(1, DEPTH), breadth=COUNT, views=make, seed=2, chunk=2)
    narrow = record(model, PUZZLES.inputs, PUZZLES.labels, depths=(1,), breadth=2, views=make, seed=2)
    for name in ("answer", "score", "q_halt", "steps"):
        np.testing.assert_array_equal(getattr(whole, name)[:, :2, :1], getattr(narrow, name), name)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(select="best"), ValueError, "select must be one of residual, vote, q, first, got 'best'"),
        (dict(select="first", checkpoints=(1,)), ValueError, "does not run all views"),
        (dict(select="first", halt="none"), ValueError, "needs a halting rule"),
        (dict(on_finished=print), TypeError, "takes no on_finished"),
        (dict(progress=3), TypeError, "progress must be a function or None, got 3"),
        (dict(views=torch.ones(1, 81)), TypeError, "views must be Views, .*, got Tensor"),
        (dict(views=Views(np.ones((1, 1, 81), np.uint8), *SAME)), ValueError, "of the model's 11 tokens, got 12"),
        (dict(breadth=2), TypeError, "takes no breadth: there is a trajectory for each view"),
        (dict(ids=torch.zeros(5, dtype=torch.long)), TypeError, "takes no ids"),
        (dict(return_state=True), TypeError, "takes no return_state"),
        (dict(depth=0), ValueError, "depth must be"),
    ],
)
def test_what_views_cannot_be_asked_is_refused(model, views, options, error, message):
    with pytest.raises(error, match=message):
        solve_views(model, **{"views": views, **options})


def test_tokens_that_are_none_are_refused_with_views_as_without(model):
    for views in (None, views_of(SUDOKU, 0)):
        with pytest.raises(ValueError, match="266"):
            solve_puzzles(model, PUZZLES.inputs.astype(np.int64) + 256, views=views, breadth=2, **OPTIONS)
