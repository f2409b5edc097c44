"""A model is what its user made of it: forward, solve and training honour hooks and overridden, replaced, wrapped,
pruned, quantised and parametrised layers, and an explicit fused backend refuses what it cannot honour."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.modifications import modification
from eqr_kernels.tasks import sudoku, sudoku_generator
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer
from tests.support.environment import BUILT, needs_extension
from tests.support.models import make_contractive, tiny_config
from tests.support.training import toy_stream

TOKENS = torch.randint(1, 7, (5, 6), generator=torch.Generator().manual_seed(0))
RUN = dict(depth=4, halt="none")
LAYER = "L_level.layers.0.mlp.down_proj"


def attention():
    return make_contractive(tiny_config(mlp_t=False, pos_encodings="rope"))


def mixer():
    return make_contractive(tiny_config())


def replace(model, path, make):
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, make(getattr(parent, name)))


class Lora(nn.Module):
    """By hand, with a `weight` property as many adapters have: what reads only the weight misses the adapter."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(1)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=generator))

    @property
    def weight(self):
        return self.base.weight

    def merged(self):
        with torch.no_grad():
            self.base.weight += self.up @ self.down
        return self.base

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Doubling(EquilibriumReasoner):
    """Answers with twice the logits."""

    def forward(self, tokens, state, **keywords):
        state, logits, q_halt = super().forward(tokens, state, **keywords)
        return state, 2 * logits, q_halt


def hooked(model):
    model.get_submodule(LAYER).register_forward_hook(lambda module, args, output: 0.5 * output)


def pre_hooked(model):
    model.L_level.layers[0].register_forward_pre_hook(lambda module, args: (0.5 * args[0], *args[1:]))


def lora(model):
    replace(model, LAYER, Lora)


def peft_lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["gate_up_proj", "down_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.eval()


def pruned(model):
    prune.l1_unstructured(model.get_submodule(LAYER), "weight", amount=0.5)


def old_weight_norm(model):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.get_submodule(LAYER))
    with torch.no_grad():
        model.get_submodule(LAYER).weight_g.mul_(3)


def quantised(model):
    with pytest.warns(Warning, match="torch.ao.quantization"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def with_bias(model):
    layer = model.get_submodule(LAYER)
    replace(model, LAYER, lambda old: nn.Linear(old.in_features, old.out_features))
    assert layer is not model.get_submodule(LAYER)


def patched(model):
    layer = model.get_submodule(LAYER)
    layer.forward = functools.partial(lambda plain, x: 0.5 * plain(x), layer.forward)


def one_block_more(model):
    model.L_level.layers.append(copy.deepcopy(model.L_level.layers[0]))


def subclassed(model):
    model.__class__ = Doubling


def own_start(model):
    model.start = lambda rng: tuple(torch.zeros(len(rng), 6, 16) for _ in range(2))


class Doubled(torch.Tensor):
    """Weights that count twice, as quantised ones have a scale: what reads their numbers misses it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], 2 * args[1].as_subclass(torch.Tensor), *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def weights_of_another_kind(model):
    layer = model.get_submodule(LAYER)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)


def sparse_weights(model):
    layer = model.get_submodule(LAYER)
    pruned = torch.where(layer.weight.abs() > layer.weight.abs().median(), layer.weight.detach(), 0.0)
    layer.weight = nn.Parameter(pruned.to_sparse_csr(), requires_grad=False)


def fewer_hidden_units(model):
    torch.manual_seed(2)
    mlp = model.L_level.layers[0].mlp
    mlp.gate_up_proj, mlp.down_proj = nn.Linear(16, 20, bias=False), nn.Linear(10, 16, bias=False)


def own_config_of_a_block(model):
    block = model.L_level.layers[0]
    block.config = dataclasses.replace(block.config, rms_norm_eps=0.5)


class Called(EquilibriumReasoner):
    def __call__(self, *args, **keywords):
        state, logits, q_halt = super().__call__(*args, **keywords)
        return state, 2 * logits, q_halt


class WarmStart(EquilibriumReasoner):
    """Begins with its tokens' embedding."""

    def initial_state(self, n, seed=0, **keywords):
        state = super().initial_state(n, seed, **keywords)
        return state._replace(z_H=self.embed(n), z_L=state.z_L * 0.5)


def turned_into(kind):
    def turn(model):
        model.__class__ = kind

    turn.__name__ = kind.__name__
    return turn


MODIFIED = {
    hooked: f"{LAYER} has a forward hook",
    pre_hooked: "L_level.layers.0 has a forward pre-hook",
    lora: f"{LAYER} is a tests.model.test_modifications.Lora, not a Linear",
    peft_lora: "L_level.layers.0.mlp_t.gate_up_proj is a peft.",
    pruned: f"{LAYER} has a forward pre-hook",
    old_weight_norm: f"{LAYER} has a forward pre-hook",
    quantised: "lm_head is a torch.ao.nn.quantized.dynamic",
    with_bias: f"{LAYER} has a bias",
    patched: f"forward of {LAYER} was replaced",
    one_block_more: "L_level.layers has 2 blocks, and config.L_layers is 1",
    subclassed: "Doubling overrides forward",
    own_start: "EquilibriumReasoner overrides start",
    weights_of_another_kind: f"{LAYER}.weight is a tests.model.test_modifications.Doubled, not a plain tensor",
    sparse_weights: f"{LAYER}.weight is torch.sparse_csr, not dense",
    fewer_hidden_units: "L_level.layers.0.mlp.gate_up_proj.weight is [20, 16], where the config has [512, 16]",
    own_config_of_a_block: "L_level.layers.0 has a config of its own",
    turned_into(Called): "Called overrides __call__",
    turned_into(WarmStart): "WarmStart overrides initial_state",
}
CASES = pytest.mark.parametrize(("modify", "why"), MODIFIED.items(), ids=[f.__name__ for f in MODIFIED])


def differ(a, b):
    """By far more than rounding, of float32 in another order."""
    return bool((a - b).norm() > 1e-4 * b.norm())


@torch.no_grad()
def by_hand(model, tokens=TOKENS, depth=4):
    """Logits after `depth` calls of the model."""
    state = model.initial_state(tokens)
    for _ in range(depth):
        state, logits, _ = model(tokens, state)
    return logits.float()


@CASES
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_solve_is_calling_the_model_and_says_so(modify, why):
    model = mixer()
    plain = model.solve(TOKENS, **RUN).logits
    modify(model)
    result = model.solve(TOKENS, **RUN)
    assert result.backend == "reference" and f"through its modules in PyTorch, since {why}" in result.backend_reason
    torch.testing.assert_close(result.logits, by_hand(model))
    assert differ(result.logits, plain)


def test_weights_of_its_own_are_not_what_it_computes_with():
    model = mixer()
    model.weights = lambda: EquilibriumReasoner.weights(model)._replace(lm_head=0 * model.lm_head.weight)
    result = model.solve(TOKENS, **RUN)
    assert "EquilibriumReasoner overrides weights" in result.backend_reason
    torch.testing.assert_close(result.logits, by_hand(model))


def test_an_own_start_holds_for_every_trajectory():
    model, depth = mixer(), 3
    model.__class__ = WarmStart
    result = model.solve(TOKENS, depth=depth, halt="none", breadth=2, seed=4, noise_scale=0.1, return_all=True)
    for restart in range(2):
        state = model.initial_state(TOKENS, 4, restart=restart)
        with torch.no_grad():
            for _ in range(depth):
                state, logits, _ = model(TOKENS, state, noise_scale=0.1)
        assert torch.equal(result.all_preds[:, restart], logits.argmax(-1))


@CASES
@needs_extension
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fused_backend_refuses(modify, why):
    model = mixer()
    modify(model)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: .*") as error:
        model.solve(TOKENS, **RUN, backend="cpu")
    assert why in str(error.value) and "use backend='reference'" in str(error.value)
    with pytest.raises(RuntimeError, match="compute in their own"):
        model.solve(TOKENS, **RUN, precision="bf16", backend="reference")


@pytest.mark.parametrize("make", [mixer, attention])
def test_a_hook_on_every_module_is_called(make):
    model, tokens = make(), TOKENS[:2]
    updates = model.config.updates_per_step
    plain = model.solve(tokens, depth=3, halt="none", backend="reference").logits
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            continue  # never called, only iterated
        rows = []
        handle = module.register_forward_hook(lambda module, args, output, rows=rows: rows.append(len(args[0])))
        result = model.solve(tokens, depth=3, halt="none")
        assert (name or "the model") + " has a forward hook" in result.backend_reason
        inner = name.startswith("L_level")
        assert rows == [2] * (3 * (updates if inner else 1)), name
        torch.testing.assert_close(result.logits, plain)
        handle.remove()
    assert modification(model) is None


def test_a_hook_for_all_modules_counts():
    model = mixer()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "a forward hook is registered for all modules" in model.solve(TOKENS, **RUN).backend_reason
    finally:
        handle.remove()
    assert modification(model) is None


@pytest.mark.parametrize(
    ("modify", "undo"),
    [
        (pruned, lambda layer: prune.remove(layer, "weight")),
        (old_weight_norm, lambda layer: nn.utils.remove_weight_norm(layer)),
    ],
)
def test_undone_it_runs_fused_again_and_gives_the_same(modify, undo):
    model = mixer()
    modify(model)
    through_modules = model.solve(TOKENS, **RUN)
    undo(model.get_submodule(LAYER))
    fused = model.solve(TOKENS, **RUN)
    assert fused.backend == ("cpu" if BUILT else "reference")
    torch.testing.assert_close(fused.logits, through_modules.logits, rtol=1e-4, atol=1e-4)


def test_a_parametrised_layer_runs_fused_with_its_weights_of_now():
    model = mixer()
    layer = model.get_submodule(LAYER)
    parametrizations.weight_norm(layer)
    before = model.solve(TOKENS, **RUN)
    assert before.backend == ("cpu" if BUILT else "reference")
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    after = model.solve(TOKENS, **RUN)
    torch.testing.assert_close(after.logits, by_hand(model), rtol=1e-4, atol=1e-4)
    assert differ(after.logits, before.logits)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model.solve(TOKENS, **RUN).logits, after.logits, rtol=0, atol=0)


def test_breadth_races_slots_and_depth_are_as_with_the_plain_operator():
    plain, model = mixer(), mixer()
    model.lm_head.register_forward_hook(lambda *_: None)
    options = dict(depth=30, breadth=3, tol=1e-3, select="first", checkpoints=(1, 5), trace=True, return_all=True)
    want = plain.solve(TOKENS, **options, backend="reference")
    for slots in (2, 64):
        got = model.solve(TOKENS, **options, slots=slots)
        for name in ("preds", "steps", "restart", "converged"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        torch.testing.assert_close(got.residual, want.residual)


class Without(EquilibriumReasoner):
    def forward(self, tokens, state):
        return super().forward(tokens, state)


class Wrong(EquilibriumReasoner):
    def forward(self, tokens, state, **keywords):
        return super().forward(tokens, state, **keywords)[:2]


class Headless(EquilibriumReasoner):
    def forward(self, tokens, state, **keywords):
        return super().forward(tokens, state, **keywords)[0], None, None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            Without,
            dict(noise_scale=0.5),
            "noise_scale=0.5 differs from the config's 0, and forward of Without takes no",
        ),
        (Wrong, {}, r"forward of Wrong must give \(LatentState of torch.float32 \[5, 6, 16\], logits \[5, 6, 7\]"),
        (Headless, {}, r"must give .*, got \(LatentState of torch.float32 \[5, 6, 16\], NoneType, NoneType\)"),
    ],
)
def test_a_forward_that_does_not_fit_is_named(kind, options, message):
    model = mixer()
    model.__class__ = kind
    with pytest.raises(TypeError, match=message):
        model.solve(TOKENS, **RUN, **options)


def test_the_noise_of_a_run_comes_through():
    plain, model = mixer(), mixer()
    model.lm_head.register_forward_hook(lambda *_: None)
    want = plain.solve(TOKENS, **RUN, noise_scale=0.1, backend="reference")
    got = model.solve(TOKENS, **RUN, noise_scale=0.1)
    torch.testing.assert_close(got.logits, want.logits)


def trained(model, steps=3, **settings):
    run = TrainSettings(batch_size=4, total_steps=steps, lr=1e-2, lr_warmup_steps=0, compile=False, **settings)
    trainer = Trainer(model, toy_stream(), run)
    for _ in range(steps):
        trainer.train_step()
    return trainer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_trained_and_solve_follows_it(dtype):
    model = mixer()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora(model)
    before, frozen = model.solve(TOKENS, **RUN).logits, copy.deepcopy(model.get_submodule(LAYER).base.weight)
    trainer = trained(model, forward_dtype=dtype)
    assert f"through its modules in PyTorch, not compiled, since {LAYER} is a" in trainer.kernel
    after = model.solve(TOKENS, **RUN).logits
    assert differ(after, before)
    adapter = model.get_submodule(LAYER)
    assert torch.equal(adapter.base.weight, frozen)
    replace(model, LAYER, Lora.merged)
    merged = model.solve(TOKENS, **RUN)
    assert merged.backend == ("cpu" if BUILT else "reference")
    torch.testing.assert_close(merged.logits, after, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_few_steps_of_an_adapter_change_what_a_shipped_model_solves():
    model = EquilibriumReasoner.from_pretrained("sudoku-small").float()
    puzzles, held_out = (sudoku_generator.generate(n, "medium", seed=seed) for n, seed in ((40, 6), (24, 5)))
    tokens, answers = (torch.from_numpy(x.astype("int64")) for x in (held_out.inputs, held_out.labels))

    def right(of):
        result = of.eval().solve(tokens, depth=6, halt="none")
        return result, (result.preds == answers).all(1)

    before = right(model)[1]
    model.requires_grad_(False)
    paths = [name for name, module in model.L_level.named_modules(prefix="L_level") if isinstance(module, nn.Linear)]
    for path in paths:
        replace(model, path, lambda old: Lora(old, 4))
        model.get_submodule(path).up.data.zero_()
    assert torch.equal(right(model)[1], before) and before.any() and not before.all()
    settings = TrainSettings(batch_size=4, total_steps=10, lr=1e-3, lr_warmup_steps=1, weight_decay=0.0, compile=False)
    trainer = Trainer(model, PuzzleStream(puzzles, sudoku.augment), settings)
    for _ in range(10):
        trainer.train_step()
    adapted, after = right(model)
    first = model.solve(tokens, depth=1, halt="none").logits  # more steps would amplify rounding
    assert adapted.backend == "reference" and not torch.equal(after, before)
    for path in paths:
        replace(model, path, Lora.merged)
    merged, right_when_merged = right(model)
    assert merged.backend == ("cpu" if BUILT else "reference") and torch.equal(right_when_merged, after)
    torch.testing.assert_close(model.solve(tokens, depth=1, halt="none").logits, first, rtol=1e-3, atol=1e-3)
    print(f"right of {len(tokens)}: {int(before.sum())} before, {int(after.sum())} with the adapter")


def test_a_model_of_peft_solves_and_is_merged():
    peft = pytest.importorskip("peft")
    model = mixer()
    config = peft.LoraConfig(target_modules=["gate_up_proj", "down_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    through_modules = adapted.solve(TOKENS, **RUN)
    assert "is a peft." in through_modules.backend_reason
    merged = adapted.merge_and_unload()
    result = merged.solve(TOKENS, **RUN)
    assert merged is model and result.backend == ("cpu" if BUILT else "reference")
    torch.testing.assert_close(result.logits, through_modules.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("modify", [pruned, old_weight_norm, hooked, subclassed])
def test_training_goes_on_with_what_the_user_made(modify):
    model = mixer()
    modify(model)
    before = model.solve(TOKENS, **RUN).logits
    trained(model)
    if modify is pruned:
        layer = model.get_submodule(LAYER)
        layer(torch.zeros(layer.in_features))
        assert (layer.weight == 0).float().mean() >= 0.5
    after = model.eval().solve(TOKENS, **RUN)
    torch.testing.assert_close(after.logits, by_hand(model))
    assert differ(after.logits, before)


def test_a_hook_that_comes_while_training_is_noticed():
    model, seen = mixer(), []
    trainer = trained(model, steps=1, forward_dtype="bfloat16")
    handle = model.lm_head.register_full_backward_hook(lambda *_: seen.append(1))
    trainer.train_step()
    assert seen and "lm_head has a backward hook" in trainer.kernel
    # Rows of the fused kernel go on; PyTorch's have no ids to go on with.
    assert trainer.rows.steps.max() == (2 if BUILT else 1)
    handle.remove()
    trainer.train_step()
    assert len(seen) == 1 and "lm_head" not in trainer.kernel


def assigned(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


@pytest.mark.parametrize(
    ("modify", "name"),
    [
        (lora, f"{LAYER}.weight"),
        (pruned, f"{LAYER}.weight"),
        (with_bias, f"{LAYER}.weight"),
        (assigned, "embed_tokens.embedding_weight"),
    ],
)
def test_other_parameters_need_another_trainer(modify, name):
    model = mixer()
    trainer = trained(model, steps=1)
    modify(model)
    with pytest.raises(RuntimeError, match=f"was made with: {name}.* came, went or was replaced; make a new Trainer"):
        trainer.train_step()
    trained(model, steps=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_after_a_change_of_the_model_are_what_it_gave(dtype):
    model, seen = mixer(), []
    trainer = trained(model, steps=2, forward_dtype=dtype)
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    trainer.train_step()
    assert torch.equal(trainer.rows.z_H, seen[0].z_H) and torch.equal(trainer.rows.z_L, seen[0].z_L)
    assert trainer.rows.steps.tolist() == seen[0].step.tolist()
    handle.remove()


def test_gradients_through_old_weight_norm_twice():
    model = mixer()
    old_weight_norm(model)
    norm = model.get_submodule(LAYER).weight_g
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(TOKENS, model.initial_state(TOKENS))[1].square().sum().backward()
        gradients.append(norm.grad.clone())
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


@pytest.mark.parametrize(
    ("modify", "undo", "why"),
    [
        (pruned, prune.remove, "has a forward pre-hook.*prune.remove"),
        (
            lambda model: parametrizations.weight_norm(model.get_submodule(LAYER)),
            parametrize.remove_parametrizations,
            "has parametrised weights.*parametrize.remove_parametrizations",
        ),
    ],
    ids=["pruned", "parametrised"],
)
def test_saving_names_what_is_in_the_way(modify, undo, why, tmp_path):
    model = mixer()
    modify(model)
    with pytest.raises(RuntimeError, match=f"{LAYER} {why}"):
        model.save_pretrained(tmp_path)
    undo(model.get_submodule(LAYER), "weight")
    model.save_pretrained(tmp_path)


def test_weights_of_another_kind_are_not_saved_by_their_numbers(tmp_path):
    model = mixer()
    weights_of_another_kind(model)
    with pytest.raises(RuntimeError, match=f"{LAYER}.weight is a .*Doubled, not a plain tensor.*dequantize"):
        model.save_pretrained(tmp_path)


def test_another_config_of_the_same_sizes_holds_for_every_module():
    model = mixer()
    model.config = dataclasses.replace(model.config, rms_norm_eps=0.5, lambda_=0.5)
    torch.testing.assert_close(model.solve(TOKENS, **RUN).logits, by_hand(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [dict(hidden_size=32), dict(L_layers=2), dict(mlp_t=False), dict(fixed_init=True)])
def test_a_config_of_other_sizes_is_refused(change):
    model = mixer()
    before, (name,) = model.config, change
    with pytest.raises(ValueError, match=f"sizes of the weights, got {name}={change[name]}; make a new model of it"):
        model.config = dataclasses.replace(before, **change)
    assert model.config is before


def test_a_config_that_is_set_while_training_holds():
    model = mixer()
    trainer = trained(model, steps=1)
    changed = dataclasses.replace(model.config, lambda_=0.5)
    model.config = changed
    trainer.train_step()
    assert model.config == changed == trainer.trained_config
    torch.manual_seed(0)
    trainer = trained(mixer(), steps=1, cycles="0:1x1x4,2:2x2x4")
    trainer.model.config = dataclasses.replace(trainer.model.config, lambda_=0.5)
    with pytest.raises(ValueError, match=r"model.config was set while training, and cycles say what it is"):
        trainer.train_step()
