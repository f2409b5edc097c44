"""Imports go downwards in the order of [tool.importlinter], and none hides in a function to get around that."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import REPOSITORY

PACKAGE = "eqr_kernels"
_TRITON = "its module imports Triton, an optional dependency that may be missing"
ALLOWED = {
    ("ops/library.py", "eqr_kernels"): "the compiled extension may be missing, and its absence has a message",
    ("backends/triton/adapter.py", "eqr_kernels.backends.triton"): _TRITON,
    ("backends/triton/adapter.py", "eqr_kernels.backends.triton.parked"): _TRITON,
    ("update.py", "eqr_kernels.ops.triton"): _TRITON,
    ("__init__.py", "eqr_kernels.{_HOMES[name]}'"): "the package's names are imported when they are first asked for",
    ("cli/__init__.py", "eqr_kernels.cli.{module}'"): "a command's module is imported when the command is run",
}
"""Imports of modules of the project within functions: (file, what it imports) and why."""


def hidden_imports(source: str) -> set[str]:
    """What a file imports of the package or of benchmarks within functions, by statement or by `import_module`."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    names: set[str] = set()
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.add(ast.unparse(node.args[0]).lstrip("f'"))
    return {name for name in names if name.startswith((".", PACKAGE, "benchmarks"))}


def violations(package: Path) -> set[tuple[str, str]]:
    files = sorted(package.rglob("*.py"))
    return {(str(f.relative_to(package)), name) for f in files for name in hidden_imports(f.read_text())}


def test_no_function_imports_a_module_of_the_project():
    assert violations(REPOSITORY / PACKAGE) == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "from eqr_kernels.reasoner import EquilibriumReasoner",
        "from eqr_kernels import backends",
        "import eqr_kernels.cli.console as console",
        "from ..reasoner import EquilibriumReasoner",
        "from benchmarks.studies import quantisation",
        "reasoner = importlib.import_module('eqr_kernels.reasoner')",
    ],
)
def test_an_import_that_is_planted_in_a_function_is_seen(line):
    assert hidden_imports(f"class A:\n    def method(self):\n        if self:\n            {line}\n")
    assert not hidden_imports("def function():\n    import triton\n    from torch import nn\n")


def layers_hold(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("file", "line", "chain"),
    [
        (None, None, None),
        ("ops/checks.py", "from eqr_kernels.solver import solve", "eqr_kernels.ops.checks -> eqr_kernels.solver"),
        ("backends/base.py", "from eqr_kernels import solve", "eqr_kernels.backends.base -> eqr_kernels"),
        (
            "training/run.py",
            "from eqr_kernels.cli import console",
            "eqr_kernels.training.run -> eqr_kernels.cli.console",
        ),
        ("elsewhere.py", "import torch", "elsewhere"),
    ],
)
def test_the_layers_hold_and_an_upward_import_breaks_them(tmp_path, file, line, chain):
    pytest.importorskip("importlinter", reason="needs import-linter: pip install -e '.[dev]'")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "pretrained")
    shutil.copytree(REPOSITORY / PACKAGE, tmp_path / PACKAGE, ignore=ignored)
    if file is not None:
        path = tmp_path / PACKAGE / file
        path.write_text((path.read_text() if path.exists() else "") + f"{line}\n")
    done = layers_hold(tmp_path)
    assert (done.returncode == 0) == (file is None), done.stdout + done.stderr
    assert file is None or chain in done.stdout + done.stderr


def test_what_tests_share_is_in_support():
    """No test file imports another, or a conftest.py, whose fixtures come without an import."""
    names = {}
    for file in sorted((REPOSITORY / "tests").rglob("*.py")):
        nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        modules = {f"{getattr(n, 'module', None) or ''}.{alias.name}" for n in nodes for alias in n.names}
        names[str(file)] = {m for m in modules if any(p == "conftest" or p.startswith("test_") for p in m.split("."))}
    assert len(names) > 80 and not {file: imported for file, imported in names.items() if imported}
