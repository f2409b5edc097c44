"""The map: recordings, policies replayed on them against `solve` itself, costs, fronts, and what is chosen."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqr_kernels import EquilibriumReasoner, ops
from eqr_kernels.studies import meters
from eqr_kernels.studies.checking import check
from eqr_kernels.studies.costs import Latency, Price, UnitCosts, measure_costs
from eqr_kernels.studies.front import cheapest_within, knee, pareto, recommend
from eqr_kernels.studies.points import bend, map_points, savings, steps_to_settle
from eqr_kernels.studies.recording import chunk_size, record, recordable_depths
from eqr_kernels.studies.replay import POLICIES, RACES, Policy, ends_when_halted, outcome, policies
from eqr_kernels.studies.scoring import exact_match
from eqr_kernels.studies.store import Store
from eqr_kernels.studies.tolerance import calibrate
from eqr_kernels.tasks import sudoku_generator
from eqr_kernels.tasks.registry import find_task
from eqr_kernels.tasks.task import symmetries_of
from eqr_kernels.trajectory import Status
from eqr_kernels.views import solve_puzzles
from tests.support.models import make_contractive, tiny_config
from tests.support.recordings import made

needs_extension = pytest.mark.skipif(not ops.extension_status()[0], reason="needs the compiled extension")
COSTS = UnitCosts((Latency(1, 2.0, 0.5), Latency(4, 3.0, 0.25)), 64, 0.1, 2, "core", (), None)


@pytest.fixture(scope="module")
def puzzles():
    return sudoku_generator.generate(6, "easy", seed=3)


@pytest.fixture(scope="module")
def model():
    return EquilibriumReasoner.from_pretrained("sudoku-small")


SYMMETRIES = {
    "random starts": symmetries_of(find_task("sudoku"), 5, views=False, turn_every=None),
    "random starts that turn": symmetries_of(find_task("sudoku"), 5, views=False, turn_every=5),
    "views": symmetries_of(find_task("sudoku"), 5, views=True, turn_every=None),
    "views that turn": symmetries_of(find_task("sudoku"), 5, views=True, turn_every=5),
}


@pytest.fixture(scope="module")
def recordings(model, puzzles):
    how = dict(depths=range(1, 13), breadth=4, chunk=4, seed=5)
    return {name: record(model, puzzles.inputs, puzzles.labels, **how, **s) for name, s in SYMMETRIES.items()}


@pytest.fixture(scope="module")
def recording(recordings):
    return recordings["random starts"]


# recordings and policies ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize("policy", list(policies([3, 12], [1, 4], [0.03, 0.3])), ids=str)
@pytest.mark.parametrize("name", SYMMETRIES)
def test_a_replayed_policy_is_what_solve_answers(model, puzzles, recordings, name, policy):
    real = solve_puzzles(model, puzzles.inputs, seed=5, **SYMMETRIES[name], **policy.arguments())
    result = outcome(recordings[name], policy)
    assert result.correct.tolist() == exact_match(real.preds.numpy(), puzzles.labels).tolist()
    assert result.steps.tolist() == real.steps.tolist()
    assert result.restart.tolist() == real.restart.tolist()
    assert result.settled.tolist() == real.converged.tolist()
    if policy.select != "first" or "views" in name:  # what losers spend elsewhere depends on how many go at a time
        assert result.nfe.tolist() == real.nfe.tolist()
    else:
        assert (result.nfe <= policy.breadth * policy.depth).all() and (result.nfe >= result.steps).all()


def test_votes_are_counted_on_whole_answers():
    """Restarts 0 and 2 answer alike; restart 1 has the lowest score and an answer of its own."""
    by_hand = made(
        correct=[[[1], [0], [1]]], residual=[[[0.3], [0.1], [0.2]]], score=[[[3], [1], [2]]], answer=[[[5], [7], [5]]]
    )
    assert outcome(by_hand, Policy("fixed", 1, 3, select="vote")).restart.tolist() == [2]
    assert outcome(by_hand, Policy("fixed", 1, 3)).restart.tolist() == [1]


def test_a_recording_does_not_depend_on_its_chunks(model, puzzles):
    two = [record(model, puzzles.inputs, puzzles.labels, depths=(1, 2, 3), breadth=2, chunk=c) for c in (2, 6)]
    for name, values in two[0].arrays().items():
        assert np.array_equal(values, getattr(two[1], name)), name


def test_policies_by_hand():
    by_hand = made(
        correct=[[[0, 0, 1, 1], [0, 1, 1, 0]]],
        residual=[[[0.9, 0.5, 0.1, 0.05], [0.9, 0.1, 0.3, 0.2]]],
        q_halt=[[[-1, -1, -1, 2], [-1, -1, 1, -1]]],
    )

    def run(*policy, **more):
        result = outcome(by_hand, Policy(*policy, **more))
        return (
            result.correct.item(),
            result.steps.item(),
            result.nfe.item(),
            result.restart.item(),
            result.settled.item(),
        )

    assert run("fixed", 4, 2) == (True, 4, 8, 0, False)
    assert run("fixed", 3, 2) == (True, 3, 6, 0, False)
    assert run("fixed", 2, 1) == (False, 2, 2, 0, False)
    # The first settles after 3 steps and the second after 2, both with the same score: the lower restart answers.
    assert run("residual", 4, 2, 0.1) == (True, 3, 5, 0, True)
    assert run("race", 4, 2, 0.1, select="first") == (True, 2, 4, 1, True)
    assert run("race+q", 4, 2, 0.1, select="first") == (True, 4, 8, 0, True)
    assert run("q", 4, 2) == (True, 4, 7, 0, True)
    assert run("residual", 4, 1, 0.01) == (True, 4, 4, 0, False)
    # The residual of the first is low at steps 3 and 4 and its q_halt positive at 4; those of the second never meet.
    assert run("residual+q", 4, 2, 0.1) == (True, 4, 8, 0, True)
    assert run("residual+q", 3, 2, 0.1) == (True, 3, 6, 0, False)


@pytest.mark.parametrize(
    ("halt", "patience", "steps", "status"),
    [
        ("residual", 1, [2, 2, 5, 4], "CCMC"),
        ("residual", 2, [3, 5, 5, 5], "CCMC"),
        ("q", 1, [1, 3, 3, 4], "HHHH"),
        ("residual+q", 1, [3, 5, 5, 4], "CMMC"),
        ("residual+q", 2, [3, 5, 5, 5], "CMMC"),
        ("residual|q", 1, [1, 2, 3, 4], "HCHC"),
        ("residual|q", 2, [1, 3, 3, 4], "HHHH"),
        ("none", 1, [5, 5, 5, 5], "MMMM"),
    ],
)
def test_halting_rules_by_hand(halt, patience, steps, status):
    """Four trajectories whose two signals come and go, each on its own."""
    low = [[0, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    positive = [[1, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]]
    by_hand = made(np.ones((1, 4, 5)), np.where([low], 0.1, 0.9), q_halt=np.where([positive], 0.5, -0.5))
    ends = ends_when_halted(by_hand, halt, tol=None if halt in ("q", "none") else 0.1, patience=patience)
    assert ends.steps.tolist() == [steps]
    names = {"C": Status.CONVERGED, "H": Status.HALTED, "M": Status.MAX_DEPTH}
    assert ends.status.tolist() == [[names[letter] for letter in status]]


@pytest.mark.parametrize(
    ("halt", "message"),
    [
        ("residual+q", r'halt="residual\+q" looks at the residual and needs tol'),
        ("ever", "halt must be one of residual,"),
    ],
)
def test_rules_that_cannot_be_replayed(halt, message):
    with pytest.raises(ValueError, match=message):
        ends_when_halted(made([[[1]]], [[[0.1]]]), halt)


def test_patience_is_not_replayed_over_turns():
    with pytest.raises(ValueError, match="patience must be 1 for a recording with turns, .* got 2"):
        ends_when_halted(made([[[1]]], [[[0.1]]], turn_every=2), "residual", tol=0.1, patience=2)


def test_a_trajectory_that_diverged_spends_nothing_more_and_never_answers():
    by_hand = made(
        correct=[[[1, 0, 0], [0, 1, 1]]],
        residual=[[[0.01, math.nan, math.nan], [0.5, 0.4, 0.3]]],
        diverged=[[2, 4]],
    )
    result = outcome(by_hand, Policy("fixed", 3, 2))
    assert (result.correct.item(), result.restart.item(), result.nfe.item()) == (True, 1, 5)
    # It had settled before.
    early = outcome(by_hand, Policy("residual", 3, 2, 0.02))
    assert (early.correct.item(), early.restart.item(), early.nfe.item()) == (True, 0, 4)
    alone = outcome(by_hand, Policy("fixed", 3, 1))
    assert (alone.correct.item(), alone.steps.item()) == (False, 2)


@pytest.mark.parametrize(
    ("how", "steps", "correct", "one_by_one"),
    [
        (dict(), [2, 2, 2], False, None),
        (dict(turn_every=3), [2, 2, 2], False, None),
        (dict(views=True), [3, 0, 0], True, [1]),
        (dict(views=True, turn_every=2), [3, 0, 0], True, [1]),
    ],
)
def test_what_the_losers_of_a_race_spend(how, steps, correct, one_by_one):
    """They settle after 3 steps on the right answer, after 2 on a wrong one, and never."""
    low = [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    by_hand = made([[[0, 0, 1, 1, 1], [0] * 5, [0] * 5]], np.where([low], 0.1, 0.9), **how)
    result = outcome(by_hand, Policy("race", 5, 3, 0.1, "first"))
    assert (result.nfe.item(), result.longest.item()) == (sum(steps), max(steps))
    assert result.correct.item() == correct and result.settled.item()
    assert (None if result.one_by_one is None else result.one_by_one.tolist()) == one_by_one
    alone = dataclasses.replace(COSTS, latency=(Latency(1, 2.0, 0.5), Latency(3, 9.0, 0.1)))
    computed = alone.query_ms(3, result.nfe, result.longest, result.one_by_one).item()
    assert computed == (9.0 + 0.1 * sum(steps) if one_by_one is None else 2.0 + 0.5 * 3)


def test_where_trajectories_go_side_by_side_a_query_takes_as_long_as_the_longest():
    by_hand = made(correct=[[[1, 1, 1], [1, 1, 1]]], residual=[[[0.1, 0.1, 0.1], [0.9, 0.9, 0.1]]])
    result = outcome(by_hand, Policy("residual", 3, 2, 0.2))
    assert (result.nfe.item(), result.longest.item()) == (4, 3)
    costs = dataclasses.replace(COSTS, latency=(Latency(2, 1.0, 0.5),))
    assert costs.query_ms(2, result.nfe, result.longest).tolist() == [1.0 + 4 * 0.5]
    beside = dataclasses.replace(costs, side_by_side=True)
    assert beside.query_ms(2, result.nfe, result.longest).tolist() == [1.0 + 3 * 2 * 0.5]


@pytest.mark.parametrize(
    ("puzzles", "depth", "breadth", "device", "expected"),
    [(200, 64, 8, "cpu", 13), (48, 16, 4, "cpu", 16), (3, 1, 1, "cpu", 64), (2500, 64, 8, "cuda", 190)],
)
def test_parts_are_small_but_keep_the_device_busy_and_fit_in_memory(puzzles, depth, breadth, device, expected):
    depths = range(1, depth + 1)
    assert chunk_size(puzzles, 81, depths, breadth, device, resumable=True) == expected


def test_a_recording_must_be_deep_and_broad_enough(recording):
    for policy in (Policy("fixed", 13, 1), Policy("fixed", 1, 5)):
        with pytest.raises(ValueError, match="the policy needs depth .* and the recording has 12 and 4"):
            outcome(recording, policy)


def test_a_halted_recording_is_not_replayed():
    halted = made([[[1]]], [[[0.1]]], halt="residual")
    with pytest.raises(ValueError, match='only a recording without halting can be replayed, .* halt="residual"'):
        outcome(halted, Policy("fixed", 1, 1))


# backends that record few depths -------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """A backend that records 6 depths at most, as the cuda backend records 64."""
    for backend in ("cpu.CpuBackend", "reference.ReferenceBackend"):
        monkeypatch.setattr(f"eqr_kernels.backends.{backend}.max_checkpoints", 6)


@pytest.mark.slow
def test_no_more_depths_are_asked_for_than_the_backend_records(model, puzzles, recording, few):
    depths = recordable_depths(model, 12, [1, 4, 12])
    assert depths == (1, 2, 3, 4, 7, 12)
    part = record(model, puzzles.inputs, puzzles.labels, depths=depths, breadth=4, seed=5)
    assert part.depths == depths and not part.every_step
    for name in ("correct", "answer", "score", "steps"):
        whole = getattr(recording, name)[..., [d - 1 for d in depths]]
        assert np.array_equal(getattr(part, name), whole), name
    assert np.array_equal(part.residuals, recording.residuals)
    with pytest.raises(ValueError, match="the backend records at most 6 depths, and 7 are wanted: .*; name fewer"):
        record(model, puzzles.inputs, puzzles.labels, depths=range(1, 8))


@pytest.mark.parametrize("halt", ["residual", "q", "residual+q", "residual|q"])
def test_between_recorded_depths_a_trajectory_goes_on_to_the_next(halt):
    """Rules fire at steps 2 and 3 of 5; depths 1, 2 and 5 are recorded."""
    q = [[[-1, 1, 1], [-1, -1, 1]]]
    few = made(
        [[[0, 1, 1], [0, 0, 1]]], [[[0.9, 0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1, 0.1]]], depths=(1, 2, 5), q_halt=q
    )
    tol = None if halt == "q" else 0.2
    ends = ends_when_halted(few, halt, tol=tol)
    assert ends.steps.tolist() == [[2, 5]] and ends.settled.all()
    assert (ends.status == (Status.HALTED if halt == "q" else Status.CONVERGED)).all()
    if halt in POLICIES:
        assert outcome(few, Policy(halt, 5, 2, tol)).nfe.tolist() == [7]
    (row,) = calibrate(few, candidates=[0.2]).candidates
    assert (row.correct, row.mean_steps) == (1, 2.0)


@pytest.mark.parametrize("halt", ["residual", "q", "residual+q", "residual|q"])
def test_one_that_diverges_on_the_way_to_the_next_recorded_depth_has_not_settled(halt):
    lost = made([[[0, 0]]], [[[0.9, 0.1, 0.1]]], depths=(1, 3), q_halt=[[[-1, 1]]], diverged=[[3]])
    ends = ends_when_halted(lost, halt, tol=None if halt == "q" else 0.2)
    assert ends.status.tolist() == [[Status.DIVERGED]] and ends.steps.tolist() == [[3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ever", 1, 1), "a policy must be one of fixed, residual, q, residual\\+q, race, race\\+q, got 'ever'"),
        (("fixed", 0, 1), "at least 1, got 0 and 1"),
        (("fixed", 1, 1, 0.1), r"tol is for the policies residual, residual\+q, race, race\+q, which need it"),
        (("residual", 1, 1), "which need it; got residual with None"),
        (("residual+q", 1, 1), "residual\\+q with None"),
        (("race", 1, 2, 0.1), "select=\"first\" is for race and race\\+q alone, got race with 'residual'"),
        (("q", 1, 2, None, "first"), "select=\"first\" is for race and race\\+q alone, got q with 'first'"),
    ],
)
def test_policies_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Policy(*arguments)


def test_the_grid_has_each_setting_once():
    grid = list(policies([1, 2], [1, 2], [0.1, 0.2]))
    assert len(grid) == len(set(grid)) == 4 + 8 + 4 + 8 + 4 + 4
    assert {p.breadth for p in grid if p.select == "first"} == {2}


def test_record_needs_puzzles_with_labels_of_their_shape(model, puzzles):
    with pytest.raises(ValueError, match=r"must both be \[N >= 1, S\]"):
        record(model, puzzles.inputs[:0], puzzles.labels[:0], depths=[1], breadth=1)


# the store -----------------------------------------------------------------------------------------------------------


class Broken(RuntimeError):
    pass


def test_an_interrupted_recording_goes_on_where_it_stopped(model, puzzles, tmp_path):
    sizes = dict(depths=(1, 2), breadth=2, chunk=2)

    class Breaks(Store):
        def save(self, start, part):
            super().save(start, part)
            if start == 2:
                raise Broken

    identity = {"weights": "w", "depth": 2}
    with pytest.raises(Broken):
        record(model, puzzles.inputs, puzzles.labels, parts=Breaks(tmp_path / "r", identity), **sizes)
    ran = []

    class Counts(Store):
        def save(self, start, part):
            ran.append(start)
            super().save(start, part)

    went_on = record(model, puzzles.inputs, puzzles.labels, parts=Counts(tmp_path / "r", identity), **sizes)
    assert ran == [4]
    whole = record(model, puzzles.inputs, puzzles.labels, **sizes)
    for name, values in whole.arrays().items():
        assert np.array_equal(values, getattr(went_on, name)), name
    assert went_on.backend_reason == whole.backend_reason


def test_a_part_that_was_cut_off_is_run_again(recording, tmp_path):
    store = Store(tmp_path / "r", {})
    store.save(0, recording)
    path = tmp_path / "r" / "part-000000.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert store.load(0) is None
    assert store.load(7) is None


def test_another_recording_is_refused_and_named(tmp_path):
    Store(tmp_path / "r", {"weights": "a", "depth": 3})
    Store(tmp_path / "r", {"weights": "a", "depth": 3})
    with pytest.raises(ValueError, match="another recording: depth was 3 and is 4"):
        Store(tmp_path / "r", {"weights": "a", "depth": 4})


def test_only_a_recording_is_discarded(tmp_path):
    Store.discard(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no recording"):
        Store.discard(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    Store(tmp_path / "r", {})
    Store.discard(tmp_path / "r")
    assert not (tmp_path / "r").exists()


# fronts --------------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=30)


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(points):
    cost, right = [p[0] for p in points], [p[1] for p in points]
    front = pareto(cost, right)

    def beaten(i: int, j: int) -> bool:
        return cost[j] <= cost[i] and right[j] >= right[i] and (cost[j], right[j]) != (cost[i], right[i])

    assert not any(beaten(i, j) for i in front for j in range(len(points)))
    off = set(range(len(points))) - set(front)
    same = {(cost[i], right[i]) for i in front}
    assert all(any(beaten(i, j) for j in front) or (cost[i], right[i]) in same for i in off)
    assert all(cost[a] < cost[b] and right[a] < right[b] for a, b in itertools.pairwise(front))


def test_a_front_without_sound_points():
    assert pareto([math.nan, 2.0], [0.5, math.nan]) == []
    with pytest.raises(ValueError, match=r"must both be \[n\]"):
        pareto([1.0], [1.0, 2.0])


@pytest.mark.parametrize("place", [1, 2, 3])
def test_the_knee_is_where_a_bent_line_bends(place):
    cost = [2.0**k for k in range(5)]
    right = [0.9 * k / place if k <= place else 0.9 + 0.1 * (k - place) / (4 - place) for k in range(5)]
    assert knee(cost, right) == place


@pytest.mark.parametrize(
    ("cost", "right"),
    [([1, 2], [0.1, 0.9]), ([1, 2, 4], [0.1, 0.5, 0.9]), ([1, 2, 4], [0.1, 0.2, 0.9]), ([1], [0.5])],
)
def test_a_straight_or_hollow_line_has_no_knee(cost, right):
    assert knee(cost, right) is None


def test_the_cheapest_within_half_a_point():
    right = [0.5, 0.90, 0.9449, 0.945, 0.95]
    assert cheapest_within([0, 1, 2, 3, 4], right, 0.5) == 3
    assert cheapest_within([0], [0.0], 0.5) == 0


@given(POINTS, st.integers(1, 8), st.integers(1, 12))
def test_what_is_recommended_fits_and_nothing_cheaper_does(points, target, budget):
    cost, right = [p[0] for p in points], [p[1] / 8 for p in points]
    chosen = recommend(cost, right, target=target / 8, budget=budget)
    fits = [i for i in range(len(points)) if right[i] >= target / 8 and cost[i] <= budget]
    assert (chosen is None) == (not fits)
    if chosen is not None:
        assert chosen in fits and cost[chosen] == min(cost[i] for i in fits)
    best = recommend(cost, right, budget=budget)
    within = [right[i] for i in range(len(points)) if cost[i] <= budget]
    assert (best is None) == (not within)
    assert best is None or right[best] == max(within)


@pytest.mark.parametrize("bad", [{}, {"target": 0.0}, {"target": 95.0}, {"budget": -1.0}, {"budget": math.nan}])
def test_wishes_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="target|budget"):
        recommend([1.0], [1.0], **bad)


# points --------------------------------------------------------------------------------------------------------------


def test_a_point_by_hand():
    by_hand = made(correct=[[[0, 1]] * 4, [[1, 1]] * 4], residual=[[[0.5, 0.5]] * 4, [[0.1, 0.1]] * 4])
    slow, early = map_points(by_hand, [Policy("fixed", 2, 4), Policy("residual", 2, 1, 0.2)], COSTS, Price(3.6, "EUR"))
    assert (slow.accuracy.correct, slow.accuracy.total, slow.settled) == (2, 2, None)
    assert slow.nfe == 8 and slow.latency_ms == (5.0, 5.0, 5.0)  # 3 ms + 8 x 0.25 ms
    assert slow.unit_seconds == pytest.approx(8 * 0.1e-3 * 2) and slow.throughput == pytest.approx(1 / 0.8e-3)
    assert slow.cost_per_1000 == pytest.approx(1000 * 0.8e-3 * 0.001)  # 3.6 an hour is 0.001 a second
    assert slow.joules is None
    assert early.nfe == 1.5 and early.settled == 0.5
    assert early.latency_ms[0] == pytest.approx(2.0 + 1.5 * 0.5)


def test_what_early_exit_saves_and_loses():
    by_hand = made(correct=[[[0, 1]], [[1, 0]], [[1, 1]]], residual=[[[0.1, 0.1]], [[0.1, 0.1]], [[0.9, 0.9]]])
    (row,) = savings(by_hand, [1], tol=0.2)
    assert (row.full.correct, row.exit.correct, row.lost, row.gained) == (2, 2, 1, 1)
    assert (row.nfe_full, row.nfe_exit, row.times) == (2.0, 4 / 3, 1.5) and row.settled == pytest.approx(2 / 3)


def test_the_bend_of_a_model_that_is_never_right():
    by_hand = made(correct=[[[0, 0, 0, 0]]], residual=[[[1, 1, 1, 1]]])
    points = map_points(by_hand, policies([1, 2, 4], [1], [0.1]), COSTS)
    where = bend(points)
    cheapest = min(range(len(points)), key=lambda i: points[i].unit_seconds)
    assert where.front == (cheapest,) and where.best == where.cheapest_within == cheapest and where.knee is None
    steps, settled, correct = steps_to_settle(by_hand, 0.1)
    assert (steps.tolist(), settled.tolist(), correct.tolist()) == ([4], [False], [False])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_price_must_be_one(bad):
    with pytest.raises(ValueError, match="a price must be positive and finite"):
        Price(bad)


# costs and checks ----------------------------------------------------------------------------------------------------


def test_costs_and_checks_on_a_tiny_model():
    """What they mean, not how fast it is: every number is there, sound, and of the right solve."""
    model = make_contractive(tiny_config())
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 7, (5, 6))
    calls = []
    real = model.solve

    def solve(rows, **options):
        calls.append((len(rows), options["depth"], options["breadth"], options["halt"]))
        return real(rows, **options)

    model.solve = solve
    costs = measure_costs(model, tokens, [1, 4], depths=(2, 8), seconds=0.002, rounds=3, trajectories=7)
    assert [x.breadth for x in costs.latency] == [1, 4]
    assert all(math.isfinite(x.ms_per_nfe) and x.overhead_ms >= 0 for x in costs.latency)
    assert costs.trajectories == 7 and {n for n, *_ in calls} == {1, 7}
    assert {halt for *_, halt in calls} == {"none"}
    assert {(m.depth, m.breadth) for m in costs.memory} in ({(2, 1), (2, 4), (8, 1), (8, 4)}, set())
    assert costs.unit == "core" and costs.units == torch.get_num_threads()
    labels = real(torch.from_numpy(tokens), depth=4, halt="none").preds.numpy()
    recording = record(model, tokens, labels, depths=range(1, 5))
    (point,) = map_points(recording, [Policy("fixed", 4, 1)], dataclasses.replace(costs, latency=COSTS.latency))
    replayed = outcome(recording, point.policy)
    checked = check(model, tokens, labels, point, replayed, np.full(5, 4.0), seconds=0.0, least=2)
    assert (checked.puzzles, checked.correct, checked.nfe, checked.queries) == (2, 2, 4.0, 2)
    assert (checked.computed_correct, checked.computed_nfe) == (2, 4.0)
    assert checked.computed_ms == (4.0, 4.0, 4.0) and 0 < checked.latency_ms[0] <= checked.latency_ms[2]
    assert checked.latency_error == 4.0 / checked.latency_ms[0] - 1


def test_joules_come_from_the_counter_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(meters, "_RAPL", tmp_path)
    cpu = torch.device("cpu")
    assert meters.joules(lambda: None, 0.0, cpu) is None
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
    for zone, name in names.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name)
        (tmp_path / zone / "energy_uj").write_text("1000000")

    def work() -> None:
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("4000000")
        for again in ("intel-rapl:0:0", "intel-rapl:2"):  # a part of a package, and what holds them: counted already
            (tmp_path / again / "energy_uj").write_text("9000000")

    energy = meters.joules(work, 0.0, cpu)
    assert energy is not None and (energy.joules, energy.calls, energy.source) == (3.0, 1, "RAPL")
    assert meters.joules(lambda: (tmp_path / "intel-rapl:1" / "energy_uj").write_text("0"), 0.0, cpu) is None


def test_peak_memory_sees_a_large_tensor_and_not_what_was_there():
    held = torch.ones(8 << 20)  # 32 MiB
    peak = meters.peak_bytes(lambda: torch.ones(16 << 20).sum(), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 60 << 20 < peak < 90 << 20
    assert held[0] == 1


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_more_depth_never_costs_less_and_an_exit_never_costs_more(data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    by_hand = made(rng.integers(0, 2, shape), rng.random(shape), q_halt=rng.normal(size=shape))
    n, b, d = shape
    full = outcome(by_hand, Policy("fixed", d, b))
    races = [Policy(name, d, b, 0.3, "first") for name in RACES]
    for policy in (Policy("residual", d, b, 0.3), Policy("q", d, b), *races):
        result = outcome(by_hand, policy)
        assert (result.nfe <= full.nfe).all() and (result.nfe >= result.steps).all() and (result.steps >= 1).all()
    loose, tight = (outcome(by_hand, Policy("residual", d, b, tol)) for tol in (0.6, 0.2))
    assert (loose.nfe <= tight.nfe).all()
