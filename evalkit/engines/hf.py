"""Plain transformers, batch by batch: slow, but runs wherever torch does, and is what vLLM is checked against.

Left padding with an attention mask, from which transformers counts the positions. Options are read from one
forward pass (float32 log-softmax). A sampled row draws from a generator of its own, so that its answer does not
depend on the rows beside it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from itertools import islice
from typing import Any

from evalkit.engines import EngineSpec, StartError, answers
from evalkit.engines.quiet import quiet
from evalkit.errors import InputError, UnknownName
from evalkit.types import Choose, Completion, Generate, Request

OPTIONS = ("attn_implementation", "batch_size", "device", "device_map", "dtype", "quantization")
BITS = {"int8": "load_in_8bit", "int4": "load_in_4bit"}
FAULTS = (RuntimeError, ValueError, OSError, ImportError, LookupError)


class HuggingFace:
    """One model in this process. Args: dtype, batch_size (8), device, device_map, attn_implementation and
    quantization (int8 as the paper ran it, int4; both need bitsandbytes)."""

    name = "hf"

    def __init__(self, spec: EngineSpec) -> None:
        for option in spec.args:
            if option not in OPTIONS:
                raise UnknownName("engine option of hf", option, OPTIONS)
        size = spec.args.get("batch_size", "8")
        if not size.isdigit() or int(size) < 1:
            raise InputError(f"--engine-args batch_size={size}: a whole number from 1 is needed")
        self._size, self._limit = int(size), spec.max_model_len
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(spec.log.open("a", encoding="utf-8")) if spec.log else None
            try:
                with quiet(self._log):
                    self._torch = importlib.import_module("torch")
                    self._hf = importlib.import_module("transformers")
                    revision = spec.revision or None
                    self._tokenizer = self._hf.AutoTokenizer.from_pretrained(spec.tokenizer or spec.model,
                                                                             revision=revision)
                    self._model = self._load(spec, revision).eval()
            except FAULTS as fault:
                raise StartError(f"transformers cannot load {spec.model}: {str(fault).strip().splitlines()[0]}; "
                                 "if it is memory: another dtype or quantization, device_map=auto over more GPUs"
                                 ) from fault
            self._closing = stack.pop_all()
        eos = getattr(self._model.generation_config, "eos_token_id", None)
        self._ends = answers.ends(self._tokenizer, eos, spec.eos)
        self._pad = next((n for n in (self._tokenizer.pad_token_id, *sorted(self._ends.ids)) if n is not None), 0)
        # Other defaults of the model's own (repetition_penalty, top_k) are not part of a recipe: no engine has them.
        self._model.generation_config = self._hf.GenerationConfig(pad_token_id=self._pad)
        self._vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        self.settings: Mapping[str, Any] = {
            "torch": metadata.version("torch"), "transformers": metadata.version("transformers"),
            "device": str(self._model.device), "dtype": str(self._model.dtype).removeprefix("torch."),
            "quantization": spec.args.get("quantization"), "attention": self._model.config._attn_implementation,
            "batch_size": self._size, "max_model_len": self._limit, "args": dict(spec.args),
            "eos_token_ids": sorted(self._ends.ids), "eos_texts": list(self._ends.texts),
        }

    def _load(self, spec: EngineSpec, revision: str | None) -> Any:
        torch, args = self._torch, spec.args
        config = self._hf.AutoConfig.from_pretrained(spec.model, revision=revision)
        dtype: Any = args.get("dtype", "auto")
        if dtype == "auto" and str(getattr(config, "dtype", "")).endswith("float32"):
            dtype = "bfloat16"  # as vLLM's `auto`, so that both engines run the same weights
        given: dict[str, Any] = {key: args[key] for key in ("attn_implementation", "device_map") if key in args}
        if quantization := args.get("quantization"):
            if quantization not in BITS:
                raise UnknownName("quantization of hf", quantization, BITS)
            given["quantization_config"] = self._hf.BitsAndBytesConfig(**{BITS[quantization]: True})
        device = args.get("device", "cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and torch.cuda.device_count() > 1:
            given.setdefault("device_map", "auto")
        model = self._hf.AutoModelForCausalLM.from_pretrained(
            spec.model, revision=revision, dtype=dtype, config=config, **given)
        return model if "device_map" in given or quantization else model.to(device)

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        waiting = iter(requests)
        while window := list(islice(waiting, 8 * self._size)):
            able = []
            for request in window:
                if (refused := answers.refuse(request, self._limit, self._vocabulary)) is not None:
                    yield refused
                else:
                    able.append(request)
            for batch in _alike(able, self._size):
                yield from self._guarded(batch)

    def close(self) -> None:
        del self._model
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()
        self._closing.close()

    def _guarded(self, batch: list[Request]) -> list[Completion]:
        """A batch that raises is asked again one by one; one that raises alone is its Completion's error."""
        try:
            with quiet(self._log), self._torch.inference_mode():
                return self._generate(batch) if isinstance(batch[0].ask, Generate) else self._choose(batch)
        except FAULTS as fault:  # out of memory is a RuntimeError
            if len(batch) > 1:
                return [completion for request in batch for completion in self._guarded([request])]
            return [Completion(batch[0].key, finish="error", n_prompt=len(batch[0].tokens),
                               error=f"transformers: {str(fault).strip().splitlines()[0]}")]

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        width = max(len(row) for row in rows)
        ids = [[self._pad] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        device = self._model.device
        return {"input_ids": self._torch.tensor(ids, device=device),
                "attention_mask": self._torch.tensor(mask, device=device)}

    def _choose(self, batch: list[Request]) -> list[Completion]:
        asks = [(at, prefix, ids) for at, request in enumerate(batch) if isinstance(request.ask, Choose)
                for prefix, ids in answers.questions(request.ask).items()]
        known: list[dict[answers.Ids, dict[int, float]]] = [{} for _ in batch]
        for begin in range(0, len(asks), self._size):
            part = asks[begin:begin + self._size]
            inputs = self._padded([[*batch[at].tokens, *prefix] for at, prefix, _ in part])
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits = self._model(**inputs, position_ids=positions, logits_to_keep=1, use_cache=False).logits
            scores = logits[:, -1].float().log_softmax(-1)
            for row, (at, prefix, ids) in enumerate(part):
                known[at][prefix] = dict(zip(ids, scores[row, list(ids)].tolist(), strict=True))
        return [answers.chosen(request, found) for request, found in zip(batch, known, strict=True)]

    def _generate(self, batch: list[Request]) -> list[Completion]:
        inputs = self._padded([request.tokens for request in batch])
        width = inputs["input_ids"].shape[1]
        rows = _Rows(self._torch, batch, width, self._ends, self._limit, self._tokenizer)
        made = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=max(rows.room), pad_token_id=self._pad,
            logits_processor=self._hf.LogitsProcessorList([rows.draw]),
            stopping_criteria=self._hf.StoppingCriteriaList([rows.ended]),
        )
        return [
            answers.read_answer(self._tokenizer, request, made[row, width:width + rows.length[row]].tolist(),
                                self._ends, self._limit)
            for row, request in enumerate(batch)
        ]


class _Rows:
    """What is each row's own in a batch: room for tokens, stops, generator; the two hooks that generate() calls."""

    def __init__(self, torch: Any, batch: list[Request], width: int, ends: answers.Ends, limit: int,
                 tokenizer: Any) -> None:
        self._torch, self._width, self._ends, self._tokenizer = torch, width, ends, tokenizer
        self._asks = [request.ask for request in batch if isinstance(request.ask, Generate)]
        self.room = [min(ask.max_tokens, limit - len(request.tokens))
                     for ask, request in zip(self._asks, batch, strict=True)]
        self.length = list(self.room)  # tokens of each row when it ended
        self._over = [False] * len(batch)
        self._dice: list[Any] = [None] * len(batch)

    def draw(self, _: Any, scores: Any) -> Any:
        """Puts the token drawn for a sampled row above all others; greedy rows stay as they are."""
        for row, ask in enumerate(self._asks):
            if ask.temperature <= 0 or self._over[row]:
                continue
            if self._dice[row] is None:
                self._dice[row] = self._torch.Generator(scores.device)
                if ask.seed is None:
                    self._dice[row].seed()
                else:
                    self._dice[row].manual_seed(ask.seed)
            shares, tokens = (scores[row].float() / ask.temperature).softmax(-1).sort(descending=True)
            shares[shares.cumsum(-1) - shares >= ask.top_p] = 0.0  # the smallest set that reaches top_p
            token = tokens[self._torch.multinomial(shares, 1, generator=self._dice[row])]
            scores[row] = -self._torch.inf
            scores[row, token] = 0.0
        return scores

    def ended(self, ids: Any, _: Any) -> Any:
        """Which rows need not go on: out of room, at an end token or a stop. What comes after is not read."""
        for row, ask in enumerate(self._asks):
            if self._over[row]:
                continue
            new = ids[row, self._width:].tolist()
            self._over[row] = len(new) >= self.room[row] or answers.ends_with_stop(new, ask, self._ends)
            if not self._over[row] and (texts := (*ask.stop, *self._ends.texts)):
                text = answers.decode(self._tokenizer, (), new)
                self._over[row] = any(stop in text for stop in texts)
            if self._over[row]:
                self.length[row] = len(new)
        return self._torch.tensor(self._over, device=ids.device)


def _alike(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """Batches of one kind and of like length, the longest answers first: few rows wait, little is padding."""
    def room(request: Request) -> int:
        return request.ask.max_tokens if isinstance(request.ask, Generate) else 0

    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: (-room(r), -len(r.tokens))):
        first = batches[-1][0] if batches else request
        like = (room(first) > 0) == (room(request) > 0) and len(first.tokens) <= 2 * len(request.tokens) + 64
        if batches and like and len(batches[-1]) < size:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches
