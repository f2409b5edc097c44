"""Which tiles suit a device: a few candidates are timed once, and the choice is kept in memory and in a file."""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eqr_kernels.backends.triton import launch
from eqr_kernels.backends.triton.plan import Plan, Tiles, candidates, prefers_calls
from eqr_kernels.backends.watch import new_control
from eqr_kernels.modules import EqROperator

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_chosen: dict[str, Tiles] = {}

# A timed run: this many outer steps of two trajectories for every multiprocessor.
_STEPS = 2
_RUNS = 5
# Candidates add in another order; on weights that do not contract, an outer step amplifies that.
_AGREEMENT = {torch.float32: 1e-2, torch.bfloat16: 0.5}


def cache_file() -> Path:
    """Where choices are kept: triton.json in EQR_CACHE_DIR, or else in ~/.cache/eqr_kernels."""
    folder = os.environ.get("EQR_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "eqr_kernels") / "triton.json"


def read_choices(path: Path) -> dict[str, Any]:
    """The choices in a file; none where it is missing or broken."""
    try:
        choices = json.loads(path.read_text())["choices"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.debug("no choices of tiles in %s: %s", path, error)
        return {}
    return choices if isinstance(choices, dict) else {}


def write_choice(path: Path, key: str, tiles: Tiles) -> None:
    """Adds a choice to a file, atomically; a file that cannot be written is no error."""
    choices = {**read_choices(path), key: asdict(tiles)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump({"choices": choices}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        _log.warning("the choice of tiles cannot be kept in %s (%s); set EQR_CACHE_DIR to a folder", path, error)


def key_of(device_name: str, plan: Plan, dtype: torch.dtype) -> str:
    """What a choice depends on."""
    sizes = {name: value for name, value in asdict(plan).items() if name in _SIZES}
    description = " ".join(f"{name}={value}" for name, value in sizes.items())
    return f"{device_name}, triton {launch.VERSION}, {str(dtype).removeprefix('torch.')}, {description}"


_SIZES = ("S", "d", "V", "hidden", "token_hidden", "heads", "rope_parts", "layers", "H_cycles", "L_cycles", "calls")


def known_plan(model: EqROperator, dtype: torch.dtype) -> Plan | None:
    """The plan that was chosen earlier for a model on its GPU, in this process or by the file; None: there is none."""
    plans = _plans(model, dtype)
    key = key_of(torch.cuda.get_device_name(model.device), plans[0], dtype)
    with _lock:
        if not _tunes():
            return _with_tiles(plans, _chosen.get(key + _UNTIMED))
        plan = _with_tiles(plans, _chosen.get(key)) or _with_tiles(plans, _kept(key))
        if plan is not None:
            _chosen[key] = plan.tile
        return plan


def plan_for(model: EqROperator, dtype: torch.dtype) -> Plan:
    """The plan for a model on its GPU, chosen now if it was not yet, which takes seconds to minutes.

    With EQR_TRITON_TUNE=0, and while a CUDA graph is captured, the first candidate that fits, without timing.

    Raises:
        RuntimeError: no candidate fits; the message tells each one's reason.
    """
    plans = _plans(model, dtype)
    key = key_of(torch.cuda.get_device_name(model.device), plans[0], dtype)
    with _lock, torch.cuda.device(model.device):
        known = known_plan(model, dtype)
        if known is not None:
            return known
        if _tunes():
            plan = fastest(plans, dtype, lambda p: _time(model, dtype, p))
            _chosen[key] = plan.tile
            write_choice(cache_file(), key, plan.tile)
        else:
            plan = first_that_fits(plans, lambda p: _fits(model, dtype, p))
            _chosen[key + _UNTIMED] = plan.tile
        return plan


_UNTIMED = ", not timed"


def _tunes() -> bool:
    return os.environ.get("EQR_TRITON_TUNE") != "0" and not torch.cuda.is_current_stream_capturing()


def _plans(model: EqROperator, dtype: torch.dtype) -> tuple[Plan, ...]:
    calls = torch.version.hip is None and prefers_calls(torch.cuda.get_device_capability(model.device), dtype)
    return candidates(model.config, dtype, calls=calls)


def _kept(key: str) -> Tiles | None:
    try:
        return Tiles.from_dict(read_choices(cache_file())[key])
    except (KeyError, TypeError, ValueError):
        return None


def _with_tiles(plans: tuple[Plan, ...], tiles: Tiles | None) -> Plan | None:
    """A model's own plan with the tiles that were chosen for one of its sizes; None: they are of another version."""
    return next((plan for plan in plans if plan.tile == tiles), None)


def first_that_fits(plans: tuple[Plan, ...], fits: Callable[[Plan], object]) -> Plan:
    """The first plan for which `fits` raises nothing.

    Raises:
        RuntimeError: there is none.
    """
    reasons = []
    for plan in plans:
        try:
            fits(plan)
        except Exception as error:  # Triton's errors have no common class
            reasons.append(_left_out(plan, error))
        else:
            return plan
    raise RuntimeError(_nothing_fits(reasons))


def fastest(plans: tuple[Plan, ...], dtype: torch.dtype, time: Callable[[Plan], tuple[float, torch.Tensor]]) -> Plan:
    """The plan with the least time, of those that run and agree with the first that does.

    Args:
        time: milliseconds, and logits that must agree.

    Raises:
        RuntimeError: none runs.
    """
    times: dict[Plan, float] = {}
    expected: torch.Tensor | None = None
    reasons = []
    for plan in plans:
        try:
            milliseconds, logits = time(plan)
            if not logits.isfinite().all():
                raise RuntimeError("its logits are not finite")
            expected = logits if expected is None else expected
            error = float((logits - expected).norm() / expected.norm().clamp_min(1e-30))
            if not error <= _AGREEMENT[dtype]:
                raise RuntimeError(f"its logits differ from the first candidate's by {error:.2g} of their norm")
        except Exception as error_of_plan:
            reasons.append(_left_out(plan, error_of_plan))
        else:
            times[plan] = milliseconds
            _log.debug("%.3f ms with tiles %s", milliseconds, plan.tile)
    if not times:
        raise RuntimeError(_nothing_fits(reasons))
    return min(times, key=times.__getitem__)


def _left_out(plan: Plan, error: Exception) -> str:
    message = f"{plan.tile}: {type(error).__name__}: {str(error)[:300]}"
    _log.debug("tiles are left out: %s", message)
    return message


def _nothing_fits(reasons: list[str]) -> str:
    return "no tiles of the Triton kernel run here; use backend='reference'. " + "; ".join(reasons)


def _fits(model: EqROperator, dtype: torch.dtype, plan: Plan) -> int:
    return launch.resident_programs(model, dtype, plan)


def _time(model: EqROperator, dtype: torch.dtype, plan: Plan) -> tuple[float, torch.Tensor]:
    # As many trajectories for every candidate, however many programs it runs at a time.
    trajectories = 2 * torch.cuda.get_device_properties(model.device).multi_processor_count
    programs = min(_fits(model, dtype, plan), trajectories)
    problem = launch.trial(model, dtype, trajectories, _STEPS)
    times, logits = [], torch.empty(0, device="cpu")
    for run in range(_RUNS + 1):
        values, tables = launch.arguments(model, problem, plan, new_control(model.device), programs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch.launch(values, plan, programs)
        end.record()
        end.synchronize()
        if run:  # the first warms up
            times.append(begin.elapsed_time(end))
        logits = tables.logits[0]
    return statistics.median(times), logits
