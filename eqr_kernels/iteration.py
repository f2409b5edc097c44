"""`fixed_point`: any operator, every row to its own fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eqr_kernels import noise, scheduler
from eqr_kernels.arguments import check_choice, check_count, check_number
from eqr_kernels.forking import check_threads
from eqr_kernels.modules import check_ids
from eqr_kernels.not_compiled import not_compiled
from eqr_kernels.scheduler import GOING, take, to_device
from eqr_kernels.trajectory import Status
from eqr_kernels.update import damped_update, fused_update, residual, squares

State = Tensor | tuple[Tensor, ...]
Step = Callable[..., State]
Progress = Callable[[int, int, int], "bool | None"]
"""(rows that have ended, rows, steps of all rows so far) -> False to stop what is left."""

SOLVERS = ("picard", "anderson")


@dataclass(frozen=True)
class FixedPointResult:
    """Where N rows have come to.

    Attributes:
        z: like z0. A row that diverged keeps its last finite state; with Anderson acceleration a row that has not
            converged has the state of its least residual.
        steps: int64 [N], steps of each row.
        residual: float32 [N], ||z_k - z_{k-1}|| / ||z_k|| over all tensors of z; NaN where no step was taken.
        converged: bool [N], the residual was at most tol for `patience` steps in a row.
        status: int64 [N], numbers of `Status`: CONVERGED, MAX_DEPTH, CANCELLED or DIVERGED.
        nfe: rows that `step` has computed in all, padding included.
        residuals: float32 [N, depth] with `trace`, NaN after a row's end; else None.
    """

    z: Any
    steps: Tensor
    residual: Tensor
    converged: Tensor
    status: Tensor
    nfe: int
    residuals: Tensor | None = None


class _Rows(NamedTuple):
    """Rows in flight, n of them."""

    number: Tensor  # int64 [n]
    rng: Tensor  # int64 [n, 4]: seed, 0, id, steps done
    streak: Tensor  # int64 [n], steps in a row at or below the tolerance
    z: tuple[Tensor, ...]  # [n, ...] each
    args: tuple[Tensor, ...]  # [n, ...] each, those that have a row for each
    memory: tuple[Tensor, ...]  # of the solver


class _Solver(Protocol):
    """Makes the next state of what the step gives."""

    def start(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Its memory of n rows that begin."""

    def update(self, rows: _Rows, u: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        """The next state, its residual float32 [n], and the memory."""

    def ends(
        self, before: _Rows, after: _Rows, u: tuple[Tensor, ...], change: Tensor, status: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What is given of rows that have ended so, status int64 [n]: their state, and its residual float32 [n]."""


class _Picard:
    """z <- (1 - lambda_) z + lambda_ step(z) + noise."""

    def __init__(self, lambda_: float, noise_scale: float) -> None:
        self.lambda_, self.noise_scale = lambda_, noise_scale

    def start(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ()

    def update(self, rows: _Rows, u: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        after, changes = [], []
        for i, (z, new) in enumerate(zip(rows.z, u, strict=True)):
            keyed = (rows.rng, noise.FIRST_UPDATE + i, self.lambda_, self.noise_scale)
            out, change, size = damped_update(z, new, *keyed, z, fused_update(z.device, z.dtype))
            after.append(out)
            changes.append((change, size))
        return tuple(after), residual(changes), ()

    def ends(
        self, before: _Rows, after: _Rows, u: tuple[Tensor, ...], change: Tensor, status: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        return _where(status == Status.DIVERGED, before.z, after.z), change


class _Anderson:
    """Anderson acceleration of each row by its own last `memory` steps (Walker and Ni, SIAM J. Numer. Anal. 49, 2011).

    With g = step(z) - z: the next z is the combination of the last z + lambda_ g whose weights, of sum 1, make the
    combined g least. The least squares are solved in float32 (float64 stays float64), regularised relative to their
    largest entry, by the normal equations of a row.
    """

    REGULARISATION = 1e-6

    def __init__(self, lambda_: float, memory: int) -> None:
        self.lambda_, self.size = lambda_, memory

    def start(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        flat = _flat(z)
        history = flat.new_zeros(len(flat), self.size, flat.shape[1])
        none = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        least = flat.new_full((len(flat),), torch.inf, dtype=torch.float32)
        return history, history.clone(), none, least, *(part.clone() for part in z)

    def update(self, rows: _Rows, u: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        zs, gs, count, least, *best = rows.memory
        change = residual([squares(new, z) for new, z in zip(u, rows.z, strict=True)])
        z, g = _flat(rows.z), _flat(u) - _flat(rows.z)
        place = (count % self.size)[:, None, None].expand(-1, 1, z.shape[1])
        zs, gs = zs.scatter(1, place, z[:, None]), gs.scatter(1, place, g[:, None])
        count = count + 1
        filled = torch.arange(self.size, device=z.device) < count[:, None]  # [n, memory]
        weights = self._weights(gs, filled)
        mixed = (weights[..., None] * (zs + self.lambda_ * gs)).sum(1)
        # The state that the residual belongs to is step(z), not the next guess.
        better = (change < least) & change.isfinite()
        least = torch.where(better, change, least)
        return _like(mixed, rows.z), change, (zs, gs, count, least, *_where(better, u, tuple(best)))

    def ends(
        self, before: _Rows, after: _Rows, u: tuple[Tensor, ...], change: Tensor, status: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        converged, (least, *best) = status == Status.CONVERGED, after.memory[3:]
        return _where(converged, u, tuple(best)), torch.where(converged, change, least)

    def _weights(self, gs: Tensor, filled: Tensor) -> Tensor:
        """Of sum 1, [n, memory], zero where nothing is kept yet; gs [n, memory, m]."""
        scale = gs.flatten(1).abs().amax(1).clamp_min(torch.finfo(gs.dtype).tiny)
        scaled = torch.where(scale.isfinite()[:, None, None], gs / scale[:, None, None], 0.0)
        gram = scaled @ scaled.transpose(1, 2)  # [n, memory, memory]
        largest = gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
        ridge = (self.REGULARISATION * largest)[:, None] + (~filled).to(gram.dtype) * 1e30
        # Without the check for singular matrices, which would wait for the device and let one row stop all.
        solution, _ = torch.linalg.solve_ex(gram + torch.diag_embed(ridge), filled.to(gram.dtype))
        solution = solution * filled
        return solution / solution.sum(1, keepdim=True)


def _where(rows: Tensor, these: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of states with n rows: `these` where bool [n], else the others."""
    pairs = zip(these, others, strict=True)
    return tuple(torch.where(rows.view(-1, *[1] * (this.ndim - 1)), this, other) for this, other in pairs)


def _flat(z: Sequence[Tensor]) -> Tensor:
    """All tensors of a state as one [n, m], float32 or float64."""
    wide = torch.float64 if any(part.dtype == torch.float64 for part in z) else torch.float32
    return torch.cat([part.flatten(1).to(wide) for part in z], 1)


def _like(flat: Tensor, z: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`_flat` undone."""
    parts = flat.split([part[0].numel() if len(part) else 0 for part in z], 1)
    return tuple(part.view(old.shape).to(old.dtype) for part, old in zip(parts, z, strict=True))


@not_compiled
@torch.no_grad()
def fixed_point(
    step: Step,
    z0: State,
    *args: Any,
    depth: int = 64,
    tol: float = 1e-3,
    patience: int = 1,
    slots: int | None = None,
    solver: str = "picard",
    lambda_: float = 1.0,
    memory: int = 5,
    noise_scale: float = 0.0,
    seed: int = 0,
    ids: Tensor | None = None,
    trace: bool = False,
    progress: Progress | None = None,
) -> FixedPointResult:
    """Iterates z <- step(z, *args) for each row until it has settled; no gradient is taken (see `FixedPoint`).

    Rows are independent. A row leaves when its residual r_k = ||z_k - z_{k-1}|| / ||z_k||, over all tensors of its
    state, has been at most `tol` for `patience` steps in a row; `step` then sees the others only, and with `slots` a
    waiting row takes its place. The number of rows that `step` sees is one of a few (up to 16, then one of eight an
    octave), filled up with rows that have ended. Where `step` treats rows alike in any company, a row's result does not
    depend on the other rows, on their order or on `slots` (to rounding: PyTorch's products may differ in the last bit
    from one size to another).

    Args:
        step: (z, *args) -> the next z, of the same structure, shapes and dtypes. Called without gradients.
        z0: where rows start: a float tensor [N, ...], or a tuple of such.
        args: given to `step`: of a tensor whose first size is N the running rows; everything else (a single row
            [1, ...], a number, a module) as it is.
        depth: steps of a row at most.
        tol: of the residual, at least 0.
        patience: see above.
        slots: rows in flight at most; None takes all. Memory besides z0 and the result grows with it, not with depth.
        solver: "picard" (the plain iteration; damped where lambda_ is below 1) or "anderson" (per row, by its last
            `memory` steps).
        lambda_: z <- (1 - lambda_) z + lambda_ step(z); of Anderson's mixing.
        memory: steps that Anderson acceleration looks back on, at least 1.
        noise_scale: of standard normals that "picard" adds to each new state, by `eqr_kernels.noise`: keyed by `seed`,
            the row's id, its step and the tensor's place in the state (stream 2 + place).
        seed: 0 to 2**32 - 1.
        ids: int64 [N], key the noise; by default 0..N-1.
        trace: also return every residual (the one thing that grows with depth).
        progress: called before each step and at the end with (rows that have ended, rows, steps of all rows so far);
            returning False stops what is left.

    Raises:
        TypeError, ValueError: an argument, or what `step` gives, is not as above; the message says what is allowed.
        RuntimeError: several threads in a forked child.
    """
    check_threads()
    z, single = _state("z0", z0)
    n, device = len(z[0]), z[0].device
    for name, value in (("depth", depth), ("patience", patience), ("memory", memory)):
        check_count(name, value)
    if slots is not None:
        check_count("slots", slots)
    for name, number in (("tol", tol), ("noise_scale", noise_scale)):
        check_number(name, number)
    if not 0 < check_number("lambda_", lambda_) <= 1:
        raise ValueError(f"lambda_ must be above 0 and at most 1, got {lambda_}")
    check_choice("solver", solver, SOLVERS)
    if solver == "anderson" and noise_scale:
        raise ValueError(f'noise_scale is for solver="picard", got {noise_scale} with "anderson"')
    seed = noise.check_word("seed", seed, 32)
    keys = torch.arange(n, device=device) if ids is None else check_ids(ids, n).to(device)
    given = [_rows_of(i, arg, n) for i, arg in enumerate(args)]
    operator = _Operator(
        step,
        z,
        given,
        single,
        _Picard(lambda_, noise_scale) if solver == "picard" else _Anderson(lambda_, memory),
        noise.make_rng(seed, 0, keys, 0),
        depth=depth,
        tol=tol,
        patience=patience,
        trace=trace,
    )

    def proceed(ended: int, spent: int) -> bool:
        return progress is None or progress(ended, n, spent) is not False

    nfe = scheduler.iterate(operator, n, slots or n, proceed, scheduler.fine_bucket) if n else 0
    return operator.result(nfe)


class _Operator:
    """The user's step as the scheduler's operator."""

    def __init__(
        self,
        step: Step,
        z0: tuple[Tensor, ...],
        args: Sequence[tuple[Any, bool]],
        single: bool,
        solver: _Solver,
        rng: Tensor,
        *,
        depth: int,
        tol: float,
        patience: int,
        trace: bool,
    ) -> None:
        self.step, self.z0, self.args, self.single, self.solver, self.rng = step, z0, args, single, solver, rng
        self.depth, self.tol, self.patience = depth, tol, patience
        self.z = tuple(z.clone() for z in z0)
        n, device = len(rng), rng.device
        self.steps = torch.zeros(n, dtype=torch.int64, device=device)
        self.status = torch.full((n,), int(Status.CANCELLED), dtype=torch.int64, device=device)
        self.last = torch.full((n,), torch.nan, dtype=torch.float32, device=device)
        size = (n, depth)
        self.residuals = torch.full(size, torch.nan, dtype=torch.float32, device=device) if trace else None
        self.one_step = torch.tensor([0, 0, 0, 1], device=device)

    def admit(self, number: Tensor) -> _Rows:
        at = to_device(number, self.rng.device)
        z = tuple(part[at] for part in self.z0)
        args = tuple(arg[at] for arg, has_rows in self.args if has_rows)
        return _Rows(at, self.rng[at], torch.zeros_like(at), z, args, self.solver.start(z))

    def advance(self, rows: _Rows, going: Tensor) -> tuple[_Rows, Tensor]:
        u = self._checked(self._called(rows), rows.z)
        z, change, memory = self.solver.update(rows, u)
        done = rows.rng[:, 3]
        steps = done + 1
        if self.residuals is not None:
            live = to_device(going.nonzero()[:, 0], steps.device)
            self.residuals[rows.number[live], done[live]] = change[live]
        finite = change.isfinite()
        streak = (rows.streak + 1).masked_fill(~(change <= self.tol), 0)
        status = torch.full_like(steps, GOING).masked_fill(steps == self.depth, int(Status.MAX_DEPTH))
        status = status.masked_fill(streak >= self.patience, int(Status.CONVERGED))
        status = status.masked_fill(~finite, int(Status.DIVERGED))
        # The one time in a step that the host waits for the device.
        on_host = torch.where(going, status.cpu(), GOING)
        ended = on_host != GOING
        after = _Rows(rows.number, rows.rng + self.one_step, streak, z, rows.args, memory)
        if ended.any():
            self._record(rows, after, u, change, to_device(ended.nonzero()[:, 0], steps.device), status)
        return after, ended

    def _called(self, rows: _Rows) -> Any:
        own = iter(rows.args)
        args = [next(own) if has_rows else arg for arg, has_rows in self.args]
        return self.step(rows.z[0] if self.single else rows.z, *args)

    def _checked(self, u: Any, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        parts = (u,) if isinstance(u, Tensor) else u
        fits = isinstance(parts, tuple | list) and len(parts) == len(z) and isinstance(u, Tensor) == self.single
        if fits and all(
            isinstance(p, Tensor) and p.shape == old.shape and p.dtype == old.dtype
            for p, old in zip(parts, z, strict=True)
        ):
            return tuple(parts)
        raise TypeError(f"step must give what it was given, {_described(z, self.single)}, got {_described(u)}")

    def _record(
        self, before: _Rows, after: _Rows, u: tuple[Tensor, ...], change: Tensor, at: Tensor, status: Tensor
    ) -> None:
        """Writes down rows that have ended: `at`, int64 [m], among those in flight."""
        before, after, u, change, status = take((before, after, u, change, status), at)
        ends, last = self.solver.ends(before, after, u, change, status)
        number = after.number
        for total, end in zip(self.z, ends, strict=True):
            total[number] = end
        self.steps[number], self.status[number], self.last[number] = after.rng[:, 3], status, last

    def stop(self, rows: _Rows, waiting: Tensor) -> None:
        for total, end in zip(self.z, rows.z, strict=True):
            total[rows.number] = end
        self.steps[rows.number] = rows.rng[:, 3]

    def result(self, nfe: int) -> FixedPointResult:
        z = self.z[0] if self.single else self.z
        converged = self.status == Status.CONVERGED
        return FixedPointResult(z, self.steps, self.last, converged, self.status, nfe, self.residuals)


def _state(name: str, z: Any) -> tuple[tuple[Tensor, ...], bool]:
    """A state's tensors, and whether it is one alone.

    Raises:
        TypeError, ValueError: it is neither a float tensor [N, ...] nor a tuple of such, on one device.
    """
    parts, single = ((z,), True) if isinstance(z, Tensor) else (z, False)
    allowed = f"{name} must be a tensor of floats [N, ...], or a tuple of such"
    if not isinstance(parts, tuple) or not parts:
        raise TypeError(f"{allowed}, got {_described(z)}")
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise TypeError(f"{allowed}, got {_described(z)}")
        if part.ndim < 1 or len(part) != len(parts[0]) or part.device != parts[0].device:
            raise ValueError(f"{allowed}, all of one N and on one device, got {_described(z)}")
    if len(parts) > 254:
        raise ValueError(f"{name} must have at most 254 tensors, got {len(parts)}")
    return tuple(part.detach() for part in parts), single


def _rows_of(index: int, arg: Any, n: int) -> tuple[Any, bool]:
    """An argument of the step, and whether it has a row for each."""
    if not isinstance(arg, Tensor) or arg.ndim == 0 or (len(arg) == 1 and n != 1):
        return arg, False
    if len(arg) != n:
        raise ValueError(
            f"args[{index}] must have a row for each of the {n} of z0, a single row or no dimension, got shape "
            f"{list(arg.shape)}; what all rows share is bound to step with functools.partial"
        )
    return arg, True


def _described(value: Any, single: bool = False) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        inner = [_described(part) for part in value]
        return inner[0] if single else f"({', '.join(inner)})"
    return type(value).__name__
