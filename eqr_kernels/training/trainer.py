"""Segmented online training of an Equilibrium Reasoner (EqR, arXiv 2605.21488).

Every training step is one outer step from the detached state of the step before. A row that halts, or has had
`halt_max_steps`, is replaced by a fresh puzzle with a fresh random start, so one batch holds rows of every age.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eqr_kernels import noise, reference
from eqr_kernels.backends.cpu import latent_recursions, why_not_cpu
from eqr_kernels.checkpoint.state_dict import some
from eqr_kernels.config import EqRConfig
from eqr_kernels.forking import check_threads
from eqr_kernels.modifications import called, modification
from eqr_kernels.modules import LatentState
from eqr_kernels.precision import Precision
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.tasks.prefetch import Prefetcher
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.cycles import config_at, parse_cycles, stretches
from eqr_kernels.training.fused import FusedAdamATan2, FusedStep, StepResult, why_not_fused
from eqr_kernels.training.learning_rate import learning_rate
from eqr_kernels.training.objective import objective
from eqr_kernels.training.optim import EMA, AdamATan2, Optimizers, average_gradients
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.throughput import training_operations


@dataclass
class Rows:
    """The n rows in flight: their puzzles, latent states and ages."""

    tokens: Tensor  # int64 [n, S]
    labels: Tensor  # int64 [n, S], 0 is padding
    z_H: Tensor  # [n, S, d] in the dtype of the states: float32 where rows have ids, else the forward dtype
    z_L: Tensor  # [n, S, d] in the same
    ids: Tensor  # int64 [n], key the noise of an outer step that is fused or runs through the model's modules
    steps: Tensor  # int64 [n], outer steps since the row was replaced
    halted: Tensor  # bool [n], to be replaced before the next step


@dataclass
class Progress:
    """Means over the training steps since the last report."""

    step: int
    loss: float
    exact: float  # share of the rows that left, exactly right when they left
    steps: float  # outer steps that a row had when it left
    residual: float
    samples_per_second: float
    lr: float


@dataclass
class _Sums:
    """Sums since the last report, kept on the device so that a step never waits for the host."""

    values: Tensor  # float64 [5]: loss, rows that left, exact rows that left, their steps, residual
    count: int = 0
    since: float = field(default_factory=time.perf_counter)


def _same(u: Tensor) -> Tensor:
    return u


@functools.cache
def _compiled_moved(config: EqRConfig, rows: int) -> Callable[..., Tensor]:
    """`reference.moved` compiled for one size and number of rows."""
    function = reference.moved
    # Of a code object of its own: torch.compile counts the compilations of a code object, and gives up at eight.
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=False)


class Trainer:
    """Trains a model in place, one outer step a call.

    Args:
        model: with float32 parameters, on the device to train on; with `TrainSettings.cycles` its config changes as the
            run goes on.
        stream: yields fresh puzzles.
        settings: how to train.

    Raises:
        TypeError: the model's parameters are not float32.
    """

    def __init__(self, model: EquilibriumReasoner, stream: PuzzleStream, settings: TrainSettings) -> None:
        if model.dtype != torch.float32:
            raise TypeError(
                f"model must have float32 parameters, got {model.dtype}; call model.float() and set forward_dtype"
            )
        self.model, self.stream, self.settings = model.train(), stream, settings
        self.step = 0
        self._cycles, self._base = parse_cycles(settings.cycles), model.config
        model.config = self._given = config_at(self._cycles, self._base, 0)
        self.ema = EMA(model, settings.ema_rate)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.generator = torch.Generator(model.device).manual_seed(settings.seed * 1_000_003 + self.rank)
        self.forward_dtype = getattr(torch, settings.forward_dtype)
        self._prepare()
        kind = AdamATan2 if self.fused_step is None else FusedAdamATan2
        self._trained = dict(model.named_parameters())
        self.optimizer = Optimizers(
            self._trained,
            settings.optimizer,
            lambda params: kind(params, settings.lr, (settings.beta1, settings.beta2), settings.weight_decay),
            lr=settings.lr,
            muon_lr=settings.lr if settings.muon_lr is None else settings.muon_lr,
            weight_decay=settings.weight_decay,
            in_blocks=lambda name: name.startswith("L_level."),
        )
        self.prefetcher: Prefetcher | None = None
        if settings.prefetch or (settings.prefetch is None and model.device.type == "cuda"):
            self.prefetcher = Prefetcher(
                stream, settings.batch_size, seed=settings.seed, rank=self.rank, device=model.device
            )
        self.rows = self._empty_rows()
        self._sums = self._fresh_sums()

    def _prepare(self) -> None:
        """Takes the kernel and compiles what the model, with its present cycles and modules, asks for."""
        self.fused_step: FusedStep | None = None
        self.fused_recursions = False
        self.modified = modification(self.model, training=True)
        self.kernel = self._choose_kernel()
        compiled = self.settings.compile and self.modified is None
        # A GPU has work for longer than a launch takes, so only what memory traffic can be saved in is compiled there:
        # one application, once for all cycles, in seconds where the whole step takes minutes.
        whole = compiled and self.model.device.type == "cpu"
        self._loss: Callable[..., Any] = (
            torch.compile(self._loss_of_step, dynamic=False) if whole else self._loss_of_step
        )
        self._moved: Callable[..., Tensor] = reference.moved
        if compiled and not whole:
            sizes = replace(self.model.config, H_cycles=1, L_cycles=1, halt_max_steps=1)  # which change along a run
            self._moved = _compiled_moved(sizes, self.settings.batch_size)

    def _take_changes(self) -> None:
        """Gives the model the config of the step to come, and takes in what the user made of its modules.

        Raises:
            RuntimeError: the model has other parameters than those that the optimizer and the averages follow.
            ValueError: its config was set by somebody else, although cycles say what it is at each step.
        """
        if self.model.config is not self._given:
            if self._cycles:
                raise ValueError(
                    "model.config was set while training, and cycles say what it is at each step; leave one out"
                )
            self._base = self._given = self.model.config
            self._prepare()
        present = dict(self.model.named_parameters())
        others = [n for n in {**self._trained, **present} if present.get(n) is not self._trained.get(n)]
        if others:
            raise RuntimeError(
                f"the model's parameters are not those that this trainer was made with: {some(others)} came, went or "
                "was replaced; make a new Trainer after such a change"
            )
        config = config_at(self._cycles, self._base, self.step)
        modified = modification(self.model, training=True)
        if config == self.model.config and modified == self.modified:
            return
        if config != self.model.config:
            self.model.config = config
        self._given = self.model.config
        keyed = self._keyed
        self._prepare()
        if self._keyed != keyed:
            # Rows without ids, or with states of the other dtype, cannot go on.
            self.rows = self._empty_rows()

    @property
    def trained_config(self) -> EqRConfig:
        """The config of the last step; `model.config` may be that of the step to come."""
        return config_at(self._cycles, self._base, max(0, self.step - 1))

    @property
    def longest_lifetime(self) -> int:
        """The greatest number of outer steps that a row has at any time of the run."""
        return max([point.halt_max_steps for point in self._cycles] or [self._base.halt_max_steps])

    @property
    def operations(self) -> int:
        """Operations of the run's training steps so far, of all processes; see `training_operations`."""
        rows = self.settings.batch_size * self.world
        return sum(rows * n * training_operations(c) for c, n in stretches(self._cycles, self._base, self.step))

    def _choose_kernel(self) -> str:
        """Takes a fused kernel where there is one; a text that says which, or why none."""
        model, settings = self.model, self.settings
        if self.modified:
            return f"the model through its modules in PyTorch, not compiled, since {self.modified}"
        if not settings.fused:
            return "PyTorch, as fused is off"
        if self.forward_dtype == torch.bfloat16:
            reason = why_not_fused(model)
            if reason is None:
                self.fused_step = FusedStep(model, settings.workers or torch.get_num_threads(), self._noise_seed)
                return "fused CPU kernel, forward and backward"
        elif model.config.H_cycles == 1:
            return "PyTorch: every latent recursion carries a gradient"
        else:
            reason = why_not_cpu(model, Precision.fp32)
            if reason is None:
                self.fused_recursions = True
                return "fused CPU kernel for the latent recursions without gradient, else PyTorch"
        return f"PyTorch: {reason}"

    @property
    def _noise_seed(self) -> int:
        """Of noise that is keyed by ids; each process needs noise of its own."""
        return (self.settings.seed * 1_000_003 + self.rank) % 2**32

    @property
    def _keyed(self) -> bool:
        """Rows have float32 states, and ids that key their noise."""
        return self.fused_step is not None or self.modified is not None

    def _empty_rows(self) -> Rows:
        n, c, device = self.settings.batch_size, self.model.config, self.model.device
        dtype = torch.float32 if self._keyed else self.forward_dtype
        z = torch.zeros(n, c.seq_len, c.hidden_size, dtype=dtype, device=device)
        tokens = torch.zeros(n, c.seq_len, dtype=torch.int64, device=device)
        ids = torch.zeros(n, dtype=torch.int64, device=device)
        halted = torch.ones(n, dtype=torch.bool, device=device)
        return Rows(tokens, tokens.clone(), z, z.clone(), ids, ids.clone(), halted)

    def _fresh_sums(self) -> _Sums:
        return _Sums(torch.zeros(5, dtype=torch.float64, device=self.model.device))

    def _replace_halted(self) -> None:
        """Gives every halted row a fresh puzzle and a fresh start."""
        rows = self.rows
        if self.prefetcher is not None:
            for name, fresh in self._fresh_rows(*self.prefetcher.take(self.step)).items():
                old = getattr(rows, name)
                halted = rows.halted.view(-1, *[1] * (old.ndim - 1))
                setattr(rows, name, torch.where(halted, fresh, old))
            return
        index = rows.halted.nonzero()[:, 0]
        if len(index):
            drawn = self.stream.draw(len(index), self.step)
            for name, fresh in self._fresh_rows(*(torch.from_numpy(x).to(rows.tokens) for x in drawn)).items():
                getattr(rows, name)[index] = fresh

    def _fresh_rows(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Fields of `Rows` for fresh puzzles, int64 [n, S] each: with a fresh start, [d] where the start is fixed."""
        rows, c = self.rows, self.model.config
        fresh = {"tokens": tokens, "labels": labels, "steps": torch.zeros_like(tokens[:, 0])}
        for name, init, std in (("z_H", self.model.H_init, c.H_init_std), ("z_L", self.model.L_init, c.L_init_std)):
            z = getattr(rows, name)
            if init is not None:
                fresh[name] = init.to(z.dtype)
            else:
                shape = (*tokens.shape, c.hidden_size)
                uniform = torch.rand(shape, generator=self.generator, device=z.device, dtype=torch.float32).clamp_(
                    2.0**-24, 1 - 2.0**-24
                )
                fresh[name] = (noise.truncated_normal(uniform) * std).to(z.dtype)
        if self._keyed:
            fresh["ids"] = torch.randint(2**62, tokens.shape[:1], generator=self.generator, device=tokens.device)
        return fresh

    def _loss_of_step(
        self,
        z_H: Tensor,
        z_L: Tensor,
        tokens: Tensor,
        labels: Tensor,
        eps: Tensor | None,
        recurred: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss, next z_H and z_L, q_halt [n], exact [n], residual [n].

        eps [updates, n, S, d] or None; recurred: z_H and z_L as only the last latent recursion is left, or None.
        """
        model, config = self.model, self.model.config
        if self.modified is not None:
            new_H, new_L, logits, q_halt = self._through_modules(z_H, z_L, tokens)
        else:
            weights = model.weights().to(self.forward_dtype)

            rope, e = model.rope(), reference.embed(tokens, weights)

            def update(z: Tensor, u: Tensor, number: int) -> Tensor:
                return self._moved(z, u, None if eps is None else eps[number], weights.blocks, rope, config)

            # The module is applied in `update`.
            if recurred is None:
                new_H, new_L = reference.outer_step(z_H, z_L, e, _same, config, update)
            else:
                new_H, new_L = reference.last_recursion(*recurred, e, _same, config, update)
            logits, q_halt = reference.heads(new_H, weights)
        loss, exact = objective(logits, q_halt, labels)
        new_H, new_L = new_H.detach(), new_L.detach()
        changes = new_H.float() - z_H.float(), new_L.float() - z_L.float()
        squares = [x.float().square().sum((1, 2)) for x in (*changes, new_H, new_L)]
        residual = torch.sqrt((squares[0] + squares[1]) / (squares[2] + squares[3]))
        return loss, new_H, new_L, q_halt.detach(), exact, residual

    def _through_modules(self, z_H: Tensor, z_L: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The model called as it is, on all rows: the next z_H and z_L [n, S, d], logits [n, S, V], q_halt [n]."""
        rows, dtype = self.rows, self.forward_dtype
        seed, restart = torch.full_like(rows.ids, self._noise_seed), torch.zeros_like(rows.ids)
        state = LatentState(z_H, z_L, seed, rows.ids, restart, rows.steps)
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            state, logits, q_halt = called(self.model, tokens, state)
        return state.z_H, state.z_L, logits, q_halt

    def _outer_step(self) -> StepResult:
        """One outer step of every row; leaves the gradients of its loss with the parameters."""
        rows = self.rows
        if self.fused_step is not None:
            return self.fused_step(rows.tokens, rows.labels, rows.z_H, rows.z_L, rows.ids, rows.steps)
        eps = None
        if self.model.config.noise_scale and self.modified is None:
            shape = (self.model.config.updates_per_step, *rows.z_H.shape)
            eps = torch.randn(shape, generator=self.generator, device=rows.z_H.device, dtype=self.forward_dtype)
        recurred = None
        if self.fused_recursions:
            count = self.model.config.H_cycles - 1
            recurred = latent_recursions(self.model, rows.tokens, rows.z_H, rows.z_L, eps, count)
        result = StepResult(*self._loss(rows.z_H, rows.z_L, rows.tokens, rows.labels, eps, recurred))
        result.loss.backward()
        return result

    def train_step(self) -> None:
        """One training step: one outer step of every row, one update of the weights."""
        check_threads()
        self._take_changes()
        self._replace_halted()
        settings, rows = self.settings, self.rows
        loss, rows.z_H, rows.z_L, q_halt, exact, residual = self._outer_step()
        if self.world > 1:
            average_gradients(self.model.parameters(), self.world)
        self.optimizer.lr = learning_rate(
            self.step + 1,
            lr=settings.lr,
            warmup=settings.lr_warmup_steps,
            total=settings.total_steps,
            min_ratio=settings.lr_min_ratio,
            decay_from=settings.decay_from,
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        self.step += 1
        self._decide_halting(q_halt)
        left = rows.halted.double()
        self._sums.values += torch.stack(
            [loss.detach(), left.sum(), (left * exact).sum(), (left * rows.steps).sum(), residual.double().mean()]
        )
        self._sums.count += 1

    def _decide_halting(self, q_halt: Tensor) -> None:
        """A row leaves when q_halt > 0 or at `halt_max_steps`, but not below a minimum that some rows draw."""
        rows, c = self.rows, self.model.config
        rows.steps += 1
        drawing: Any = dict(size=q_halt.shape, generator=self.generator, device=q_halt.device)
        explores = torch.rand(**drawing, dtype=torch.float32) < c.halt_exploration_prob
        drawn = torch.randint(min(2, c.halt_max_steps), c.halt_max_steps + 1, **drawing)
        rows.halted = ((q_halt > 0) | (rows.steps >= c.halt_max_steps)) & (rows.steps >= explores * drawn)

    def close(self) -> None:
        """Ends the thread that draws puzzles ahead, if there is one; a later step starts another."""
        if self.prefetcher is not None:
            self.prefetcher.close()

    def leave_out(self, seconds: float) -> None:
        """Keeps so many of the seconds since the last report, spent on something else, out of the rate it tells."""
        self._sums.since += seconds

    def report(self) -> Progress:
        """Means since the last report; starts new ones. Waits for the device."""
        loss, left, exact, steps, residual = self._sums.values.tolist()
        count = max(1, self._sums.count)
        seconds = time.perf_counter() - self._sums.since
        rate = self._sums.count * self.settings.batch_size * self.world / seconds
        self._sums = self._fresh_sums()
        return Progress(
            self.step,
            loss / count,
            exact / max(1, left),
            steps / max(1, left),
            residual / count,
            rate,
            self.optimizer.lr,
        )

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments, "exp_avg.PARAMETER" and the like, float32; none before a step."""
        return self.optimizer.moments()

    @torch.no_grad()
    def begin_slice(self) -> None:
        """A slice boundary: all rows start afresh, and moments and averages are rounded to what `state_dict` holds.

        A run that goes on from here and one that is resumed from the state taken here are the same bit for bit. A
        second boundary at the same step changes nothing.
        """
        self.rows = self._empty_rows()
        for moment in self.moments().values():
            moment.copy_(moment.bfloat16())
        for name, p in self.model.named_parameters():
            average = self.ema.shadow[name]
            average.copy_(p + (average - p).bfloat16().float())

    def state_dict(self, shared: bool = True) -> dict[str, Tensor]:
        """What resuming at a slice boundary needs, as named tensors, 10 bytes a parameter; see `load_state_dict`.

        Args:
            shared: False leaves out what all processes of a run have in common (weights, averages, moments).

        Returns:
            model.* float32; ema_difference.*, the averaged weights less the weights, and optimizer.*, bfloat16;
            generator, uint8. Neither rows nor anything that `begin_slice` rounds away.
        """
        state = {"generator": self.generator.get_state()}
        if not shared:
            return state
        state |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            state[f"ema_difference.{name}"] = (self.ema.shadow[name] - p.detach()).bfloat16()
        return state | {f"optimizer.{name}": moment.bfloat16() for name, moment in self.moments().items()}

    def load_state_dict(self, state: dict[str, Tensor], step: int) -> None:
        """Continues from `state_dict()` of a trainer of the same config after `step` steps, with a new slice.

        Raises:
            RuntimeError: the state belongs to another model or kind of device, or lacks the optimizer's moments; the
                message names the entry.
        """
        expected = {name: (value.dtype, list(value.shape)) for name, value in self.state_dict().items()}
        if step:
            for name, p in self.optimizer.moment_names().items():
                expected[f"optimizer.{name}"] = (torch.bfloat16, list(p.shape))
        for name, entry in expected.items():
            given = (state[name].dtype, list(state[name].shape)) if name in state else None
            if given != entry:
                raise RuntimeError(
                    f"the training state does not fit: {name} should be {entry[0]} {entry[1]}, got "
                    f"{'nothing' if given is None else f'{given[0]} {given[1]}'}; "
                    "resume with the config and on the kind of device that the run began with"
                )
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        for name, p in self.model.named_parameters():
            self.ema.shadow[name].copy_(p.detach() + state[f"ema_difference.{name}"].to(p.device).float())
        if step:
            self.optimizer.load({n: state[f"optimizer.{n}"] for n in self.optimizer.moment_names()}, step)
        self.rows = self._empty_rows()
        self.generator.set_state(state["generator"].cpu())
        self.step = self.ema.updates = step
        self._take_changes()
