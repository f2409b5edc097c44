"""A task of your own: complete a palindrome of eight letters, of which four are hidden.

A task is a set of puzzles as tokens (inputs and labels, 0 = padding) and a symmetry to augment them by. Generate it,
train a small model on it, solve with it.

python examples/own_task.py
"""

import numpy as np
import torch

import eqr_kernels as ek
from eqr_kernels.tasks.common import PuzzleSet, Tokens
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer

SEQ_LEN, BLANK, LETTERS, STEPS = 8, 1, "abcdef", 200
VOCAB_SIZE = 2 + len(LETTERS)  # 0 pads, 1 is a blank, then the letters


def generate(n: int, seed: int) -> PuzzleSet:
    """n palindromes with one letter of each mirrored pair hidden."""
    rng = np.random.default_rng(seed)
    half = rng.integers(2, VOCAB_SIZE, (n, SEQ_LEN // 2), dtype=np.uint8)
    labels = np.concatenate([half, half[:, ::-1]], 1)
    hide_left = rng.integers(0, 2, half.shape).astype(bool)
    hidden = np.concatenate([hide_left, ~hide_left[:, ::-1]], 1)
    inputs = np.where(hidden, np.uint8(BLANK), labels)
    return PuzzleSet(inputs, labels, np.full(n, "generated"), np.full(n, -1))


def augment(inputs: Tokens, labels: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """The same puzzles with their letters exchanged, each by a permutation of its own."""
    letters = rng.permuted(np.tile(np.arange(2, VOCAB_SIZE, dtype=np.uint8), (len(inputs), 1)), axis=1)
    table = np.concatenate([np.tile(np.array([0, BLANK], np.uint8), (len(inputs), 1)), letters], 1)
    return np.take_along_axis(table, inputs, 1), np.take_along_axis(table, labels, 1)


def text(tokens: Tokens) -> str:
    return "".join(("?." + LETTERS)[t] for t in tokens)


def main() -> None:
    torch.manual_seed(0)
    model = ek.EquilibriumReasoner(
        ek.EqRConfig(
            seq_len=SEQ_LEN,
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            expansion=2.0,
            H_cycles=1,
            L_cycles=2,
            L_layers=1,
            halt_max_steps=8,
        )
    )
    stream = PuzzleStream(generate(500, seed=0), augment)
    trainer = Trainer(
        model,
        stream,
        TrainSettings(batch_size=32, lr=5e-3, lr_warmup_steps=20, ema_rate=0.99, total_steps=STEPS, compile=False),
    )
    for _ in range(STEPS):
        trainer.train_step()
    progress = trainer.report()
    print(f"trained {progress.step} steps ({trainer.kernel}): loss {progress.loss:.3f}")

    model.eval()
    puzzles = generate(100, seed=1)
    assert puzzles.labels is not None
    result = model.solve(torch.from_numpy(puzzles.inputs).long(), depth=16, tol=0.05)
    answers = result.preds.numpy().astype(np.uint8)
    for i in range(3):
        print(f"{text(puzzles.inputs[i])} -> {text(answers[i])} in {int(result.steps[i])} outer steps")
    print(f"{int((answers == puzzles.labels).all(1).sum())} of {len(puzzles)} fresh puzzles right")


if __name__ == "__main__":
    main()
