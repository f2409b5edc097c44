"""Training steps in a process of their own: one contender, which checks its gradients before it times anything.

python -m benchmarks.peers.trainer fused --preset sudoku-paper --batch 16 --threads 2 --json

With --serve it answers requests, one JSON line each, so that several processes can take turns (see process.py).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import EqRConfig, EquilibriumReasoner, noise, reference
from eqr_kernels.tasks import sudoku, sudoku_generator
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer, objective

from .answering import own_output, serve
from .workload import ERROR_LIMIT, PRESETS, STEP_LIMIT, Unavailable, has_bf16, relative_error, with_config

CONTENDERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fused": ("bf16", dict(fused=True, compile=False), "fused CPU kernel, forward and backward"),
    "compile": ("bf16", dict(fused=False, compile=True), "PyTorch"),
    "eager": ("bf16", dict(fused=False, compile=False), "PyTorch"),
    "recursions": ("fp32", dict(fused=True, compile=True), "fused CPU kernel for the latent recursions"),
    "compile-fp32": ("fp32", dict(fused=False, compile=True), "PyTorch"),
}
"""Precision, fields of TrainSettings, and what `Trainer.kernel` must begin with."""
SECONDS = 0.5
"""Roughly what is timed in a turn, in whole training steps."""
CHECKED_ROWS = 3


def trainer_of(name: str, model: EquilibriumReasoner, batch: int, threads: int) -> Trainer:
    precision, how, kernel = CONTENDERS[name]
    if name in ("compile", "eager") and not has_bf16():
        raise Unavailable("PyTorch's bf16 is a hundred times as slow here: the CPU has no instructions for it")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    puzzles = sudoku_generator.generate(32, "easy", seed=1)
    config = TrainSettings(batch_size=batch, lr_warmup_steps=10, forward_dtype=dtype, workers=threads, **how)
    # The optimizer moves the weights, and the next trainer is to have the same.
    trainer = Trainer(with_config(model), PuzzleStream(puzzles, sudoku.augment, seed=1), config)
    if not trainer.kernel.startswith(kernel):
        raise Unavailable(f"it would not run {kernel!r}, but {trainer.kernel}")
    return trainer


def noise_of(trainer: Trainer) -> Tensor:
    """The noise [updates, n, S, d] that the next outer step will add; draws nothing."""
    rows, config = trainer.rows, trainer.model.config
    shape = (config.updates_per_step, *rows.z_H.shape)
    if trainer.fused_step is None:
        generator = torch.Generator()
        generator.set_state(trainer.generator.get_state())
        return torch.randn(shape, generator=generator, dtype=trainer.forward_dtype)
    rng = torch.stack([torch.full_like(rows.ids, trainer.fused_step.seed), rows.ids * 0, rows.ids, rows.steps], 1)
    return torch.stack([noise.normal(rng, noise.FIRST_UPDATE + m, shape[2:], torch.float32) for m in range(shape[0])])


def in_pytorch(trainer: Trainer, eps: Tensor, dtype: torch.dtype, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, z_H [len(rows), S, d] and all gradients of the reference's outer step of some of the trainer's rows."""
    model = with_config(trainer.model).to(torch.promote_types(dtype, torch.float32))
    weights, config, at = model.weights().to(dtype), model.config, trainer.rows

    def update(z: Tensor, u: Tensor, number: int) -> Tensor:
        return reference.damped_update(z, u, eps[number, rows].to(dtype), config.lambda_, config.noise_scale)

    e = reference.embed(at.tokens[rows], weights)
    start = at.z_H[rows].to(dtype), at.z_L[rows].to(dtype)
    z_H, _ = reference.outer_step(*start, e, reference.all_blocks(weights, model.rope(), config), config, update)
    logits, q_halt = reference.heads(z_H, weights)
    loss = objective(logits, q_halt, at.labels[rows])[0]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), z_H.detach(), torch.cat([g.flatten() for g in gradients])


def check_gradients(name: str, config: EqRConfig, threads: int) -> dict[str, float]:
    """The contender's errors of one short outer step (two latent recursions of two updates) against float64 autograd.

    Gradients in bf16 are held to the error of PyTorch's own.

    Raises:
        AssertionError: they are too large, so that nothing may be timed.
    """
    trainer = trainer_of(name, random_model(config, H_cycles=2, L_cycles=1), CHECKED_ROWS, threads)
    trainer._replace_halted()
    eps, every = noise_of(trainer), torch.arange(CHECKED_ROWS)
    loss, _, exact = in_pytorch(trainer, eps, torch.float64, every)
    errors = {}
    if CONTENDERS[name][0] == "bf16":
        theirs = relative_error(in_pytorch(trainer, eps, torch.bfloat16, every)[2], exact)
        errors["gradient_error_of_reference"] = theirs
        limit = (1.1 if name == "fused" else 1.3) * theirs
    else:
        limit = ERROR_LIMIT["fp32"]
    got = trainer._outer_step()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    error = relative_error(torch.cat([g.flatten() for g in gradients]), exact)
    assert error <= limit, f"the error of the gradients is {error:.2g}, the limit {limit:.2g}"
    errors |= {"gradient_error": error, "loss_error": abs(float(got.loss.detach() / loss) - 1)}
    assert errors["loss_error"] <= limit, f"the loss is {got.loss.item()}, and not {loss.item()}"
    return errors


def check_step(name: str, trainer: Trainer) -> dict[str, float]:
    """The error of z_H after the whole outer step of what is timed, in its first and last row.

    Raises:
        AssertionError: it is not the same operator.
    """
    trainer._replace_halted()
    some = torch.tensor([0, trainer.settings.batch_size - 1])
    z_H = in_pytorch(trainer, noise_of(trainer), torch.float64, some)[1]
    error = relative_error(trainer._outer_step().z_H[some], z_H)
    trainer.optimizer.zero_grad()
    assert error <= STEP_LIMIT[CONTENDERS[name][0]], f"the error after an outer step is {error:.2g}"
    return {"error_of_step": error}


def random_model(config: EqRConfig, **changes: Any) -> EquilibriumReasoner:
    torch.manual_seed(0)
    model = EquilibriumReasoner(config)
    torch.nn.init.normal_(model.q_head.weight, std=config.hidden_size**-0.5)  # or it passes on no gradient
    return with_config(model, **changes)


class Training:
    """A trainer whose rows are of every age, so that every step replaces as many of them."""

    def __init__(self, name: str, preset: str, batch: int, threads: int) -> None:
        config = PRESETS[preset]()
        start = time.perf_counter()
        self.batch, self.trainer = batch, trainer_of(name, random_model(config), batch, threads)
        self.info: dict[str, Any] = {"kernel": self.trainer.kernel, **check_gradients(name, config, threads)}
        self.info |= check_step(name, self.trainer)
        # Untrained rows stay for all of their steps.
        torch.nn.init.zeros_(self.trainer.model.q_head.weight)
        self.trainer.rows.steps.copy_(torch.arange(batch) % config.halt_max_steps)
        self._timed(1)
        self.count = max(1, math.ceil(SECONDS / self._timed(1)))
        self.info["prepared_s"] = time.perf_counter() - start

    def _timed(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self.trainer.train_step()
        return (time.perf_counter() - start) / count

    def turn(self) -> dict[str, Any]:
        self._timed(1)
        seconds = self._timed(self.count)
        loss = self.trainer.report().loss
        assert math.isfinite(loss), f"the loss is {loss}"
        return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.peers.trainer", description="Time one contender's training steps.")
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--preset", choices=[name for name in PRESETS if name != "maze"], default="sudoku-small")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5, help="timings to take, of one or more steps each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    answers = own_output()
    torch.set_num_threads(options.threads)
    info: dict[str, Any] = {key: getattr(options, key) for key in ("preset", "batch", "threads")}
    info = {"contender": options.name, "dtype": CONTENDERS[options.name][0], **info}
    try:
        training = Training(options.name, options.preset, options.batch, options.threads)
        info |= training.info
    except Unavailable as reason:
        print(json.dumps({**info, "skipped": str(reason)}), file=answers, flush=True)
        return
    if options.serve:
        serve(answers, info, lambda _: training.turn())
        return
    info["ms_a_step"] = 1e3 * statistics.median(training.turn()["seconds"] for _ in range(max(1, options.turns)))
    if options.json:
        print(json.dumps(info), file=answers)
    else:
        for key, value in info.items():
            print(f"{key:36s} {value:.4g}" if isinstance(value, float) else f"{key:36s} {value}", file=answers)


if __name__ == "__main__":
    main()
