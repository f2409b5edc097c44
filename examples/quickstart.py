"""Solve twelve generated Sudoku puzzles with the shipped model, and print each answer with what it cost.

python examples/quickstart.py
"""

import torch

import eqr_kernels as ek
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.sudoku_generator import generate


def main() -> None:
    puzzles = generate(12, "easy", seed=0)
    model = ek.EquilibriumReasoner.from_pretrained("sudoku")
    result = model.solve(torch.from_numpy(puzzles.inputs).long(), depth=64, breadth=2)

    solved = sudoku.is_solution(puzzles.inputs, result.preds.numpy())
    for i, answer in enumerate(result.preds.numpy()):
        print(sudoku.format_grid(answer))
        print(
            f"puzzle {i + 1}: {'solved' if solved[i] else 'not solved'}, "
            f"{'converged' if result.converged[i] else 'did not converge'} after {int(result.steps[i])} outer steps, "
            f"{int(result.nfe[i])} spent on both trajectories\n"
        )
    print(f"{int(solved.sum())} of {len(puzzles)} solved by {result.backend} ({result.backend_reason})")


if __name__ == "__main__":
    main()
