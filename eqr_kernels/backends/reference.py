"""The reference backend: the fixed-point loop in plain PyTorch, with dynamic scheduling over slots.

A model whose modules are not those of the plain operator any more is called as it is, see `modifications`.

On a CUDA device outer steps are replayed as graphs, and the host waits once in a step, to learn which trajectories have
ended; it waits a few times more only where some end or are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eqr_kernels import noise
from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends.base import FixedPointProblem, Proceed, Recorder
from eqr_kernels.backends.graphed import GraphedStep, Graphs, Step, StepInputs, cuda_graphs
from eqr_kernels.backends.steps import ModuleStep, PlainStep
from eqr_kernels.modifications import modification
from eqr_kernels.modules import EqROperator
from eqr_kernels.ops import TurnCells
from eqr_kernels.precision import Precision
from eqr_kernels.scheduler import GOING, Iteration, Stepper, bucket, exactly, run, take, to_device
from eqr_kernels.trajectory import Snapshot, Status, settled
from eqr_kernels.update import why_not_fused_update


class _Rows(NamedTuple):
    """The n trajectories in flight, one a row."""

    number: Tensor  # int64 [n], of the trajectories
    rng: Tensor  # int64 [n, 4]: seed, restart, id, outer steps done, those of a given start state included
    injection: Tensor  # [n, S, ...], see `OuterStep.injection`
    z_H: Tensor  # [n, S, d]
    z_L: Tensor  # [n, S, d]
    logits: Tensor  # float32 [n, S, V] of the step before, of the puzzles' own cells
    q_halt: Tensor  # float32 [n] of the step before
    changes: Tensor  # float32 [n, window], the last changes of the logits, newest last
    streak: Tensor  # int64 [n], consecutive steps at or below the tolerance
    steps: Tensor  # int64 [n], outer steps done in this run


class ReferenceBackend:
    """Plain PyTorch on any device; damping and noise in `ops.damped_update` where the extension has it.

    Args:
        graphs: what captures outer steps on a device, or None where they run eagerly.
    """

    name = "reference"
    precisions = (Precision.fp32, Precision.bf16, Precision.fp16, Precision.fp64)
    max_checkpoints: int | None = None
    keeps_states = True
    turns_cells = True
    runs_modules = True

    def __init__(self, graphs: Callable[[torch.device], Graphs | None] = cuda_graphs) -> None:
        self._graphs = graphs

    def why_not(self, model: EqROperator, precision: Precision) -> str | None:
        if precision.dtype != model.dtype and (modified := modification(model)):
            return (
                f"{modified}, so that the model is run through its modules, which compute in their own "
                f"{model.dtype} and not in {precision.name}; use precision='auto', or convert the model"
            )
        if precision not in self.precisions:
            cpu = "backend='cpu'" if model.device.type == "cpu" else "backend='cpu' after model.cpu()"
            return f"plain PyTorch has no int8 arithmetic for this operator; use {cpu}, or precision='bf16'"
        return None

    def describe(self, model: EqROperator, precision: Precision) -> str:
        if modified := modification(model):
            return f"the model through its modules in PyTorch, since {modified}"
        if model.device.type == "cuda":
            return f"plain PyTorch in CUDA graphs on {torch.cuda.get_device_name(model.device)}"
        why_not = why_not_fused_update(model.device, precision.dtype)
        if why_not is None:
            return "plain PyTorch with the compiled damped_update"
        return f"plain PyTorch throughout ({why_not})"

    @torch.no_grad()
    def fixed_point(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed) -> None:
        with _own_precision(model):
            run(self._iteration(model, problem, recorder), proceed)

    @torch.no_grad()
    def stepper(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder) -> Stepper:
        with _own_precision(model):
            return _Stepper(model, self._iteration(model, problem, recorder))

    def _iteration(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder) -> Iteration[_Rows]:
        modified = modification(model) is not None
        step = ModuleStep(model, problem) if modified else PlainStep(model, problem)
        # A captured graph would not call hooks; and who looks at a module must see no row twice.
        graphs = None if modified else self._graphs(model.device)
        graphed = step if graphs is None else GraphedStep(step, graphs, bucket(problem.slots), recorder.note)
        trajectories = _Trajectories(model, problem, step.injection, graphed, recorder)
        return Iteration(trajectories, problem.trajectories, problem.slots, exactly if modified else bucket)


class _Arrangements:
    """Where the cells of each puzzle are between turns: before the first as the puzzle has them, and after the v-th as
    number v % V of its arrangements has them."""

    def __init__(self, turns: TurnCells) -> None:
        self.every, self._cells = turns.every, turns.cells
        self._places = turns.cells.argsort(2)

    def _after(self, table: Tensor, puzzle: Tensor, steps: Tensor) -> Tensor:
        """[n, S], of puzzles int64 [n], once so many outer steps are done, int64 [n]."""
        turn = steps // self.every
        own = torch.arange(table.shape[2], device=table.device)
        return torch.where(turn[:, None] == 0, own, table[puzzle, turn % table.shape[1]])

    def seen(self, tokens: Tensor, puzzle: Tensor, steps: Tensor) -> Tensor:
        """Tokens [n, S] of the puzzles' own cells, as they are then."""
        return tokens.gather(1, self._after(self._cells, puzzle, steps))

    def back(self, values: Tensor, puzzle: Tensor, steps: Tensor) -> Tensor:
        """Values [n, S, ...] of the cells as they are then, by the puzzles' own cells."""
        return _gathered(values, self._after(self._places, puzzle, steps))

    def moved(self, values: Tensor, puzzle: Tensor, steps: Tensor) -> Tensor:
        """Values [n, S, ...] of the cells before the turn after so many outer steps, by the cells after it."""
        before = self._after(self._places, puzzle, steps - 1)
        return _gathered(values, before.gather(1, self._after(self._cells, puzzle, steps)))


def _gathered(values: Tensor, cells: Tensor) -> Tensor:
    """[n, S, m] -> [n, S, m], by cells int64 [n, S]."""
    return values.gather(1, cells[:, :, None].expand_as(values))


def _own_precision(model: EqROperator) -> torch.autocast:
    """What the user's autocast does elsewhere must not change a precision that was asked for."""
    return torch.autocast(model.device.type, enabled=False)


class _Stepper:
    """An iteration whose steps find torch's state as `fixed_point` sets it, whoever takes them."""

    def __init__(self, model: EqROperator, iteration: Iteration[_Rows]) -> None:
        self._model, self._iteration = model, iteration

    @property
    def ended(self) -> int:
        return self._iteration.ended

    @property
    def running(self) -> int:
        return self._iteration.running

    @property
    def spent(self) -> int:
        return self._iteration.spent

    @torch.no_grad()
    def step(self) -> bool:
        with _own_precision(self._model):
            return self._iteration.step()

    @torch.no_grad()
    def stop(self) -> None:
        with _own_precision(self._model):
            self._iteration.stop()


class _Trajectories:
    """EqR's trajectories as the scheduler's operator: residual and score, halting, checkpoints, races."""

    def __init__(
        self,
        model: EqROperator,
        problem: FixedPointProblem,
        injection: Callable[[Tensor], Tensor],
        outer_step: Step,
        recorder: Recorder,
    ) -> None:
        self.model, self.problem, self.recorder = model, problem, recorder
        self.injection, self.outer_step = injection, outer_step
        self.one_step = torch.tensor([0, 0, 0, 1], device=model.device)
        # For a race: the fewest steps in which a trajectory of the puzzle has halted so far, and its restart. Like all
        # that decides, on the host: no decision then waits for the device.
        n = problem.tokens.shape[0]
        self.best_steps = torch.full((n,), problem.depth + 1, dtype=torch.int64, device="cpu")
        self.best_restart = torch.full((n,), problem.breadth, dtype=torch.int64, device="cpu")
        self.turns = None if problem.turns is None else _Arrangements(problem.turns)

    def _to_device(self, numbers: Tensor) -> Tensor:
        return to_device(numbers, self.model.device)

    def admit(self, number: Tensor) -> _Rows:
        """In a race, siblings that cannot win any more are recorded at once."""
        if self.problem.race:
            hopeless = self._cannot_win(number, torch.zeros_like(number))
            self._cancel_unstarted(number[hopeless])
            number = number[~hopeless]
        return self._start(self._to_device(number))

    def _start(self, number: Tensor) -> _Rows:
        p, c = self.problem, self.model.config
        n, device = len(number), number.device
        puzzle, restart = number // p.breadth, number % p.breadth
        if p.start is not None:
            z_H, z_L, rng = (field[number] for field in p.start)
        else:
            rng = noise.make_rng(p.seed, restart, p.ids[puzzle], 0)
            z_H, z_L = self.model.start(rng)
        return _Rows(
            number,
            rng,
            self.injection(p.tokens[puzzle]),
            z_H.to(p.dtype),
            z_L.to(p.dtype),
            torch.zeros(n, c.seq_len, c.vocab_size, dtype=torch.float32, device=device),
            torch.full((n,), torch.nan, dtype=torch.float32, device=device),
            torch.full((n, p.window), torch.nan, dtype=torch.float32, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
        )

    def advance(self, rows: _Rows, going: Tensor) -> tuple[_Rows, Tensor]:
        """One outer step of every row in flight."""
        p = self.problem
        with nvtx_range("eqr outer step"):
            outputs = self.outer_step(StepInputs(rows.z_H, rows.z_L, rows.injection, rows.rng))
        z_H, z_L, residual, logits, q_halt = outputs
        done = rows.steps
        since = done  # outer steps since the last turn
        if self.turns is not None:
            logits = self.turns.back(logits, rows.number // p.breadth, done)
            since = done % self.turns.every
        if p.trace:
            live = self._to_device(going.nonzero()[:, 0])
            self.recorder.residual(rows.number[live], done[live], residual[live])
        change = torch.where(done == 0, residual, (logits - rows.logits).norm(dim=-1).mean(-1))
        # At depth 1 there is no difference yet: the residual stands in, and leaves with the first difference. So does
        # the difference over a turn, at which those before it leave.
        history = rows.changes.masked_fill((since <= 1)[:, None], torch.nan)
        changes = torch.cat([history[:, 1:], change[:, None]], 1)
        steps = done + 1
        finite = residual.isfinite() & logits.isfinite().all(-1).all(-1) & q_halt.isfinite()
        streak = (rows.streak.masked_fill(since == 0, 0) + 1).masked_fill(~(residual <= p.tol), 0)
        kept = torch.where(finite[:, None, None], logits, rows.logits)
        rng = rows.rng + self.one_step
        after = _Rows(rows.number, rng, rows.injection, z_H, z_L, kept, q_halt, changes, streak, steps)

        status = torch.full_like(steps, GOING).masked_fill(steps == p.depth, int(Status.MAX_DEPTH))
        low, positive = streak >= p.patience, q_halt > 0
        if p.halt in ("q", "residual|q"):
            status = status.masked_fill(positive, int(Status.HALTED))
        if p.halt in ("residual", "residual|q"):
            status = status.masked_fill(low, int(Status.CONVERGED))
        if p.halt == "residual+q":
            status = status.masked_fill(low & positive, int(Status.CONVERGED))
        status = status.masked_fill(~finite, int(Status.DIVERGED))
        # The one time in a step that the host waits for the device.
        number, steps_now, status = torch.stack([rows.number, steps, status]).cpu()
        status = torch.where(going, status, GOING)
        if p.race:
            status = self._race(number, steps_now, status, going)
        ended = status != GOING

        def snapshot() -> Snapshot:
            score, statuses = changes.nanmean(1), self._to_device(status)
            states = (z_H.float(), z_L.float()) if p.keep_states else ()
            return Snapshot(rows.number, kept.argmax(-1), kept, q_halt, residual, score, steps, statuses, *states)

        if p.report_steps:
            self.recorder.stepped(snapshot().take(self._to_device(going.nonzero()[:, 0])))
        self._record(snapshot, steps_now, ended, stepped=going)
        return self._turned(after, (steps_now % self.turns.every == 0) & ~ended) if self.turns else after, ended

    def _turned(self, rows: _Rows, these: Tensor) -> _Rows:
        """Moves the cells of some of the rows, bool [n] on the host, which have all done an outer step."""
        assert self.turns is not None
        if not these.any():
            return rows
        index = self._to_device(these.nonzero()[:, 0])
        puzzle, steps = rows.number[index] // self.problem.breadth, rows.steps[index]
        z_H, z_L = (z.index_copy(0, index, self.turns.moved(z[index], puzzle, steps)) for z in (rows.z_H, rows.z_L))
        tokens = self.turns.seen(self.problem.tokens[puzzle], puzzle, steps)
        injection = rows.injection.index_copy(0, index, self.injection(tokens))
        return rows._replace(z_H=z_H, z_L=z_L, injection=injection)

    def _record(
        self, snapshot: Callable[[], Snapshot], steps: Tensor, ended: Tensor, stepped: Tensor | None = None
    ) -> None:
        """Hands over trajectories that have ended, and those that are at a checkpoint.

        Args:
            snapshot: makes the trajectories, m of them, on the device.
            steps: int64 [m], and ended: bool [m], on the host.
            stepped: whose steps are new, not recorded yet, bool [m] on the host; None: nobody's.
        """
        made: Snapshot | None = None
        for depth in (*self.problem.checkpoints, None):
            if depth is None:
                chosen = ended
            else:
                # A trajectory that has ended stays as it is at every later checkpoint.
                chosen = ended & (steps < depth)
                if stepped is not None:
                    chosen = chosen | (steps == depth) & stepped
            if not chosen.any():
                continue
            made = made or snapshot()
            rows = made.take(self._to_device(chosen.nonzero()[:, 0]))
            if depth is None:
                self.recorder.finished(rows)
            else:
                self.recorder.checkpoint(depth, rows)

    def _race(self, number: Tensor, steps: Tensor, status: Tensor, going: Tensor) -> Tensor:
        """Takes in those that have just halted, then cancels the siblings that cannot be first any more."""
        b = self.problem.breadth
        for row in settled(status).nonzero()[:, 0].tolist():
            puzzle, entry = int(number[row]) // b, (int(steps[row]), int(number[row]) % b)
            if entry < (int(self.best_steps[puzzle]), int(self.best_restart[puzzle])):
                self.best_steps[puzzle], self.best_restart[puzzle] = entry
        lost = going & (status == GOING) & self._cannot_win(number, steps)
        return torch.where(lost, int(Status.CANCELLED), status)

    def _cannot_win(self, number: Tensor, steps: Tensor) -> Tensor:
        """bool [n]: halting at the next step would already be too late. number, steps: int64 [n], on the host."""
        puzzle, restart = number // self.problem.breadth, number % self.problem.breadth
        best = self.best_steps[puzzle]
        return (steps + 1 > best) | ((steps + 1 == best) & (restart > self.best_restart[puzzle]))

    def _cancel_unstarted(self, number: Tensor) -> None:
        """Records trajectories, on the host, that never ran: no steps, no answer (all pad), residual and score NaN."""
        if not len(number):
            return
        m, c, device = len(number), self.model.config, self.model.device
        nan = torch.full((m,), torch.nan, dtype=torch.float32, device=device)
        steps = torch.zeros(m, dtype=torch.int64, device="cpu")
        logits = torch.zeros(m, c.seq_len, c.vocab_size, dtype=torch.float32, device=device)
        preds = torch.zeros(m, c.seq_len, dtype=torch.int64, device=device)
        status = torch.full((m,), int(Status.CANCELLED), dtype=torch.int64, device=device)
        zeros, numbers = self._to_device(steps), self._to_device(number)
        states = torch.zeros(2, m, c.seq_len, c.hidden_size, dtype=torch.float32, device=device)
        kept = tuple(states) if self.problem.keep_states else ()
        rows = Snapshot(numbers, preds, logits, nan, nan, nan, zeros, status, *kept)
        self._record(lambda: rows, steps, torch.ones(m, dtype=torch.bool, device="cpu"))

    def stop(self, rows: _Rows, waiting: Tensor) -> None:
        """Rows in flight keep the answers that they have."""
        number, steps = torch.stack([rows.number, rows.steps]).cpu()
        self._cancel_unstarted(number[steps == 0])
        rows, steps = take(rows, self._to_device(steps.nonzero()[:, 0])), steps[steps > 0]
        if len(rows.number):
            nan = torch.full_like(rows.q_halt, torch.nan)
            status = torch.full_like(rows.number, Status.CANCELLED)
            score = rows.changes.nanmean(1)
            states = (rows.z_H.float(), rows.z_L.float()) if self.problem.keep_states else ()
            fields = (
                rows.number,
                rows.logits.argmax(-1),
                rows.logits,
                rows.q_halt,
                nan,
                score,
                rows.steps,
                status,
                *states,
            )
            self._record(lambda: Snapshot(*fields), steps, torch.ones_like(steps, dtype=torch.bool))
        # In parts, or the rows that never ran would take more memory than those that did.
        for part in waiting.split(self.problem.slots):
            self._cancel_unstarted(part)
