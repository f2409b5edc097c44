"""`ops.adam_atan2_` against the formula, and as the optimizer that training takes."""

from __future__ import annotations

import math

import pytest
import torch

from eqr_kernels import ops
from eqr_kernels.ops import adam_atan2_
from eqr_kernels.training.fused import FusedAdamATan2
from eqr_kernels.training.optim import AdamATan2
from tests.support.oracle_cases import CONFIGS, ODD, make_config

pytestmark = pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])

TRAINED = {name: cfg for name, cfg in {**CONFIGS, **ODD}.items() if cfg.mlp_t} | {
    "more tokens than a panel": make_config(seq_len=81, hidden_size=72, L_layers=2),
    "more words than a panel": make_config(seq_len=6, vocab_size=70),
    "no eps, padded features": make_config(seq_len=7, hidden_size=40, rms_norm_eps=0.0),
}


def moments(shapes, seed=0):
    """Weights, gradients, means and squares of these shapes, of all magnitudes, with zeros among them."""
    rng = torch.Generator().manual_seed(seed)

    def some(shape):
        values = torch.randn(shape, generator=rng) * 10 ** torch.empty(shape).uniform_(-12, 3, generator=rng)
        return values * (torch.rand(shape, generator=rng) > 0.1)

    weights, gradients, means = ([some(shape) for shape in shapes] for _ in range(3))
    return weights, gradients, means, [some(shape).square() for shape in shapes]


@pytest.mark.parametrize(
    "options",
    [
        dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=1.0, step=1),
        dict(lr=0.5, betas=(0.9, 0.95), weight_decay=0.0, step=7),
        dict(lr=0.0, betas=(0.9, 0.999), weight_decay=2.0, step=100_000),
        dict(lr=1.0, betas=(0.0, 0.0), weight_decay=1.0, step=3),
    ],
)
def test_an_update_is_that_of_the_formula(isa, options):
    weights, gradients, means, squares = before = moments([(3, 5), (1,), (0,), (2, 9001)])
    p, g, m, v = ([x.double() for x in tensors] for tensors in before)
    adam_atan2_(weights, gradients, means, squares, **options)
    lr, (beta1, beta2), step = options["lr"], options["betas"], options["step"]
    for i in range(len(p)):
        m[i] = beta1 * m[i] + (1 - beta1) * g[i]
        v[i] = beta2 * v[i] + (1 - beta2) * g[i].square()
        kept = p[i] * (1 - lr * options["weight_decay"])
        rate, root = lr / (1 - beta1**step), v[i].sqrt() / math.sqrt(1 - beta2**step)
        torch.testing.assert_close(
            weights[i].double(), kept - rate * torch.atan2(m[i], root), rtol=1e-6, atol=1e-6 * rate
        )
        torch.testing.assert_close(squares[i].double(), v[i], rtol=1e-6, atol=1e-37)
        size = (beta1 * means[i].double()).abs() + g[i].abs()
        assert ((means[i].double() - m[i]).abs() <= 1e-6 * size + 1e-37).all()


def test_the_angle_is_accurate_at_every_ratio(isa):
    """Without a gradient, and with weights of 0, late updates are -lr times the angle of the moments."""
    inf, nan = math.inf, math.nan
    special = [
        (0.0, 0.0),
        (-0.0, 0.0),
        (1.0, 0.0),
        (-1.0, 0.0),
        (inf, inf),
        (-inf, 1.0),
        (1.0, inf),
        (nan, 1.0),
        (1.0, nan),
    ]
    usual = [(sign * 1.001**k, 1.0) for sign in (1, -1) for k in range(-20_000, 20_000)]
    mean, square = torch.tensor(special + usual).T.contiguous()
    weights, none = torch.zeros_like(mean), torch.zeros_like(mean)
    want = -torch.atan2(0.5 * mean.double(), (0.5 * square.double()).sqrt())
    adam_atan2_([weights], [none], [mean], [square], lr=1.0, betas=(0.5, 0.5), weight_decay=0.0, step=9999)
    torch.testing.assert_close(weights.double(), want, rtol=4e-7, atol=0, equal_nan=True)


def test_fused_optimizer_is_the_optimizer():
    shapes = [(81, 256), (3,), (7, 5)]
    params = [[torch.nn.Parameter(w.clone()) for w in map(torch.ones, shapes)] for _ in range(2)]
    both = [
        kind(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
        for kind, p in zip((AdamATan2, FusedAdamATan2), params, strict=True)
    ]
    for seed, present in enumerate(((0, 1, 2), (0, 2), (0, 1))):
        for these in params:
            rng = torch.Generator().manual_seed(seed)
            for i, shape in enumerate(shapes):
                gradient = torch.randn(shape, generator=rng)
                these[i].grad = gradient if i in present else None
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 + seed % 2)
            for optimizer in both:
                optimizer.step()
        finally:
            torch.set_num_threads(threads)
    for p, q in zip(*params, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=2e-8)
        for name, value in both[0].state[p].items():
            got = both[1].state[q][name]
            assert got == value if name == "step" else torch.allclose(got, value, rtol=2e-6, atol=1e-6), name


def test_updates_do_not_depend_on_the_threads():
    runs = []
    for count in (1, 2, 5):
        threads, tensors = torch.get_num_threads(), moments([(300, 301), (17,)])
        try:
            torch.set_num_threads(count)
            adam_atan2_(*tensors, lr=0.1, betas=(0.9, 0.95), weight_decay=1.0, step=3)
        finally:
            torch.set_num_threads(threads)
        runs.append([x for some in tensors for x in some])
    assert all(map(torch.equal, runs[1], runs[0])) and all(map(torch.equal, runs[2], runs[0]))


def test_opcheck_of_an_update():
    torch.library.opcheck(torch.ops.eqr_kernels.adam_atan2_.default, (*moments([(3, 5), (4,)]), 0.1, 0.9, 0.95, 1.0, 1))


@pytest.mark.parametrize(
    ("number", "change", "options", "match"),
    [
        (0, lambda t: [t[0].double()], {}, r"weights\[0\] must be a contiguous float32 tensor"),
        (1, lambda t: [t[0].T], {}, r"gradients\[0\] must be a contiguous float32 tensor \[3, 5\]"),
        (2, lambda t: [], {}, "must be as many tensors as weights, 1"),
        (3, lambda t: [t[0][:2]], {}, r"squares\[0\] must be"),
        (0, lambda t: t, dict(lr=-1.0), "lr and weight_decay must be finite"),
        (0, lambda t: t, dict(betas=(0.9, 1.0)), r"must be in \[0, 1\)"),
        (0, lambda t: t, dict(step=0), "step must be at least 1"),
    ],
)
def test_wrong_arguments_of_an_update_are_named(number, change, options, match):
    tensors = list(moments([(3, 5)]))
    tensors[number] = change(tensors[number])
    with pytest.raises(ValueError, match=match):
        adam_atan2_(*tensors, **(dict(lr=0.1, betas=(0.9, 0.95), weight_decay=1.0, step=1) | options))
