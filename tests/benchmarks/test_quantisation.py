"""Fake quantisation, paired statistics, the study of attractors under quantisation and its recommendation."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.studies.quantisation import displacement
from benchmarks.studies.quantisation import drawing as drawing_quantisation
from benchmarks.studies.quantisation.__main__ import app
from benchmarks.studies.quantisation.advice import judge, least_puzzles, recommend
from benchmarks.studies.quantisation.fake import (
    Rounded,
    block_linears,
    group_within,
    jitter,
    round_to_e4m3,
    round_to_integers,
    with_rounded_weights,
)
from benchmarks.studies.quantisation.paired import clustered_difference, compare_answers, counted
from benchmarks.studies.quantisation.runs import run
from benchmarks.studies.quantisation.straying import Straying
from benchmarks.studies.quantisation.study import study
from benchmarks.studies.quantisation.variants import (
    BASELINE,
    JITTERED,
    Variant,
    default_variants,
    sort_out,
    weight_bytes,
)
from eqr_kernels import EquilibriumReasoner, noise
from eqr_kernels.cli.console import to_json
from eqr_kernels.studies.statistics import tango_interval
from eqr_kernels.tasks import sudoku
from tests.support.environment import REPOSITORY, needs_extension
from tests.support.models import make_contractive, tiny_config

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def weights(seed: int, rows: int = 7, inputs: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-20, 20, (rows, 1), generator=generator)
    return torch.randn(rows, inputs, generator=generator) * scale


def codes_of(rounded: Rounded) -> torch.Tensor:
    """float64 [out, groups, group], the codes that the values stand for."""
    assert rounded.scale is not None and rounded.group is not None
    return (rounded.values.double().unflatten(1, (-1, rounded.group)) / rounded.scale.double()[..., None]).round()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.sampled_from([None, 1, 3, 8, 24]))
def test_integers_are_within_half_a_unit_and_in_range(seed: int, bits: int, group: int | None) -> None:
    weight = weights(seed)
    rounded = round_to_integers(weight, bits, group)
    codes, most = codes_of(rounded), 2 ** (bits - 1) - 1
    assert codes.abs().max() <= most
    # The greatest of each group takes the last code: the grid is as fine as it can be.
    assert (codes.abs().amax(2) == most).all()
    exact = codes * rounded.scale.double()[..., None]
    off = (weight.double().unflatten(1, (-1, rounded.group)) - exact).abs()
    assert (off <= rounded.scale.double()[..., None] * (0.5 + 2.0**-40)).all()
    assert torch.equal(rounded.values, exact.float().flatten(1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.sampled_from([None, 8]))
def test_rounding_integers_twice_gives_the_same_codes(seed: int, bits: int, group: int | None) -> None:
    once = round_to_integers(weights(seed), bits, group)
    assert torch.equal(codes_of(round_to_integers(once.values, bits, group)), codes_of(once))


def test_zero_and_constant_rows() -> None:
    weight = torch.tensor([[0.0] * 4, [0.5] * 4, [-3.0] * 4, [0, 0, 0, 1e-42]])
    rounded = round_to_integers(weight, 8)
    assert torch.equal(rounded.values[0], torch.zeros(4))
    torch.testing.assert_close(rounded.values[1:3], weight[1:3], rtol=2**-23, atol=0)
    assert rounded.values.isfinite().all()
    e4m3 = round_to_e4m3(weight)
    assert torch.equal(e4m3.values[0], torch.zeros(4)) and e4m3.values.isfinite().all()


def test_int4_uses_codes_from_minus_7_to_7() -> None:
    weight = torch.linspace(-1, 1, 201)[None]
    assert sorted(codes_of(round_to_integers(weight, 4)).unique().tolist()) == list(range(-7, 8))


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]])  # unit 1
    assert round_to_integers(weight, 4).values.tolist() == [[7, 0, 2, 2, 0, -2]]


def test_a_finer_group_is_nearer_where_magnitudes_differ() -> None:
    weight = torch.cat([torch.randn(4, 32) * 100, torch.randn(4, 32)], 1)
    off = [(round_to_integers(weight, 4, g).values - weight)[:, 32:].norm() for g in (None, 32)]
    assert off[1] < 0.2 * off[0]


@pytest.mark.parametrize("group", [5, 7, 48, 0, -8])
def test_groups_that_do_not_divide_the_axis_raise(group: int) -> None:
    with pytest.raises(ValueError, match=f"group must divide the 24 inputs of the weight, got {group}"):
        round_to_integers(weights(0), 4, group)


@pytest.mark.parametrize(
    ("axis", "most", "group"), [(128, 32, 32), (81, 32, 27), (81, 64, 27), (512, 64, 64), (4, 32, 4)]
)
def test_group_within(axis: int, most: int, group: int) -> None:
    assert group_within(axis, most) == group


def test_group_within_refuses_tiny_groups() -> None:
    with pytest.raises(ValueError, match="an axis of 83 inputs has no divisor from 8 to 32"):
        group_within(83, 32)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range_raise(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        round_to_integers(weights(0), bits)


def test_bad_weights_raise() -> None:
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        round_to_integers(torch.ones(2, 2, dtype=torch.int64), 8)
    with pytest.raises(ValueError, match=r"\[out, in\] and not empty"):
        round_to_e4m3(torch.ones(2))
    with pytest.raises(ValueError, match="got 1 non-finite"):
        round_to_integers(torch.tensor([[1.0, math.nan]]), 8)


def test_e4m3_is_within_its_own_half_unit() -> None:
    weight = weights(3)
    rounded = round_to_e4m3(weight)
    scale = rounded.scale.double()
    scaled, held = weight.double() / scale, rounded.values.double() / scale
    # Three bits of mantissa: half a unit is 2**-4 of the power of two below, and 2**-10 among the subnormals.
    unit = 2.0 ** (torch.log2(scaled.abs().clamp(min=2.0**-6)).floor() - 3)
    assert ((scaled - held).abs() <= unit / 2 * (1 + 2.0**-20)).all()
    assert torch.equal(round_to_e4m3(rounded.values).values, rounded.values)


def test_jitter_moves_every_weight_by_just_so_much() -> None:
    weight = torch.randn(5, 9)
    # float32 shows 2**-20 to within a sixteenth.
    moved = (jitter(weight).values.double() / weight.double() - 1).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2.0**-20), rtol=0.07, atol=0)


def test_only_block_linears_are_rounded_and_the_model_is_left_alone(contractive: EquilibriumReasoner) -> None:
    before = {name: weight.clone() for name, weight in contractive.state_dict().items()}
    changed, rounded = with_rounded_weights(contractive, partial(round_to_integers, bits=2))
    names = {f"{name}.weight" for name, _ in block_linears(contractive)}
    assert len(names) == 4 == len(rounded)
    for name, weight in contractive.state_dict().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(changed.state_dict()[name], weight) == (name not in names)


def test_weight_bytes_by_hand(contractive: EquilibriumReasoner) -> None:
    shapes = {name: tuple(linear.weight.shape) for name, linear in block_linears(contractive)}
    mixer = sum(math.prod(shape) for name, shape in shapes.items() if ".mlp_t." in name)
    channel = [shape for name, shape in shapes.items() if ".mlp." in name]
    everything = sum(weight.numel() for weight in contractive.state_dict().values())
    others = everything - mixer - sum(map(math.prod, channel))
    of = {v.name: v for v in default_variants()}
    assert weight_bytes(contractive, BASELINE, {}) == weight_bytes(contractive, JITTERED, {}) == 4 * everything
    assert weight_bytes(contractive, of["bf16"], {}) == 2 * everything
    int8 = sum(rows * inputs + 4 * rows for rows, inputs in channel)
    assert weight_bytes(contractive, of["int8"], {}) == 2 * (others + mixer) + int8
    variant = of["int4 weights (simulated)"]
    rounded = with_rounded_weights(contractive, variant.rounding)[1]
    int4 = sum(math.ceil(rows * inputs / 2) + 4 * rows for rows, inputs in shapes.values())
    assert weight_bytes(contractive, variant, rounded) == 2 * others + int4


# --- paired statistics


def test_tango_without_differences_is_its_closed_form() -> None:
    zz = 1.959963984540054**2
    low, high = tango_interval(0, 0, 200)
    assert high == pytest.approx(zz / (200 + zz), rel=1e-9) and low == pytest.approx(-high, rel=1e-9)


def _score(gained: int, lost: int, total: int, delta: float) -> float:
    """Tango's statistic with the likeliest share of losses found by search."""
    grid = np.linspace(max(0, -delta), (1 - delta) / 2, 400_001)[1:-1]
    likelihood = (total - gained - lost) * np.log(1 - 2 * grid - delta)
    likelihood = likelihood + gained * np.log(grid + delta) + lost * np.log(grid)
    q = grid[likelihood.argmax()]
    return (gained - lost - total * delta) / math.sqrt(total * (2 * q + delta - delta * delta))


@pytest.mark.parametrize(("gained", "lost", "total"), [(3, 8, 50), (1, 9, 200), (12, 12, 60)])
def test_tango_ends_where_the_test_just_rejects(gained: int, lost: int, total: int) -> None:
    low, high = tango_interval(gained, lost, total)
    assert _score(gained, lost, total, low) == pytest.approx(1.95996, abs=1e-3)
    assert _score(gained, lost, total, high) == pytest.approx(-1.95996, abs=1e-3)
    assert tango_interval(lost, gained, total) == pytest.approx((-high, -low), abs=1e-9)


def test_compare_answers_and_counted() -> None:
    before, after = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    result = compare_answers(before, after)
    assert (result["both_right"], result["gained"], result["lost"]) == (1, 1, 2)
    assert result["difference"] == pytest.approx(-0.2) and result["tango95"][0] < -0.2 < result["tango95"][1]
    assert counted(0, 0)["share"] is None
    with pytest.raises(ValueError, match="must not be negative"):
        tango_interval(3, 3, 5)


# --- the study


SAME = Variant("same", "fp32 once more", "fp32")
BF16 = Variant("bf16", "bf16 operands", "bf16")


def destroyed(weight: torch.Tensor) -> Rounded:
    """One bit: the sign, times the mean magnitude."""
    return Rounded(weight.sign() * weight.abs().mean(1, keepdim=True), None, None, 1)


ONE_BIT = Variant("1 bit", "signs", "fp32", destroyed)


@pytest.fixture(scope="module")
def shipped() -> EquilibriumReasoner:
    return EquilibriumReasoner.from_pretrained("sudoku-small")


@pytest.fixture(scope="module")
def easy() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels [4, 81]: one puzzle with other clues shown."""
    inputs, labels = (np.repeat(sudoku.encode(text)[None], 4, 0) for text in (PUZZLE, SOLUTION))
    return sudoku.reveal(inputs, labels, 46, np.random.default_rng(0)), labels


def small(model: EquilibriumReasoner, easy: tuple[np.ndarray, np.ndarray], *variants: Variant, **options) -> dict:
    settings = dict(depth=16, breadth=2, tol=0.0282, variants=variants, rounds=0, displaced=2)
    return study(model, *easy, **{**settings, **options})


def test_each_precision_settles_at_its_own_tolerance(shipped: EquilibriumReasoner, easy) -> None:
    result = small(shipped, easy, SAME, BF16, tol={"fp32": 0.0282, "bf16": 1e-9})
    same, bf16 = result["variants"]
    assert result["tol"] == same["tolerance"]["tol"] == 0.0282 and bf16["tolerance"]["tol"] == 1e-9
    assert same["settled"]["count"] == 8 and same["displacement"]["same_basin"] == 2
    assert bf16["settled"]["count"] == 0 and bf16["displacement"]["same_basin"] == 0


@pytest.mark.parametrize(
    ("tol", "message"),
    [
        ({"fp32": 0.03}, "tol must have one of each precision, got none of bf16"),
        ({"fp32": 0.03, "bf16": 0.0}, "tol must be positive and finite, got 0.0 of bf16"),
    ],
)
def test_tolerances_that_make_no_sense(shipped: EquilibriumReasoner, easy, tol, message) -> None:
    with pytest.raises(ValueError, match=message):
        small(shipped, easy, SAME, BF16, tol=tol)


def test_fp32_against_itself_moves_nothing(shipped: EquilibriumReasoner, easy) -> None:
    spent: list[tuple[int, int]] = []
    result = small(shipped, easy, SAME, progress=lambda done, of: spent.append((done, of)))
    (same,) = result["variants"]
    assert result["baseline"]["accuracy"]["correct"] == 4
    assert same["settled"]["count"] == 8 and same["settled_right"]["count"] == 8
    for name in (
        "changed_basin",
        "settled_elsewhere",
        "settled_in_baseline_only",
        "settled_here_only",
        "right_to_wrong",
        "wrong_to_right",
    ):
        assert same[name]["count"] == 0 == same[name]["puzzles"], name
    assert (same["paired"]["gained"], same["paired"]["lost"], same["paired"]["mcnemar_p"]) == (0, 0, 1)
    assert same["more_steps_to_settle"] == {"trajectories": 8, "mean": 0}
    kept = same["right_kept"]
    assert (kept["lost_here"]["count"], kept["lost_by_seed"]["count"], kept["lost_here"]["total"]) == (0, 0, 8)
    strayed = same["straying"]
    assert strayed["steps"] == [1, 2, 4, 8, 16] and strayed["trajectories"] == 2
    assert not any(strayed["median"] + strayed["p90"] + strayed["other_tokens"] + strayed["other_answers"])
    (control,) = result["control"]  # it runs though it was not asked for: the verdict is held against it
    assert control["name"] == "fp32 reseeded" and control["right_kept"] is control["straying"] is None
    assert 0 < result["baseline"]["straying"]["median"][0] < 0.2
    assert any(
        line.startswith("| fp32, another seed's noise | ") for line in drawing_quantisation.markdown(result).split("\n")
    )
    moved = same["displacement"]
    assert (moved["median"], moved["max"], moved["same_basin"]) == (0, 0, 2)
    assert moved["from_fixed_point"]["lost"]["count"] == 0
    assert moved["from_fixed_point"]["max"] == 0
    assert same["residual_floor"] == result["baseline"]["residual_floor"]
    assert same["ms_per_step"] is None and same["verdict"] == "open"
    assert spent[-1] == (3 * 4 * 2 * 16,) * 2
    # Noise alone moves a state; other starts do as well.
    spread = result["baseline"]["spread"]
    assert 0.001 < spread["two_noise_draws"]["median"] < 0.1
    again = json.loads(to_json(result))
    assert again["baseline"]["name"] == "fp32"
    lines = drawing_quantisation.markdown(again).splitlines()
    assert "| same | 100.0 % | 0, 0 | +0.0 [-49.0, +49.0] | +0.0 [+0.0, +0.0] | 1.00 | - | open |" in lines
    assert "| same |" + " 0.0e+00 (0.0 %) |" * 5 in lines
    assert any(line.startswith("| same | 0.01") and line.endswith("| 2 of 2 |") for line in lines)


def test_one_bit_is_detected(shipped: EquilibriumReasoner, easy) -> None:
    result = small(shipped, easy, ONE_BIT)
    (bad,) = result["variants"]
    assert bad["accuracy"]["correct"] == 0 and bad["paired"]["lost"] == 4
    assert bad["changed_basin"]["count"] == 8 == bad["right_to_wrong"]["count"]
    assert bad["right_kept"]["lost_here"]["count"] == 8 and bad["right_kept"]["difference"] == -1
    assert bad["straying"]["median"][-1] > 0.5 and bad["straying"]["other_answers"][-1] == 1
    assert bad["displacement"]["same_basin"] == 0 and bad["displacement"]["median"] is None
    assert bad["displacement"]["from_fixed_point"]["lost"]["count"] == 2
    assert bad["verdict"] == "loses" and "lost: 1 bit" in result["recommendation"]


def test_int4_moves_fixed_points_further_than_int8(shipped: EquilibriumReasoner, easy) -> None:
    names = ("int8 weights (simulated)", "int4 weights (simulated)", "fp32 jittered", "fp32 reseeded")
    known = {variant.name: variant for variant in default_variants()}
    result = small(shipped, easy, *(known[name] for name in names))
    int8, int4 = (row["displacement"]["median"] for row in result["variants"])
    control, reseeded = result["control"]
    assert 0 < control["displacement"]["median"] < int8 < int4
    assert control["simulated"] and "verdict" not in control
    assert control["displacement"]["from_fixed_point"]["median"] < 1e-4
    first = [row["straying"]["median"][0] for row in (control, *result["variants"])]
    assert 0 < first[0] < first[1] < first[2]
    assert reseeded["displacement"] is None
    assert reseeded["residual_floor"] != result["baseline"]["residual_floor"]


@needs_extension
def test_timing_and_real_precisions(shipped: EquilibriumReasoner, easy) -> None:
    known = {variant.name: variant for variant in default_variants()}
    result = small(shipped, easy, known["bf16"], known["int8"], known["int8 weights (simulated)"], rounds=1, depth=8)
    bf16, int8, fake = result["variants"]
    assert bf16["times_as_fast"] == 1 and bf16["ms_per_step"] > 0 and int8["ms_per_step"] > 0
    assert fake["ms_per_step"] is None is fake["times_as_fast"]
    assert "int8" in int8["backend_reason"] and "int8" in int8["displacement"]["arithmetic"]
    assert result["not_available"][-1]["name"] == "fp8"
    assert 0 < bf16["displacement"]["median"]


def test_what_cannot_run_is_named_with_its_reason(shipped: EquilibriumReasoner, easy) -> None:
    known = {variant.name: variant for variant in default_variants()}
    runnable, missing = sort_out(shipped, [known["int8"], known["bf16"]], "reference")
    assert [variant.name for variant in runnable] == ["bf16"]
    assert [row["name"] for row in missing] == ["int8", "fp8"] and "int8" in missing[0]["why"]
    with pytest.raises(ValueError, match="different names"):
        sort_out(shipped, [SAME, SAME], "auto")
    with pytest.raises(ValueError, match="simulate_in must be fp32 or bf16"):
        default_variants("int8")


def test_runs_do_not_depend_on_chunks(
    contractive: EquilibriumReasoner, puzzles: torch.Tensor, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once() -> list[np.ndarray]:
        made = run(
            contractive,
            puzzles.numpy(),
            puzzles.numpy(),
            depth=5,
            breadth=3,
            tol=0.01,
            backend=backend,
            noise_scale=0.01,
        )
        return [*made.recording.arrays().values(), made.settled, made.halts.steps, made.halts.settled]

    whole = once()
    monkeypatch.setattr("eqr_kernels.studies.recording._CHUNK_BYTES", 1)
    for part, of in zip(once(), whole, strict=True):
        np.testing.assert_allclose(part, of, rtol=0 if backend == "cpu" else 1e-4)


def test_states_are_those_that_solve_passes_through(contractive: EquilibriumReasoner, puzzles: torch.Tensor) -> None:
    rng = noise.make_rng(5, 0, noise.hash_tokens(puzzles), 0)
    here = displacement.states(contractive, puzzles, rng, depth=3, precision="fp32")
    result = contractive.solve(puzzles, depth=3, halt="none", seed=5, noise_scale=0)
    assert torch.equal(here.answers, result.preds)
    torch.testing.assert_close(here.residual, result.residual, rtol=1e-3, atol=1e-6)


def test_straying_begins_from_the_trajectories_of_solve(
    contractive: EquilibriumReasoner, puzzles: torch.Tensor
) -> None:
    base = Straying(contractive, puzzles, depth=3, seed=5, noise_scale=0.02)
    result = contractive.solve(puzzles, depth=3, halt="none", seed=5, noise_scale=0.02)
    assert base.steps == (1, 2, 3) and torch.equal(base.base[-1].answers, result.preds)
    logits = torch.nn.functional.linear(base.base[-1].z_H, contractive.lm_head.weight)
    torch.testing.assert_close(logits, result.logits, rtol=1e-4, atol=1e-5)
    quiet = Straying(contractive, puzzles, depth=3, seed=5, noise_scale=0.0)
    assert quiet.under_other_noise() is None


@needs_extension
@pytest.mark.parametrize("noise_scale", [0.0, 0.02])
def test_kernel_and_plain_states_agree(
    puzzles: torch.Tensor, noise_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_contractive(tiny_config())
    rng = noise.make_rng(0, 1, noise.hash_tokens(puzzles), 0)

    def reached(depth: int = 4) -> displacement.States:
        return displacement.states(model, puzzles, rng, depth=depth, precision="fp32", noise_scale=noise_scale)

    kernel = reached()
    monkeypatch.setattr(displacement, "_why_no_kernel", lambda model: "not here")
    plain = reached()
    torch.testing.assert_close(kernel.z, plain.z, rtol=1e-4, atol=1e-5)
    assert displacement.arithmetic(model, "int8") is None
    with pytest.raises(ValueError, match="gives no states here: not here; use fp32 or bf16"):
        displacement.states(model, puzzles, rng, depth=1, precision="int8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tol": 0.0}, "tol must be positive"), ({"tol": math.inf}, "tol must be positive"), ({"depth": 0}, "depth")],
)
def test_bad_settings_raise(shipped: EquilibriumReasoner, easy, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(shipped, easy, SAME, **changes)


def test_a_report_of_the_older_rule_is_shown_with_a_warning(tmp_path) -> None:
    file = REPOSITORY / "benchmarks" / "results" / "amd-epyc-avx512-bf16-2-threads" / "quantisation.json"
    shown = CliRunner().invoke(app, ["--table", str(file)])
    assert shown.exit_code == 0 and "its verdicts are not by right answers alone" in shown.stderr
    assert "| bf16 | 77.0 % |" in shown.stdout
    new = json.loads(file.read_text())
    new["quantisation"]["rule"] = {"max_loss": 0.01, "max_attractors_lost": 0.01}
    (tmp_path / "new.json").write_text(json.dumps(new))
    assert "warning" not in CliRunner().invoke(app, ["--table", str(tmp_path / "new.json")]).stderr


def test_puzzles_without_labels_raise(shipped: EquilibriumReasoner, easy) -> None:
    inputs, labels = easy
    labels = labels.copy()
    labels[2] = 0
    with pytest.raises(ValueError, match="none in 1 rows, first 2"):
        small(shipped, (inputs, labels), SAME)


# --- the rule


def row(
    name: str,
    gained: int,
    lost: int,
    *,
    kept: tuple[float, float] | None = (0.03, 0.01),
    trajectories: tuple[float, float] | None = (0, 0.005),
    gone: int = 0,
    of: int = 32,
    size: int = 100,
    simulated: bool = False,
    ms: float | None = None,
) -> dict:
    n = 1000
    return {
        "name": name,
        "simulated": simulated,
        "weight_bytes": size,
        "ms_per_step": ms,
        "times_as_fast": None if ms is None else 2 / ms,
        "right_kept": around(kept),
        "trajectories": around(trajectories),
        "displacement": {"from_fixed_point": {"lost": counted(gone, of)}},
        "paired": paired(gained, lost, n),
    }


def around(ends: tuple[float, float] | None) -> dict | None:
    """A difference and the reach of its interval."""
    return None if ends is None else {"difference": ends[0], "interval95": [ends[0] - ends[1], ends[0] + ends[1]]}


def paired(gained: int, lost: int, n: int) -> dict:
    return {"difference": (gained - lost) / n, "tango95": list(tango_interval(gained, lost, n))}


@pytest.mark.parametrize(
    ("variant", "verdict"),
    [
        (row("x", 0, 0), "keeps"),
        (row("x", 2, 3, kept=(0, 0.009)), "keeps"),  # as many as under another seed
        (row("x", 2, 3, kept=(0, 0.02)), "open"),  # a point fewer is not excluded
        (row("x", 2, 3, kept=(-0.03, 0.02)), "loses"),  # fewer than chance explains
        (row("x", 2, 3, kept=None), "open"),  # nothing was right
        (row("x", 2, 3, trajectories=(-0.005, 0.02)), "open"),
        (row("x", 2, 3, trajectories=(-0.02, 0.01)), "loses"),  # the answer that is selected hides it
        (row("x", 2, 3, gone=1), "open"),
        (row("x", 2, 3, gone=4), "loses"),
        (row("x", 0, 9), "loses"),  # accuracy falls
        (row("x", 10, 12), "open"),  # a loss of a point is not excluded
        (row("x", 30, 2), "keeps"),
        (row("x", 0, 0, of=0), "open"),  # nothing settled once more
        (row("x", 0, 0) | {"displacement": None}, "open"),  # not measured
        (row("x", 0, 9) | {"displacement": None}, "loses"),
    ],
)
def test_judge(variant: dict, verdict: str) -> None:
    assert judge(variant) == verdict


def verdicts(*rows: dict) -> list[dict]:
    return [r | {"verdict": judge(r)} for r in rows]


def test_a_difference_of_trajectories_counts_a_puzzle_once() -> None:
    rng = np.random.default_rng(0)
    # Trajectories of a puzzle that are all alike tell as much as one: the interval must not see eight times as many.
    before, after = (np.repeat(rng.random((300, 1)) < share, 8, axis=1) for share in (0.6, 0.55))
    everything = np.ones_like(before)
    eight, one = (
        clustered_difference(x, y, m)
        for x, y, m in ((before, after, everything), (before[:, :1], after[:, :1], everything[:, :1]))
    )
    assert eight is not None and one is not None and eight["interval95"] == pytest.approx(one["interval95"])
    assert (eight["trajectories"], eight["puzzles"]) == (2400, 300)
    difference = after[:, 0].mean() - before[:, 0].mean()
    assert eight["difference"] == pytest.approx(difference)
    reach = 1.96 * (after[:, 0].astype(float) - before[:, 0]).std(ddof=1) / 300**0.5
    assert eight["interval95"] == pytest.approx([difference - reach, difference + reach], rel=1e-3)
    among = before.copy()
    of_right = clustered_difference(before, after, among)
    assert of_right is not None and of_right["difference"] == pytest.approx(-(before & ~after).sum() / before.sum())
    assert clustered_difference(before, after, np.zeros_like(before)) is None


def test_what_is_right_by_chance_is_no_loss() -> None:
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(40):
        sure = rng.random(400) < 0.7
        luck = [sure[:, None] | (rng.random((400, 2)) < 0.1) for _ in range(3)]  # fp32, another seed, a variant like it
        compared = clustered_difference(luck[1], luck[2], luck[0])
        assert compared is not None
        verdicts.append(compared["interval95"][1] < 0)
    assert sum(verdicts) <= 4, "a variant as good as another seed is called worse in a fortieth of the runs"


def test_the_fewest_bytes_win_and_the_fastest_that_runs_is_named() -> None:
    rows = verdicts(
        row("bf16", 0, 0, size=50, ms=2.0),
        row("int8", 1, 0, size=30, ms=1.0),
        row("int4", 0, 0, kept=(0.02, 0.01), size=15, simulated=True),
        row("int2", 0, 90, kept=(-0.3, 0.1), size=8, simulated=True),
    )
    advice = recommend(100, rows, 1000)
    assert advice.startswith("By memory int4: 0.15 of fp32's bytes, +0.0 points")
    assert "By time int8: 1 ms a step, 2.00 times as fast as bf16, +0.1 points" in advice and "int2" not in advice


def test_nothing_is_recommended_on_too_few_puzzles() -> None:
    few = row("bf16", 0, 0) | {"paired": {"difference": 0.0, "tango95": list(tango_interval(0, 0, 200))}}
    advice = recommend(100, verdicts(few, row("int2", 0, 90, kept=(-0.3, 0.1))), 200)
    assert advice.startswith("fp32: nothing else is shown")
    assert "undecided: bf16 (even equal answers need 381 puzzles); lost: int2." in advice


@pytest.mark.parametrize("max_loss", [0.005, 0.01, 0.02])
def test_least_puzzles(max_loss: float) -> None:
    n = least_puzzles(max_loss)
    assert tango_interval(0, 0, n)[0] > -max_loss >= tango_interval(0, 0, n - 1)[0]
