"""Which Sudoku solutions are the same grid under the symmetries of Sudoku.

The group: digit relabelling (9!), rows within bands and bands (6^4), columns within stacks and stacks (6^4), and
transposition (2). The canonical form of a solution is the least of all its images, read row by row. Its first row is
therefore 1..9 and each image is fixed by which line becomes the first row and which the second (2 * 9 * 2 choices) and
by the order of the columns (6^4): the first row names the digits, and the other bands are sorted.

The second row of an image depends on one permutation only: that of the columns which takes each digit's place in the
second line to its place in the first. Its least form and the column orders that give it are in a table, so that few
images of a solution are ever written out, and the classes of a solution's 36 permutations are an invariant.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import Tokens, as_tokens, concise
from eqr_kernels.tasks.sudoku import BLANK, SEQ_LEN, VOCAB_SIZE, is_valid_grid

Ints = npt.NDArray[np.int64]

_CHUNK = 4096
_PLACES = 10 ** np.arange(8, -1, -1)  # of nine digits read as one decimal number
# The pairs of lines that may become the first and the second row, band by band.
_FIRST, _SECOND = np.array([(3 * band + a, 3 * band + b) for band in range(3) for a, b in permutations(range(3), 2)]).T


class _Table(NamedTuple):
    """The permutations of nine columns that take no column to its own stack, sorted, in classes under column orders.

    Orders are named by their number in `orders`; those that bring permutation i to the least of its class are
    best[start[i] : start[i + 1]].
    """

    codes: Ints  # [12096], each permutation as a decimal number of its nine images
    classes: Ints  # [12096]: the class of each permutation; a lower one has a lesser least member
    orders: Ints  # [1296, 9]: the orders of columns that keep stacks together, place -> column
    places: npt.NDArray[np.uint8]  # [1296, 9]: their inverses, column -> place
    start: Ints  # [12097]
    best: Ints  # [classes * 1296]


@lru_cache(maxsize=1)
def _table() -> _Table:
    threes = list(permutations(range(3)))
    orders: Ints = np.array(
        [
            [3 * stack + column for stack, within in zip(stacks, lines, strict=True) for column in within]
            for stacks in threes
            for lines in product(threes, repeat=3)
        ]
    )
    places = orders.argsort(1).astype(np.uint8)
    every = np.zeros((1, 0), np.int64)  # [n, columns so far]
    for column in range(9):
        image = np.tile(np.arange(9), len(every))
        before = every.repeat(9, 0)
        allowed = (image // 3 != column // 3) & (before != image[:, None]).all(1)
        every = np.column_stack([before, image])[allowed]
    codes = every @ _PLACES  # in ascending order, as the permutations are written in it
    classes = np.full(len(codes), -1)
    members = []
    for least in range(len(codes)):
        if classes[least] < 0:
            # An order h takes h s h^-1 to s, so the images of s under the inverses tell what brings them back.
            image = np.take_along_axis(orders, every[least][places], 1)  # [1296, 9]
            members.append(codes.searchsorted(image @ _PLACES))
            classes[members[-1]] = len(members) - 1
    flat = np.concatenate(members)
    best = flat.argsort(kind="stable") % len(orders)
    start = np.concatenate([[0], np.bincount(flat, minlength=len(codes)).cumsum()])
    return _Table(codes, classes, orders, places, start, best)


def canonical_form(solutions: npt.ArrayLike) -> Tokens:
    """The least image of each solution under all symmetries of Sudoku, read row by row; equal for equivalent ones.

    Args:
        solutions: tokens [N, 81] of complete valid grids.
    Returns:
        tokens, uint8 [N, 81]; the first row is 1..9.
    Raises:
        TypeError, ValueError: not tokens [N, 81], or a row that is no solution (the first ones are named).
    """
    grids = _solutions("solutions", solutions)
    parts = [_least_images(grids[i : i + _CHUNK]) for i in range(0, len(grids), _CHUNK)]
    return np.concatenate(parts) if parts else grids.copy()


def invariant(solutions: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """A number that is the same for equivalent solutions, and different for most others; cheaper than the form.

    It hashes, for both orientations and each band, the classes of the permutations between each two of its lines.

    Args:
        solutions: tokens [N, 81] of complete valid grids.
    Returns:
        uint64 [N].
    Raises:
        as `canonical_form`.
    """
    grids = _solutions("solutions", solutions)
    hashes = np.zeros(len(grids), np.uint64)
    for i in range(0, len(grids), _CHUNK):
        classes = _table().classes[_permutations(_both_orientations(grids[i : i + _CHUNK]))]  # [n, 2, 18]
        bands = _hash(np.sort(classes.reshape(-1, 2, 3, 6), -1).astype(np.uint64))
        hashes[i : i + _CHUNK] = _hash(np.sort(_hash(np.sort(bands, -1)), -1))
    return hashes


def has_equivalent(solutions: npt.ArrayLike, others: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether each solution is equivalent to one of others under the symmetries of Sudoku; exact.

    Most are told apart by `invariant`; the canonical forms decide about the rest.

    Args:
        solutions: tokens [N, 81]; others: tokens [M, 81].
    Returns:
        bool [N].
    Raises:
        as `canonical_form`.
    """
    ours, theirs = _solutions("solutions", solutions), _solutions("others", others)
    our_hashes, their_hashes = invariant(ours), invariant(theirs)
    maybe = np.isin(our_hashes, their_hashes)
    forms = {form.tobytes() for form in canonical_form(theirs[np.isin(their_hashes, our_hashes[maybe])])}
    same = np.zeros(len(ours), bool)
    same[maybe] = [form.tobytes() in forms for form in canonical_form(ours[maybe])]
    return same


def _solutions(name: str, value: npt.ArrayLike) -> Tokens:
    grids = as_tokens(name, value, VOCAB_SIZE, SEQ_LEN)
    wrong = np.flatnonzero(~(is_valid_grid(grids) & (grids > BLANK).all(1)))
    if len(wrong):
        raise ValueError(
            f"{name} must hold complete valid grids, tokens 2..10; rows {concise(wrong.tolist())} (from 0) are none: "
            "encode digits first, and leave out puzzles without an answer"
        )
    return grids


def _both_orientations(grids: Tokens) -> Tokens:
    """Solutions [n, 81] as digits 0..8 [n, 2, 9, 9]: as they are, and transposed."""
    lines = (grids - np.uint8(BLANK + 1)).reshape(-1, 9, 9)
    return np.stack([lines, lines.transpose(0, 2, 1)], 1)


def _permutations(lines: Tokens) -> Ints:
    """Digits [n, 2, 9, 9] -> int [n, 2, 18], the number in the table of each pair's permutation of columns."""
    columns = lines.argsort(-1).astype(np.uint8)  # where each line has each digit
    taken = np.take_along_axis(columns[:, :, _FIRST], lines[:, :, _SECOND], -1)
    # Nine digits in floating point are exact and, unlike integers, a fast product.
    numbers: Ints = _table().codes.searchsorted((taken @ _PLACES.astype(np.float64)).astype(np.int64))
    return numbers


def _least_images(grids: Tokens) -> Tokens:
    table, lines = _table(), _both_orientations(grids)
    numbers = _permutations(lines)
    classes = table.classes[numbers]
    # The least second row of all decides which pairs of lines and, by the table, which column orders are left.
    grid, orientation, pair = (classes == classes.min((1, 2), keepdims=True)).nonzero()
    number = numbers[grid, orientation, pair]
    count = table.start[number + 1] - table.start[number]
    which = np.arange(len(count)).repeat(count)
    offset = np.arange(len(which)) - (count.cumsum() - count)[which]
    order = table.best[table.start[number][which] + offset]
    grid, chosen = grid[which], lines[grid[which], orientation[which]]  # [images, 9, 9]
    first = _FIRST[pair[which]]
    # A digit is named by the new place of its column in the first row.
    names = np.empty((len(grid), 9), np.uint8)
    np.put_along_axis(names, chosen[np.arange(len(grid)), first], table.places[order] + np.uint8(1), 1)
    moved = np.take_along_axis(chosen, table.orders[order][:, None], 2).reshape(-1, SEQ_LEN)
    named = np.take_along_axis(names, moved, 1).reshape(-1, 9, 9)
    # No two lines begin with the same digit, so sorting by the whole line sorts by the first cell.
    bands = np.sort((named @ _PLACES.astype(np.float64)).astype(np.int64).reshape(-1, 3, 3), 2)
    codes: Ints = np.take_along_axis(bands, bands[:, :, :1].argsort(1), 1).reshape(-1, 9)
    for row in range(1, 9):
        starts = np.flatnonzero(np.diff(grid, prepend=-1))
        least = np.minimum.reduceat(codes[:, row], starts)
        kept = codes[:, row] == least[grid]
        grid, codes = grid[kept], codes[kept]
    unique = codes[np.flatnonzero(np.diff(grid, prepend=-1))]  # [n, 9]
    return (unique[:, :, None] // _PLACES % 10 + BLANK).astype(np.uint8).reshape(-1, SEQ_LEN)


def _hash(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """uint64 [..., k] -> [...]: one number for each sequence, mixed as in splitmix64 (Steele, Lea and Flood, 2014)."""
    state = np.zeros(values.shape[:-1], np.uint64)
    for i in range(values.shape[-1]):
        state = (state ^ values[..., i]) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state
