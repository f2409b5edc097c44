"""The op latent_recursions against the float64 oracle, on every instruction set, and its checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqr_kernels import noise, ops
from eqr_kernels.backends.cpu import latent_recursions
from eqr_kernels.precision import Precision
from tests.support import oracle
from tests.support.oracle_cases import ALL, build_open, make_tokens, relative

pytestmark = pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])


def problem(cfg, n=3):
    """A model, tokens, start states, the noise that the oracle draws, and the oracle's z_H and z_L."""
    model, w = build_open(cfg)
    tokens, rng = make_tokens(model.config, n), [(9, 1, 7 * i - 3, 4) for i in range(n)]
    start = oracle.start(cfg, rng, w, cfg.fixed_init)
    want = oracle.outer_step(w, cfg, tokens.numpy(), *start, rng)[:2]
    eps = None
    if cfg.noise_scale:
        shape = (cfg.seq_len, cfg.hidden_size)
        eps = torch.stack(
            [
                noise.normal(torch.tensor(rng), noise.FIRST_UPDATE + i, shape, torch.float32)
                for i in range(cfg.updates_per_step)
            ]
        )
    z_H, z_L = (torch.from_numpy(np.asarray(z)).float() for z in start)
    return model, tokens, z_H, z_L, eps, want


@pytest.mark.parametrize("cfg", ALL.values(), ids=ALL.keys())
def test_matches_the_oracle(isa, cfg):
    model, tokens, z_H, z_L, eps, want = problem(cfg)
    before = z_H.clone(), z_L.clone()
    got = latent_recursions(model, tokens, z_H, z_L, eps, cfg.H_cycles)
    assert max(relative(*pair) for pair in zip(got, want, strict=True)) < 2e-5
    assert torch.equal(z_H, before[0]) and torch.equal(z_L, before[1])


def test_rows_do_not_depend_on_each_other_or_on_the_threads():
    cfg = ALL["mlp_t odd sizes"]
    model, tokens, z_H, z_L, eps, _ = problem(cfg, n=7)
    z_H[2] = float("nan")
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(latent_recursions(model, tokens, z_H, z_L, eps, 2))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(run, runs[0], strict=True))
    for i in (0, 1, 3, 6):
        one = slice(i, i + 1)
        alone = latent_recursions(model, tokens[one], z_H[one], z_L[one], eps[:, one].contiguous(), 2)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, runs[0], strict=True))
    assert runs[0][0][2].isnan().all() and runs[0][0].isnan().sum() == z_H[2].numel()


def test_no_recursion_gives_the_state_back():
    model, tokens, z_H, z_L, eps, _ = problem(ALL["mlp_t"])
    assert all(map(torch.equal, latent_recursions(model, tokens, z_H, z_L, eps, 0), (z_H, z_L)))


@pytest.fixture
def arguments():
    from eqr_kernels.backends.cpu import CpuBackend

    model, tokens, z_H, z_L, eps, _ = problem(ALL["mlp_t"])
    packed = CpuBackend().packed(model, Precision.fp32)
    return dict(packed=packed, tokens=tokens, z_H=z_H, z_L=z_L, eps=eps, noise_scale=0.1, count=2)


def test_opcheck(arguments):
    packed, *others = arguments.values()
    torch.library.opcheck(torch.ops.eqr_kernels.latent_recursions.default, (packed.data, *others))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(z_H=lambda z: z.double()), TypeError, "z_H must be a torch.float32 tensor"),
        (dict(z_L=lambda z: z[:1]), ValueError, "z_L must have shape"),
        (dict(eps=lambda e: e[:3]), ValueError, "eps must be .*at least"),
        (dict(eps=lambda e: e[..., :-1]), ValueError, "eps must have shape"),
        (dict(tokens=lambda t: t + 1000), ValueError, "tokens must be in 0"),
        (dict(count=lambda c: -1), ValueError, "count must be in 0..254"),
        (dict(noise_scale=lambda s: float("nan")), ValueError, "noise_scale must be finite"),
        (dict(z_H=lambda z: z.requires_grad_()), RuntimeError, "z_H requires a gradient"),
    ],
)
def test_wrong_arguments_are_named(arguments, change, error, match):
    ((name, changed),) = change.items()
    arguments[name] = changed(arguments[name])
    tensors = [arguments.pop(key) for key in ("packed", "tokens", "z_H", "z_L", "eps")]
    with pytest.raises(error, match=match):
        ops.latent_recursions(*tensors, **arguments)
