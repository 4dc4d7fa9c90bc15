"""Task folders: `tasks/<name>/task.py` holds a value `task`, loaded by path; the card is its README.md.

    find() -> {"bbh": Path(".../tasks/bbh"), ...}        load(Path(".../tasks/bbh")).name == "bbh"

The shipped copy is inside the package; in a checkout it is the top-level folder. A user's own: --tasks-dir.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from evalkit.errors import InputError
from evalkit.types import Task

KINDS = ("choice", "exact", "f1", "code", "pairwise")


def home() -> Path:
    """The folder of the shipped tasks."""
    here = Path(__file__).resolve().parent
    return here / "_tasks" if (here / "_tasks").is_dir() else here.parent / "tasks"


def find(folder: Path | None = None) -> dict[str, Path]:
    """Task folders by name. InputError when a user's folder has none."""
    where = folder or home()
    if not where.is_dir():
        raise InputError(f"--tasks-dir {where}: no such folder")
    found = {path.parent.name: path.parent for path in sorted(where.glob("*/task.py"))}
    if (where / "task.py").is_file():
        found[where.resolve().name] = where
    if not found:
        raise InputError(f"{where}: no task there; a task is a folder with a task.py")
    return found


def load(folder: Path) -> Task:
    """The value `task` of `folder`/task.py. InputError with file and line when it cannot be had."""
    path = folder / "task.py"
    spec = importlib.util.spec_from_file_location(f"evalkit_task_{folder.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, NameError, AttributeError, TypeError, ValueError, KeyError, ImportError) as error:
        line = getattr(error, "lineno", None) or _line(error, path)
        raise InputError(f"{path}:{line}: {type(error).__name__}: {error}") from None
    task = getattr(module, "task", None)
    if not isinstance(task, Task):
        raise InputError(f"{path}: no value `task = Task(...)`")
    if task.kind not in KINDS:
        raise InputError(f"{path}: kind {task.kind!r}: must be one of {', '.join(KINDS)}")
    return task


def _line(error: BaseException, path: Path) -> int:
    trace, line = error.__traceback__, 0
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
