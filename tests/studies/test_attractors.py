"""Coupling, the four modes and the fixed subset, on cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqr_kernels.studies.attractors import BROAD, MODES, modes
from eqr_kernels.studies.coupling import couple
from eqr_kernels.studies.scoring import rating_bands
from eqr_kernels.studies.statistics import auroc, spearman
from eqr_kernels.studies.subset import digest, stratified_subset
from tests.support.recordings import made

INF, NAN = math.inf, math.nan

# coupling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "right", "area"),
    [
        ([1, 2, 3, 4], [1, 1, 0, 0], 1.0),
        ([1, 2, 3, 4], [0, 0, 1, 1], 0.0),
        ([1, 2, 3, 4], [1, 0, 1, 0], 0.75),  # of 4 pairs only (3 right, 2 wrong) is upside down
        ([5, 5, 5], [1, 0, 0], 0.5),
        ([1, 2, 2, INF, INF], [1, 1, 0, 1, 0], (1 + 1 + 0.5 + 1 + 0 + 0.5) / 6),
    ],
)
def test_auroc_by_hand(cost, right, area):
    assert auroc(cost, right) == pytest.approx(area, abs=1e-15)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=40))
def test_auroc_counts_pairs(rows):
    wins = [
        1.0 if good < bad else 0.5 if good == bad else 0.0
        for good, right in rows
        if right
        for bad, other in rows
        if not other
    ]
    area = auroc([c for c, _ in rows], [r for _, r in rows])
    if wins:
        assert area == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    else:
        assert math.isnan(area)


def test_auroc_of_many_pairs_does_not_overflow():
    n = 200_000
    assert auroc(np.arange(2 * n), np.arange(2 * n) < n) == 1.0


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # ranks 1 2 3.5 5 3.5: 8 / sqrt(10 * 9.5)
        ([1, 2, 3], [1, 8, 27], 1.0),
        ([0.1, 0.2, INF], [9, 4, 1], -1.0),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
        ([10, 20, 20, 30], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # ranks 1 2.5 2.5 4
    ],
)
def test_spearman_by_hand(x, y, rho):
    assert spearman(x, y) == pytest.approx(rho, abs=1e-12)
    assert spearman(y, x) == pytest.approx(rho, abs=1e-12)


@settings(deadline=None)
@given(st.permutations(range(12)))
def test_spearman_without_ties_is_the_textbook_formula(order):
    d2 = sum((i - j) ** 2 for i, j in enumerate(order))
    assert spearman(range(12), order) == pytest.approx(1 - 6 * d2 / (12 * (144 - 1)), abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [([], []), ([3], [4]), ([1, 2], [5, 5]), ([5, 5], [1, 2])])
def test_what_is_constant_ranks_nothing(x, y):
    assert math.isnan(spearman(x, y))


@pytest.mark.parametrize("statistic", [auroc, spearman])
def test_rank_statistics_refuse(statistic):
    with pytest.raises(ValueError, match=r"must both be \[n\]"):
        statistic([1, 2], [1])
    with pytest.raises(ValueError, match="no NaN"):
        statistic([1, NAN], [1, 0])


def test_couple_by_hand():
    result = couple(
        made(
            correct=[[[1], [0]], [[1], [0]], [[0], [0]]],
            accuracy=[[[1], [0.5]], [[1], [0.25]], [[NAN], [NAN]]],  # the last puzzle has no labels
            residual=[[[0.1], [0.1]], [[0.2], [0.001]], [[0.0], [0.0]]],
            score=[[[1], [2]], [[NAN], [3]], [[0], [0]]],
            diverged=[[2, 2], [2, 1], [2, 2]],
        ),
        1,
    )
    assert (result.depth, result.trajectories, result.right, result.diverged) == (1, 4, 2, 1)
    # Pairs of right and wrong by residual: (.1, .1) half, (.1, inf) 1, (.2, .1) 0, (.2, inf) 1.
    assert result.residual_auroc == pytest.approx(2.5 / 4)
    # By score: (1, 2) 1, (1, inf) 1, (inf, 2) 0, (inf, inf) half.
    assert result.score_auroc == pytest.approx(2.5 / 4)
    # Ranks of the residuals 1.5 1.5 3 4, of the shares 3.5 2 3.5 1, less 2.5: -1 + 0.5 + 0.5 - 2.25.
    assert result.residual_spearman == pytest.approx(-2.25 / 4.5)
    # Ranks of the scores 1 2 3.5 3.5, of the shares as before: -1.5 + 0.25 + 1 - 1.5.
    assert result.score_spearman == pytest.approx(-1.75 / 4.5)


def test_coupling_is_unknown_when_all_are_right():
    result = couple(made(np.ones((2, 3, 1)), np.arange(6).reshape(2, 3, 1)), 1)
    assert result.right == result.trajectories == 6
    measured = (result.residual_auroc, result.residual_spearman, result.score_auroc, result.score_spearman)
    assert all(math.isnan(x) for x in measured)


# modes ---------------------------------------------------------------------------------------------------------------

NONE, COMPETING, NARROW, WIDE = MODES


def judge(restarts: str, **options: float) -> str:
    """R settled right, W settled wrong, r right and w wrong but not settled."""
    exact, settled = [[c in "Rr" for c in restarts]], [[c in "RW" for c in restarts]]
    return modes(exact, settled, **options).mode[0]


@pytest.mark.parametrize(
    ("restarts", "mode"),
    [
        ("wwww", NONE),
        ("WWWW", NONE),
        ("wWwW", NONE),
        ("w", NONE),
        ("RWRR", COMPETING),
        ("RWww", COMPETING),
        ("rWww", COMPETING),
        ("Rwww", NARROW),
        ("RRRw", NARROW),
        ("rrrr", NARROW),
        ("Rrrr", NARROW),
        ("r", NARROW),
        ("RRRR", WIDE),
        ("R", WIDE),
        ("R" * 19 + "w", WIDE),
        ("R" * 19 + "W", WIDE),
        ("R" * 18 + "Ww", COMPETING),
        ("R" * 18 + "ww", NARROW),
    ],
)
def test_modes_by_hand(restarts, mode):
    assert judge(restarts) == mode


def test_the_share_that_is_broad_can_be_chosen():
    assert judge("RRRW", broad=0.75) == WIDE and judge("RRRW", broad=0.76) == COMPETING
    assert judge("R" * 3 + "w" * 7, broad=0.3) == WIDE  # 0.3 * 10 is above 3 in binary
    for bad in (0, 1.1):
        with pytest.raises(ValueError, match="broad must be"):
            judge("R", broad=bad)


@settings(deadline=None)
@given(st.text("RrWw", min_size=1, max_size=30))
def test_each_puzzle_is_in_the_one_mode_that_fits(restarts):
    mode = judge(restarts)
    if mode == NONE:
        assert not set(restarts) & set("Rr")
    elif mode == WIDE:
        assert restarts.count("R") / len(restarts) >= BROAD
    else:
        assert set(restarts) & set("Rr") and (("W" in restarts) == (mode == COMPETING))
        assert restarts.count("R") / len(restarts) < BROAD


def test_diagnosis_counts_modes_by_group_and_leaves_out_unlabelled_puzzles():
    exact = np.array([[1, 1], [0, 0], [1, 0], [0, 0]], bool)
    settled = np.array([[1, 1], [1, 1], [1, 1], [0, 0]], bool)
    result = modes(exact, settled, labelled=[True, False, True, True])
    assert result.puzzle.tolist() == [0, 2, 3] and result.mode == [WIDE, COMPETING, NONE] and result.restarts == 2
    assert result.right.tolist() == [2, 1, 0] and result.settled.tolist() == [2, 2, 0]
    assert result.settled_right.tolist() == [2, 1, 0]
    assert result.counts() == {"all": {NONE: 1, COMPETING: 1, NARROW: 0, WIDE: 1}}
    groups = result.counts(["b", "a", "c", "b"])
    assert list(groups) == ["b", "c"] and groups["b"] == {NONE: 1, COMPETING: 0, NARROW: 0, WIDE: 1}
    assert sum(groups["c"].values()) == groups["c"][COMPETING] == 1


@pytest.mark.parametrize(
    ("exact", "settled", "more", "message"),
    [
        ([[1]], [[1, 0]], {}, r"must both be \[N, B >= 1\]"),
        ([1], [1], {}, r"must both be \[N, B >= 1\]"),
        ([[1]], [[1]], dict(labelled=[True, True]), r"labelled must be \[N\] = \[1\]"),
    ],
)
def test_diagnose_refuses(exact, settled, more, message):
    with pytest.raises(ValueError, match=message):
        modes(exact, settled, **more)


# subset --------------------------------------------------------------------------------------------------------------


def made_up(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 11, (n, 9), np.uint8)
    return tokens, np.array(["a", "bb", "c"])[rng.integers(0, 3, n)], rng.integers(-1, 40, n)


def test_the_subset_is_pinned():
    """Published figures are on this subset: it may never change."""
    tokens = (np.arange(1200).reshape(60, 20) * 7919 % 10 + 1).astype(np.uint8)
    tokens[:, 0] = np.arange(60)
    source, rating = np.array(["x", "y", "z"] * 20), np.arange(60) * 3
    rows = stratified_subset(tokens, source, rating, 12)
    assert rows.tolist() == [14, 24, 28, 29, 30, 31, 36, 40, 46, 56, 57, 59]


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(0, 5), st.data())
def test_the_subset_mixes_as_the_whole_does_whatever_the_order(total, seed, data):
    tokens, source, rating = made_up(total, seed)
    n = data.draw(st.integers(1, total))
    rows = stratified_subset(tokens, source, rating, n)
    assert len(rows) == n and (np.diff(rows) > 0).all()
    bands = np.array(rating_bands(rating))
    for name in set(source.tolist()):
        whole, part = source == name, source[rows] == name
        assert math.floor(n * whole.sum() / total) <= part.sum() <= math.ceil(n * whole.sum() / total)
        for band in set(bands[whole].tolist()):
            share = part.sum() * (whole & (bands == band)).sum() / whole.sum()
            got = (part & (bands[rows] == band)).sum()
            assert math.floor(share) <= got <= math.ceil(share)
    order = np.random.default_rng(1).permutation(total)
    again = stratified_subset(tokens[order], source[order], rating[order], n)
    key = sorted(tokens[rows].tolist())
    assert sorted(tokens[order][again].tolist()) == key


def test_the_subset_of_the_real_puzzles_is_pinned(sudoku_data):
    from eqr_kernels.tasks import sudoku

    puzzles, _ = sudoku.load(sudoku_data / "dev.csv.gz")
    part = puzzles.subset(stratified_subset(puzzles.inputs, puzzles.source, puzzles.rating, 200))
    assert digest(part.inputs, part.labels) == "ba45309dcae3eb6ec4e25afd46d564dd727306e1d082efc6541f7654add22902"
    counts = {str(name): int((part.source == name).sum()) for name in np.unique(part.source)}
    # Of 2,500 puzzles, 300, 2000 and 200 by source.
    assert counts == {"17_clue": 24, "forum_hardest_1905_11plus": 160, "magictour_top1465": 16}


@pytest.mark.parametrize("n", [0, 61])
def test_a_subset_has_some_and_no_more_than_all(n):
    with pytest.raises(ValueError, match=f"1 to all 60 of the puzzles, got {n}"):
        stratified_subset(*made_up(60), n)
    with pytest.raises(ValueError, match=r"source and rating \[N\]"):
        stratified_subset(np.zeros((2, 3)), ["a"], [1, 2], 1)


def test_digest_tells_inputs_labels_and_order_apart():
    a, b = np.array([[1, 2]]), np.array([[3, 4]])
    assert digest(a, b) == digest(a.astype(np.int64), b)
    assert len({digest(a, b), digest(b, a), digest(a[:, ::-1], b)}) == 3
    # sha256 of the bytes 1 2 3 4
    assert digest(a, b) == "9f64a747e1b97f131fabb6b447296c9b6f0201e79fb3c5356e6c77e89b6a806a"
