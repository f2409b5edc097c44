"""Fixtures: small models, one of which contracts (random weights do not), and the real puzzles where they are."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

# Tensors here are tiny: threads cost more than they give, and spin when the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from eqr_kernels import EqRConfig, EquilibriumReasoner, ops  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="needs a C++ compiler: none of c++, g++ and clang++ is there",
)


def free_ports(n: int) -> list[str]:
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def outputs_of(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What each wrote to stdout, when all have ended; none outlives this."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tiny_config(**changes: object) -> EqRConfig:
    """Six tokens of sixteen features: an outer step takes a millisecond."""
    sizes = dict(seq_len=6, vocab_size=7, hidden_size=16, num_heads=2, H_cycles=2, L_cycles=2, L_layers=1)
    return EqRConfig.from_dict({**sizes, "noise_scale": 0.0, **changes})


def make_contractive(config: EqRConfig, seed: int = 0) -> EquilibriumReasoner:
    """A model whose blocks are weak, so that damping and normalisation pull every row to a fixed point."""
    torch.manual_seed(seed)
    model = EquilibriumReasoner(config).eval()
    with torch.no_grad():
        for weights in model.weights().blocks:
            for weight in weights:
                weight.mul_(0.1)
        model.q_head.weight.normal_()
        model.q_head.bias.zero_()
    return model


def copier(config: EqRConfig) -> EquilibriumReasoner:
    """A model that copies its input once its random start has faded, and answers anything where that is blank."""
    model = make_contractive(config)
    with torch.no_grad():
        for weight in (weight for block in model.weights().blocks for weight in block):
            weight.zero_()
        model.embed_tokens.embedding_weight.copy_(torch.eye(config.vocab_size, config.hidden_size))
        model.lm_head.weight.copy_(torch.eye(config.vocab_size, config.hidden_size))
        model.lm_head.weight[:2] = 0  # neither pads nor blanks
    return model


@pytest.fixture
def contractive() -> EquilibriumReasoner:
    return make_contractive(tiny_config())


BUILT, WHY_NOT_BUILT = ops.extension_status()
needs_extension = pytest.mark.skipif(not BUILT, reason=WHY_NOT_BUILT)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_extension)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs here, by name."""
    return request.param


def assert_same(got: torch.Tensor, want: torch.Tensor, backend: str, **tolerance: object) -> None:
    """Equal, NaN included: bit for bit from a compiled backend, to rounding from the reference."""
    if backend == "reference":
        torch.testing.assert_close(got, want, equal_nan=True, **tolerance)
    else:
        torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0, msg=tolerance.get("msg"))


@pytest.fixture
def restore():
    """Puts the instruction set and the number of threads back."""
    isa, threads = ops.cpu_isa() if BUILT else None, torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        ops.set_cpu_isa(isa)


@pytest.fixture
def puzzles() -> torch.Tensor:
    """Tokens [12, 6] of the tiny config, all rows different."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 7, (12, 6), generator=generator)


@pytest.fixture(scope="session")
def sudoku_data() -> Path:
    """Folder of train.csv.gz and dev.csv.gz; the test skips where it is missing."""
    folder = Path(os.environ.get("EQR_SUDOKU_DATA", REPOSITORY.parent / "shared" / "data" / "sudoku"))
    if not (folder / "dev.csv.gz").is_file():
        pytest.skip(f"needs real puzzles: {folder}/dev.csv.gz is not there; set EQR_SUDOKU_DATA to their folder")
    return folder
