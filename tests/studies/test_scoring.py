"""Scores, intervals, recordings, and the choice of a tolerance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqr_kernels.run_rules import RULES_WITH_TOLERANCE
from eqr_kernels.studies.recording import record, spread_depths
from eqr_kernels.studies.replay import correct_grid, ends_when_halted, first_converged
from eqr_kernels.studies.scoring import RATING_BANDS, Accuracy, by_group, exact_match, rating_bands, token_accuracy
from eqr_kernels.studies.statistics import wilson_interval
from eqr_kernels.studies.tolerance import calibrate, tolerance_grid
from tests.support.models import make_contractive, tiny_config
from tests.support.recordings import made

# scoring -------------------------------------------------------------------------------------------------------------


def test_exact_match_scores_labelled_tokens_only_and_never_an_unlabelled_row():
    labels = np.array([[2, 3, 4], [2, 0, 4], [0, 0, 0], [2, 3, 4]])
    preds = np.array([[2, 3, 4], [2, 9, 4], [0, 0, 0], [2, 3, 5]])
    assert exact_match(preds, labels).tolist() == [True, True, False, False]


def test_trajectories_are_scored_against_the_labels_of_their_puzzle():
    labels = np.array([[2, 3, 4, 0], [0, 0, 0, 0]])
    preds = np.array([[[2, 3, 4, 9], [2, 9, 9, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]])
    assert exact_match(preds, labels).tolist() == [[True, False], [False, False]]
    shares = token_accuracy(preds, labels)
    assert shares.dtype == np.float32 and shares[0].tolist() == [1.0, pytest.approx(1 / 3)]
    assert np.isnan(shares[1]).all()


@pytest.mark.parametrize("score", [exact_match, token_accuracy])
@pytest.mark.parametrize("shape", [(2, 3), (6,), (3, 2), (3, 2, 4), (2, 2, 3)])
def test_scores_name_shapes_that_do_not_fit(score, shape):
    with pytest.raises(ValueError, match=r"preds must be \[N, S\] or \[N, B, S\] and labels \[N, S\]"):
        score(np.zeros(shape, int), np.zeros((2, 4), int))


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [  # from the closed form, by hand: 0 of 10 is z^2 / (10 + z^2), 5 of 10 is symmetric about a half
        (0, 10, 0.0, 0.2775328),
        (5, 10, 0.2365931, 0.7634069),
        (10, 10, 0.7224672, 1.0),
        (1, 1000, 0.00017655, 0.00564282),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_against_known_values(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-7)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_solves_its_equation(counts):
    """The ends are the proportions q whose normal deviate from the observed share is just z: |p - q| = z sd(q)."""
    successes, total = counts
    p, z = successes / total, 1.959963984540054
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= p <= high <= 1
    for q in (low, high):
        assert (p - q) ** 2 == pytest.approx(z * z * q * (1 - q) / total, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("successes", "total"), [(3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(successes, total):
    with pytest.raises(ValueError, match="successes must be in 0..total"):
        wilson_interval(successes, total)


def test_by_group_counts_each_group_at_each_depth_in_order_of_appearance():
    exact = np.array([[0, 1], [0, 0], [1, 1], [1, 1]], bool)
    groups = by_group(exact, ["b", "a", "b", "a"])
    assert list(groups) == ["b", "a"]
    assert [(a.correct, a.total) for a in groups["b"]] == [(1, 2), (2, 2)]
    assert [(a.correct, a.total) for a in groups["a"]] == [(1, 2), (1, 2)]
    assert groups["b"][0].share == 0.5 and groups["b"][1].interval[1] == 1.0
    assert math.isnan(Accuracy(0, 0).share)
    with pytest.raises(ValueError, match="groups"):
        by_group(exact, ["a"])


def test_rating_bands_hold_every_rating_once():
    ratings = [-1, 0, 1, 9, 10, 29, 30, 99, 100, 299, 300, 999, 1000, 10**9]
    wanted = "unknown 0 1-9 1-9 10-29 10-29 30-99 30-99 100-299 100-299 300-999 300-999 1000+ 1000+".split()
    assert rating_bands(np.array(ratings)) == wanted
    assert set(wanted) == set(RATING_BANDS)
    assert (
        rating_bands(np.array([-0.5, 0.4, 2.2, 9.5, 11.9, 999.9, 1e9]))
        == "unknown 0 1-9 1-9 10-29 300-999 1000+".split()
    )


# recordings ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(contractive, puzzles):
    """Labels [12, 6]: even rows are what the model answers at depth 6, odd ones are not, and the last has none."""
    labels = contractive.solve(puzzles, depth=6, halt="none").preds.numpy().copy()
    labels[1::2, 0] = labels[1::2, 0] % 6 + 1
    labels[-1] = 0
    return labels


def test_a_recording_equals_one_run_for_each_depth(contractive, puzzles, answers, backend):
    recording = record(contractive, puzzles.numpy(), answers, depths=(6, 1, 2, 2), breadth=3, backend=backend)
    assert recording.depths == (1, 2, 6) and recording.correct.shape == (12, 3, 3) and not recording.every_step
    assert recording.backend == backend and recording.backend_reason
    grid = correct_grid(recording, recording.depths, [3])
    for k, depth in enumerate(recording.depths):
        alone = contractive.solve(puzzles, depth=depth, breadth=3, halt="none", backend=backend)
        assert grid[:, k, 0, 0].tolist() == exact_match(alone.preds.numpy(), answers).tolist()
    single = record(contractive, puzzles.numpy(), answers, depths=[6])
    assert single.correct[:, 0, 0].tolist() == [i % 2 == 0 for i in range(12)]


def test_progress_comes_to_all_steps(contractive, puzzles, answers):
    calls = []
    arguments = dict(depths=[1, 4], chunk=5, progress=lambda *c: calls.append(c))
    record(contractive, puzzles.numpy(), answers, **arguments)
    assert calls[-1] == (48, 48) and [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_when_each_trajectory_meets_the_tolerance(contractive, puzzles, answers):
    recording = record(contractive, puzzles.numpy(), answers, depths=range(1, 9), breadth=2)
    tol = float(np.median(recording.residuals[..., 4]))
    halted = contractive.solve(puzzles, depth=8, breadth=2, halt="residual", tol=tol)
    ends = ends_when_halted(recording, "residual", tol=tol)
    assert ends.steps.tolist() == halted.all_steps.tolist() and ends.status.tolist() == halted.all_status.tolist()
    assert 1 < ends.steps.min() < ends.steps.max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depths=[]), "depths must name at least one depth, got none"),
        (dict(depths=[0, 2]), "depths must be at least 1, got 0"),
        (dict(breadth=0), "breadth must be at least 1, got 0"),
        (dict(chunk=0), "chunk must be at least 1"),
        (dict(labels=np.zeros((3, 6), int)), r"inputs and labels must both be \[N >= 1, S\]"),
    ],
)
def test_record_refuses(contractive, puzzles, answers, change, message):
    arguments = dict(inputs=puzzles.numpy(), labels=answers, depths=[1]) | change
    with pytest.raises(ValueError, match=message):
        record(contractive, **arguments)


@given(st.integers(1, 300), st.integers(12, 64), st.data())
def test_spread_depths_are_as_many_as_fit(depth, limit, data):
    wanted = data.draw(st.sets(st.integers(1, depth), max_size=10))
    depths = spread_depths(depth, limit, wanted)
    assert list(depths) == sorted(set(depths)) and {1, depth, *wanted} <= set(depths)
    assert len(depths) == min(limit, depth)
    assert spread_depths(depth, None, wanted) == tuple(range(1, depth + 1))


def test_spread_depths_by_hand():
    assert spread_depths(10, 10) == tuple(range(1, 11))
    assert spread_depths(16, 5) == (1, 2, 4, 8, 16)
    # Wherever a halting rule fires, the next recorded depth is near.
    depths = spread_depths(128, 64, [1, 2, 4, 8, 16, 32, 64])
    assert all(b == a + 1 or b / a < 1.07 for a, b in zip(depths, depths[1:], strict=False))
    with pytest.raises(ValueError, match="the backend records at most 2 depths, and 3 are wanted: 1, 4, 9"):
        spread_depths(9, 2, [4])


# tolerance -----------------------------------------------------------------------------------------------------------

NAN = float("nan")


def test_first_converged_by_hand():
    residuals = np.array([[0.9, 0.2, 0.3, 0.1], [0.1, 0.9, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9], [0.9, NAN, NAN, NAN]])
    steps, converged = first_converged(residuals, 0.2)
    assert steps.tolist() == [2, 1, 4, 4] and converged.tolist() == [True, True, False, False]
    steps, converged = first_converged(residuals, 0.3, patience=2)
    assert steps.tolist() == [3, 4, 4, 4] and converged.tolist() == [True, True, False, False]
    steps, converged = first_converged(residuals, 10, patience=5)
    assert steps.tolist() == [4] * 4 and not converged.any()
    for bad in (dict(residuals=residuals[0], tol=1), dict(residuals=residuals, tol=1, patience=0)):
        with pytest.raises(ValueError, match="must be"):
            first_converged(**bad)


@pytest.mark.parametrize("halt", RULES_WITH_TOLERANCE)
@pytest.mark.parametrize("patience", [1, 2])
def test_offline_halting_equals_halting(patience, halt):
    """What `calibrate` reads off one full run is what `solve` does under each tolerance."""
    model = make_contractive(tiny_config(noise_scale=0.02), seed=3)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 7, (10, 6), generator=generator)
    labels = model.solve(tokens, depth=9, halt="none").preds.numpy()
    run = record(model, tokens.numpy(), labels, depths=range(1, 10), chunk=4)
    assert run.residuals.shape == run.correct.shape == (10, 1, 9) and run.correct[..., -1].all()
    for tol in np.quantile(run.residuals, [0.1, 0.4, 0.7]).tolist():
        halted = model.solve(tokens, depth=9, halt=halt, tol=tol, patience=patience)
        ends = ends_when_halted(run, halt, tol=tol, patience=patience)
        assert halted.all_steps.tolist() == ends.steps.tolist()
        assert halted.all_status.tolist() == ends.status.tolist()
        offline = run.correct[np.arange(10), 0, ends.place[:, 0]]
        assert offline.tolist() == exact_match(halted.preds.numpy(), labels).tolist()


# Three puzzles, four steps. The first settles at once, the second is right from step 3 on, the third never.
RESIDUALS = np.array([[0.5, 0.10, 0.05, 0.02], [0.8, 0.40, 0.10, 0.03], [0.9, 0.60, 0.30, 0.20]])
CORRECT = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)


def calibrated(residuals, correct, **options):
    """Of one trajectory a puzzle: [N, D] twice."""
    return calibrate(made(np.asarray(correct)[:, None], np.asarray(residuals)[:, None]), **options)


def test_calibrate_by_hand():
    calibration = calibrated(RESIDUALS, CORRECT, candidates=[0.5, 0.01, 0.1, 0.3])
    assert (calibration.puzzles, calibration.depth, calibration.correct) == (3, 4, 2)
    assert [c.tol for c in calibration.candidates] == [0.01, 0.1, 0.3, 0.5]
    assert [c.correct for c in calibration.candidates] == [2, 2, 2, 1]
    assert [c.lost for c in calibration.candidates] == [0, 0, 0, 1]
    assert [c.converged for c in calibration.candidates] == [0, 2, 3, 3]
    assert [c.right_when_converged for c in calibration.candidates] == [0, 2, 2, 1]
    assert [c.mean_steps for c in calibration.candidates] == pytest.approx([4, 3, 8 / 3, 2])
    assert calibration.fast.tol == 0.3


def test_calibrate_allows_the_loss_it_is_given():
    candidates = [0.1, 0.3, 0.5]
    assert calibrated(RESIDUALS, CORRECT, candidates=candidates).fast.tol == 0.3
    assert calibrated(RESIDUALS, CORRECT, candidates=candidates, max_loss=0.34).fast.tol == 0.5
    assert calibrated(RESIDUALS, CORRECT, candidates=candidates, max_loss=0.33).fast.tol == 0.3


def test_calibrate_distrusts_a_looser_tolerance_that_only_makes_up_for_what_a_tighter_one_loses():
    # The second puzzle is lost at 0.4; at 0.9 the third, wrong at the full depth, is right by chance.
    correct = CORRECT.copy()
    correct[2, 0] = True
    calibration = calibrated(RESIDUALS, correct, candidates=[0.1, 0.4, 0.9])
    assert [c.correct for c in calibration.candidates] == [2, 1, 2]
    assert [c.gained for c in calibration.candidates] == [0, 0, 1]
    assert calibration.fast.tol == 0.1


def test_calibrate_keeps_above_the_floor_and_waits_for_patience():
    assert calibrated(RESIDUALS, CORRECT, candidates=[0.01, 0.1, 0.5], floor=0.1).candidates[0].tol == 0.1
    # Two steps in a row at or below 0.5: the second puzzle stops at step 3, where it is right.
    assert calibrated(RESIDUALS, CORRECT, candidates=[0.5], patience=2).fast.tol == 0.5


def test_calibrate_never_takes_a_step_as_long_as_the_state_for_rest():
    # All are right from the second step on, so that even 1.3 loses none of them.
    residuals, correct = [[1.4, 1.3, 0.6], [1.4, 1.2, 0.9]], [[0, 1, 1], [0, 1, 1]]
    calibration = calibrated(residuals, correct, candidates=[0.7, 0.95, 1.0, 1.3, 1.5])
    assert [c.correct for c in calibration.candidates] == [2, 2, 2, 2, 0] and calibration.fast.tol == 0.95
    nothing = calibrated(residuals, correct, candidates=[1.0, 1.3])
    assert nothing.fast is None and "below 1, a step as long as the state" in nothing.missing


def test_calibrate_chooses_nothing_rather_than_a_tolerance_that_is_never_met():
    correct = np.array([[0, 1], [0, 1]], bool)
    residuals = np.array([[0.1, 0.2], [0.1, 0.2]])
    calibration = calibrated(residuals, correct, candidates=[0.05, 0.1])
    assert calibration.candidates[0].correct == 2 and calibration.candidates[0].converged == 0
    assert calibration.fast is None


def test_calibrate_ignores_diverged_trajectories():
    residuals = np.array([[0.5, 0.1, 0.01], [NAN, NAN, NAN]])
    correct = np.array([[0, 1, 1], [0, 0, 0]], bool)
    calibration = calibrated(residuals, correct)
    assert calibration.fast.converged == 1 and calibration.fast.mean_steps == 2.5 and 0.1 <= calibration.fast.tol < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(correct=np.zeros((3, 4), bool)), "none of the 3 puzzles is right at depth 4"),
        (dict(max_loss=1.5), "max_loss must be a share"),
        (dict(candidates=[0.1], floor=0.2), "floor=0.2"),
        (dict(residuals=np.full((3, 4), NAN)), "floor=0"),
    ],
)
def test_calibrate_refuses(change, message):
    arguments = dict(residuals=RESIDUALS, correct=CORRECT) | change
    with pytest.raises(ValueError, match=message):
        calibrated(**arguments)


def test_tolerance_grid_spans_the_residuals_in_even_steps():
    grid = tolerance_grid(np.array([[0.02, NAN, 1.3], [math.inf, 0.0, 0.5]]))
    assert grid[0] <= 0.02 < grid[1] and grid[-2] < 1.3 <= grid[-1]
    ratios = np.array(grid[1:]) / np.array(grid[:-1])
    assert np.allclose(ratios, 10 ** (1 / 40), rtol=0.01)
    assert all(float(f"{tol:.3g}") == tol for tol in grid)
    assert tolerance_grid(np.full((1, 2), NAN)) == []


def settling(*groups: tuple[int, float, bool]) -> tuple[np.ndarray, np.ndarray]:
    """Groups of puzzles (how many, residual from step 2 on, right from step 2 on) that start at a residual of 1."""
    counts, levels, right = zip(*groups, strict=True)
    residuals = np.repeat([[1.0, level, level] for level in levels], counts, 0).astype(np.float32)
    return residuals, np.repeat([[False, good, good] for good in right], counts, 0)


@pytest.mark.parametrize(
    ("groups", "trusted", "fast", "missing"),
    [
        # Looser than 0.1 also 200 wrong ones settle.
        ([(150, 0.1, True), (200, 0.2, False)], (0.1, 150, 150), 0.9, ""),
        # One in a hundred may be wrong, two may not; a wrong one among the first few proves as little as a right one.
        ([(99, 0.1, True), (1, 0.1, False), (9, 0.2, False)], (0.1, 100, 99), 0.9, ""),
        ([(1, 0.05, False), (99, 0.1, True), (9, 0.2, False)], (0.1, 100, 99), 0.9, ""),
        ([(98, 0.1, True), (2, 0.1, False)], None, 0.9, "only 98 calibration puzzles were right at the full depth"),
        ([(198, 0.1, True), (3, 0.1, False)], None, 0.9, "only 198 of the 201 calibration puzzles that settled at 0."),
        # Three of three prove nothing.
        ([(3, 0.1, True)], None, 0.9, "only 3 calibration puzzles were right at the full depth, and 100 must settle"),
        # A tighter tolerance that fails is not made good by a looser one.
        ([(100, 0.1, True), (3, 0.1, False), (500, 0.2, True)], None, 0.9, "only 100 of the 103 calibration puzzles"),
        ([(99, 0.1, True), (150, 1.0, True)], None, 0.9, "only 99 calibration puzzles settled, and 100 must to tell"),
    ],
)
def test_converged_is_a_promise_where_enough_settle_and_are_right(groups, trusted, fast, missing):
    calibration = calibrated(*settling(*groups), candidates=(0.05, 0.1, 0.2, 0.5, 0.9))
    got = calibration.trusted and (
        calibration.trusted.tol,
        calibration.trusted.converged,
        calibration.trusted.right_when_converged,
    )
    assert got == trusted and calibration.fast.tol == fast
    assert calibration.missing.startswith(missing) and bool(calibration.missing) == (trusted is None)


def test_trust_asks_that_those_who_settle_are_right():
    # Puzzle 0 is right and settles at 0.02; puzzle 1 is wrong at every depth and comes down to 0.1.
    residuals = np.array([[0.5, 0.02, 0.02], [0.5, 0.3, 0.1]], np.float32)
    correct = np.array([[False, True, True], [False, False, False]])
    calibration = calibrated(residuals, correct, candidates=(0.02, 0.05, 0.1, 0.3), trust=0.9, fewest=1)
    assert calibration.fast.tol == pytest.approx(0.3) and calibration.trusted.tol == pytest.approx(0.05)
    assert calibration.trusted.right_when_converged == 1 and calibration.trusted.interval[0] < 0.3
    with pytest.raises(ValueError, match="trust must be a share"):
        calibrated(residuals, correct, trust=1.5)


@pytest.mark.parametrize(("right", "tol"), [(3, None), (150, 0.1)])
def test_a_tolerance_that_is_met_at_the_first_step_means_nothing(right, tol):
    """A model that a short run has trained: as many are right after the first step as after the last."""
    residuals, correct = settling((right, 0.1, True), (40, 0.3, False))
    correct[:right, 0] = True  # so halting at once costs no answer
    calibration = calibrated(residuals, correct, candidates=(0.05, 0.1, 0.3, 1.41))
    assert [calibration.trusted and calibration.trusted.tol, calibration.fast and calibration.fast.tol] == [tol, tol]
    if tol is None:
        assert calibration.missing.startswith("43 of 43 calibration puzzles met 1.41 at their first step")
