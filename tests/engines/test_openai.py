"""The openai engine against a stub server that can do all, little or nothing, and that refuses, stalls, cuts and lies.

The stub's model says the bytes of `STORY` one token each, and scores every token by its id.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evalkit.engines import EngineSpec, StartError, create
from evalkit.errors import InputError, UnknownName
from evalkit.types import Ask, Choose, Completion, Generate, Request

STORY = " 18\nclass Next:"


def score(token: int) -> float:
    return -3.0 - token / 100


class Stub(ThreadingHTTPServer):
    """`ids`, `back`, `scores`: what it takes and gives (`exact`, `top`, ``). `trouble` may answer in its place."""

    daemon_threads = True

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.ids, self.back, self.scores = tokenizer, True, True, "exact"
        self.trouble: Callable[[Handler, dict[str, Any]], bool] | None = None
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["stub"]
        self.busy = self.busiest = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        n_prompt = len(prompt) if isinstance(prompt, list) else len(self.tokenizer.encode(prompt))
        story = [*self.tokenizer.encode(STORY), self.tokenizer.eos_token_id]
        ends = [i for i, token in enumerate(story) if token in body.get("stop_token_ids", ())]
        ids = story[:min([body["max_tokens"], *(i + 1 for i in ends)])]
        text, why, stop = self.tokenizer.decode(ids, skip_special_tokens=True), "length", None
        why = "stop" if ends or len(ids) == len(story) else why
        for word in body.get("stop", ()):
            if word in text:
                text, why, stop = text[:text.index(word)], "stop", word
                ids = self.tokenizer.encode(text + word)
        choice: dict[str, Any] = {"text": text, "finish_reason": why, "logprobs": None}
        if self.back:  # as vLLM does
            choice["stop_reason"] = stop
        if self.back and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if "logprobs" in body and self.scores:
            if self.scores == "exact" and "logprob_token_ids" in body:
                row = {f"token_id:{i}": score(i) for i in body["logprob_token_ids"]}
            else:
                row = {self.tokenizer.decode([i]): score(i) for i in range(34, 34 + body["logprobs"])}
            choice["logprobs"] = {"top_logprobs": [row]}
        return {"choices": [choice], "usage": {"prompt_tokens": n_prompt, "completion_tokens": len(ids)}}


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.send({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.keys.append(self.headers["Authorization"])
        if self.server.trouble is not None and self.server.trouble(self, body):
            return
        if isinstance(body["prompt"], list) and not self.server.ids:
            self.send({"error": "prompt must be a text"}, 400)
            return
        self.send(self.server.reply(body))

    def send(self, answer: Any, status: int = 200, cut: int = 0, **headers: str) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data[:len(data) - cut])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def stub(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Stub(tokenizer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(stub: Stub, tiny_model: Path) -> Callable[..., Any]:
    def engine(**args: str) -> Any:
        return create("openai", EngineSpec(str(tiny_model), max_model_len=64, eos=("<|user|>",), args={
            "base_url": stub.url, "timeout": "5", **args}))

    return engine


def ask(engine: Any, *asks: Ask, n: int = 3) -> list[Completion]:
    requests = [Request(str(i), "c", f"s/{i}", 0, [40] * n, what) for i, what in enumerate(asks)]
    done = {c.key: c for c in engine.complete(iter(requests))}
    assert len(done) == len(asks)
    return [done[str(i)] for i in range(len(asks))]


LETTERS = Choose(((40,), (41,), (42,)))


def test_a_server_that_takes_and_gives_token_ids(stub: Stub, make: Callable[..., Any], tokenizer: Any) -> None:
    engine = make()
    assert {key: engine.settings[key] for key in ("model", "prompt", "answer", "choose", "eos_texts")} == {
        "model": "stub", "prompt": "token ids", "answer": "token ids", "choose": "exact", "eos_texts": ["<|user|>"]}
    stub.seen.clear()
    newline, pair = tokenizer.encode("\n"), tokenizer.encode("\nclassify")
    line, word, whole, never, choice = ask(
        engine, Generate(50, stop_tokens=(tuple(newline),), seed=7, temperature=0.8, top_p=0.95),
        Generate(50, stop=("class", "Next")), Generate(4), Generate(50, stop_tokens=(tuple(pair),)), LETTERS)
    assert (line.text, line.finish, line.stop, line.n_generated) == (" 18", "stop", "\n", 4)
    assert (word.text, word.finish, word.stop) == (" 18\n", "stop", "class")
    assert (whole.text, whole.finish, whole.n_prompt) == (STORY[:4], "max_tokens", 3)
    assert (never.text, never.finish) == (STORY, "eos")
    assert choice.logprobs == (score(40), score(41), score(42)) and choice.finish == "choice"
    sent = next(body for body in stub.seen if body.get("seed") == 7)
    assert {key: sent[key] for key in ("prompt", "temperature", "top_p", "max_tokens", "repetition_penalty")} == {
        "prompt": [40, 40, 40], "temperature": 0.8, "top_p": 0.95, "max_tokens": 50, "repetition_penalty": 1.0}


def test_a_server_that_knows_only_text_and_says_so(stub: Stub, make: Callable[..., Any], tokenizer: Any) -> None:
    stub.ids = stub.back = False
    stub.scores = "top"
    engine = make()
    assert [engine.settings[key] for key in ("prompt", "answer", "choose")] == ["text", "text", "top"]
    stub.seen.clear()
    token, word, end, short, choice, unknown = ask(
        engine, Generate(50, stop_tokens=(tuple(tokenizer.encode("\n")),)), Generate(50, stop=("class",)),
        Generate(50), Generate(4), LETTERS, Choose(((40,), (99,))))
    assert (token.text, token.finish, token.stop) == (" 18", "stop", "\n")
    assert (word.text, word.finish, word.stop) == (" 18\n", "stop", "?")  # it was cut off by the server
    assert (end.text, end.finish, end.stop) == (STORY, "eos", "")
    assert (short.text, short.finish) == (STORY[:4], "max_tokens")
    assert choice.logprobs == (score(40), score(41), score(42))
    assert unknown.finish == "error" and "not among its top 20" in unknown.error and unknown.logprobs == ()
    assert {body["prompt"] for body in stub.seen} == {tokenizer.decode([40] * 3)}


def test_a_server_without_logprobs_leaves_multiple_choice_blank(stub: Stub, make: Callable[..., Any]) -> None:
    stub.scores = ""
    engine = make()
    assert engine.settings["choose"] == "none"
    (done,) = ask(engine, LETTERS)
    assert done.finish == "error" and "no log-probabilities" in done.error


def test_options_of_several_tokens(make: Callable[..., Any]) -> None:
    (done,) = ask(make(), Choose(((40,), (41, 42))))
    assert done.logprobs == (score(40), score(41) + score(42))


def test_the_key_comes_from_the_environment(
    stub: Stub, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    assert set(stub.keys) == {None}
    stub.keys.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = make()
    assert set(stub.keys) == {"Bearer secret"} and "secret" not in json.dumps(engine.settings)


def test_concurrency_is_bounded(stub: Stub, make: Callable[..., Any]) -> None:
    lock = threading.Lock()

    def count(handler: Handler, body: dict[str, Any]) -> bool:
        with lock:
            stub.busy += 1
            stub.busiest = max(stub.busiest, stub.busy)
        time.sleep(0.01)
        with lock:
            stub.busy -= 1
        return False

    engine = make(concurrency="3")
    stub.trouble = count
    assert len(ask(engine, *[Generate(4)] * 20)) == 20
    assert stub.busiest == 3


def failing(times: int, how: Callable[[Handler], None]) -> Callable[[Handler, dict[str, Any]], bool]:
    left = [times]

    def trouble(handler: Handler, _: dict[str, Any]) -> bool:
        left[0] -= 1
        if left[0] >= 0:
            how(handler)
        return left[0] >= 0

    return trouble


def drop(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


TROUBLES: dict[str, Callable[[Handler], None]] = {
    "busy": lambda handler: handler.send({"error": "busy"}, 429, Retry_After="0"),
    "down": lambda handler: handler.send({"error": "down"}, 503, Retry_After="0"),
    "cut": lambda handler: handler.send({"choices": [{"text": "half an ans"}]}, cut=10),
    "stall": lambda handler: time.sleep(0.6),
    "gone": drop,
    "list": lambda handler: handler.send([1, 2]),
}


@pytest.mark.parametrize("kind", TROUBLES)
def test_trouble_that_passes_is_tried_again(kind: str, stub: Stub, make: Callable[..., Any]) -> None:
    engine = make(timeout="0.3")
    stub.trouble = failing(1, TROUBLES[kind])
    (done,) = ask(engine, Generate(4))
    assert (done.text, done.finish) == (STORY[:4], "max_tokens")


@pytest.mark.parametrize("kind", ["busy", "cut"])
def test_trouble_that_stays_is_an_error_after_bounded_tries(kind: str, stub: Stub, make: Callable[..., Any]) -> None:
    engine = make(retries="1")
    stub.trouble = failing(10**6, TROUBLES[kind])
    stub.seen.clear()
    (done,) = ask(engine, Generate(4))
    assert done.finish == "error" and "no usable answer in 2 tries" in done.error and done.text == ""
    assert len(stub.seen) == 2


def test_what_cannot_pass_is_not_tried_again(stub: Stub, make: Callable[..., Any]) -> None:
    engine = make()
    stub.trouble = failing(1, lambda handler: handler.send({"error": "no such thing"}, 404))
    stub.seen.clear()
    (done,) = ask(engine, Generate(4))
    assert done.finish == "error" and "HTTP 404" in done.error and "no such thing" in done.error
    assert len(stub.seen) == 1


@pytest.mark.parametrize(("lie", "said"), [
    (lambda a: a["usage"].update(prompt_tokens=4), "counts 4 prompt tokens where 3 were sent"),
    (lambda a: a["choices"][0].update(token_ids=[40] * 9), "token_ids is no list of at most 4"),
    (lambda a: a["choices"][0].pop("token_ids"), "token_ids is no list"),
    (lambda a: a["choices"].clear(), "not one choice"),
    (lambda a: a["choices"][0].update(text=None), "not one choice with a text"),
    (lambda a: a["choices"][0].update(token_ids=[40]), "without a reason"),
])
def test_a_lie_is_an_error(lie: Callable[[Any], Any], said: str, stub: Stub, make: Callable[..., Any]) -> None:
    engine = make()

    def lying(handler: Handler, body: dict[str, Any]) -> bool:
        answer = stub.reply(body)
        lie(answer)
        handler.send(answer)
        return True

    stub.trouble = lying
    (done,) = ask(engine, Generate(4))
    assert done.finish == "error" and said in done.error and done.text == ""


def test_probabilities_over_one_are_no_log_probabilities(
    stub: Stub, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    monkeypatch.setitem(globals(), "score", lambda token: -0.1)
    (done,) = ask(engine, LETTERS)
    assert done.finish == "error" and "they sum to 2.71" in done.error


def test_what_cannot_be_started_is_said(stub: Stub, make: Callable[..., Any], tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"needs --engine-args base_url="):
        create("openai", EngineSpec(str(tiny_model)))
    with pytest.raises(UnknownName, match="did you mean 'timeout'"):
        make(timeot="3")
    with pytest.raises(InputError, match="timeout, retries are numbers"):
        make(timeout="soon")
    with pytest.raises(StartError, match=r"no usable answer in 1 tries: URLError.*refused"):
        make(base_url="http://127.0.0.1:9/v1", retries="0")
    stub.models = ["a", "b"]
    with pytest.raises(StartError, match=r"it serves a, b: say which with --engine-args model=NAME"):
        make()
    assert make(model="b").settings["model"] == "b"
    stub.trouble = failing(9, lambda handler: handler.send({}, 401))
    with pytest.raises(StartError, match=r"HTTP 401.*is OPENAI_API_KEY set"):
        make(model="b")


def test_an_ended_run_does_not_wait_for_a_silent_server(stub: Stub, make: Callable[..., Any]) -> None:
    engine = make(concurrency="2")
    stub.trouble = lambda handler, body: time.sleep(1.5) or False if body["max_tokens"] == 5 else False
    running = engine.complete(iter([
        Request(str(i), "c", "s", 0, [40] * 3, Generate(4 if i == 0 else 5)) for i in range(9)]))
    assert next(running).key == "0"
    begin = time.monotonic()
    running.close()
    engine.close()
    assert time.monotonic() - begin < 0.5
