"""The ops differentiable_step and differentiable_step_backward: they are the op training_step, which its own tests hold
against the oracle, with the objective outside."""

from __future__ import annotations

import pytest
import torch

from eqr_kernels import ops
from eqr_kernels.backends.packing import operator_of
from eqr_kernels.ops import StepRows, TrainingBatch, scratch_bytes, split_gradients
from eqr_kernels.training.objective import objective
from tests.support.oracle_cases import build, make_config, make_tokens

pytestmark = pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])

CASES = {
    "H 2": make_config(seq_len=9),
    "H 1, odd sizes": make_config(seq_len=7, hidden_size=23, vocab_size=3, H_cycles=1, L_layers=2),
    "more tokens and words than a panel": make_config(seq_len=81, hidden_size=40, vocab_size=70, H_cycles=3),
    "silent": make_config(noise_scale=0.0, lambda_=1.0),
}


def problem(cfg, n=3):
    """A model's weights, its operator, rows and the noise."""
    model, _ = build(cfg)
    rng = torch.tensor([(9, 2, 7 * i - 3, 4 + i) for i in range(n)])
    torch.manual_seed(0)
    z_H, z_L = torch.randn(2, n, cfg.seq_len, cfg.hidden_size)
    weights = model.weights()
    heads, blocks = [w.detach() for w in weights[:4]], [[w.detach() for w in block] for block in weights.blocks]
    plain = type(weights)(*heads, tuple(type(weights.blocks[0])(*block) for block in blocks))
    return plain, operator_of(model), StepRows(make_tokens(cfg, n), z_H, z_L, rng), cfg.noise_scale


def flat(weights):
    return [*weights[:4], *(tensor for block in weights.blocks for tensor in block)]


def schema_arguments(weights, rows, *others):
    return (*weights[:4], flat(weights)[4:], *rows, *others)


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())
def test_with_the_objective_outside_it_is_a_training_step(isa, cfg):
    weights, operator, rows, scale = problem(cfg)
    labels = make_tokens(cfg, 3, seed=8)
    scratch = torch.zeros(2, scratch_bytes(operator), dtype=torch.uint8)
    want = ops.training_step(weights, TrainingBatch(rows.tokens, labels, *rows[1:]), scratch, operator, scale)
    got = ops.differentiable_step(weights, rows, operator, scale)
    for name in ("z_H", "z_L", "q_halt"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    # In float64, and with its share of a row in float32: an ulp of a slope would turn the rounding of bf16 operands.
    logits, q_halt = got.logits.double().requires_grad_(), got.q_halt.double().requires_grad_()
    loss, exact = objective(logits, q_halt, labels)
    assert loss.item() == pytest.approx(want.loss.mean().item(), rel=1e-12)
    assert torch.equal(exact, want.exact)
    share = (torch.tensor(1.0) / 3).double() * 3
    slopes = [slope.float() for slope in torch.autograd.grad(share * loss, [logits, q_halt])]
    last = rows._replace(z_H=got.last_H, z_L=got.last_L)
    if cfg.H_cycles == 1:
        assert torch.equal(got.last_H, rows.z_H) and torch.equal(got.last_L, rows.z_L)
    gradients = ops.differentiable_step_backward(weights, last, *slopes, operator, scale, 2)
    parts = [split_gradients(of, flat(weights)) for of in (gradients, want.gradients)]
    for ours, theirs in zip(*parts, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_rows_and_threads_do_not_change_a_row():
    weights, operator, rows, scale = problem(make_config(seq_len=7, hidden_size=40), n=5)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            got = ops.differentiable_step(weights, rows, operator, scale)
            slopes = torch.ones_like(got.logits), torch.ones_like(got.q_halt)
            runs.append((*got, ops.differentiable_step_backward(weights, rows, *slopes, operator, scale, 2)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *runs))
    *whole, _ = runs[0]
    broken = rows._replace(z_H=rows.z_H.clone())
    broken.z_H[2] = float("nan")
    with_nan = ops.differentiable_step(weights, broken, operator, scale)
    for i in (0, 1, 3, 4):
        alone = ops.differentiable_step(weights, StepRows(*(t[i : i + 1] for t in rows)), operator, scale)
        for one, other, want in zip(alone, with_nan, whole, strict=True):
            assert torch.equal(one[0], want[i]) and torch.equal(other[i], want[i])
    assert with_nan.logits[2].isnan().all()


def test_opcheck():
    weights, operator, rows, scale = problem(make_config(seq_len=5, hidden_size=8), n=2)
    numbers = (operator.sizes, operator.constants, scale)
    torch.library.opcheck(torch.ops.eqr_kernels.differentiable_step.default, schema_arguments(weights, rows, *numbers))
    slopes = torch.ones(2, 5, 11), torch.ones(2)
    torch.library.opcheck(
        torch.ops.eqr_kernels.differentiable_step_backward.default,
        schema_arguments(weights, rows, *slopes, *numbers, 1),
    )


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("tokens", lambda t: t + 1000, ValueError, "tokens must be in 0"),
        ("tokens", lambda t: t[:0], ValueError, r"tokens must be a contiguous int64 tensor \[n >= 1"),
        ("z_H", lambda t: t.bfloat16(), TypeError, "z_H must be a torch.float32 tensor"),
        ("z_L", lambda t: t.transpose(1, 2), ValueError, "z_L must"),
        ("rng", lambda t: t * 2**40, ValueError, "rng must hold seed and restart"),
    ],
)
def test_wrong_rows_are_named(name, change, error, match):
    weights, operator, rows, scale = problem(make_config(seq_len=5, hidden_size=8), n=2)
    if name == "tokens" and len(change(rows.tokens)) == 0:
        rows = StepRows(*(t[:0] for t in rows))
    else:
        rows = rows._replace(**{name: change(getattr(rows, name))})
    with pytest.raises(error, match=match):
        ops.differentiable_step(weights, rows, operator, scale)
    n = len(rows.tokens)
    with pytest.raises(error, match=match):
        ops.differentiable_step_backward(weights, rows, torch.ones(n, 5, 11), torch.ones(n), operator, scale, 1)


def test_wrong_slopes_workers_and_mixers_are_named():
    weights, operator, rows, scale = problem(make_config(seq_len=5, hidden_size=8), n=2)
    slopes = torch.ones(2, 5, 11), torch.ones(2)

    def backward(of_logits, of_q_halt, operator=operator, workers=1):
        return ops.differentiable_step_backward(weights, rows, of_logits, of_q_halt, operator, scale, workers)

    with pytest.raises(ValueError, match=r"of_logits must have shape \[2, 5, 11\]"):
        backward(slopes[0][:1], slopes[1])
    with pytest.raises(TypeError, match=r"of_q_halt must be a torch.float32 tensor"):
        backward(slopes[0], slopes[1].double())
    with pytest.raises(ValueError, match="workers must be in 1..4096, got 0"):
        backward(*slopes, workers=0)
    attention = make_config(seq_len=5, hidden_size=8, mlp_t=False, pos_encodings="none")
    theirs, operator, *_ = problem(attention, n=2)
    with pytest.raises(ValueError, match="differentiable_step takes token mixing by a SwiGLU only"):
        ops.differentiable_step(theirs, rows, operator, scale)
