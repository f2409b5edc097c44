"""Depth by the symmetries of a task: a puzzle moves every few outer steps, and its latent state moves with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eqr_kernels.arguments import check_function
from eqr_kernels.modules import LatentState, check_ids
from eqr_kernels.outcomes import Outcomes, of_winners
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.results import Recorded, SolveResult
from eqr_kernels.run_rules import RULES_WITH_TOLERANCE
from eqr_kernels.solver import DEFAULT_DEPTH, Progress, tolerance_once
from eqr_kernels.tasks.common import Tokens, as_tokens
from eqr_kernels.tasks.views import Turns, check_views
from eqr_kernels.trajectory import Status, settled

_REFUSED = {
    "initial_state": "a trajectory that turns begins at its own",
    "return_state": "a state would be of tokens that have moved",
    "on_finished": "it would be told of the parts between turns",
}


def solve_turned(
    model: EquilibriumReasoner,
    inputs: npt.NDArray[np.integer],
    turns: Turns,
    *,
    depth: int = DEFAULT_DEPTH,
    breadth: int = 1,
    halt: str = "residual",
    tol: float | str = "auto",
    patience: int = 1,
    select: str = "residual",
    seed: int = 0,
    ids: Tensor | None = None,
    checkpoints: Sequence[int] = (),
    trace: bool = False,
    return_all: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SolveResult:
    """`solve` whose puzzles turn: every few outer steps the cells move by a symmetry, and the latent state with them.

    A network that mixes tokens by position is not the same operator under a symmetry: a trajectory that was stuck, at
    rest on a wrong answer or moving about it, is seldom stuck there once it has moved, and goes on from all that it has
    found. That a puzzle stays the same when its cells move is knowledge of its task: what turns gain is to be told
    apart, as with `solve_views`.

    Args:
        model: a reasoner.
        inputs: tokens, integers [N, S].
        turns: how often, and by what; `Turns(4, sudoku.views)`.
        depth, breadth, tol, select, seed, ids, checkpoints, trace, return_all, progress: as for `solve`. `depth` counts
            all outer steps, and `tol` of "auto" and "fast" is found out once. With select="first" the trajectories of a
            puzzle end together at the turn after one of them has settled. The card's tolerances were calibrated without
            turns; "residual+q" asks for more than they do.
        halt, patience: as for `solve`. What they count begins anew at each turn, so that patience is at most
            `turns.every`; `window` likewise counts what there is since the last turn.
        options: as for `solve`, but for initial_state, return_state and on_finished. Backends that keep no states
            (cuda, triton) cannot turn: "auto" takes another, and `backend_reason` says so.

    Returns:
        As `solve`; all answers and `logits` are of the puzzles as they were given. The states of all N * B trajectories
        are in memory, and their logits.

    Raises:
        TypeError, ValueError, RuntimeError: as `solve`.
    """
    check_function("progress", progress)
    if not isinstance(turns, Turns):
        raise TypeError(f"turns must be Turns, as in Turns(4, sudoku.views), got {type(turns).__name__}")
    for name, why in _REFUSED.items():
        if name in options:
            raise TypeError(f"solve_turned takes no {name}: {why}; leave it out")
    puzzles = as_tokens("inputs", inputs, model.config.vocab_size)
    tokens = int64(puzzles).to(model.device)
    if halt in RULES_WITH_TOLERANCE:
        tol = tolerance_once(model, tokens, tol, dict(depth=depth, seed=seed, **options))
    run: dict[str, Any] = dict(halt=halt, tol=tol, patience=patience, return_state=True, **options)
    marks = tuple(checkpoints)
    # On no puzzles it checks every argument, and says what will run.
    sized: dict[str, Any] = dict(depth=depth, breadth=breadth, select=select, checkpoints=marks, trace=trace)
    begun = model.solve(tokens[:0], seed=seed, **sized, **run)
    if patience > turns.every and halt in RULES_WITH_TOLERANCE:
        raise ValueError(
            f"patience must be at most turns.every={turns.every} (--turn-every), as it counts anew at each turn, got "
            f"{patience}; lower it, or turn less often"
        )
    ids = None if ids is None else check_ids(ids, len(tokens)).to(model.device)
    paths = _Paths.of(turns, puzzles, depth, model)
    ran = _Trajectories(model, tokens, paths, breadth, seed, ids, depth if trace else None)
    of, spent, stopped = len(ran.puzzle), 0, False

    def shown(_finished: int, _trajectories: int, steps: int) -> bool:
        nonlocal stopped
        stopped = progress is not None and progress(of - len(ran.puzzle), of, spent + steps) is False
        return not stopped

    while ran.done < depth and len(ran.puzzle) and not stopped:
        length = min(turns.every, depth - ran.done)
        spent += ran.go_on(length, marks, progress=shown, trace=trace, **run)
        if select == "first" and ran.done < depth:
            ran.cancel(settled(ran.table.status).any(1)[ran.puzzle])
        ran.turn()
    if stopped and ran.done < depth:
        ran.cancel(torch.ones_like(ran.puzzle, dtype=torch.bool))
    won = ran.table.winner(select)
    result = ran.table.result(won, of_winners(ran.logits, won), begun, return_all)
    result.at = {int(mark): ran.at.get(mark, ran.table).recorded(select) for mark in sorted(set(marks))}
    result.residuals = ran.residuals
    if progress is not None and not stopped:
        progress(of, of, spent)
    return result


def solve_tokens(
    model: EquilibriumReasoner, inputs: npt.NDArray[np.integer], *, turns: Turns | None, **options: Any
) -> SolveResult:
    """`solve`, or `solve_turned` where there are turns; inputs: tokens, integers [N, S]."""
    if turns is None:
        return model.solve(int64(inputs), **options)
    return solve_turned(model, inputs, turns, **options)


def int64(values: npt.NDArray[np.integer]) -> Tensor:
    """Integers of any kind and shape as a tensor of its own."""
    return torch.from_numpy(values.astype(np.int64, order="C"))


class _Trajectories:
    """All trajectories of a call, of which those that have not ended go on from turn to turn.

    They start where `model.initial_state` says, in the dtype of the weights.

    Attributes:
        done: outer steps of those that go on.
        puzzle, restart: int64 [m], of those that go on. state: theirs, of cells as they are now.
        table: of all, by the puzzles' own cells; logits: float32 [N, B, S, V], likewise.
        residuals: float32 [N, B, depth], or None. at: the table at each checkpoint so far.
    """

    def __init__(
        self,
        model: EquilibriumReasoner,
        tokens: Tensor,
        paths: _Paths,
        breadth: int,
        seed: int,
        ids: Tensor | None,
        traced: int | None,
    ) -> None:
        n, seq_len = tokens.shape
        device = tokens.device
        self.model, self.tokens, self.paths, self.done = model, tokens, paths, 0
        self.puzzle = torch.arange(n, device=device).repeat_interleave(breadth)
        self.restart = torch.arange(breadth, device=device).repeat(n)
        keys = None if ids is None else ids[self.puzzle]
        self.state = model.initial_state(tokens[self.puzzle], seed, ids=keys, restart=self.restart)
        self.table = Outcomes.empty(n, breadth, seq_len, device)
        real: dict[str, Any] = dict(dtype=torch.float32, device=device)
        self.logits = torch.zeros(n, breadth, seq_len, model.config.vocab_size, **real)
        self.residuals = None if traced is None else torch.full((n, breadth, traced), torch.nan, **real)
        self.at: dict[int, Outcomes] = {}

    def go_on(self, length: int, marks: Sequence[int], **run: Any) -> int:
        """So many outer steps at most of all that go on; the steps that they took together.

        Args:
            marks: checkpoints of the whole call. run: arguments of `solve`.
        """
        done, puzzle, restart = self.done, self.puzzle, self.restart
        seen = self.paths.seen(self.tokens, puzzle, done)
        ran = self.model.solve(
            seen,
            depth=length,
            initial_state=self.state,
            return_all=True,
            checkpoints=[mark - done for mark in marks if done < mark <= done + length],
            **run,
        )
        before, silent = self.logits[puzzle, restart], self._silent(ran)
        logits = torch.where(silent[:, None, None], before, self.paths.back(ran.logits, puzzle, done))
        first = logits  # of trajectories that end after one step; a checkpoint there is of others as well
        if done and length > 1 and done + 1 in marks:
            silently = {name: value for name, value in run.items() if name not in ("trace", "progress")}
            stepped = self.model.solve(seen, depth=1, initial_state=self.state, **silently)
            first = self.paths.back(stepped.logits, puzzle, done)
        change = (first - before).norm(dim=2).mean(1)

        def scored(these: Outcomes) -> Outcomes:
            # One step after a turn has no change of logits of its own, but there is one over the turn.
            alone = (these.steps == done + 1) & ~silent & (done > 0)
            return these._replace(score=torch.where(alone, change, these.score))

        for mark, recorded in ran.at.items():
            self.at[done + mark] = Outcomes(*(field.clone() for field in self.table))
            self.at[done + mark].put(puzzle, restart, scored(self._outcomes(recorded)))
        self.logits[puzzle, restart] = logits
        self.table.put(puzzle, restart, scored(self._outcomes(ran)))
        if self.residuals is not None and ran.residuals is not None:
            self.residuals[puzzle, restart, done : done + length] = ran.residuals[:, 0]
        assert ran.z_H is not None and ran.z_L is not None
        self.state = self.state._replace(z_H=ran.z_H, z_L=ran.z_L, step=self.state.step + length)
        self.done += length
        return int(ran.nfe.sum())

    def cancel(self, these: Tensor) -> None:
        """Ends those of the trajectories that go on, bool [m], that had not ended anyway."""
        lost = these & (self.table.status[self.puzzle, self.restart] == Status.MAX_DEPTH)
        self.table.status[self.puzzle[lost], self.restart[lost]] = int(Status.CANCELLED)

    def turn(self) -> None:
        """Moves the cells of those that have not ended; the others are done with."""
        going = self.table.status[self.puzzle, self.restart] == Status.MAX_DEPTH
        self.puzzle, self.restart = self.puzzle[going], self.restart[going]
        state = LatentState(*(field[going] for field in self.state))
        z_H, z_L = (self.paths.moved(z, self.puzzle, self.done) for z in (state.z_H, state.z_L))
        self.state = state._replace(z_H=z_H, z_L=z_L)

    def _outcomes(self, ran: SolveResult | Recorded) -> Outcomes:
        """[m, ...], of a part that begins after `done` steps, or of a checkpoint in it."""
        here = Outcomes.of(self.paths.back(ran.preds, self.puzzle, self.done), ran)
        before, silent = self.table.at(self.puzzle, self.restart), self._silent(ran)
        kept = {
            name: torch.where(
                silent[:, None] if name == "preds" else silent, getattr(before, name), getattr(here, name)
            )
            for name in ("preds", "score", "q_halt", "residual")
        }
        return here._replace(steps=here.steps + self.done, **kept)

    def _silent(self, ran: SolveResult | Recorded) -> Tensor:
        """bool [m]: the part has no answer, and that of the part before it stays."""
        steps, status = ran.all_steps[:, 0], ran.all_status[:, 0]
        lost = (status == Status.DIVERGED) & (steps == 1)
        return (steps == 0) | (lost & (self.done > 0))


class _Paths(NamedTuple):
    """Where each cell of the puzzles is between turns.

    Attributes:
        every: outer steps between turns.
        cells: int64 [N, V, S], the puzzle's cell that each cell shows after v turns (after V as at the beginning).
        places: int64 [N, V, S], where each cell of the puzzle is.
    """

    every: int
    cells: Tensor
    places: Tensor

    @classmethod
    def of(cls, turns: Turns, puzzles: Tokens, depth: int, model: EquilibriumReasoner) -> _Paths:
        """Of puzzles, uint8 [N, S], for so many outer steps."""
        count = min(turns.cycle, -(-depth // turns.every))
        try:
            views = turns.views(puzzles, count)
        except ValueError as error:
            raise ValueError(
                f"turns at depth {depth} take {count} views of each puzzle, and {error}; give Turns a cycle of as many "
                "as there are (a task says so by its `most_views`)"
            ) from error
        check_views(views, puzzles, count, model.config.vocab_size, "turns.views")
        return cls(turns.every, *(int64(table).to(model.device) for table in (views.cells, views.places)))

    def _at(self, table: Tensor, rows: Tensor, done: int) -> Tensor:
        return table[rows, done // self.every % table.shape[1]]

    def seen(self, tokens: Tensor, rows: Tensor, done: int) -> Tensor:
        """The puzzles rows, int64 [n], of tokens [N, S], as they are when so many outer steps are done: [n, S]."""
        return tokens[rows].gather(1, self._at(self.cells, rows, done))

    def back(self, values: Tensor, rows: Tensor, done: int) -> Tensor:
        """Values [n, S, ...] of the cells of the puzzles rows as they are then, by the puzzles' own cells."""
        return _gathered(values, self._at(self.places, rows, done))

    def moved(self, values: Tensor, rows: Tensor, done: int) -> Tensor:
        """Values [n, S, ...] of the cells before the turn after so many outer steps, by the cells after it."""
        before, after = self._at(self.places, rows, done - 1), self._at(self.cells, rows, done)
        return _gathered(values, before.gather(1, after))


def _gathered(values: Tensor, cells: Tensor) -> Tensor:
    """[n, S, ...] -> [n, S, ...], by cells int64 [n, S]."""
    if values.ndim == 3:
        cells = cells[:, :, None].expand_as(values)
    return values.gather(1, cells)
