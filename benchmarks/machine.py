"""What the results say of the machine that gave them."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch

import eqr_kernels
from eqr_kernels import ops
from eqr_kernels.atomic import atomic_write
from eqr_kernels.commit import code_commit

code_commit()  # from here on it is that of the code that is loaded, however long a study takes


def cpu() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return match[1].strip() if match else platform.processor() or platform.machine()


def busy(seconds: float = 0.5) -> float:
    """The share of the machine's CPU time that others took while this process slept; 0 where /proc does not say."""

    def ticks() -> tuple[int, int]:
        fields = [int(f) for f in _read("/proc/stat").partition("\n")[0].split()[1:9]]
        return sum(fields), sum(fields[3:5])  # all, idle and waiting for a disk

    if not _read("/proc/stat"):
        return 0.0
    before, idle_before = ticks()
    time.sleep(seconds)
    after, idle_after = ticks()
    return round(1 - (idle_after - idle_before) / max(1, after - before), 3)


def device() -> str:
    """The GPU's name, or the CPU's with its highest instruction set (a name may stand for several) and the threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    isa = f" {ops.cpu_isas()[-1].replace('_', ' ')}" if ops.extension_status()[0] else ""
    return f"{cpu()}{isa}, {torch.get_num_threads()} threads"


def folder() -> str:
    """The name of the folder for this device's results."""
    return re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-")


def information() -> dict[str, Any]:
    """Device, system and versions, ready for JSON."""
    built, reason = ops.extension_status()
    return {
        "device": device(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "eqr_kernels": eqr_kernels.__version__,
        "extension": reason,
        "cpu_isa": ops.cpu_isa() if built else None,
    }


def provenance(module: str) -> dict[str, Any]:
    """What a report says first: `information`, the commit, and the command that gives it again.

    Args:
        module: that this process runs, as in "benchmarks.serving".
    """
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return {**information(), "commit": code_commit(), "command": command}


def write_report(results: Path | None, name: str, report: dict[str, Any]) -> None:
    """Writes a report to the folder of this device's results, whole or not at all.

    Args:
        results: folder of all devices; None writes nothing. name: as in "serving".
    """
    if results is None:
        return
    target = results / folder() / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, (json.dumps(report, indent=1) + "\n").encode())


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
