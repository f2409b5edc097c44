"""Load a checkpoint in the layout of the official training code, and solve with it.

The file is made here from the weights of a shipped model, so that the example needs no download. With a real one, the
middle line is all there is to it: EquilibriumReasoner.from_pretrained("step_50000.pth").

python examples/official_checkpoint.py
"""

import tempfile
from pathlib import Path

import torch

import eqr_kernels as ek
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.sudoku_generator import generate


def write_official(path: Path) -> None:
    """Writes what the official code saves: compiled and wrapped names, averaged weights, an `arch` without sizes."""
    shipped = ek.EquilibriumReasoner.from_pretrained("sudoku")
    averaged = {f"_orig_mod.model.inner.{name}": weight for name, weight in shipped.state_dict().items()}
    arch = {
        name: value
        for name, value in shipped.config.to_dict().items()
        if name not in ("seq_len", "vocab_size", "fixed_init", "rms_norm_eps", "rope_theta")
    }
    torch.save(
        {
            "model": {name: torch.zeros_like(weight) for name, weight in averaged.items()},
            "ema": {"mu": 0.999, "shadow": averaged},
            "config": {"arch": {"name": "eqr@EqRModel", **arch}},
            "step": 16_500,
        },
        path,
    )


def main() -> None:
    puzzles = generate(4, "easy", seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_16500.pth"
        write_official(path)
        model = ek.EquilibriumReasoner.from_pretrained(path)

    print(f"{model.card.notes} Trained for {model.card.steps} steps.")
    # No tolerance has been calibrated for this file: give one, or save_pretrained and `eqr calibrate --write`.
    result = model.solve(torch.from_numpy(puzzles.inputs).long(), depth=32, tol=0.0794)
    solved = sudoku.is_solution(puzzles.inputs, result.preds.numpy())
    print(f"{int(solved.sum())} of {len(puzzles)} solved, in {result.steps.tolist()} outer steps")


if __name__ == "__main__":
    main()
