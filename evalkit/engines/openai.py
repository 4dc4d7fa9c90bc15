"""A server with OpenAI's completions endpoint: `--engine openai --engine-args base_url=http://host:8000/v1`.

    {"model": "tulu-65b", "prompt": [1, 529, 29989], "max_tokens": 512, "return_token_ids": true, "seed": 7}

What it can do is asked of it first and stands in `settings`: token ids in (else the prompt's text), token ids back
(else the answer's text), log-probabilities of given tokens (else of the top 20, else none). The key comes from
OPENAI_API_KEY only. What a server leaves out or gets wrong is the Completion's error, never an empty answer.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from evalkit.endpoint import Endpoint, Refused, at_once
from evalkit.engines import EngineSpec, StartError, answers
from evalkit.errors import InputError, UnknownName
from evalkit.extract import cut_text
from evalkit.types import Choose, Completion, Generate, Request

NUMBERS = {"concurrency": 8.0, "timeout": 600.0, "retries": 5.0}  # requests at once; seconds of silence; tries after
TOP = 20


class OpenAI:
    """Args: base_url, model (the served one, if there are several), concurrency, timeout and retries."""

    name = "openai"

    def __init__(self, spec: EngineSpec) -> None:
        known = {"base_url", "model", *NUMBERS}
        for option in spec.args:
            if option not in known:
                raise UnknownName("engine option of openai", option, known)
        url = spec.args.get("base_url", "")
        if not urlsplit(url).scheme.startswith("http"):
            raise InputError("--engine openai needs --engine-args base_url=http://HOST:PORT/v1")
        try:
            numbers = {name: float(spec.args.get(name, default)) for name, default in NUMBERS.items()}
        except ValueError:
            raise InputError(f"--engine-args: {', '.join(NUMBERS)} are numbers") from None
        self._many, self._limit = max(1, int(numbers["concurrency"])), spec.max_model_len
        self._server = Endpoint(url, numbers["timeout"], int(numbers["retries"]))
        self._tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
            spec.tokenizer or spec.model, revision=None if spec.tokenizer else spec.revision or None)
        self._ends = answers.ends(self._tokenizer, None, spec.eos)
        self._vocabulary = len(self._tokenizer)
        try:
            self._model = spec.args.get("model") or self._served()
            self._probe()
        except Refused as fault:
            raise StartError(f"--engine openai: {self._server.url}: {fault}") from fault
        parts = urlsplit(self._server.url)
        self.settings: Mapping[str, Any] = {
            "base_url": parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), "model": self._model,
            "device": "server", "prompt": "token ids" if self._ids_in else "text",
            "answer": "token ids" if self._ids_out else "text", "choose": self._choice, **numbers,
            "eos_token_ids": sorted(self._ends.ids), "eos_texts": list(self._ends.texts), "max_model_len": self._limit,
        }

    def _served(self) -> str:
        rows = self._server.ask("/models").get("data")
        names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row] if rows else []
        if len(names) != 1:
            raise Refused(f"it serves {', '.join(names) or 'no model'}: say which with --engine-args model=NAME")
        return names[0]

    def _probe(self) -> None:
        """Finds out what the server takes and gives, each tried with one token."""
        tokens = list(self._tokenizer.encode("The capital of France is", add_special_tokens=False))
        for self._ids_in, self._ids_out in ((True, True), (True, False), (False, False)):
            try:
                reply = self._server.ask("/completions", self._body(tokens, {"max_tokens": 1, "temperature": 0}))
                choice = _choice(reply)
            except Refused:
                if not self._ids_in:  # a text must do, or the server is of no use
                    raise
                continue
            if not self._ids_in or _count(reply, "prompt_tokens") == len(tokens):
                self._ids_out = self._ids_out and isinstance(choice.get("token_ids"), list)
                break
        for self._choice in ("exact", "top"):
            with contextlib.suppress(Refused):
                self._logprobs(tokens, tuple(tokens[:2]) if self._choice == "exact" else ())
                return
        self._choice = "none"

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return at_once(requests, self._answer, self._many)

    def close(self) -> None:
        self._server.close()

    def _answer(self, request: Request) -> Completion:
        if (refused := answers.refuse(request, self._limit, self._vocabulary)) is not None:
            return refused
        try:
            if isinstance(request.ask, Generate):
                return self._generate(request, request.ask)
            return self._choose(request, request.ask)
        except Refused as fault:
            return Completion(request.key, finish="error", n_prompt=len(request.tokens), error=f"server: {fault}")

    def _generate(self, request: Request, ask: Generate) -> Completion:
        texts = (*ask.stop, *self._ends.texts)
        room = min(ask.max_tokens, self._limit - len(request.tokens))
        extra: dict[str, Any] = {"max_tokens": room, "temperature": ask.temperature, "top_p": ask.top_p}
        if ask.seed is not None:
            extra["seed"] = ask.seed
        if texts:
            extra["stop"] = list(texts if self._ids_out else texts[:4])  # OpenAI takes four; all are cut below
        if self._ids_out:
            extra["stop_token_ids"] = sorted({*self._ends.ids, *answers.single_stops(ask)})
            # A vLLM server fills in what is left out from the model's generation config; no recipe has these.
            extra |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        reply = self._server.ask("/completions", self._body([*request.tokens], extra))
        choice, cached = _choice(reply), _count(reply, "prompt_tokens_details", "cached_tokens") or 0
        self._same_prompt(reply, request)
        if self._ids_out:
            ids = choice.get("token_ids")
            if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids) or len(ids) > room:
                raise Refused(f"token_ids is no list of at most {room} ids, as asked for")
            return answers.read_answer(self._tokenizer, request, ids, self._ends, self._limit, cached)
        return self._read_text(request, choice, _count(reply, "completion_tokens"), cached)

    def _read_text(self, request: Request, choice: Mapping[str, Any], n: int | None, cached: int) -> Completion:
        """Without token ids a token-level stop is looked for as text, which can cut earlier (`\\nclassify`)."""
        ask = request.ask
        assert isinstance(ask, Generate)
        named = (*ask.stop, *(self._tokenizer.decode(list(ids)) for ids in ask.stop_tokens))
        text, why, said = choice["text"], choice.get("finish_reason"), choice.get("stop_reason", "?")
        n = len(self._tokenizer.encode(text, add_special_tokens=False)) if n is None else n
        if n > ask.max_tokens:
            raise Refused(f"it counts {n} tokens where {ask.max_tokens} were asked for")
        text, stop = cut_text(text, (*named, *self._ends.texts))
        if stop:
            finish, stop = ("stop", stop) if stop in named else ("eos", "")
        elif why == "stop":  # the server cut the stop off; vLLM tells which it was, others do not
            finish, stop = ("stop", said) if named and isinstance(said, str) else ("eos", "")
        elif why == "length":
            finish = "max_tokens" if n >= ask.max_tokens else "context"
        else:
            raise Refused(f"finish_reason is {why!r}")
        return Completion(request.key, text, finish=finish, stop=stop, n_prompt=len(request.tokens),
                          n_cached=cached, n_generated=n)

    def _choose(self, request: Request, ask: Choose) -> Completion:
        if self._choice == "none":
            raise Refused("it gives no log-probabilities, so that multiple choice has no number")
        known: dict[answers.Ids, dict[int, float]] = {}
        for prefix, ids in answers.questions(ask).items():
            tokens = [*request.tokens, *prefix]
            found = self._logprobs(tokens, ids if self._choice == "exact" else ())
            for token in ids:
                name = f"token_id:{token}" if self._choice == "exact" else answers.decode(
                    self._tokenizer, tokens[-8:], (token,))
                if name not in found:  # no number is made up for it
                    raise Refused(f"no log-probability of {name!r}, which is not among its top {TOP}")
                known.setdefault(prefix, {})[token] = found[name]
        return answers.chosen(request, known)

    def _logprobs(self, tokens: list[int], ids: answers.Ids) -> dict[str, float]:
        """Name of token -> log-probability of it as the next one: of `ids`, or of the top ones if there are none."""
        extra: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": len(ids) or TOP}
        if ids:
            extra |= {"logprob_token_ids": list(ids), "return_tokens_as_token_ids": True}
        told = _choice(self._server.ask("/completions", self._body(tokens, extra))).get("logprobs")
        rows = told.get("top_logprobs") if isinstance(told, dict) else None
        row = rows[0] if isinstance(rows, list) and rows else None
        if not isinstance(row, dict) or not row or not all(isinstance(value, int | float) for value in row.values()):
            raise Refused("it gives no log-probabilities")
        if (mass := sum(math.exp(min(value, 1.0)) for value in row.values())) > 1.01:
            raise Refused(f"its log-probabilities are none: they sum to {mass:.2f}")
        if missing := [token for token in ids if f"token_id:{token}" not in row]:
            raise Refused(f"it gives no log-probability of the token ids {missing}")
        return row

    def _same_prompt(self, reply: Mapping[str, Any], request: Request) -> None:
        if self._ids_in and (n := _count(reply, "prompt_tokens")) != len(request.tokens):
            raise Refused(f"it counts {n} prompt tokens where {len(request.tokens)} were sent")

    def _body(self, tokens: list[int], extra: Mapping[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "prompt": tokens, **extra}
        if not self._ids_in:
            body["prompt"] = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        if self._ids_out:
            body["return_token_ids"] = True
        return body


def _choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0].get("text"), str):
        raise Refused("its answer has not one choice with a text")
    choice: dict[str, Any] = choices[0]
    return choice


def _count(reply: Any, *path: str) -> int | None:
    """`usage`'s number: `_count(reply, "prompt_tokens")`; None where the server leaves it out."""
    for name in ("usage", *path):
        reply = reply.get(name) if isinstance(reply, dict) else None
    return reply if isinstance(reply, int) else None
