"""Puzzles drawn ahead of the steps that take them, and training steps that never wait for the device."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eqr_kernels import EquilibriumReasoner, noise
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.prefetch import Prefetcher
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer
from tests.support.environment import needs_extension
from tests.support.models import tiny_config
from tests.support.training import keep, make_stream, make_trainer, toy_puzzles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[threading.Thread]]:
    """The threads before the test; afterwards every prefetcher is closed, that of a test that failed too."""
    made: weakref.WeakSet[Prefetcher] = weakref.WeakSet()
    init = Prefetcher.__init__

    def remember(self: Prefetcher, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.add(self)

    monkeypatch.setattr(Prefetcher, "__init__", remember)
    yield set(threading.enumerate())
    for prefetcher in list(made):
        prefetcher.close()


def threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("eqr-puzzles") and t not in before]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1).view(torch.uint8)


# drawing ahead -------------------------------------------------------------------------------------------------------


def test_a_step_has_its_puzzles_whatever_was_drawn_before():
    stream, other = make_stream(), make_stream(seed=[1, 2])
    state = stream.state
    near = Prefetcher(stream, 5, seed=3, rank=1, device=CPU, depth=1)
    far = Prefetcher(other, 5, seed=3, rank=1, device=CPU, depth=4)
    orders = {near: [0, 1, 2, 3, 4, 5, 6], far: [6, 5, 0, 2, 3, 1, 4]}
    taken = {p: {step: p.take(step) for step in order} for p, order in orders.items()}
    for step in range(7):
        rng = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(1, step)))
        expected = [torch.from_numpy(x).long() for x in make_stream().draw(5, step, rng)]
        assert (expected[0][:, 0] == step).all()  # as the curriculum has it for this very step
        for p in taken:
            assert all(torch.equal(*pair) for pair in zip(taken[p][step], expected, strict=True))
    again = near.take(2)
    assert torch.equal(again[0], taken[near][2][0])
    assert stream.state == state


def test_seeds_ranks_and_steps_have_different_puzzles():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 0), (2**32, 0, 0), (0, 2**32, 0)]
    drawn = [
        Prefetcher(make_stream(curriculum=()), 50, seed=s, rank=r, device=CPU).take(step)[0] for s, r, step in keys
    ]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == len(keys)


class Watched(PuzzleStream):
    """Tells which steps it drew, in which thread, and waits or fails at some."""

    def __init__(self, held: int | None = None, broken: int | None = None) -> None:
        super().__init__(toy_puzzles(), keep)
        self.drawn: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.held, self.broken, self.go_on = held, broken, threading.Event()

    def draw(self, n, step, rng=None):
        if step == self.held:
            assert self.go_on.wait(timeout=30)
        if step == self.broken:
            raise ArithmeticError(f"no puzzles for step {step}")
        self.drawn.put((step, threading.get_ident()))
        return super().draw(n, step, rng)

    def steps(self, count: int) -> list[int]:
        drawn = [self.drawn.get(timeout=30) for _ in range(count)]
        assert all(thread != threading.get_ident() for _, thread in drawn)
        return [step for step, _ in drawn]


def test_two_steps_are_drawn_ahead_in_another_thread(before):
    stream = Watched()
    prefetcher = Prefetcher(stream, 4, seed=0, rank=0, device=CPU)
    assert not threads(before)
    prefetcher.take(5)
    assert stream.steps(3) == [5, 6, 7] and len(threads(before)) == 1
    prefetcher.take(6)
    assert stream.steps(1) == [8]
    prefetcher.take(2)  # as after loading an older state
    assert stream.steps(3) == [2, 3, 4]
    prefetcher.close()
    assert stream.drawn.empty() and not threads(before)
    prefetcher.take(3)
    assert stream.steps(3) == [3, 4, 5] and len(threads(before)) == 1


def test_a_step_waits_for_its_own_puzzles_only():
    stream = Watched(held=1)
    prefetcher = Prefetcher(stream, 4, seed=0, rank=0, device=CPU)
    assert prefetcher.take(0)[0].shape == (4, 6)
    assert stream.steps(1) == [0] and stream.drawn.empty()
    stream.go_on.set()
    assert prefetcher.take(1)[0].shape == (4, 6)


def test_what_fails_in_the_thread_fails_the_step_that_needed_it():
    trainer = make_trainer(prefetch=True)
    stream = Watched(broken=2)
    trainer.prefetcher = Prefetcher(stream, 8, seed=0, rank=0, device=CPU)
    trainer.train_step()
    trainer.train_step()
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no puzzles for step 2"):
            trainer.train_step()
    stream.broken = None
    trainer.prefetcher.close()
    trainer.train_step()
    assert trainer.step == 3


@pytest.mark.parametrize("ends", ["close", "forgotten"])
def test_the_thread_ends_with_its_trainer(ends, before):
    trainer = make_trainer(prefetch=True)
    trainer.train_step()
    (thread,) = threads(before)
    if ends == "close":
        trainer.close()
    del trainer
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_bad_numbers_are_refused():
    for options in (dict(seed=-1), dict(rank=-1), dict(depth=0), dict(n=0)):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            Prefetcher(make_stream(), **{**dict(n=1, seed=0, rank=0, device=CPU), **options})


def test_sudoku_stays_sudoku():
    # The pattern of the least valid grid, as tokens.
    grid = np.array([[(3 * r + r // 3 + c) % 9 + 2 for r in range(9) for c in range(9)]], np.uint8)
    assert sudoku.is_valid_grid(grid).all()
    puzzles = replace(toy_puzzles(1), inputs=np.where(np.arange(81) % 3, 1, grid).astype(np.uint8), labels=grid)
    stream = PuzzleStream(puzzles, sudoku.augment)
    tokens, labels = Prefetcher(stream, 30, seed=0, rank=0, device=CPU).take(0)
    assert tokens.dtype == labels.dtype == torch.int64
    assert sudoku.is_valid_grid(labels.numpy().astype(np.uint8)).all() and len(labels.unique(dim=0)) == 30
    assert ((tokens == labels) | (tokens == 1)).all() and ((tokens == 1).sum(1) == 54).all()


# replacing rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(forward_dtype="bfloat16", fused=False),
        pytest.param(dict(forward_dtype="bfloat16"), marks=needs_extension),
    ],
    ids=["float32", "bfloat16", "fused"],
)
def test_only_halted_rows_change(options):
    trainer = make_trainer(prefetch=True, batch_size=400, **options)
    trainer.train_step()
    rows, generator = trainer.rows, torch.Generator().manual_seed(4)
    rows.halted = torch.rand(400, generator=generator) < 0.5
    rows.z_H[:40] = float("nan")  # what a row holds must not reach another one
    rows.steps = torch.randint(1, 4, (400,), generator=generator)
    before = {name: value.clone() for name, value in vars(rows).items()}
    copy = torch.Generator()
    copy.set_state(trainer.generator.get_state())
    trainer._replace_halted()
    halted = before["halted"]
    assert 100 < halted.sum() < 300
    for name, value in vars(rows).items():
        assert value.dtype == before[name].dtype and value.shape == before[name].shape, name
        assert torch.equal(bits(value)[~halted], bits(before[name])[~halted]), name
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(0, 1)))
    for name, drawn in zip(("tokens", "labels"), trainer.stream.draw(400, 1, rng), strict=True):
        assert torch.equal(getattr(rows, name)[halted], torch.from_numpy(drawn)[halted].long())
    assert (rows.steps[halted] == 0).all() and (rows.steps[~halted] > 0).all()
    for z in (rows.z_H, rows.z_L):
        uniform = torch.rand(400, 6, 16, generator=copy).clamp(2.0**-24, 1 - 2.0**-24)
        assert torch.equal(z[halted], noise.truncated_normal(uniform)[halted].to(z.dtype))
        assert abs(z[halted].double().mean()) < 0.05 and abs(z[halted].double().std() - 1) < 0.05
    if trainer.fused_step is not None:
        ids = rows.ids[halted]
        assert len(ids.unique()) == len(ids) and not torch.isin(ids, before["ids"]).any()


def test_a_fixed_start_is_given_to_halted_rows():
    model = EquilibriumReasoner(tiny_config(fixed_init=True))
    trainer = Trainer(model, make_stream(curriculum=()), TrainSettings(batch_size=4, compile=False, prefetch=True))
    trainer.train_step()
    kept = trainer.rows.z_H.clone()
    trainer.rows.halted = torch.tensor([True, False, False, True])
    trainer._replace_halted()
    assert torch.equal(trainer.rows.z_H[[0, 3]], model.H_init.expand(2, 6, 16))
    assert torch.equal(trainer.rows.z_L[[0, 3]], model.L_init.expand(2, 6, 16))
    assert torch.equal(trainer.rows.z_H[[1, 2]], kept[[1, 2]])


def test_the_cpu_draws_for_halted_rows_only_unless_told():
    assert make_trainer().prefetcher is None and make_trainer(prefetch=False).prefetcher is None
    trainer = make_trainer(prefetch=True)
    state = trainer.stream.state
    trainer.train_step()
    assert trainer.prefetcher is not None and trainer.stream.state == state


# waiting -------------------------------------------------------------------------------------------------------------


class Waits(AssertionError):
    pass


class NeverWait(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU; keeps the copies between devices."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "nonzero_numpy",
        "masked_select",
        "unique_dim",
        "_unique2",
        "unique_consecutive",
        "bincount",
        "equal",
        "is_nonzero",
        "repeat_interleave",
    )

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, bool, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
        if name in self.WAITING or (name.startswith(("index", "_unsafe_index", "_index_put")) and masks):
            raise Waits(name)
        result = func(*args, **kwargs)
        taking = [*given, *(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))]
        if len({x.device for x in taking}) > 1:
            self.copies.append((name, bool(kwargs.get("non_blocking")), {x.dtype for x in taking}))
        return result


class HostGenerator:
    """A generator of the host's, whatever device is asked for: the meta device has none."""

    def __new__(cls, device: Any = None, host: Any = torch.Generator) -> Any:
        return host()


MODELS = [dict(), dict(mlp_t=False), dict(fixed_init=True, H_cycles=1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", MODELS, ids=["mixer", "attention", "fixed"])
def test_a_training_step_never_waits(changes, dtype):
    torch.manual_seed(0)
    model = EquilibriumReasoner(tiny_config(noise_scale=0.01, halt_max_steps=3, **changes))
    config = TrainSettings(batch_size=8, compile=False, fused=False, forward_dtype=dtype, prefetch=True)
    trainer = Trainer(model, make_stream(curriculum=()), config)
    replaced = []
    for _ in range(5):
        replaced.append(int(trainer.rows.halted.sum()))
        with NeverWait():
            trainer.train_step()
    assert replaced[0] == 8 and sum(replaced[1:]) > 0 and trainer.report().loss > 0
    with pytest.raises(Waits, match="nonzero"), NeverWait():
        Trainer(model, make_stream(), replace(config, prefetch=False)).train_step()


def test_the_guard_sees_what_waits():
    x, mask = torch.zeros(3), torch.tensor([True, False, True])
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x[0]),
        lambda: x[mask],
        lambda: mask.nonzero(),
        lambda: x.masked_select(mask),
        lambda: x.index_put_((mask,), torch.zeros(2)),
    ):
        with pytest.raises(Waits), NeverWait():
            wait()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", MODELS, ids=["mixer", "attention", "fixed"])
def test_a_training_step_needs_no_value_of_its_device(changes, dtype, monkeypatch):
    """On the meta device, which has shapes but no values: what looks at one, or mixes devices, fails."""
    model = EquilibriumReasoner(tiny_config(noise_scale=0.01, **changes)).to("meta")
    config = TrainSettings(batch_size=8, compile=False, forward_dtype=dtype, prefetch=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", HostGenerator)
        trainer = Trainer(model, make_stream(), config)
    guard = NeverWait()
    with guard:
        for _ in range(3):
            trainer.train_step()
    # The puzzles alone come from the host: as they are, and without waiting.
    assert guard.copies == [("_to_copy", True, {torch.uint8})] * 3
    assert all(value.device.type == "meta" for value in vars(trainer.rows).values())
    assert trainer.step == 3 and trainer._sums.values.device.type == "meta"
    trainer.close()
