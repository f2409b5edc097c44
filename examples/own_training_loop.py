"""A training loop of your own: `model(tokens, state)` is one differentiable outer step.

Segmented online training, written out: every training step is one outer step from the detached state of the step
before, and a row that halts is replaced by a fresh puzzle with a fresh random start. The puzzles are 4x4 Sudoku.
Under autocast to bfloat16 the step is one fused kernel forward and one backward on a CPU, whatever the loss.

python examples/own_training_loop.py
"""

from itertools import permutations

import torch
from torch import Tensor

import eqr_kernels as ek
from eqr_kernels.training.objective import objective

ROWS, TRAINING_STEPS, BLANK = 32, 200, 1


def all_grids() -> Tensor:
    """The 288 solved 4x4 grids as tokens 2..5, int64 [288, 16]; 0 is padding and 1 a blank."""
    lines = [torch.tensor(line) for line in permutations(range(2, 6))]
    grids = []

    def extend(grid: list[Tensor]) -> None:
        if len(grid) == 4:
            grids.append(torch.cat(grid))
            return
        for line in lines:
            columns_differ = all((line != above).all() for above in grid)
            box_differs = len(grid) % 2 == 0 or all(
                not set(line[c : c + 2].tolist()) & set(grid[-1][c : c + 2].tolist()) for c in (0, 2)
            )
            if columns_differ and box_differs:
                extend([*grid, line])

    extend([])
    return torch.stack(grids)


def draw(grids: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n puzzles with about five blanks and their answers, int64 [n, 16] each."""
    answers = grids[torch.randint(len(grids), (n,), generator=generator)]
    blank = torch.rand(answers.shape, generator=generator) < 0.3
    return torch.where(blank, BLANK, answers), answers


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = ek.EqRConfig(
        seq_len=16, vocab_size=6, hidden_size=32, expansion=2.0, H_cycles=1, L_cycles=2, L_layers=1, halt_max_steps=8
    )
    model = ek.EquilibriumReasoner(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))

    grids = all_grids()
    tokens, answers = draw(grids, ROWS, generator)
    state = model.initial_state(ROWS, seed=0)
    for step in range(1, TRAINING_STEPS + 1):
        with torch.autocast("cpu", torch.bfloat16):
            if step == 1:
                print(f"a step is run by: {model.step_kernel(tokens, state)}")
            state, logits, q_halt = model(tokens, state)
        loss, exact = objective(logits, q_halt, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        left = ((q_halt > 0) | (state.step >= config.halt_max_steps)).nonzero()[:, 0]
        if len(left):
            tokens[left], answers[left] = draw(grids, len(left), generator)
            # New ids, so that starts and noise are new too.
            fresh = model.initial_state(len(left), seed=0, ids=left + step * ROWS)
            for old, new in zip(state, fresh, strict=True):
                old[left] = new
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {int(exact.sum())} of {ROWS} rows right")

    model.eval()
    tokens, answers = draw(grids, 200, generator)
    for depth in (1, 4, 8):
        preds = model.solve(tokens, depth=depth, halt="none").preds
        print(f"depth {depth}: {int((preds == answers).all(1).sum())} of 200 fresh puzzles right")


if __name__ == "__main__":
    main()
