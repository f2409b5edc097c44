"""A training run: its loop, and what it leaves in its folder."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from eqr_kernels.checkpoint import ModelCard, save_checkpoint
from eqr_kernels.commit import code_commit
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies import digest
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.stream import PuzzleStream, parse_curriculum, parse_mix
from eqr_kernels.tasks.task import Reveals, try_task
from eqr_kernels.training.evaluation import CURVE, Curve, Evaluator, Stopwatch
from eqr_kernels.training.local_attention import look_at_neighbours
from eqr_kernels.training.logs import Log, Report
from eqr_kernels.training.optim import EMA
from eqr_kernels.training.plan import RunPlan
from eqr_kernels.training.processes import Process
from eqr_kernels.training.record import RunRecord, machine_record
from eqr_kernels.training.resume import check_machine, check_resumed
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.slices import Slices, slice_steps_for
from eqr_kernels.training.state import load_state, read_manifest, save_state
from eqr_kernels.training.throughput import gemm_rate, training_operations
from eqr_kernels.training.trainer import Trainer

_log = logging.getLogger(__name__)

_GO_ON, _STOP, _INTERRUPT = range(3)


def _missing_compiler(error: BaseException | None) -> str:
    """torch's complaint that there is no C++ compiler, when that is the error or its cause; "" otherwise."""
    while error is not None:
        # By name: torch._inductor is private, and is imported only by a compiled run.
        if type(error).__name__ == "InvalidCxxCompiler":
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


class TrainingRun:
    """One process's part of a run. Rank 0 keeps state and model in `plan.out`, the others their streams in `out/ranks`.

    What happens on the way that its user should know goes to the logger of this module: notes as INFO, and as WARNING
    what makes the result another one.

    Args:
        plan: what is trained, how and where, and the run that it continues (`load` then takes up its state).
        puzzles: to train on, all with answers.
        process: this one.
        data: name of the puzzles, for the card.

    Raises:
        ValueError: the run that it continues has other settings.
    """

    def __init__(self, plan: RunPlan, puzzles: PuzzleSet, process: Process, data: str) -> None:
        self.out, self.process, self.data = plan.out, process, f"{data}: {len(puzzles)} puzzles"
        settings, stored = plan.settings, plan.stored
        assert puzzles.labels is not None
        init = plan.initial.record if plan.initial is not None else None if stored is None else stored.init
        data_sha256 = digest(puzzles.inputs, puzzles.labels)
        try_task(plan.task, puzzles)
        self.record = RunRecord(
            settings,
            plan.config,
            data_sha256,
            process.world,
            init,
            task=plan.task.name,
            task_object=plan.task_object,
        )
        if stored is not None:
            check_resumed(stored, self.record, f"the run in {plan.out}", plan.step)
        stream = PuzzleStream(
            puzzles,
            plan.task.augment,
            reveal=plan.task.reveal if isinstance(plan.task, Reveals) else None,
            curriculum=parse_curriculum(settings.curriculum) if settings.curriculum else (),
            mix=parse_mix(settings.mix),
            seed=[settings.seed, process.rank],
        )
        # Drawn in float32, whatever torch's default dtype is.
        model = EquilibriumReasoner(plan.config).to(process.device, torch.float32)
        # The same weights in every process: gradients are averaged, weights are not.
        torch.manual_seed(settings.seed)
        model.reset_parameters()
        if settings.attention_init == "local":
            look_at_neighbours(model)
        if plan.initial is not None:
            model.load_state_dict(plan.initial.state_dict)
        # Measured before the trainer's clock starts, on rank 0 alone, which alone reports.
        dtype = getattr(torch, settings.forward_dtype)
        self.gemm_rate = gemm_rate(process.device, dtype) if process.rank == 0 else math.nan
        self.trainer = Trainer(model, stream, settings)
        self.record = dataclasses.replace(self.record, machine=machine_record(self.trainer.kernel))
        if stored is not None:
            check_machine(stored, self.record)
        self.stopwatch = Stopwatch()
        code_commit()  # that of what runs is kept from here on

    @property
    def settings(self) -> TrainSettings:
        """How it trains; what is chosen on the way (a slice's steps, where a decay lies) is set here."""
        return self.record.settings

    def _set(self, **changes: int) -> None:
        self.trainer.settings = dataclasses.replace(self.settings, **changes)  # type: ignore[arg-type]
        self.record = dataclasses.replace(self.record, settings=self.trainer.settings)

    def train(
        self,
        minutes: float | None,
        log_every: int,
        logs: Sequence[Log],
        *,
        finish: float | None = None,
        evaluator: Evaluator | None = None,
        evaluate_every: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains to the end or the time limit, saving at every slice's end, and tells whether it was interrupted.

        A stop between the ends of two slices saves too, and so adds a boundary.

        Args:
            minutes: stops at the last slice's end that comes within them, or when they are over.
            log_every: in steps.
            finish: minutes in which the rate falls from here to its end, in as many steps as they are measured to hold;
                the end is then that of the run.
            evaluator: measures the averaged weights every `evaluate_every` steps and at the end, for the logs and for
                OUT/curve.csv.
            stop: asked between two steps whether to save and stop here, interrupted.
        """
        trainer, process = self.trainer, self.process
        reported = trainer.step
        slices = Slices(self.settings.slice_steps, trainer.step, process.device, minutes)
        if slices.steps is not None:
            self._check_slice(slices.steps)
        curve = None
        if evaluator is not None and process.rank == 0:
            curve = Curve(self.out / CURVE, evaluator.depths, trainer.step)
        self.stopwatch = Stopwatch(self.record.seconds, self.record.cpu_seconds)
        while True:
            seconds = slices.measured(trainer.step)
            if seconds is not None:
                if slices.steps is None:
                    slices.steps = self._choose_slice(seconds)
                if finish is not None:
                    self._begin_decay(seconds, finish)
            order = _GO_ON
            if stop():
                order = _INTERRUPT
            elif self.over:
                order = _STOP
            elif process.rank == 0 and slices.out_of_time(trainer.step):
                order = _STOP
            agreed = process.agree(order)
            if trainer.step > reported and (agreed >= _STOP or trainer.step % log_every == 0):
                self._report(logs)
                reported = trainer.step
            if agreed >= _STOP or slices.ends(trainer.step):
                begun = time.monotonic()
                self.save()
                slices.saved(trainer.step, time.monotonic() - begun)
            due = agreed == _STOP or (evaluate_every is not None and trainer.step % evaluate_every == 0)
            if evaluator is not None and due and trainer.step:
                begun = time.monotonic()
                if curve is not None and not curve.has(trainer.step):
                    self._evaluate(evaluator, curve, logs)
                # The others must not run into the time limit of a collective of training.
                process.wait()
                slices.leave_out(time.monotonic() - begun)
            if agreed >= _STOP:
                return agreed == _INTERRUPT
            self._train_step()

    def _begin_decay(self, seconds_per_step: float, minutes: float) -> None:
        """Lets the rate fall from here on, over the steps that the minutes hold, and the run end there."""
        steps = self.process.agree(max(1, round(60 * minutes / seconds_per_step)) if self.process.rank == 0 else 0)
        begin = self.trainer.step
        self._set(decay_from=begin, total_steps=begin + steps)

    def _evaluate(self, evaluator: Evaluator, curve: Curve, logs: Sequence[Log]) -> None:
        trainer, begun = self.trainer, time.monotonic()
        with self.stopwatch.paused():
            model = copy.deepcopy(trainer.model).requires_grad_(False).eval()
            model.load_state_dict({**model.state_dict(), **trainer.ema.shadow})
            measurements = evaluator(model)
        costs = {
            "step": trainer.step,
            "samples": trainer.step * self.settings.batch_size * self.process.world,
            "operations": trainer.operations,
            **self.stopwatch.read(),
            "lr": trainer.optimizer.lr,
        }
        curve.add(costs, measurements)
        for log in logs:
            log.evaluated(trainer.step, measurements)
        trainer.leave_out(time.monotonic() - begun)

    @property
    def over(self) -> bool:
        """Whether all steps are done."""
        total = self.settings.total_steps
        return total is not None and self.trainer.step >= total

    def introduction(self, puzzles: int) -> str:
        """What is trained, and where."""
        trainer, process = self.trainer, self.process
        config, parameters = trainer.model.config, sum(p.numel() for p in trainer.model.parameters())
        kind = "a TRM" if config.fixed_init else "an EqR"
        return (
            f"{kind} of {config.hidden_size} features, {parameters:,} parameters, {puzzles:,} puzzles, "
            f"{process.world} process(es) on {process.device.type} ({torch.get_num_threads()} threads); "
            f"from step {trainer.step}\n"
            f"outer steps: {trainer.kernel}\n"
            f"GEMM: {self.gemm_rate / 1e12:.2f} TFLOP/s in {self.settings.forward_dtype} (torch.matmul)"
        )

    def closing_notes(self, interrupted: bool) -> list[str]:
        """What whoever started the run should know of how it ended."""
        step, total, rate = self.trainer.step, self.settings.total_steps, self.settings.ema_rate
        between = "" if self.at_boundary else " (not bit for bit as if it had gone on, since no slice ended there)"
        if interrupted:
            return [f"interrupted at step {step}; the state is saved, and --resume continues it{between}"]
        notes = []
        if between and step != total:
            notes.append(f"time was over at step {step}; the state is saved, and --resume continues it{between}")
        reached = EMA.warm_up(rate)
        if step < reached:
            notes.append(
                f"{step} steps are too few for --ema-rate {rate:g}, which the averages reach at step {reached}; "
                f"they span the last {(step + 10) // 9} steps or so"
            )
        return notes

    def _choose_slice(self, seconds_per_step: float) -> int:
        """Rank 0's choice of the steps of a slice, kept in the settings."""
        lifetime = self.trainer.longest_lifetime
        steps = self.process.agree(slice_steps_for(seconds_per_step, lifetime) if self.process.rank == 0 else 0)
        self._set(slice_steps=steps)
        seconds = steps * seconds_per_step
        if self.process.rank == 0 and seconds > 60:
            _log.warning(
                "a slice of %d steps, %d lifetimes of a row, takes %.0f s, and a run that is killed loses up to that; "
                "--slice-steps sets another",
                steps,
                steps // lifetime,
                seconds,
            )
        return steps

    def _check_slice(self, steps: int) -> None:
        lifetime = self.trainer.longest_lifetime
        if self.process.rank == 0 and steps < 2 * lifetime:
            _log.info(
                "a slice of %d steps holds less than two lifetimes of a row (%d steps): late steps are seldom trained; "
                "begin a run with a greater --slice-steps",
                steps,
                lifetime,
            )

    @property
    def at_boundary(self) -> bool:
        """Whether the present step ends a slice of an uninterrupted run, so that a resumed one equals it."""
        steps = self.settings.slice_steps
        return steps is not None and self.trainer.step % steps == 0

    def _train_step(self) -> None:
        try:
            self.trainer.train_step()
        except RuntimeError as error:
            missing = _missing_compiler(error)
            if not missing:
                raise
            raise RuntimeError(
                f"compiling the training step needs a C++ compiler, and torch found none ({missing}); "
                "install one (g++ or clang++) or name it in CXX, or train without: --no-compile"
            ) from error

    def _report(self, logs: Sequence[Log]) -> None:
        progress = self.trainer.report()
        self._require([] if math.isfinite(progress.loss) else [f"the loss is {progress.loss}", *self._not_finite()])
        if self.process.rank == 0:
            rate = progress.samples_per_second * training_operations(self.trainer.model.config)
            share = rate / (self.process.world * self.gemm_rate)
            report = Report(**dataclasses.asdict(progress), operations_per_second=rate, share_of_gemm=share)
            for log in logs:
                log(report)

    def _not_finite(self) -> list[str]:
        """What among the weights, their averages and the optimizer's moments holds NaN or infinity."""
        model = [(f"model.{name}", p) for name, p in self.trainer.model.named_parameters()]
        ema = [(f"ema.{name}", average) for name, average in self.trainer.ema.shadow.items()]
        moments = [(f"optimizer.{name}", moment) for name, moment in self.trainer.moments().items()]
        return [f"{name} is not finite" for name, value in model + ema + moments if not value.isfinite().all()]

    def _require(self, wrong: list[str]) -> None:
        """Stops all processes when something is wrong in one of them.

        Raises:
            RuntimeError: what is wrong, and what to continue from.
        """
        if not self.process.agree(len(wrong)):
            return
        reasons = ", ".join(wrong[:4]) or "another process tells what is not finite"
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        try:
            kept = f"the state of step {read_manifest(self.out)['step']} in {self.out} is kept"
        except FileNotFoundError:
            kept = f"no state has been saved in {self.out} yet"
        raise RuntimeError(
            f"training has diverged at step {self.trainer.step}: {reasons}{more}; {kept}, and nothing was written. "
            f"Train with a lower --lr than {self.settings.lr:g}, into another --out "
            "(--resume keeps to the run's own settings)"
        )

    def _folder_of(self, step: int) -> Path:
        return self.out / "ranks" / f"step-{step:09d}" / f"rank-{self.process.rank}"

    def save(self) -> None:
        """Writes the state of every process, then the model, and begins a slice: all rows start afresh.

        Rank 0's state counts: the others' of the step before stay until it is in its place.

        Raises:
            RuntimeError: weights or moments are not finite; the state of the last save stays.
        """
        self._require(self._not_finite())
        spent = self.stopwatch.read()
        self.record = dataclasses.replace(self.record, seconds=spent["seconds"], cpu_seconds=spent["cpu_seconds"])
        step, rank = self.trainer.step, self.process.rank
        if rank:
            save_state(self.trainer, self._folder_of(step), self.record.to_json(), shared=False)
        self.process.wait()
        if rank == 0:
            save_state(self.trainer, self.out, self.record.to_json())
            self._save_model()
            for old in (self.out / "ranks").glob("step-*"):
                if old != self._folder_of(step).parent:
                    shutil.rmtree(old)
        self.process.wait()

    def load(self) -> None:
        """Continues the newest state.

        Raises:
            FileNotFoundError, RuntimeError: there is none, or it is damaged or does not fit.
        """
        manifest = read_manifest(self.out)
        stored = RunRecord.from_json(manifest["settings"])
        self.record = dataclasses.replace(self.record, seconds=stored.seconds, cpu_seconds=stored.cpu_seconds)
        if self.process.rank == 0:
            load_state(self.trainer, self.out)
        else:
            load_state(self.trainer, self.out, own=self._folder_of(manifest["step"]))

    def _save_model(self) -> None:
        trainer, config = self.trainer, self.trainer.trained_config
        weights = {**trainer.model.state_dict(), **trainer.ema.shadow}
        of_the_card = ("config", "task", "task_object")
        record = {name: value for name, value in self.record.to_json().items() if name not in of_the_card}
        card = ModelCard(
            config,
            data=self.data,
            task=self.record.task,
            task_object=self.record.task_object,
            steps=trainer.step,
            commit=code_commit(),
            extra={"training": record},
            notes=f"Averaged weights of `eqr train` after {trainer.step} steps.",
        )
        save_checkpoint(self.out, weights, config, card)
