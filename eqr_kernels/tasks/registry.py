"""Which task a command runs on: the one that is named, the one that the model was trained on, or what its sizes say."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from eqr_kernels.config import EqRConfig
from eqr_kernels.tasks.builtin import MAZE, SUDOKU, task_of
from eqr_kernels.tasks.task import Task, check_task

__all__ = ["GROUP", "MAZE", "SUDOKU", "Task", "choose_task", "find_task", "is_object", "known_tasks", "task_of"]

GROUP = "eqr_kernels.tasks"
"""The entry points that are tasks by their names."""
_OURS: dict[str, Task] = {task.name: task for task in (SUDOKU, MAZE)}


def is_object(spec: str) -> bool:
    """Whether a --task names an object by its place, and not a task by its name."""
    return ":" in spec


def known_tasks() -> list[str]:
    """Names of the tasks that can be had by name: ours first, then those of installed packages."""
    return [*_OURS, *sorted({point.name for point in _installed()} - set(_OURS))]


def find_task(spec: str) -> Task:
    """The task that `spec` names.

    Args:
        spec: "sudoku" or "maze"; the name of an entry point of the group `eqr_kernels.tasks` (one with a name of ours
            is passed over); or "package.module:OBJECT" or "folder/file.py:OBJECT", importable from the present folder
            as well. That runs the code of the module.

    Raises:
        ValueError: no such task, module or object.
        ImportError: the module cannot be imported; why.
        TypeError: the object is no task; what it lacks.
    """
    if is_object(spec):
        place, _, name = spec.rpartition(":")
        if not place or not name:
            raise ValueError(f"--task {spec!r} must be a name, package.module:OBJECT or file.py:OBJECT")
        return check_task(_attribute(_module(place, spec), name, spec), f"--task {spec}")
    if spec in _OURS:
        return _OURS[spec]
    points = [point for point in _installed() if point.name == spec]
    if not points:
        near = difflib.get_close_matches(spec, known_tasks(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"--task {spec!r} is not known; {hint}Known are {', '.join(known_tasks())}; one of your own is "
            "package.module:OBJECT or file.py:OBJECT"
        )
    if len(points) > 1:
        raise ValueError(
            f"--task {spec!r} is the name of {len(points)} tasks, {' and '.join(point.value for point in points)}; "
            "name the one you mean in that form"
        )
    try:
        value = points[0].load()
    except Exception as error:
        raise ImportError(
            f"--task {spec}: the entry point {points[0].value} cannot be loaded ({_reason(error)})"
        ) from error
    task = check_task(value, f"--task {spec} ({points[0].value})")
    if task.name != spec:
        # Or a model's card would name a task that is not found again.
        raise ValueError(
            f"--task {spec}: {points[0].value} is named {task.name!r}, unlike its entry point; name it alike"
        )
    return task


def choose_task(wanted: str | Task | None, config: EqRConfig, *, name: str = "", place: str = "") -> Task:
    """The task that a model is used for: the one wanted, else the one that it was trained on, else what its sizes say.

    Args:
        wanted: it, or as `find_task` takes it; None where nothing was asked for.
        config: of the model.
        name, place: of the task that it was trained on (`ModelCard.task`, `ModelCard.task_object`); "" where unknown.

    Raises:
        ValueError: the task takes other tokens than the model, or the model's own is not known here.
        ImportError, TypeError: as `find_task`.
    """
    if wanted is None and place:
        # Never imported unasked: code that a file names is not run.
        raise ValueError(
            f"the model was trained on the task {name!r} of {place}, which is looked up only when you name it: give "
            f"--task {place}, or wherever that object is now"
        )
    if wanted is None and name and name not in known_tasks():
        raise ValueError(
            f"the model was trained on the task {name!r}, which is not known here ({', '.join(known_tasks())}); "
            "install the package that has it, or give --task package.module:OBJECT or file.py:OBJECT"
        )
    if wanted is None and not name:
        return task_of(config)
    task = wanted if isinstance(wanted, Task) else find_task(name if wanted is None else wanted)
    misfit = task.misfit(config)
    if misfit:
        raise ValueError(f"{misfit}; give the --task that the model is for, or a model for this one")
    return task


def _installed() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def _module(place: str, spec: str) -> ModuleType:
    path = Path(place).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"--task {spec}: there is no file {path}")
    try:
        if path.suffix == ".py":
            return _from_file(path)
        # As `python -m` does; the program `eqr` is started without.
        here = os.getcwd()
        if "" not in sys.path and here not in sys.path:
            sys.path.insert(0, here)
        importlib.invalidate_caches()
        return importlib.import_module(place)
    except Exception as error:
        raise ImportError(
            f"--task {spec}: {place} cannot be imported ({_reason(error)}); it must be a module that Python finds from "
            f"here, {os.getcwd()}, or the path of a .py file"
        ) from error


def _from_file(path: Path) -> ModuleType:
    name = f"eqr_task_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # as dataclasses and pickle look it up
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)  # as `python FILE` does
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(beside)
    return module


def _attribute(module: ModuleType, name: str, spec: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            tasks = [key for key, each in vars(module).items() if isinstance(each, Task)]
            near = difflib.get_close_matches(name, tasks, n=1) or tasks[:1]
            hint = f"did you mean {near[0]}?" if near else "it has no task"
            raise ValueError(f"--task {spec}: {module.__name__} has no {name}; {hint}")
        value = getattr(value, part)
    return value


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
