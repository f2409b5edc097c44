"""Small models, one of which contracts (random weights do not)."""

from __future__ import annotations

import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner


def tiny_config(**changes: object) -> EqRConfig:
    """Six tokens of sixteen features: an outer step takes a millisecond."""
    sizes = dict(seq_len=6, vocab_size=7, hidden_size=16, num_heads=2, H_cycles=2, L_cycles=2, L_layers=1)
    return EqRConfig.from_dict({**sizes, "noise_scale": 0.0, **changes})


def make_contractive(config: EqRConfig, seed: int = 0) -> EquilibriumReasoner:
    """A model whose blocks are weak, so that damping and normalisation pull every row to a fixed point."""
    torch.manual_seed(seed)
    model = EquilibriumReasoner(config).eval()
    with torch.no_grad():
        for weights in model.weights().blocks:
            for weight in weights:
                weight.mul_(0.1)
        model.q_head.weight.normal_()
        model.q_head.bias.zero_()
    return model


def copier(config: EqRConfig) -> EquilibriumReasoner:
    """A model that copies its input once its random start has faded, and answers anything where that is blank."""
    model = make_contractive(config)
    with torch.no_grad():
        for weight in (weight for block in model.weights().blocks for weight in block):
            weight.zero_()
        model.embed_tokens.embedding_weight.copy_(torch.eye(config.vocab_size, config.hidden_size))
        model.lm_head.weight.copy_(torch.eye(config.vocab_size, config.hidden_size))
        model.lm_head.weight[:2] = 0  # neither pads nor blanks
    return model


def assert_same(got: torch.Tensor, want: torch.Tensor, backend: str, **tolerance: object) -> None:
    """Equal, NaN included: bit for bit from a compiled backend, to rounding from the reference."""
    if backend == "reference":
        torch.testing.assert_close(got, want, equal_nan=True, **tolerance)
    else:
        torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0, msg=tolerance.get("msg"))
