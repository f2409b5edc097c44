"""The commit of the code that runs, for cards and reports."""

from __future__ import annotations

import subprocess
from pathlib import Path


def code_commit() -> str:
    """The git commit of the code that runs, with a + when files differ from it; "" outside a git checkout of it."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=20)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        # A virtual environment may lie inside some other project's checkout.
        if git("rev-parse", "--show-toplevel") != str(package.parent):
            return ""
        commit = git("rev-parse", "HEAD")
        return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return ""
