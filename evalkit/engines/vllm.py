"""vLLM in this process: token ids in, answers out as they finish, through add_request and step.

Multiple choice is one request of one token whose log-probabilities are those of exactly the option ids; it
reads the prefix cache. Written against vLLM 0.32; what older ones lack is probed for, not guessed.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from evalkit.engines import EngineSpec, StartError, answers, vllm_start
from evalkit.engines.quiet import point_loggers, quiet
from evalkit.errors import EngineError
from evalkit.types import Choose, Completion, Generate, Request


@dataclass(slots=True)
class _Job:
    """A request in flight. `open`: the questions not yet answered; `known`: their log-probabilities."""

    request: Request
    ids: list[int] = field(default_factory=list)
    open: int = 1
    known: dict[answers.Ids, dict[int, float]] = field(default_factory=dict)
    cached: int | None = None


class Vllm:
    """One engine session. `settings` has what was asked of vLLM and what it made of it."""

    name = "vllm"

    def __init__(self, spec: EngineSpec) -> None:
        self._where = f" (engine log: {spec.log})" if spec.log else ""
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(spec.log.open("a", encoding="utf-8")) if spec.log else None
            with quiet(self._log):
                cpu = self._start(spec)
            self._closing = stack.pop_all()
        _wake_when_dead(self._engine)
        self._guard = _guard(self._engine)
        config, model = self._engine.vllm_config, self._engine.vllm_config.model_config
        self._limit, self._vocabulary = int(model.max_model_len), int(model.get_vocab_size())
        generation = model.try_get_generation_config()
        self._ends = answers.ends(self._tokenizer, generation.get("eos_token_id"), spec.eos)
        # Twice what runs at once: the scheduler always finds someone waiting.
        self._window = 2 * int(config.scheduler_config.max_num_seqs)
        self._exact = "logprob_token_ids" in self._vllm.SamplingParams.__struct_fields__
        self._numbers = 0
        self.settings: Mapping[str, Any] = {
            **vllm_start.settings(config, cpu), "environment": self._environment,
            "eos_token_ids": sorted(self._ends.ids), "eos_texts": list(self._ends.texts),
            "choose": "logprob_token_ids" if self._exact else "allowed_token_ids", "args": dict(spec.args),
        }

    def _start(self, spec: EngineSpec) -> bool:
        """Builds the engine; True if it runs on the CPU."""
        begin = self._log.tell() if self._log else 0
        self._vllm, cpu = vllm_start.load()
        if self._log:
            point_loggers("vllm", self._log)
        self._faults = vllm_start.faults()
        try:
            options = vllm_start.options(spec, self._vllm, cpu)
            self._environment = vllm_start.environment()
            self._engine = self._vllm.LLMEngine.from_engine_args(self._vllm.EngineArgs(**options))
            self._tokenizer = self._engine.get_tokenizer()
        except self._faults as fault:
            raise StartError(vllm_start.why(fault, spec, begin) + self._where) from fault
        return cpu

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        waiting = iter(requests)
        flying: dict[str, tuple[_Job, answers.Ids]] = {}
        try:
            while True:
                while len(flying) < self._window and (request := next(waiting, None)) is not None:
                    if (refused := self._send(request, flying)) is not None:
                        yield refused
                if not flying:
                    return
                for output in self._step():
                    if (completion := self._take(output, flying)) is not None:
                        yield completion
        finally:
            self._abort(flying)  # empty unless the caller stopped early or the engine died

    def close(self) -> None:
        with quiet(self._log):
            core = getattr(self._engine, "engine_core", None)
            if core is not None:
                core.shutdown()
            del self._engine, core
            if self._guard is not None:
                self._guard.kill()
                self._guard.communicate()
            # collects garbage too: a second time by us would take half a second more
            importlib.import_module("vllm.distributed.parallel_state").cleanup_dist_env_and_memory()
        point_loggers("vllm", sys.stderr)
        self._closing.close()

    def _send(self, request: Request, flying: dict[str, tuple[_Job, answers.Ids]]) -> Completion | None:
        """Hands the request to vLLM, a Choose as one part a question; a Completion if that is refused."""
        if (refused := answers.refuse(request, self._limit, self._vocabulary)) is not None:
            return refused
        job, sent = _Job(request), []
        try:
            with quiet(self._log):
                for prefix, params in self._parts(request.ask):
                    number = str(self._numbers)
                    self._numbers += 1
                    prompt = {"type": "token", "prompt_token_ids": [*request.tokens, *prefix]}
                    self._engine.add_request(number, prompt, params)
                    flying[number] = (job, prefix)
                    sent.append(number)
        except self._faults as fault:
            self._abort({number: flying.pop(number) for number in sent})
            return _failed(request, f"vLLM refused the request: {vllm_start.line(fault)}")
        job.open = len(sent)
        return None

    def _parts(self, ask: Generate | Choose) -> Iterator[tuple[answers.Ids, Any]]:
        make = self._vllm.SamplingParams
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        if isinstance(ask, Generate):
            texts = [*ask.stop, *self._ends.texts]
            several = any(len(ids) > 1 for ids in ask.stop_tokens)  # vLLM cannot stop there: watched in _take
            yield (), make(
                temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed, max_tokens=ask.max_tokens,
                stop=texts, stop_token_ids=sorted({*self._ends.ids, *answers.single_stops(ask)}),
                detokenize=bool(texts), skip_special_tokens=True, spaces_between_special_tokens=False,
                output_kind=kinds.DELTA if several else kinds.FINAL_ONLY,
            )
            return
        common = {"temperature": 0.0, "max_tokens": 1, "detokenize": False, "output_kind": kinds.FINAL_ONLY}
        for prefix, ids in answers.questions(ask).items():
            if self._exact:  # at most 128 ids a request (vLLM's MAX_LOGPROB_TOKEN_IDS)
                for at in range(0, len(ids), 128):
                    yield prefix, make(logprob_token_ids=list(ids[at:at + 128]), **common)
            else:  # the forced token's own log-probability is always told, and is that before the forcing
                for token in ids:
                    yield prefix, make(allowed_token_ids=[token], logprobs=1, **common)

    def _step(self) -> list[Any]:
        try:
            with quiet(self._log):
                return list(self._engine.step())
        except self._faults as fault:
            raise EngineError(f"vLLM died while it worked: {vllm_start.line(fault)}{self._where}") from fault

    def _take(self, output: Any, flying: dict[str, tuple[_Job, answers.Ids]]) -> Completion | None:
        """One output of a step: notes it, and returns the request's Completion once it is whole."""
        if output.request_id not in flying:
            return None
        (job, prefix), answer = flying[output.request_id], output.outputs[0]
        request, cached = job.request, output.num_cached_tokens or 0
        if isinstance(request.ask, Generate):
            stopped = False
            for token in answer.token_ids:
                job.ids.append(token)
                stopped = stopped or answers.ends_with_stop(job.ids, request.ask, self._ends)
            if not output.finished:
                if not stopped:
                    return None
                self._abort({output.request_id: job})
        del flying[output.request_id]
        if answer.finish_reason not in (None, "stop", "length"):
            rest = [number for number, (other, _) in flying.items() if other is job]
            self._abort({number: flying.pop(number) for number in rest})
            return _failed(request, f"vLLM ended the answer with {answer.finish_reason!r}")
        if isinstance(request.ask, Generate):
            return answers.read_answer(self._tokenizer, request, job.ids, self._ends, self._limit, cached)
        row = job.known.setdefault(prefix, {})
        row.update((token, entry.logprob) for token, entry in answer.logprobs[0].items())
        job.cached = cached if job.cached is None else job.cached
        job.open -= 1
        return None if job.open else answers.chosen(request, job.known, job.cached)

    def _abort(self, flying: Mapping[str, object]) -> None:
        if flying:
            with quiet(self._log), contextlib.suppress(*self._faults):  # a dead engine has nothing to abort
                self._engine.abort_request(list(flying))


def _wake_when_dead(engine: Any) -> None:
    """vLLM waits for ever for an engine process that was killed (out of memory): the thread that reads from it ends
    without a word. Then the wait is ended with an error."""
    core = getattr(engine, "engine_core", None)
    reader, outputs = getattr(core, "output_queue_thread", None), getattr(core, "outputs_queue", None)

    def watch(reader: threading.Thread, outputs: Any) -> None:
        reader.join()
        outputs.put_nowait(RuntimeError("its engine process ended"))

    if reader is not None and outputs is not None:
        threading.Thread(target=watch, args=(reader, outputs), daemon=True).start()


def _guard(engine: Any) -> subprocess.Popen[bytes] | None:
    """vLLM's engine process outlives a killed parent and keeps the GPU's memory: a shell that waits at a pipe from
    here ends it. None where the engine has no process of its own."""
    resources = getattr(getattr(engine, "engine_core", None), "resources", None)
    processes = getattr(getattr(resources, "engine_manager", None), "processes", ())
    if not processes:
        return None
    script = ["sh", "-c", 'read _; kill -9 "$@"', "sh", *(str(process.pid) for process in processes)]
    return subprocess.Popen(script, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _failed(request: Request, error: str) -> Completion:
    return Completion(request.key, finish="error", n_prompt=len(request.tokens), error=error)
