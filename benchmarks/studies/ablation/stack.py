"""Blocks applied one after the other to a single latent state: the feed-forward and the weight-tied baselines."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eqr_kernels import EqRConfig, EquilibriumReasoner, reference
from eqr_kernels.reference import BlockWeights, Rope
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.learning_rate import learning_rate
from eqr_kernels.training.objective import objective
from eqr_kernels.training.optim import EMA, AdamATan2
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Progress

Block = Callable[[Tensor, BlockWeights, "Rope | None", EqRConfig], Tensor]


class BlockStack(nn.Module):
    """`iterations` times z <- blocks(z + e), from z = 0, with the embedding, heads and first weights of a reasoner.

    With one iteration it is a feed-forward network: z = blocks(e).

    Args:
        config: of the weights; its `L_layers` blocks are one iteration.
        iterations: of one pass.
    """

    def __init__(self, config: EqRConfig, iterations: int) -> None:
        super().__init__()
        self.net, self.iterations = EquilibriumReasoner(config), iterations

    @property
    def config(self) -> EqRConfig:
        return self.net.config

    def start(self, n: int, dtype: torch.dtype | None = None) -> Tensor:
        """z = 0 [n, S, d] in `dtype`, by default that of the weights."""
        c = self.config
        return torch.zeros(n, c.seq_len, c.hidden_size, dtype=dtype or self.net.dtype, device=self.net.device)

    def forward(self, tokens: Tensor, z: Tensor, block: Block = reference.block) -> tuple[Tensor, Tensor, Tensor]:
        """One pass in the dtype of z: tokens int64 [n, S], z [n, S, d] -> z [n, S, d], logits [n, S, V], q_halt [n].

        Args:
            block: `reference.block`, or that compiled.
        """
        weights = self.net.weights().to(z.dtype)
        e, rope = reference.embed(tokens, weights), self.net.rope()
        for _ in range(self.iterations):
            z = z + e
            for layer in weights.blocks:
                z = block(z, layer, rope, self.config)
        return z, *reference.heads(z, weights)


class StackTrainer:
    """Trains a stack: one pass a training step. Its counterpart for reasoners is `training.trainer.Trainer`.

    Args:
        model: with float32 parameters.
        stream: yields fresh puzzles.
        config: how to train.
        segments: passes of a row before it is replaced, each from the detached state of the one before and with its own
            update (segmented online training); 1 trains a single pass.
        micro_batch: rows in memory at a time, a divisor of the batch.
    """

    def __init__(
        self, model: BlockStack, stream: PuzzleStream, config: TrainSettings, *, segments: int, micro_batch: int
    ) -> None:
        self.model, self.stream, self.config = model.train(), stream, config
        self.segments, self.micro_batch = segments, micro_batch
        self.step = 0
        self.optimizer = AdamATan2(model.parameters(), config.lr, (config.beta1, config.beta2), config.weight_decay)
        self.ema = EMA(model, config.ema_rate)
        # Compiled alone and called many times: unrolled, the pass would take minutes to compile.
        self.block: Block = torch.compile(reference.block, dynamic=False) if config.compile else reference.block
        self._replace()
        self._clear()

    def _replace(self) -> None:
        """Fresh puzzles and fresh starts for all rows."""
        tokens, labels = self.stream.draw(self.config.batch_size, self.step)
        device = self.model.net.device
        self.tokens = torch.from_numpy(tokens).to(device, torch.int64)
        self.labels = torch.from_numpy(labels).to(device, torch.int64)
        self.z = self.model.start(len(tokens), getattr(torch, self.config.forward_dtype))

    def _clear(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # loss, rows that left, exact ones of them, residual
        self._count, self._since = 0, time.perf_counter()

    def train_step(self) -> None:
        """One pass of every row, one update of the weights."""
        config, age = self.config, self.step % self.segments
        if age == 0 and self.step:
            self._replace()
        leaves = age == self.segments - 1
        for first in range(0, config.batch_size, self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            share = len(self.tokens[rows]) / config.batch_size
            z, logits, q_halt = self.model(self.tokens[rows], self.z[rows], self.block)
            loss, exact = objective(logits, q_halt, self.labels[rows])
            (loss * share).backward()
            z = z.detach()
            change = residual(z, self.z[rows]).double().mean()
            left = len(exact) if leaves else 0
            self._sums += torch.stack(
                [loss.detach() * share, torch.tensor(float(left)), exact.sum() * float(leaves), change * share]
            ).cpu()
            self.z[rows] = z
        self.optimizer.param_groups[0]["lr"] = learning_rate(
            self.step + 1,
            lr=config.lr,
            warmup=config.lr_warmup_steps,
            total=config.total_steps,
            min_ratio=config.lr_min_ratio,
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        self._count += 1

    def report(self) -> Progress:
        """Means since the last report; starts new ones."""
        loss, left, exact, change = self._sums.tolist()
        count, seconds = max(1, self._count), time.perf_counter() - self._since
        rate = self._count * self.config.batch_size / seconds
        self._clear()
        return Progress(
            self.step,
            loss / count,
            exact / max(1.0, left),
            float(self.segments),
            change / count,
            rate,
            self.optimizer.param_groups[0]["lr"],
        )


def residual(z: Tensor, before: Tensor) -> Tensor:
    """||z - before|| / ||z|| of each row, float32 [n]: z, before [n, S, d]."""
    high = z.float()
    return (high - before.float()).flatten(1).norm(dim=1) / high.flatten(1).norm(dim=1)
