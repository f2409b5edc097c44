"""Breadth by the symmetries of a task, where `solve` has it by random starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eqr_kernels import selection
from eqr_kernels.arguments import check_choice, check_function
from eqr_kernels.outcomes import Outcomes, of_winners
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.results import Recorded, SolveResult
from eqr_kernels.run_rules import RULES_WITH_TOLERANCE
from eqr_kernels.solver import Progress, tolerance_of
from eqr_kernels.tasks.common import as_tokens
from eqr_kernels.tasks.views import MakeViews, Views

_REFUSED = {
    "breadth": "there is a trajectory for each view",
    "ids": "each view has its own",
    "initial_state": "a state is of one view's tokens",
    "return_state": "a state is of one view's tokens",
    "on_finished": "it would be told of views, not of puzzles",
}


def solve_views(
    model: EquilibriumReasoner,
    views: Views,
    *,
    select: str = "residual",
    checkpoints: Sequence[int] = (),
    trace: bool = False,
    return_all: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SolveResult:
    """Solves the views of every puzzle, one trajectory each, and selects one of the answers to the puzzle.

    That a puzzle stays the same when its cells are moved and its tokens renamed is knowledge of its task: what views
    gain is not what random starts gain, and is to be told apart.

    Args:
        model: a reasoner.
        views: V of each of N puzzles, as `sudoku.views(inputs, V)` makes them. The first is the puzzle itself, so that
            its trajectory is that of `solve`.
        select: "residual", "vote" and "q" as for `solve`. "first" takes the views of a puzzle one after the other, and
            the first that settles answers: the later ones are not run (CANCELLED at 0 steps). Where none settles, the
            lowest score answers.
        checkpoints, trace: as for `solve`, and not with "first", which does not run all views.
        return_all, progress: as for `solve`.
        options: as for `solve`, but for breadth, ids, initial_state, return_state and on_finished. What tol="auto" and
            "fast" stand for is found out once, with the puzzles themselves.

    Returns:
        As `solve` with breadth V: `restart` is the view. All answers and `logits` are the puzzle's. The logits of all
        N * V trajectories are in memory until the winners are known, but for "first".

    Raises:
        TypeError, ValueError, RuntimeError: as `solve`.
    """
    check_choice("select", select, selection.RULES)
    check_function("progress", progress)
    _check_views(model, views)
    checkpoints = tuple(checkpoints)
    for name, why in _REFUSED.items():
        if name in options:
            raise TypeError(f"solve_views takes no {name}: {why}; leave it out")
    if options.get("halt", "residual") in RULES_WITH_TOLERANCE:
        options["tol"] = _tolerance_once(model, int64(views.inputs[:, 0]), options.get("tol", "auto"), options)
    if select == "first":
        if checkpoints or trace:
            raise ValueError(
                'select="first" does not run all views, and checkpoints and trace are of all; choose "residual", '
                '"vote" or "q"'
            )
        return _first_to_settle(model, views, return_all, progress, options)
    n, count, seq_len = views.inputs.shape
    settings: dict[str, Any] = dict(checkpoints=checkpoints, trace=trace, progress=progress, **options)
    each = model.solve(int64(views.inputs.reshape(n * count, seq_len)), return_all=True, **settings)
    back = _WayBack.of(views, each.preds.device)

    def grid(values: Tensor) -> Tensor:
        """Of the one trajectory of each view: [N * V, 1, ...] -> [N, V, ...]."""
        return values[:, 0].unflatten(0, (n, count))

    def table_of(ran: SolveResult | Recorded) -> Outcomes:
        assert ran.all_preds is not None
        numbers = (ran.all_status, ran.all_score, ran.all_q_halt, ran.all_steps, ran.all_residual)
        return Outcomes(back.preds(grid(ran.all_preds)), *map(grid, numbers))

    table = table_of(each)
    won = table.winner(select)
    logits = back.logits(of_winners(each.logits.unflatten(0, (n, count)), won), won)
    result = table.result(won, logits, each, return_all)
    result.at = {depth: table_of(at).recorded(select) for depth, at in each.at.items()}
    result.residuals = None if each.residuals is None else grid(each.residuals)
    return result


def solve_puzzles(
    model: EquilibriumReasoner,
    inputs: npt.NDArray[np.integer],
    *,
    views: MakeViews | None,
    breadth: int = 1,
    **options: Any,
) -> SolveResult:
    """`solve`, or `solve_views` where views are wanted.

    Args:
        inputs: tokens, integers [N, S].
        views: makes the views of which each trajectory gets one; None for trajectories from random starts.
        breadth: trajectories of each puzzle. options: further arguments of either.
    """
    if views is None:
        return model.solve(int64(inputs), breadth=breadth, **options)
    puzzles = as_tokens("tokens", inputs, model.config.vocab_size)
    return solve_views(model, views(puzzles, breadth), **options)


def _tolerance_once(model: EquilibriumReasoner, tokens: Tensor, tol: float | str, options: dict[str, Any]) -> float:
    """The number that `tol` stands for, for all calls of `solve` that these tokens, int64 [N, S], are solved in.

    Args:
        options: of those calls.
    """
    run = {name: options[name] for name in ("depth", "seed", "slots", "backend", "precision") if name in options}
    chosen = tolerance_of(model, tokens, tol, noise_scale=options.get("noise_scale"), **run)
    if chosen.caveat:
        warnings.warn(chosen.caveat, stacklevel=3)
    return chosen.value


def int64(values: npt.NDArray[np.integer]) -> Tensor:
    """Integers of any kind and shape as a tensor of its own."""
    return torch.from_numpy(values.astype(np.int64, order="C"))


def _first_to_settle(
    model: EquilibriumReasoner,
    views: Views,
    return_all: bool,
    progress: Progress | None,
    options: dict[str, Any],
) -> SolveResult:
    n, count, seq_len = views.inputs.shape
    of, spent, stopped = n * count, 0, False
    table = Outcomes.empty(n, count, seq_len, model.device)
    logits = torch.zeros(n, seq_len, model.config.vocab_size, dtype=torch.float32, device=model.device)
    rows = torch.arange(n, device=model.device)  # of puzzles that go on
    begun = None
    for view in range(count):
        before = of - len(rows) * (count - view)  # views that have ended or will not be run

        def shown(finished: int, _trajectories: int, steps: int, before: int = before, spent: int = spent) -> bool:
            nonlocal stopped
            stopped = progress is not None and progress(before + finished, of, spent + steps) is False
            return not stopped

        seen = views.at(rows.cpu().numpy(), view)
        each = model.solve(int64(seen.inputs[:, 0]), select="first", progress=shown, **options)
        back = _WayBack.of(seen, model.device)
        table.put(rows, view, Outcomes.of(back.preds(each.preds[:, None])[:, 0], each))
        better = table.winner("first")[rows] == view
        first = torch.zeros(len(rows), dtype=torch.int64, device=model.device)
        logits[rows[better]] = back.logits(each.logits, first)[better]
        begun = begun or each
        spent += int(each.nfe.sum())
        rows = rows[~each.converged]
        if stopped or not len(rows):
            break
    assert begun is not None
    if progress is not None and not stopped:
        progress(of, of, spent)
    return table.result(table.winner("first"), logits, begun, return_all)


def _check_views(model: EquilibriumReasoner, views: object) -> None:
    if not isinstance(views, Views):
        raise TypeError(f"views must be Views, as sudoku.views(inputs, 8) makes them, got {type(views).__name__}")
    vocab_size = views.names.shape[2]
    if vocab_size != model.config.vocab_size:
        raise ValueError(f"views must be of the model's {model.config.vocab_size} tokens, got {vocab_size}")


class _WayBack(NamedTuple):
    """From views to puzzles, see `Views`: places int64 [N, V, S], names and meanings int64 [N, V, vocab_size]."""

    places: Tensor
    names: Tensor
    meanings: Tensor

    @classmethod
    def of(cls, views: Views, device: torch.device) -> _WayBack:
        tables = (views.places, views.names, views.meanings)
        return cls(*(int64(table).to(device) for table in tables))

    def preds(self, preds: Tensor) -> Tensor:
        """int64 [N, V, S]."""
        return self.meanings.gather(2, preds.gather(2, self.places))

    def logits(self, logits: Tensor, won: Tensor) -> Tensor:
        """float32 [N, S, vocab_size], of the views won, int64 [N]."""
        logits = logits.gather(1, of_winners(self.places, won)[:, :, None].expand_as(logits))
        return logits.gather(2, of_winners(self.names, won)[:, None].expand_as(logits))
