"""`model(tokens, state)` in bfloat16 on CPU with gradients: the fused kernels where the modules are plain, whose errors
are no greater than those of the modules in bfloat16, both against the modules in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.training.fused import FusedStep
from tests.support.environment import needs_extension
from tests.support.oracle_cases import make_config, make_tokens

pytestmark = needs_extension

CONFIGS = {
    "H 2": make_config(seq_len=9, hidden_size=32),
    "H 1, three layers": make_config(seq_len=9, hidden_size=32, H_cycles=1, L_layers=3),
    "hidden units padded": make_config(seq_len=7, hidden_size=23, multiple_of=8),
    "TRM": make_config(seq_len=9, hidden_size=32, lambda_=1.0, noise_scale=0.0, fixed_init=True),
    "much noise": make_config(seq_len=9, hidden_size=32, noise_scale=0.5, lambda_=0.6),
}
FUSED = "fused CPU kernel, forward and backward"
autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def own_loss(logits, q_halt, answers):
    """No objective of this package."""
    return F.cross_entropy(logits.transpose(1, 2).double(), answers) + 0.1 * q_halt.double().square().mean()


def problem(cfg, n=3, dtype=torch.float32):
    torch.manual_seed(1)
    model = EquilibriumReasoner(cfg).train()
    nn.init.normal_(model.q_head.weight, std=cfg.hidden_size**-0.5)  # or it passes on no gradient
    model = model.to(dtype)
    tokens = make_tokens(cfg, n)
    return model, tokens, make_tokens(cfg, n, seed=8), model.initial_state(tokens, seed=4)


def gradients(model, loss, **options):
    return torch.autograd.grad(loss, list(model.parameters()), **options)


def same(got, want):
    return all(map(torch.equal, got, want))


def step(model, arithmetic, tokens, state):
    with autocast(enabled=arithmetic == "autocast"):
        return model(tokens, state), model.step_kernel(tokens, state)


@pytest.fixture(params=["autocast", "bfloat16"])
def arithmetic(request):
    return request.param


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_errs_no_more_than_the_modules(isa, arithmetic, cfg):
    rounded = problem(cfg)[0].bfloat16()
    exact = copy.deepcopy(rounded).double()
    model = rounded if arithmetic == "bfloat16" else copy.deepcopy(rounded).float()
    *_, tokens, answers, state = problem(cfg, dtype=model.dtype)
    results = []
    for one, fused in ((exact, True), (model, False), (model, True)):
        one.fused = fused
        given = state._replace(z_H=state.z_H.to(one.dtype), z_L=state.z_L.to(one.dtype))
        (after, logits, q_halt), kernel = step(one, arithmetic if one is model else None, tokens, given)
        assert (kernel == FUSED) == (one is model and fused), kernel
        assert torch.equal(after.step, state.step + 1) and not after.z_H.requires_grad
        parts = gradients(one, own_loss(logits, q_halt, answers))
        results.append(dict(z_H=[after.z_H], z_L=[after.z_L], logits=[logits], all=parts, blocks=parts[4:]))
        if one is model:
            dtypes = after.z_H.dtype, after.z_L.dtype, logits.dtype, q_halt.dtype, *(g.dtype for g in parts)
            assert dtypes == results[0].setdefault("dtypes", dtypes)
    exact.fused = True
    for name in ("z_H", "z_L", "logits", "all", "blocks"):
        want, theirs, ours = (torch.cat([t.detach().double().flatten() for t in of[name]]) for of in results)
        budget, error = (theirs - want).norm(), (ours - want).norm()
        assert 0 < error <= 1.1 * budget < 0.5 * want.norm(), (name, error, budget)


def test_steps_after_one_another_and_rows_in_other_company(arithmetic):
    """The noise of a row is that of its counters, and a step that is not the first has its own."""
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    model, tokens, _, state = problem(make_config(seq_len=9, hidden_size=32, noise_scale=0.3), n=4, dtype=dtype)
    some = torch.tensor([2, 0])
    few = type(state)(*(field[some] for field in state))
    for _ in range(2):
        (state, logits, q_halt), kernel = step(model, arithmetic, tokens, state)
        (few, few_logits, few_q), _ = step(model, arithmetic, tokens[some], few)
        assert kernel == FUSED
        assert torch.equal(few_logits, logits[some]) and torch.equal(few_q, q_halt[some])
        assert same(few, [field[some] for field in state])
    with torch.no_grad():
        silent = step(model, arithmetic, tokens, state)[0][1]
    (_, other, _), _ = step(model, arithmetic, tokens, state._replace(step=state.step + 1))
    (_, again, _), _ = step(model, arithmetic, tokens, state)
    assert (other - again).abs().mean() > 4 * (silent - again).abs().mean()


def test_noise_scale_of_the_call():
    model, tokens, _, state = problem(make_config(seq_len=9, hidden_size=32, noise_scale=0.3))
    with autocast():
        given = model(tokens, state, noise_scale=0.0)
        model.config = make_config(seq_len=9, hidden_size=32, noise_scale=0.0)
        silent = model(tokens, state)
    assert same((given[0].z_H, *given[1:]), (silent[0].z_H, *silent[1:]))


def test_accumulated_and_shared_graphs():
    """Gradients of two batches add up, whether in one graph, in two backward passes, or in one run twice."""
    model, tokens, answers, state = problem(CONFIGS["H 2"])

    def two():
        first, losses = state, []
        with autocast():
            for _ in range(2):
                first, logits, q_halt = model(tokens, first)
                losses.append(own_loss(logits, q_halt, answers))
        return losses

    first, second = two()
    parts = [gradients(model, loss, retain_graph=True) for loss in (first, second)]
    assert same(gradients(model, first), parts[0]), "a graph run twice"
    total = [a + b for a, b in zip(*parts, strict=True)]
    sum(two()).backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-5, atol=1e-7) for p, g in zip(model.parameters(), total, strict=True))
    for loss in two():
        loss.backward()
    assert all(
        torch.allclose(p.grad, 2 * g, rtol=1e-5, atol=1e-7) for p, g in zip(model.parameters(), total, strict=True)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss,) = two()[:1]
        with torch.no_grad():
            model.lm_head.weight += 1
        loss.backward()


def test_frozen_weights_get_none_and_change_nothing():
    model, tokens, answers, state = problem(CONFIGS["H 2"])
    with autocast():
        whole = gradients(model, own_loss(*model(tokens, state)[1:], answers))
        model.embed_tokens.requires_grad_(False)
        model.L_level.layers[0].mlp.requires_grad_(False)
        _, logits, q_halt = model(tokens, state)
        assert model.step_kernel(tokens, state) == FUSED
    own_loss(logits, q_halt, answers).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), whole, strict=True):
        frozen = name.startswith("embed_tokens") or ".mlp." in name
        assert parameter.grad is None if frozen else torch.equal(parameter.grad, gradient), name


@pytest.mark.parametrize("by", ["autograd", "trainer"])
def test_a_shared_block_gets_the_sum(by):
    model, tokens, answers, state = problem(make_config(seq_len=9, hidden_size=32, L_layers=2))
    with torch.no_grad():
        for a, b in zip(*(layer.parameters() for layer in model.L_level.layers), strict=True):
            b.copy_(a)
    shared = copy.deepcopy(model)
    shared.L_level.layers[1] = shared.L_level.layers[0]
    for one in (model, shared):
        if by == "trainer":
            FusedStep(one, 1, seed=4)(tokens, answers, state.z_H, state.z_L, state.ids, state.step)
            continue
        with autocast():
            assert one.step_kernel(tokens, state) == FUSED
            own_loss(*one(tokens, state)[1:], answers).backward()
    apart = (layer.parameters() for layer in model.L_level.layers)
    for both, a, b in zip(shared.L_level.layers[0].parameters(), *apart, strict=True):
        torch.testing.assert_close(both.grad, a.grad + b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("part", [1, 2], ids=["logits", "q_halt"])
def test_a_loss_of_one_output(part):
    model, tokens, _, state = problem(CONFIGS["H 2"])
    with autocast():
        alone = gradients(model, model(tokens, state)[part].double().square().sum())
        outputs = model(tokens, state)
        both = gradients(model, outputs[part].double().square().sum() + 0 * outputs[3 - part].double().sum())
    assert same(alone, both)


def test_what_is_kept_for_backward():
    """Besides weights, tokens and counters two states, however many updates there are."""
    cfg = make_config(seq_len=9, hidden_size=32, L_cycles=9)
    model, tokens, _, state = problem(cfg)
    kept = []
    with autocast(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(tokens, state)
    weights = {p.data_ptr() for p in model.parameters()}
    floats = sum(t.numel() for t in kept if t.is_floating_point() and t.data_ptr() not in weights)
    assert floats == 2 * state.z_H.numel()


@pytest.mark.parametrize("wrapper", ["checkpoint", "ddp"])
def test_under_what_pytorch_wraps_around_a_model(wrapper, tmp_path):
    model, tokens, answers, state = problem(CONFIGS["H 2"])
    results = []
    if wrapper == "ddp":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = functools.partial(checkpoint, model, use_reentrant=False)
    try:
        for run in (model, wrapped):
            model.zero_grad()
            with autocast():
                assert model.step_kernel(tokens, state) == FUSED
                _, logits, q_halt = run(tokens, state)
            own_loss(logits, q_halt, answers).backward()
            results.append([p.grad.clone() for p in model.parameters()])
    finally:
        if wrapper == "ddp":
            dist.destroy_process_group()
    assert same(*results)


def test_a_second_derivative_is_refused():
    model, tokens, answers, state = problem(CONFIGS["H 2"])
    with autocast():
        loss = own_loss(*model(tokens, state)[1:], answers)
    with pytest.raises(RuntimeError, match="first derivatives only.*set model.fused = False"):
        gradients(model, loss, create_graph=True)
    model.fused = False
    with autocast():
        loss = own_loss(*model(tokens, state)[1:], answers)
    first = gradients(model, loss, create_graph=True)
    second = gradients(model, first[0].square().sum(), allow_unused=True)
    assert second[0].abs().max() > 0


def hooked(model):
    model.L_level.layers[0].mlp.register_forward_hook(lambda module, args, output: 0.5 * output)


def hooked_backward(model):
    model.L_level.layers[0].register_full_backward_hook(lambda module, of_input, of_output: None)


def hooked_weight(model):
    model.lm_head.weight.register_hook(lambda gradient: 2 * gradient)


def replaced(model):
    model.L_level.layers[0].mlp.down_proj = nn.Sequential(model.L_level.layers[0].mlp.down_proj)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


MADE = {
    "gradient of lm_head.weight has a hook": hooked_weight,
    "mlp has a forward hook": hooked,
    "layers.0 has a backward hook": hooked_backward,
    "is a torch.nn.modules.container.Sequential": replaced,
    "lm_head has parametrised weights": lambda model: parametrize.register_parametrization(
        model.lm_head, "weight", Twice()
    ),
    "model.fused is off": lambda model: setattr(model, "fused", False),
    "no gradient of a weight is wanted": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("why", MADE)
def test_a_model_that_is_not_plain_runs_through_its_modules(why):
    model, tokens, answers, state = problem(CONFIGS["H 2"])
    MADE[why](model)
    with autocast():
        kernel = model.step_kernel(tokens, state)
        got = model(tokens, state)
        unfused = copy.deepcopy(model) if why != "gradient of lm_head.weight has a hook" else model
        unfused.fused = False
        want = unfused(tokens, state)
    assert kernel.startswith("PyTorch: ") and why in kernel
    assert torch.equal(got[1], want[1]) and torch.equal(got[0].z_H, want[0].z_H)
    if "no gradient" not in why:
        for output in (got, want):
            own_loss(*output[1:], answers).backward()
        pairs = zip(model.parameters(), unfused.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs if p.grad is not None)


class WithOtherHeads(EquilibriumReasoner):
    def heads(self, z_H):
        logits, q_halt = super().heads(z_H)
        return logits + 1, q_halt


def test_other_arithmetic_mixers_and_modes_run_through_the_modules():
    cfg = CONFIGS["H 2"]
    model, tokens, _, state = problem(cfg)
    assert "arithmetic is torch.float32" in model.step_kernel(tokens, state)
    with torch.autocast("cpu", torch.float16):
        assert "arithmetic is torch.float16" in model.step_kernel(tokens, state)
    with autocast():
        assert model.step_kernel(tokens, state) == FUSED
        with torch.no_grad():
            assert "no gradient" in model.step_kernel(tokens, state)
        with torch.inference_mode():
            assert "no gradient" in model.step_kernel(tokens, state)
        assert "no rows" in model.step_kernel(tokens[:0], model.initial_state(0))
        assert model(tokens[:0], model.initial_state(0))[1].shape == (0, 9, 11)
        assert "overrides heads" in WithOtherHeads(cfg).step_kernel(tokens, state)
        with torch.autograd.forward_ad.dual_level():
            assert "forward-mode" in model.step_kernel(tokens, state)
        for other in (dict(mlp_t=False, pos_encodings="rope"), dict(H_cycles=1)):
            model, tokens, _, state = problem(make_config(seq_len=9, hidden_size=32, **other))
            state = state._replace(z_H=state.z_H.requires_grad_())
            why = "SwiGLU only" if "mlp_t" in other else "a gradient of the state is wanted"
            assert why in model.step_kernel(tokens, state)
        # As through the modules, the gradient of a state ends at the recursions without gradient.
        model, tokens, _, state = problem(cfg)
        state = state._replace(z_H=state.z_H.requires_grad_())
        assert model.step_kernel(tokens, state) == FUSED
        logits = model(tokens, state)[1]
    assert torch.autograd.grad(logits.sum(), state.z_H, allow_unused=True) == (None,)


def test_transforms_of_functions():
    """torch.func takes the modules, whose operations it can differentiate and map; a call without them the kernel."""
    model, tokens, answers, state = problem(CONFIGS["H 2"])
    weights = dict(model.named_parameters())

    def loss(weights):
        with autocast():
            return own_loss(*torch.func.functional_call(model, weights, (tokens, state))[1:], answers)

    with autocast():
        want = gradients(model, own_loss(*model(tokens, state)[1:], answers))
    assert same(gradients(model, loss(weights)), want)
    transformed = torch.func.grad(loss)(weights)
    model.fused = False
    assert same(transformed.values(), torch.func.grad(loss)(weights).values())
    assert not same(transformed.values(), want)


def test_compiled_it_is_the_modules():
    model, tokens, answers, state = problem(CONFIGS["H 2"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with autocast():
        loss = own_loss(*compiled(tokens, state)[1:], answers)
    got = gradients(model, loss)
    model.fused = False
    with autocast():
        want = gradients(model, own_loss(*model(tokens, state)[1:], answers))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
