"""What a training run is set to: its checks, what a state remembers of it, and states of older versions."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import pytest

from eqr_kernels import EqRConfig
from eqr_kernels.checkpoint import load_checkpoint
from eqr_kernels.training.plan import RunRequest
from eqr_kernels.training.record import RunRecord
from eqr_kernels.training.resume import check_resumed
from eqr_kernels.training.settings import TrainSettings, choose_settings
from eqr_kernels.training.state import read_manifest
from tests.support.commands import eqr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(forward_dtype="float16"), 'forward_dtype must be "float32" or "bfloat16", got \'float16\''),
        (dict(attention_init="conv"), "attention_init must be random or local, got 'conv'"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(total_steps=0), "total_steps must be at least 1 or None, got 0"),
        (dict(slice_steps=0), "slice_steps must be at least 1 or None, got 0"),
        (dict(workers=0), "workers must be at least 1 or None, got 0"),
        (dict(decay_from=-1), "decay_from must be at least 0 or None, got -1"),
        (dict(cycles="1x1"), "cycles: '1x1' is not STEP:HxLxSTEPS"),
        (dict(curriculum="34"), "curriculum: '34' is not STEP:LOW-HIGH"),
        (dict(mix="easy"), "mix: 'easy' is not SOURCE=SHARE"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**fields)


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        (dict(lr_min_ratio=1.0, total_steps=100, decay_from=50), math.inf),
        (dict(lr_min_ratio=0.1, total_steps=None), math.inf),
        (dict(lr_min_ratio=0.1, total_steps=100, lr_warmup_steps=7), 7),
        (dict(lr_min_ratio=0.1, total_steps=100, decay_from=50), 50),
    ],
)
def test_where_the_rate_begins_to_fall(fields, step):
    assert TrainSettings(**fields).decay_begins == step


def test_an_option_goes_before_the_resumed_run_and_that_before_the_recipe():
    options = dict(lr=None, seed=None, batch_size=7, mix=None)
    chosen = choose_settings(options, "sudoku-small", {"lr": 0.5, "batch_size": 3})
    assert (chosen["batch_size"], chosen["lr"], chosen["seed"]) == (7, 0.5, 0)
    assert chosen["curriculum"].startswith("0:34-50") and TrainSettings(**chosen).forward_dtype == "bfloat16"
    assert choose_settings({"mix": "easy=1"}, None, {})["curriculum"] == ""
    assert choose_settings({}, None, {}, fine_tuning=True)["lr_warmup_steps"] == 100


def record(**settings: object) -> RunRecord:
    machine = {"kernel": "PyTorch", "threads": 2, "torch": "2.13.0", "isa": "portable"}
    run = RunRecord(TrainSettings(**settings), EqRConfig.sudoku_small(), "ab12", 2, {"source": "x"}, machine, 3.5, 7.0)
    return dataclasses.replace(run, task="latin", task_object="examples.latin_squares:LATIN")


def test_a_record_comes_back_from_json_as_it_was():
    for one in (record(), record(lr=1e-3, mix="easy=1", slice_steps=96, prefetch=True), record(total_steps=None)):
        assert RunRecord.from_json(json.loads(json.dumps(one.to_json()))) == one


HOW = ("compile", "fused")


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TrainSettings) if f.name not in HOW])
def test_no_setting_that_decides_the_result_changes_along_a_run(field, caplog):
    other = {
        "attention_init": "local",
        "forward_dtype": "bfloat16",
        "cycles": "0:1x1x4",
        "curriculum": "0:40-60",
        "mix": "easy=1",
        "prefetch": True,
        "lr_min_ratio": 0.5,
        "optimizer": "muon",
    }
    # A decay that has begun fixes where it ends, too.
    falling = dict(lr_min_ratio=0.1, lr_warmup_steps=1, total_steps=90, slice_steps=8, workers=2, decay_from=2)
    if field == "muon_lr":
        falling |= dict(optimizer="muon", muon_lr=0.01)
    before = record(**falling)
    value = other.get(field, getattr(before.settings, field) or 1)
    now = record(**{**falling, field: value if isinstance(value, str | bool) else value * 2})
    with pytest.raises(ValueError, match="the run in x goes on with its own settings, and these differ: "):
        check_resumed(before, now, "the run in x", 5)
    assert not caplog.records


@pytest.mark.parametrize("field", HOW)
def test_what_decides_last_bits_alone_may_change_with_a_warning(field, caplog):
    check_resumed(record(), record(**{field: False}), "the run", 5)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and f"--no-{field} is not as before" in warning.getMessage()


# states of older versions --------------------------------------------------------------------------------------------

OLD = """{"batch_size": 4, "lr": 0.001, "lr_warmup_steps": 2, "lr_min_ratio": 1.0, "decay_from": null,
"weight_decay": 1.0, "ema_rate": 0.999, "total_steps": 2, "curriculum": "0:40-60", "cycles": "", "mix": "", "seed": 0,
"forward_dtype": "float32", "slice_steps": 2, "config": {"seq_len": 81, "vocab_size": 11, "hidden_size": 16,
"num_heads": 2, "expansion": 4.0, "H_cycles": 1, "L_cycles": 1, "L_layers": 1, "mlp_t": true, "pos_encodings": "none",
"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "board_height": null, "board_width": null, "lambda_": 0.95,
"noise_scale": 0.01, "H_init_std": 1.0, "L_init_std": 1.0, "fixed_init": false, "halt_max_steps": 4,
"halt_exploration_prob": 0.1}, "data_sha256": "DATA", "processes": 1, "workers": 1, "compile": false, "fused": true,
"seconds": 1.5, "cpu_seconds": 2.5}"""
"""The settings of a manifest as they were written before there was `TrainSettings`."""


@pytest.mark.slow
def test_a_state_of_an_older_version_is_resumed_to_the_same_result(tmp_path):
    data, whole, parts = (tmp_path / name for name in ("puzzles.csv", "whole", "parts"))
    eqr("generate", "sudoku", "-n", 4, "--answers", "--format", "csv", "-o", data)
    train = ["train", "--no-compile", "--no-calibrate", "--data", data]
    begin = ["--batch-size", 4, "--warmup", 2, "--lr", 1e-3, "--slice-steps", 2, "--curriculum", "0:40-60"]
    begin += ["--dtype", "float32"]
    sizes = dict(hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1, halt_max_steps=4)
    begin += [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]
    eqr(*train, *begin, "--out", whole, "--steps", 4)
    eqr(*train, *begin, "--out", parts, "--steps", 2)
    (path,) = parts.glob("state-*/manifest.json")
    manifest = json.loads(path.read_text())
    old = json.loads(OLD.replace("DATA", manifest["settings"]["data_sha256"]))
    # Nothing but what came later, and what is measured or of this machine.
    then, now = (EqRConfig.from_dict(settings["config"]) for settings in (old, manifest["settings"]))
    assert then == now  # fields that came later have the values that were fixed then
    settings = manifest["settings"] | {"config": old["config"]}
    new = {name for name, value in settings.items() if name not in old or old[name] != value}
    later = {"attention_init", "beta1", "beta2", "prefetch", "optimizer", "muon_lr", "task", "task_object"}
    of_here = {"kernel", "threads", "torch", "isa", "seconds", "cpu_seconds"}
    assert later <= new <= later | of_here
    path.write_text(json.dumps({**manifest, "settings": old}))
    resumed = eqr(*train, "--out", parts, "--resume", "--steps", 4)
    assert "from step 2" in resumed.stdout and "warning" not in resumed.stderr
    one, two = (load_checkpoint(out).state_dict for out in (whole, parts))
    assert all(one[name].equal(two[name]) for name in one)
    spent = read_manifest(parts)["settings"]
    assert spent["seconds"] > 1.5 and spent["cpu_seconds"] > 2.5


@pytest.mark.parametrize(
    ("old", "preset", "fields", "note"),
    [
        ("sudoku-medium", "sudoku", {"H_cycles": 1, "fixed_init": True, "lambda_": 1.0, "noise_scale": 0.0}, "is now"),
        ("sudoku", "sudoku", {}, "the published size, which had this name, is sudoku-paper"),
    ],
)
def test_presets_of_version_0_1_are_noted(old, preset, fields, note, tmp_path):
    with pytest.warns(UserWarning, match=note):
        request = RunRequest(tmp_path, preset=old)
    assert request.preset == preset and request.config_fields == fields
