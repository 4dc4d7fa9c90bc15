"""How an answer is read from its token ids. The tokenizer here writes one word a token, blank in front."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from evalkit.engines import answers
from evalkit.types import Choose, Generate, Request

WORDS = ["<s>", "</s>", " a", " b", "\n", " def", " x", "<|end|>"]
SPECIAL = {0, 1, 7}


class Words:
    """Loses the leading blank of a text, as LLaMA's tokenizer does."""

    eos_token_id = 1
    added_tokens_decoder = {0: "<s>", 1: "</s>", 7: "<|end|>"}  # noqa: RUF012

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False,
               clean_up_tokenization_spaces: bool = False) -> str:
        kept = [WORDS[i] for i in ids if not (skip_special_tokens and i in SPECIAL)]
        return "".join(kept).removeprefix(" ")


ENDS = answers.Ends(frozenset({1}), ("STOP",))
PROMPT = [0, 2, 3]


def read(ids: list[int], ask: Generate, limit: int = 100) -> answers.Completion:
    return answers.read_answer(Words(), Request("k", "c", "s", 0, PROMPT, ask), ids, ENDS, limit)


def test_text_keeps_its_leading_blank_and_loses_the_end_token() -> None:
    done = read([3, 6, 1], Generate(10))
    assert (done.text, done.finish, done.stop, done.n_prompt, done.n_generated) == (" b x", "eos", "", 3, 3)


def test_first_of_several_token_stops_wins_and_is_named() -> None:
    ask = Generate(10, stop_tokens=((4, 5), (6,)))
    done = read([3, 4, 4, 5, 6], ask)
    assert (done.text, done.finish, done.stop) == (" b\n", "stop", "\n def")
    assert read([3, 6, 4, 5], ask).stop == "x"


def test_a_stop_sequence_needs_all_its_tokens() -> None:
    done = read([4, 3, 4], Generate(3, stop_tokens=((4, 5),)))
    assert (done.text, done.finish) == ("\n b\n", "max_tokens")


@pytest.mark.parametrize(("ids", "expected"), [
    ([2, 6, 3], (" a", "stop", " x")),
    ([2, 1, 6], (" a", "eos", "")),  # the end token came first
    ([2, 4, 5, 6], (" a", "stop", "\n def")),  # so did the token-level stop
    ([2, 3, 3, 3], (" a b b b", "max_tokens", "")),
])
def test_whatever_comes_first_ends_the_answer(ids: list[int], expected: tuple[str, str, str]) -> None:
    done = read(ids, Generate(4, stop=(" x",), stop_tokens=((4, 5),)))
    assert (done.text, done.finish, done.stop) == expected


def test_an_end_of_turn_text_counts_as_the_models_end() -> None:
    words = [*WORDS[:6], " STOP here", WORDS[7]]
    tokenizer = Words()
    tokenizer.decode = lambda ids, **_: "".join(words[i] for i in ids if i not in SPECIAL)  # type: ignore[method-assign]
    done = answers.read_answer(tokenizer, Request("k", "c", "s", 0, PROMPT, Generate(9)), [2, 6], ENDS, 100)
    assert (done.text, done.finish, done.stop) == (" a ", "eos", "")


def test_out_of_context_and_out_of_tokens_differ() -> None:
    assert read([2, 2], Generate(3), limit=5).finish == "context"
    assert read([2, 2, 2], Generate(3), limit=6).finish == "max_tokens"


def test_an_answer_that_ended_for_no_reason_is_an_error() -> None:
    done = read([2, 2], Generate(3))
    assert (done.finish, done.text) == ("error", "") and "without a reason" in done.error


def test_ends_takes_added_tokens_as_ids_and_other_texts_as_texts() -> None:
    assert answers.ends(Words(), [5, 6], ("<|end|>", "USER:")) == answers.Ends(frozenset({1, 5, 6, 7}), ("USER:",))
    assert answers.ends(SimpleNamespace(eos_token_id=None, added_tokens_decoder={}), None, ()) == answers.Ends(
        frozenset())


@pytest.mark.parametrize(("tokens", "ask", "finish", "error"), [
    ([2] * 10, Generate(5), "context", ""),
    ([2] * 10, Choose(((2,),)), "error", "prompt and option have 11 tokens, over max_model_len=10"),
    ([2] * 8, Choose(((2,), (2, 3, 4))), "error", "prompt and option have 11 tokens"),
    ([2, 8], Generate(5), "error", "token ids 2 to 8 are not all in the vocabulary of 8"),
    ([2], Choose(((2,), (-1,))), "error", "token ids -1 to -1"),
    ([], Generate(5), "error", "no tokens"),
    ([2], Generate(0), "error", "max_tokens is 0"),
])
def test_refused_requests(tokens: list[int], ask: Generate | Choose, finish: str, error: str) -> None:
    refused = answers.refuse(Request("k", "c", "s", 0, tokens, ask), 10, 8)
    assert refused is not None
    assert (refused.key, refused.finish, refused.text, refused.n_prompt) == ("k", finish, "", len(tokens))
    assert error in refused.error and bool(error) == bool(refused.error)


def test_a_request_that_just_fits_is_not_refused() -> None:
    for ask in (Generate(5), Choose(((2,),))):
        assert answers.refuse(Request("k", "c", "s", 0, [2] * 9, ask), 10, 8) is None


def test_options_of_several_tokens_are_sums_over_their_prefixes() -> None:
    ask = Choose(((2,), (3, 4), (3, 5, 6)))
    assert answers.questions(ask) == {(): (2, 3), (3,): (4, 5), (3, 5): (6,)}
    known = {(): {2: -1.0, 3: -0.5}, (3,): {4: -2.0, 5: -0.25}, (3, 5): {6: -0.125}}
    done = answers.chosen(Request("k", "c", "s", 0, PROMPT, ask), known, n_cached=2)
    assert done.logprobs == (-1.0, -2.5, -0.875)
    assert (done.finish, done.n_cached, done.n_prompt) == ("choice", 2, 3)
