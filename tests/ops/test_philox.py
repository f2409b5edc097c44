"""The random words and normals: csrc against eqr_kernels.noise, both against the published vectors and the layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqr_kernels import noise, ops

available, why = ops.extension_status()
compiled = pytest.mark.skipif(not available, reason=why)
ISAS = ops.cpu_isas() if available else []

# Philox4x32-10 in the file kat_vectors of Random123: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def rng_rows(*rows: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


seeds = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
ids = st.one_of(st.sampled_from([0, -1, 2**32, 2**63 - 1, -(2**63)]), st.integers(-(2**63), 2**63 - 1))
steps = st.one_of(st.sampled_from([0, 2**24 - 1]), st.integers(0, 2**24 - 1))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_noise_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([w]) for w in words(counter))
    k0, k1 = (torch.tensor([w]) for w in words(key))
    assert [int(w) for w in noise.philox((c0, c1, c2, c3), (k0, k1))] == words(expected)


@compiled
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_csrc_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    from eqr_kernels import _C

    assert _C.philox4x32_10(words(counter), words(key)) == words(expected)


@compiled
@given(seed=seeds, restart=seeds, row_id=ids, step=steps, stream=st.integers(0, 255), element=st.integers(0, 5000))
@settings(max_examples=30, deadline=None)
def test_layout_of_key_and_counter(seed: int, restart: int, row_id: int, step: int, stream: int, element: int) -> None:
    from eqr_kernels import _C

    counter = [element // 4, step << 8 | stream, row_id & 0xFFFFFFFF, row_id >> 32 & 0xFFFFFFFF]
    expected = _C.philox4x32_10(counter, [seed, restart])[element % 4]
    rng = rng_rows((seed, restart, row_id, step))
    assert int(ops.philox_words(rng, stream, element + 1)[0, element]) == expected
    assert int(noise.philox_words(rng, stream, element + 1)[0, element]) == expected


@compiled
@given(
    rows=st.lists(st.tuples(seeds, seeds, ids, steps), min_size=1, max_size=4),
    stream=st.integers(0, 255),
    numel=st.one_of(st.integers(0, 140), st.sampled_from([1023, 1024, 1025, 4099])),
)
@settings(max_examples=40, deadline=None)
def test_words_agree_bit_for_bit(rows: list[tuple[int, int, int, int]], stream: int, numel: int) -> None:
    rng = rng_rows(*rows)
    expected = noise.philox_words(rng, stream, numel)
    before = ops.cpu_isa()
    for name in ISAS:
        ops.set_cpu_isa(name)
        assert torch.equal(ops.philox_words(rng, stream, numel), expected), name
    ops.set_cpu_isa(before)


@compiled
def test_normals_are_accurate_to_float32() -> None:
    rng = rng_rows((1, 0, -5, 0), (2**32 - 1, 7, 2**62, 2**24 - 1))
    numel = 100_000
    exact = noise.normal(rng, 9, (numel,), torch.float64)
    got = ops.philox_normal(rng, 9, numel)
    assert got.dtype == torch.float32
    assert float(((got - exact) / exact).abs().max()) < 4e-7


@compiled
def test_normals_have_the_moments_of_a_normal() -> None:
    n = 1_000_000
    x = ops.philox_normal(rng_rows((3, 1, 4, 1)), 2, n)[0].double()
    bound = 4 / n**0.5
    assert abs(float(x.mean())) < bound
    assert abs(float((x**2).mean()) - 1) < bound * 2**0.5
    assert abs(float((x**3).mean())) < bound * 15**0.5
    assert abs(float((x**4).mean()) - 3) < bound * 96**0.5
    for lag in (1, 2, 3, 4, 1024):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < bound
    assert 4.5 < float(x.abs().max()) < 5.8


@compiled
@pytest.mark.parametrize("numel", [1, 3, 5, 63, 1023, 1027, 9000])
def test_normals_have_the_same_bits_on_every_isa_and_any_prefix(numel: int) -> None:
    rng = rng_rows((0, 0, 0, 0), (5, 6, 7, 8))
    before = ops.cpu_isa()
    longer = ops.philox_normal(rng, 1, 9100)
    for name in ISAS:
        ops.set_cpu_isa(name)
        assert torch.equal(ops.philox_normal(rng, 1, numel), longer[:, :numel]), name
    ops.set_cpu_isa(before)


@compiled
def test_no_rows_and_no_elements() -> None:
    assert ops.philox_words(torch.empty(0, 4, dtype=torch.int64), 0, 8).shape == (0, 8)
    assert ops.philox_normal(rng_rows((1, 2, 3, 4)), 0, 0).shape == (1, 0)


@compiled
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ((-1, 0, 0, 0), "seed"),
        ((2**32, 0, 0, 0), "seed"),
        ((0, 2**32, 0, 0), "restart"),
        ((0, -1, 0, 0), "restart"),
        ((0, 0, 0, 2**24), "step"),
        ((0, 0, 0, -1), "step"),
    ],
)
def test_columns_out_of_range(row: tuple[int, int, int, int], column: str) -> None:
    rng = rng_rows((0, 0, 0, 0), row)
    for op in (ops.philox_words, ops.philox_normal):
        with pytest.raises(ValueError, match=rf"\({column}\) must be in 0..2\*\*\d\d - 1, got -?\d+ in row 1"):
            op(rng, 0, 4)


@compiled
@pytest.mark.parametrize("stream", [-1, 256])
def test_stream_out_of_range(stream: int) -> None:
    with pytest.raises(ValueError, match=f"stream must be in 0..255, got {stream}"):
        ops.philox_words(rng_rows((0, 0, 0, 0)), stream, 4)
    with pytest.raises(ValueError, match=f"stream must be in 0..255, got {stream}"):
        torch.ops.eqr_kernels.philox_words(rng_rows((0, 0, 0, 0)), stream, 4)


@compiled
@pytest.mark.parametrize("rng", [torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32)])
def test_rng_of_another_dtype(rng: Tensor) -> None:
    with pytest.raises(TypeError, match="rng must be an int64 tensor"):
        ops.philox_words(rng, 0, 4)
    with pytest.raises(ValueError, match="rng must be a contiguous int64 tensor"):
        torch.ops.eqr_kernels.philox_words(rng, 0, 4)


@compiled
@pytest.mark.parametrize(
    "rng",
    [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64).t()],
)
def test_rng_of_another_shape(rng: Tensor) -> None:
    if rng.shape == (4, 4):
        rng = torch.zeros(4, 8, dtype=torch.int64)[:, ::2]
    with pytest.raises(ValueError, match=r"rng must be contiguous \[n, 4\]"):
        ops.philox_words(rng, 0, 4)
    with pytest.raises(ValueError, match="rng must be a contiguous int64 tensor"):
        torch.ops.eqr_kernels.philox_words(rng, 0, 4)


@compiled
@pytest.mark.parametrize("numel", [-1, 2**34])
def test_numel_out_of_range(numel: int) -> None:
    with pytest.raises(ValueError, match="numel must be in"):
        torch.ops.eqr_kernels.philox_words(rng_rows((0, 0, 0, 0)), 0, numel)


@compiled
def test_unknown_isa() -> None:
    with pytest.raises(
        ValueError, match="'sse9', which this build or this machine does not have; choose from portable"
    ):
        ops.set_cpu_isa("sse9")


@compiled
@pytest.mark.parametrize("op", ["philox_words", "philox_normal"])
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.eqr_kernels, op).default, (rng_rows((1, 2, 3, 4), (5, 6, 7, 8)), 3, 21))
