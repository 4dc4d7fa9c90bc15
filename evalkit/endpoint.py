"""A JSON endpoint over HTTP: asked again while that can help, several requests at once.

    server = Endpoint("http://localhost:8000/v1")
    server.ask("/completions", {"model": "tulu-65b", "prompt": [1, 529]})["choices"]

The key comes from OPENAI_API_KEY only, and goes nowhere but into the header.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from evalkit.errors import EngineError

AGAIN = {408, 409, 425, 429}  # and all of 5xx: the same request may pass later

T = TypeVar("T")
R = TypeVar("R")


class Refused(Exception):
    """The server answered, but not so that it can be used, or not at all after the retries."""


class Endpoint:
    """`timeout`: seconds of silence that are waited; `retries`: times that a request is sent again."""

    def __init__(self, url: str, timeout: float = 600.0, retries: int = 5) -> None:
        self.url, self._timeout, self._retries = url.rstrip("/"), timeout, retries
        self._over = threading.Event()

    def close(self) -> None:
        self._over.set()  # nobody waits for another try

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The server's JSON object. Asked again after 0.5, 1, 2 ... 30 s, or as long as it says. Refused if none."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        said, asked = "", ""
        for attempt in range(self._retries + 1):
            pause = float(asked) if asked.isdigit() else 0.5 * 2**(attempt - 1)
            if attempt and self._over.wait(min(pause, 30.0)):
                break
            asked = ""
            try:
                call = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(call, timeout=self._timeout) as answer:
                    reply = json.load(answer)
                if isinstance(reply, dict):
                    return reply
                said = "its answer is no JSON object"
            except urllib.error.HTTPError as fault:
                with fault:
                    said = f"HTTP {fault.code}: {fault.read(300).decode('utf-8', 'replace').strip()}"
                if fault.code < 500 and fault.code not in AGAIN:
                    raise Refused(said + ("; is OPENAI_API_KEY set?" if fault.code == 401 else "")) from None
                asked = fault.headers.get("Retry-After") or ""
            except (OSError, http.client.HTTPException, ValueError) as fault:  # gone, silent, cut short, not JSON
                said = f"{type(fault).__name__}: {fault}"
        raise Refused(f"no usable answer in {self._retries + 1} tries: {said}")


def at_once(items: Iterable[T], work: Callable[[T], R], many: int) -> Iterator[R]:
    """`work(item)` of each item in the order they are done, `many` at a time; items are pulled as they are needed."""
    waiting, flying = iter(items), 0
    todo, done = queue.SimpleQueue[tuple[T] | None](), queue.SimpleQueue[tuple[R] | None]()

    def hand() -> None:
        while (item := todo.get()) is not None:
            found = None
            try:
                found = (work(*item),)
            finally:
                done.put(found)

    for _ in range(many):  # daemons: a silent server does not keep an ended run from leaving
        threading.Thread(target=hand, daemon=True).start()
    try:
        while True:
            for item in islice(waiting, 2 * many - flying):
                todo.put((item,))
                flying += 1
            if not flying:
                return
            if (found := done.get()) is None:
                raise EngineError("a thread of evalkit's died; its traceback stands above")
            flying -= 1
            yield found[0]
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                todo.get_nowait()
        for _ in range(many):
            todo.put(None)
