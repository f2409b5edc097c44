"""One outer step of the compiled CPU kernel against the float64 oracle, on every instruction set and precision.

The vocabulary is as wide as the state and lm_head is the identity, so that the logits are z_H itself.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner, ops
from eqr_kernels.tasks import sudoku_generator
from tests.support import oracle
from tests.support.oracle_cases import (
    ALL,
    BF16,
    bf16_errors,
    build,
    build_open,
    one_step,
    relative,
    to_numpy,
)

pytestmark = pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])


@pytest.mark.parametrize("cfg", ALL.values(), ids=ALL.keys())
def test_fp32_matches_the_oracle(isa, cfg):
    model, w = build_open(cfg)
    got, want = one_step(model, w, "cpu", "fp32")
    assert max(relative(*pair) for pair in zip(got, want, strict=True)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg",
    [EqRConfig.sudoku_paper(), EqRConfig.sudoku_small(), EqRConfig.maze(H_cycles=1, L_cycles=1)],
    ids=["sudoku-paper", "sudoku-small", "maze, one cycle"],
)
def test_fp32_presets_match_the_oracle(isa, cfg):
    model, w = build(cfg)
    got, want = one_step(model, w, "cpu", "fp32", n=1)
    assert max(relative(*pair) for pair in zip(got, want, strict=True)) < 2e-5


@pytest.mark.parametrize("cfg", BF16.values(), ids=BF16.keys())
def test_bf16_error_is_within_that_of_pytorch(isa, cfg):
    ours, torchs = np.array([bf16_errors(cfg, seed, "cpu") for seed in range(4)]).T
    assert np.sqrt((ours**2).mean()) <= 1.1 * np.sqrt((torchs**2).mean()), (ours, torchs)
    assert ours.min() > 1e-3, "not computed in bf16"


def test_int8_error_is_that_of_eight_bits(isa):
    for cfg in BF16.values():
        model, w = build_open(cfg)
        (z_H, *_), (want, *_) = one_step(model, w, "cpu", "int8")
        bf16 = relative(one_step(model, w, "cpu", "bf16")[0][0], want)
        # A row's 8 bits are spread over its range; measured: 3 to 5 times the error of bf16.
        assert bf16 < relative(z_H, want) < 8 * bf16


@pytest.fixture(scope="module")
def trained():
    """The shipped model, two puzzles on which it settles, and where float64 stands after four outer steps."""
    model = EquilibriumReasoner.from_pretrained("sudoku-small").bfloat16()
    tokens = torch.from_numpy(sudoku_generator.generate(4, "easy", seed=3).inputs).long()
    settled = model.solve(tokens, depth=16, precision="fp32").converged
    tokens = tokens[settled][:2]
    assert len(tokens) == 2
    w = {key: to_numpy(value) for key, value in model.state_dict().items()}
    rng = [(0, 0, i, 0) for i in range(2)]
    z = oracle.start(model.config, rng, w, False)
    for step in range(4):
        *z, logits, _ = oracle.outer_step(w, model.config, tokens.numpy(), *z, [(*r[:3], step) for r in rng])
    return model, tokens, logits


def error_after_four(trained, backend, precision):
    model, tokens, want = trained
    options = dict(depth=4, halt="none", ids=torch.arange(2), noise_scale=model.config.noise_scale)
    return relative(model.solve(tokens, backend=backend, precision=precision, **options).logits, want)


@pytest.fixture(scope="module")
def torch_error(trained):
    return error_after_four(trained, "reference", "bf16")


def test_four_outer_steps_of_trained_weights(isa, trained, torch_error):
    assert error_after_four(trained, "cpu", "bf16") <= 1.1 * torch_error
    assert error_after_four(trained, "cpu", "fp32") < 1e-3
