"""What every engine on this machine shares, so that all read an answer alike: from its token ids.

    ids 13 13 1990 ... , stop_tokens ((13, 1990),)  ->  text "\n", finish "stop", stop "\nclass"

The text is decode(prompt + answer) less decode(prompt), special tokens skipped, as the original read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evalkit.extract import cut_text, cut_tokens
from evalkit.types import Choose, Completion, Generate, Request

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ends:
    """How the model ends a turn: single tokens, and end-of-turn texts that its tokenizer writes in pieces."""

    ids: frozenset[int]
    texts: tuple[str, ...] = ()


def ends(tokenizer: Any, generation_eos: int | Sequence[int] | None, extra: Sequence[str]) -> Ends:
    """The tokenizer's end, the generation config's, and the format's `extra` ones.

    An extra text is one token only if it was added to the vocabulary whole: an ordinary piece such as `USER`
    can also be written with other pieces, so it is looked for in the text.
    """
    ids = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    return Ends(
        frozenset(ids | {added[text] for text in extra if text in added}),
        tuple(text for text in extra if text and text not in added),
    )


def refuse(request: Request, max_model_len: int, vocabulary: int) -> Completion | None:
    """The answer to a request that must not reach the model, None if it may."""
    tokens, ask = request.tokens, request.ask
    if not len(tokens):
        return Completion(request.key, finish="error", error="the prompt has no tokens")
    options = ask.options if isinstance(ask, Choose) else ()
    if isinstance(ask, Generate) and ask.max_tokens < 1:
        return Completion(request.key, finish="error", n_prompt=len(tokens),
                          error=f"max_tokens is {ask.max_tokens}: nothing is asked for")
    for ids in (tokens, *options):
        if min(ids) < 0 or max(ids) >= vocabulary:
            return Completion(request.key, finish="error", n_prompt=len(tokens),
                              error=f"token ids {min(ids)} to {max(ids)} are not all in the vocabulary "
                                    f"of {vocabulary}")
    needed = len(tokens) + max((len(option) for option in options), default=1)
    if needed <= max_model_len:
        return None
    if isinstance(ask, Generate):
        return Completion(request.key, finish="context", n_prompt=len(tokens))
    return Completion(request.key, finish="error", n_prompt=len(tokens),
                      error=f"prompt and option have {needed} tokens, over max_model_len={max_model_len}")


def single_stops(ask: Generate) -> Ids:
    return tuple(ids[0] for ids in ask.stop_tokens if len(ids) == 1)


def ends_with_stop(ids: Sequence[int], ask: Generate, ends: Ends) -> bool:
    """Whether the newest token completes a token-level stop: the answer need not go on."""
    return ids[-1] in ends.ids or any(tuple(ids[-len(stop):]) == stop for stop in ask.stop_tokens)


def decode(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add after `prompt`: a leading blank stays, which decoding `ids` alone may lose."""
    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text([*prompt, *ids])[len(text(list(prompt))):]


def read_answer(
    tokenizer: Any, request: Request, ids: Sequence[int], ends: Ends, max_model_len: int, n_cached: int = 0
) -> Completion:
    """The Completion of the new token `ids` of a Generate request: cut at its stops, and why it ended.

    `n_generated` counts all that the model computed, the cut part and the end token too.
    """
    ask = request.ask
    assert isinstance(ask, Generate)
    kept, which = cut_tokens(ids, (*((token,) for token in sorted(ends.ids)), *ask.stop_tokens))
    text, stop = cut_text(decode(tokenizer, request.tokens, kept), (*ask.stop, *ends.texts))
    if stop:
        finish, stop = ("eos", "") if stop in ends.texts and stop not in ask.stop else ("stop", stop)
    elif which is not None:
        own = which - len(ends.ids)  # of ask.stop_tokens; an end token comes first
        finish, stop = ("stop", tokenizer.decode(list(ask.stop_tokens[own]))) if own >= 0 else ("eos", "")
    elif len(ids) >= ask.max_tokens:
        finish = "max_tokens"
    elif len(request.tokens) + len(ids) >= max_model_len:
        finish = "context"
    else:
        return Completion(request.key, finish="error", n_prompt=len(request.tokens), n_generated=len(ids),
                          error=f"the engine ended the answer after {len(ids)} tokens without a reason")
    return Completion(request.key, text, finish=finish, stop=stop, n_prompt=len(request.tokens),
                      n_cached=n_cached, n_generated=len(ids))


def questions(ask: Choose) -> dict[Ids, tuple[int, ...]]:
    """What has to be known to score the options exactly: after which prefix, the log-probs of which ids.

    `((319,), (350,))` asks `{(): (319, 350)}`; an option of n tokens asks at each of its n prefixes.
    """
    found: dict[Ids, dict[int, None]] = {}
    for option in ask.options:
        for at, token in enumerate(option):
            found.setdefault(tuple(option[:at]), {})[token] = None
    return {prefix: tuple(tokens) for prefix, tokens in found.items()}


def chosen(request: Request, known: Mapping[Ids, Mapping[int, float]], n_cached: int = 0) -> Completion:
    """The Completion of a Choose request from `known[prefix][id]`, natural logs over the whole vocabulary."""
    assert isinstance(request.ask, Choose)
    logprobs = tuple(
        sum(known[tuple(option[:at])][token] for at, token in enumerate(option))
        for option in request.ask.options
    )
    return Completion(request.key, logprobs=logprobs, finish="choice", n_prompt=len(request.tokens),
                      n_cached=n_cached, n_generated=1)
