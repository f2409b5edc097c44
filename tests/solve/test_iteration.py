"""`fixed_point` of any operator: rows with known fixed points, each to its own end."""

from __future__ import annotations

import math

import pytest
import torch

from eqr_kernels import Status, fixed_point, noise, reference

N, D = 37, 12
RATE = torch.linspace(0.1, 0.97, N)[:, None]
TARGET = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def contract(z, rate, target):
    """A contraction of each row at a rate of its own, to a point that is known."""
    return target + rate * (z - target)


def pair(z, rate, target):
    """The same for two tensors of other shapes, each of which reads the other."""
    a, b = z
    return target + rate * (b.flatten(1) - target), (target + rate * (a - target)).view(b.shape)


def steps_of(rate, target, tol, z=0.0):
    """Steps that a row from `z` takes until ||z_k - z_{k-1}|| <= tol ||z_k||, in float64."""
    error, size = (z - target).double(), target.double()
    for k in range(1, 10_000):
        before, error = error, rate * error
        if (error - before).norm() <= tol * (size + error).norm():
            return k
    raise AssertionError


def case(form, dtype=torch.float32):
    z = torch.zeros(N, D, dtype=dtype)
    step, z0 = (contract, z) if form == "tensor" else (pair, (z, z.view(N, 3, 4)))
    return step, z0, RATE.to(dtype), TARGET.to(dtype)


def parts(z):
    return (z,) if isinstance(z, torch.Tensor) else z


@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_each_row_takes_the_steps_that_it_needs(form, dtype, tol):
    result = fixed_point(*case(form, dtype), depth=2000, tol=tol, trace=True)
    wanted = [steps_of(float(rate), target, tol) for rate, target in zip(RATE, TARGET, strict=True)]
    assert result.steps.tolist() == wanted and result.converged.all()
    assert (result.residual <= tol).all() and result.residual.dtype == torch.float32
    for part in parts(result.z):
        error = (part.flatten(1) - TARGET).norm(dim=1) / TARGET.norm(dim=1)
        assert (error <= 1.1 * tol * RATE[:, 0] / (1 - RATE[:, 0])).all() and part.dtype == dtype
    assert result.residuals.isfinite().sum(1).tolist() == wanted
    last = result.residuals.gather(1, result.steps[:, None] - 1)[:, 0]
    assert torch.equal(last, result.residual) and result.nfe <= 1.15 * sum(wanted)


@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_company_order_and_slots_change_nothing(form, solver):
    step, z0, *args = case(form)
    options = dict(depth=500, tol=1e-4, solver=solver)
    whole = fixed_point(step, z0, *args, **options)
    for slots in (1, 5, 36, 64):
        some = fixed_point(step, z0, *args, **options, slots=slots)
        assert torch.equal(some.steps, whole.steps)
        for a, b in zip(parts(some.z), parts(whole.z), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = fixed_point(step, z0 if form == "tensor" else tuple(z0), *(arg[order] for arg in args), **options)
    assert torch.equal(shuffled.steps, whole.steps[order])
    for i in (0, 20, 36):
        row = slice(i, i + 1)
        alone = fixed_point(
            step, z0[row] if form == "tensor" else tuple(z[row] for z in z0), *(a[row] for a in args), **options
        )
        assert int(alone.steps) == int(whole.steps[i]) and alone.nfe == int(alone.steps)


def test_the_step_sees_few_sizes_and_only_rows_that_run():
    sizes = []

    def step(z, rate, target):
        sizes.append(len(z))
        return contract(z, rate, target)

    result = fixed_point(step, torch.zeros(N, D), RATE, TARGET, depth=2000, tol=1e-4)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and len(set(sizes)) <= 16 + 10
    running = [(result.steps > k).sum().item() for k in range(len(sizes))]
    assert all(r <= size <= math.ceil(1.125 * r) for r, size in zip(running, sizes, strict=True))
    assert result.nfe == sum(sizes)


def test_anderson_is_faster_and_as_near():
    plain = fixed_point(*case("tensor"), depth=2000, tol=1e-5)
    fast = fixed_point(*case("tensor"), depth=2000, tol=1e-5, solver="anderson")
    assert fast.converged.all() and fast.steps.max() < 20 < plain.steps.max()
    torch.testing.assert_close(fast.z, TARGET, rtol=1e-3, atol=1e-3)


def test_damping_and_patience():
    step, z0, rate, target = case("tensor")
    damped = fixed_point(step, z0, rate, target, depth=2000, tol=1e-3, lambda_=0.5)
    slower = [steps_of(0.5 + 0.5 * float(r), t, 1e-3) for r, t in zip(rate, target, strict=True)]
    assert damped.steps.tolist() == slower
    patient = fixed_point(step, z0, rate, target, depth=2000, tol=1e-3, patience=4)
    assert torch.equal(patient.steps, fixed_point(step, z0, rate, target, depth=2000, tol=1e-3).steps + 3)


def test_a_row_that_diverges_keeps_its_last_finite_state_and_harms_nobody():
    rate = RATE.clone()
    rate[5] = 1e20
    z0 = torch.ones(N, D)
    for solver in ("picard", "anderson"):
        result = fixed_point(contract, z0, rate, TARGET, depth=600, tol=1e-4, solver=solver)
        clean = fixed_point(contract, z0, RATE, TARGET, depth=600, tol=1e-4, solver=solver)
        others = torch.arange(N) != 5
        assert result.z.isfinite().all()
        assert torch.equal(result.steps[others], clean.steps[others])
        torch.testing.assert_close(result.z[others], clean.z[others], rtol=1e-5, atol=1e-6)
    z0[5] = torch.nan
    result = fixed_point(contract, z0, RATE, TARGET, depth=600, tol=1e-4)
    assert result.status[5] == Status.DIVERGED and result.steps[5] == 1 and result.converged.sum() == N - 1


def test_a_depth_that_is_too_small_is_said():
    result = fixed_point(*case("tensor"), depth=10, tol=1e-4)
    assert set(result.status.tolist()) == {Status.CONVERGED, Status.MAX_DEPTH}
    assert (result.steps[~result.converged] == 10).all() and (result.residual[~result.converged] > 1e-4).all()


def test_noise_is_keyed_by_id_and_step():
    step, z0, rate, target = case("tensor")
    ids = torch.arange(N) + 2**40
    got = fixed_point(step, z0, rate, target, depth=3, tol=0, noise_scale=0.1, seed=7, ids=ids)
    z = z0
    for k in range(3):
        eps = noise.normal(noise.make_rng(7, 0, ids, k), noise.FIRST_UPDATE, (D,), torch.float32)
        z = reference.damped_update(z, step(z, rate, target), eps, 1.0, 0.1)
    torch.testing.assert_close(got.z, z)
    again = fixed_point(step, z0, rate, target, depth=3, tol=0, noise_scale=0.1, seed=7, ids=ids, slots=4)
    assert torch.equal(again.z, got.z)


def test_progress_and_stopping():
    calls = []

    def progress(ended, rows, spent):
        calls.append((ended, rows, spent))
        return spent < 200

    result = fixed_point(*case("tensor"), depth=2000, tol=1e-6, slots=8, progress=progress)
    assert calls[0] == (0, N, 0) and calls[-1][2] >= 200 and sorted(calls) == calls
    cancelled = result.status == Status.CANCELLED
    assert cancelled.any() and (result.steps[-16:] == 0).all() and not result.converged[cancelled].any()
    assert int(result.steps.sum()) == calls[-1][2]


def test_arguments_without_rows_are_given_as_they_are():
    weight = torch.eye(D)[None]
    seen = []

    def step(z, rate, bias, number, none):
        seen.append((bias.shape, number, none))
        return rate * z + bias

    fixed_point(step, torch.ones(N, D), RATE, torch.ones(1, D), 3, None, depth=5)
    assert set(seen) == {(torch.Size([1, D]), 3, None)} and weight.shape == (1, D, D)


def test_no_rows():
    result = fixed_point(contract, torch.zeros(0, D), torch.zeros(0, 1), torch.zeros(0, D), trace=True)
    assert result.z.shape == (0, D) and result.nfe == 0 and result.residuals.shape == (0, 64)


def test_what_is_given_is_not_changed():
    step, z0, rate, target = case("tensor")
    kept = z0.clone()
    fixed_point(step, z0, rate, target, depth=5)
    assert torch.equal(z0, kept)


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("step", "z0", "args", "options", "error", "message"),
    [
        (contract, [Z], (), {}, TypeError, r"z0 must be a tensor of floats \[N, ...\], or a tuple of such, got \("),
        (contract, Z.long(), (), {}, TypeError, "z0 must be a tensor of floats"),
        (contract, (Z, torch.zeros(5, 3)), (), {}, ValueError, r"all of one N and on one device, got \(torch.float32"),
        (contract, Z, (torch.zeros(5, 3),), {}, ValueError, r"args\[0\] must have a row for each of the 4 of z0"),
        (lambda z: z[:, :2], Z, (), {}, TypeError, r"step must give what it was given, torch.float32 \[4, 3\], got"),
        (lambda z: (z,), Z, (), {}, TypeError, "step must give what it was given"),
        (lambda z: z.double(), Z, (), {}, TypeError, r"got torch.float64 \[4, 3\]"),
        (lambda z: z, Z, (), dict(depth=0), ValueError, "depth must be at least 1, got 0"),
        (lambda z: z, Z, (), dict(tol=-1.0), ValueError, "tol must be finite and not negative"),
        (lambda z: z, Z, (), dict(solver="newton"), ValueError, "solver must be one of picard, anderson, got 'newton'"),
        (lambda z: z, Z, (), dict(lambda_=0.0), ValueError, "lambda_ must be above 0 and at most 1"),
        (
            lambda z: z,
            Z,
            (),
            dict(solver="anderson", noise_scale=0.1),
            ValueError,
            'noise_scale is for solver="picard"',
        ),
        (lambda z: z, Z, (), dict(slots=0), ValueError, "slots must be at least 1, got 0"),
        (lambda z: z, Z, (), dict(ids=torch.zeros(3).long()), ValueError, r"ids must have shape \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(step, z0, args, options, error, message):
    with pytest.raises(error, match=message):
        fixed_point(step, z0, *args, **options)
