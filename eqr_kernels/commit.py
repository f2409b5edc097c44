"""The commit of the code that runs, for cards and reports."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_NOTE = _PACKAGE / "_commit.txt"  # setup.py writes it into what it builds


@functools.cache
def code_commit() -> str:
    """The git commit of the code that runs, with a + when files differed from it; "" where nothing tells it.

    As it is at the first call: a process of hours asks as it begins, since the checkout may go on meanwhile.
    In a git checkout of the project git tells it, elsewhere the note that a wheel or an sdist brings.
    """
    if (_PACKAGE.parent / ".git").exists():
        return _of_checkout()
    try:
        return _NOTE.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _of_checkout() -> str:
    # Git sets these for its hooks, which may be another repository's.
    hidden = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        # Where .git is broken, git looks further up.
        if git("rev-parse", "--show-toplevel") != str(_PACKAGE.parent):
            return ""
        commit = git("rev-parse", "HEAD")
        return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return ""
