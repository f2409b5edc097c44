"""`eqr diagnose`: its numbers on planted trajectories, its rules, and the command end to end."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.checkpoint import load_checkpoint
from eqr_kernels.cli.options import MODEL
from eqr_kernels.studies import advice
from eqr_kernels.studies.advice import advise
from eqr_kernels.studies.agreement import agreement
from eqr_kernels.studies.attractors import Modes, modes
from eqr_kernels.studies.coupling import Coupling
from eqr_kernels.studies.dynamics import (
    KINDS,
    answer_periods,
    contraction_rates,
    describe,
    doubling_depths,
    plateau,
    residual_periods,
    tail_depths,
    trajectory_kinds,
)
from eqr_kernels.studies.recording import record
from eqr_kernels.studies.scaling import Convergence, Scaling, recorded_depths, summarise
from eqr_kernels.studies.scoring import answer_codes
from eqr_kernels.studies.statistics import Paired, Quartiles, mcnemar, pair
from eqr_kernels.tasks import sudoku, sudoku_generator
from eqr_kernels.trajectory import Status
from tests.support.commands import TINY, eqr, eqr_json, make_copier

NAN, INF = math.nan, math.inf
STEP = np.arange(1, 65)


def codes_of(*letters: str) -> np.ndarray:
    """Answer codes [T, W], a letter for each answer."""
    return np.array([[ord(letter) for letter in row] for row in letters], np.uint64)


# contraction ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rate=st.floats(0.05, 0.75), floor=st.sampled_from([0.0, 1e-3, 0.0155, 0.2]), scale=st.floats(5.0, 50.0))
def test_contraction_rate_of_an_exact_decay(rate, floor, scale):
    r = np.sqrt(np.square(scale * rate**STEP) + floor**2)[None]
    expected = np.count_nonzero(r[0] > 1.1 * floor) >= 3
    result = contraction_rates(r, [floor])[0]
    assert result == pytest.approx(rate, rel=1e-6) if expected else math.isnan(result)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_contraction_rate_of_a_noisy_linear_map(rate):
    """z_k = rate z_{k-1} + noise in 20,000 dimensions, about a fixed point of unit mean square."""
    rng = np.random.default_rng(1)
    d, sigma, depth = 20_000, 0.01, 96
    rest, away, noise, before, r = rng.normal(size=d), 0.5 * rng.normal(size=d), np.zeros(d), 0.0, []
    before = rest + away
    for _ in range(depth):
        away, noise = rate * away, rate * noise + sigma * rng.normal(size=d)
        state = rest + away + noise
        r.append(np.linalg.norm(state - before) / np.linalg.norm(state))
        before = state
    r = np.array(r)[None]
    floor = plateau(r)
    # Noise with a memory: var(n_k - n_{k-1}) = 2 sigma^2 / (1 + rate).
    assert floor[0] == pytest.approx(sigma * math.sqrt(2 / (1 + rate)), rel=0.02)
    assert contraction_rates(r, floor)[0] == pytest.approx(rate, rel=0.03)


def test_contraction_is_fitted_to_the_last_fall_before_the_floor():
    r = np.array([[1.0, 0.4, 0.5, 0.4, 0.6, 0.2, 0.2 / 3, 0.2 / 9, 0.001, 0.9, 0.1, 0.01]])
    # From 0.6 on; what comes after the floor was met does not count.
    slope = np.polyfit(range(4), np.log([0.6, 0.2, 0.2 / 3, 0.2 / 9]), 1)[0]
    assert contraction_rates(r, [0.001])[0] == pytest.approx(math.exp(slope), rel=1e-3)


@pytest.mark.parametrize(
    ("r", "floor"),
    [
        ([1.0, 0.5, 0.1], 0.2),  # two steps only
        ([0.4, 0.39, 0.38, 0.37], 0.0),  # hardly falls
        ([0.1, 0.05, 0.01, 0.001], NAN),
        ([NAN, NAN, NAN, NAN], 0.0),
        ([0.1, 0.2, 0.4, 0.8], 0.0),
        ([0.0, 0.0, 0.0, 0.0], 0.0),
        ([1.0], 0.0),
    ],
)
def test_no_contraction_rate_where_none_shows(r, floor):
    assert math.isnan(contraction_rates([r], [floor])[0])


def test_plateau_needs_rest():
    rng = np.random.default_rng(0)
    even = 0.0155 * (1 + 0.01 * rng.normal(size=64))
    rows = [even, 0.99**STEP, 0.3 * rng.lognormal(0, 0.4, 64), np.where(STEP < 44, 1.0, 0.1), np.full(64, NAN)]
    result = plateau(rows)
    assert result[0] == pytest.approx(0.0155, rel=0.01) and np.isnan(result[1:]).all()
    assert np.isnan(plateau([even[:15]])).all() and not np.isnan(plateau([even[:16]])).any()


# cycles --------------------------------------------------------------------------------------------------------------


@given(period=st.integers(1, 8), data=st.data())
def test_answer_periods_finds_what_is_planted(period, data):
    cycle = data.draw(st.lists(st.integers(0, 5), min_size=period, max_size=period))
    least = next(p for p in range(1, period + 1) if all(cycle[i] == cycle[(i + p) % period] for i in range(period)))
    row = np.array([cycle[k % period] for k in range(24)], np.uint64)
    assert answer_periods([row])[0] == least
    row[0] = 9
    assert answer_periods([row])[0] == 0


@pytest.mark.parametrize("period", [2, 3, 5, 10])
def test_residual_periods_finds_what_is_planted_under_noise(period):
    rng = np.random.default_rng(period)
    cycle = 0.3 + 0.2 * rng.permutation(np.linspace(-1, 1, period))
    r = cycle[np.arange(32) % period] * (1 + 0.01 * rng.normal(size=32))
    assert residual_periods([r])[0] == period


def test_residual_periods_finds_none_in_noise_and_in_slow_motion():
    rng = np.random.default_rng(0)
    noise = 0.3 * rng.lognormal(0, 0.3, (500, 32))
    slow = 0.3 + 0.1 * np.sin(2 * np.pi * np.arange(32) / 32)
    floor = 0.0155 * (1 + 0.01 * rng.normal(size=(500, 32)))
    assert not residual_periods([*noise, slow, *floor, np.full(32, NAN), np.full(32, 0.1)]).any()


# kinds ---------------------------------------------------------------------------------------------------------------


def test_each_kind_is_known():
    rng = np.random.default_rng(3)
    one, many, two = "a" * 32, "".join(chr(33 + k) for k in range(32)), "ab" * 16
    wander = 0.3 * rng.lognormal(0, 0.3, 64)
    even = 0.0155 * (1 + 0.01 * rng.normal(size=64))
    swing = np.where(STEP % 2 == 0, 0.2, 0.1)
    cases = [
        ("settled", even, one),
        ("decaying", 0.97**STEP, many),
        ("growing", 0.1 * 1.03**STEP, many),
        ("cycling", np.full(64, 0.3), two),
        ("cycling", swing, one),
        ("wandering", swing, many),
        ("steady", even, one),
        ("wandering", even, many),
        ("wandering", wander, many),
        ("wandering", wander, one),
        ("diverged", np.where(STEP < 9, 0.5, NAN), one),
        ("diverged", np.where(STEP < 64, 0.5, INF), one),
    ]
    settled = [i == 0 for i in range(len(cases))]
    diverged = [i == 10 for i in range(len(cases))]
    kinds, periods = trajectory_kinds(
        [row for _, row, _ in cases], codes_of(*(letters for *_, letters in cases)), settled, diverged
    )
    assert kinds.tolist() == [kind for kind, *_ in cases] and set(kinds) <= set(KINDS)
    assert periods.tolist() == [2 if kind == "cycling" else 0 for kind, *_ in cases]
    short = [[0.5] * 15] * 3
    kinds, _ = trajectory_kinds(short, codes_of("a", "a", "a"), [True, False, False], [False, True, False])
    assert kinds.tolist() == ["settled", "diverged", "undecided"]


@pytest.mark.parametrize(("depth", "tail"), [(1, [1]), (2, [2]), (7, [5, 6, 7]), (200, list(range(169, 201)))])
def test_tail_depths(depth, tail):
    assert list(tail_depths(depth)) == tail


@pytest.mark.parametrize(("depth", "depths"), [(1, (1,)), (3, (1, 2, 3)), (6, (1, 2, 3, 4, 6)), (8, (1, 2, 4, 8))])
def test_doubling_depths(depth, depths):
    assert doubling_depths(depth) == depths


# agreement and pairs -------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    codes = codes_of("aaab", "abcd", "aabb", "aaaa", "zzzz")
    exact = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    settled = [[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    diverged = [[0] * 4, [0] * 4, [0] * 4, [0, 0, 0, 1], [1] * 4]
    result = agreement(codes, exact, np.array(settled) & ~np.array(diverged, bool), diverged)
    assert (result.pairs, result.same) == (6 + 6 + 6 + 3, 3 + 0 + 2 + 3)
    assert (result.settled_pairs, result.settled_same) == (3 + 6 + 3, 1 + 2 + 3)
    assert result.distinct.tolist() == [2, 0, 2, 1, 0]
    assert (result.common_right, result.common_wrong, result.common_tied) == (1, 2, 2)
    alone = agreement(codes[:, :1], np.array(exact)[:, :1], np.ones((5, 1)), np.zeros((5, 1)), [1, 0, 0, 0, 0])
    assert alone.pairs == 0 and math.isnan(alone.share) and math.isnan(alone.settled_share)
    assert (alone.common_right, alone.common_wrong, alone.common_tied) == (1, 0, 0)
    with pytest.raises(ValueError, match=r"must all be \[N, B\]"):
        agreement(codes, exact[:2], settled, diverged)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=2, max_size=12))
def test_answer_codes_are_equal_where_answers_are(rows):
    codes = answer_codes(np.array(rows))
    for i, first in enumerate(rows):
        assert [first == row for row in rows] == (codes == codes[i]).tolist()


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1), (5, 5, 1), (6, 0, 2 / 64), (1, 8, 20 / 512), (8, 1, 20 / 512), (3, 2, 1)]
)
def test_mcnemar_by_hand(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p, abs=1e-15) == mcnemar(lost, gained)
    assert 0 < mcnemar(2100, 1900) < 0.01


def test_pair_counts_and_refuses():
    by = pair([1, 1, 0, 0, 0], [1, 0, 1, 1, 0])
    assert (by.puzzles, by.gained, by.lost, by.net) == (5, 2, 1, 0.2)
    for bad in (lambda: pair([1], [1, 0]), lambda: mcnemar(-1, 2)):
        with pytest.raises(ValueError, match="must"):
            bad()


# advice --------------------------------------------------------------------------------------------------------------


def planted(n: int = 100, b: int = 8, depth: int = 64, **changes: object) -> Scaling:
    """All puzzles in broad basins: every trajectory settled and right at half the depth."""
    yes, no = np.ones((n, b), bool), np.zeros((n, b), bool)
    even = Paired(n, 0, 0)
    nothing = Quartiles(0, NAN, NAN, NAN)
    start = Scaling(
        puzzles=n,
        labelled=n,
        restarts=b,
        depths=doubling_depths(depth),
        convergence=Convergence(
            n * b, n * b, 0, 0, (5.0, 9.0), nothing, Quartiles(n * b, 0.015, 0.015, 0.015), NAN, 0.0141, 0, 0, n
        ),
        trends=(),
        kinds={kind: dict(right=0, wrong=0, unlabelled=0) for kind in KINDS},
        periods={},
        correct={},
        by_depth=even,
        by_breadth=even,
        by_rule=dict(vote=even, q=even, any=even),
        oracle=even,
        agreement=agreement(np.zeros((n, b), np.uint64), yes, yes, no),
        modes=modes(yes, yes),
        coupling=Coupling(depth, n * b, n * b, 0, NAN, NAN, NAN, NAN),
        settled_lost=NAN,
        mixed=(n, 0),
    )
    start.kinds["settled"]["right"] = n * b
    return dataclasses.replace(start, **changes)


def names(scaling: Scaling, tol: float = 0.03) -> list[str]:
    findings = advise(scaling, tol=tol)
    assert all(finding.evidence and finding.advice.endswith(".") for finding in findings)
    return [finding.name for finding in findings]


def kinds(n: int, **counts: int) -> dict[str, dict[str, int]]:
    left = n - sum(counts.values())
    return {k: dict(right=0, wrong=dict(counts, settled=left).get(k, 0), unlabelled=0) for k in KINDS}


def basins(n: int, mode: str, share: float) -> Modes:
    """So large a share in a mode, and the others broad; 8 restarts."""
    exact, settled = np.ones((2, n, 8), bool)
    some = slice(round(n * share))
    if mode == "no correct attractor":
        exact[some] = False
    elif mode == "competing":
        exact[some, 0] = False
    elif mode == "narrow":
        exact[some, 0] = settled[some, 0] = False
    return modes(exact, settled)


BROAD = ["broad and stable", "depth is used up", "breadth has nothing to give"]


def test_what_always_works_needs_less_compute():
    assert names(planted()) == BROAD


def test_few_puzzles_conclude_nothing():
    assert names(planted(3)) == ["too few puzzles"] == names(planted(19, modes=basins(19, "competing", 1.0)))
    assert names(planted(20))[0] == "broad and stable"
    # 0 of 20 does not rule out 5 %.
    assert "depth is used up" not in names(planted(20))


@pytest.mark.parametrize("mode", ["no correct attractor", "competing", "narrow"])
def test_modes_are_findings_where_the_interval_is_above_a_tenth(mode):
    assert mode in names(planted(modes=basins(100, mode, 0.2)))
    assert mode not in names(planted(modes=basins(100, mode, 0.12)))
    assert mode in names(planted(1000, modes=basins(1000, mode, 0.13)))
    few = planted(b=3, modes=modes(np.zeros((100, 3)), np.zeros((100, 3))))
    assert mode not in names(few) and "too few restarts" in names(few)


@pytest.mark.parametrize("kind", ["wandering", "cycling", "growing"])
def test_kinds_are_findings(kind):
    assert kind in names(planted(kinds=kinds(800, **{kind: 160}), periods={2: 160}))
    assert kind not in names(planted(kinds=kinds(800, **{kind: 100})))


def convergence(**changes: object) -> Convergence:
    return dataclasses.replace(planted().convergence, **changes)


def test_findings_about_the_tolerance():
    steady = kinds(800, steady=400)
    assert "noise floor above the tolerance" in names(planted(kinds=steady, convergence=convergence(steady_level=0.04)))
    assert "resting above the noise floor" in names(planted(kinds=steady, convergence=convergence(steady_level=0.05)))
    assert "tolerance too loose" in names(planted(convergence=convergence(unsteady=200)))
    assert "tolerance too loose" not in names(planted(convergence=convergence(unsteady=20)))
    assert "tolerance too loose" not in names(
        planted(convergence=convergence(settled=24, unsteady=24, settled_puzzles=3))
    )
    assert names(planted(3), tol=0.01) == ["tolerance below the noise floor", "too few puzzles"]


def test_one_diverged_trajectory_is_told():
    assert names(planted(3, kinds=kinds(24, diverged=1))) == ["diverging", "too few puzzles"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(by_depth=Paired(100, 6, 0)), "still converging"),
        (dict(convergence=convergence(open=200, late=100)), "still converging"),
        (dict(kinds=kinds(800, decaying=200)), "still converging"),
        (dict(by_depth=Paired(100, 0, 6)), "depth hurts"),
        (dict(by_depth=Paired(100, 0, 5)), "depth is used up"),
        (dict(by_depth=Paired(100, 5, 0)), None),  # p = 0.06, and yet too many to rule a gain out
        (dict(convergence=convergence(open=24, late=24)), "depth is used up"),  # 3 puzzles
        (dict(by_depth=None), None),
    ],
)
def test_findings_about_depth(changes, name):
    every = {"still converging", "depth hurts", "depth is used up"}
    assert every & set(names(planted(**changes))) == ({name} if name else set())


def test_findings_about_breadth():
    gain, loss = Paired(100, 9, 1), Paired(100, 1, 9)
    assert "breadth pays" in names(planted(by_breadth=gain)) and "breadth hurts" in names(planted(by_breadth=loss))
    missed = dict(vote=Paired(100, 8, 0), q=Paired(100, 2, 0), any=Paired(100, 9, 0))
    findings = advise(planted(by_rule=missed, oracle=Paired(100, 9, 0)), tol=0.03)
    finding = next(f for f in findings if f.name == "selection loses to the oracle")
    assert "9.0 points" in finding.evidence and finding.advice == "Select by vote."
    assert "breadth has nothing to give" not in [f.name for f in findings]
    missed["vote"] = Paired(100, 4, 0)
    findings = advise(planted(by_rule=missed), tol=0.03)
    assert "Select" not in next(f for f in findings if f.name == "selection loses to the oracle").advice
    alone = names(planted(b=1, by_breadth=Paired(100, 0, 0)))
    assert alone == ["depth is used up", "too few restarts"]


def test_the_residual_as_a_judge():
    poor = Coupling(64, 800, 400, 0, 0.6, NAN, NAN, NAN)
    assert "residual is a poor judge" in names(planted(coupling=poor, mixed=(60, 70)))
    assert "residual is a poor judge" not in names(planted(coupling=poor, mixed=(90, 19)))
    # Hanley and McNeil's formula at A = 0.5: sqrt((nr + nw + 1) / (12 nr nw)).
    upper = advice.auroc_upper(0.5, 30, 50)
    assert upper == pytest.approx(0.5 + 1.96 * math.sqrt(81 / (12 * 30 * 50)), rel=1e-9)
    assert math.isnan(advice.auroc_upper(NAN, 3, 3)) and math.isnan(advice.auroc_upper(0.5, 0, 3))


def test_shallow_runs_say_so():
    assert "too shallow to tell trends" in names(planted(depth=8))


def test_nothing_may_stand_out():
    some = Paired(40, 2, 0)
    assert names(planted(40, modes=basins(40, "narrow", 0.1), by_depth=some, oracle=some)) == ["nothing stands out"]


@given(st.integers(0, 400), st.integers(1, 400), st.floats(0.01, 0.99))
def test_nothing_is_surely_above_and_below(count, trials, threshold):
    share = min(count, trials) / trials
    above, below = (f(share, trials, threshold) for f in (advice.surely_above, advice.surely_below))
    assert not (above and below) and (not above or share > threshold) and (not below or share < threshold)
    assert not advice.surely_above(NAN, trials, threshold) and not advice.surely_below(NAN, trials, threshold)


# from a model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> EquilibriumReasoner:
    return EquilibriumReasoner.from_pretrained("sudoku-small")


@pytest.fixture(scope="module")
def puzzles():
    return sudoku_generator.generate(3, "easy", seed=5), sudoku_generator.generate(2, "hard", seed=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory, puzzles):
    path = tmp_path_factory.mktemp("data") / "puzzles.csv"
    rows = [
        f"{part.source[i]},{sudoku.decode(part.inputs[i])},{sudoku.decode(part.labels[i])}"
        for part in puzzles
        for i in range(len(part))
    ]
    path.write_text("source,question,answer\n" + "\n".join(rows) + "\n")
    return path


SETTLED = 0.0282


@pytest.mark.slow
def test_dynamics_agree_with_solve_and_do_not_depend_on_chunks(model, puzzles):
    inputs, labels = (np.concatenate([getattr(p, name) for p in puzzles]) for name in ("inputs", "labels"))
    labels[1] = 0
    arguments = dict(depths=recorded_depths(16), breadth=2)
    run = record(model, inputs, labels, **arguments)
    moves = describe(run, tol=SETTLED, noise_scale=0.01)
    again = describe(record(model, inputs, labels, chunk=2, **arguments), tol=SETTLED, noise_scale=0.01)
    for name, values in vars(moves).items():
        np.testing.assert_array_equal(values, getattr(again, name))
    result = model.solve(torch.from_numpy(inputs).long(), depth=16, breadth=2, halt="none", return_all=True)
    np.testing.assert_array_equal(run.answer[..., -1], answer_codes(result.all_preds.numpy()))
    np.testing.assert_array_equal(moves.kind == "settled", result.all_residual.numpy() <= np.float32(SETTLED))
    scaling = summarise(run, tol=SETTLED, noise_scale=0.01)
    assert (scaling.puzzles, scaling.labelled, scaling.convergence.trajectories) == (5, 4, 10)
    assert sum(map(sum, (counts.values() for counts in scaling.kinds.values()))) == 10
    assert sum(counts["unlabelled"] for counts in scaling.kinds.values()) == 2
    assert scaling.modes.puzzle.tolist() == [0, 2, 3, 4]
    assert scaling.convergence.settled == int((moves.kind == "settled").sum()) >= 6
    assert 0.01 < scaling.convergence.floor.median < 0.02 and 0.1 < scaling.convergence.rate.median < 0.9


def test_summary_of_nothing_labelled_and_of_one_step(model, puzzles):
    inputs, labels = puzzles[0].inputs, puzzles[0].labels
    scaling = summarise(record(model, inputs, np.zeros_like(inputs), depths=[1]), tol=1e-3, noise_scale=0.0)
    assert scaling.labelled == 0 and scaling.by_depth is None and scaling.convergence.open == 0
    assert names(scaling) == ["too few puzzles"]
    right = summarise(record(model, inputs, labels, depths=[1]), tol=1e-3, noise_scale=0.01)
    assert right.depths == (1,) and right.kinds["undecided"]["wrong"] + right.kinds["undecided"]["right"] == 3


def test_diverged_trajectories_are_counted_and_infect_nothing(model, puzzles):
    run = record(model, puzzles[0].inputs, puzzles[0].labels, depths=recorded_depths(16), breadth=2)
    residuals, status, correct = run.residuals.copy(), run.status.copy(), run.correct.copy()
    residuals[0, 0, -1], status[0, 0, -1], correct[0, 0, -1] = NAN, Status.DIVERGED, False
    lost = dataclasses.replace(run, residuals=residuals, status=status, correct=correct)
    scaling = summarise(lost, tol=0.03, noise_scale=0.01)
    assert sum(scaling.kinds["diverged"].values()) == scaling.coupling.diverged == 1
    assert scaling.agreement.pairs == 2 and math.isfinite(scaling.convergence.steps[0])
    assert "diverging" in names(scaling)


# the command ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_diagnose_as_json(data, tmp_path):
    file = tmp_path / "report.json"
    options = ["--depth", 16, "--breadth", 3, "--seed", 7, "-o", file]
    report = eqr_json("diagnose", data, *options)
    assert set(report) == {
        "command",
        "model",
        "task",
        "settings",
        "card",
        "backend",
        "backend_reason",
        "puzzles",
        "subset",
        "convergence",
        "residual_by_depth",
        "kinds",
        "accuracy",
        "depth_gain",
        "breadth_gain",
        "rule_gain",
        "oracle_gain",
        "agreement",
        "modes",
        "coupling",
        "findings",
        "seconds",
        "reproduce",
        "errors",
    }
    assert json.loads(file.read_text()) == report
    assert report["settings"]["tol"] == load_checkpoint(MODEL).card.tol and report["settings"]["tol_caveat"] is None
    assert report["settings"]["tol_from"] == "the model's card"
    assert "diagnose --depth 16 --breadth 3 --seed 7 " in report["reproduce"]["command"]
    same = eqr_json(
        "eval", data, "--depths", "1,2,4,8,16", "--breadths", "1,3", "--select", "residual,vote,q,any", "--seed", 7
    )
    assert report["accuracy"] == [{k: v for k, v in cell.items() if k != "nfe"} for cell in same["grid"]]
    assert report["reproduce"]["data_sha256"] == same["reproduce"]["data_sha256"]
    for name in ("counts", "by_source"):
        assert report["modes"][name] == same["diagnosis"][name]
    assert report["coupling"]["residual_auroc"] == same["coupling"][-1]["residual_auroc"]
    assert report["convergence"]["settled"] == same["coupling"][-1]["settled"]
    assert [finding["name"] for finding in report["findings"]] == ["too few puzzles"]
    assert report["agreement"]["pairs"] == 15 and sum(report["agreement"]["distinct"].values()) == 5


def test_diagnose_in_tables(data):
    shown = eqr("diagnose", data, "--depth", 16, "--breadth", 2, "--subset", 4).stdout
    for text in ("4 of 5 puzzles", "contraction rate", "residual by depth", "modes of 2 restarts", "too few puzzles"):
        assert text in shown
    alone = eqr("diagnose", data, "--depth", 1, "--breadth", 1, "--limit", 2, "--reveal", 81).stdout
    assert "undecided" in alone and "modes of" not in alone


def test_diagnose_without_a_calibrated_tolerance(data, tmp_path):
    noisy = make_copier(tmp_path / "noisy", EqRConfig.sudoku_paper(**TINY, noise_scale=0.02))
    report = eqr_json("diagnose", data, "--model", noisy, "--depth", 16, "--breadth", 2, "--reveal", 81)
    assert report["settings"]["tol"] == pytest.approx(2 * math.sqrt(2) * 0.02)
    assert report["settings"]["tol_from"] == "provisional, twice the residual that the noise leaves"
    quiet = make_copier(tmp_path / "quiet", EqRConfig.sudoku_paper(**TINY, noise_scale=0.0))
    assert "`eqr calibrate --write` finds one" in eqr("diagnose", data, "--model", quiet, "--depth", 4).stderr
    report = eqr_json("diagnose", data, "--model", quiet, "--tol", 0.02, "--depth", 16, "--breadth", 2, "--reveal", 81)
    assert report["settings"]["tol_from"] == "--tol" and report["convergence"]["settled"] == 10
    # No floor without noise: the whole fall counts, of which the residual at 8 and 16 shows how fast it is.
    depths = {row["depth"]: row["residual"]["median"] for row in report["residual_by_depth"] if row["group"] == "right"}
    rate = report["convergence"]["rate"]
    assert rate["count"] == 10 and rate["median"] == pytest.approx((depths[16] / depths[8]) ** (1 / 8), abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tol", "soon"], "--tol must be auto, fast or a positive number"),
        (["--tol", "-1"], "tol must be positive and finite"),
        (["--broad", 0], "--broad must be a share above 0"),
        (["--depth", 0], "depth"),
        (["--subset", 9], "a subset must have 1 to all 5 of the puzzles"),
        (["--output", "nowhere/report.json"], "there is no folder"),
    ],
)
def test_diagnose_refuses(data, options, message):
    assert message in eqr("diagnose", data, *options, code=2).stderr


def test_diagnose_of_an_empty_file_and_of_lines_that_are_no_puzzles(data, tmp_path):
    file = tmp_path / "puzzles.csv"
    file.write_text("")
    assert "holds no puzzles" in eqr("diagnose", file, code=2).stderr
    file.write_text("\n".join(line.split(",")[1] for line in data.read_text().splitlines()[1:]) + "\n")
    assert "no puzzle comes with its answer" in eqr("diagnose", file, code=2).stderr
    file.write_text(data.read_text() + "x,123,456\n")
    report = eqr_json("diagnose", file, "--depth", 2, "--breadth", 2, code=1)
    assert report["puzzles"] == 5 and [error["line"] for error in report["errors"]] == [7]
