"""The package as it is built and installed: metadata, contents of sdist and wheel, and what happens without a build."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import eqr_kernels
from eqr_kernels import ops
from tests.support.environment import REPOSITORY, needs_compiler
from tests.support.setup_py import run_python as run

available, why = ops.extension_status()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, without what a build leaves in it."""
    copy = tmp_path_factory.mktemp("source") / "eqr_kernels"
    files = "CMakeLists.txt LICENSE MANIFEST.in Makefile README.md pyproject.toml setup.py"
    folders = ".ci benchmarks csrc eqr_kernels tests"
    copy.mkdir()
    for path in (REPOSITORY / name for name in f"{files} {folders}".split()):
        if path.is_dir():
            shutil.copytree(
                path, copy / path.name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_no_extension.txt")
            )
        elif path.exists():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="session")
def pure_wheel(source: Path) -> Path:
    built = run("setup.py", "-q", "bdist_wheel", "--dist-dir", "dist", cwd=source, EQR_BUILD_EXTENSION="0")
    assert built.returncode == 0, built.stderr
    assert "NOT building the compiled extension" in built.stdout
    return next((source / "dist").glob("*.whl"))


def installed() -> Message:
    return importlib.metadata.metadata("eqr_kernels")  # type: ignore[return-value]


def test_metadata() -> None:
    metadata = installed()
    assert metadata["Version"] == eqr_kernels.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = importlib.metadata.requires("eqr_kernels") or []
    assert {"torch<2.14,>=2.11", "numpy", "scipy>=1.11", "safetensors", "typer", "rich"} == {
        r for r in requirements if "extra" not in r
    }
    assert {"train", "plot", "dev", "hub"} <= set(metadata.get_all("Provides-Extra") or [])
    scripts = importlib.metadata.entry_points(group="console_scripts", name="eqr")
    assert [s.value for s in scripts] == ["eqr_kernels.cli:main"]


def test_extension_is_there_unless_it_cannot_be() -> None:
    # A build that was possible and is missing would otherwise only show as skipped tests.
    if os.environ.get(ops.library.DISABLE) or "EQR_BUILD_EXTENSION=0" in why or "no C++ compiler" in why:
        pytest.skip(why)
    assert available, why
    assert ops.build_info()["version"] == eqr_kernels.__version__
    assert ops.build_info()["torch_target"] == "2.11"
    assert ops.cpu_isas()[0] == "portable"


@pytest.mark.skipif(
    not available or not sys.platform.startswith("linux"), reason=why if not available else "reads /proc"
)
def test_one_openmp_runtime() -> None:
    code = """
import re
from pathlib import Path
import torch
from eqr_kernels import ops
ops.philox_words(torch.zeros(64, 4, dtype=torch.int64), 0, 5000)
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
print(len([path for path in mapped if re.match(r"lib[gi]?omp", Path(path).name)]))
"""
    # In a process of its own: other packages that tests import bring an OpenMP of theirs.
    assert run("-c", code).stdout.strip() in ("0", "1")


def test_the_package_runs_as_the_command() -> None:
    assert run("-m", "eqr_kernels", "--version").stdout == f"eqr_kernels {eqr_kernels.__version__}\n"
    refused = run("-m", "eqr_kernels", "--nonsense")
    assert refused.returncode == 2 and refused.stderr.startswith("Usage: eqr [OPTIONS]")


@pytest.mark.slow
def test_without_extension_by_choice() -> None:
    code = """
import torch
from eqr_kernels import ops
print(ops.extension_status())
ops.philox_words(torch.zeros(1, 4, dtype=torch.int64), 0, 1)
"""
    done = run("-W", "error", "-c", code, EQR_DISABLE_EXTENSION="1")
    reason = "the compiled extension is switched off by EQR_DISABLE_EXTENSION=1; unset it to use it"
    assert done.stdout.strip() == f"(False, '{reason}')"
    assert f"RuntimeError: this needs the compiled extension: {reason}; or use backend='reference'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not available, reason=why)
def test_isa_from_the_environment() -> None:
    code = """
import os
from eqr_kernels import ops
try:
    ops.cpu_isa()
except ValueError as error:
    print(error)
os.environ["EQR_CPU_ISA"] = "portable"
print(ops.cpu_isa())
"""
    refusal, chosen = run("-c", code, EQR_CPU_ISA="mmx").stdout.splitlines()
    assert refusal.startswith(
        "the environment variable EQR_CPU_ISA is 'mmx', which this build or this machine does not"
    )
    assert chosen == "portable"


@pytest.mark.slow
def test_wheel_without_extension(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name == f"eqr_kernels-{eqr_kernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {"eqr_kernels/py.typed", "eqr_kernels/ops/library.py", "eqr_kernels/_no_extension.txt"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests", "csrc", "benchmarks"))]
    shipped = REPOSITORY / "eqr_kernels" / "pretrained"
    assert {f"eqr_kernels/pretrained/{path.name}" for path in shipped.glob("*") if path.is_file()} <= set(names)
    code = "import eqr_kernels; from eqr_kernels import ops; print(eqr_kernels.__file__, ops.extension_status())"
    done = run("-W", "error", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}", cwd=tmp_path)
    assert str(tmp_path) in done.stdout, done.stderr
    remedy = "`pip install --no-build-isolation FOLDER`, FOLDER being a checkout of eqr_kernels or its unpacked sdist"
    assert f"EQR_BUILD_EXTENSION=0; build it beside the torch you use: {remedy}" in done.stdout


def test_sdist(source: Path) -> None:
    built = run("setup.py", "-q", "sdist", "--dist-dir", "dist", cwd=source, EQR_TORCH_DIR="/nonexistent")
    assert built.returncode == 0, built.stderr
    archive = source / "dist" / f"eqr_kernels-{eqr_kernels.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = {
        "CMakeLists.txt",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "eqr_kernels/py.typed",
        ".ci/run",
    }
    expected |= {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "csrc").rglob("*") if path.is_file()}
    expected |= {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "eqr_kernels").rglob("*.py")}
    expected |= {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests").rglob("*.py")}
    assert expected <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"EQR_BUILD_EXTENSION": "maybe"},
            "EQR_BUILD_EXTENSION='MAYBE' is not known; set it to 1, 0, or leave it unset",
        ),
        ({"EQR_BUILD_EXTENSION": "1", "CXX": "/nonexistent"}, "no C++ compiler was found"),
        pytest.param(
            {"EQR_BUILD_EXTENSION": "1", "EQR_TORCH_DIR": "/nonexistent"},
            "is no folder of a torch package",
            marks=needs_compiler,
        ),
        ({"CXX": shutil.which("false") or "false"}, "or set EQR_BUILD_EXTENSION=0 to install without the extension"),
    ],
)
def test_a_build_that_fails_says_so(source: Path, environment: dict[str, str], message: str) -> None:
    done = run("setup.py", "-q", "build_ext", "--build-lib", "elsewhere", cwd=source, **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_installs_a_torch_that_is_named_anew(source: Path, tmp_path: Path) -> None:
    """What make would do, after a first make."""
    shutil.copy(source / "Makefile", tmp_path)
    stamps = tmp_path / ".venv" / ".stamps"
    stamps.mkdir(parents=True)
    hidden = ("TORCH", "NAMED_TORCH", "MAKEFLAGS", "MAKELEVEL")  # of a make that runs these tests
    environment = {k: v for k, v in os.environ.items() if k not in hidden}

    def installs(named_before: str, *arguments: str) -> bool:
        (stamps / "torch").write_text(f"{named_before}\n")
        command = ["make", "-n", ".venv/.stamps/torch", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return "make: installing" in done.stdout

    assert not installs("") and not installs("torch==2.12.0")
    assert installs("", "TORCH=torch==2.12.0") and installs("torch==2.11.0", "TORCH=torch==2.12.0")
    url = "torch==2.12.0 --index-url https://download.pytorch.org/whl/cpu"
    assert not installs("torch==2.12.0", "TORCH=torch==2.12.0") and not installs(url, f"TORCH={url}")
    assert installs("torch==2.12.0", f"TORCH={url}")


def test_no_compiler_installs_without_extension(source: Path, tmp_path: Path) -> None:
    done = run("setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), cwd=source, CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "NOT building the compiled extension: no C++ compiler was found" in done.stdout
    note = next(tmp_path.rglob("_no_extension.txt"))
    assert note.read_text() == "no C++ compiler was found when eqr_kernels was installed (CXX='/nonexistent')\n"
