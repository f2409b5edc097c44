"""Canonical forms of Sudoku solutions, and that no solution that is trained on is held out under another name."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqr_kernels.tasks.sudoku import augment, decode, encode, is_valid_grid, load_csv
from eqr_kernels.tasks.sudoku_symmetry import canonical_form, has_equivalent, invariant

ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
OTHER = "968721354457638912123945768892316475534872196716594283649183527381257649275469831"
# 648 symmetries give this grid back, more than any other.
MOST_SYMMETRIC = "123456789456789123789123456231564897564897231897231564312645978645978312978312645"


def rectangles(grid: np.ndarray) -> list[list[int]]:
    """The quadruples of cells in two boxes whose two digits can change places; symmetries keep their number."""
    cells = grid.reshape(9, 9)
    return [
        [9 * r + a, 9 * r + b, 9 * s + a, 9 * s + b]
        for r in range(9)
        for s in range(r + 1, 9)
        for a in range(9)
        for b in range(a + 1, 9)
        if (r // 3 == s // 3) != (a // 3 == b // 3) and cells[r, a] == cells[s, b] and cells[r, b] == cells[s, a]
    ]


def walk(n: int, seed: int) -> np.ndarray:
    """Solutions [n, 81], each one exchange in a rectangle away from the one before."""
    rng, grid, grids = np.random.default_rng(seed), encode(ANSWER).copy(), []
    for _ in range(n):
        choices = rectangles(grid)
        cells = choices[rng.integers(len(choices))]
        grid[cells] = grid[[cells[1], cells[0], cells[3], cells[2]]]
        grids.append(grid.copy())
    assert is_valid_grid(np.array(grids)).all()
    return np.array(grids)


def symmetric(grids: np.ndarray, seed: int) -> np.ndarray:
    return augment(grids, None, np.random.default_rng(seed))[0]


def slow_form(grid: np.ndarray) -> tuple[str, int]:
    """The least image by trying all (either way up, every first row, every order of the columns), and how many give it:
    the symmetries that give the grid back."""
    text = decode(grid)
    orders = [
        [3 * s + c for s, lines in zip(stacks, inner, strict=True) for c in lines]
        for stacks in permutations(range(3))
        for inner in product(permutations(range(3)), repeat=3)
    ]
    images = []
    for lines in ([text[9 * r : 9 * r + 9] for r in range(9)], [text[c::9] for c in range(9)]):
        for order in orders:
            moved = ["".join(line[c] for c in order) for line in lines]
            for top in range(9):
                names = str.maketrans(moved[top], "123456789")
                bands = [sorted(line.translate(names) for line in moved[b : b + 3]) for b in (0, 3, 6)]
                images.append("".join("".join(band) for band in sorted(bands)))
    return min(images), images.count(min(images))


@pytest.mark.slow
def test_form_is_the_least_of_all_images() -> None:
    grids = np.concatenate([walk(4, 1), walk(4, 2), [encode(OTHER)]])
    assert [decode(form) for form in canonical_form(grids)] == [slow_form(grid)[0] for grid in grids]
    least, symmetries = slow_form(encode(MOST_SYMMETRIC))
    assert decode(canonical_form(encode(MOST_SYMMETRIC)[None])[0]) == least and symmetries == 648


def test_form_of_the_most_symmetric_grid_by_hand() -> None:
    # Nothing precedes 123456789, 456789123, 789123456 in a band, nor 231 below it.
    assert decode(canonical_form(symmetric(encode(MOST_SYMMETRIC)[None], 1))[0]).startswith(MOST_SYMMETRIC[:30])


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_form_and_invariant_are_those_of_every_image(seed: int) -> None:
    grids = np.concatenate([walk(6, seed), [encode(MOST_SYMMETRIC)]]).repeat(5, 0)
    images = symmetric(grids, seed)
    forms = canonical_form(grids)
    assert forms.dtype == np.uint8 and is_valid_grid(forms).all()
    np.testing.assert_array_equal(canonical_form(images), forms)
    np.testing.assert_array_equal(canonical_form(forms), forms)
    np.testing.assert_array_equal(invariant(images), invariant(grids))
    np.testing.assert_array_equal(invariant(forms), invariant(grids))
    assert [len(rectangles(form)) for form in forms[::5]] == [len(rectangles(grid)) for grid in grids[::5]]


def test_transposition_and_each_kind_of_permutation_alone() -> None:
    cells = np.arange(81).reshape(9, 9)
    swaps = [
        cells.T,
        cells[[1, 0, *range(2, 9)]],
        cells[[3, 4, 5, 0, 1, 2, 6, 7, 8]],
        cells[:, [*range(7), 8, 7]],
        cells[:, [6, 7, 8, 3, 4, 5, 0, 1, 2]],
    ]
    grid = encode(ANSWER)
    images = np.array([grid[swap.reshape(-1)] for swap in swaps] + [grid % 9 + 2])
    assert (canonical_form(images) == canonical_form(grid[None])).all()


def test_other_grids_have_other_forms() -> None:
    grids = walk(60, 3)
    by_count: dict[int, set[bytes]] = {}
    for form in canonical_form(grids):
        by_count.setdefault(len(rectangles(form)), set()).add(form.tobytes())
    counts = {len(rectangles(grid)) for grid in grids}
    # Grids with unequal numbers of rectangles are not equivalent.
    assert len(counts) > 3 and by_count.keys() == counts
    assert len({form.tobytes() for form in canonical_form(np.array([encode(ANSWER), encode(OTHER)]))}) == 2


def test_invariant_tells_most_grids_apart() -> None:
    grids = walk(300, 5)
    classes = len(np.unique(canonical_form(grids), axis=0))
    assert len(np.unique(invariant(grids))) > 0.9 * classes > 200


def test_large_batches_equal_single_rows() -> None:
    grids = symmetric(walk(50, 7).repeat(90, 0), 0)  # more than one chunk
    forms = canonical_form(grids)
    np.testing.assert_array_equal(forms, canonical_form(grids[::90]).repeat(90, 0))
    np.testing.assert_array_equal(invariant(grids[4090:4100]), invariant(grids)[4090:4100])
    assert canonical_form(grids[:0]).shape == (0, 81) and invariant(grids[:0]).shape == (0,)


def test_a_leak_is_found() -> None:
    grids = walk(400, 11)
    _, first = np.unique(canonical_form(grids), axis=0, return_index=True)
    train, held_out = grids[first[:100]], grids[first[100:130]].copy()
    assert not has_equivalent(held_out, train).any()
    held_out[17] = symmetric(train[42:43], 1)[0]
    assert np.flatnonzero(has_equivalent(held_out, train)).tolist() == [17]
    assert not has_equivalent(held_out, train[:0]).any() and has_equivalent(train[:0], train).shape == (0,)


def test_an_equal_invariant_alone_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eqr_kernels.tasks.sudoku_symmetry.invariant", lambda grids: np.zeros(len(grids), np.uint64))
    grids = np.array([encode(ANSWER), encode(OTHER)])
    assert has_equivalent(grids, symmetric(grids[1:], 2)).tolist() == [False, True]


@pytest.mark.parametrize("function", [canonical_form, invariant, lambda grids: has_equivalent(grids[:0], grids)])
def test_what_is_no_solution_is_refused(function) -> None:
    good, blank = encode(ANSWER), encode("." + ANSWER[1:])
    for bad in (blank, good - 1, np.roll(good, 1)):
        with pytest.raises(ValueError, match=r"complete valid grids, tokens 2\.\.10; rows 1 \(from 0\) are none"):
            function(np.array([good, bad]))
    with pytest.raises(ValueError, match=r"must be \[N, 81\]"):
        function(good[None, :80])
    with pytest.raises(TypeError, match="must be integers"):
        function(good[None].astype(float))


@pytest.mark.slow
def test_no_held_out_solution_is_trained_on(sudoku_data: Path) -> None:
    """The split of the real puzzles, under all symmetries; planted leaks show that the comparison would tell."""
    train, dev = (load_csv(sudoku_data / f"{name}.csv.gz").labels for name in ("train", "dev"))
    assert len(train) > 90_000 and len(dev) == 2500
    assert not has_equivalent(dev, train).any()
    planted = [0, 1234, 2499]
    dev[planted] = symmetric(train[[5, 50_000, len(train) - 1]], 0)
    assert np.flatnonzero(has_equivalent(dev, train)).tolist() == planted
