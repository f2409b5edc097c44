"""A training run: its processes, its loop, and what it leaves in its folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from eqr_kernels.checkpoint import ModelCard, save_checkpoint
from eqr_kernels.cli.console import complain
from eqr_kernels.cli.puzzles import SUDOKU, Task
from eqr_kernels.commit import code_commit
from eqr_kernels.config import EqRConfig
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.stream import PuzzleStream, parse_curriculum, parse_mix
from eqr_kernels.training.evaluation import Curve, Evaluator, Stopwatch
from eqr_kernels.training.logs import Log, Report
from eqr_kernels.training.optim import EMA
from eqr_kernels.training.rate import gemm_rate, training_operations
from eqr_kernels.training.settings import decay_begins
from eqr_kernels.training.slices import Slices, slice_steps_for
from eqr_kernels.training.state import copy_state, has_state, load_state, read_manifest, save_state
from eqr_kernels.training.trainer import TrainConfig, Trainer

_GO_ON, _STOP, _INTERRUPT = range(3)


# processes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; control agrees on what to do next without waiting for a GPU."""

    rank: int
    world: int
    device: torch.device
    control: Any = None

    def agree(self, wish: int) -> int:
        """The greatest of all processes' wishes."""
        if self.world == 1:
            return wish
        shared = torch.tensor([wish])
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return int(shared)

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0)


@contextlib.contextmanager
def processes(device: str) -> Iterator[Process]:
    """Joins the process group when torchrun (RANK, WORLD_SIZE in the environment) started this process.

    Args:
        device: "auto" takes CUDA where there is some; under torchrun each process takes its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, torch.device(device))
        return
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        # Others wait while one process evaluates or reads, however long that takes.
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        yield Process(dist.get_rank(), dist.get_world_size(), chosen, control)
    finally:
        dist.destroy_process_group()


def copy_to_anneal(out: Path, process: Process) -> Path:
    """Copies the newest state of the run in `out` to `out/annealed-STEP`, where there is none yet; that folder.

    The run in `out` is only read, and may be going on.

    Raises:
        FileNotFoundError: there is no run in `out`.
        ValueError: its rate has not come up yet, or has begun to fall, or the copy has been annealed already.
    """
    step = process.agree(_copy_newest(out) if process.rank == 0 else 0)
    target = out / f"annealed-{step:09d}"
    if decay_begins(read_manifest(target)["settings"]) < math.inf:
        raise ValueError(
            f"--finish: {target} has been begun; continue it with --out {target} --resume, or move it away"
        )
    return target


def _copy_newest(out: Path) -> int:
    """Makes the copy; its step."""
    read_manifest(out)
    copy = Path(tempfile.mkdtemp(prefix="annealing-", dir=out))
    try:
        copy_state(out, copy)
        manifest = read_manifest(copy)
        step, settings = int(manifest["step"]), manifest["settings"]
        warmup, begins = settings["lr_warmup_steps"], decay_begins(settings)
        if step < warmup:
            raise ValueError(f"--finish: the run in {out} is at step {step} of its warm-up of {warmup}; train on first")
        if begins < math.inf:
            raise ValueError(
                f"--finish: the run in {out} lets its rate fall from step {begins:.0f} on; continue it with --resume"
            )
        streams, target = out / "ranks" / f"step-{step:09d}", out / f"annealed-{step:09d}"
        if streams.is_dir():
            shutil.copytree(streams, copy / "ranks" / streams.name)
        if not has_state(target):
            shutil.rmtree(target, ignore_errors=True)
            copy.rename(target)
        return step
    finally:
        shutil.rmtree(copy, ignore_errors=True)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a wish to stop between two steps; a later second one stops at once, unsaved."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere the caller's own stay.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            # print may be what was interrupted, and must not be entered twice.
            os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
        elif time.monotonic() - self.asked_at > 1:  # torchrun passes on the Ctrl-C that the terminal has sent already
            raise KeyboardInterrupt("stopped at once; the state is that of the last save")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# the run -------------------------------------------------------------------------------------------------------------


def _missing_compiler(error: BaseException | None) -> str:
    """torch's complaint that there is no C++ compiler, when that is the error or its cause; "" otherwise."""
    while error is not None:
        # By name: torch._inductor is private, and is imported only by a compiled run.
        if type(error).__name__ == "InvalidCxxCompiler":
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


class TrainingRun:
    """One process's part of a run. Rank 0 keeps state and model in `out`, the others their streams in `out/ranks`.

    Args:
        settings: the fields of `TrainConfig`, curriculum, mix, slice_steps (steps between saves; None or absent: chosen
            from the speed of the first steps, and then set here), and what else the state should remember.
        data: name of the data, for the card.
        initial: weights that fit `config`, for the model and the averages to start from; None draws them by the seed.
    """

    def __init__(
        self,
        task: Task,
        puzzles: PuzzleSet,
        config: EqRConfig,
        settings: dict[str, Any],
        out: Path,
        process: Process,
        data: str,
        initial: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.settings, self.out, self.process, self.data = settings, out, process, f"{data}: {len(puzzles)} puzzles"
        curriculum = parse_curriculum(settings["curriculum"]) if settings["curriculum"] else ()
        reveal = sudoku.reveal if task is SUDOKU else None
        seed = settings["seed"]
        stream = PuzzleStream(
            puzzles,
            task.module.augment,
            reveal=reveal,
            curriculum=curriculum,
            mix=parse_mix(settings.get("mix", "")),
            seed=[seed, process.rank],
        )
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        train_config = TrainConfig(**{name: value for name, value in settings.items() if name in fields})
        # The same weights in every process: gradients are averaged, weights are not.
        torch.manual_seed(seed)
        model = EquilibriumReasoner(config).to(process.device)
        if initial is not None:
            model.load_state_dict(initial)
        # Measured before the trainer's clock starts, on rank 0 alone, which alone reports.
        dtype = getattr(torch, train_config.forward_dtype)
        self.gemm_rate = gemm_rate(process.device, dtype) if process.rank == 0 else math.nan
        self.trainer = Trainer(model, stream, train_config)
        self.stopwatch = Stopwatch()

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of training up to the last save, as `Stopwatch` takes them."""
        return {name: self.settings.get(name, 0.0) for name in ("seconds", "cpu_seconds")}

    def train(
        self,
        minutes: float | None,
        log_every: int,
        logs: Sequence[Log],
        *,
        finish: float | None = None,
        evaluator: Evaluator | None = None,
        evaluate_every: int | None = None,
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
        """
        trainer, process = self.trainer, self.process
        reported = trainer.step
        slices = Slices(self.settings.get("slice_steps"), trainer.step, process.device, minutes)
        if slices.steps is not None:
            self._check_slice(slices.steps)
        curve = None
        if evaluator is not None and process.rank == 0:
            curve = Curve(self.out / "curve.csv", evaluator.depths, trainer.step)
        self.stopwatch = Stopwatch(**self.spent)
        with StopRequest() as request:
            while True:
                seconds = slices.measured(trainer.step)
                if seconds is not None:
                    if slices.steps is None:
                        slices.steps = self._choose_slice(seconds)
                    if finish is not None:
                        self._begin_decay(seconds, finish)
                wish = _GO_ON
                if request.asked_at is not None:
                    wish = _INTERRUPT
                elif self.over:
                    wish = _STOP
                elif process.rank == 0 and slices.out_of_time(trainer.step):
                    wish = _STOP
                agreed = process.agree(wish)
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
        self.settings |= {"decay_from": begin, "total_steps": begin + steps}
        self.trainer.config = dataclasses.replace(self.trainer.config, decay_from=begin, total_steps=begin + steps)

    def _evaluate(self, evaluator: Evaluator, curve: Curve, logs: Sequence[Log]) -> None:
        trainer, begun = self.trainer, time.monotonic()
        with self.stopwatch.paused():
            model = copy.deepcopy(trainer.model).requires_grad_(False).eval()
            model.load_state_dict({**model.state_dict(), **trainer.ema.shadow})
            measurements = evaluator(model)
        costs = {
            "step": trainer.step,
            "samples": trainer.step * trainer.config.batch_size * self.process.world,
            "operations": trainer.operations,
            **self.stopwatch.read(),
            "lr": trainer.optimizer.param_groups[0]["lr"],
        }
        curve.add(costs, measurements)
        for log in logs:
            log.evaluated(trainer.step, measurements)
        trainer.leave_out(time.monotonic() - begun)

    @property
    def over(self) -> bool:
        """Whether all steps are done."""
        total = self.trainer.config.total_steps
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
            f"GEMM: {self.gemm_rate / 1e12:.2f} TFLOP/s in {trainer.config.forward_dtype} (torch.matmul)"
        )

    def closing_notes(self, interrupted: bool) -> list[str]:
        """What whoever started the run should know of how it ended."""
        step, total, rate = self.trainer.step, self.trainer.config.total_steps, self.trainer.config.ema_rate
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
        self.settings["slice_steps"] = steps
        seconds = steps * seconds_per_step
        if self.process.rank == 0 and seconds > 60:
            told = f"a slice of {steps} steps, {steps // lifetime} lifetimes of a row, takes {seconds:.0f} s"
            complain(f"{told}, and a run that is killed loses up to that; --slice-steps sets another", "warning")
        return steps

    def _check_slice(self, steps: int) -> None:
        lifetime = self.trainer.longest_lifetime
        if self.process.rank == 0 and steps < 2 * lifetime:
            complain(
                f"a slice of {steps} steps holds less than two lifetimes of a row ({lifetime} steps): late steps are "
                "seldom trained; begin a run with a greater --slice-steps",
                "note",
            )

    @property
    def at_boundary(self) -> bool:
        """Whether the present step ends a slice of an uninterrupted run, so that a resumed one equals it."""
        steps = self.settings.get("slice_steps")
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
        told = ", ".join(wrong[:4]) or "another process tells what is not finite"
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        try:
            kept = f"the state of step {read_manifest(self.out)['step']} in {self.out} is kept"
        except FileNotFoundError:
            kept = f"no state has been saved in {self.out} yet"
        raise RuntimeError(
            f"training has diverged at step {self.trainer.step}: {told}{more}; {kept}, and nothing was written. "
            f"Train with a lower --lr than {self.settings.get('lr', self.trainer.config.lr):g}, into another --out "
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
        self.settings |= self.stopwatch.read()
        step, rank = self.trainer.step, self.process.rank
        if rank:
            save_state(self.trainer, self._folder_of(step), self.settings, shared=False)
        self.process.wait()
        if rank == 0:
            save_state(self.trainer, self.out, self.settings)
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
        self.settings |= {name: manifest["settings"].get(name, 0.0) for name in self.spent}
        if self.process.rank == 0:
            load_state(self.trainer, self.out)
        else:
            load_state(self.trainer, self.out, own=self._folder_of(manifest["step"]))

    def _save_model(self) -> None:
        trainer, config = self.trainer, self.trainer.trained_config
        weights = {**trainer.model.state_dict(), **trainer.ema.shadow}
        settings = {name: value for name, value in self.settings.items() if name != "config"}
        card = ModelCard(
            config,
            data=self.data,
            steps=trainer.step,
            commit=code_commit(),
            extra={"training": settings},
            notes=f"Averaged weights of `eqr train` after {trainer.step} steps.",
        )
        save_checkpoint(self.out, weights, config, card)
