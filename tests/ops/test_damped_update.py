"""The op damped_update: against float64, bitwise invariances, values that are not finite, torch's own op checks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqr_kernels import noise, ops, reference

available, why = ops.extension_status()
pytestmark = pytest.mark.skipif(not available, reason=why)

ISAS = ops.cpu_isas() if available else []
ULP = 2.0**-24  # half a unit in the last place of float32, relative
# Rows of 1 element, less than a lane group, one short of a block, a block, one more, several blocks, ten and a bit.
SHAPES = [(1, 1, 1), (3, 7, 9), (2, 11, 93), (2, 32, 32), (2, 25, 41), (1, 81, 128), (3, 81, 64)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """z, u, z_prev [n, S, d] and rng [n, 4]"""
    generator = torch.Generator().manual_seed(seed)
    z, u, z_prev = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    n = shape[0]
    rng = noise.make_rng(2**32 - 5, torch.arange(n), torch.arange(n) * 2**40 - 3, torch.arange(n) + 7)
    return z, u, z_prev, rng


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Equal bit for bit, NaN included."""
    integer = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return all(torch.equal(x.view(integer[x.dtype]), y.view(integer[y.dtype])) for x, y in zip(a, b, strict=True))


@pytest.fixture
def restore():
    isa, threads = ops.cpu_isa(), torch.get_num_threads()
    yield
    ops.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def check_float32(shape: tuple[int, int, int], stream: int, lambda_: float, noise_scale: float, seed: int) -> None:
    z, u, z_prev, rng = inputs(shape, seed=seed)
    eps = noise.normal(rng, stream, shape[1:], torch.float64)
    terms = [(1 - lambda_) * z.double(), lambda_ * u.double(), noise_scale * eps]
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, stream, lambda_, noise_scale, z_prev)
    assert out.dtype == diff_sq.dtype == norm_sq.dtype == torch.float32
    # Each term is a rounded scalar times a value, rounded, and then two sums; the normals carry 4e-7 of their own.
    bound = 5 * ULP * (terms[0].abs() + terms[1].abs() + terms[2].abs()) + 4e-7 * terms[2].abs()
    assert bool(((out - sum(terms)).abs() <= bound).all())
    # A sum of squares of 2^10 a block in 64 lanes and a tree: about 30 roundings deep at most here.
    exact_diff = (out - z_prev).double().square().sum((1, 2))
    exact_norm = out.double().square().sum((1, 2))
    assert bool(((diff_sq - exact_diff).abs() <= 30 * ULP * exact_diff).all())
    assert bool(((norm_sq - exact_norm).abs() <= 30 * ULP * exact_norm).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_against_float64(shape: tuple[int, int, int], isa: str, restore: None) -> None:
    ops.set_cpu_isa(isa)
    check_float32(shape, stream=2, lambda_=0.95, noise_scale=0.01, seed=1)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70)),
    stream=st.integers(0, 255),
    lambda_=st.floats(0, 1),
    noise_scale=st.sampled_from([0.0, 0.01, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_float32_of_any_shape(
    shape: tuple[int, int, int], stream: int, lambda_: float, noise_scale: float, seed: int
) -> None:
    check_float32(shape, stream, lambda_, noise_scale, seed)


def test_hand_computed() -> None:
    rng = noise.make_rng(0, 0, torch.tensor([0]), 0)
    z, u, z_prev = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[3.0, 6.0]]]), torch.tensor([[[0.0, 5.0]]])
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, 0, 0.25, 0.0, z_prev)
    assert out.tolist() == [[[1.5, 0.0]]]
    assert (diff_sq.tolist(), norm_sq.tolist()) == ([2.25 + 25.0], [2.25])


@pytest.mark.parametrize("lambda_", [0.95, 1.0, 0.0])
def test_without_noise_equals_the_reference_bit_for_bit(lambda_: float) -> None:
    z, u, _, rng = inputs((3, 81, 64))
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, 2, lambda_, 0.0)
    assert same((out,), (reference.damped_update(z, u, None, lambda_, 0.0),))
    assert diff_sq.shape == norm_sq.shape == (0,)


def test_noise_is_that_of_the_row_and_the_stream() -> None:
    z = torch.zeros(3, 81, 64)
    _, _, _, rng = inputs((3, 81, 64))
    for stream in (2, 200):
        out, _, _ = ops.damped_update(z, z, rng, stream, 0.95, 1.0)
        assert same((out.flatten(1),), (ops.philox_normal(rng, stream, 81 * 64),))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_the_float32_result_rounded_once(shape: tuple[int, int, int]) -> None:
    z, u, z_prev, rng = inputs(shape, torch.bfloat16)
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, 5, 0.95, 0.01, z_prev)
    wide, _, _ = ops.damped_update(z.float(), u.float(), rng, 5, 0.95, 0.01)
    assert same((out,), (wide.bfloat16(),))
    # lambda_ = 1, no noise: passes the rounded state through, so that its sums are taken from the rounded values.
    passed = ops.damped_update(wide, out.float(), rng, 5, 1.0, 0.0, z_prev.float())
    assert same((out.float(), diff_sq, norm_sq), passed)


def test_bfloat16_rounds_every_pattern_as_torch_does() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    z = bits.to(torch.int16).view(torch.bfloat16).reshape(1, 256, 256)
    u = z.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].reshape(1, 256, 256)
    rng = noise.make_rng(0, 0, torch.tensor([0]), 0)
    out, _, _ = ops.damped_update(z, u, rng, 0, 0.5, 0.0)
    expected = (0.5 * z.float() + 0.5 * u.float()).bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert same(
        (out.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),),
        (expected.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_threads_isa_and_company(dtype: torch.dtype, restore: None) -> None:
    z, u, z_prev, rng = inputs((5, 81, 130), dtype)
    expected = ops.damped_update(z, u, rng, 2, 0.95, 0.01, z_prev)
    for isa in ISAS:
        ops.set_cpu_isa(isa)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert same(ops.damped_update(z, u, rng, 2, 0.95, 0.01, z_prev), expected), (isa, threads)
    for rows in ([0], [4], [3, 1], [4, 3, 2, 1, 0], [2, 2]):
        alone = ops.damped_update(z[rows], u[rows], rng[rows], 2, 0.95, 0.01, z_prev[rows])
        assert same(alone, tuple(x[rows] for x in expected)), rows


@pytest.mark.slow
def test_an_unknown_isa_in_the_environment_is_named() -> None:
    # In a process of its own, with tensors large enough for several threads.
    script = """
import torch
from eqr_kernels import noise, ops
torch.set_num_threads(2)
rng = noise.make_rng(0, 0, torch.arange(64), 0)
z = torch.zeros(64, 8, 1024)
for call in (lambda: ops.damped_update(z, z, rng, 2, 0.95, 0.01), lambda: ops.philox_normal(rng, 2, 8192)):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    environment = {**os.environ, "EQR_CPU_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = "EQR_CPU_ISA is 'avx1024', which this build or this machine does not have; choose from "
    assert len(lines) == 2 and all(expected + ", ".join(ISAS) in line for line in lines), lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "expected"), [(torch.nan, torch.nan), (torch.inf, torch.inf), (-torch.inf, torch.inf)]
)
@pytest.mark.parametrize("where", ["z", "u"])
def test_not_finite_stays_in_its_row(dtype: torch.dtype, value: float, expected: float, where: str) -> None:
    z, u, z_prev, rng = inputs((3, 30, 40), dtype)
    clean = ops.damped_update(z, u, rng, 2, 0.95, 0.01, z_prev)
    {"z": z, "u": u}[where][1, 29, 39] = value
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, 2, 0.95, 0.01, z_prev)
    for rows in ([0], [2]):
        assert same((out[rows], diff_sq[rows], norm_sq[rows]), tuple(x[rows] for x in clean))
    for got in (out[1, 29, 39].float() ** 2, diff_sq[1], norm_sq[1]):
        assert torch.equal(got, torch.tensor(expected)) or (got.isnan() and expected != expected)
    assert bool(out.flatten(1)[1, :-1].isfinite().all())


def test_not_finite_z_prev_marks_the_difference_alone() -> None:
    z, u, z_prev, rng = inputs((2, 30, 40))
    z_prev[0, 0, 0] = torch.nan
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, 2, 0.95, 0.01, z_prev)
    assert bool(out.isfinite().all() and norm_sq.isfinite().all() and diff_sq[1].isfinite() and diff_sq[0].isnan())


def test_overflow_of_a_sum_is_infinity() -> None:
    z, u, z_prev, rng = inputs((2, 30, 40))
    u[0, 0, 0] = 1e30
    out, diff_sq, norm_sq = ops.damped_update(z, u, rng, 2, 0.95, 0.01, z_prev)
    assert bool(out.isfinite().all() and diff_sq[0].isinf() and norm_sq[0].isinf() and norm_sq[1].isfinite())


def test_inputs_are_left_alone_and_may_alias() -> None:
    z, u, z_prev, rng = inputs((2, 9, 33))
    copies = [x.clone() for x in (z, u, z_prev, rng)]
    ops.damped_update(z, u, rng, 2, 0.95, 0.01, z_prev)
    assert all(torch.equal(x, y) for x, y in zip((z, u, z_prev, rng), copies, strict=True))
    apart = ops.damped_update(z, z.clone(), rng, 2, 0.95, 0.01, z.clone())
    assert same(ops.damped_update(z, z, rng, 2, 0.95, 0.01, z), apart)


@pytest.mark.parametrize("shape", [(0, 81, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, int, int]) -> None:
    z = torch.empty(shape)
    rng = torch.zeros(shape[0], 4, dtype=torch.int64)
    out, diff_sq, norm_sq = ops.damped_update(z, z, rng, 2, 0.95, 0.01, z)
    assert out.shape == shape
    assert diff_sq.tolist() == norm_sq.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_prev", [False, True])
def test_opcheck(dtype: torch.dtype, with_prev: bool) -> None:
    z, u, z_prev, rng = inputs((2, 5, 12), dtype)
    args = (z, u, rng, 2, 0.95, 0.01, z_prev if with_prev else None)
    torch.library.opcheck(torch.ops.eqr_kernels.damped_update.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend: str) -> None:
    z, u, z_prev, rng = inputs((2, 5, 12))

    def step(z: Tensor, u: Tensor, rng: Tensor, z_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, _, _ = ops.damped_update(z, u, rng, 2, 0.95, 0.01)
        return ops.damped_update(z, u, rng, 3, 0.95, 0.01, z_prev)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert same(compiled(z, u, rng, z_prev), step(z, u, rng, z_prev))
    torch._dynamo.reset()


def test_gradient_is_refused() -> None:
    z, u, _, rng = inputs((2, 5, 12))
    u.requires_grad_()
    with pytest.raises(
        RuntimeError, match="u requires a gradient, and damped_update has none; call it under torch.no_grad"
    ):
        ops.damped_update(z, u, rng, 2, 0.95, 0.01)
    with torch.no_grad():
        out, _, _ = ops.damped_update(z, u, rng, 2, 0.95, 0.01)
    assert not out.requires_grad


BAD = [
    (
        {"z": torch.zeros(2, 3, 4, dtype=torch.float64)},
        TypeError,
        "z must be a float32 or bfloat16 tensor, got torch.float64",
    ),
    ({"z": torch.zeros(2, 12)}, ValueError, r"z must be contiguous \[n, S, d\], got shape \[2, 12\]"),
    ({"z": torch.zeros(2, 4, 3).mT}, ValueError, r"z must be contiguous \[n, S, d\], got shape \[2, 3, 4\]"),
    ({"u": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}, TypeError, "u must be a tensor of the dtype of z"),
    (
        {"u": torch.zeros(2, 4, 4)},
        ValueError,
        r"u must be contiguous and of the shape of z, \[2, 3, 4\], got shape \[2, 4, 4\]",
    ),
    ({"u": torch.zeros(2, 4, 3).mT}, ValueError, r"use u.contiguous\(\)"),
    ({"z_prev": torch.zeros(1, 3, 4)}, ValueError, "z_prev must be contiguous and of the shape of z"),
    (
        {"rng": torch.zeros(3, 4, dtype=torch.int64)},
        ValueError,
        "rng must have one row for each of the 2 rows of z, got 3",
    ),
    ({"stream": 256}, ValueError, "stream must be in 0..255, got 256"),
    ({"lambda_": float("nan")}, ValueError, "lambda_ must be finite, got nan"),
    ({"noise_scale": -0.1}, ValueError, "noise_scale must be finite and at least 0, got -0.1"),
    ({"noise_scale": float("inf")}, ValueError, "noise_scale must be finite and at least 0, got inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {
        "z": torch.zeros(2, 3, 4),
        "u": torch.zeros(2, 3, 4),
        "rng": torch.zeros(2, 4, dtype=torch.int64),
        "stream": 2,
        "lambda_": 0.95,
        "noise_scale": 0.01,
        "z_prev": None,
    }
    ops.damped_update(**good)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        ops.damped_update(**{**good, **change})  # type: ignore[arg-type]
    # The op itself is safe to call without the wrapper.
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name} must"):
        torch.ops.eqr_kernels.damped_update(*{**good, **change}.values())
