"""Configs of every kind, models on the oracle's weights, and one outer step of a backend beside the oracle's."""

from __future__ import annotations

import numpy as np
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from tests.support import oracle


def make_config(**changes) -> EqRConfig:
    small = dict(
        seq_len=16,
        vocab_size=11,
        hidden_size=64,
        num_heads=4,
        H_cycles=2,
        L_cycles=3,
        L_layers=1,
        mlp_t=True,
        noise_scale=0.01,
    )
    return EqRConfig(**{**small, **changes})


ROPE2D = dict(mlp_t=False, pos_encodings="rope2d")


CONFIGS = {
    "mlp_t": make_config(),
    "mlp_t three layers": make_config(L_layers=3),
    "mlp_t odd sizes": make_config(seq_len=7, hidden_size=23, vocab_size=3, H_cycles=3, L_cycles=2, L_layers=2),
    "mlp_t noise 0.5, lambda 0.6": make_config(noise_scale=0.5, lambda_=0.6),
    "mlp_t start std": make_config(H_init_std=0.25, L_init_std=3.0),
    "mlp_t expansion 2.5, eps 0.1": make_config(expansion=2.5, hidden_size=160, rms_norm_eps=0.1),
    "mlp_t one cycle": make_config(H_cycles=1, L_cycles=1),
    "mlp_t silent": make_config(noise_scale=0.0),
    "attention rope": make_config(mlp_t=False, pos_encodings="rope"),
    "attention rope theta 100": make_config(mlp_t=False, pos_encodings="rope", rope_theta=100.0, L_layers=2),
    "attention rope2d": make_config(**ROPE2D),
    "attention rope2d 3x5": make_config(**ROPE2D, seq_len=15, board_height=3, board_width=5),
    "attention none": make_config(mlp_t=False, pos_encodings="none"),
    "attention odd sizes": make_config(mlp_t=False, pos_encodings="rope", seq_len=13, hidden_size=18, num_heads=3),
    "TRM mlp_t": make_config(lambda_=1.0, noise_scale=0.0, fixed_init=True),
    "TRM attention": make_config(lambda_=1.0, noise_scale=0.0, fixed_init=True, mlp_t=False, pos_encodings="rope"),
}


def build(cfg, dtype=torch.float32, seed=1):
    """A model with random weights rounded to `dtype`, and the same numbers as the oracle's dict."""
    model = EquilibriumReasoner(cfg).to(dtype).eval()
    w = oracle.random_weights(cfg, seed)
    if cfg.fixed_init:
        u = np.random.default_rng(seed).uniform(size=(2, cfg.hidden_size))
        w |= {"H_init": oracle.to_truncated_normal(u[0]), "L_init": oracle.to_truncated_normal(u[1])}
    state_dict = {key: torch.from_numpy(value).to(dtype) for key, value in w.items()}
    model.load_state_dict(state_dict, strict=True)
    return model, {key: to_numpy(value) for key, value in state_dict.items()}


def to_numpy(x):
    return x.detach().double().numpy()


def make_tokens(cfg, n, seed=3):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, cfg.vocab_size, (n, cfg.seq_len)))


def relative(got, want):
    got = to_numpy(got) if isinstance(got, torch.Tensor) else got
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


SEED = 5


IDS = torch.tensor([-5, 2**62 + 12345])


def build_open(cfg: EqRConfig, seed: int = 1):
    """A model whose logits are z_H, and the oracle's weights."""
    model, w = build(EqRConfig.from_dict({**cfg.to_dict(), "vocab_size": cfg.hidden_size}), seed=seed)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(cfg.hidden_size))
    w["lm_head.weight"] = np.eye(cfg.hidden_size)
    return model, w


def one_step(model, w, backend, precision, n=2):
    """What one outer step gives, and what the oracle gives: (z_H, q_halt, residual) each."""
    cfg, tokens = model.config, make_tokens(model.config, n)
    rng = [(SEED, 0, i, 0) for i in IDS[:n].tolist()]
    start = oracle.start(cfg, rng, w, cfg.fixed_init)
    z_H, z_L, logits, q_halt = oracle.outer_step(w, cfg, tokens.numpy(), *start, rng)
    want = logits, q_halt, oracle.residual(z_H, z_L, *start)
    options = dict(depth=1, halt="none", seed=SEED, ids=IDS[:n], noise_scale=cfg.noise_scale)
    got = model.solve(tokens, backend=backend, precision=precision, **options)
    return (got.logits, got.q_halt, got.residual), want


ODD = {
    "one token": make_config(seq_len=1, hidden_size=8),
    "one feature": make_config(seq_len=5, hidden_size=1, H_cycles=1),
    "a token more than a tile": make_config(seq_len=10, hidden_size=33, H_cycles=1),
    "a feature more than a panel": make_config(seq_len=19, hidden_size=65, H_cycles=1, L_layers=2),
    "attention, heads of 1": make_config(seq_len=21, hidden_size=7, num_heads=7, mlp_t=False, pos_encodings="none"),
    "attention, more keys than a chunk": make_config(
        seq_len=270, hidden_size=36, num_heads=2, H_cycles=1, L_cycles=1, mlp_t=False, pos_encodings="rope"
    ),
    "attention rope2d, heads of 20": make_config(
        **ROPE2D, seq_len=35, board_height=5, board_width=7, hidden_size=40, num_heads=2
    ),
}


ALL = {**CONFIGS, **ODD}


# The error of a bf16 kernel may be 1.1 times that of PyTorch in bf16, on the same weights, which are rounded to bf16 on
# both sides so that only arithmetic shows.
BF16 = {
    "mlp_t, two modules": make_config(seq_len=9, hidden_size=32, H_cycles=1, L_cycles=1),
    "mlp_t, an outer step": make_config(seq_len=9, hidden_size=32),
    "mlp_t, two layers": make_config(seq_len=16, hidden_size=40, L_layers=2),
    "attention, two modules": make_config(
        seq_len=20, hidden_size=32, num_heads=2, H_cycles=1, L_cycles=1, mlp_t=False, pos_encodings="rope"
    ),
    "attention, an outer step": make_config(seq_len=9, hidden_size=32, mlp_t=False, pos_encodings="rope"),
}


def bf16_errors(cfg: EqRConfig, seed: int, backend: str) -> list[float]:
    """Of an outer step's logits in bf16 against float64: the backend's and the reference's."""
    model, _ = build_open(cfg, seed)
    model = model.bfloat16()
    w = {key: to_numpy(value) for key, value in model.state_dict().items()}
    errors = []
    for name in (backend, "reference"):
        got, want = one_step(model, w, name, "bf16")
        errors.append(relative(got[0], want[0]))
    return errors
