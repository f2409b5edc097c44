"""backend="triton" in the interpreter as `solve` sees it: the loop against the reference, the queue, races, ends."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from eqr_kernels import EquilibriumReasoner, SolveResult, Status, backends
from eqr_kernels.precision import Precision
from tests.support.models import make_contractive, tiny_config
from tests.support.results import FIELDS, same
from tests.support.triton_tiles import with_tiles

IN_INTERPRETER = True
pytest_plugins = ["tests.support.triton_interpreter"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton"),
]

TOL = 0.1


def small_config(**changes: Any):
    """Two updates an outer step: what the interpreter can do some hundreds of."""
    return tiny_config(**{**dict(H_cycles=1, L_cycles=1, seq_len=6, hidden_size=16), **changes})


@pytest.fixture
def contractive() -> EquilibriumReasoner:
    return make_contractive(small_config())


@pytest.fixture
def puzzles() -> Tensor:
    return torch.randint(1, 7, (4, 6), generator=torch.Generator().manual_seed(1))


def solve(model: EquilibriumReasoner, tokens: Tensor, **options: Any) -> SolveResult:
    result = model.solve(tokens, **{"tol": TOL, "backend": "triton", "depth": 10, **options})
    assert result.backend == "triton"
    return result


def assert_agree(got: SolveResult, want: SolveResult) -> None:
    """The same decisions, and the same numbers within what fp32 gives."""
    for field in ("preds", "steps", "restart", "nfe", "converged", "all_steps", "all_status", "all_preds"):
        a, b = getattr(got, field), getattr(want, field)
        assert (a is None and b is None) or torch.equal(a, b), field
    for field in ("logits", "q_halt", "residual", "score", "all_residual", "all_score", "all_q_halt"):
        a, b = getattr(got, field), getattr(want, field)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}")
    assert got.at.keys() == want.at.keys()
    for depth, at in got.at.items():
        for field in ("preds", "restart", "converged", "all_preds", "all_steps", "all_status"):
            assert torch.equal(getattr(at, field), getattr(want.at[depth], field)), (depth, field)
        for field in ("all_score", "all_q_halt", "all_residual"):
            torch.testing.assert_close(getattr(at, field), getattr(want.at[depth], field), rtol=1e-4, atol=1e-5)


# ---- against the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 3])
def test_early_exit(contractive, puzzles, patience):
    puzzles, breadth = (puzzles, 2) if patience == 1 else (puzzles[:2], 1)
    options = dict(breadth=breadth, patience=patience, return_all=True, trace=True, checkpoints=(1, 3, 6, 10))
    want = contractive.solve(puzzles, tol=TOL, depth=10, backend="reference", **options)
    got = solve(contractive, puzzles, **options)
    assert len(want.all_steps.unique()) > 1 and want.converged.any(), "the fixture should settle at different depths"
    assert_agree(got, want)
    assert got.residuals.shape == (len(puzzles), breadth, 10)
    assert torch.equal((~got.residuals.isnan()).sum(-1), got.all_steps)
    torch.testing.assert_close(got.residuals, want.residuals, rtol=1e-4, atol=1e-6, equal_nan=True)
    last = got.residuals.gather(-1, got.all_steps[..., None] - 1)[..., 0]
    assert torch.equal(last, got.all_residual)


def test_patience_counts_consecutive_steps():
    model = make_contractive(small_config(noise_scale=0.05))
    tokens = torch.full((1, 6), 3)
    options = dict(depth=14, tol=0.074, patience=3, trace=True)
    want = model.solve(tokens, backend="reference", **options)
    below = (want.residuals <= 0.074) & ~want.residuals.isnan()
    above = (want.residuals > 0.074) & (below.cumsum(-1) > 0)
    assert (above.any(-1) & want.converged[:, None]).any(), "a residual should rise above tol again before the end"
    got = solve(model, tokens, **options)
    assert torch.equal(got.all_steps, want.all_steps) and torch.equal(got.all_status, want.all_status)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_score_of_the_window(contractive, puzzles, window):
    options = dict(depth=6, halt="none", window=window, checkpoints=(1, 2, 4), return_all=True)
    want = contractive.solve(puzzles[:2], backend="reference", **options)
    got = solve(contractive, puzzles[:2], **options)
    assert_agree(got, want)
    assert torch.equal(got.at[1].all_score, got.at[1].all_residual)


def test_a_window_longer_than_the_sum_takes_at_a_time(contractive, puzzles):
    options = dict(depth=90, halt="none", window=80)
    want = contractive.solve(puzzles[:1], backend="reference", **options)
    torch.testing.assert_close(solve(contractive, puzzles[:1], **options).score, want.score, rtol=1e-4, atol=1e-7)


RULES = [
    ("residual", "residual"),
    ("vote", "residual"),
    ("q", "q"),
    ("residual", "residual+q"),
    ("residual", "residual|q"),
    ("first", "residual+q"),
    ("first", "residual|q"),
    ("vote", "none"),
]

STATUSES = {
    "residual": {Status.CONVERGED},
    "q": {Status.HALTED, Status.MAX_DEPTH},
    "residual+q": {Status.CONVERGED, Status.MAX_DEPTH},
    "residual|q": {Status.CONVERGED, Status.HALTED},
    "none": {Status.MAX_DEPTH},
}


@pytest.mark.parametrize(("select", "halt"), RULES)
def test_selects_and_halts(contractive, puzzles, select, halt):
    with torch.no_grad():
        contractive.q_head.bias.fill_(-2)  # so that some trajectories settle with a negative q_halt
    options = dict(breadth=3, halt=halt, depth=7, return_all=True)
    want = contractive.solve(puzzles[:3], tol=TOL, backend="reference", select=select, **options)
    got = solve(contractive, puzzles[:3], slots=2, select=select, **options)
    if select == "first":  # which siblings are cancelled, and when, depends on who ran first
        assert torch.equal(got.restart, want.restart) and torch.equal(got.steps, want.steps)
        assert torch.equal(got.preds, want.preds) and torch.equal(got.converged, want.converged)
        got = solve(contractive, puzzles[:3], **options)
    else:
        assert_agree(got, want)
    assert set(map(Status, got.all_status.flatten().tolist())) == STATUSES[halt]


def test_noise_positions_and_layers(puzzles):
    for changes in (dict(noise_scale=0.01, L_layers=2), dict(mlp_t=False, pos_encodings="rope", noise_scale=0.01)):
        model = make_contractive(small_config(**changes))
        options = dict(depth=4, breadth=2, halt="none", return_all=True, seed=2**32 - 1)
        want = model.solve(puzzles[:2], backend="reference", **options)
        assert_agree(solve(model, puzzles[:2], **options), want)


def test_bf16(contractive, puzzles):
    options = dict(depth=4, halt="none")
    full, half = (solve(contractive, puzzles, precision=p, **options).logits for p in ("fp32", "bf16"))
    assert 1e-4 < (half - full).norm() / full.norm() < 0.05
    rounded = make_contractive(small_config()).bfloat16()
    again = solve(rounded, puzzles, **options)
    # The state is float32 whatever the weights are, so that only their values matter.
    assert torch.equal(again.logits, solve(rounded.float(), puzzles, precision="bf16", **options).logits)


def test_a_state_that_is_zero_has_settled(puzzles):
    model = make_contractive(small_config(fixed_init=True))
    with torch.no_grad():
        for tensor in (model.H_init, model.L_init, model.embed_tokens.embedding_weight):
            tensor.zero_()
    result = solve(model, puzzles, depth=3)
    assert (result.residual == 0).all() and result.converged.all() and (result.steps == 1).all()


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 100])
def test_a_race_has_the_same_winner_and_costs_less(contractive, puzzles, slots):
    puzzles, options = puzzles[:2], dict(breadth=4, tol=TOL, depth=9, return_all=True)
    everyone = contractive.solve(puzzles, select="residual", backend="reference", **options)
    want = contractive.solve(puzzles, select="first", backend="reference", **options)
    race = solve(contractive, puzzles, select="first", slots=slots, checkpoints=(2, 9), **options)
    assert torch.equal(race.restart, want.restart) and torch.equal(race.steps, want.steps)
    assert torch.equal(race.preds, want.preds)
    cancelled = race.all_status == Status.CANCELLED
    assert cancelled.any() and (race.all_steps <= everyone.all_steps).all()
    assert race.nfe.sum() < everyone.nfe.sum()
    assert (race.all_residual[cancelled & (race.all_steps > 0)]).isfinite().all()
    never = race.all_steps == 0
    assert (race.all_preds[never] == 0).all() and race.all_score[never].isnan().all()


def test_programs_that_run_side_by_side_cancel_each_other():
    """What a sibling's time means on a device: a race is over for those that would need a step more."""
    contractive = make_contractive(small_config())
    tokens = torch.full((1, 6), 3)
    options = dict(breadth=6, tol=TOL, depth=9)
    alone = contractive.solve(tokens, backend="reference", **options)
    race = solve(contractive, tokens, select="first", **options)
    best: tuple[int, int] | None = None
    for b in range(6):  # the interpreter runs one program after another: in order of restarts
        steps = int(alone.all_steps[0, b])
        expected = steps if best is None else min(steps, best[0] if b < best[1] else best[0] - 1)
        assert int(race.all_steps[0, b]) == max(expected, 0)
        if race.all_status[0, b] == Status.CONVERGED:
            best = min(best, (steps, b)) if best else (steps, b)
    assert best == (int(race.steps[0]), int(race.restart[0]))


# ---- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden_size", "precision"), [(20, "fp32"), (16, "bf16")])
def test_a_row_that_diverges_leaves_its_neighbours_alone(hidden_size, precision):
    model = make_contractive(small_config(hidden_size=hidden_size))
    puzzles = torch.randint(1, 6, (4, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.embed_tokens.embedding_weight[6] = 3e38
    poisoned = puzzles.clone()
    poisoned[1, 3] = 6
    # One slot: what the bad row leaves in its scratch space meets the next one.
    options: dict[str, Any] = dict(breadth=2, precision=precision, depth=4, slots=1, checkpoints=(1, 3))
    clean, result = (solve(model, tokens, **options) for tokens in (puzzles, poisoned))
    assert (result.all_status[1] == Status.DIVERGED).all() and (result.nfe[1] == 2).all()
    assert result.logits.isfinite().all() and not result.converged[1] and (result.logits[1] == 0).all()
    others = [0, 2, 3]
    for field in FIELDS:
        assert torch.equal(getattr(result, field)[others], getattr(clean, field)[others]), field
    assert (result.at[3].all_status[1] == Status.DIVERGED).all()


def test_logits_from_before_the_divergence_are_kept(contractive, puzzles):
    first, second = (contractive.solve(puzzles, depth=d, halt="none", backend="reference").logits for d in (1, 2))
    most = [logits.abs().flatten(1).max(1).values for logits in (first, second)]
    row = int((most[1] / most[0]).argmax())
    assert most[1][row] > 1.02 * most[0][row]
    with torch.no_grad():
        contractive.lm_head.weight.mul_(
            3.4e38 / float((most[0] + most[1])[row] / 2)
        )  # overflows at the second step alone
    tokens = puzzles[[row, row]]
    want = contractive.solve(tokens, depth=3, halt="none", backend="reference")
    got = solve(contractive, tokens, depth=3, halt="none", slots=1, checkpoints=(1, 3))
    for result in (want, got):
        assert (result.all_status == Status.DIVERGED).all() and (result.steps == 2).all()
    assert torch.equal(got.preds, want.preds) and torch.equal(got.at[1].preds, want.preds)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=0)
    assert torch.equal(got.at[3].all_status, got.all_status)


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_alone_or_together_in_any_order_and_slots():
    model = make_contractive(small_config(noise_scale=0.002))
    puzzles = torch.randint(1, 7, (3, 6), generator=torch.Generator().manual_seed(1))
    options = dict(depth=8, breadth=2, return_all=True, seed=11)
    together = solve(model, puzzles, **options)
    assert len(together.all_steps.unique()) > 1
    order = torch.tensor([2, 0, 1])
    assert same(solve(model, puzzles, slots=1, **options), together)
    assert same(solve(model, puzzles[order], slots=4, **options), together, order)
    assert same(solve(model, puzzles[1:2], **options), together, slice(1, 2))


def test_programs_are_no_more_than_slots_or_trajectories(contractive, puzzles, monkeypatch):
    from eqr_kernels.backends.triton import launch

    seen, run = [], launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda values, plan, programs: seen.append(programs) or run(values, plan, programs)
    )
    for slots in (1, 3, None, 100):
        solve(contractive, puzzles, depth=1, halt="none", slots=slots)
    assert seen == [1, 3, 4, 4]


# ---- progress and cancelling -----------------------------------------------------------------------------------------


def test_progress_is_told_from_beginning_to_end(contractive, puzzles):
    seen: list[tuple[int, int, int]] = []
    result = solve(contractive, puzzles, depth=10, halt="none", progress=lambda *now: seen.append(now))
    assert seen[0] == (0, 4, 0) and seen[-1] == (4, 4, int(result.nfe.sum())) == (4, 4, 40)
    assert seen == sorted(seen) and len(set(seen)) > 3, "a run of a second should tell how far it is"


def test_cancelling_keeps_what_there_is(contractive, puzzles):
    full = solve(contractive, puzzles, depth=3, halt="none", checkpoints=(1, 2))
    result = solve(
        contractive,
        puzzles,
        depth=2**24 - 1,
        halt="none",
        checkpoints=(1, 2, 2**24 - 1),
        slots=1,
        progress=lambda finished, of, spent: spent < 4,
    )
    assert (result.all_status == Status.CANCELLED).all()
    steps = result.all_steps[:, 0].tolist()
    assert steps[0] >= 4 and steps[1:] == [0, 0, 0], "one slot: only the first had begun"
    assert result.residual.isnan().all() and result.score[0].isfinite() and result.score[1:].isnan().all()
    assert (result.preds[1:] == 0).all() and (result.logits[1:] == 0).all() and result.q_halt[1:].isnan().all()
    for depth in (1, 2):
        for field in ("all_preds", "all_residual", "all_score", "all_steps", "all_status"):
            assert torch.equal(getattr(result.at[depth], field)[0], getattr(full.at[depth], field)[0]), (depth, field)
        assert (result.at[depth].all_status[1:] == Status.CANCELLED).all()
    assert torch.equal(result.at[2**24 - 1].all_steps, result.all_steps)


def test_cancelled_at_the_beginning_costs_nothing(contractive, puzzles):
    result = solve(contractive, puzzles, halt="none", depth=2**24 - 1, progress=lambda *_: False)
    assert (result.all_status == Status.CANCELLED).all() and result.nfe.sum() == 0 and (result.preds == 0).all()


@pytest.mark.parametrize("when", [0, 2])
def test_what_progress_raises_is_raised(contractive, puzzles, when):
    seen = []

    def progress(*_: int) -> None:
        seen.append(0)
        if len(seen) > when:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        solve(contractive, puzzles, halt="none", depth=2**24 - 1, progress=progress)
    assert len(seen) == when + 1
    assert (solve(contractive, puzzles, depth=1, halt="none").steps == 1).all()


# ---- models and inputs of every kind ---------------------------------------------------------------------------------


def test_auto_takes_it_and_tells_how(contractive, puzzles):
    result = contractive.solve(puzzles, depth=1, halt="none")
    assert result.backend == "triton"
    assert result.backend_reason.startswith(
        "auto chose triton: persistent Triton kernel, fp32, in Triton's interpreter"
    )
    why_not = backends.available(contractive, Precision.int8)["triton"]
    assert why_not is not None and "computes in fp32, bf16, not in int8; use precision='bf16'" in why_not


def test_any_strides_mode_and_inference_mode(contractive, puzzles):
    options = dict(depth=3, halt="none")
    expected = solve(contractive, puzzles, **options)
    for layer in contractive.L_level.layers:
        weight = layer.mlp.gate_up_proj.weight
        weight.data = weight.data.T.contiguous().T
        assert not weight.is_contiguous()
    wide = torch.zeros(4, 12, dtype=torch.int32)
    wide[:, ::2] = puzzles
    assert same(solve(contractive, wide[:, ::2], **options), expected)
    with torch.inference_mode():
        assert same(solve(contractive.train(), puzzles.clone(), **options), expected)
    with torch.enable_grad():
        result = solve(contractive, puzzles, **options)
        assert same(result, expected) and not result.logits.requires_grad


def test_small_tiles_decide_alike(contractive, puzzles, monkeypatch):
    want = contractive.solve(puzzles[:2], tol=0.17, depth=5, backend="reference", return_all=True, checkpoints=(2,))
    with_tiles(
        monkeypatch,
        tokens=16,
        columns=16,
        hidden=128,
        inner=64,
        mix_units=128,
        row_tokens=16,
        row_features=16,
        one_pass=False,
    )
    assert_agree(solve(contractive, puzzles[:2], tol=0.17, depth=5, return_all=True, checkpoints=(2,)), want)
