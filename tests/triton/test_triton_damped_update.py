"""The state update of rows as a Triton kernel, in Triton's interpreter, and `fixed_point` on it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import eqr_kernels as ek
from eqr_kernels import noise, reference, update
from tests.support.oracle_cases import relative, to_numpy

IN_INTERPRETER = True
pytest_plugins = ["tests.support.triton_interpreter"]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")

SHAPES = {
    "one element": (3, 1),
    "less than a chunk": (2, 5, 7),
    "a chunk": (1, 64),
    "more than a chunk": (3, 65),
    "more partial sums than a chunk": (1, 4161),
    "no rows": (0, 6),
}


def rows(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def keys(n):
    return torch.tensor([[2**32 - 1, 3, -5 - i, 11 + i] for i in range(n)], dtype=torch.int64).view(n, 4)


@pytest.fixture
def kernel(monkeypatch):
    from eqr_kernels.ops.triton import damped_update

    monkeypatch.setattr(damped_update, "_CHUNK", 64)
    return damped_update.damped_update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_scale", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_the_update_of_the_reference(kernel, shape, noise_scale, dtype):
    z, u, before = rows(shape, dtype)
    rng = keys(len(z))
    out, change, size = kernel(z, u, rng, 2, 0.7, noise_scale, before)
    eps = noise.normal(rng, 2, shape[1:], torch.float64)
    want = reference.damped_update(z.double(), u.double(), eps, 0.7, noise_scale)
    if z.numel():
        assert out.dtype == dtype and relative(out, to_numpy(want)) < (3e-7 if dtype == torch.float32 else 2.5e-3)
    for got, of in ((change, out.double() - before.double()), (size, out.double())):
        torch.testing.assert_close(got.double(), of.flatten(1).square().sum(1), rtol=2e-6, atol=0)
    alone, none, _ = kernel(z, u, rng, 2, 0.7, noise_scale)
    assert torch.equal(alone, out) and none.shape == (0,)


def test_a_row_does_not_depend_on_the_others_and_what_is_not_finite_stays_in_it(kernel):
    z, u, before = rows((5, 300), torch.float32)
    z[1, 7], u[3, 299] = torch.nan, torch.inf
    together = kernel(z, u, keys(5), 2, 0.5, 0.1, before)
    for i in range(5):
        alone = kernel(*(x[i : i + 1].contiguous() for x in (z, u)), keys(5)[i : i + 1], 2, 0.5, 0.1, before[i : i + 1])
        for a, of_all in zip(alone, together, strict=True):
            assert torch.equal(a.nan_to_num(7), of_all[i : i + 1].nan_to_num(7))
    assert together[1].isfinite().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("noise_scale", [0.0, 0.01])
def test_fixed_point_on_it_takes_the_steps_of_the_compiled_one(kernel, monkeypatch, form, noise_scale):
    rates = torch.tensor([0.1, 0.4, 0.3, 0.2])
    b, z0 = rows((4, 40), torch.float32)[:2]

    def contraction(z, rate, b):
        return rate[:, None] * z + b

    def pair(z, rate, b):
        return contraction(z[0], rate, b[:, :30]), contraction(z[1], rate, b[:, 30:])

    step, start = (contraction, z0) if form == "tensor" else (pair, (z0[:, :30].clone(), z0[:, 30:].clone()))

    def solve():
        return ek.fixed_point(step, start, rates, b, tol=1e-5, depth=20, slots=3, lambda_=0.9, noise_scale=noise_scale)

    want = solve()
    calls = []
    monkeypatch.setattr("eqr_kernels.iteration.fused_update", lambda *_: lambda *args: calls.append(1) or kernel(*args))
    got = solve()
    assert calls and torch.equal(got.steps, want.steps) and torch.equal(got.status, want.status)
    pairs = zip((got.z,), (want.z,), strict=True) if form == "tensor" else zip(got.z, want.z, strict=True)
    for a, b_ in pairs:
        torch.testing.assert_close(a, b_, rtol=1e-5, atol=1e-6)
    if not noise_scale:
        solution = torch.cat([got.z] if form == "tensor" else list(got.z), 1)
        # The residual bounds the error by r / (1 - r) of the damped rate.
        assert ((solution - b / (1 - rates[:, None])).norm(dim=1) < 1e-4 * solution.norm(dim=1)).all()
        assert got.converged.all()


def test_a_gpu_takes_it_and_float64_does_not(monkeypatch):
    from eqr_kernels.ops.triton import damped_update

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(update, "_triton_compiles", lambda: True)
    assert update.fused_update(gpu, torch.bfloat16) is None, "the interpreter takes no tensors of a GPU"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert update.fused_update(gpu, torch.bfloat16) is damped_update.damped_update
    assert update.fused_update(gpu, torch.float64) is None
    monkeypatch.setattr(update, "_triton_compiles", lambda: False)
    assert update.fused_update(gpu, torch.bfloat16) is None
