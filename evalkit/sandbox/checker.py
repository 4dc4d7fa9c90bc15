"""The checker's process: compiles program and test, sends the one away, runs the other against answers.

No code of a program runs here: `candidate` is a function that sends its arguments over a pipe and reads plain data
back (wire.py). A job's nonce is known here only and leaves after the last assertion.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import importlib
import json
import marshal
import os
import re
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from evalkit.sandbox import program, wire

_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_BUILTIN = frozenset(dir(builtins))
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)


class Gone(BaseException):
    """No answer will come. Not an Exception: a test that catches those must not catch this."""


class Channel:
    """The pipes to the program. The first `fault` decides, whatever the test makes of the exception."""

    def __init__(self, orders: int, answers: int, most: int) -> None:
        self._orders, self._answers, self._most = orders, answers, most
        self.fault: dict[str, str] = {}

    def ready(self) -> str:
        try:
            return wire.read(self._answers, 1 << 10).decode(errors="replace")
        except EOFError:
            return "its process did not start"

    def ask(self, order: bytes) -> dict[str, Any]:
        """The program's reply as written by it; its exception, rebuilt, when it raised one."""
        try:
            wire.write(self._orders, order)
            reply = json.loads(wire.read(self._answers, self._most))
            if "raised" not in reply:
                return dict(reply)
            error = _rebuilt([str(name)[:80] for name in reply["raised"]], str(reply["text"]))
        except (EOFError, BrokenPipeError):
            self.fail("gone", "")
        except _UNREADABLE as problem:
            self.fail("failed", f"unreadable answer: {problem}")
        raise error

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        order = wire.dumps({"call": name, "given": wire.pack([list(args), kwargs])})
        if b'{"o": ' in order:  # quotes inside texts are escaped, so this is the tag
            self.fail("broken", f"the test hands {name}() an object that is not plain data")
        reply = self.ask(order)
        try:
            if "after" in reply:
                changed, named = wire.unpack(reply["after"])
                for old, new in zip([*args, *kwargs.values()], [*changed, *named.values()], strict=True):
                    _assign(old, new)
            return wire.unpack(reply["value"])
        except _UNREADABLE as problem:
            self.fail("failed", f"unreadable answer: {problem}")

    def fail(self, status: str, detail: str) -> NoReturn:
        self.fault = self.fault or {"status": status, "detail": detail}
        raise Gone


def _assign(old: Any, new: Any) -> None:
    """Change a container of the test as the program changed its copy."""
    if isinstance(old, list | bytearray) and type(old) is type(new):
        old[:] = new
    elif isinstance(old, dict | set) and type(old) is type(new):
        old.clear()
        old.update(new)


def _rebuilt(names: list[str], text: str) -> BaseException:
    """An exception of the same name whose nearest built-in base is the same, so that `except` works as before."""
    for name in names:
        base = getattr(builtins, name, None)
        if isinstance(base, type) and issubclass(base, BaseException):
            try:
                error = base(text) if name == names[0] else type(names[0], (base,), {})(text)
            except TypeError:  # UnicodeDecodeError and its like want more than a text
                continue
            return error
    return Exception(text)


def split(code: str, test: str, entry_point: str) -> tuple[types.CodeType, types.CodeType]:
    """`code + test + check(entry_point)`, compiled as one text would be, in two parts that share no statement."""
    tail = f"{test}\ncheck({entry_point})"
    try:
        first = _compile(code)
        return first, _compile(tail, first.co_flags & _FUTURE)
    except SyntaxError:  # only together, perhaps: a program may end in a backslash
        whole: ast.Module = compile(f"{code}\n{tail}", "<string>", "exec", ast.PyCF_ONLY_AST, dont_inherit=True)  # type: ignore[assignment]
    lines = len(re.findall(r"\r\n|\r|\n", f"{code}\n"))
    starts = [min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", []))]) for s in whole.body]
    mine = [s for s, start in zip(whole.body, starts, strict=True) if start <= lines]
    if any((s.end_lineno or 0) > lines for s in mine):
        raise SyntaxError("the program runs on into the test")
    first = _compile(ast.Module(mine, []))
    return first, _compile(ast.Module(whole.body[len(mine) :], []), first.co_flags & _FUTURE)


def _compile(source: str | ast.Module, flags: int = 0) -> types.CodeType:
    return compile(source, "<string>", "exec", flags, dont_inherit=True, optimize=0)  # type: ignore[no-any-return]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _imports(test: str) -> types.CodeType | None:
    """The imports at the top of the test: in the original they are in the program's name space too."""
    if not re.search(r"^(import|from)\s", test, re.MULTILINE):
        return None
    found: list[ast.stmt] = [s for s in ast.parse(test).body if isinstance(s, ast.Import | ast.ImportFrom)]
    return _compile(ast.Module(found, []))


def _run(job: dict[str, str], channel: Channel) -> None:
    definitions, checks = split(job["code"], job["test"], job["entry_point"])
    wanted = sorted(set(_names(checks)) - _BUILTIN)
    space: dict[str, Any] = {}
    for name, what in channel.ask(marshal.dumps((definitions, _imports(job["test"]), wanted)))["names"].items():
        if "call" in what:
            space[name] = _remote(channel, name)
        elif "value" in what:
            space[name] = wire.unpack(what["value"])
        elif what.get("module") in sys.stdlib_module_names:  # the real one, whatever the program put there
            space[name] = importlib.import_module(what["module"])
    exec(checks, space)


def _remote(channel: Channel, name: str) -> Callable[..., Any]:
    def candidate(*args: Any, **kwargs: Any) -> Any:
        return channel.call(name, args, kwargs)

    candidate.__name__ = name
    return candidate


def judge(job: dict[str, str], channel: Channel) -> dict[str, Any]:
    """Run one job (code, test, entry_point, nonce): passed, failed, unfinished, broken, or gone when the program's
    process ended before its checks."""
    start = time.perf_counter()
    verdict: dict[str, Any] = {"status": "passed", "detail": ""}
    try:
        _run(job, channel)
        verdict["nonce"] = job["nonce"]
    except SystemExit as error:
        verdict = {"status": "unfinished", "detail": f"SystemExit: {error}"}
    except BaseException as error:  # a test may raise anything: that is the verdict
        verdict = {"status": "failed", "detail": f"{type(error).__name__}: {error}".rstrip(": ")}
    return (channel.fault or verdict) | {"seconds": time.perf_counter() - start}


def serve(line: socket.socket, jobs: int, most: int) -> None:
    """Wait on `line` for a size and the two pipes of a program, read that much from `jobs`, answer; for ever."""
    program.disarm()
    while True:
        head, pipes, _, _ = socket.recv_fds(line, wire.SIZE.size, 2)
        if not head:
            return
        job = json.loads(wire.read_exact(jobs, *wire.SIZE.unpack(head)))
        channel = Channel(pipes[0], pipes[1], most)
        ready = channel.ready()
        wire.write(line.fileno(), wire.dumps("started"))
        verdict = judge(job, channel) if ready == "ready" else {"status": "broken", "detail": ready}
        for pipe in pipes:
            os.close(pipe)
        wire.write(line.fileno(), wire.dumps(verdict))
