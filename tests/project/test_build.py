"""What setup.py, CMakeLists.txt and make decide: with tools that only pretend, or by configuring without a build."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.environment import REPOSITORY, needs_compiler
from tests.support.native import tool
from tests.support.setup_py import run_python

NAME = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
BUILD = f"build/cmake-{sys.implementation.cache_tag}"

CMAKE = """#!/bin/sh
if [ "$1" = --build ]; then printf '%s' "$LIBRARY" > "$2"/$NAME; else echo "CXXFLAGS=$CXXFLAGS" "$@" >> "$CALLS"; fi
"""
# Hides tools and modules, makes a folder read-only, which nothing is for root, and fills the disk.
SITE = """
import os, shutil, sys
which, access, hidden = shutil.which, os.access, os.environ.get("HIDDEN", "").split()
shutil.which = lambda name, *args, **options: (
    None if os.path.basename(name) in hidden else which(name, *args, **options)
)
os.access = lambda path, mode, **options: (
    not (mode & os.W_OK and os.fspath(path).startswith(os.environ.get("READ_ONLY", "none")))
    and access(path, mode, **options)
)
sys.modules.update(dict.fromkeys(hidden))
def full(file):
    raise OSError(28, "No space left on device")
if "FULL" in os.environ:
    os.fsync = full
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py needs of a checkout, in a folder whose name has more than ASCII letters."""
    folder = tmp_path / "a näme with spaces"
    (folder / "eqr_kernels").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("__init__.py", "atomic.py", "commit.py"):
        shutil.copy(REPOSITORY / "eqr_kernels" / name, folder / "eqr_kernels")
    return folder


class Setup:
    """Runs setup.py with a cmake that writes its arguments and the library that it is told to."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.site = folder / "calls.txt", folder / "site"
        for name in ("cmake", "ninja"):
            program = self.site / name / "data" / "bin" / name
            program.parent.mkdir(parents=True)
            (self.site / name / "__init__.py").touch()
            program.write_text(CMAKE)
            program.chmod(0o755)
        (self.site / "sitecustomize.py").write_text(SITE)

    def __call__(self, checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        pretended = dict(PYTHONPATH=str(self.site), CALLS=str(self.calls), NAME=NAME, LIBRARY="built", CXX="true")
        return run_python("setup.py", "-q", *command, cwd=checkout, **pretended | environment)

    def build(self, checkout: Path, **environment: str) -> str:
        done = self(checkout, "build_ext", "--inplace", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


# ---- the extension is put in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["build_ext --inplace", "build_ext --build-lib .", "editable_wheel -d dist"])
def test_who_uses_the_old_extension_keeps_it(setup: Setup, checkout: Path, command: str) -> None:
    library = checkout / "eqr_kernels" / NAME
    library.write_text("what a process has mapped")
    with library.open() as before:
        done = setup(checkout, *command.split(), LIBRARY="new")
        assert done.returncode == 0, done.stderr
        assert before.read() == "what a process has mapped"
    assert library.read_text() == "new"
    assert not [path for path in library.parent.iterdir() if path.suffix == ".part"]


def test_a_build_that_ends_halfway_leaves_no_part_of_an_extension(setup: Setup, checkout: Path) -> None:
    library = checkout / "eqr_kernels" / NAME
    for before in (None, "the last build"):
        if before is not None:
            library.write_text(before)
        done = setup(checkout, "build_ext", "--inplace", FULL="yes")
        assert done.returncode != 0 and "No space left" in done.stderr
        assert (library.read_text() if library.exists() else None) == before
        assert not [path for path in library.parent.iterdir() if path.suffix == ".part"]


# ---- a configuration for something else ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_configuration_for_something_else_is_not_taken(setup: Setup, checkout: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "a compiler"
    compiler.symlink_to(shutil.which("true") or "/bin/true")

    def afresh(folder: Path, **environment: str) -> str | None:
        """Why a build threw away what the last one left."""
        kept = folder / BUILD / "CMakeCache.txt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
        match = re.search(r"building afresh in .*: (.*)", setup.build(folder, **environment))
        assert kept.exists() == (match is None)
        return match[1] if match else None

    assert afresh(checkout) == "it does not say for what it was configured"
    assert afresh(checkout) is None
    settings = {}
    for name, value in {
        "CXX": str(compiler),
        "CXXFLAGS": "-O2",
        "LDFLAGS": "-Wl,-O1",
        "NVCC_APPEND_FLAGS": "-O3",
        "EQR_CMAKE_ARGS": "-DEQR_EMULATE_AVX512=ON",
    }.items():
        settings[name] = value
        assert name in (afresh(checkout, **settings) or "")
    assert afresh(checkout, **settings) is None
    assert afresh(checkout) == "the compiler, CXX, CXXFLAGS, LDFLAGS, EQR_CMAKE_ARGS, NVCC_APPEND_FLAGS changed since"
    moved = checkout.rename(tmp_path / "moved")
    assert afresh(moved) == "the folder, the source folder changed since"
    copied = shutil.copytree(moved, tmp_path / "copied")
    assert afresh(copied) == "the folder, the source folder changed since"
    assert afresh(moved) is None


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("name", ["moved", "moved to a földer"])
def test_make_mends_an_environment_that_was_moved(tmp_path: Path, name: str) -> None:
    before, now = tmp_path / "before", tmp_path / name
    before.mkdir()
    shutil.copy(REPOSITORY / "Makefile", before)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", before / ".venv"], check=True)
    script = before / ".venv" / "bin" / "where"
    script.write_text(f"#!{before}/.venv/bin/python\nimport sys\nprint(sys.prefix, *sys.argv[1:])\n")
    script.chmod(0o755)
    (before / ".venv" / ".stamps").mkdir()
    (before / ".venv" / ".stamps" / "torch").write_text("\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCH", "NAMED_TORCH", "MAKEFLAGS", "MAKELEVEL")}

    def make(folder: Path, *arguments: str) -> str:
        done = subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "make: .venv was made" not in make(before, "-n", ".venv/.stamps/torch")
    before.rename(now)
    assert f"make: .venv was made as {before}/.venv; mending the paths in its scripts" in make(now, "moved")
    assert subprocess.check_output([now / ".venv" / "bin" / "where", "a b"], text=True) == f"{now}/.venv a b\n"
    assert "make: .venv was made" not in make(now, "-n", ".venv/.stamps/torch")


# ---- flags ---------------------------------------------------------------------------------------------------------

# As conda's compilers set them, and worse.
FLAGS = (
    "-march=nocona -mtune=haswell -ftree-vectorize -fPIC -fstack-protector-strong -fno-plt -O2 -ffunction-sections "
    "-pipe -march=native -Ofast -ffast-math -funsafe-math-optimizations -ffinite-math-only -ffp-contract=fast"
)


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configures the repository, without CUDA, which takes long."""
    command = [tool("cmake"), "-S", str(REPOSITORY), "-B", str(folder), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-DEQR_TORCH_DIR={Path(torch.__file__).parent}", "-DEQR_BUILD_CUDA=OFF", *options]
    settings = {k: v for k, v in os.environ.items() if not k.endswith("FLAGS")} | environment
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)


def compiled_as(folder: Path) -> dict[str, tuple[set[str], str, str]]:
    """For each target: the macros that tell of arithmetic and instructions, contraction, and link-time optimisation."""
    flags = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        target = words[words.index("-o") + 1].split("/")[1]
        if target not in flags:
            macros = subprocess.check_output(
                [*words[: words.index("-o")], "-dM", "-E", "-x", "c++", os.devnull], text=True
            )
            lines = {
                line
                for line in macros.splitlines()
                if not line.startswith(tuple(f"#define __{name}" for name in _OTHER))
            }
            contraction = [word for word in words if word.startswith("-ffp-contract=")][-1]
            flags[target] = lines, contraction, [word for word in words if "-flto" in word or word == "-fno-lto"][-1]
    return flags


# Tuning, and complex arithmetic, of which there is none.
_OTHER = (
    "tune_",
    "haswell",
    "nocona",
    "SSP_",
    "NO_INLINE",
    "OPTIMIZE",
    "GCC_IEC_559_C",
    "STDC_IEC_559_C",
    "STDC_IEC_60559_C",
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("build_type", ["Release", "Debug"])
def test_flags_of_the_environment_do_not_reach_arithmetic(tmp_path: Path, build_type: str) -> None:
    linked = "-Wl,-O2 -Wl,--as-needed -Wl,-z,now -Wl,--gc-sections -Ofast -ffast-math -funsafe-math-optimizations"
    plain, own = tmp_path / "plain", tmp_path / "own"
    for folder, environment in ((plain, {}), (own, dict(CXXFLAGS=FLAGS, LDFLAGS=linked))):
        done = configure(folder, f"-DCMAKE_BUILD_TYPE={build_type}", **environment)
        assert done.returncode == 0, done.stderr
    assert "-march=native -Ofast -ffast-math" in done.stdout and "is overruled" in done.stdout
    expected = compiled_as(plain)
    assert {"eqr_cpu.dir", "eqr_cpu_portable.dir", "eqr_ops.dir", "_C.dir"} <= set(expected)
    assert compiled_as(own) == expected
    assert {(contraction, lto) for _, contraction, lto in expected.values()} == {("-ffp-contract=off", "-fno-lto")}
    # What the linker is told last counts; one that hears of fast arithmetic switches denormals off, process-wide.
    rule = (own / "build.ninja").read_text().partition(f"build {NAME}:")[2]
    words = re.search("  LANGUAGE_COMPILE_FLAGS = (.*)\n  LINK_FLAGS = (.*)", rule)
    assert words is not None
    flags = " ".join(words.groups()).split()
    for fast, precise in (
        ("-ffast-math", "-fno-fast-math"),
        ("-funsafe-math-optimizations", "-fno-unsafe-math-optimizations"),
    ):
        assert flags.index(precise) > max(i for i, flag in enumerate(flags) if flag == fast)
    assert [flag for flag in flags if flag.startswith("-O")][-1] != "-Ofast"


@needs_compiler
@pytest.mark.parametrize(
    ("variable", "flags", "message"),
    [
        ("CXXFLAGS", "-O2 -mavx2 -mfma", "has -mavx2 -mfma; kernels for every instruction set are built anyway"),
        ("CXXFLAGS", "-mfpmath=387", "has -mfpmath=387; it changes arithmetic"),
        ("CXXFLAGS", "-fsingle-precision-constant", "has -fsingle-precision-constant; it changes arithmetic"),
        ("LDFLAGS", "-Wl,-O2 -mdaz-ftz", "has -mdaz-ftz; it switches denormals off in every process"),
    ],
)
def test_flags_that_nothing_undoes_are_refused(tmp_path: Path, variable: str, flags: str, message: str) -> None:
    # CMake makes this one of LDFLAGS; GCC knows -mdaz-ftz since version 13, and CMake tries LDFLAGS first.
    linked = f"-DCMAKE_MODULE_LINKER_FLAGS={flags if variable == 'LDFLAGS' else ''}"
    done = configure(tmp_path, linked, **{variable: flags} if variable == "CXXFLAGS" else {})
    text = " ".join(done.stderr.split())
    assert done.returncode != 0 and message in text and f"Take it out of {variable}" in text, text


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc: install the CUDA toolkit")
def test_fast_arithmetic_of_nvcc_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DEQR_BUILD_CUDA=ON", NVCC_APPEND_FLAGS="-O3 --use_fast_math")
    text = " ".join(done.stderr.split())
    assert done.returncode != 0 and "NVCC_APPEND_FLAGS has --use_fast_math; it changes arithmetic" in text, text


def test_cmake_gets_the_flags_of_the_preprocessor_too(setup: Setup, checkout: Path) -> None:
    setup.build(checkout, CPPFLAGS="-DNDEBUG -I'a b'", CXXFLAGS="-O2")
    assert setup.calls.read_text().startswith("CXXFLAGS=-DNDEBUG -I'a b' -O2 -S ")


# ---- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["cmake", "ninja", "pybind11"])
def test_a_tool_that_is_missing_is_named_with_the_remedy(setup: Setup, checkout: Path, tool: str) -> None:
    done = setup(checkout, "build_ext", "--inplace", HIDDEN=tool)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"eqr_kernels: {tool} was not found; run  pip install {tool}  and then  pip install --no-" in done.stderr


@pytest.mark.slow
def test_sources_that_cannot_be_written(setup: Setup, checkout: Path) -> None:
    def files() -> set[Path]:
        return {path for path in checkout.rglob("*") if "__pycache__" not in path.parts}

    before, read_only = files(), dict(READ_ONLY=str(checkout))
    wheels = checkout.parent / "wheels"
    done = setup(checkout, "bdist_wheel", "--dist-dir", str(wheels), **read_only)
    assert done.returncode == 0, done.stderr
    assert f"eqr_kernels: {checkout} cannot be written, so the build is in " in done.stdout
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        assert wheel.read(f"eqr_kernels/{NAME}") == b"built"
    assert files() == before
    done = setup(checkout, "build_ext", "--inplace", **read_only)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"{checkout / 'eqr_kernels'} cannot be written, where an editable or in-place build puts" in done.stderr
    assert f"pip install --no-build-isolation '{checkout}'" in done.stderr


# ---- the commit ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_goes_with_wheel_and_sdist(checkout: Path, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.check_output(command, cwd=checkout, text=True).strip()

    def built(source: Path, *command: str) -> Path:
        dist = tmp_path / "dist" / source.name
        done = run_python("setup.py", "-q", *command, "-d", str(dist), cwd=source, EQR_BUILD_EXTENSION="0")
        assert done.returncode == 0, done.stderr
        return next(dist.glob("*.whl" if command[0] == "bdist_wheel" else "*.tar.gz"))

    def commit_of(place: Path, **environment: str) -> str:
        code = "from eqr_kernels.commit import code_commit; print(code_commit())"
        return run_python("-c", code, cwd=place, **environment).stdout.strip()

    assert commit_of(checkout) == ""
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    note = checkout / "eqr_kernels" / "_commit.txt"
    wheel, sdist = built(checkout, "bdist_wheel"), built(checkout, "sdist")
    assert not note.exists()
    note.write_text("of another day\n")
    assert commit_of(checkout) == commit
    assert commit_of(checkout, GIT_DIR=str(REPOSITORY / ".git"), GIT_WORK_TREE=str(REPOSITORY)) == commit
    (checkout / "README.md").write_text("changed")
    assert commit_of(checkout) == f"{commit}+"
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    tarfile.open(sdist).extractall(tmp_path / "sdist", filter="data")
    unpacked = next((tmp_path / "sdist").iterdir())
    zipfile.ZipFile(built(unpacked, "bdist_wheel")).extractall(tmp_path / "wheel of sdist")
    for place in (tmp_path / "wheel", unpacked, tmp_path / "wheel of sdist"):
        assert commit_of(place) == commit
    # A virtual environment may lie inside another project's checkout.
    inside = shutil.copytree(tmp_path / "wheel", checkout / "venv")
    assert commit_of(inside) == commit
