"""`solve`: every row to its fixed point, deeper and broader, each trajectory stopping when it has settled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import backends, noise, selection
from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.arguments import check_choice, check_count, check_function, check_number
from eqr_kernels.backends import Backend, FixedPointProblem
from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.forking import check_threads
from eqr_kernels.modifications import overrides
from eqr_kernels.modules import EqROperator, LatentState, check_fields, check_ids, check_tokens, has_values
from eqr_kernels.not_compiled import not_compiled
from eqr_kernels.ops import StartStates
from eqr_kernels.precision import NAMED, Precision, names
from eqr_kernels.results import Collector, OnFinished, SolveResult
from eqr_kernels.run_rules import HALTING_RULES, RULES_WITH_TOLERANCE
from eqr_kernels.tasks.views import Turns
from eqr_kernels.tolerance import FIRST_ROWS, HaltingTolerance, check_tolerance, halting_tolerance
from eqr_kernels.turns import check_turns, turn_cells

DEFAULT_DEPTH = 64
"""Outer steps at most, of `solve` and of the commands."""
DEFAULT_SLOTS = 64

Progress = Callable[[int, int, int], "bool | None"]
"""(trajectories finished, trajectories, outer steps spent) -> False to cancel what is left."""


@not_compiled
def solve(
    model: EqROperator,
    tokens: Tensor,
    *,
    depth: int = DEFAULT_DEPTH,
    breadth: int = 1,
    halt: str = "residual",
    tol: float | str = "auto",
    patience: int = 1,
    select: str = "residual",
    window: int | None = None,
    noise_scale: float | None = None,
    seed: int = 0,
    ids: Tensor | None = None,
    checkpoints: Sequence[int] = (),
    slots: int | None = None,
    backend: str = "auto",
    precision: str = "auto",
    return_all: bool = False,
    trace: bool = False,
    return_state: bool = False,
    initial_state: LatentState | None = None,
    turns: Turns | None = None,
    on_finished: OnFinished | None = None,
    progress: Progress | None = None,
) -> SolveResult:
    """Iterates `breadth` trajectories of every row until each has settled, and selects one answer a row.

    The residual of outer step k is r_k = ||z_k - z_{k-1}|| / ||z_k|| over (z_H, z_L); the score of a trajectory is the
    mean over its last `window` steps of mean over tokens of ||logits_k - logits_{k-1}||_2 (EqR, arXiv 2605.21488,
    section 4). Memory does not grow with depth, and only `slots` trajectories are in flight at a time.

    Args:
        model: the reasoner; no gradient is taken. Where its user overrode a method, registered a hook or replaced a
            layer it is called as it is, in its mode (train or eval) and dtype; `SolveResult.backend_reason` says so.
        tokens: integers [N, S] in 0..V-1. N may be 0: the result is empty then, and the model is not called.
        depth: outer steps at most, for each trajectory.
        breadth: trajectories B a row, from different random starts.
        halt: one of `run_rules.HALTING_RULES`: "residual" (r <= tol for `patience` steps in a row: CONVERGED), "q"
            (q_halt > 0: HALTED), "residual+q" (both at the same step: CONVERGED), "residual|q" (either: HALTED where
            only q_halt > 0, else CONVERGED) or "none".
        tol: for the rules with "residual"; a number, "auto" or "fast". "auto" is the tolerance of the model's card at
            which at least 99 % of the puzzles that met it in calibration were right, so that `converged` is a promise;
            "fast" the loosest that cost no answer, whatever else met it. A model that has none warns that converged is
            no promise, and halts at its "fast" one or, never calibrated, at a provisional one: see
            `tolerance.provisional_tolerance`.
        patience: see `halt`; like tol without meaning to the rules "q" and "none".
        select: "residual" (settled first, then the lowest score), "vote" (the most common answer, then the score),
            "q" (highest q_halt) or "first" (fewest steps: a race, whose losers are cancelled).
        window: of the score; None takes the card's, else 3.
        noise_scale: of the noise injection; None takes the card's, else the config's.
        seed: 0 to 2**32 - 1.
        ids: int64 [N], key the random stream; by default a hash of each row's tokens, so that a puzzle gets the same
            trajectories in any company.
        checkpoints: depths at which all trajectories are also recorded, see `SolveResult.at`.
        slots: trajectories in flight at most; None takes 64, or what keeps a device busy. (The cpu backend has one for
            each thread, the cuda backend one for each multiprocessor, or one in its latency regime.)
        backend: "auto", "cpu", "reference", ...; see `eqr_kernels.backends`.
        precision: "auto" (the dtype of the weights), "fp32", "bf16" or "int8" (channel GEMMs with weights scaled per
            output channel and activations per row; the rest as in "bf16").
        return_all: also return every trajectory's answer.
        trace: also return every residual (the one thing that grows with depth).
        return_state: also return the state of the selected trajectories.
        initial_state: where trajectories start instead of at random, and what keys their noise: a state of N * breadth
            rows, those of a puzzle together. `depth` counts the steps from there. Such a state comes from
            `initial_state()`, from calling the model, or from `SolveResult.z_H`, `z_L` with counters of your own.
        turns: after every so many outer steps the cells of a puzzle move by a symmetry of its task, and its latent
            states with them, as in `Turns(4, sudoku.views)`; all that is returned is of the puzzle as it was given. A
            network that mixes tokens by position is not the same operator under a symmetry: a trajectory that was
            stuck, at rest on a wrong answer or moving about it, is seldom stuck once it has moved, and goes on from all
            that it has found. That a puzzle stays the same when its cells move is knowledge of its task: what turns
            gain is to be told apart, as with `solve_views`. `patience` and `window` count anew at each turn, so that
            patience is at most `turns.every`; the score one step after a turn is the change of the logits over it. The
            card's tolerances were calibrated without turns; halt="residual+q" asks for more than they do. Memory grows
            with the arrangements of a puzzle, at most `turns.cycle`. Not with return_state. Backends that move no cells
            (cuda, triton) cannot turn: "auto" takes another.
        on_finished: called with each trajectory as it ends (by the cuda and triton backends: when all have ended), in
            the calling thread. What it raises cancels what is left, and comes out of here.
        progress: called with (trajectories finished, of how many, outer steps spent) at the beginning, now and then (by
            the reference backend at every step), and at the end; returning False cancels what is left, and the result
            holds what there is.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; the message says what is allowed.
        RuntimeError: weights that are not finite or hold no values (meta, fake), a backend that cannot run here, or
            several threads in a forked child.
    """
    check_function("progress", progress)
    prepared = prepare(
        model,
        tokens,
        depth=depth,
        breadth=breadth,
        halt=halt,
        tol=tol,
        patience=patience,
        select=select,
        window=window,
        noise_scale=noise_scale,
        seed=seed,
        ids=ids,
        checkpoints=checkpoints,
        slots=slots,
        backend=backend,
        precision=precision,
        return_all=return_all,
        trace=trace,
        return_state=return_state,
        initial_state=initial_state,
        turns=turns,
        on_finished=on_finished,
        warn=partial(warnings.warn, stacklevel=5),  # behind _tolerance, prepare, solve and not_compiled
    )
    problem, chosen = prepared.problem, prepared.backend
    n = len(problem.tokens)

    def proceed(finished: int, spent: int) -> bool:
        return progress is None or progress(finished, problem.trajectories, spent) is not False

    with nvtx_range(f"eqr solve: {n} x {breadth} trajectories, {chosen.name}"):
        if n:
            with nvtx_range(f"eqr fixed point: {chosen.name}"):
                chosen.fixed_point(model, problem, prepared.collector, proceed)
        with nvtx_range("eqr selection"):
            return prepared.result()


Choices = dict[tuple[Any, ...], tuple[Backend, str]]
"""Backends that were chosen for one model and one `backend=`, and why."""


@dataclass(frozen=True, kw_only=True)
class PreparedSolve:
    """A solve whose arguments are checked, up to its fixed point.

    Attributes:
        reason: why it is this backend.
        collector: takes what the backend gives.
    """

    model: EqROperator
    problem: FixedPointProblem
    backend: Backend
    reason: str
    collector: Collector
    return_all: bool

    def result(self) -> SolveResult:
        """What `solve` gives, once every trajectory has ended."""
        reason = "; ".join([self.reason, *self.collector.notes])
        return self.collector.result(self.backend.name, reason, self.return_all)


def prepare(
    model: EqROperator,
    tokens: Tensor,
    *,
    depth: int,
    breadth: int,
    halt: str,
    tol: float | str,
    patience: int,
    select: str,
    window: int | None,
    noise_scale: float | None,
    seed: int,
    ids: Tensor | None,
    checkpoints: Sequence[int],
    slots: int | None,
    backend: str,
    precision: str,
    return_all: bool,
    trace: bool,
    return_state: bool,
    initial_state: LatentState | None,
    turns: Turns | None,
    on_finished: OnFinished | None,
    warn: Callable[[str], object],
    report_steps: bool = False,
    choices: Choices | None = None,
) -> PreparedSolve:
    """All of `solve` but the computation itself: its checks, its defaults, and its choice of the backend.

    Args:
        warn: called with each warning.
        report_steps: the recorder wants every outer step.
        choices: of a model whose weights nobody changes, what was found before, and what is found now: weights that
            are finite stay so, and a backend that was chosen is chosen again.

    Raises:
        As `solve`.
    """
    _check_has_values(model, tokens, initial_state)
    check_threads()
    tokens = check_tokens(tokens, model.config).to(model.device)
    n = tokens.shape[0]
    for name, value in (("depth", depth), ("breadth", breadth), ("patience", patience)):
        check_count(name, value)
    check_function("on_finished", on_finished)
    if slots is not None:
        check_count("slots", slots)
    if depth >= 1 << 24 or breadth >= 1 << 32:
        raise ValueError(f"depth must be below 2**24 and breadth below 2**32, got {depth} and {breadth}")
    window = check_count("window", model.inference_window if window is None else window)
    check_choice("halt", halt, tuple(HALTING_RULES))
    check_choice("select", select, selection.RULES)
    if select == "first" and halt == "none":
        raise ValueError('select="first" needs a halting rule, got halt="none"; use halt="residual" or halt="q"')
    seed = noise.check_word("seed", seed, 32)
    if noise_scale is None:
        noise_scale = model.inference_noise_scale
    check_number("noise_scale", noise_scale)
    if turns is not None:
        check_turns(turns, streak=patience if halt in RULES_WITH_TOLERANCE else 1, states=return_state)
    run: dict[str, Any] = dict(depth=depth, seed=seed, slots=slots, backend=backend, precision=precision)
    tolerance = _tolerance(model, halt, tokens, tol, noise_scale, run, warn)
    if isinstance(checkpoints, (str, Tensor)) or not isinstance(checkpoints, Iterable):
        kind = type(checkpoints).__name__
        raise TypeError(f"checkpoints must be a sequence of depths, as in (1, 4, 16), got {checkpoints!r} ({kind})")
    checkpoints = tuple(sorted({check_count("checkpoints", c) for c in checkpoints}))
    if checkpoints and checkpoints[-1] > depth:
        raise ValueError(f"checkpoints must be at most depth={depth}, got {checkpoints[-1]}; raise depth")
    computed_in = precision_of(model, precision)
    if not choices:
        _check_finite(model)
    start = None if initial_state is None else _start(model, initial_state, n, breadth, depth, seed, ids, computed_in)
    ids = noise.hash_tokens(tokens) if ids is None else check_ids(ids, n).to(model.device)
    if start is None and overrides(model, "initial_state"):
        rows, restarts = (torch.arange(count, device=model.device) for count in (n, breadth))
        rows = rows.repeat_interleave(breadth)
        own = model.initial_state(tokens[rows], seed, ids=ids[rows], restart=restarts.repeat(n))
        start = _start(model, own, n, breadth, depth, 0, None, computed_in)
    states = start is not None or return_state
    choices = {} if choices is None else choices
    kind = computed_in, states, turns is not None, torch.get_num_threads()
    if kind not in choices:
        choices[kind] = backends.choose(backend, model, computed_in, states=states, turns=turns is not None)
    chosen, reason = choices[kind]
    problem = FixedPointProblem(
        tokens=tokens,
        ids=ids,
        seed=seed,
        breadth=breadth,
        depth=depth,
        halt=halt,
        tol=tolerance,
        patience=patience,
        select=select,
        window=min(window, depth),
        noise_scale=noise_scale,
        checkpoints=checkpoints,
        slots=max(1, min(slots or DEFAULT_SLOTS, n * breadth)),
        trace=trace,
        precision=computed_in,
        slots_asked=slots is not None,
        start=start,
        keep_states=return_state,
        turns=None if turns is None else turn_cells(turns, tokens, depth, model.config.vocab_size),
        report_ends=on_finished is not None,
        report_steps=report_steps,
    )
    return PreparedSolve(
        model=model,
        problem=problem,
        backend=chosen,
        reason=reason,
        collector=Collector(problem, model.config, on_finished),
        return_all=return_all,
    )


def _check_has_values(model: EqROperator, tokens: object, state: object) -> None:
    if model.device.type == "meta":
        raise RuntimeError(
            "the model's weights are on the meta device and hold no values; load some with load_state_dict(..., "
            "assign=True), or take model.to_empty(device=...) and reset_parameters()"
        )
    given = [tokens, *(state if isinstance(state, LatentState) else ())]
    if not all(has_values(tensor) for tensor in (*model.parameters(), *given) if isinstance(tensor, Tensor)):
        raise RuntimeError(
            "solve looks at residuals to decide when to stop, and tensors of a FakeTensorMode, under torch.func.vmap "
            "or of the meta device have no values; call the model itself for shapes, or in vmap"
        )


def _start(
    model: EqROperator,
    state: LatentState,
    n: int,
    breadth: int,
    depth: int,
    seed: int,
    ids: Tensor | None,
    precision: Precision,
) -> StartStates:
    """`initial_state` as the backends take it: of all n * breadth trajectories."""
    check_fields("initial_state", state)
    if seed or ids is not None:
        given = "seed" if seed else "ids"
        raise ValueError(f"initial_state has seed and ids of its own, and {given} was given too; leave it out")
    shape = (n * breadth, model.config.seq_len, model.config.hidden_size)
    for name, z in (("z_H", state.z_H), ("z_L", state.z_L)):
        if tuple(z.shape) != shape or not z.is_floating_point():
            raise ValueError(
                f"initial_state.{name} must be of floats and of shape {list(shape)}, a row for each of the {n} "
                f"puzzles' {breadth} trajectories, got {z.dtype} {list(z.shape)}"
            )
    for name, values, bits in (("seed", state.seed, 32), ("restart", state.restart, 32), ("step", state.step, 24)):
        if tuple(values.shape) != shape[:1]:
            raise ValueError(f"initial_state.{name} must have shape [{shape[0]}], got {list(values.shape)}")
        noise.check_words(f"initial_state.{name}", values, bits)
    check_ids(state.ids, shape[0])
    if n and int(state.step.max()) + depth >= 1 << 24:
        raise ValueError(f"initial_state.step and depth must stay below 2**24 together, got {int(state.step.max())}")
    dtype = torch.promote_types(precision.dtype, torch.float32)  # float64 stays that where the run is in it
    z_H, z_L = (z.detach().to(model.device, dtype).contiguous() for z in (state.z_H, state.z_L))
    return StartStates(z_H, z_L, state.rng.to(model.device).contiguous())


def _tolerance(
    model: EqROperator,
    halt: str,
    tokens: Tensor,
    tol: float | str,
    noise_scale: float,
    run: dict[str, Any],
    warn: Callable[[str], object],
) -> float:
    if halt not in RULES_WITH_TOLERANCE:
        check_tolerance(tol)
        return 0.0
    tolerance = tolerance_of(model, tokens, tol, noise_scale=noise_scale, **run)
    if tolerance.caveat:
        warn(tolerance.caveat)
    floor = noise.noise_floor(noise_scale)
    if tolerance.value < floor:
        warn(
            f"tol={tolerance.value:g} is below {floor:g}, about the residual that noise_scale={noise_scale:g} alone "
            "leaves: no trajectory will converge; raise tol or lower noise_scale"
        )
    return tolerance.value


def tolerance_of(
    model: EqROperator, tokens: Tensor, tol: float | str = "auto", *, noise_scale: float | None = None, **run: Any
) -> HaltingTolerance:
    """The tolerance that `solve` would take for `tol`, and whether converged is a promise with it.

    Args:
        model, tokens, tol, noise_scale: as for `solve`.
        run: its depth, seed, slots, backend and precision. A model without noise and without a calibrated tolerance
            runs its first rows with these, without halting, to see what their residuals come down to.

    Raises:
        As `solve`.
    """

    def at_rest() -> Tensor:
        return solve(model, tokens[:FIRST_ROWS], halt="none", noise_scale=noise_scale, **run).residual

    scale = model.inference_noise_scale if noise_scale is None else check_number("noise_scale", noise_scale)
    return halting_tolerance(card_in(model, run.get("precision", "auto")), tol, scale, at_rest)


def card_in(model: EqROperator, precision: str) -> ModelCard | None:
    """The model's card with the tolerances of a precision, named as for `solve`."""
    return None if model.card is None else model.card.in_precision(precision_of(model, precision).name)


def precision_of(model: EqROperator, name: str) -> Precision:
    """What `precision=` of `solve` stands for: "auto" for the dtype of the model's weights.

    Raises:
        ValueError: no such precision.
        RuntimeError: no backend has it.
    """
    if name == "auto":
        return Precision.of_weights(model.dtype)
    if name == "fp8":
        raise RuntimeError(f"precision='fp8' has no backend in this version; use auto, {names(NAMED)}")
    check_choice("precision", name, ("auto", *(precision.name for precision in NAMED)))
    return Precision[name]


def _check_finite(model: EqROperator) -> None:
    for name, weight in model.state_dict().items():
        # Quantised layers keep other things there, and tensors of other kinds, which their own code has checked.
        if type(weight) is not Tensor or weight.layout is not torch.strided:
            continue
        if not weight.is_floating_point() or not weight.numel():
            continue
        # One pass, and no copy: NaN and infinities are among the extremes.
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise RuntimeError(
                f"weight {name} holds {int((~weight.isfinite()).sum())} non-finite values; load a sound checkpoint"
            )
