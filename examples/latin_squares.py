"""A task of your own: 4x4 Latin squares, in which each row and each column has every letter once.

The object `LATIN` is all that the commands need: `eqr train --task examples.latin_squares:LATIN`, and so on
(docs/own-task.md). Here the same is done from Python: generate squares, train a small model, solve fresh ones, check
the answers. Takes half a minute on one slow core.

python examples/latin_squares.py
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import torch

import eqr_kernels as ek
from eqr_kernels.tasks import PuzzleSet, Task
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer

SIDE, LETTERS, BLANK = 4, "abcd", 1


class LatinSquares(Task):
    """Tokens: 0 pads, 1 is a blank, 2..5 the letters a..d; a square is 16 of them, row by row."""

    name = "latin"
    vocab_size = 2 + SIDE
    seq_len = SIDE * SIDE
    open_token = BLANK
    written = "16 of the letters a-d and ."

    def encode(self, text: str) -> np.ndarray:
        """Tokens, uint8 [16]."""
        if len(text) != self.seq_len or not set(text) <= set("." + LETTERS):
            raise ValueError(f"{text!r} is not {self.written}")
        return np.array([BLANK + ("." + LETTERS).index(character) for character in text], np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(("?." + LETTERS)[token] for token in tokens)

    def check(self, inputs: np.ndarray, preds: np.ndarray) -> np.ndarray:
        """bool [N] of tokens [N, 16]: every given is kept, and each row and column has all letters."""
        inputs, squares = np.asarray(inputs), np.asarray(preds).reshape(-1, SIDE, SIDE)
        all_letters = np.arange(SIDE) + BLANK + 1
        rows = (np.sort(squares, 2) == all_letters).all((1, 2))
        columns = (np.sort(squares, 1) == all_letters[:, None]).all((1, 2))
        kept = ((inputs == preds) | (inputs == BLANK)).all(1)
        return rows & columns & kept

    def augment(
        self, inputs: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows, columns and letters of each square in an order of its own: uint8 [N, 16] twice."""
        n = len(inputs)
        rows, columns, letters = (rng.random((n, SIDE)).argsort(1) for _ in range(3))
        cells = (rows[:, :, None] * SIDE + columns[:, None, :]).reshape(n, -1)  # new cell -> old cell
        names = np.concatenate([np.tile([0, BLANK], (n, 1)), letters + BLANK + 1], 1).astype(np.uint8)

        def moved(squares: np.ndarray) -> np.ndarray:
            return np.take_along_axis(names, np.take_along_axis(squares, cells, 1).astype(np.int64), 1)

        return moved(inputs), moved(labels)

    def generate(
        self, n: int, *, seq_len: int = SIDE * SIDE, seed: int = 0, progress: Callable[[int], object] | None = None
    ) -> PuzzleSet:
        """n squares with 6 to 9 letters given, and one solution each."""
        rng, squares = np.random.default_rng(seed), _all_squares()
        inputs, labels = np.zeros((n, seq_len), np.uint8), np.zeros((n, seq_len), np.uint8)
        given = np.zeros(n)
        for i in range(n):
            labels[i] = squares[rng.integers(len(squares))]
            solutions = 0
            while solutions != 1:
                shown = rng.permutation(seq_len)[: rng.integers(6, 10)]
                solutions = int((squares[:, shown] == labels[i, shown]).all(1).sum())
            inputs[i] = BLANK
            inputs[i, shown] = labels[i, shown]
            given[i] = len(shown)
            if progress is not None:
                progress(i + 1)
        return PuzzleSet(inputs, labels, np.full(n, "generated"), given)


def _all_squares() -> np.ndarray:
    """The 576 Latin squares as tokens, uint8 [576, 16]."""
    lines = np.array(list(permutations(range(BLANK + 1, BLANK + 1 + SIDE))), np.uint8)
    squares = lines[:, None]  # [n, rows so far, 4]
    for _ in range(SIDE - 1):
        fits = (squares[:, None] != lines[None, :, None]).all((2, 3))
        above, line = fits.nonzero()
        squares = np.concatenate([squares[above], lines[line][:, None]], 1)
    return squares.reshape(len(squares), -1)


LATIN = LatinSquares()


def main(steps: int = 300) -> None:
    torch.manual_seed(0)
    config = ek.EqRConfig(
        seq_len=LATIN.seq_len,
        vocab_size=LATIN.vocab_size,
        hidden_size=64,
        expansion=2.0,
        multiple_of=8,
        H_cycles=1,
        L_cycles=2,
        L_layers=1,
        halt_max_steps=8,
    )
    model = ek.EquilibriumReasoner(config)
    stream = PuzzleStream(LATIN.generate(500, seed=0), LATIN.augment)
    settings = TrainSettings(
        batch_size=64, lr=4e-3, lr_warmup_steps=20, ema_rate=0.99, total_steps=steps, compile=False
    )
    trainer = Trainer(model, stream, settings)
    for step in range(1, steps + 1):
        trainer.train_step()
        if step % 100 == 0:
            print(f"step {step}: loss {trainer.report().loss:.3f}")

    model.eval()
    puzzles = LATIN.generate(200, seed=1)
    result = model.solve(torch.from_numpy(puzzles.inputs).long(), depth=16, tol=0.05)
    answers = result.preds.numpy()
    for puzzle, answer in zip(puzzles.inputs[:2], answers, strict=False):
        print(f"{LATIN.draw(puzzle)}\n->\n{LATIN.draw(answer)}\n")
    right = int(LATIN.check(puzzles.inputs, answers).sum())
    print(f"{right} of {len(puzzles)} fresh squares right, in {result.steps.float().mean():.1f} outer steps on average")


if __name__ == "__main__":
    main()
