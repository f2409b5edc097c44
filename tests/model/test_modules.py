"""The module as torch sees it: compiled, cast, moved, and called with what it cannot take."""

from __future__ import annotations

import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from tests.support.environment import BUILT, needs_compiler
from tests.support.models import make_contractive, tiny_config


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mixer", [dict(), dict(mlp_t=False, pos_encodings="rope")], ids=["mlp_t", "attention"])
def test_compiled_module_equals_eager(puzzles, mixer):
    # The compiler unrolls the cycles: its time goes by them.
    model = make_contractive(tiny_config(noise_scale=0.01, H_cycles=1, L_cycles=1, **mixer))
    compiled = torch.compile(model, fullgraph=True)
    state, other = model.initial_state(puzzles), model.initial_state(puzzles)
    with torch.no_grad():
        for _ in range(2):
            state, logits, q_halt = model(puzzles, state)
            other, compiled_logits, compiled_q = compiled(puzzles, other)
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled_q, q_halt, rtol=1e-4, atol=1e-4)
    assert torch.equal(other.step, state.step)


def test_half_and_double():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = make_contractive(tiny_config(noise_scale=0.01)).to(dtype)
        state = model.initial_state(3)
        assert state.z_H.dtype == dtype
        with torch.no_grad():
            state, logits, _ = model(torch.ones(3, 6, dtype=torch.long), state)
        assert state.z_L.dtype == logits.dtype == dtype and logits.isfinite().all()


def test_the_state_that_comes_back_is_detached():
    model = make_contractive(tiny_config()).train()
    state, logits, q_halt = model(torch.ones(2, 6, dtype=torch.long), model.initial_state(2))
    assert not state.z_H.requires_grad and not state.z_L.requires_grad
    assert logits.requires_grad and q_halt.requires_grad


def test_initial_state_keys():
    model = make_contractive(tiny_config())
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5]])
    by_tokens = model.initial_state(tokens)
    assert by_tokens.ids[0] != by_tokens.ids[1]
    assert torch.equal(model.initial_state(tokens.flip(0)).z_H, by_tokens.z_H.flip(0))
    by_number = model.initial_state(2)
    assert by_number.ids.tolist() == [0, 1]
    restarts = model.initial_state(2, ids=torch.tensor([5, 5]), restart=torch.tensor([0, 1]))
    assert not torch.equal(restarts.z_H[0], restarts.z_H[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(n=-1), ValueError, "n must not be negative, got -1"),
        (dict(n=1.5), TypeError, "n must be an int or a tokens tensor"),
        (dict(n=2, seed=-1), ValueError, "seed"),
        (dict(n=2, restart=-1), ValueError, "restart"),
        (dict(n=2, restart=1.5), TypeError, "restart must be an int"),
        (dict(n=2, restart=torch.tensor([0, 2**40])), ValueError, r"restart must be in 0..2\*\*32 - 1, got 10995"),
        (dict(n=2, restart=torch.zeros(3, dtype=torch.long)), ValueError, r"or have shape \[2\]"),
        (dict(n=2, ids=torch.zeros(2)), TypeError, "ids must be an int64 tensor"),
    ],
)
def test_bad_starts(options, error, message):
    with pytest.raises(error, match=message):
        make_contractive(tiny_config()).initial_state(**options)


def test_bad_states():
    model = make_contractive(tiny_config())
    state, tokens = model.initial_state(2), torch.ones(2, 6, dtype=torch.long)
    bad = [
        (state._replace(z_H=state.z_H[:1]), "state.z_H must be torch.float32 of shape"),
        (state._replace(z_L=state.z_L.double()), "state.z_L must be torch.float32"),
        (state._replace(step=state.step + 2**24), "state.step must be in"),
        (state._replace(seed=state.seed - 1), "state.seed must be in"),
        (state._replace(restart=state.restart[:1]), r"state.restart must have shape \[2\], got \[1\]"),
        (state._replace(ids=state.ids[:1]), r"ids must have shape \[2\]"),
    ]
    for wrong, message in bad:
        with pytest.raises(ValueError, match=message):
            model(tokens, wrong)
    for wrong, message in [
        (None, "state must be a LatentState"),
        (state._replace(step=0), "state.step must be a tensor"),
    ]:
        with pytest.raises(TypeError, match=message):
            model(tokens, wrong)
    with pytest.raises(ValueError, match="noise_scale must be finite and not negative, got nan"):
        model(tokens, state, noise_scale=float("nan"))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(hidden=4), ValueError, "no field 'hidden'; did you mean 'hidden_size'"),
        (dict(hidden_size=0), ValueError, "hidden_size must be at least 1, got 0"),
        (dict(hidden_size=1.5), TypeError, "hidden_size must be an int"),
        (dict(lambda_=0), ValueError, r"lambda_ must be in \(0, 1\]"),
        (dict(noise_scale=-1), ValueError, "noise_scale must be finite and not negative"),
        (dict(mlp_t=1), TypeError, "mlp_t must be a bool"),
        (dict(H_cycles=20, L_cycles=20), ValueError, "must be at most 254"),
        (dict(mlp_t=False, hidden_size=10, num_heads=3), ValueError, "multiple of num_heads"),
        (dict(mlp_t=False, hidden_size=9, num_heads=3, pos_encodings="rope"), ValueError, "multiple of 2"),
        (dict(mlp_t=False, seq_len=10, pos_encodings="rope2d"), ValueError, "board_height"),
        (dict(pos_encodings="alibi"), ValueError, 'must be "rope", "rope2d" or "none"'),
        (dict(expansion=0), ValueError, "expansion must be positive"),
        (dict(halt_exploration_prob=2), ValueError, "halt_exploration_prob"),
    ],
)
def test_bad_configs(fields, error, message):
    with pytest.raises(error, match=message):
        EqRConfig.from_dict(fields)


def test_presets_have_the_published_sizes():
    sudoku = EqRConfig.sudoku_paper()
    assert sudoku.layers_per_step == 42 and sudoku.updates_per_step == 21
    assert sum(p.numel() for p in EquilibriumReasoner(sudoku).parameters()) == 4_855_298
    assert EqRConfig.maze().head_dim == 16
    assert EqRConfig.from_dict(sudoku.to_dict()) == sudoku


def test_the_config_must_be_one():
    with pytest.raises(TypeError, match="EqRConfig.from_dict"):
        EquilibriumReasoner({"seq_len": 81})


def test_inference_mode_leaves_the_module_trainable():
    model = make_contractive(tiny_config(mlp_t=False, pos_encodings="rope"))
    tokens = torch.ones(2, 6, dtype=torch.long)
    with torch.inference_mode():
        model.solve(tokens, depth=1, halt="none")
    _, logits, _ = model.train()(tokens, model.initial_state(2))
    logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_a_card_is_a_model_card():
    model = EquilibriumReasoner(tiny_config())
    with pytest.raises(TypeError, match="card must be a ModelCard or None, got dict; use ModelCard.from_json"):
        model.card = {"tol": 0.1}
    assert model.card is None


@pytest.mark.parametrize("mlp_t", [True, False])
def test_hidden_units_of_a_toy_model_are_not_padded_where_multiple_of_says_so(mlp_t, tmp_path):
    config = tiny_config(mlp_t=mlp_t, multiple_of=4, pos_encodings="rope" if not mlp_t else "none")
    assert [config.swiglu_size(size) for size in (6, 16)] == [16, 44]
    model = make_contractive(config)
    assert model.L_level.layers[0].mlp.down_proj.weight.shape == (16, 44)
    tokens = torch.randint(1, 7, (4, 6), generator=torch.Generator().manual_seed(0))
    want = model.solve(tokens, depth=6, halt="none", backend="reference")
    got = model.solve(tokens, depth=6, halt="none")
    assert got.backend == ("cpu" if BUILT else "reference")
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = EquilibriumReasoner.from_pretrained(tmp_path)
    assert loaded.config == config and torch.equal(loaded.solve(tokens, depth=6, halt="none").logits, got.logits)
