"""A deep-equilibrium classifier of scikit-learn's handwritten digits, trained through its fixed points.

The cell is a small network of your own; `FixedPoint` iterates each image's state to its own fixed point and gives the
gradient there, in memory that does not grow with the number of steps. Afterwards each image is solved with a stop of
its own, and costs what it needs. Takes ten seconds on two quiet cores; needs
scikit-learn.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import eqr_kernels as ek

HIDDEN = 96


class Cell(nn.Module):
    """z [n, HIDDEN], x [n, 64] -> the next z."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.inject = nn.Linear(HIDDEN, HIDDEN), nn.Linear(64, HIDDEN)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        # Rows of the matrix sum to 0.9 at most: a contraction, whose one fixed point every start leads to.
        bound = 0.9 / self.mix.weight.abs().sum(1).amax().clamp_min(0.9)
        return torch.tanh(nn.functional.linear(z, bound * self.mix.weight, self.mix.bias) + self.inject(x))


class Classifier(nn.Module):
    """Images [n, 64] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.equilibrium = ek.FixedPoint(Cell(), depth=100, tol=1e-3, backward="implicit")
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.equilibrium(x.new_zeros(len(x), HIDDEN), x))


def main(epochs: int = 12) -> dict[str, float]:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[360:], order[:360]
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(128):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        steps = model.equilibrium.result.steps.float().mean()
        print(f"epoch {epoch + 1:2}  loss {loss.item():.3f}  steps {steps:.1f}")
    model.eval()
    with torch.no_grad():
        logits = model(x[test])
    result = model.equilibrium.result
    radius = model.equilibrium.spectral_radius(result.z[:64], x[test][:64]).max()
    right = float((logits.argmax(1) == y[test]).float().mean())
    to_the_slowest = int(result.steps.max()) * len(test)
    count, converged = round(right * len(test)), bool(result.converged.all())
    print(f"{count} of {len(test)} held-out digits right; all converged: {converged}")
    print(f"{int(result.steps.min())} to {int(result.steps.max())} steps an image; rows computed: {result.nfe},")
    print(f"and {to_the_slowest} if all waited for the slowest; spectral radius at most {radius:.2f}")
    return {"right": right, "saved": to_the_slowest / result.nfe, "radius": float(radius)}


if __name__ == "__main__":
    main()
