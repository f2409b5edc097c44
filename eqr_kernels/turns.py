"""Depth by the symmetries of a task: a puzzle moves every few outer steps, and its latent state moves with it."""

from __future__ import annotations

import warnings
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
from eqr_kernels.results import SolveResult
from eqr_kernels.run_rules import RULES_WITH_TOLERANCE
from eqr_kernels.solver import DEFAULT_DEPTH, Progress, tolerance_of
from eqr_kernels.tasks.common import as_tokens
from eqr_kernels.tasks.views import Turns
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

    A network that mixes tokens by position is not the same operator under a symmetry, so what it had settled on, and
    is wrong, is seldom a fixed point once it has moved; what is right is one under every symmetry. A trajectory goes
    on from all that it has found, and costs an outer step what it costs in `solve`. That a puzzle stays the same when
    its cells move is knowledge of its task: what turns gain is to be told apart, as with `solve_views`.

    Args:
        model: a reasoner.
        inputs: tokens, integers [N, S].
        turns: how often, and by what; `Turns(4, sudoku.views)`.
        depth, breadth, tol, select, seed, ids, checkpoints, trace, return_all, progress: as for `solve`. `depth` counts
            all outer steps, and `tol` of "auto" and "fast" is found out once. With select="first" the trajectories of a
            puzzle end together at the turn after one of them has settled.
        halt, patience: as for `solve`. What they count begins anew at each turn, so that patience is at most
            `turns.every`; `window` likewise counts what there is since the last turn.
        options: as for `solve`, but for initial_state, return_state and on_finished.

    Returns:
        As `solve`; all answers and `logits` are of the puzzles as they were given. The logits of all N * B trajectories
        are in memory until the winners are known.

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
    tokens = torch.from_numpy(puzzles.astype(np.int64)).to(model.device)
    run: dict[str, Any] = dict(halt=halt, patience=patience, **options)
    if halt in RULES_WITH_TOLERANCE:
        run["tol"] = tolerance_once(model, tokens, tol, dict(depth=depth, seed=seed, **options))
    # On no puzzles it checks every argument, and says what will run.
    sized: dict[str, Any] = dict(depth=depth, breadth=breadth, select=select, checkpoints=checkpoints, trace=trace)
    begun = model.solve(tokens[:0], seed=seed, **sized, **run)
    if patience > turns.every and halt in RULES_WITH_TOLERANCE:
        raise ValueError(
            f"patience must be at most turns.every={turns.every}, as it counts anew at each turn, got {patience}; "
            "lower it, or turn less often"
        )
    row = torch.arange(len(tokens), device=model.device).repeat_interleave(breadth)
    restart = torch.arange(breadth, device=model.device).repeat(len(tokens))
    ids = None if ids is None else check_ids(ids, len(tokens)).to(model.device)[row]
    state = model.initial_state(tokens[row], seed, ids=ids, restart=restart)
    paths = _Paths.of(turns, puzzles, depth, model.device)
    table = Outcomes.empty(len(tokens), breadth, tokens.shape[1], model.device)
    real: dict[str, Any] = dict(dtype=torch.float32, device=model.device)
    logits = torch.zeros(len(tokens), breadth, *tokens.shape[1:], model.config.vocab_size, **real)
    residuals = torch.full((len(tokens), breadth, depth), torch.nan, **real) if trace else None
    at: dict[int, Outcomes] = {}
    marks, of, done, spent, stopped = sorted(set(checkpoints)), len(row), 0, 0, False

    def shown(_finished: int, _trajectories: int, steps: int) -> bool:
        nonlocal stopped
        stopped = progress is not None and progress(of - len(row), of, spent + steps) is False
        return not stopped

    while done < depth and len(row) and not stopped:
        length = min(turns.every, depth - done)
        ran = model.solve(
            paths.seen(tokens, row, done),
            depth=length,
            initial_state=state,
            return_state=True,
            return_all=True,
            checkpoints=[mark - done for mark in marks if done < mark <= done + length],
            trace=trace,
            progress=shown,
            **run,
        )
        spent += int(ran.nfe.sum())
        for mark, recorded in ran.at.items():
            recorded.all_steps += done
            at[done + mark] = Outcomes(*(field.clone() for field in table))
            at[done + mark].put(row, restart, paths.back(recorded.preds, row, done), recorded)
        ran.all_steps += done
        table.put(row, restart, paths.back(ran.preds, row, done), ran)
        logits[row, restart] = paths.back(ran.logits, row, done)
        if residuals is not None and ran.residuals is not None:
            residuals[row, restart, done : done + length] = ran.residuals[:, 0]
        done += length
        going = table.status[row, restart] == Status.MAX_DEPTH
        if select == "first" and done < depth:
            lost = going & settled(table.status).any(1)[row]
            table.status[row[lost], restart[lost]] = int(Status.CANCELLED)
            going &= ~lost
        assert ran.z_H is not None and ran.z_L is not None
        state = state._replace(z_H=ran.z_H, z_L=ran.z_L, step=state.step + length)
        row, restart, state = row[going], restart[going], LatentState(*(field[going] for field in state))
        state = state._replace(z_H=paths.moved(state.z_H, row, done), z_L=paths.moved(state.z_L, row, done))
    if stopped and done < depth:
        table.status[row, restart] = int(Status.CANCELLED)
    at |= {mark: table for mark in marks if mark not in at}
    won = table.winner(select)
    result = table.result(won, of_winners(logits, won), begun, return_all)
    result.at = {mark: at[mark].recorded(select) for mark in marks}
    result.residuals = residuals
    if progress is not None and not stopped:
        progress(of, of, spent)
    return result


def solve_tokens(
    model: EquilibriumReasoner, inputs: npt.NDArray[np.integer], *, turns: Turns | None, **options: Any
) -> SolveResult:
    """`solve`, or `solve_turned` where there are turns; inputs: tokens, integers [N, S]."""
    if turns is None:
        return model.solve(torch.from_numpy(inputs.astype(np.int64)), **options)
    return solve_turned(model, inputs, turns, **options)


def tolerance_once(model: EquilibriumReasoner, tokens: Tensor, tol: float | str, options: dict[str, Any]) -> float:
    """The number that `tol` stands for, for all calls of `solve` that these tokens, int64 [N, S], are solved in.

    Args:
        options: of those calls.
    """
    run = {name: options[name] for name in ("depth", "seed", "slots", "backend", "precision") if name in options}
    chosen = tolerance_of(model, tokens, tol, noise_scale=options.get("noise_scale"), **run)
    if chosen.caveat:
        warnings.warn(chosen.caveat, stacklevel=3)
    return chosen.value


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
    def of(cls, turns: Turns, puzzles: npt.NDArray[np.uint8], depth: int, device: torch.device) -> _Paths:
        views = turns.views(puzzles, min(turns.cycle, -(-depth // turns.every)))
        tables = (torch.from_numpy(np.ascontiguousarray(t).astype(np.int64)) for t in (views.cells, views.places))
        return cls(turns.every, *(table.to(device) for table in tables))

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
