"""`solve`: halting, scheduling, accounting and isolation, on a model that contracts."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from eqr_kernels import EquilibriumReasoner, ModelCard, Status, selection
from tests.support.environment import REPOSITORY
from tests.support.models import assert_same, make_contractive, tiny_config

TOL = 0.02


def steps_to_settle(residuals: torch.Tensor, tol: float, patience: int) -> torch.Tensor:
    """First outer step (from 1) that ends `patience` residuals <= tol; depth + 1 if none. residuals [..., depth]."""
    runs = (residuals <= tol).float().unfold(-1, patience, 1).all(-1)
    first = runs.float().argmax(-1) + patience
    return torch.where(runs.any(-1), first, residuals.shape[-1] + 1)


@pytest.mark.parametrize("patience", [1, 3])
def test_early_exit_is_the_full_trajectory_cut_short(contractive, puzzles, patience, backend):
    depth, options = 40, dict(breadth=2, return_all=True, backend=backend)
    full = contractive.solve(puzzles, depth=depth, halt="none", trace=True, checkpoints=range(1, depth + 1), **options)
    early = contractive.solve(puzzles, depth=depth, tol=TOL, patience=patience, **options)
    expected = steps_to_settle(full.residuals, TOL, patience)
    settled = expected <= depth
    assert settled.any() and len(expected[settled].unique()) > 2, "the fixture should settle at different depths"
    torch.testing.assert_close(early.all_steps, expected.clamp(max=depth))
    assert ((early.all_status == Status.CONVERGED) == settled).all()
    for i in range(len(puzzles)):
        for b in range(2):
            at = full.at[int(early.all_steps[i, b])]
            assert torch.equal(early.all_preds[i, b], at.all_preds[i, b])
            assert_same(early.all_score[i, b], at.all_score[i, b], backend)
            assert_same(early.all_residual[i, b], at.all_residual[i, b], backend)
    assert torch.equal(early.nfe, early.all_steps.sum(1))


def test_depth_calls_of_the_module_equal_solve(puzzles, backend):
    model = make_contractive(tiny_config(noise_scale=0.01))
    state = model.initial_state(puzzles, seed=3)
    with torch.no_grad():
        for _ in range(4):
            state, logits, q_halt = model(puzzles, state)
    result = model.solve(puzzles, depth=4, halt="none", seed=3, backend=backend)
    torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.q_halt, q_halt, rtol=1e-4, atol=1e-4)
    assert (result.steps == 4).all() and (result.all_status == Status.MAX_DEPTH).all() and not result.converged.any()


@pytest.mark.slow
def test_alone_or_together_in_any_order_and_slots(puzzles, backend, restore):
    model = make_contractive(tiny_config(noise_scale=0.002))
    options = dict(depth=30, breadth=3, tol=TOL, return_all=True, seed=11, backend=backend)
    together = model.solve(puzzles, **options)
    assert len(together.all_steps.unique()) > 2
    order = torch.randperm(len(puzzles), generator=torch.Generator().manual_seed(0))
    variants = {
        "slots": (torch.arange(len(puzzles)), model.solve(puzzles, slots=5, **options)),
        "one slot": (torch.arange(len(puzzles)), model.solve(puzzles, slots=1, **options)),
        "order": (order, model.solve(puzzles[order], **options)),
        "subset": (order[:5], model.solve(puzzles[order[:5]], **options)),
        **{f"row {i}": (torch.tensor([i]), model.solve(puzzles[i : i + 1], **options)) for i in range(5)},
    }
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        variants[f"{threads} threads"] = (torch.arange(len(puzzles)), model.solve(puzzles, **options))
        variants[f"{threads} threads, alone"] = (order[:1], model.solve(puzzles[order[:1]], **options))
    for name, (rows, result) in variants.items():
        for field in ("preds", "steps", "restart", "nfe", "all_steps", "all_status", "all_preds"):
            assert torch.equal(getattr(result, field), getattr(together, field)[rows]), (name, field)
        for field in ("residual", "score", "all_residual", "all_score", "logits"):
            got, expected = getattr(result, field), getattr(together, field)[rows]
            assert_same(got, expected, backend, rtol=1e-5, atol=1e-6, msg=f"{name}: {field}")


def test_seed_and_ids_key_the_trajectories(contractive, puzzles, backend):
    options = dict(depth=3, halt="none", backend=backend)
    base = contractive.solve(puzzles, **options)
    assert torch.equal(base.logits, contractive.solve(puzzles, **options).logits)
    assert not torch.equal(base.logits, contractive.solve(puzzles, seed=1, **options).logits)
    ids = torch.arange(len(puzzles)) - 2**62
    other = contractive.solve(puzzles, ids=ids, **options)
    assert not torch.equal(base.logits, other.logits)
    assert torch.equal(other.logits, contractive.solve(puzzles, ids=ids, **options).logits)
    twins = contractive.solve(puzzles[[0, 0]], **options)
    assert torch.equal(twins.logits[0], twins.logits[1])


def test_a_wider_run_contains_the_narrower_one(contractive, puzzles, backend):
    narrow = contractive.solve(puzzles, depth=12, breadth=2, tol=TOL, return_all=True, backend=backend)
    wide = contractive.solve(puzzles, depth=12, breadth=5, tol=TOL, return_all=True, backend=backend)
    assert torch.equal(wide.all_steps[:, :2], narrow.all_steps)
    assert torch.equal(wide.all_preds[:, :2], narrow.all_preds)
    assert (narrow.all_preds[:, 0] != narrow.all_preds[:, 1]).any(), "restarts should differ"


def test_a_deeper_run_contains_the_shallower_ones(contractive, puzzles, backend):
    deep = contractive.solve(
        puzzles, depth=9, breadth=3, halt="none", checkpoints=(1, 2, 5, 9), select="vote", backend=backend
    )
    for depth, at in deep.at.items():
        shallow = contractive.solve(
            puzzles, depth=depth, breadth=3, halt="none", select="vote", return_all=True, backend=backend
        )
        assert torch.equal(at.preds, shallow.preds) and torch.equal(at.restart, shallow.restart)
        assert torch.equal(at.all_preds, shallow.all_preds)
        assert torch.equal(at.all_steps, shallow.all_steps)
        torch.testing.assert_close(at.all_score, shallow.all_score)
        torch.testing.assert_close(at.all_q_halt, shallow.all_q_halt)


def test_a_checkpoint_after_the_end_shows_the_end(contractive, puzzles, backend):
    middle = int(contractive.solve(puzzles, depth=40, tol=TOL, backend=backend).steps.median())
    result = contractive.solve(
        puzzles, depth=40, tol=TOL, checkpoints=(1, middle, 40), return_all=True, backend=backend
    )
    ended = result.all_steps <= middle
    assert ended.any() and not ended.all()
    assert torch.equal(result.at[middle].all_steps, result.all_steps.clamp(max=middle))
    assert (result.at[middle].all_status[ended] == Status.CONVERGED).all()
    assert (result.at[middle].all_status[~ended] == Status.MAX_DEPTH).all()
    assert torch.equal(result.at[40].all_preds, result.all_preds)
    assert torch.equal(result.at[40].preds, result.preds)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_score_is_the_mean_change_of_the_logits_over_the_window(contractive, puzzles, window, backend):
    depth, state, logits = 6, contractive.initial_state(puzzles), []
    with torch.no_grad():
        for _ in range(depth):
            state, step_logits, _ = contractive(puzzles, state)
            logits.append(step_logits)
    changes = torch.stack([(b - a).norm(dim=-1).mean(-1) for a, b in zip(logits, logits[1:], strict=False)])
    result = contractive.solve(puzzles, depth=depth, halt="none", window=window, checkpoints=(1, 2, 4), backend=backend)
    torch.testing.assert_close(result.score, changes[-window:].mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.at[4].all_score[:, 0], changes[:3][-window:].mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.at[2].all_score[:, 0], changes[0], rtol=1e-3, atol=1e-5)
    assert torch.equal(result.at[1].all_score, result.at[1].all_residual)


def ends_by(rule: str, low: torch.Tensor, positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and status [N, B] under a halting rule, from what its signals say after each step: bool [N, B, depth]."""
    converged = {"residual": low, "q": low & False, "residual+q": low & positive, "residual|q": low}[rule]
    halted = {"residual": low & False, "q": positive, "residual+q": low & False, "residual|q": positive}[rule]
    fires, first = (converged | halted).any(-1), (converged | halted).int().argmax(-1)
    status = torch.where(converged.gather(-1, first[..., None])[..., 0], int(Status.CONVERGED), int(Status.HALTED))
    return torch.where(fires, first + 1, low.shape[-1]), torch.where(fires, status, int(Status.MAX_DEPTH))


@pytest.mark.parametrize("patience", [1, 2])
def test_each_halting_rule_ends_a_trajectory_where_its_signals_say(puzzles, patience, backend):
    """Under noise the residual and q_halt come and go, each on its own."""
    puzzles, depth, model = puzzles[:6], 12, make_contractive(tiny_config(noise_scale=0.2), seed=3)
    options = dict(depth=depth, breadth=3, return_all=True, backend=backend)
    full = model.solve(puzzles, halt="none", trace=True, checkpoints=range(1, depth + 1), **options)
    tol = float(full.residuals.quantile(0.6))
    low = (full.residuals <= tol).unfold(-1, patience, 1).all(-1)
    low = torch.cat([torch.zeros_like(low[..., : patience - 1]), low], -1)
    positive = torch.stack([at.all_q_halt for at in full.at.values()], -1) > 0
    rules = {rule: ends_by(rule, low, positive) for rule in ("residual", "q", "residual+q", "residual|q")}
    by_residual, by_q, by_both = (rules[rule][0] for rule in ("residual", "q", "residual+q"))
    for occurs in (by_residual < by_q, by_residual == by_q, by_residual > by_q, by_both > by_residual.maximum(by_q)):
        assert occurs.any(), "the fixture's signals should come in any order, and meet later than each began"
    for rule, (steps, status) in rules.items():
        rules_of_run = dict(halt=rule, tol=tol, patience=patience)
        every = model.solve(puzzles, **rules_of_run, **options)
        assert torch.equal(every.all_steps, steps) and torch.equal(every.all_status, status), rule
        for field in ("all_preds", "all_q_halt", "all_residual", "all_score"):
            history = torch.stack([getattr(at, field) for at in full.at.values()])
            index = (steps - 1).view(1, *steps.shape, *[1] * (history.ndim - 3)).expand(1, *history.shape[1:])
            assert_same(getattr(every, field), history.gather(0, index)[0], backend)
        settled = status != Status.MAX_DEPTH
        assert torch.equal(every.converged, settled.gather(1, every.restart[:, None])[:, 0])
        assert torch.equal(every.converged, settled.any(1)), "a trajectory that has settled goes before the others"
        race = model.solve(puzzles, select="first", slots=3, **rules_of_run, **options)
        ended, first = settled.any(1), torch.where(settled, steps, depth + 1).argmin(1)
        assert torch.equal(race.converged, ended) and torch.equal(race.restart[ended], first[ended])
        for got, want in ((race.all_steps, steps), (race.all_status, status)):
            assert torch.equal(got.gather(1, first[:, None])[ended], want.gather(1, first[:, None])[ended])
        assert (race.all_status == Status.CANCELLED).any()


def test_a_race_has_the_same_winner_and_costs_less(contractive, puzzles, backend):
    options = dict(depth=60, breadth=6, tol=TOL, return_all=True, backend=backend)
    everyone = contractive.solve(puzzles, **options)
    assert (everyone.all_status == Status.CONVERGED).any(1).all()
    fields = (everyone.all_preds, everyone.all_status, everyone.all_score, everyone.all_q_halt, everyone.all_steps)
    winner = selection.select("first", *fields)
    for slots in (1, 4, 100):
        race = contractive.solve(puzzles, select="first", slots=slots, **options)
        assert torch.equal(race.restart, winner), slots
        assert torch.equal(race.preds, everyone.all_preds[torch.arange(len(winner)), winner])
        assert torch.equal(race.steps, everyone.all_steps[torch.arange(len(winner)), winner])
        assert race.nfe.sum() < everyone.nfe.sum()
        cancelled = race.all_status == Status.CANCELLED
        assert cancelled.any()
        assert (race.all_steps <= everyone.all_steps).all()
    assert (everyone.all_steps.min(1).values == race.steps).all()


def test_diverging_rows_stop_and_leave_their_neighbours_alone(contractive, puzzles, backend):
    puzzles = puzzles.clone()
    puzzles[puzzles == 6] = 5
    with torch.no_grad():
        contractive.embed_tokens.embedding_weight[6] = 3e38  # finite, but sqrt(d) times it is not
    clean = contractive.solve(puzzles, depth=20, breadth=2, tol=TOL, backend=backend)
    poisoned = puzzles.clone()
    poisoned[4, 2] = 6
    result = contractive.solve(poisoned, depth=20, breadth=2, tol=TOL, backend=backend)
    others = torch.arange(len(puzzles)) != 4
    assert (result.all_status[4] == Status.DIVERGED).all() and (result.all_steps[4] == 1).all()
    assert (result.all_status[others] != Status.DIVERGED).all()
    for field in ("preds", "steps", "logits", "residual", "score", "nfe"):
        assert torch.equal(getattr(result, field)[others], getattr(clean, field)[others]), field
    assert result.logits.isfinite().all() and not result.converged[4] and result.nfe[4] == 2


def test_cancelling_returns_what_there_is(contractive, puzzles):
    seen, options = [], dict(halt="none", backend="reference")

    def progress(finished: int, total: int, spent: int) -> bool:
        seen.append((finished, total, spent))
        return len(seen) < 4

    result = contractive.solve(puzzles, depth=10, slots=8, progress=progress, return_all=True, **options)
    assert seen == [(0, 12, 0), (0, 12, 8), (0, 12, 16), (0, 12, 24)]
    assert (result.all_status == Status.CANCELLED).all()
    assert torch.equal(result.all_steps[:, 0], torch.tensor([3] * 8 + [0] * 4))
    shallow = contractive.solve(puzzles, depth=3, **options)
    assert torch.equal(result.preds[:8], shallow.preds[:8])
    assert (result.preds[8:] == 0).all() and result.score[8:].isnan().all()
    assert result.nfe.sum() == 24


def test_an_interrupt_reaches_the_caller(contractive, puzzles, backend):
    def progress(*_: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contractive.solve(puzzles, tol=TOL, progress=progress, backend=backend)


def test_trace_ends_with_the_trajectory(contractive, puzzles, backend):
    result = contractive.solve(puzzles, depth=40, breadth=2, tol=TOL, trace=True, backend=backend)
    assert result.residuals.shape == (12, 2, 40)
    assert torch.equal((~result.residuals.isnan()).sum(-1), result.all_steps)
    last = result.residuals.gather(-1, result.all_steps[..., None] - 1)[..., 0]
    assert torch.equal(last, result.all_residual)


def test_fixed_start_needs_no_random_numbers(puzzles, backend):
    model = make_contractive(tiny_config(fixed_init=True, lambda_=1.0))
    result = model.solve(puzzles, depth=5, breadth=2, halt="none", return_all=True, backend=backend)
    assert torch.equal(result.all_preds[:, 0], result.all_preds[:, 1])
    torch.testing.assert_close(
        result.logits, model.solve(puzzles, depth=5, halt="none", seed=9, backend=backend).logits
    )


def test_precision(contractive, puzzles, backend):
    full = contractive.solve(puzzles, depth=4, halt="none", backend=backend)
    half = contractive.solve(puzzles, depth=4, halt="none", precision="bf16", backend=backend)
    error = (half.logits - full.logits).norm() / full.logits.norm()
    assert 1e-4 < error < 0.05
    assert half.logits.dtype == torch.float32
    again = contractive.bfloat16().solve(puzzles, depth=4, halt="none", backend=backend)
    torch.testing.assert_close(again.logits, half.logits, rtol=0.02, atol=0.02)


MEMORY = """
import resource, sys, torch
sys.path.insert(0, {repository!r})
from tests.support.models import make_contractive, tiny_config
torch.set_num_threads(1)
model = make_contractive(tiny_config(seq_len=32, hidden_size=64, noise_scale=0.01))
tokens = torch.ones(16, 32, dtype=torch.long)
for depth in (8, 8, 256):
    assert model.solve(tokens, depth=depth, halt="none", backend={backend!r}).backend == {backend!r}
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(backend):
    script = MEMORY.format(repository=str(REPOSITORY), backend=backend)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    _, shallow, deep = (int(line) for line in run.stdout.split())  # peaks in KiB
    # Keeping every state would add 16 * 32 * 64 * 2 * 4 * 248 bytes, 62 MiB; every step's logits alone, 3.5 MiB.
    assert deep - shallow < 3 * 1024


BAD = [
    (dict(depth=0), ValueError, "depth must be at least 1, got 0"),
    (dict(depth=2.0), TypeError, "depth must be an int, got 2.0"),
    (dict(breadth=-1), ValueError, "breadth must be at least 1"),
    (dict(patience=0), ValueError, "patience"),
    (dict(slots=0), ValueError, "slots"),
    (dict(window=0), ValueError, "window"),
    (dict(halt="never"), ValueError, "halt must be one of residual, q, residual\\+q, residual\\|q, none, got 'never'"),
    (dict(select="best"), ValueError, "select must be one of residual, vote, q, first, got 'best'"),
    (dict(select="first", halt="none"), ValueError, "needs a halting rule"),
    (dict(seed=-1), ValueError, "seed must be in 0..2\\*\\*32 - 1"),
    (dict(seed=1 << 32), ValueError, "seed"),
    (dict(seed="a"), TypeError, "seed must be an int"),
    (dict(noise_scale=-0.1), ValueError, "noise_scale must be finite and not negative"),
    (dict(noise_scale=float("nan")), ValueError, "noise_scale"),
    (dict(tol="tight"), ValueError, 'tol must be "auto", "fast" or a number of at least 0, got .tight'),
    (dict(halt="q", tol="tight"), ValueError, 'tol must be "auto", "fast" or a number of at least 0, got .tight'),
    (dict(tol=-1.0), ValueError, "tol"),
    (dict(tol=float("nan")), ValueError, "tol must be finite and not negative"),
    (dict(tol=True), TypeError, 'tol must be "auto", "fast" or a number, got True'),
    (dict(checkpoints=(1, 99)), ValueError, "checkpoints must be at most depth=64, got 99"),
    (dict(checkpoints=(0,)), ValueError, "checkpoints must be at least 1"),
    (dict(checkpoints=3), TypeError, r"checkpoints must be a sequence of depths, as in \(1, 4, 16\), got 3 \(int\)"),
    (dict(checkpoints="1,4"), TypeError, "checkpoints must be a sequence of depths.*got '1,4'"),
    (dict(progress=True), TypeError, r"progress must be a function or None, got True \(bool\)"),
    (dict(on_finished="print"), TypeError, "on_finished must be a function or None, got 'print'"),
    (dict(ids=torch.zeros(3, dtype=torch.long)), ValueError, r"ids must have shape \[12\]"),
    (dict(ids=torch.zeros(12)), TypeError, "ids must be an int64 tensor"),
    (dict(backend="gpu"), ValueError, "known: auto, cuda, triton, cpu, reference"),
    (dict(backend="cuda"), RuntimeError, r"(sees no GPU|install|model.cuda).*can run: .*reference"),
    (dict(precision="fp16"), ValueError, "precision must be one of auto, fp32, bf16, int8, got 'fp16'"),
    (dict(precision="fp8"), RuntimeError, "precision='fp8' has no backend in this version; use auto, fp32, bf16, int8"),
    (dict(precision="int8", backend="reference"), RuntimeError, "no int8 arithmetic.*use backend='cpu'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(list(b[0].items())[0]) for b in BAD])
def test_bad_options_name_the_argument_and_the_remedy(contractive, puzzles, options, error, message):
    with pytest.raises(error, match=message):
        contractive.solve(puzzles, **{"tol": TOL, **options})


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 6), TypeError, "tokens must be an integer tensor, got torch.float32"),
        ([[1] * 6], TypeError, "tokens must be a torch.Tensor"),
        (torch.ones(2, 7, dtype=torch.long), ValueError, r"shape \[n, 6\], got \[2, 7\]"),
        (torch.ones(6, dtype=torch.long), ValueError, r"got \[6\]"),
        (torch.full((2, 6), 7), ValueError, r"0..6, got 7 in row 0"),
        (torch.full((2, 6), -1), ValueError, r"got -1 in row 0"),
    ],
)
def test_bad_tokens(contractive, tokens, error, message):
    with pytest.raises(error, match=message):
        contractive.solve(tokens, tol=TOL)


def test_a_tolerance_below_the_noise_floor_warns(contractive, puzzles):
    with pytest.warns(UserWarning, match="no trajectory will converge") as warned:
        contractive.solve(puzzles, depth=2, tol=0.01, noise_scale=0.01)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("card", "tol", "value", "warned"),
    [
        (dict(tol=0.02, tol_fast=0.3), "auto", 0.02, None),
        (dict(tol=0.02, tol_fast=0.3), "fast", 0.3, None),
        (dict(tol=0.02), "fast", 0.02, None),
        (dict(tol_fast=0.3, tol_missing="3 of 9 were right"), "fast", 0.3, None),
        (dict(tol_fast=0.3, tol_missing="3 of 9 were right"), "auto", 0.3, "3 of 9 were right.*tol_fast=0.3"),
        (dict(tol_missing="none is right"), "fast", None, "none is right; halting at the provisional"),
        (None, "auto", None, "it was never calibrated.*`eqr calibrate --write`"),
    ],
)
def test_which_tolerance_of_the_card_is_taken_and_when_it_warns(
    contractive, puzzles, card, tol, value, warned, recwarn
):
    contractive.card = None if card is None else ModelCard(contractive.config, **card)
    options = dict(depth=40, breadth=2, seed=5)
    result = contractive.solve(puzzles, tol=tol, **options)
    warnings = [str(w.message) for w in recwarn]
    assert len(warnings) == (warned is not None) and all(re.search(str(warned), text) for text in warnings)
    if value is None:  # twice what the first eight rows come down to
        rest = contractive.solve(puzzles[:8], halt="none", depth=40, seed=5).residual
        value = 2 * rest.median().item()
    want = contractive.solve(puzzles, tol=value, **options)
    assert torch.equal(result.steps, want.steps) and torch.equal(result.converged, want.converged)
    assert result.converged.any()


def test_the_promise_is_for_the_noise_of_the_calibration_alone(puzzles, recwarn):
    model = make_contractive(tiny_config(noise_scale=0.01))
    model.card = ModelCard(model.config, tol=0.03, tol_fast=0.3, noise_scale=0.02)
    for options in ({}, dict(noise_scale=0.02), dict(noise_scale=0.01, tol="fast"), dict(noise_scale=0.0, tol=0.03)):
        model.solve(puzzles, depth=4, **options)
    assert not recwarn
    with pytest.warns(
        UserWarning, match="no promise in this run: .*tol=0.03 .*noise_scale=0.02, and this run has 0;"
    ) as warned:
        model.solve(puzzles, depth=4, noise_scale=0.0)
    assert warned[0].filename == __file__


def test_a_model_without_card_takes_its_tolerance_from_the_noise_or_lets_nothing_unsettled_settle(puzzles):
    noisy = make_contractive(tiny_config(noise_scale=0.01))
    with pytest.warns(UserWarning, match=r"provisional tol=0.0283, twice the residual that the noise leaves"):
        result = noisy.solve(puzzles, depth=40)
    assert torch.equal(result.steps, noisy.solve(puzzles, depth=40, tol=2 * 2**0.5 * 0.01).steps)
    torch.manual_seed(0)
    restless = EquilibriumReasoner(tiny_config()).eval()  # random weights do not contract
    with pytest.warns(UserWarning, match="its first rows do not come to rest"):
        result = restless.solve(puzzles, depth=40)
    assert (result.residual[result.converged] <= 0.0283).all() and not result.converged.all()


def test_non_finite_weights_are_named(contractive, puzzles, backend):
    with torch.no_grad():
        contractive.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="weight lm_head.weight holds 1 non-finite"):
        contractive.solve(puzzles, tol=TOL, backend=backend)
    with torch.no_grad():
        contractive.lm_head.weight[0, 0] = -float("inf")
    with pytest.raises(RuntimeError, match="weight lm_head.weight holds 1 non-finite"):
        contractive.solve(puzzles, tol=TOL, backend=backend)
    with torch.no_grad():
        contractive.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="weight lm_head.weight holds 112 non-finite"):
        contractive.solve(puzzles, tol=TOL, backend=backend)


def test_the_environment_chooses_the_backend(contractive, puzzles, monkeypatch):
    monkeypatch.setenv("EQR_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="EQR_BACKEND='triton' cannot run here"):
        contractive.solve(puzzles, tol=TOL)
    result = contractive.solve(puzzles, tol=TOL, depth=2, backend="reference")
    assert result.backend == "reference" and "backend='reference'" in result.backend_reason


def test_without_the_extension_the_answers_are_the_same(puzzles, monkeypatch, backend):
    model = make_contractive(tiny_config(noise_scale=0.002))
    options = dict(depth=30, breadth=2, tol=TOL)
    with_ops = model.solve(puzzles, backend=backend, **options)
    monkeypatch.setattr("eqr_kernels.ops.extension_status", lambda: (False, "switched off by the test"))
    without = model.solve(puzzles, **options)
    assert without.backend == "reference" and "cpu: switched off by the test" in without.backend_reason
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: switched off by the test"):
        model.solve(puzzles, backend="cpu", **options)
    with pytest.raises(RuntimeError, match="finds no backend.*cpu: switched off by the test; reference: .*int8"):
        model.solve(puzzles, precision="int8", **options)
    assert torch.equal(with_ops.preds, without.preds) and torch.equal(with_ops.all_steps, without.all_steps)
    torch.testing.assert_close(with_ops.residual, without.residual, rtol=1e-4, atol=1e-6)


def test_float64_model_runs(puzzles):
    model: EquilibriumReasoner = make_contractive(tiny_config(noise_scale=0.01)).double()
    result = model.solve(puzzles, depth=2, halt="none")
    assert result.logits.dtype == torch.float32 and "plain PyTorch throughout" in result.backend_reason
    assert result.backend == "reference"


@pytest.mark.slow
def test_a_races_checkpoints_are_the_shallower_races(contractive, puzzles, backend):
    options = dict(breadth=6, tol=TOL, select="first", backend=backend)
    deep = {s: contractive.solve(puzzles, depth=20, checkpoints=range(1, 21), slots=s, **options) for s in (1, 3, 64)}
    for depth in range(1, 21):
        shallow = contractive.solve(puzzles, depth=depth, **options)
        for slots, result in deep.items():
            assert torch.equal(result.at[depth].restart, shallow.restart), (slots, depth)
            assert torch.equal(result.at[depth].preds, shallow.preds), (slots, depth)


def test_cancelling_keeps_the_checkpoints_that_were_reached(contractive, puzzles):
    calls = []
    options = dict(depth=6, halt="none", checkpoints=(2, 3, 5), backend="reference")
    full = contractive.solve(puzzles, **options)
    result = contractive.solve(puzzles, progress=lambda *seen: calls.append(seen) or len(calls) < 4, **options)
    for depth in (2, 3):
        for field in ("all_preds", "all_residual", "all_score", "all_steps", "all_status"):
            assert torch.equal(getattr(result.at[depth], field), getattr(full.at[depth], field)), (depth, field)
    assert (result.at[5].all_status == Status.CANCELLED).all() and (result.at[5].all_steps == 3).all()


def test_a_state_that_is_zero_has_settled(puzzles, backend):
    model = make_contractive(tiny_config(fixed_init=True))
    with torch.no_grad():
        for tensor in (model.H_init, model.L_init, model.embed_tokens.embedding_weight):
            tensor.zero_()
    result = model.solve(puzzles, depth=3, tol=TOL, backend=backend)
    assert (result.residual == 0).all() and result.converged.all() and (result.steps == 1).all()


def test_a_window_wider_than_the_run_costs_nothing(contractive, puzzles, backend):
    wide = contractive.solve(puzzles, depth=3, halt="none", window=10**11, backend=backend)
    assert torch.equal(wide.score, contractive.solve(puzzles, depth=3, halt="none", window=3, backend=backend).score)
