"""How a process that is asked for measurements answers: JSON lines, of which the first says what it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


def own_output() -> TextIO:
    """Where answers go; what libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, info: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Says what this is, and answers each request, a JSON object a line, until there are no more."""
    print(json.dumps(info), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
