"""The operator, its random numbers and its gradient against the independent float64 oracle and against hand values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqr_kernels import EqRConfig, EquilibriumReasoner, noise, reference
from eqr_kernels.reference import BlockWeights
from eqr_kernels.training.objective import objective
from eqr_kernels.training.optim import AdamATan2
from tests.support import oracle
from tests.support.oracle_cases import CONFIGS, ROPE2D, build, make_config, make_tokens, relative, to_numpy

IDS = [-5, 2**62 + 12345, 0]
SEED, RESTART = 4_000_000_001, 7


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Tiny matrices on a busy machine: threads that wait for each other make these tests up to 25 times slower.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


each_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


def make_rng(n, step=0):
    return [(SEED, RESTART, i, step) for i in IDS[:n]]


def start_state(model, n):
    return model.initial_state(n, seed=SEED, ids=torch.tensor(IDS[:n]), restart=RESTART)


def step_errors(model, w, cfg, n):
    """Relative errors of (z_H, z_L, logits, q_halt) after one outer step, each side from its own start state."""
    tokens, rng = make_tokens(cfg, n), make_rng(n)
    want = oracle.outer_step(w, cfg, tokens.numpy(), *oracle.start(cfg, rng, w, cfg.fixed_init), rng)
    with torch.no_grad():
        state, logits, q_halt = model(tokens, start_state(model, n))
    assert state.step.tolist() == [1] * n
    return [relative(*pair) for pair in zip((state.z_H, state.z_L, logits, q_halt), want, strict=True)]


# ---- one outer step ----------------------------------------------------------------------------------------------


@each_config
def test_fp32_outer_step_matches_oracle(cfg):
    model, w = build(cfg)
    assert max(step_errors(model, w, cfg, n=2)) < 2e-5


@each_config
def test_fp64_outer_step_matches_oracle(cfg):
    # float64 models draw float64 normals, so nothing here is rounded to fp32.
    model, w = build(cfg, torch.float64)
    assert max(step_errors(model, w, cfg, n=2)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg",
    [EqRConfig.sudoku_paper(), EqRConfig.sudoku_small(), EqRConfig.maze(H_cycles=1, L_cycles=1)],
    ids=["sudoku-paper", "sudoku-small", "maze, one cycle"],
)
def test_fp32_presets_match_oracle(cfg):
    model, w = build(cfg)
    assert max(step_errors(model, w, cfg, n=1)) < 2e-5


@pytest.mark.parametrize("name", ["mlp_t", "attention rope"])
def test_two_steps_draw_new_noise(name):
    cfg = make_config(**{**CONFIGS[name].to_dict(), "noise_scale": 0.2})
    model, w = build(cfg, torch.float64)
    tokens = make_tokens(cfg, 2)
    state, z = start_state(model, 2), oracle.start(cfg, make_rng(2))
    for step in range(2):
        with torch.no_grad():
            state, logits, _ = model(tokens, state)
        *z, want, _ = oracle.outer_step(w, cfg, tokens.numpy(), *z, make_rng(2, step))
    assert relative(state.z_H, z[0]) < 1e-11
    assert relative(logits, want) < 1e-11


# bf16 keeps 8 bits: half a unit in the last place is up to 2^-8 = 0.4 % of a number, and random weights amplify it over
# the F calls of a step. The bands are the least and the greatest error over weight seeds 1 to 16, of plain PyTorch
# arithmetic with fp32 norms, widened 1.5 times either way: below its band a model did not compute in bf16, above it
# something is coarser than bf16 needs to be.
TINY = dict(seq_len=9, hidden_size=32)
BF16_BANDS = {
    "mlp_t, one F each": (make_config(**TINY, H_cycles=1, L_cycles=1), 0.0041, 0.0145),
    "mlp_t": (make_config(**TINY), 0.0069, 0.029),
    "attention rope": (make_config(**TINY, mlp_t=False, pos_encodings="rope"), 0.0098, 0.044),
    "attention rope2d": (make_config(**TINY, **ROPE2D), 0.0092, 0.068),
}


@pytest.mark.parametrize("cfg, low, high", BF16_BANDS.values(), ids=BF16_BANDS.keys())
def test_bf16_error_is_in_its_band(cfg, low, high):
    model, w = build(cfg, torch.bfloat16)
    tokens, rng = make_tokens(cfg, 2), make_rng(2)
    start = start_state(model, 2)
    # The oracle takes the rounded weights and the rounded start, so that only the step's own arithmetic shows.
    want = oracle.outer_step(w, cfg, tokens.numpy(), to_numpy(start.z_H), to_numpy(start.z_L), rng)
    with torch.no_grad():
        state, logits, q_halt = model(tokens, start)
    assert {state.z_H.dtype, state.z_L.dtype, logits.dtype} == {torch.bfloat16}
    errors = [relative(*pair) for pair in zip((state.z_H, state.z_L, logits), want[:3], strict=True)]
    assert low < min(errors) and max(errors) < high, errors
    # q_halt is computed in the forward dtype and only then widened.
    assert q_halt.dtype == torch.float32 and torch.equal(q_halt, q_halt.bfloat16().float())


def test_bf16_norm_is_computed_in_fp32():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 500))).bfloat16()
    want = torch.from_numpy(oracle.rms_norm(to_numpy(x)))
    got = reference.rms_norm(x, 1e-5)
    assert got.dtype == torch.bfloat16
    # One rounding of an fp32 result: at most half a unit, and the nearest number but where the fp32 result meets a tie.
    assert (got == want.bfloat16()).double().mean() > 0.9995
    torch.testing.assert_close(got.double(), want, rtol=1.001 * 2.0**-8, atol=0)


def test_rope_angles_stay_fp32_in_bf16():
    cfg = EqRConfig.maze()
    rope = EquilibriumReasoner(cfg).bfloat16().rope()
    assert rope is not None and rope.cos.dtype == rope.sin.dtype == torch.float32
    turned = oracle.rope(np.eye(1, cfg.head_dim).repeat(cfg.seq_len, 0), "rope", 1e4, 30)  # x = (1, 0, ..., 0)
    np.testing.assert_allclose(rope.cos[:, 0].numpy(), turned[:, 0], atol=1e-6)
    np.testing.assert_allclose(rope.sin[:, 0].numpy(), turned[:, cfg.head_dim // 2], atol=1e-6)


@pytest.mark.parametrize("kind", ["rope", "rope2d"])
def test_bf16_rotation_is_computed_in_fp32(kind):
    cfg = EqRConfig.maze(num_heads=1, pos_encodings=kind)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((cfg.seq_len, cfg.hidden_size))).bfloat16()
    want = torch.from_numpy(oracle.rope(to_numpy(x), kind, 1e4, 30))
    got = reference._rotate(x[None, :, None], reference.rope_angles(cfg), cfg)[0, :, 0]
    assert got.dtype == torch.bfloat16
    assert (got == want.bfloat16()).double().mean() > 0.99


# ---- start states and state-dict keys ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)])
def test_random_start_matches_oracle(dtype, tolerance):
    cfg = make_config(seq_len=9, hidden_size=31, H_init_std=0.5, L_init_std=2.0)
    state = start_state(EquilibriumReasoner(cfg).to(dtype), 3)
    z_H, z_L = oracle.start(cfg, make_rng(3))
    assert state.z_H.dtype == state.z_L.dtype == dtype
    np.testing.assert_allclose(to_numpy(state.z_H), z_H, rtol=tolerance, atol=tolerance / 10)
    np.testing.assert_allclose(to_numpy(state.z_L), z_L, rtol=tolerance, atol=tolerance / 10)
    assert state.seed.tolist() == [SEED] * 3 and state.restart.tolist() == [RESTART] * 3
    assert state.ids.tolist() == IDS and state.step.tolist() == [0] * 3


def test_start_defaults_to_ids_in_order_and_restart_zero():
    cfg = make_config(seq_len=4, hidden_size=6)
    state = EquilibriumReasoner(cfg).double().initial_state(2, seed=9)
    z_H, z_L = oracle.start(cfg, [(9, 0, 0, 0), (9, 0, 1, 0)])
    assert relative(state.z_H, z_H) < 1e-14 and relative(state.z_L, z_L) < 1e-14


def test_fixed_start_is_the_buffers():
    cfg = CONFIGS["TRM mlp_t"]
    model, w = build(cfg)
    state = start_state(model, 2)
    for z, name in ((state.z_H, "H_init"), (state.z_L, "L_init")):
        np.testing.assert_array_equal(to_numpy(z), np.broadcast_to(w[name], z.shape))
    assert np.linalg.norm(w["H_init"] - w["L_init"]) > 1


@each_config
def test_state_dict_has_the_official_keys_and_shapes(cfg):
    got = {key: tuple(value.shape) for key, value in EquilibriumReasoner(cfg).state_dict().items()}
    buffers = {"H_init": (cfg.hidden_size,), "L_init": (cfg.hidden_size,)} if cfg.fixed_init else {}
    assert got == oracle.weight_shapes(cfg) | buffers


def test_weights_start_as_truncated_normals():
    torch.manual_seed(0)
    model = EquilibriumReasoner(EqRConfig.sudoku_small(L_layers=1))
    for key, value in model.state_dict().items():
        if key == "q_head.weight":
            assert (value == 0).all()
        elif key == "q_head.bias":
            assert (value == -5).all()
        else:  # std 1/sqrt(fan_in); the embedding's fan-in is d. The cut is at 2 / 0.8796 of it.
            unit = value.double() * math.sqrt(value.shape[-1])
            assert unit.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * value.numel()))
            assert abs(unit.mean().item()) < 4 / math.sqrt(value.numel())
            assert unit.abs().max() <= 2 / 0.8796256 + 1e-6
            if value.numel() > 20_000:
                assert unit.abs().max() > 2.26


# ---- random numbers ----------------------------------------------------------------------------------------------

# Random123's kat_vectors, philox4x32 10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexes(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    counter, key, result = hexes(counter), hexes(key), hexes(result)
    assert oracle.philox4x32(counter, key).tolist() == result
    c, k = (torch.tensor(x, dtype=torch.int64).unbind() for x in (counter, key))
    assert [int(word) for word in noise.philox(c, k)] == result


def test_words_of_zero_counters_are_the_first_known_answer():
    words = noise.philox_words(torch.zeros(1, 4, dtype=torch.int64), 0, 4)
    assert words.tolist() == [hexes(KNOWN_ANSWERS[0][2])]


word32 = st.integers(0, 2**32 - 1)
rng_row = st.tuples(word32, word32, st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**24 - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(rng_row, min_size=1, max_size=3), st.integers(0, 255), st.integers(1, 40))
def test_words_match_oracle_bit_for_bit(rows, stream, numel):
    got = noise.philox_words(torch.tensor(rows, dtype=torch.int64), stream, numel)
    want = [oracle.words(*row, stream, numel).astype(np.int64).tolist() for row in rows]
    assert got.tolist() == want


@pytest.mark.parametrize("shape", [(5, 7), (16, 64), (1,), (2,), (3,)])
def test_normals_match_oracle(shape):
    rows = [(SEED, RESTART, i, 2**24 - 1) for i in IDS]
    rng = torch.tensor(rows, dtype=torch.int64)
    want = np.stack([oracle.normal(*row, 255, shape) for row in rows])
    np.testing.assert_allclose(noise.normal(rng, 255, shape, torch.float64).numpy(), want, rtol=1e-13, atol=1e-14)
    # fp32: the angle, up to 2 pi, is rounded to 2.4e-7; the radius is at most 5.8.
    single = noise.normal(rng, 255, shape, torch.float32)
    np.testing.assert_allclose(single.numpy(), want, rtol=1e-6, atol=2e-6)
    half = noise.normal(rng, 255, shape, torch.bfloat16)
    assert torch.equal(half, single.bfloat16())


def test_normals_by_hand():
    # The first known answer's words, through Box and Muller, written out.
    u = [((int(word, 16) >> 9) + 0.5) / 2**23 for word in KNOWN_ANSWERS[0][2].split()]
    first, second = math.sqrt(-2 * math.log(u[0])), math.sqrt(-2 * math.log(u[2]))
    a, b = 2 * math.pi * u[1], 2 * math.pi * u[3]
    want = [first * math.cos(a), first * math.sin(a), second * math.cos(b), second * math.sin(b)]
    got = noise.normal(torch.zeros(1, 4, dtype=torch.int64), 0, (4,), torch.float64)[0].tolist()
    assert got == pytest.approx(want, rel=1e-13)
    assert oracle.normal(0, 0, 0, 0, 0, (4,)).tolist() == pytest.approx(want, rel=1e-13)


def test_normals_and_starts_have_the_right_moments():
    rng = torch.tensor([[1, 2, 3, 4]])
    x = noise.normal(rng, 2, (100_000,), torch.float64)[0]
    z = noise.start(rng, 0, (100_000,), torch.float64)[0]
    for sample, kurtosis in ((x, 3.0), (z, 2.37)):  # a normal cut at 2 of its deviations has kurtosis 2.37
        assert abs(sample.mean().item()) < 0.01
        assert sample.var().item() == pytest.approx(1, abs=0.02)
        assert (sample**4).mean().item() == pytest.approx(kurtosis, abs=0.08)
    assert x.abs().max() > 4
    assert 2.27 < z.abs().max() < 2 / 0.8796256


# ---- small cases worked by hand ----------------------------------------------------------------------------------


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_rms_norm_by_hand():
    # Token (1, 7): mean square 25; with eps 11 the divisor is sqrt(36) = 6. Token (0, 0) stays zero.
    x = double([[1.0, 7.0], [0.0, 0.0]])
    want = [[1 / 6, 7 / 6], [0.0, 0.0]]
    np.testing.assert_allclose(reference.rms_norm(x, 11.0).numpy(), want, rtol=1e-15)
    np.testing.assert_allclose(oracle.rms_norm(x.numpy(), 11.0), want, rtol=1e-15)
    # eps 1e-5 stands inside the root: (0.003, 0.004) has mean square 1.25e-5, the divisor is sqrt(2.25e-5).
    tiny = double([[0.003, 0.004]])
    want = [[0.003 / math.sqrt(2.25e-5), 0.004 / math.sqrt(2.25e-5)]]
    np.testing.assert_allclose(reference.rms_norm(tiny, EqRConfig().rms_norm_eps).numpy(), want, rtol=1e-14)
    np.testing.assert_allclose(oracle.rms_norm(tiny.numpy()), want, rtol=1e-14)


def test_swiglu_by_hand():
    ln3 = math.log(3)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
    x = double([[1.0, 2.0], [-1.0, 0.0]])
    gate_up = double([[ln3, 0], [0, 0], [1, 1], [5, 5]])  # gate rows, then up rows
    down = double([[2, 0], [1, 7]])
    # Token (1, 2): gate (ln 3, 0), up (3, 15): silu(gate) * up = (3/4 ln 3 * 3, 0); down: (2, 1) times the first.
    # Token (-1, 0): gate (-ln 3, 0), up (-1, -5): (-1/4 ln 3 * -1, 0).
    want = [[4.5 * ln3, 2.25 * ln3], [0.5 * ln3, 0.25 * ln3]]
    np.testing.assert_allclose(reference.swiglu(x, gate_up, down).numpy(), want, rtol=1e-15)
    np.testing.assert_allclose(oracle.swiglu(x.numpy(), gate_up.numpy(), down.numpy()), want, rtol=1e-15)


def test_block_mixes_tokens_then_features_by_hand():
    # Two tokens, two features. The token SwiGLU has down = 0, so the first half only normalises each feature over the
    # tokens: feature 0 holds (3, 4), mean square 12.5; feature 1 holds (1, 7), mean square 25. The second half has
    # down = 0 too and normalises each token over its features.
    cfg = make_config(seq_len=2, hidden_size=2, rms_norm_eps=0.0)
    zero_in, zero_out = torch.zeros(4, 2).double(), torch.zeros(2, 2).double()
    u = double([[[3.0, 1.0], [4.0, 7.0]]])
    a = [3 / math.sqrt(12.5), 1 / 5]
    b = [4 / math.sqrt(12.5), 7 / 5]
    want = [[[x / math.sqrt((t[0] ** 2 + t[1] ** 2) / 2) for x in t] for t in (a, b)]]
    got = reference.block(u, BlockWeights(zero_in, zero_out, zero_in, zero_out), None, cfg)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-14)
    names = ("mlp_t", "mlp")
    w = {f"L_level.layers.0.{name}.gate_up_proj.weight": zero_in.numpy() for name in names}
    w |= {f"L_level.layers.0.{name}.down_proj.weight": zero_out.numpy() for name in names}
    np.testing.assert_allclose(oracle.block(w, cfg, 0, u.numpy()), want, rtol=1e-14)


def test_attention_by_hand():
    # q = k = u = ((a, 0), (0, a)) with a^2 / sqrt(2) = ln 3: the softmax weights are 3/4 and 1/4. v = 2 u, o swaps.
    cfg = make_config(seq_len=2, hidden_size=2, num_heads=1, mlp_t=False, pos_encodings="none")
    a = math.sqrt(math.sqrt(2) * math.log(3))
    u, eye = double([[[a, 0.0], [0.0, a]]]), torch.eye(2).double()
    qkv, o = torch.cat([eye, eye, 2 * eye]), double([[0, 1], [1, 0]])
    want = [[[0.5 * a, 1.5 * a], [1.5 * a, 0.5 * a]]]
    got = reference.attention(u, BlockWeights(qkv, o, qkv, o), None, cfg)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-14)
    np.testing.assert_allclose(oracle.attention(u.numpy(), qkv.numpy(), o.numpy(), 1, "none", 1e4, 1), want, rtol=1e-14)


def test_rope_by_hand():
    # Head of 4, theta 1e4: the pair (x0, x2) turns by the position, (x1, x3) by a hundredth of it.
    x = np.tile([1.0, 0.0, 0.0, 1.0], (3, 1))
    turned = oracle.rope(x, "rope", 1e4, 1)[2]
    want = [math.cos(2), -math.sin(0.02), math.sin(2), math.cos(0.02)]
    np.testing.assert_allclose(turned, want, rtol=1e-14)
    rope = reference.rope_angles(make_config(seq_len=3, hidden_size=4, num_heads=1, mlp_t=False, pos_encodings="rope"))
    assert rope is not None
    np.testing.assert_allclose(rope.cos[2].numpy(), np.cos([2, 0.02, 2, 0.02]), rtol=1e-6)
    np.testing.assert_allclose(rope.sin[2].numpy(), np.sin([2, 0.02, 2, 0.02]), rtol=1e-6)
    # 2 x 3 board, token 5 at row 1, column 2: the first half (x0, x1) turns by the row, the second by the column.
    board = make_config(seq_len=6, hidden_size=4, num_heads=1, board_height=2, board_width=3, **ROPE2D)
    rope = reference.rope_angles(board)
    assert rope is not None
    np.testing.assert_allclose(rope.cos[5].numpy(), np.cos([1, 1, 2, 2]), rtol=1e-6)
    turned = oracle.rope(np.tile([1.0, 0.0, 0.0, 1.0], (6, 1)), "rope2d", 1e4, 3)[5]
    np.testing.assert_allclose(turned, [math.cos(1), math.sin(1), -math.sin(2), math.cos(2)], rtol=1e-14)


def test_damped_update_by_hand():
    z, u, eps = double([1.0, -2.0]), double([3.0, 4.0]), double([10.0, -10.0])
    got = reference.damped_update(z, u, eps, 0.75, 0.1)
    np.testing.assert_allclose(got.numpy(), [0.25 + 2.25 + 1, -0.5 + 3 - 1], rtol=1e-15)
    got = reference.damped_update(z, u, None, 0.75, 0.1)
    np.testing.assert_allclose(got.numpy(), [2.5, 2.5], rtol=1e-15)


# round(4 m 2/3), up to a multiple of 256: 2.67, 216, 256 exactly, 258.67, 341.3, 1365.3, 2400
@pytest.mark.parametrize("m, k", [(1, 256), (81, 256), (96, 256), (97, 512), (128, 512), (512, 1536), (900, 2560)])
def test_swiglu_hidden_size(m, k):
    assert EqRConfig(expansion=4.0).swiglu_size(m) == k
    assert oracle.swiglu_hidden(m, 4.0) == k


def test_swiglu_hidden_size_rounds_before_padding():
    # 0.5 * 769 * 2/3 = 256.33 rounds to 256, which needs no padding; 770 gives 256.67 -> 257 -> 512.
    assert [EqRConfig(expansion=0.5).swiglu_size(m) for m in (769, 770)] == [256, 512]
    assert [oracle.swiglu_hidden(m, 0.5) for m in (769, 770)] == [256, 512]


def test_objective_by_hand():
    # Stablemax of (1, 0, -1): s = (2, 1, 1/2), probabilities (4/7, 2/7, 1/7).
    x = [1.0, 0.0, -1.0]
    np.testing.assert_allclose(np.exp(oracle.log_stablemax(np.array(x))), [4 / 7, 2 / 7, 1 / 7], rtol=1e-15)
    # Label 0 is padding, so the classes are turned to make the best one class 1: probabilities (1/7, 4/7, 2/7).
    # Row 0 labels both tokens and gets the second wrong; row 1 labels one and gets it right. q_halt = ln 3 means
    # probability 3/4: the halting loss is -ln 1/4 for the wrong row and -ln 3/4 for the right one.
    logits = np.array([[np.roll(x, 1)] * 2] * 2)
    labels, q_halt = np.array([[1, 2], [0, 1]]), np.full(2, math.log(3))
    tokens = (math.log(7 / 4) + math.log(7 / 2)) / 2 + math.log(7 / 4)
    want = (tokens + 0.5 * (math.log(4) + math.log(4 / 3))) / 2
    assert oracle.loss(logits, q_halt, labels, ignore=0) == pytest.approx(want, rel=1e-15)
    loss, exact = objective(*(torch.from_numpy(a) for a in (logits, q_halt, labels)))
    assert loss.item() == pytest.approx(want, rel=1e-15) and exact.tolist() == [False, True]


def test_objective_matches_oracle():
    rng = np.random.default_rng(4)
    logits, q_halt = 5 * rng.standard_normal((6, 9, 11)), 3 * rng.standard_normal(6)
    labels = rng.integers(0, 11, (6, 9))
    logits[0, :, 0] -= 100
    labels[0] = np.where(np.arange(9) % 2, logits[0].argmax(1), 0)  # exactly right where labelled
    labels[1] = 0  # a row of padding
    logits[2, 0] = 0.0  # the join of stablemax's branches
    loss, exact = objective(*(torch.from_numpy(a) for a in (logits, q_halt, labels)))
    assert exact.tolist() == [True] + [False] * 5
    assert loss.item() == pytest.approx(oracle.loss(logits, q_halt, labels, ignore=0), rel=1e-14)


def test_adam_atan2_matches_oracle_and_hand():
    p, m, v = double([2.0, -1.0]), np.zeros(2), np.zeros(2)
    want = p.numpy().copy()
    parameter = torch.nn.Parameter(p)
    optimizer = AdamATan2([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    for t, gradient in enumerate(([3.0, -0.25], [-1.0, 0.0], [0.5, 8.0]), start=1):
        parameter.grad = double(gradient)
        optimizer.step()
        want, m, v = oracle.adam_atan2(want, np.array(gradient), m, v, t, 0.1, (0.9, 0.95), 0.5)
        np.testing.assert_allclose(parameter.detach().numpy(), want, rtol=1e-14)
        if t == 1:
            # m = 0.1 g and sqrt(v) / sqrt(1 - 0.95) = |g|: the step is lr / 0.1 * atan2(0.1 g, |g|), whatever |g| is.
            by_hand = [2.0 * 0.95 - math.atan(0.1), -1.0 * 0.95 + math.atan(0.1)]
            np.testing.assert_allclose(want, by_hand, rtol=1e-14)


# ---- gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp_t, pos_encodings", [(True, "none"), (False, "rope")], ids=["mlp_t", "attention"])
def test_training_gradient_flows_through_the_last_latent_recursion_only(mlp_t, pos_encodings):
    tiny = dict(seq_len=4, hidden_size=8, num_heads=2, vocab_size=5, L_cycles=2, L_layers=2, noise_scale=0.1)
    cfg = make_config(**tiny, mlp_t=mlp_t, pos_encodings=pos_encodings)
    model, w = build(cfg, torch.float64)
    model.train()
    tokens, labels, rng = make_tokens(cfg, 2), make_tokens(cfg, 2, seed=4), make_rng(2)

    state, logits, q_halt = model(tokens, start_state(model, 2))
    assert not state.z_H.requires_grad and not state.z_L.requires_grad
    loss, _ = objective(logits, q_halt, labels)
    loss.backward()

    args = cfg, tokens.numpy(), labels.numpy()
    start = oracle.start(cfg, rng)
    held = oracle.before_last_recursion(w, cfg, tokens.numpy(), *start, rng)

    def of_last_recursion(weights):
        return oracle.last_recursion_loss(weights, *args, *held, rng, ignore=0)

    def of_whole_step(weights):
        return oracle.loss(*oracle.outer_step(weights, cfg, tokens.numpy(), *start, rng)[2:], labels.numpy(), ignore=0)

    assert loss.item() == pytest.approx(of_last_recursion(w), rel=1e-12)
    assert of_last_recursion(w) == pytest.approx(of_whole_step(w), rel=1e-12)
    draw, h = np.random.default_rng(8), 1e-4
    for key, parameter in model.named_parameters():
        direction = draw.standard_normal(w[key].shape)
        direction /= np.linalg.norm(direction)
        moved = {k: {**w, key: w[key] + k * h * direction} for k in (-2, -1, 1, 2)}
        got = float((to_numpy(parameter.grad) * direction).sum())
        at = {k: of_last_recursion(m) for k, m in moved.items()}
        want = (at[-2] - 8 * at[-1] + 8 * at[1] - at[2]) / (12 * h)  # fourth order
        assert got == pytest.approx(want, rel=1e-6, abs=1e-9), key
        if key.startswith(("L_level", "embed")):  # the heads do not act on earlier recursions
            whole = (of_whole_step(moved[1]) - of_whole_step(moved[-1])) / (2 * h)
            assert abs(got - whole) > 1e-3 * abs(got), key
