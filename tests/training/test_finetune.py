"""`eqr train --init`: from the weights of a checkpoint, with the EqR objective."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.checkpoint import PRETRAINED, ModelCard, load_checkpoint
from eqr_kernels.tasks import sudoku
from tests.support.commands import eqr

ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
EQR = EqRConfig.sudoku_paper(
    hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1, L_layers=1, lambda_=0.9, noise_scale=0.02, halt_max_steps=4
)
TRM = EqRConfig.from_dict({**EQR.to_dict(), "fixed_init": True, "lambda_": 1.0, "noise_scale": 0.0})
SIZES = [f"--set={name}={getattr(EQR, name)}" for name in ("hidden_size", "num_heads", "L_layers")]
NO_CHANGE = ["--lr", 0, "--steps", 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight puzzles with answers; a quarter of the cells are blank."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "puzzles.csv"
    answers = [sudoku.decode(a) for a in sudoku.augment(np.tile(sudoku.encode(ANSWER), (8, 1)), None, rng)[0]]
    rows = ["".join("." if blank else c for c, blank in zip(a, rng.random(81) < 0.25, strict=True)) for a in answers]
    path.write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in zip(rows, answers, strict=True)))
    return path


def fine_tune(data: Path, out: Path, *arguments: object, code: int = 0):
    return eqr(
        "train", "--no-compile", "--batch-size", 4, "--warmup", 1, "--data", data, "--out", out, *arguments, code=code
    )


def weights(config: EqRConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights with every value drawn, the halting head's too."""
    torch.manual_seed(seed)
    state_dict = EquilibriumReasoner(config).state_dict()
    return {name: torch.randn_like(tensor) / math.sqrt(tensor.shape[-1]) for name, tensor in state_dict.items()}


def official(path: Path, config: EqRConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as the EqR repository writes it, EqR or TRM, and the weights that count in it: the averages."""
    prefix, averaged = "_orig_mod.model.inner.", weights(config, 1)
    arch = {"name": "trm@TRMModel" if config.fixed_init else "eqr@EqRModel", "expansion": 4, "pos_encodings": "none"}
    names = ["H_cycles", "L_cycles", "L_layers", "hidden_size", "num_heads", "mlp_t", "halt_max_steps"]
    names += [] if config.fixed_init else ["lambda_", "noise_scale"]
    arch |= {name: getattr(config, name) for name in names}
    shadow = {name: value for name, value in averaged.items() if not name.endswith("_init")}
    model = weights(config, 0) | {name: value for name, value in averaged.items() if name.endswith("_init")}
    content = {
        "model": {prefix + name: value for name, value in model.items()},
        "config": {"arch": arch},
        "step": 777,
        "ema": {"mu": 0.999, "shadow": {prefix + name: value for name, value in shadow.items()}},
    }
    torch.save(content, path)
    return path, averaged


def made(folder: Path, kind: str, config: EqRConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a kind, and its weights."""
    if kind == "pth":
        return official(folder / "step_777.pth", config)
    model = EquilibriumReasoner(config, card=ModelCard(config, data="other puzzles", steps=777))
    model.load_state_dict(weights(config))
    path = folder / "saved" if kind == "folder" else folder / "weights.safetensors"
    model.save_pretrained(path)
    return path, weights(config)


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pth"])
def test_weights_and_averages_start_at_the_checkpoint(kind, data, tmp_path):
    path, expected = made(tmp_path, kind, EQR)
    note = fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE).stderr
    saved = load_checkpoint(tmp_path / "run")
    assert same(saved.state_dict, expected) and saved.config == EQR and saved.card.steps == 1
    file = path / "model.safetensors" if kind == "folder" else path
    init = {
        "source": str(path),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "steps": 777,
        "data": "" if kind == "pth" else "other puzzles",
        "config": "the checkpoint",
        "changed": {},
    }
    training = saved.card.extra["training"]
    assert training["init"] == init
    assert training["lr"] == 0 and training["curriculum"] == "" and training["total_steps"] == 1
    assert f"starting from the weights of {path} (777 steps, sha256 {init['sha256'][:12]})" in note
    assert "config of the checkpoint, changed: nothing" in note


def test_moments_start_at_zero(data, tmp_path):
    path, before = made(tmp_path, "folder", EQR)
    fine_tune(data, tmp_path / "run", "--init", path, "--steps", 1, "--lr", 1e-3, "--weight-decay", 0, "--ema-rate", 0)
    after = load_checkpoint(tmp_path / "run").state_dict
    # From zero, m = 0.1 g and sqrt(v / 0.05) = |g|, so a weight with a gradient moves by lr / 0.1 * atan(0.1).
    moves = torch.cat([(after[name] - before[name]).flatten() for name in before]).abs()
    moved = moves[moves > 1e-5]
    assert len(moved) > 0.9 * len(moves)
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * math.atan(0.1)), rtol=0, atol=1e-6)


def test_the_schedule_is_one_for_fine_tuning(data, tmp_path):
    path, _ = made(tmp_path, "folder", EQR)
    eqr("train", "--no-compile", "--data", data, "--out", tmp_path / "run", "--init", path, "--steps", 1)
    training = load_checkpoint(tmp_path / "run").card.extra["training"]
    names = ("batch_size", "lr", "lr_warmup_steps", "curriculum", "weight_decay", "ema_rate")
    assert [training[name] for name in names] == [96, 1e-4, 100, "", 1.0, 0.99]


@pytest.mark.parametrize("kind", ["folder", "pth"])
def test_trm_becomes_eqr(kind, data, tmp_path):
    path, expected = made(tmp_path, kind, TRM)
    note = fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE, "--json").stderr
    assert "changed: lambda_ 1.0 -> 0.95, noise_scale 0.0 -> 0.01, fixed_init True -> False" in note
    assert "warning" not in note
    saved = load_checkpoint(tmp_path / "run")
    assert (saved.config.fixed_init, saved.config.lambda_, saved.config.noise_scale) == (False, 0.95, 0.01)
    assert (saved.config.L_cycles, saved.config.halt_max_steps) == (EQR.L_cycles, 4)
    assert same(saved.state_dict, {name: value for name, value in expected.items() if not name.endswith("_init")})
    changed = saved.card.extra["training"]["init"]["changed"]
    assert changed == {"fixed_init": [True, False], "lambda_": [1.0, 0.95], "noise_scale": [0.0, 0.01]}


@pytest.mark.slow
def test_set_keeps_or_adds_parts_of_trm(data, tmp_path):
    path, expected = made(tmp_path, "pth", TRM)
    keep = ["--set", "fixed_init=true", "--set", "lambda_=1", "--set", "noise_scale=0"]
    fine_tune(data, tmp_path / "trm", "--init", path, *NO_CHANGE, *keep)
    kept = load_checkpoint(tmp_path / "trm")
    assert kept.config == TRM and same(kept.state_dict, expected)
    fine_tune(data, tmp_path / "ni", "--init", path, *NO_CHANGE, *keep[:2], "--set", "L_cycles=3")
    noisy = load_checkpoint(tmp_path / "ni")
    assert noisy.config == EqRConfig.from_dict(
        {**EQR.to_dict(), "fixed_init": True, "lambda_": 0.95, "noise_scale": 0.01, "L_cycles": 3}
    )
    assert torch.equal(noisy.state_dict["H_init"], expected["H_init"])


@pytest.mark.slow
def test_shipped_model_by_name_and_preset(data, tmp_path):
    arguments = ["--init", "sudoku-small", *NO_CHANGE, "--preset", "sudoku-small", "--set", "halt_max_steps=8"]
    fine_tune(data, tmp_path / "run", *arguments)
    saved = load_checkpoint(tmp_path / "run")
    assert same(saved.state_dict, load_checkpoint("sudoku-small").state_dict)
    init = saved.card.extra["training"]["init"]
    assert init["changed"] == {"halt_max_steps": [16, 8]} and init["source"] == "sudoku-small"
    assert init["sha256"] == hashlib.sha256((PRETRAINED / "sudoku-small.safetensors").read_bytes()).hexdigest()
    assert (
        load_checkpoint("sudoku-small").card.tol_fast and saved.card.tol_fast is None
    )  # other weights settle at another one


@pytest.mark.slow
def test_resume_goes_on_without_init(data, tmp_path):
    path, _ = made(tmp_path, "pth", TRM)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fine_tune(data, whole, "--init", path, "--lr", 1e-3, "--slice-steps", 2, "--steps", 4)
    fine_tune(data, parts, "--init", path, "--lr", 1e-3, "--slice-steps", 2, "--steps", 2)
    path.unlink()
    resumed = eqr("train", "--resume", "--no-compile", "--data", data, "--out", parts, "--steps", 4)
    assert "from step 2" in resumed.stdout and "warning" not in resumed.stderr
    assert same(load_checkpoint(parts).state_dict, load_checkpoint(whole).state_dict)
    one, two = (load_checkpoint(run).card.extra["training"]["init"] for run in (whole, parts))
    assert one == two and one["source"] == str(path)


def test_init_and_resume_exclude_each_other(data, tmp_path):
    path, _ = made(tmp_path, "folder", EQR)
    refused = fine_tune(data, tmp_path / "run", "--init", path, "--resume", *NO_CHANGE, code=2).stderr
    assert "--init starts a new run and --resume continues one" in refused and not (tmp_path / "run").exists()
    refused = fine_tune(data, tmp_path / "run", "--init", path, "--attention-init", "local", *NO_CHANGE, code=2).stderr
    assert "--init starts from weights that are there; give one" in refused and not (tmp_path / "run").exists()
    fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE)
    refused = fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE, code=2).stderr
    assert "holds a run already" in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "hidden_size=32"], "hidden_size 16 -> 32; leave them as they are.*may change: H_cycles, H_init_std"),
        (["--set", "L_layers=2", "--set", "expansion=8"], "expansion 4.0 -> 8.0, L_layers 1 -> 2"),
        (["--set", "seq_len=16"], "seq_len 81 -> 16"),
        (["--set", "mlp_t=false"], "mlp_t True -> False"),
        (["--preset", "sudoku-small"], "hidden_size 16 -> 128"),
        (["--set", "fixed_init=true"], "fixed_init=true needs the start states H_init and L_init"),
        (["--set", "L_cycle=2"], "did you mean 'L_cycles'"),
        (["--set", "lambda_=0"], r"lambda_ must be in \(0, 1\]"),
    ],
)
def test_fields_of_the_weights_stay(arguments, message, data, tmp_path):
    path, _ = made(tmp_path, "folder", EQR)
    refused = fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE, *arguments, code=2)
    assert re.search(message, " ".join(refused.stderr.split())) and not (tmp_path / "run").exists()


def test_attention_keeps_its_heads_and_positions():
    from eqr_kernels.training.initial_weights import _check_kept

    old = EqRConfig.maze()
    _check_kept("x", old, EqRConfig.maze(seq_len=400, L_cycles=2))
    for field in ({"num_heads": 4}, {"pos_encodings": "none"}, {"rope_theta": 100.0}):
        with pytest.raises(ValueError, match=next(iter(field))):
            _check_kept("x", old, EqRConfig.maze(**field))


# files without a config, and of other models --------------------------------------------------------------------------


def bare(path: Path, state_dict: dict[str, torch.Tensor], prefix: str = "_orig_mod.model.inner.") -> Path:
    """A file as the TRM and HRM repositories write it: the state dict alone, and no suffix."""
    torch.save({prefix + name: value for name, value in state_dict.items()}, path)
    return path


@pytest.mark.slow
def test_bare_trm_takes_its_config_from_preset_and_set(data, tmp_path):
    path = bare(tmp_path / "step_65100", weights(TRM))
    refused = fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE, code=2).stderr
    assert "does not say which config its weights were trained with" in refused and "give --preset" in refused
    wrong = fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE, "--preset", "sudoku-small", code=2).stderr
    assert "embed_tokens.embedding_weight [11, 16] instead of [11, 128]" in " ".join(wrong.split())
    arguments = ["--init", path, *NO_CHANGE, "--preset", "sudoku-paper", *SIZES]
    note = fine_tune(data, tmp_path / "run", *arguments).stderr
    assert "H_init and L_init not used" in note and "config of --preset and --set, as the file has none" in note
    saved = load_checkpoint(tmp_path / "run")
    expected = {name: value for name, value in weights(TRM).items() if not name.endswith("_init")}
    assert same(saved.state_dict, expected) and not saved.config.fixed_init and saved.config.H_cycles == 3
    fine_tune(data, tmp_path / "trm", *arguments, "--set", "fixed_init=true")
    assert same(load_checkpoint(tmp_path / "trm").state_dict, weights(TRM))


def hrm() -> dict[str, torch.Tensor]:
    """The names and kinds of tensors of HierarchicalReasoningModel_ACTV1, small."""
    state_dict = weights(EqRConfig.sudoku_paper(hidden_size=16, num_heads=2, L_layers=4, mlp_t=False, fixed_init=True))
    levels = {name.replace("L_level", "H_level"): value for name, value in state_dict.items() if "L_level" in name}
    return {"puzzle_emb.weights": torch.zeros(1, 16), **state_dict, **levels}


def trm_with(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return weights(TRM) | {name.replace("__", "."): value for name, value in tensors.items()}


OTHERS = {
    "hrm": (
        hrm(),
        r"H_level of 4 layers, L_level of 4 layers, puzzle embeddings \(puzzle_emb.weights \[1, 16\]\): an "
        r"HRM.*iterates one network.*use a checkpoint of EqR",
    ),
    "trm with puzzle embeddings": (
        trm_with(puzzle_emb__weights=torch.zeros(1, 16)),
        r"has puzzle embeddings \(puzzle_emb.weights \[1, 16\]\).*puzzle's tokens alone.*puzzle_emb_ndim=0",
    ),
    "trm with learned positions": (
        trm_with(embed_pos__embedding_weight=torch.zeros(81, 16)),
        "has position embeddings.*supported are rope",
    ),
    "trm with one latent state": (
        {name: value for name, value in weights(TRM).items() if name != "H_init"},
        "start states for L_init.*has two",
    ),
    "trm with seven latent states": (
        trm_with(L1_init=torch.zeros(16), L2_init=torch.zeros(16)),
        "for H_init, L1_init, L2_init, L_init, a TRM with",
    ),
    "q head of another shape": (
        trm_with(q_head__weight=torch.zeros(3, 16)),
        r"another shape: q_head.weight \[3, 16\] instead of \[2, 16\]",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_refused(kind, data, tmp_path):
    state_dict, message = OTHERS[kind]
    path = bare(tmp_path / "step_1", state_dict)
    refused = fine_tune(data, tmp_path / "run", "--init", path, *NO_CHANGE, "--preset", "sudoku-paper", *SIZES, code=2)
    text = " ".join(refused.stderr.split())
    assert re.search(message, text) and str(path) in text and not (tmp_path / "run").exists()
