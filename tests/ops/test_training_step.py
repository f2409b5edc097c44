"""The op training_step: states against the float64 oracle, gradients against float64 autograd of the reference, whose
own gradient tests/model/test_parity.py checks against the oracle, within the error that PyTorch in bfloat16 makes
itself. The op adam_atan2_: the formula in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, noise, ops, reference
from eqr_kernels.backends.packing import operator_of
from eqr_kernels.ops import scratch_bytes, split_gradients
from eqr_kernels.training.objective import objective
from tests.support import oracle
from tests.support.oracle_cases import CONFIGS, ODD, build, make_config, make_tokens, relative

pytestmark = pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])

TRAINED = {name: cfg for name, cfg in {**CONFIGS, **ODD}.items() if cfg.mlp_t} | {
    "more tokens than a panel": make_config(seq_len=81, hidden_size=72, L_layers=2),
    "more words than a panel": make_config(seq_len=6, vocab_size=70),
    "no eps, padded features": make_config(seq_len=7, hidden_size=40, rms_norm_eps=0.0),
}


def weights_of(model):
    w = model.weights()
    return [w.embedding, w.lm_head, w.q_weight, w.q_bias, *(tensor for block in w.blocks for tensor in block)]


def problem(cfg, n=3, seed=1):
    """A model, its weights in float64 for the oracle, and what training_step takes besides."""
    model, w = build(cfg, seed=seed)
    rng = torch.tensor([(9, 2, 7 * i - 3, 4 + i) for i in range(n)])
    tokens, labels = make_tokens(cfg, n), make_tokens(cfg, n, seed=8)
    start = [torch.from_numpy(np.asarray(z)).float() for z in oracle.start(cfg, rng.tolist(), w, cfg.fixed_init)]
    operator = operator_of(model)
    options = dict(sizes=operator.sizes, constants=operator.constants, noise_scale=cfg.noise_scale)
    scratch = torch.zeros(2, scratch_bytes(operator), dtype=torch.uint8)
    parameters = [p.detach() for p in weights_of(model)]
    tensors = [*parameters[:4], parameters[4:], tokens, labels, *start, rng, scratch]
    return model, w, tensors, options


def training_step(embedding, lm_head, q_weight, q_bias, blocks, *rows, sizes, constants, noise_scale):
    """`ops.training_step` of the op's own arguments, which may be wrong."""
    *batch, scratch = rows
    weights = reference.OperatorWeights(embedding, lm_head, q_weight, q_bias, [blocks])
    operator = ops.Operator(sizes, constants, False)
    return ops.training_step(weights, ops.TrainingBatch(*batch), scratch, operator, noise_scale)


def in_pytorch(model, dtype, tokens, labels, z_H, z_L, rng):
    """z_H, z_L, q_halt and the gradients of one outer step of training in PyTorch."""
    cfg, parameters = model.config, weights_of(model)

    def update(z, u, number):
        eps = noise.normal(rng, noise.FIRST_UPDATE + number, z.shape[1:], torch.float32).to(dtype)
        return reference.damped_update(z, u, eps, cfg.lambda_, cfg.noise_scale)

    w = model.weights().to(dtype)
    e = reference.embed(tokens, w)
    blocks = reference.all_blocks(w, model.rope(), cfg)
    z_H, z_L = reference.outer_step(z_H.to(dtype), z_L.to(dtype), e, blocks, cfg, update)
    logits, q_halt = reference.heads(z_H, w)
    loss, exact = objective(logits, q_halt, labels)
    return z_H, z_L, q_halt, loss, exact, torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("cfg", TRAINED.values(), ids=TRAINED.keys())
def test_errs_no_more_than_pytorch_in_bfloat16(isa, cfg):
    n = 3
    model, w, tensors, options = problem(cfg, n)
    tokens, labels, z_H, z_L, rng, _ = tensors[5:]
    got = training_step(*tensors, **options)
    exact_model = build(cfg, torch.float64)[0]
    want = in_pytorch(exact_model, torch.float64, tokens, labels, z_H, z_L, rng)
    # Noise is float32 here, float64 in the oracle.
    states = oracle.outer_step(w, cfg, tokens.numpy(), z_H.double().numpy(), z_L.double().numpy(), rng.tolist())
    assert max(relative(a, b) for a, b in zip(want[:2], states[:2], strict=True)) < 2e-5
    plain = in_pytorch(model, torch.bfloat16, tokens, labels, z_H, z_L, rng)
    error = [relative(a, b.detach().numpy()) for a, b in zip((got.z_H, got.z_L), want[:2], strict=True)]
    budget = [relative(a.detach(), b.detach().numpy()) for a, b in zip(plain[:2], want[:2], strict=True)]
    assert all(a <= 1.1 * b for a, b in zip(error, budget, strict=True)), (error, budget)
    assert got.exact.tolist() == want[4].tolist()

    gradients = split_gradients(got.gradients, weights_of(model))
    if 1 in (cfg.seq_len, cfg.hidden_size):
        return  # the norm of one number is its sign: no gradient passes through it but by eps
    # Over all weights and over the blocks' alone, for the heads' are few numbers, whose errors are a matter of luck.
    for part in (slice(None), slice(4, None)):
        exact, ours, theirs = (
            torch.cat([g.double().flatten() for g in of[part]]) for of in (want[5], gradients, plain[5])
        )
        ours, theirs = ((g - exact).norm() / exact.norm() for g in (ours, theirs))
        assert ours <= 1.1 * theirs, (part, ours, theirs)
    for number, (g, h) in enumerate(zip(gradients, want[5], strict=True)):
        along = torch.nn.functional.cosine_similarity(g.double().flatten(), h.flatten(), dim=0)
        assert h.norm() == 0 and g.norm() == 0 or along > 0.9, (number, along)
    assert gradients[2][1].abs().max() == 0 and gradients[3][1] == 0


def test_loss_of_the_logits_it_has(isa):
    """With z_H as its own logits: loss, exactness, q_halt and the gradient of lm_head follow from z_H alone."""
    cfg = make_config(seq_len=9, vocab_size=32, hidden_size=32)
    model, _, tensors, options = problem(cfg, n=4)
    tensors[1] = torch.eye(32)
    tensors[6][1] = 0  # a row without labels
    tensors[6][2, 3:] = 0
    tensors[6][3] = training_step(*tensors, **options).z_H[3].bfloat16().argmax(-1)  # the model is right
    tensors[6][3][tensors[6][3] == 0] = 1
    got = training_step(*tensors, **options)
    logits = got.z_H.bfloat16().double().requires_grad_()
    q_halt = (got.z_H[:, 0].double() @ tensors[2][0].bfloat16().double()) + tensors[3][0].bfloat16().double()
    assert torch.allclose(got.q_halt.double(), q_halt, atol=1e-5)
    loss, exact = objective(logits, got.q_halt.double(), tensors[6])
    assert got.loss.mean().item() == pytest.approx(loss.item(), rel=1e-12)
    assert got.exact.tolist() == exact.tolist() and not exact[1]
    assert got.loss[1].item() == pytest.approx(0.5 * math.log1p(math.exp(got.q_halt[1].item())), rel=1e-12)
    (slope,) = torch.autograd.grad(loss, logits)
    want = torch.einsum("ntv,ntf->vf", slope, got.z_H.bfloat16().double())
    assert relative(split_gradients(got.gradients, weights_of(model))[1], want.numpy()) < 1e-5


def test_residual_is_the_change_of_both_states():
    _, _, tensors, options = problem(make_config(seq_len=81), n=3)
    got = training_step(*tensors, **options)
    pairs = [(a.double(), b.double()) for a, b in zip((got.z_H, got.z_L), tensors[7:9], strict=True)]
    change = sum((a - b).square().sum((1, 2)) for a, b in pairs)
    size = sum(a.square().sum((1, 2)) for a, _ in pairs)
    assert torch.allclose(got.residual.double(), (change / size).sqrt(), rtol=1e-5)


def test_states_are_those_of_inference(isa):
    """A training step's forward pass and an outer step of the same kernel in bf16 round the same operands."""
    cfg = EqRConfig.sudoku_small(noise_scale=0.02)
    model, _, tensors, options = problem(cfg, n=2)
    rng = tensors[9]
    rng[:, :2], rng[:, 3] = torch.tensor([5, 0]), 0
    state = model.initial_state(2, seed=5, ids=rng[:, 2])
    tensors[7:9] = state.z_H, state.z_L
    got = training_step(*tensors, **options)
    run = model.solve(
        tensors[5], depth=1, halt="none", seed=5, ids=rng[:, 2], precision="bf16", backend="cpu", noise_scale=0.02
    )
    assert torch.allclose(got.residual, run.residual, rtol=2e-3)
    assert torch.allclose(got.q_halt, run.q_halt, atol=2e-2)
    assert (got.z_H.bfloat16() @ model.lm_head.weight.bfloat16().T).argmax(-1).eq(run.preds).float().mean() > 0.97


def test_the_result_depends_on_the_workers_and_on_nothing_else():
    cfg = make_config(seq_len=7, hidden_size=40, L_layers=2)
    _, _, tensors, options = problem(cfg, n=7)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(training_step(*tensors, **options))  # the scratch space is used again
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
    tensors[10] = torch.zeros(3, tensors[10].shape[1], dtype=torch.uint8)
    other = training_step(*tensors, **options)
    assert all(map(torch.equal, other[:-1], runs[0][:-1]))
    torch.testing.assert_close(other.gradients, runs[0].gradients, rtol=1e-4, atol=1e-6)


def test_rows_do_not_touch_each_other():
    cfg = make_config(seq_len=7, hidden_size=40)
    _, _, tensors, options = problem(cfg, n=5)
    whole = training_step(*tensors, **options)
    broken = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    broken[7][2] = float("nan")
    with_nan = training_step(*broken, **options)
    again = training_step(*tensors[:10], broken[10], **options)
    for i in (0, 1, 3, 4):
        alone = training_step(*tensors[:5], *(t[i : i + 1] for t in tensors[5:10]), tensors[10], **options)
        for name in ("z_H", "z_L", "loss", "q_halt", "residual", "exact"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[i]), name
            assert torch.equal(getattr(with_nan, name)[i], getattr(whole, name)[i]), name
    assert with_nan.z_H[2].isnan().all() and with_nan.loss[2].isnan() and with_nan.gradients.isnan().any()
    # A row that has diverged leaves nothing in the scratch space.
    assert all(map(torch.equal, again, whole))


@pytest.mark.parametrize("tokens", [6, 7])
def test_scratch_may_hold_anything_but_nan_in_its_padding(isa, tokens):
    """What another size or instruction set left there changes nothing."""
    cfg = make_config(seq_len=tokens, hidden_size=32, L_layers=2)
    _, _, tensors, options = problem(cfg, n=3)
    whole = training_step(*tensors, **options)
    tensors[10].fill_(0x3F)  # 0.746 in bfloat16
    assert all(map(torch.equal, training_step(*tensors, **options), whole))


def test_sizes_whose_activations_cannot_be_held_are_refused():
    with pytest.raises(ValueError, match="too large to train"):
        scratch_bytes(ops.Operator((2**28, 1, 1, 256, 2**28, 0, 1, 1, 253, 0), (0.95, 1e-5, 1.0, 1.0), False))


def test_opcheck():
    _, _, tensors, options = problem(make_config(seq_len=5, hidden_size=8), n=2)
    torch.library.opcheck(torch.ops.eqr_kernels.training_step.default, (*tensors, *options.values()))


@pytest.mark.parametrize(
    ("number", "change", "error", "match"),
    [
        (0, lambda t: t.double(), TypeError, "embedding must be a torch.float32 tensor"),
        (4, lambda t: t[:-1], ValueError, "blocks must be 4 tensors"),
        (5, lambda t: t + 1000, ValueError, "tokens must be in 0"),
        (6, lambda t: t - 1000, ValueError, "labels must be in 0"),
        (6, lambda t: t[:1], ValueError, "labels must have shape"),
        (7, lambda t: t.bfloat16(), TypeError, "z_H must be a torch.float32 tensor"),
        (8, lambda t: t.transpose(1, 2), ValueError, "z_L must"),
        (9, lambda t: t * 2**40, ValueError, "rng must hold seed and restart"),
        (10, lambda t: t[:, :-64].contiguous(), ValueError, "scratch must be a contiguous uint8 tensor"),
        (10, lambda t: t[:0], ValueError, "scratch must be a contiguous uint8 tensor"),
    ],
)
def test_wrong_arguments_are_named(number, change, error, match):
    _, _, tensors, options = problem(make_config(seq_len=5, hidden_size=8), n=2)
    tensors[number] = change(tensors[number])
    with pytest.raises(error, match=match):
        training_step(*tensors, **options)


def test_attention_is_refused():
    _, _, tensors, options = problem(make_config(seq_len=5, hidden_size=8), n=2)
    cfg = make_config(seq_len=5, hidden_size=8, mlp_t=False, pos_encodings="none")
    model, _ = build(cfg)
    parameters = [p.detach() for p in weights_of(model)]
    with pytest.raises(ValueError, match="token mixing by a SwiGLU only"):
        training_step(*parameters[:4], parameters[4:], *tensors[5:], **(options | dict(sizes=operator_of(model).sizes)))
