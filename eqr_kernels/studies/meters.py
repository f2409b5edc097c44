"""What the system tells of a piece of work: joules and peak memory, or that it does not tell."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_RAPL = Path("/sys/class/powercap")


def synchronize(device: torch.device) -> None:
    """Waits for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Joules:
    """Energy of so many calls in so many seconds; source: "NVML" or "RAPL"."""

    joules: float
    calls: int
    seconds: float
    source: str


def joules(call: Callable[[], object], seconds: float, device: torch.device) -> Joules | None:
    """Energy that calls, one after the other for at least so long, took; None where nothing measures it.

    On a GPU that of the whole board, by NVML; on a CPU that of the whole packages, by RAPL, other processes included.
    """
    read, source = (_nvml(device), "NVML") if device.type == "cuda" else (_rapl(), "RAPL")
    if read is None:
        return None
    synchronize(device)
    before, begun, calls = read(), time.perf_counter(), 0
    while not calls or time.perf_counter() - begun < seconds:
        call()
        calls += 1
    synchronize(device)
    taken, after = time.perf_counter() - begun, read()
    # A counter of RAPL that wrapped round in between says nothing.
    return Joules(after - before, calls, taken, source) if after > before else None


def _nvml(device: torch.device) -> Callable[[], float] | None:
    """Joules that the board has used, by the driver's own count; None without the package or the count."""
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # the package's own errors, one for each thing a driver may lack
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def _rapl() -> Callable[[], float] | None:
    """Joules that all CPU packages have used; None where the kernel does not let us read them."""
    counters: list[Path] = []

    def read() -> float:
        return sum(int(counter.read_text()) for counter in counters) / 1e6

    try:
        for zone in sorted(_RAPL.glob("intel-rapl:*")):
            # Not the parts of a package, nor the zone of the whole board that some machines have beside it.
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                counters.append(zone / "energy_uj")
        read()
    except (OSError, ValueError):
        return None
    return read if counters else None


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of a call above what was held before it; None where the system does not tell.

    On a GPU what torch's allocator held (which a backend's own buffers come from); on a CPU the resident set, in pages,
    after malloc has given back what earlier work left in it (where it can: glibc).
    """
    gc.collect()
    _give_back()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        call()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return None if peak is None else max(0, int(peak.split()[1]) * 1024 - held)


def _give_back() -> None:
    """Free memory that malloc keeps would be used again, and the peak would not show what the call needs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
