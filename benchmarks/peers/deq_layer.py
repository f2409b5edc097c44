"""The equilibrium layer of examples/deq_classifier.py, by one contender in a process of its own, one request a line.

python -m benchmarks.peers.deq_layer implicit --serve <<< '{"tol": 1e-4}'

A forward pass, and a forward and a backward pass, of all training images at once. A contender stops at the relative
residual `tol`, forward and backward: an image by itself (`ek.FixedPoint`), or all with the slowest.
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eqr_kernels as ek

from .answering import own_output, serve

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "deq_classifier.py"
DEPTH = 400
Layer = Callable[["Problem", float], Tensor]
"""(the problem, tol) -> z [n, HIDDEN], which a gradient can be taken of."""


class Problem:
    """The example's digits, and its model after an epoch of training; counts the rows that the cell computes."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        example = runpy.run_path(str(EXAMPLE))
        torch.manual_seed(0)
        digits = load_digits()
        self.x, self.y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
        self.model = example["Classifier"]()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        for batch in torch.randperm(len(self.x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch]).backward()
            optimizer.step()
        self.cell, self.head = self.model.equilibrium.module, self.model.head
        self.z0 = torch.zeros(len(self.x), example["HIDDEN"])
        self.computed = 0

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        self.computed += len(z)
        return self.cell(z, x)

    def loss(self, z: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(z), self.y)

    def gradient(self, layer: Layer, tol: float) -> Tensor:
        """Of the cell's parameters, as one [m]."""
        self.model.zero_grad()
        self.loss(layer(self, tol)).backward()
        return torch.cat([p.grad.flatten() for p in self.cell.parameters()])

    def exact(self) -> Tensor:
        """The gradient in float64: the fixed point to rounding, and the adjoint equation solved densely."""
        cell, head, x = (part.double() for part in (self.cell, self.head, self.x))
        try:
            with torch.no_grad():
                z = self.z0.double()
                for _ in range(2000):
                    z = cell(z, x)
            z.requires_grad_()
            (g,) = torch.autograd.grad(nn.functional.cross_entropy(head(z), self.y), z)
            jacobian = torch.func.vmap(torch.func.jacrev(lambda z, x: cell(z[None], x[None])[0]))(z.detach(), x)
            v = torch.linalg.solve(torch.eye(z.shape[1]).double() - jacobian.transpose(1, 2), g)
            gradients = torch.autograd.grad(cell(z.detach(), x), list(cell.parameters()), v)
            return torch.cat([part.flatten() for part in gradients])
        finally:
            self.model.float()


class Counted(nn.Module):
    """The cell of a problem, which counts."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.cell, self.problem = problem.cell, (problem,)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.problem[0].step(z, x)


def ours(backward: str, **options: Any) -> Layer:
    def layer(p: Problem, tol: float) -> Tensor:
        z: Tensor = ek.FixedPoint(Counted(p), depth=DEPTH, tol=tol, backward=backward, **options)(p.z0, p.x)
        return z

    return layer


def unrolled(p: Problem, tol: float) -> Tensor:
    z = p.z0
    for _ in range(DEPTH):
        new = p.step(z, p.x)
        with torch.no_grad():
            settled = ((new - z).norm(dim=1) <= tol * new.norm(dim=1)).all()
        z = new
        if settled:
            break
    return z


def torchdeq(solver: str) -> Layer:
    def layer(p: Problem, tol: float) -> Tensor:
        from torchdeq import get_deq

        side = {"solver": solver, "max_iter": DEPTH, "tol": tol, "stop_mode": "rel"}
        deq = get_deq(ift=True, **{f"{s}_{k}": v for s in "fb" for k, v in side.items()})
        deq.train()
        z: Tensor = deq(lambda z: p.step(z, p.x), p.z0)[0][-1]
        return z

    return layer


CONTENDERS: dict[str, Layer] = {
    "implicit": ours("implicit"),
    "implicit, anderson": ours("implicit", solver="anderson"),
    "phantom": ours("phantom", unroll=5),
    "last": ours("last"),
    "unrolled": unrolled,
    "torchdeq": torchdeq("fixed_point_iter"),
    "torchdeq anderson": torchdeq("anderson"),
}


def kept_bytes(p: Problem, layer: Layer, tol: float) -> int:
    """Of the tensors that the forward pass keeps for the backward pass, each once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = p.loss(layer(p, tol))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return size


def answer(layer: Layer, p: Problem, exact: Tensor, tol: float) -> dict[str, Any]:
    # Not timed: the process has waited, and finds its caches cold.
    p.gradient(layer, tol)
    p.computed = 0
    start = time.perf_counter()
    with torch.no_grad():
        z = layer(p, tol)
    forward = time.perf_counter() - start
    computed = p.computed
    start = time.perf_counter()
    gradient = p.gradient(layer, tol)
    both = time.perf_counter() - start
    with torch.no_grad():
        new = p.cell(z, p.x)
    return {
        "forward_s": forward,
        "both_s": both,
        "computed": computed,
        "worst_residual": float(((new - z).norm(dim=1) / new.norm(dim=1)).max()),
        "gradient_error": float((gradient.double() - exact).norm() / exact.norm()),
        "kept_bytes": [kept_bytes(p, layer, t) for t in (tol, tol / 100)],
    }


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.peers.deq_layer", description="Solve what is asked for on stdin.")
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    answers = own_output()
    layer, info = CONTENDERS[options.contender], {}  # type: Layer, dict[str, Any]
    try:
        problem = Problem()
        exact = problem.exact()
        problem.gradient(layer, 0.5)  # imports
    except ImportError as error:
        info = {"skipped": f"{error}; pip install torchdeq scikit-learn"}
    serve(answers, info, lambda request: answer(layer, problem, exact, **request))


if __name__ == "__main__":
    main()
