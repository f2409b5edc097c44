"""Loading and saving: the official layout with its leftovers, hostile files, cards, shipped models, hub ids."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqr_kernels import checkpoint as ck
from eqr_kernels.atomic import atomic_write
from eqr_kernels.checkpoint import ModelCard, expected_shapes, load_checkpoint, save_checkpoint
from eqr_kernels.config import EqRConfig
from eqr_kernels.reasoner import EquilibriumReasoner

MLP = EqRConfig(seq_len=6, vocab_size=5, hidden_size=16, num_heads=2, H_cycles=2, L_cycles=3, L_layers=2)
ATTENTION = dataclasses.replace(MLP, mlp_t=False, pos_encodings="rope")
TRM = dataclasses.replace(MLP, fixed_init=True, lambda_=1.0, noise_scale=0.0)
CONFIGS = {"mlp_t": MLP, "attention": ATTENTION, "trm": TRM}


def weights(config: EqRConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in expected_shapes(config).items()}


def prefixed(state_dict: dict[str, torch.Tensor], prefix: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in state_dict.items())


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@dataclasses.dataclass
class LatentCarry:
    z_H: torch.Tensor
    z_L: torch.Tensor


@dataclasses.dataclass
class ModelCarry:
    inner_carry: LatentCarry
    steps: torch.Tensor
    halted: torch.Tensor
    current_data: dict[str, torch.Tensor]
    global_step: int | None = None


class ArchConfig:
    """Stands for a configuration object that was pickled whole."""

    def __init__(self) -> None:
        self.name = "eqr@EqRModel"


@pytest.fixture
def training_code(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Modules `models.eqr` and `config.schema` to pickle from, as a training run has them."""
    modules = {name: types.ModuleType(name) for name in ("models", "models.eqr", "config", "config.schema")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for cls, home in ((LatentCarry, "models.eqr"), (ModelCarry, "models.eqr"), (ArchConfig, "config.schema")):
        monkeypatch.setattr(cls, "__module__", home)
        setattr(modules[home], cls.__name__, cls)
    return modules["models.eqr"]


def arch_of(config: EqRConfig) -> dict[str, Any]:
    """The official `arch` section: without seq_len, vocab_size; TRM's without damping and noise."""
    trm = config.fixed_init
    arch = {
        "name": "trm@TRMModel" if trm else "eqr@EqRModel",
        "short_name": "EqR",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "halt_exploration_prob": 0.1,
        "halt_max_steps": 16,
        "H_cycles": config.H_cycles,
        "L_cycles": config.L_cycles,
        "H_layers": 0,
        "L_layers": config.L_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "expansion": 4,
        "pos_encodings": config.pos_encodings,
        "board_height": None,
        "board_width": None,
        "forward_dtype": "bfloat16",
        "mlp_t": config.mlp_t,
    }
    return arch | (
        {"no_ACT_continue": True}
        if trm
        else {"lambda_": 0.95, "noise_scale": 0.01, "H_init_std": 1.0, "L_init_std": 1.0}
    )


def official(
    config: EqRConfig, prefix: str = "_orig_mod.model.inner.", *, carry: bool = True, **changes: Any
) -> dict[str, Any]:
    """The dict that the official code saves: `model` and `ema` differ, so that it shows which was taken."""
    model, ema = weights(config, 0), weights(config, 1)
    for name in ("H_init", "L_init"):
        if name in model:
            model[name] = model[name].bfloat16()
            del ema[name]  # buffers are not averaged
    moments = {i: {"exp_avg": torch.zeros_like(t), "exp_avg_sq": t.square()} for i, t in enumerate(model.values())}
    optimizer = {
        "state": moments,
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [*moments]}],
    }
    state = torch.zeros(3, config.seq_len, config.hidden_size, dtype=torch.bfloat16)
    kept = ModelCarry(
        LatentCarry(state, state.clone()),
        torch.ones(3, dtype=torch.int32),
        torch.ones(3, dtype=torch.bool),
        {"inputs": torch.ones(3, config.seq_len)},
        7,
    )
    generator = np.random.default_rng(0)
    return {
        "step": 50000,
        "total_steps": 50000,
        "model": prefixed(model, prefix),
        "optimizers": [optimizer],
        "optimizer_lrs": [1e-4],
        "carry": kept if carry else None,
        "rng": {"torch": torch.random.get_rng_state(), "cuda": None},
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "iteration": 3,
        "wandb_run_id": None,
        "train_dataset": {"train_state": {"rng": generator, "rng_state": generator.bit_generator.state}},
        "config": {"arch": arch_of(config), "lr": np.float64(1e-4), "global_batch_size": 768, "ema": True},
        "ema": {"mu": 0.999, "shadow": prefixed(ema, prefix)},
    } | changes


def saved(tmp_path: Path, content: Any, name: str = "eqr.pth", **options: Any) -> Path:
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


@pytest.fixture(autouse=True)
def no_shipped_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("eqr_kernels.checkpoint.sources.PRETRAINED", tmp_path / "pretrained")
    return tmp_path / "pretrained"


class TestOfficialLayout:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_loads_with_its_leftovers(self, kind, tmp_path, training_code, monkeypatch):
        config = CONFIGS[kind]
        content = official(config)
        path = saved(tmp_path, content)
        for module in ("models", "models.eqr", "config", "config.schema"):  # the reader has no training code
            monkeypatch.delitem(sys.modules, module)
        loaded = load_checkpoint(path)
        assert loaded.config == config
        expected = weights(config, 1)
        if config.fixed_init:
            expected |= {k: weights(config, 0)[k].bfloat16() for k in ("H_init", "L_init")}
        assert_same_bits(loaded.state_dict, expected)
        assert loaded.card.steps == 50000 and "EMA" in loaded.card.notes and loaded.card.config == config
        assert loaded.dtype == torch.float32
        assert loaded.origin == str(path)

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_fits_the_module(self, kind, tmp_path, training_code):
        model = EquilibriumReasoner(CONFIGS[kind])
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected_shapes(CONFIGS[kind])
        loaded = EquilibriumReasoner.from_pretrained(saved(tmp_path, official(CONFIGS[kind])))
        assert torch.equal(loaded.state_dict()["lm_head.weight"], weights(CONFIGS[kind], 1)["lm_head.weight"])
        loaded.save_pretrained(tmp_path / "again")
        again = EquilibriumReasoner.from_pretrained(tmp_path / "again")
        assert_same_bits(again.state_dict(), loaded.state_dict())

    @pytest.mark.parametrize(
        "prefix",
        [
            "",
            "model.",
            "_orig_mod.",
            "module.",
            "model.inner.",
            "_orig_mod.model.inner.",
            "model._orig_mod.inner.",
            "module._orig_mod.model._orig_mod.inner._orig_mod.",
        ],
    )
    def test_any_prefix(self, prefix, tmp_path, training_code):
        assert_same_bits(load_checkpoint(saved(tmp_path, official(MLP, prefix))).state_dict, weights(MLP, 1))

    @pytest.mark.parametrize("ema", [None, {}, {"mu": 0.999, "shadow": {}}])
    def test_without_ema_takes_model(self, ema, tmp_path, training_code):
        loaded = load_checkpoint(saved(tmp_path, official(MLP, ema=ema)))
        assert_same_bits(loaded.state_dict, weights(MLP, 0))
        assert "EMA" not in loaded.card.notes

    def test_missing_ema_key(self, tmp_path, training_code):
        content = official(MLP)
        del content["ema"]
        assert_same_bits(load_checkpoint(saved(tmp_path, content)).state_dict, weights(MLP, 0))

    def test_flat_ema(self, tmp_path, training_code):
        content = official(MLP, ema={"mu": 0.999, **prefixed(weights(MLP, 2), "model.inner.")})
        assert_same_bits(load_checkpoint(saved(tmp_path, content)).state_dict, weights(MLP, 2))

    @pytest.mark.parametrize("nested", [False, True])
    def test_averages_of_trm(self, nested, tmp_path, training_code):
        averages = prefixed(weights(MLP, 2), "_orig_mod.model.inner.")
        content = official(MLP, ema=None) | {
            "optimizers": [],
            "ema_helper": {"shadow": averages} if nested else averages,
        }
        loaded = load_checkpoint(saved(tmp_path, content))
        assert_same_bits(loaded.state_dict, weights(MLP, 2))
        assert "EMA" in loaded.card.notes

    @pytest.mark.parametrize("key", ["swa", "model_ema", "ema_helper"])
    def test_other_copies_of_the_weights_are_told(self, key, tmp_path, training_code):
        # As torch.optim.swa_utils.AveragedModel keeps them.
        copy = prefixed(weights(MLP, 2), "module._orig_mod.model.inner.")
        content = official(MLP) | {key: {"n_averaged": torch.tensor(3), **copy}}
        with pytest.warns(
            UserWarning, match=f"'{key}' holds another copy of the weights.*'ema' or 'ema_helper'"
        ) as warned:
            loaded = load_checkpoint(saved(tmp_path, content))
        assert warned[0].filename == __file__
        assert_same_bits(loaded.state_dict, weights(MLP, 1))

    @pytest.mark.parametrize("key", ["optimizers", "ema"])
    def test_tensors_by_number_are_no_averages(self, key, tmp_path, training_code):
        loaded = load_checkpoint(saved(tmp_path, official(MLP) | {key: {0: torch.ones(3)}}))
        assert_same_bits(loaded.state_dict, weights(MLP, 0 if key == "ema" else 1))

    def test_parameter_lacking_in_ema_is_reported(self, tmp_path, training_code):
        content = official(MLP)
        del content["ema"]["shadow"]["_orig_mod.model.inner.q_head.bias"]
        path = saved(tmp_path, content)
        with pytest.warns(UserWarning, match="EMA lacks q_head.bias"):
            loaded = load_checkpoint(path)
        assert torch.equal(loaded.state_dict["q_head.bias"], weights(MLP, 0)["q_head.bias"])
        assert torch.equal(loaded.state_dict["lm_head.weight"], weights(MLP, 1)["lm_head.weight"])

    def test_caches_are_dropped(self, tmp_path, training_code):
        content = official(ATTENTION)
        content["model"] |= {
            "model.inner.rotary_emb.cos_cached": torch.ones(6, 8),
            "model.inner.rotary_emb.sin_cached": torch.ones(6, 8),
        }
        assert_same_bits(load_checkpoint(saved(tmp_path, content)).state_dict, weights(ATTENTION, 1))

    def test_start_buffers_of_a_random_start_are_dropped_with_a_warning(self, tmp_path, training_code):
        content = official(MLP)
        content["model"] |= {"H_init": torch.ones(16), "L_init": torch.ones(16)}
        path = saved(tmp_path, content)
        with pytest.warns(UserWarning, match="H_init and L_init not used"):
            loaded = load_checkpoint(path)
        assert_same_bits(loaded.state_dict, weights(MLP, 1))

    def test_trm_without_arch_name(self, tmp_path, training_code):
        content = official(TRM)
        del content["config"]["arch"]["name"]
        assert load_checkpoint(saved(tmp_path, content)).config == TRM

    def test_trm_without_its_start_does_not_load(self, tmp_path, training_code):
        content = official(TRM, model=None)
        with pytest.raises(RuntimeError, match="missing: H_init, L_init"):
            load_checkpoint(saved(tmp_path, content))

    def test_attention_without_carry_needs_config(self, tmp_path, training_code):
        path = saved(tmp_path, official(ATTENTION, carry=False))
        with pytest.raises(ValueError, match=r"neither its config nor its tensors tell seq_len; pass config=EqRConfig"):
            load_checkpoint(path)
        other_length = dataclasses.replace(ATTENTION, seq_len=9)
        assert load_checkpoint(path, other_length).config == other_length

    def test_fields_that_are_lacking_are_named(self, tmp_path, training_code):
        content = official(ATTENTION)
        for name in ("num_heads", "L_cycles"):
            del content["config"]["arch"][name]
        with pytest.raises(ValueError, match="tell L_cycles, num_heads; pass config"):
            load_checkpoint(saved(tmp_path, content))

    def test_unknown_config_field_is_named_with_the_nearest(self, tmp_path, training_code):
        content = official(MLP)
        content["config"]["arch"]["L_cycle"] = 6
        path = saved(tmp_path, content)
        with pytest.raises(ValueError, match=r"eqr\.pth.*'L_cycle'.*'L_cycles'"):
            load_checkpoint(path)
        assert load_checkpoint(path, MLP).config == MLP

    def test_pickled_config_object_is_not_read(self, tmp_path, training_code):
        path = saved(tmp_path, official(MLP) | {"config": ArchConfig()})
        with pytest.raises(ValueError, match="no readable 'config' with an 'arch' section"):
            load_checkpoint(path)
        assert_same_bits(load_checkpoint(path, MLP).state_dict, weights(MLP, 1))

    def test_explicit_config_wins(self, tmp_path, training_code):
        config = dataclasses.replace(MLP, lambda_=0.5, H_cycles=1)
        loaded = load_checkpoint(saved(tmp_path, official(MLP)), config)
        assert loaded.config == loaded.card.config == config

    def test_bare_state_dict(self, tmp_path):
        path = saved(tmp_path, prefixed(weights(MLP), "_orig_mod.model.inner."), "step_500")
        assert_same_bits(load_checkpoint(path, MLP).state_dict, weights(MLP))
        with pytest.raises(ValueError, match="pass config="):
            load_checkpoint(path)

    def test_old_torch_format(self, tmp_path):
        path = saved(tmp_path, weights(MLP), _use_new_zipfile_serialization=False)
        assert_same_bits(load_checkpoint(path, MLP).state_dict, weights(MLP))

    def test_parameters_load_as_plain_tensors_that_own_their_memory(self, tmp_path):
        path = saved(tmp_path, {k: torch.nn.Parameter(v) for k, v in weights(MLP).items()})
        loaded = load_checkpoint(path, MLP)
        path.write_bytes(bytes(path.stat().st_size))  # in place: a memory-mapped tensor would turn to zeros
        assert_same_bits(loaded.state_dict, weights(MLP))
        assert all(
            type(t) is torch.Tensor and t.is_contiguous() and not t.requires_grad for t in loaded.state_dict.values()
        )


class TestMisfits:
    @pytest.mark.parametrize("key", ["_orig_mod.model.inner.puzzle_emb.weights", "model.inner.puzzle_emb.local_ids"])
    def test_puzzle_embeddings(self, key, tmp_path, training_code):
        content = official(MLP)
        content["model"][key] = torch.zeros(4, 16)
        with pytest.raises(RuntimeError, match=r"eqr\.pth: has puzzle embeddings \(.*puzzle_emb.*puzzle_emb_ndim=0"):
            load_checkpoint(saved(tmp_path, content))

    @pytest.mark.parametrize("key", ["embed_pos.embedding_weight", "absolute_pos_embedding"])
    def test_other_position_embeddings(self, key, tmp_path):
        with pytest.raises(RuntimeError, match="supported are rope, rope2d and none"):
            load_checkpoint(saved(tmp_path, weights(MLP) | {"inner." + key: torch.zeros(6, 16)}), MLP)

    def test_hrm(self, tmp_path):
        state_dict = weights(MLP)
        state_dict["H_level.layers.0.mlp.down_proj.weight"] = torch.zeros(16, 256)
        with pytest.raises(RuntimeError, match="H_level of 1 layers, L_level of 2 layers: an HRM .*does not run"):
            load_checkpoint(saved(tmp_path, state_dict), MLP)

    def test_every_kind_of_misfit_is_listed(self, tmp_path):
        state_dict = weights(MLP)
        del state_dict["q_head.bias"]
        state_dict["bias"] = torch.zeros(2)
        state_dict["lm_head.weight"] = torch.zeros(6, 16)
        with pytest.raises(
            RuntimeError,
            match=r"eqr\.pth: .*do not fit.*missing: q_head\.bias; unexpected: bias; of another shape: lm_head\.weight "
            r"\[6, 16\] instead of \[5, 16\]\. Pass the config",
        ):
            load_checkpoint(saved(tmp_path, state_dict), MLP)

    def test_long_lists_are_cut(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"missing: L_level\.layers\.2(\S+ ){5}and 7 more\. Pass the config"):
            load_checkpoint(saved(tmp_path, weights(MLP)), dataclasses.replace(MLP, L_layers=5))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_weights_that_are_not_finite(self, value, tmp_path):
        state_dict = weights(MLP)
        state_dict["q_head.weight"][1, 3] = value
        with pytest.raises(RuntimeError, match="q_head.weight has 1 of 32 values that are not finite"):
            load_checkpoint(saved(tmp_path, state_dict), MLP)
        with pytest.raises(RuntimeError, match="q_head.weight has 1 of 32 values that are not finite"):
            save_checkpoint(tmp_path / "out", state_dict, MLP)
        assert not (tmp_path / "out").exists()

    def test_two_names_for_one_tensor(self, tmp_path):
        state_dict = weights(MLP) | {"_orig_mod.q_head.bias": torch.zeros(2)}
        with pytest.raises(RuntimeError, match="two tensors are named 'q_head.bias'"):
            load_checkpoint(saved(tmp_path, state_dict), MLP)

    @pytest.mark.parametrize(
        "bad", [torch.zeros(2, dtype=torch.int64), torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")]
    )
    def test_tensors_that_are_no_weights(self, bad, tmp_path):
        with pytest.raises(RuntimeError, match="q_head.bias is .*weights must be dense and one of"):
            load_checkpoint(saved(tmp_path, weights(MLP) | {"q_head.bias": bad}), MLP)

    def test_values_that_are_no_tensors(self, tmp_path):
        with pytest.raises(RuntimeError, match="'state_dict' is a dict, not a tensor"):
            load_checkpoint(saved(tmp_path, {"state_dict": weights(MLP)}), MLP)
        with pytest.raises(RuntimeError, match="holds a list, not a checkpoint dict"):
            load_checkpoint(saved(tmp_path, [1, 2]), MLP)
        with pytest.raises(RuntimeError, match="holds no weights"):
            load_checkpoint(saved(tmp_path, {}), MLP)


class Payload:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


class Touching:
    """Runs code when made, when filled in and when given its state."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def __setstate__(self, state: dict[str, str]) -> None:
        touch(state["path"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
class TestHostileFiles:
    @pytest.fixture
    def sentinel(self, tmp_path) -> Path:
        return tmp_path / "sentinel"

    def hostile(self, kind: str, sentinel: Path) -> Payload:
        code = f"open({str(sentinel)!r}, 'w').close()"
        return {
            "os.system": Payload(os.system, f"touch '{sentinel}'"),
            "exec": Payload(builtins.exec, code),
            "eval": Payload(builtins.eval, code),
            "subprocess": Payload(subprocess.call, ["touch", str(sentinel)]),
            "own function": Payload(touch, str(sentinel)),
        }[kind]

    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("kind", ["os.system", "exec", "eval", "subprocess", "own function"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_calls_are_refused(self, kind, protocol, zipped, tmp_path, sentinel):
        content = {"model": weights(MLP), "carry": self.hostile(kind, sentinel), "config": {"arch": arch_of(MLP)}}
        path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        with pytest.raises(RuntimeError, match="nothing in it was run"):
            load_checkpoint(path)
        with pytest.raises(RuntimeError, match="nothing in it was run"):
            load_checkpoint(path, MLP)
        assert not sentinel.exists()
        torch.load(path, weights_only=False)  # the file does bite
        assert sentinel.exists()

    def test_the_name_is_told(self, tmp_path, sentinel):
        path = saved(tmp_path, {"model": {}, "carry": self.hostile("os.system", sentinel)})
        with pytest.raises(RuntimeError, match=r"names '(posix|nt)\.system', which no EqR checkpoint needs"):
            load_checkpoint(path)

    def test_a_plain_pickle_is_refused(self, tmp_path, sentinel):
        path = tmp_path / "eqr.pth"
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps(self.hostile("exec", sentinel), protocol))
            with pytest.raises(RuntimeError, match="nothing in it was run"):
                load_checkpoint(path, MLP)
        assert not sentinel.exists()

    def test_names_of_training_code_are_inert_though_importable(self, tmp_path, sentinel, training_code, monkeypatch):
        monkeypatch.setattr(touch, "__module__", "models.eqr")
        monkeypatch.setattr(Touching, "__module__", "models.eqr")
        training_code.touch, training_code.Touching = touch, Touching
        content = official(MLP, carry=False, a=Payload(touch, str(sentinel)), b=Touching(str(sentinel)))
        path = saved(tmp_path, content)
        assert_same_bits(load_checkpoint(path).state_dict, weights(MLP, 1))
        assert not sentinel.exists()
        torch.load(path, weights_only=False)
        assert sentinel.exists()

    @pytest.mark.parametrize(
        "name", [b"models.eqr\nos.system", b"numpy.random\nos.system", b"__main__\n__builtins__.exec", b"config.x\nsys"]
    )
    def test_dotted_names_do_not_lead_out(self, name, tmp_path, sentinel):
        # GLOBAL name, one argument, REDUCE, then the same as NEWOBJ and with BUILD
        command = f"touch '{sentinel}'".encode()
        argument = b"X" + len(command).to_bytes(4, "little") + command + b"\x85"
        program = (
            b"\x80\x02"
            + b"c"
            + name
            + b"\n"
            + argument
            + b"R"
            + b"c"
            + name
            + b"\n"
            + argument
            + b"\x81"
            + argument
            + b"b\x86."
        )
        path = tmp_path / "eqr.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("eqr/data.pkl", program)
            archive.writestr("eqr/version", "3\n")
        with pytest.raises(RuntimeError, match="holds a tuple, not a checkpoint dict"):
            load_checkpoint(path, MLP)
        assert not sentinel.exists()

    def test_what_the_process_allows_elsewhere_stays_out(self, tmp_path, sentinel):
        path = saved(tmp_path, {"model": weights(MLP), "carry": Payload(touch, str(sentinel))})
        before = torch.serialization.get_safe_globals()
        torch.serialization.add_safe_globals([touch])
        try:
            with pytest.raises(RuntimeError, match="refused"):
                load_checkpoint(path, MLP)
            assert not sentinel.exists()
            assert touch in torch.serialization.get_safe_globals()
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)

    def test_the_allow_list_is_left_as_it_was(self, tmp_path, training_code):
        before = set(torch.serialization.get_safe_globals())
        load_checkpoint(saved(tmp_path, official(MLP)))
        assert set(torch.serialization.get_safe_globals()) == before

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not really", b"\x80\x02."])
    def test_damaged_files(self, content, tmp_path):
        path = tmp_path / "eqr.pth"
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"eqr\.pth: not loadable.*undamaged copy"):
            load_checkpoint(path, MLP)

    def test_truncated_file(self, tmp_path, training_code):
        path = saved(tmp_path, official(MLP))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(RuntimeError, match="not loadable"):
            load_checkpoint(path)

    def test_forced_unsafe_loading_does_not_reach_us(self, tmp_path, sentinel, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        path = saved(tmp_path, {"model": {}, "carry": self.hostile("exec", sentinel)})
        with pytest.raises(RuntimeError, match="refused"):
            load_checkpoint(path)
        assert not sentinel.exists()


CARD = ModelCard(
    MLP,
    data={"puzzles": 1000, "source": "own"},
    steps=12,
    accuracies={"depth 16": {"easy": 0.5}},
    tol=0.0123,
    tol_fast=0.0456,
    tol_by_precision={"int8": {"tol": None, "tol_fast": 0.06, "tol_missing": "too few"}},
    noise_scale=0.005,
    window=4,
    licence="Apache-2.0",
    commit="abc",
    notes="ümlaut",
    extra={"later": [1, {"x": None}]},
)


class TestSaving:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", CONFIGS)
    @pytest.mark.parametrize("target", ["folder", "deep/model.v2.safetensors"])
    def test_round_trip_keeps_every_bit(self, dtype, kind, target, tmp_path):
        config = CONFIGS[kind]
        state_dict = weights(config, dtype=dtype)
        # same memory twice, and a tensor that is not contiguous
        state_dict["lm_head.weight"] = state_dict["embed_tokens.embedding_weight"]
        state_dict["q_head.weight"] = state_dict["q_head.weight"].T.contiguous().T
        card = dataclasses.replace(CARD, config=config)
        path = save_checkpoint(tmp_path / target, prefixed(state_dict, "_orig_mod."), config, card)
        assert sorted(p.name for p in path.parent.iterdir()) == [f"{path.stem}.json", f"{path.stem}.safetensors"]
        for source in (tmp_path / target, str(path)):
            loaded = load_checkpoint(source)
            assert_same_bits(loaded.state_dict, state_dict)
            assert loaded.config == config
            assert dataclasses.replace(loaded.card, sha256="") == card
            assert loaded.dtype == dtype

    def test_mixed_dtypes_stay(self, tmp_path):
        state_dict = weights(MLP, dtype=torch.bfloat16)
        state_dict["q_head.bias"] = state_dict["q_head.bias"].half()
        loaded = load_checkpoint(save_checkpoint(tmp_path, state_dict, MLP))
        assert_same_bits(loaded.state_dict, state_dict)
        assert loaded.dtype == torch.float32

    def test_saving_twice_gives_the_same_bytes(self, tmp_path):
        paths = [save_checkpoint(tmp_path / name, weights(MLP), MLP, CARD) for name in "ab"]
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_header_carries_the_config(self, tmp_path):
        path = save_checkpoint(tmp_path, weights(TRM), TRM, None)
        path.with_suffix(".json").unlink()
        loaded = load_checkpoint(path)
        assert loaded.config == TRM and loaded.card == ModelCard(TRM)

    def test_foreign_safetensors_needs_config(self, tmp_path):
        from safetensors.torch import save_file

        path = tmp_path / "w.safetensors"
        save_file(dict(prefixed(weights(MLP), "model.inner.")), path)
        with pytest.raises(ValueError, match=r"no config in its header and no w\.json beside it; pass config"):
            load_checkpoint(path)
        assert_same_bits(load_checkpoint(path, MLP).state_dict, weights(MLP))
        save_file(weights(MLP), path, {"eqr_config": '{"hidden": 3}'})
        with pytest.raises(ValueError, match=r"eqr_config in its header: .*'hidden'"):
            load_checkpoint(path)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(RuntimeError, match="not a whole safetensors file"):
            load_checkpoint(path, MLP)

    def test_explicit_config_drops_what_was_measured_with_another(self, tmp_path):
        path = save_checkpoint(tmp_path, weights(MLP), MLP, CARD)
        same = load_checkpoint(path, MLP).card
        measured = ("tol", "tol_fast", "noise_scale", "accuracies")
        assert [getattr(same, name) for name in measured] == [getattr(CARD, name) for name in measured]
        other = load_checkpoint(path, dataclasses.replace(MLP, lambda_=0.5)).card
        assert [getattr(other, name) for name in measured] == [None, None, None, {}]
        assert other.data == CARD.data and other.config.lambda_ == 0.5

    def test_card_of_other_weights_is_refused(self, tmp_path):
        path = save_checkpoint(tmp_path / "a", weights(MLP, 0), MLP, CARD)
        other = save_checkpoint(tmp_path / "b", weights(MLP, 1), MLP, CARD)
        os.replace(other, path)
        with pytest.raises(RuntimeError, match=r"model\.json: describes other weights.*sha256 differs"):
            load_checkpoint(path)

    def test_card_of_another_config_is_refused(self, tmp_path):
        path = save_checkpoint(tmp_path, weights(MLP), MLP, CARD)
        card = dataclasses.replace(CARD, config=dataclasses.replace(MLP, L_cycles=1))
        path.with_suffix(".json").write_text(card.to_json())
        with pytest.raises(RuntimeError, match=r"model\.json: its config is not that in the header.*config="):
            load_checkpoint(path)

    @pytest.mark.parametrize("target", ["x.pth", "x.pt", "x.json", "x.bin"])
    def test_wrong_target(self, target, tmp_path):
        with pytest.raises(ValueError, match="target must be a folder or end in .safetensors"):
            save_checkpoint(tmp_path / target, weights(MLP), MLP)

    def test_what_does_not_fit_is_not_written(self, tmp_path):
        with pytest.raises(RuntimeError, match="do not fit"):
            save_checkpoint(tmp_path / "out", weights(MLP), ATTENTION)
        with pytest.raises(ValueError, match=r"card.config differs from config in mlp_t \(True, not False\)"):
            save_checkpoint(tmp_path / "out", weights(ATTENTION), ATTENTION, CARD)
        assert not (tmp_path / "out").exists()


class TestAtomicity:
    @pytest.mark.parametrize("function", ["replace", "fsync"])
    @pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
    def test_an_interrupted_write_leaves_the_old_file(self, function, stop, tmp_path, monkeypatch):
        path = tmp_path / "file"
        atomic_write(path, b"old")

        def crash(*_: Any) -> None:
            raise stop

        with monkeypatch.context() as patch:
            patch.setattr(os, function, crash)
            with pytest.raises(type(stop)):
                atomic_write(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        atomic_write(path, b"new")
        assert path.read_bytes() == b"new"

    def test_a_failed_save_leaves_the_old_model(self, tmp_path, monkeypatch):
        save_checkpoint(tmp_path / "m", weights(MLP, 0), MLP, CARD)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint(tmp_path / "m", weights(MLP, 1), MLP, CARD)
        assert_same_bits(load_checkpoint(tmp_path / "m").state_dict, weights(MLP, 0))
        assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]

    def test_a_stop_between_the_files_is_noticed(self, tmp_path, monkeypatch):
        path = save_checkpoint(tmp_path / "m", weights(MLP, 0), MLP, CARD)
        replace = os.replace

        def crash_on_card(source: Any, target: Any) -> None:
            if str(target).endswith(".json"):
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash_on_card)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(tmp_path / "m", weights(MLP, 1), MLP, CARD)
        with pytest.raises(RuntimeError, match="interrupted save.*delete the card"):
            load_checkpoint(path)
        path.with_suffix(".json").unlink()
        assert_same_bits(load_checkpoint(path).state_dict, weights(MLP, 1))


class TestCard:
    def test_round_trip_keeps_unknown_keys(self):
        again = ModelCard.from_json(CARD.to_json())
        assert again == CARD
        assert again.extra == {"later": [1, {"x": None}]}
        assert json.loads(CARD.to_json())["later"] == [1, {"x": None}]
        odd = json.loads(CARD.to_json()) | {"extra": 5}
        assert json.loads(ModelCard.from_json(json.dumps(odd)).to_json()) == odd

    def test_a_precision_has_the_tolerances_that_were_found_for_it(self):
        assert CARD.in_precision("bf16") is CARD
        own = CARD.in_precision("int8")
        assert (own.tol, own.tol_fast, own.tol_missing, own.noise_scale) == (None, 0.06, "too few", 0.005)

    @pytest.mark.parametrize(
        ("own", "error", "message"),
        [
            ({"tolerance": 0.1}, ValueError, "must hold tol, tol_fast, tol_missing of each precision"),
            (0.1, ValueError, "must hold tol, tol_fast, tol_missing of each precision"),
            ({"tol": "0.1"}, TypeError, "'tol' must be"),
            ({"tol": 0.2, "tol_fast": 0.1}, ValueError, "'tol_fast' must be at least tol"),
        ],
    )
    def test_tolerances_of_a_precision_are_checked(self, own, error, message):
        with pytest.raises(error, match=message):
            dataclasses.replace(CARD, tol_by_precision={"int8": own})

    @pytest.mark.parametrize(("tol", "missing"), [(0.0794, "promised only that no answer is lost"), (None, "")])
    @pytest.mark.parametrize("version", [{"schema_version": 1}, {}])
    def test_the_tolerance_of_an_old_card_is_no_promise(self, tol, missing, version):
        old = {"config": MLP.to_dict(), "tol": tol, "noise_scale": 0.02, "mine": 1, **version}
        card = ModelCard.from_json(json.dumps(old))
        assert (card.tol, card.tol_fast, card.noise_scale, card.extra) == (None, tol, 0.02, {"mine": 1})
        assert missing in card.tol_missing and bool(card.tol_missing) == bool(missing)
        assert ModelCard.from_json(card.to_json()) == card and card.schema_version == 2

    @pytest.mark.parametrize("text", ["", "{", "nonsense", "[]", "3", '"x"', "{}", '{"config": 3}', '{"config": null}'])
    def test_no_card(self, text, tmp_path):
        path = save_checkpoint(tmp_path, weights(MLP), MLP)
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match=r"model\.json: not a (JSON file|model card).*save_pretrained"):
            load_checkpoint(path)

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("tol", "0.1", TypeError, r"'tol' must be int or float or NoneType, got '0.1' \(str\)"),
            ("tol", True, TypeError, "'tol' must be"),
            ("tol", float("nan"), ValueError, "'tol' must be finite and at least 0, got nan"),
            ("tol", -1.0, ValueError, "'tol' must be finite and at least 0"),
            ("noise_scale", [], TypeError, "'noise_scale' must be"),
            ("noise_scale", float("inf"), ValueError, "'noise_scale' must be finite"),
            ("window", 0, ValueError, "'window' must be finite and at least 1, got 0"),
            ("window", 2.0, TypeError, "'window' must be int"),
            ("steps", -1, ValueError, "'steps' must be"),
            ("steps", 1.5, TypeError, "'steps' must be int or NoneType"),
            ("accuracies", [], TypeError, "'accuracies' must be dict"),
            ("data", 3, TypeError, "'data' must be str or dict"),
            ("licence", None, TypeError, "'licence' must be str"),
            ("config", {"seq_len": "9"}, TypeError, "seq_len must be an int"),
            ("config", {"seqlen": 9}, ValueError, "'seqlen'.*'seq_len'"),
            ("tol_fast", "0.1", TypeError, "'tol_fast' must be int or float or NoneType"),
            ("tol_fast", 0.01, ValueError, "'tol_fast' must be at least tol.*got 0.01 and 0.0123.*eqr calibrate"),
            ("tol_missing", None, TypeError, "'tol_missing' must be str"),
            ("tol_missing", "why", ValueError, "'tol_missing' must be empty where there is a tol, got 'why'"),
            ("schema_version", 3, ValueError, "'schema_version' is 3, this version reads 1 and 2; upgrade eqr_kernels"),
            ("rng_layout", 2, ValueError, "'rng_layout' is 2, .*layout 1.*eqr calibrate"),
        ],
    )
    def test_bad_fields_name_file_and_field(self, name, value, error, message, tmp_path):
        path = save_checkpoint(tmp_path, weights(MLP), MLP)
        path.with_suffix(".json").write_text(json.dumps(json.loads(CARD.to_json()) | {name: value}))
        with pytest.raises(error, match=r"model\.json: .*" + message):
            load_checkpoint(path)

    def test_values_that_json_does_not_hold(self):
        with pytest.raises(TypeError, match="'accuracies'.*must be finite JSON values"):
            ModelCard(MLP, accuracies={"x": torch.ones(1)})
        with pytest.raises(ValueError, match="'accuracies'.*must be finite JSON values"):
            ModelCard(MLP, accuracies={"x": float("nan")})
        with pytest.raises(ValueError, match="'extra' must not repeat the card's own fields, got tol"):
            ModelCard(MLP, extra={"tol": 1})
        with pytest.raises(TypeError, match="'config' must be EqRConfig"):
            ModelCard({"seq_len": 3})  # type: ignore[arg-type]


class TestSources:
    def test_shipped_name(self, no_shipped_models, tmp_path, monkeypatch):
        save_checkpoint(no_shipped_models / "sudoku-small.safetensors", weights(MLP), MLP, CARD)
        assert ck.available_models() == ["sudoku-small"]
        loaded = load_checkpoint("sudoku-small")
        assert_same_bits(loaded.state_dict, weights(MLP))
        assert loaded.card.tol == CARD.tol
        with pytest.raises(ValueError, match=r"source 'sudoku-smal' is no path, .* no shipped model \(sudoku-small\)"):
            load_checkpoint("sudoku-smal")
        with pytest.raises(ValueError, match="revision='v1' is for hub repositories only"):
            load_checkpoint("sudoku-small", revision="v1")
        monkeypatch.chdir(tmp_path)
        save_checkpoint("sudoku-small", weights(MLP, 1), MLP)
        with pytest.warns(
            UserWarning, match=r"took the shipped model, not the path here; for that say './sudoku-small'"
        ):
            assert_same_bits(load_checkpoint("sudoku-small").state_dict, weights(MLP))
        for path in ("./sudoku-small", Path("sudoku-small")):
            assert_same_bits(load_checkpoint(path).state_dict, weights(MLP, 1))

    def test_no_such_source(self, tmp_path):
        for name in ("x.pth", "x.pt", "x.safetensors", "run/x.pth"):
            with pytest.raises(FileNotFoundError, match="no such file"):
                load_checkpoint(name)
        with pytest.raises(ValueError, match=r"no shipped model \(none in this installation\)"):
            load_checkpoint("nothing")
        with pytest.raises(FileNotFoundError, match=r"no model.safetensors in it; give a folder of save_pretrained"):
            load_checkpoint(tmp_path)
        for source in (None, 3, b"x"):
            with pytest.raises(TypeError, match="source must be a name, a path or a hub id"):
                load_checkpoint(source)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="config must be an EqRConfig or None, got dict; use EqRConfig.from_dict"):
            load_checkpoint("x.pth", {"seq_len": 3})  # type: ignore[arg-type]

    def test_hub(self, tmp_path, monkeypatch):
        calls: list[tuple[Any, ...]] = []
        hub = types.ModuleType("huggingface_hub")

        def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((repo_id, revision, sorted(allow_patterns)))
            if repo_id == "org/gone":
                raise OSError("404")
            return str(tmp_path / repo_id)

        hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        save_checkpoint(tmp_path / "org/model", weights(MLP), MLP, CARD)
        (tmp_path / "org/empty").mkdir()
        assert_same_bits(load_checkpoint("org/model", revision="v1").state_dict, weights(MLP))
        assert calls == [("org/model", "v1", ["model.json", "model.safetensors"])]
        with pytest.raises(FileNotFoundError, match="'org/empty' holds no model.safetensors; download its checkpoint"):
            load_checkpoint("org/empty")
        with pytest.raises(RuntimeError, match="'org/gone' is no path here, and fetching it from the hub failed: 404"):
            load_checkpoint("org/gone")
        calls.clear()
        monkeypatch.chdir(tmp_path)
        assert_same_bits(load_checkpoint("org/model").state_dict, weights(MLP))  # a path, so nothing is fetched
        assert not calls

    def test_hub_without_huggingface_hub(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match=r"'org/model' is no path here.*pip install eqr_kernels\[hub\]"):
            load_checkpoint("org/model")
