"""What torch keeps for the whole process or thread: default dtype and device, fake and meta tensors, autocast,
inference mode, forks."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer
from tests.support.environment import needs_extension
from tests.support.models import make_contractive, tiny_config
from tests.support.results import FIELDS, same_bits
from tests.support.training import toy_stream

TOKENS = torch.randint(1, 7, (5, 6), generator=torch.Generator().manual_seed(0))
CONFIG = tiny_config(noise_scale=0.01, mlp_t=False, pos_encodings="rope")
OPTIONS = dict(depth=6, tol=0.05, breadth=2, checkpoints=(2,), trace=True)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# "meta" stands for "cuda": what is made on the default device is of no use on the CPU.
STATES = {
    **{
        f"{dtype}": lambda dtype=dtype: default_dtype(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)
    },
    "default device": functools.partial(default_device, "meta"),
    "with torch.device": functools.partial(torch.device, "meta"),
    "autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
}
STATE = pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())


@STATE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_solve_gives_the_same(state, dtype, backend):
    model = make_contractive(CONFIG).to(dtype)
    want = model.solve(TOKENS, **OPTIONS, backend=backend, return_state=True)
    model._rope_cache.clear()
    with state():
        got = model.solve(TOKENS, **OPTIONS, backend=backend, return_state=True)
        few = model.solve(TOKENS[:0], **OPTIONS, backend=backend)
    for name in (*FIELDS, "residuals", "z_H", "z_L"):
        assert same_bits(getattr(got, name), getattr(want, name)), name
        assert name in ("z_H", "z_L") or getattr(few, name).dtype == getattr(want, name).dtype, name


@STATE
def test_a_model_is_loaded_solves_and_can_be_trained(state, tmp_path):
    model = make_contractive(CONFIG)
    model.save_pretrained(tmp_path)
    with state():
        loaded = EquilibriumReasoner.from_pretrained(tmp_path)
        inside = loaded.solve(TOKENS, **OPTIONS)
    assert {(p.dtype, p.device.type) for p in loaded.parameters()} == {(torch.float32, "cpu")}
    assert torch.equal(inside.logits, model.solve(TOKENS, **OPTIONS).logits)
    loaded(TOKENS, loaded.initial_state(TOKENS))[1].sum().backward()
    assert loaded.lm_head.weight.grad is not None


@STATE
def test_a_trainer_takes_the_same_steps(state):
    def losses(around):
        torch.manual_seed(1)
        model = EquilibriumReasoner(tiny_config(noise_scale=0.01))
        settings = TrainSettings(batch_size=4, total_steps=3, lr=1e-2, lr_warmup_steps=0, compile=False)
        with around():
            trainer = Trainer(model, toy_stream(), settings)
            for _ in range(3):
                trainer.train_step()
            return trainer.report().loss, [p.detach().clone() for p in model.parameters()]

    if state in (STATES["autocast"], STATES["inference mode"]):
        pytest.skip("a user who trains in autocast or in inference mode asks for something else")
    (want, before), (got, after) = losses(contextlib.nullcontext), losses(state)
    assert got == want and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_is_made_in_the_default_dtype_of_the_same_draws(dtype):
    torch.manual_seed(0)
    plain = EquilibriumReasoner(CONFIG)
    torch.manual_seed(0)
    with default_dtype(dtype):
        model = EquilibriumReasoner(CONFIG)
        state, logits, q_halt = model(TOKENS, model.initial_state(TOKENS))
    assert model.dtype == state.z_H.dtype == logits.dtype == dtype
    assert q_halt.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("fixed_init", [False, True])
def test_a_model_made_on_meta_takes_weights_later(fixed_init):
    config = tiny_config(fixed_init=fixed_init)
    trained = make_contractive(config)
    with torch.device("meta"):
        model = EquilibriumReasoner(config)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    for call in (lambda: model.solve(TOKENS, tol=0.1), lambda: model.to_empty(device="meta").solve(TOKENS, tol=0.1)):
        with pytest.raises(RuntimeError, match="on the meta device and hold no values; load some with"):
            call()
    state, logits, _ = model(TOKENS.to("meta"), model.initial_state(5))
    assert logits.shape == (5, 6, 7) and state.z_H.is_meta
    model.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(model.solve(TOKENS, tol=0.1).logits, trained.solve(TOKENS, tol=0.1).logits)
    with torch.device("meta"):
        model = EquilibriumReasoner(config)
    torch.manual_seed(0)
    model.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(0)
    assert torch.equal(model.lm_head.weight, EquilibriumReasoner(config).lm_head.weight)


@pytest.mark.parametrize("inside", [False, True], ids=["made before", "made inside"])
def test_fake_tensors_give_shapes_and_leave_nothing_behind(inside):
    model = make_contractive(CONFIG)
    want = model.solve(TOKENS, **OPTIONS, backend="reference").logits
    model._rope_cache.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = EquilibriumReasoner(CONFIG) if inside else model
        tokens = mode.from_tensor(TOKENS)
        state, logits, q_halt = fake(tokens, fake.initial_state(tokens))
        assert logits.shape == (5, 6, 7) and q_halt.shape == (5,) and state.step.shape == (5,)
        with pytest.raises(RuntimeError, match="tensors of a FakeTensorMode.*call the model itself for shapes"):
            fake.solve(tokens, **OPTIONS)
    assert torch.equal(model.solve(TOKENS, **OPTIONS, backend="reference").logits, want)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_solve_inside_of_what_is_compiled_runs_as_it_is(backend, compiler):
    model = make_contractive(CONFIG)
    want = model.solve(TOKENS, **OPTIONS, backend=backend)

    @functools.partial(torch.compile, backend=compiler)
    def twice(tokens):
        result = model.solve(tokens + 0, **OPTIONS, backend=backend)
        return 2 * result.logits, result.steps

    for _ in range(2):
        logits, steps = twice(TOKENS)
        assert torch.equal(logits, 2 * want.logits) and torch.equal(steps, want.steps)


def test_the_model_under_vmap():
    model, others = make_contractive(CONFIG), [make_contractive(CONFIG, seed) for seed in range(3)]
    state = model.initial_state(TOKENS)
    tokens = torch.stack([TOKENS, TOKENS.flip(0)])
    logits = torch.func.vmap(lambda tokens: model(tokens, state)[1])(tokens)
    torch.testing.assert_close(logits, torch.stack([model(each, state)[1] for each in tokens]))
    weights, buffers = torch.func.stack_module_state(others)
    logits = torch.func.vmap(lambda *ensemble: torch.func.functional_call(model, ensemble, (TOKENS, state))[1])(
        weights, buffers
    )
    torch.testing.assert_close(logits, torch.stack([other(TOKENS, state)[1] for other in others]))
    with pytest.raises(RuntimeError, match="under torch.func.vmap .*have no values; call the model itself"):
        torch.func.vmap(lambda tokens: model.solve(tokens, **OPTIONS).logits)(tokens)


def test_a_model_made_or_moved_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = EquilibriumReasoner(CONFIG).to(torch.float64).float()
        model.solve(TOKENS, tol=0.1, depth=2)
    model(TOKENS, model.initial_state(TOKENS))[1].sum().backward()
    assert all(not p.is_inference() for p in model.parameters())


@needs_extension
def test_half_names_the_remedy():
    model = make_contractive(tiny_config()).half()
    assert model.solve(TOKENS, tol=0.1, depth=2).backend == "reference"
    with pytest.raises(RuntimeError, match=r"float16, and the kernel takes float32 and bfloat16; use model.float\(\)"):
        model.solve(TOKENS, tol=0.1, backend="cpu")
    with pytest.raises(TypeError, match=r"float32 parameters, got torch.float16; call model.float\(\)"):
        Trainer(model, toy_stream(), TrainSettings(batch_size=4, total_steps=1))


FORK = """
import os, signal, sys, threading, torch
import eqr_kernels as ek
from eqr_kernels.tasks import sudoku_generator

torch.set_num_threads(2)
model = ek.EquilibriumReasoner.from_pretrained("sudoku-small")
tokens = torch.from_numpy(sudoku_generator.generate(4, "medium", seed=1).inputs.astype("int64"))
options = dict(depth=4, halt="none", backend=sys.argv[1])
want = model.solve(tokens, **options)
# A lock that another thread holds at the fork is nobody's in the child.
holding, done = threading.Event(), threading.Event()
from eqr_kernels import backends

lock = next(backend for backend in backends._BACKENDS if backend.name == "cpu")._lock
def hold():
    with lock:
        holding.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
holding.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(100)
    got = model.solve(tokens, **options)
    model.train()(tokens, model.initial_state(tokens))[1].sum().backward()
    same = torch.equal(got.logits, want.logits) and torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        model.solve(tokens, **options)
    except RuntimeError as error:
        refused = "forked from one that computed on 2 threads" in str(error) and "'spawn'" in str(error)
    os._exit(0 if same and refused else 3)
done.set()
thread.join()
assert os.waitpid(pid, 0)[1] == 0
assert torch.get_num_threads() == 2
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "fork"), reason="forks as Linux does")
def test_a_child_forked_after_a_solve_solves_on_one_thread(backend):
    run = subprocess.run([sys.executable, "-c", FORK, backend], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout == "same\n", run.stderr
