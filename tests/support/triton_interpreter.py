"""A pytest plugin: modules with `IN_INTERPRETER = True` run in a child process in which Triton interprets its kernels.

Triton decides when it is imported whether it interprets, so that such tests cannot share a process with those that
compile. The child runs the tests that were chosen here from a module, and each one's reports come back under its own
name. In the child the interpreter is mended first; see `mend`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from typing import Any, TextIO

import pytest

_REPORTS = "EQR_TEST_REPORTS"  # in the child: number of the file that it writes reports to


# ---- both processes --------------------------------------------------------------------------------------------------


def _interpreted(item: pytest.Item) -> bool:
    return bool(getattr(getattr(item, "module", None), "IN_INTERPRETER", False))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not _interpreted(item) or _REPORTS in os.environ:
        return None
    children = item.config.stash.setdefault(_CHILDREN, {})
    module = item.location[0]
    if module not in children:
        ours = [other.nodeid for other in item.session.items if _interpreted(other) and other.location[0] == module]
        children[module] = _Child(item.config, ours)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in children[module].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    # Packages that the test before left set up, as this one is in them, need not be those of the next.
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    number = os.environ.get(_REPORTS)
    if number is not None and _config is not None:
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        os.write(int(number), (json.dumps(data, default=str) + "\n").encode())


# ---- the parent ------------------------------------------------------------------------------------------------------


class _Child:
    """Runs tests and hands over their reports as they come."""

    def __init__(self, config: pytest.Config, nodeids: list[str]) -> None:
        self._config = config
        self._output = tempfile.TemporaryFile("w+")
        read, write = os.pipe()
        environment = {**os.environ, "TRITON_INTERPRET": "1", _REPORTS: str(write)}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *nodeids]
        self._process = subprocess.Popen(
            command,
            cwd=config.rootpath,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
        )
        os.close(write)
        self._lines: TextIO = os.fdopen(read)

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Those of one test: setup, call and teardown."""
        reports: list[pytest.TestReport] = []
        for line in self._lines:
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            if report.nodeid == item.nodeid:
                reports.append(report)
                if report.when == "teardown":
                    return reports
        self._process.wait()
        self._output.seek(0)
        message = (
            f"the child process ended with {self._process.returncode} before this test did:\n{self._output.read()}"
        )
        return [*reports, pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")]


_CHILDREN = pytest.StashKey[dict[str, _Child]]()


def pytest_unconfigure(config: pytest.Config) -> None:
    for child in config.stash.get(_CHILDREN, {}).values():
        child._process.kill()
        child._process.wait()
        child._lines.close()
        child._output.close()


# ---- the child -------------------------------------------------------------------------------------------------------

_config: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config
    if _REPORTS in os.environ and find_spec("triton") is not None:
        mend()


def mend() -> None:
    """Makes the interpreter compute with bfloat16 as devices do, and not prepare the language anew at every call.

    As it comes, it adds and multiplies bit patterns. Here casts round to the nearest, ties to even; products take the
    numbers that the patterns stand for; all other arithmetic on bfloat16 raises.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    bf16 = tl.bfloat16

    def widen(patterns: Any) -> Any:
        return (np.ascontiguousarray(patterns).astype(np.uint32) << 16).view(np.float32)

    def narrow(numbers: Any) -> Any:
        bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
        nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(numbers), 0x7FC0, nearest).astype(np.uint16)

    def is_bf16(handle: Any) -> bool:
        return bool(handle.dtype.scalar == bf16)

    def cast(original: Any) -> Any:
        def convert(self: Any, source: Any, target: Any, *rest: Any) -> Any:
            to = target.scalar
            if is_bf16(source) == (to == bf16):
                return source if is_bf16(source) else original(self, source, target, *rest)
            if is_bf16(source):
                numbers = interpreter.TensorHandle(widen(source.data), tl.float32)
                return numbers if to == tl.float32 else original(self, numbers, target, *rest)
            return interpreter.TensorHandle(narrow(source.data.astype(np.float32)), bf16)

        return convert

    def wide(handle: Any) -> Any:
        return interpreter.TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle

    def dot(original: Any) -> Any:
        def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            return original(self, wide(a), wide(b), *rest)

        return product

    def refuse(original: Any) -> Any:
        def compute(self: Any, *operands: Any) -> Any:
            if any(is_bf16(x) for x in operands if isinstance(x, interpreter.TensorHandle)):
                raise NotImplementedError("arithmetic on bfloat16 in Triton's interpreter: cast to float32 first")
            return original(self, *operands)

        return compute

    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, cast(getattr(builder, name)))
    builder.create_dot = dot(builder.create_dot)
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, refuse(getattr(builder, name)))

    original, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None: ...

    def patch_once(function: Any) -> Any:
        # What it patches are the modules of the language that the function sees.
        seen = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if seen not in patched:
            original(function)
            patched.add(seen)
        return Kept()

    interpreter._patch_lang = patch_once
