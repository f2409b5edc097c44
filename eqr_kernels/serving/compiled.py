"""The runner on compiled threads: trajectories of all requests take turns in the kernel's loop on CPU."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from eqr_kernels import ops
from eqr_kernels.backends.cpu import cpu_threads
from eqr_kernels.backends.packing import PackArguments
from eqr_kernels.backends.tables import hand_over
from eqr_kernels.forking import fork_safe_lock
from eqr_kernels.modules import EqROperator
from eqr_kernels.ops import Begun, Done, Stepped
from eqr_kernels.precision import Precision
from eqr_kernels.serving.errors import EngineClosed
from eqr_kernels.serving.runner import Events, Job, RunnerStats, StepUpdate
from eqr_kernels.trajectory import SETTLED


class _Guest(NamedTuple):
    """A request in the run, and what the run writes for it."""

    job: Job
    output: ops.FixedPointOutput


class CompiledRunner:
    """See `runner.Runner`; of requests by the "cpu" backend.

    As many threads as torch has when it is made compute, and one more hands over what they did.

    Args:
        max_in_flight, policy, quantum: as of `Engine`.
    """

    def __init__(self, events: Events, *, max_in_flight: int, policy: str, quantum: int) -> None:
        self._events = events
        self._workers = cpu_threads()
        most = torch.iinfo(torch.int64).max
        limits = dict(quantum=min(quantum, most), in_flight=min(max_in_flight, most))
        self._run = ops.OpenRun(threads=self._workers, policy=policy, **limits)
        self._guests: dict[int, _Guest] = {}
        self._packed: WeakKeyDictionary[EqROperator, dict[tuple[str, Precision], ops.PackedWeights]] = (
            WeakKeyDictionary()
        )
        self._packing = fork_safe_lock()
        self._open = fork_safe_lock()  # held where a job is put, so that none comes behind the end
        self._closing = False
        self._thread = threading.Thread(target=self._hand_over, name="eqr-engine", daemon=True)
        self._thread.start()

    def start(self, job: Job) -> None:
        p = job.problem
        packed = self._pack(job.solve.model, p.precision)
        control = torch.zeros(3, dtype=torch.int64, device="cpu")
        tokens, ids = p.tokens.contiguous(), p.ids.contiguous()
        # The output is for callers in any mode.
        with torch.inference_mode(False), self._open:
            if self._closing:
                raise EngineClosed("the engine was closed while the request was prepared")
            output = self._run.join(
                packed,
                tokens,
                ids,
                control,
                p,
                number=job.number,
                start=p.start,
                keep_states=p.keep_states,
                turns=p.turns,
                steps=job.wants_steps,
            )
            self._guests[job.number] = _Guest(job, output)

    def _pack(self, model: EqROperator, precision: Precision) -> ops.PackedWeights:
        """The engine's copy of a model, which never changes, as the kernel takes it."""
        with self._packing:
            packs, key = self._packed.setdefault(model, {}), (ops.cpu_isa(), precision)
            if key not in packs:
                with torch.inference_mode(False), torch.no_grad():
                    packs[key] = PackArguments.of(model).pack(precision)
            return packs[key]

    def cancel(self, number: int) -> None:
        self._run.cancel(number)

    def stats(self) -> RunnerStats:
        return RunnerStats(*self._run.counts(), self._workers)

    def close(self, timeout: float | None = None) -> None:
        if timeout != 0:
            with self._open:
                self._closing = True
        self._run.close()
        if timeout != 0 and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _hand_over(self) -> None:
        while events := self._run.take():
            for event in events:
                match event:
                    case Begun(number):
                        self._events.begun(number)
                    case Stepped():
                        self._events.step(event.number, _update(event))
                    case Done():
                        self._done(event)

    def _done(self, done: Done) -> None:
        with self._open:  # it may have ended before `start` had noted it
            guest = self._guests.pop(done.number, None)
        if guest is None:  # whoever submitted it was interrupted before he had it
            return
        error: BaseException | None = None
        try:
            if done.outcome == "complete":
                hand_over(guest.output, guest.job.problem, guest.job.solve.collector)
            elif done.outcome == "cancelled":
                error = CancelledError()
            else:
                error = RuntimeError(f"the kernel could not go on with this request: {done.error}")
        except BaseException as raised:  # of the request alone
            error = raised
        self._events.done(done.number, error)


def _update(event: Stepped) -> StepUpdate:
    preds = torch.tensor(event.preds, dtype=torch.int64, device="cpu")
    fired = event.status in SETTLED
    return StepUpdate(event.restart, event.steps, preds, event.residual, event.q_halt, event.puzzle, fired)
