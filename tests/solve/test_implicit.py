"""`FixedPoint`: gradients at fixed points that are known, under what PyTorch wraps around a layer."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from eqr_kernels import FixedPoint

N, D = 9, 5
TIGHT = dict(depth=3000, tol=5e-7)


class Linear(nn.Module):
    """z <- rate A z + x, A orthogonal: z* = (I - rate A)^-1 x, each row at a rate of its own."""

    def __init__(self, dtype=torch.float32, pair=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(
            torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0].to(dtype)
        )
        self.pair = pair

    def forward(self, z, rate, x):
        if self.pair:
            a, b = z
            return rate * b @ self.weight.T + x, a
        return rate * z @ self.weight.T + x


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    rate = torch.linspace(0.1, 0.9, N, dtype=dtype)[:, None]
    x = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    g = torch.randn(N, D, generator=generator, dtype=dtype)
    return rate, x, g


def analytic(weight, rate, x, g):
    """d<g, z*> by x and by the weight, in float64."""
    weight, rate, x, g = (t.detach().double() for t in (weight, rate, x, g))
    inverse = torch.linalg.inv(torch.eye(D).double() - rate[..., None] * weight)  # [N, D, D]
    z = (inverse @ x[..., None])[..., 0]
    v = (inverse.transpose(1, 2) @ g[..., None])[..., 0]
    return v, (rate * v).T @ z


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def gradients(layer, z0, rate, x, g):
    out = layer(z0, rate, x)
    return torch.autograd.grad(((out[0] if isinstance(out, tuple) else out) * g).sum(), [x, layer.module.weight])


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("dtype", "tol", "error"), [(torch.float32, 5e-7, 2e-5), (torch.float64, 1e-12, 1e-10)])
def test_implicit_gradients_are_the_analytic_ones(dtype, tol, error, pair, solver):
    layer = FixedPoint(Linear(dtype, pair), depth=3000, tol=tol, solver=solver)
    rate, x, g = problem(dtype)
    z0 = torch.zeros(N, D, dtype=dtype)
    got = gradients(layer, (z0, z0) if pair else z0, rate, x, g)
    for gradient, want in zip(got, analytic(layer.module.weight, rate, x, g), strict=True):
        assert relative(gradient, want) < error
    assert layer.result.converged.all() and layer.backward_result.converged.all()


def test_each_row_of_the_backward_pass_stops_by_itself():
    layer = FixedPoint(Linear(), depth=3000, tol=1e-4)
    rate, x, g = problem()
    g[3] = 0
    gradients(layer, torch.zeros(N, D), rate, x, g)
    steps = layer.backward_result.steps
    assert steps[3] == 1 and steps[0] < steps[4] < steps[-1]
    assert layer.backward_result.nfe < 1.3 * int(steps.sum())


@pytest.mark.parametrize("backward", ["phantom", "last"])
def test_cheaper_gradients_are_those_of_their_unrolled_steps(backward):
    layer = FixedPoint(Linear(), **TIGHT, backward=backward, unroll=3, damping=0.5)
    rate, x, g = problem()
    got = gradients(layer, torch.zeros(N, D), rate, x, g)
    z = layer.result.z
    for _ in range(3 if backward == "phantom" else 1):
        new = layer.module(z, rate, x)
        z = 0.5 * z + 0.5 * new if backward == "phantom" else new
    want = torch.autograd.grad((z * g).sum(), [x, layer.module.weight])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    # They point the right way.
    exact = analytic(layer.module.weight, rate, x, g)
    for a, b in zip(got, exact, strict=True):
        assert torch.nn.functional.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) > 0.5


def test_twice_in_one_graph():
    layer = FixedPoint(Linear(), **TIGHT)
    rate, x, g = problem()
    alone = gradients(layer, torch.zeros(N, D), rate, x, g)
    y = x.detach().roll(1, 0).requires_grad_()
    total = (layer(torch.zeros(N, D), rate, x) * g).sum() + (layer(torch.zeros(N, D), rate, y) * g).sum()
    both = torch.autograd.grad(total, [x, y, layer.module.weight])
    torch.testing.assert_close(both[0], alone[0])
    other = gradients(layer, torch.zeros(N, D), rate, y, g)
    torch.testing.assert_close(both[2], alone[1] + other[1])
    # One after the other: the second reads what the first gives.
    inner = layer(torch.zeros(N, D), rate, x)
    chained = torch.autograd.grad((layer(torch.zeros(N, D), rate, inner) * g).sum(), x)[0]
    inverse = torch.linalg.inv(torch.eye(D).double() - rate.double()[..., None] * layer.module.weight.detach().double())
    want = (inverse.transpose(1, 2) @ inverse.transpose(1, 2) @ g.double()[..., None])[..., 0]
    assert relative(chained, want) < 1e-5


def test_nothing_is_kept_of_the_way_there():
    def saved(depth, backward):
        layer = FixedPoint(Linear(), depth=depth, tol=0.0, backward=backward)
        rate, x, _ = problem()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(torch.zeros(N, D), rate, x)
        return sum(sizes)

    for backward in ("implicit", "phantom", "last"):
        assert saved(2, backward) == saved(500, backward)


def test_without_gradients_it_is_fixed_point():
    layer = FixedPoint(Linear(), **TIGHT)
    rate, x, _ = problem()
    with torch.no_grad():
        z = layer(torch.zeros(N, D), rate, x)
    assert z is layer.result.z and not z.requires_grad
    frozen = FixedPoint(Linear().requires_grad_(False), **TIGHT)
    assert not frozen(torch.zeros(N, D), rate, x.detach()).requires_grad


def test_a_second_derivative_is_refused():
    layer = FixedPoint(Linear(), **TIGHT)
    rate, x, g = problem()
    loss = (layer(torch.zeros(N, D), rate, x) * g).sum()
    with pytest.raises(RuntimeError, match="gives first derivatives only.*use backward="):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("wrapper", ["autocast", "checkpoint", "ddp"])
def test_under_what_pytorch_wraps_around_a_layer(wrapper, tmp_path):
    layer = FixedPoint(Linear(), depth=300, tol=1e-5)
    rate, x, g = problem()
    want = gradients(layer, torch.zeros(N, D), rate, x, g)
    call, around = layer, contextlib.nullcontext()
    if wrapper == "autocast":
        around = torch.autocast("cpu", torch.bfloat16)
        layer.options = layer.options | dict(tol=1e-2)
        layer.backward_options = layer.backward_options | dict(tol=1e-2)
    elif wrapper == "checkpoint":
        call = lambda *args: checkpoint(layer, *args, use_reentrant=False)  # noqa: E731
    else:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        call = DistributedDataParallel(layer)
    try:
        with around:
            out = call(torch.zeros(N, D), rate, x)
        (out.float() * g).sum().backward()
    finally:
        if wrapper == "ddp":
            dist.destroy_process_group()
    allowed = 0.1 if wrapper == "autocast" else 1e-6
    assert (
        relative(x.grad, want[0].double()) < allowed and relative(layer.module.weight.grad, want[1].double()) < allowed
    )


@pytest.mark.slow
def test_under_compile():
    layer = FixedPoint(Linear(), **TIGHT)
    rate, x, g = problem()
    want = gradients(layer, torch.zeros(N, D), rate, x, g)

    def loss(x):
        return (2 * layer(torch.zeros(N, D), rate, x) * g).sum() / 2

    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(x), [x, layer.module.weight])
    compiled = FixedPoint(torch.compile(layer.module, backend="aot_eager"), **TIGHT)
    again = torch.autograd.grad((compiled(torch.zeros(N, D), rate, x) * g).sum(), [x, layer.module.weight])
    for a, b, c in zip(got, again, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", [False, True])
def test_the_spectral_radius_is_that_of_the_rows(pair):
    layer = FixedPoint(Linear(pair=pair), **TIGHT)
    rate, x, _ = problem()
    z = torch.zeros(N, D)
    radius = layer.spectral_radius((z, z) if pair else z, rate, x, steps=400)
    torch.testing.assert_close(radius, rate[:, 0].sqrt() if pair else rate[:, 0], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(backward="exact"), ValueError, "backward must be one of implicit, phantom, last, got 'exact'"),
        (dict(unroll=0), ValueError, "unroll must be at least 1"),
        (dict(damping=2.0), ValueError, "damping must be above 0 and at most 1"),
        (dict(tolerance=1e-3), TypeError, "options must be some of depth, tol, .*, got tolerance"),
        (dict(depth=0), ValueError, "depth must be at least 1"),
    ],
)
def test_bad_options_are_named_when_the_layer_is_made(options, error, message):
    with pytest.raises(error, match=message):
        FixedPoint(Linear(), **options)
