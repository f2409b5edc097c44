"""The Triton kernels in the interpreter against the float64 oracle: random numbers, and one outer step of each kind.

As in tests/ops/test_outer_step.py the vocabulary is as wide as the state and lm_head is the identity: the logits are
z_H itself.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from eqr_kernels import noise
from eqr_kernels.backends.triton import adapter
from tests.support import oracle
from tests.support.oracle_cases import (
    BF16,
    ROPE2D,
    bf16_errors,
    build_open,
    make_config,
    make_tokens,
    one_step,
    relative,
)
from tests.support.triton_tiles import with_tiles

IN_INTERPRETER = True
pytest_plugins = ["tests.support.triton_interpreter"]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")

if adapter.interpreting():  # in the child; an import of Triton elsewhere would settle that it compiles
    import triton
    import triton.language as tl

    from eqr_kernels.ops.triton import philox

    @triton.jit
    def rounded(x, out, n: tl.constexpr):
        i = tl.arange(0, n)
        tl.store(out + i, tl.load(x + i).to(tl.bfloat16).to(tl.float32))

    @triton.jit
    def added(x, out, n: tl.constexpr):
        i = tl.arange(0, n)
        tl.store(out + i, (tl.load(x + i).to(tl.bfloat16) + tl.load(x + i).to(tl.bfloat16)).to(tl.float32))

    @triton.jit
    def draw(rng, words, normals, starts, stream, m: tl.constexpr, n: tl.constexpr, by_element: tl.constexpr):
        seed = tl.load(rng).to(tl.uint32)
        restart = tl.load(rng + 1).to(tl.uint32)
        ident = tl.load(rng + 2)
        low = (ident & 0xFFFFFFFF).to(tl.uint32)
        high = ((ident >> 32) & 0xFFFFFFFF).to(tl.uint32)
        c1 = (tl.load(rng + 3) * 256 + stream).to(tl.uint32)
        element = tl.arange(0, m)[:, None] * n + tl.arange(0, n)[None, :]
        word = philox.word_of_element(element.to(tl.uint32), c1, low, high, seed, restart)
        tl.store(words + element, word.to(tl.int64))
        tl.store(starts + element, philox.truncated_normal(word))
        if by_element:
            normal = philox.normals_by_element(element.to(tl.uint32), c1, low, high, seed, restart)
        else:
            counter = tl.arange(0, m)[:, None] * (n // 4) + tl.arange(0, n // 4)[None, :]
            normal = philox.normals_by_four(counter.to(tl.uint32), c1, low, high, seed, restart)
        tl.store(normals + element, normal)


SMALL = dict(hidden_size=32, H_cycles=1, L_cycles=2)
CONFIGS = {
    "mlp_t": make_config(**SMALL, seq_len=9),
    "mlp_t, two recursions": make_config(seq_len=9, hidden_size=16, H_cycles=2, L_cycles=1),
    "mlp_t, two layers": make_config(**SMALL, seq_len=16, L_layers=2),
    "mlp_t, odd sizes": make_config(seq_len=7, hidden_size=23, vocab_size=3, H_cycles=1, L_cycles=1),
    "mlp_t, silent": make_config(**SMALL, seq_len=9, noise_scale=0.0),
    "mlp_t, noise 0.5, lambda 0.6": make_config(**SMALL, seq_len=9, noise_scale=0.5, lambda_=0.6),
    "mlp_t, start std, eps 0.1": make_config(**SMALL, seq_len=9, H_init_std=0.25, L_init_std=3.0, rms_norm_eps=0.1),
    "one token": make_config(seq_len=1, hidden_size=8, H_cycles=1, L_cycles=1),
    "one feature": make_config(seq_len=5, hidden_size=1, H_cycles=1, L_cycles=1),
    "rope": make_config(**SMALL, seq_len=9, mlp_t=False, pos_encodings="rope", rope_theta=100.0),
    "rope2d": make_config(**SMALL, **ROPE2D, seq_len=15, board_height=3, board_width=5),
    "no positions, odd sizes": make_config(
        seq_len=13, hidden_size=21, num_heads=7, H_cycles=1, L_cycles=1, mlp_t=False, pos_encodings="none"
    ),
    "fixed start": make_config(**SMALL, seq_len=9, lambda_=1.0, noise_scale=0.0, fixed_init=True),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_fp32_matches_the_oracle(cfg):
    model, w = build_open(cfg)
    got, want = one_step(model, w, "triton", "fp32")
    assert max(relative(*pair) for pair in zip(got, want, strict=True)) < 2e-5


SMALL_TILES = dict(
    tokens=16,
    columns=16,
    hidden=128,
    pairs=16,
    inner=64,
    mix_features=16,
    mix_units=128,
    queries=16,
    keys=16,
    row_tokens=16,
    row_features=32,
)


@pytest.mark.parametrize(
    ("cfg", "changes"),
    [
        (make_config(seq_len=18, hidden_size=40, H_cycles=1, L_cycles=1), {}),
        (make_config(seq_len=18, hidden_size=40, H_cycles=1, L_cycles=1), dict(one_pass=False)),
        (make_config(seq_len=130, hidden_size=8, H_cycles=1, L_cycles=1), dict(tokens=64, row_tokens=64)),
        (
            make_config(
                seq_len=35, hidden_size=40, num_heads=2, H_cycles=1, L_cycles=1, mlp_t=False, pos_encodings="rope"
            ),
            {},
        ),
    ],
    ids=["one pass", "two passes", "more tokens than a tile", "attention"],
)
@pytest.mark.parametrize("calls", [False, True], ids=["inlined", "called"])
def test_fp32_matches_the_oracle_in_small_tiles(cfg, changes, calls, monkeypatch):
    with_tiles(monkeypatch, **{**SMALL_TILES, **changes}, calls=calls)
    model, w = build_open(cfg)
    got, want = one_step(model, w, "triton", "fp32", n=1)
    assert max(relative(*pair) for pair in zip(got, want, strict=True)) < 2e-5


BF16_CONFIGS = {
    **{name: BF16[name] for name in ("mlp_t, two modules", "attention, two modules")},
    "mlp_t, two layers": make_config(seq_len=16, hidden_size=40, H_cycles=1, L_cycles=2, L_layers=2),
    "attention, rope2d": make_config(**SMALL, **ROPE2D, seq_len=9),
    "attention, no positions": make_config(**SMALL, mlp_t=False, seq_len=9),
}


@pytest.mark.slow
@pytest.mark.parametrize("cfg", BF16_CONFIGS.values(), ids=BF16_CONFIGS.keys())
def test_bf16_error_is_within_that_of_pytorch(cfg):
    ours, torchs = np.array([bf16_errors(cfg, seed, "triton") for seed in range(4)]).T
    assert np.sqrt((ours**2).mean()) <= 1.1 * np.sqrt((torchs**2).mean()), (ours, torchs)
    assert ours.min() > 1e-3, "not computed in bf16"


def test_bf16_in_the_interpreter_rounds_and_refuses():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:3] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, float("inf")])  # two ties
    out = torch.empty_like(x)
    rounded[(1,)](x, out, 1024)
    assert torch.equal(out, x.bfloat16().float())
    with pytest.raises(Exception, match="cast to float32 first"):
        added[(1,)](x, out, 1024)


# ---- random numbers --------------------------------------------------------------------------------------------------

ROWS = [(4_000_000_001, 7, -5, 2**24 - 1), (0, 0, 0, 0), (2**32 - 1, 2**32 - 1, 2**62 + 12345, 3)]


def drawn(row, stream, m, n, by_element):
    """Words int64 [m, n], normals and truncated normals float32 [m, n]."""
    words = torch.empty(m, n, dtype=torch.int64)
    normals, starts = torch.empty(2, m, n)
    draw[(1,)](torch.tensor(row), words, normals, starts, stream, m, n, by_element)
    return words, normals, starts


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("by_element", [True, False])
def test_random_numbers_are_those_of_the_layout(row, by_element):
    m, n, stream = 32, 128, 255
    words, normals, starts = drawn(row, stream, m, n, by_element)
    rng = torch.tensor([row])
    assert torch.equal(words.flatten(), noise.philox_words(rng, stream, m * n)[0])
    assert words.flatten().tolist() == [int(word) for word in oracle.words(*row, stream, m * n)]
    # The library's tolerance for float32: angles up to 2 pi rounded to 2.4e-7, radii up to 5.8.
    np.testing.assert_allclose(normals.numpy(), oracle.normal(*row, stream, (m, n)), rtol=1e-6, atol=2e-6)
    want = oracle.truncated_normal(*row, stream, (m, n))
    np.testing.assert_allclose(starts.numpy(), want, rtol=2e-6, atol=2e-7)


def test_a_step_draws_the_noise_of_its_number():
    """Two outer steps, each with streams of its own: noise so large that another draw could not pass."""
    cfg = make_config(seq_len=6, hidden_size=16, H_cycles=1, L_cycles=1, noise_scale=0.5)
    model, w = build_open(cfg)
    tokens, ids = make_tokens(cfg, 1), torch.tensor([2**62 + 1])
    result = model.solve(
        tokens,
        depth=2,
        breadth=2,
        seed=2**32 - 1,
        ids=ids,
        halt="none",
        noise_scale=0.5,
        backend="triton",
        checkpoints=(1, 2),
    )
    for restart in range(2):
        row = (2**32 - 1, restart, 2**62 + 1)
        z = old = oracle.start(cfg, [(*row, 0)])
        for step in range(2):
            old = z
            *z, _, q_halt = oracle.outer_step(w, cfg, tokens.numpy(), *z, [(*row, step)])
            at = result.at[step + 1]
            assert float(at.all_residual[0, restart]) == pytest.approx(oracle.residual(*z, *old)[0], rel=1e-4)
            assert float(at.all_q_halt[0, restart]) == pytest.approx(q_halt[0], rel=1e-3)
