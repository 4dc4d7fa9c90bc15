"""The transformers engine on a random two-layer model, float32, so that batched and single answers are equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evalkit.engines import EngineSpec, StartError, answers, create
from evalkit.engines.hf import HuggingFace, _alike
from evalkit.errors import InputError, UnknownName
from evalkit.types import Ask, Choose, Completion, Generate, Request

pytest.importorskip("torch")
LIMIT = 96


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("random-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, path)
    config = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=LIMIT, bos_token_id=0, eos_token_id=1)
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    model = LlamaForCausalLM(config)
    torch.random.set_rng_state(state)
    for weight in model.parameters():
        weight.data *= 8  # far from uniform, so that greedy answers are not all ties
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "repetition_penalty": 5.0}))
    return path


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HuggingFace]:
    log = tmp_path_factory.mktemp("log") / "engine.log"
    made = create("hf", EngineSpec(str(folder), max_model_len=LIMIT, args={"dtype": "float32", "batch_size": "4",
                                                                           "device": "cpu"}, log=log))
    assert isinstance(made, HuggingFace)
    yield made
    made.close()


def prompt(n: int, start: int = 40) -> list[int]:
    return [0, *((start + 7 * i) % 250 + 2 for i in range(n - 1))]


def ask(engine: HuggingFace, *pairs: tuple[list[int], Ask]) -> list[Completion]:
    requests = [Request(str(i), "c", f"s/{i}", 0, tokens, what) for i, (tokens, what) in enumerate(pairs)]
    done = {c.key: c for c in engine.complete(iter(requests))}
    assert len(done) == len(pairs)
    return [done[str(i)] for i in range(len(pairs))]


def greedy(engine: HuggingFace, tokens: list[int], n: int) -> list[int]:
    """The plain loop: the whole sequence through the model for every token, no cache, no batch."""
    import torch

    ids = list(tokens)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(engine._model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(tokens):]


def reference(engine: HuggingFace, tokens: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return engine._model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)


def text(engine: HuggingFace, tokens: list[int], ids: list[int]) -> str:
    return answers.decode(engine._tokenizer, tokens, ids)


def test_choose_equals_the_full_log_softmax_for_prompts_of_any_length(engine: HuggingFace) -> None:
    prompts = [prompt(n, n) for n in (3, 20, 7, 41, 5)]
    for tokens, done in zip(prompts, ask(engine, *((p, Choose(((65,), (66,), (200,)))) for p in prompts)),
                            strict=True):
        assert done.logprobs == pytest.approx(reference(engine, tokens)[[65, 66, 200]].tolist(), abs=1e-4)
        assert (done.finish, done.n_prompt, done.n_generated) == ("choice", len(tokens), 1)


def test_options_of_several_tokens_are_exact(engine: HuggingFace) -> None:
    tokens = prompt(9)
    (done,) = ask(engine, (tokens, Choose(((65,), (66, 67, 68), (66, 90)))))
    first, second = reference(engine, tokens), reference(engine, [*tokens, 66])
    third = reference(engine, [*tokens, 66, 67])
    assert done.logprobs == pytest.approx(
        [float(first[65]), float(first[66] + second[67] + third[68]), float(first[66] + second[90])], abs=1e-4)


def test_a_batch_answers_as_each_row_alone(engine: HuggingFace) -> None:
    prompts = [prompt(n, n) for n in (12, 30, 17, 25)]
    done = ask(engine, *((p, Generate(6 + i)) for i, p in enumerate(prompts)))
    for i, (tokens, completion) in enumerate(zip(prompts, done, strict=True)):
        ids = greedy(engine, tokens, 6 + i)
        assert 1 not in ids
        assert completion.text == text(engine, tokens, ids)
        assert (completion.finish, completion.n_generated) == ("max_tokens", 6 + i)


def test_token_stops_text_stops_and_end_tokens(engine: HuggingFace, folder: Path) -> None:
    tokens = prompt(12, 12)
    ids = greedy(engine, tokens, 10)
    at = next(i for i in range(2, 9) if ids[i] not in ids[:i])
    sequence, single = (ids[at - 1], ids[at]), (ids[at],)
    long, short, never = ask(
        engine, (tokens, Generate(10, stop_tokens=(sequence,))), (tokens, Generate(10, stop_tokens=(single,))),
        (tokens, Generate(10, stop_tokens=((ids[at], ids[at]),))))
    assert (long.text, long.finish, long.n_generated) == (text(engine, tokens, ids[:at - 1]), "stop", at + 1)
    assert (short.text, short.finish, short.n_generated) == (text(engine, tokens, ids[:at]), "stop", at + 1)
    assert long.stop == engine._tokenizer.decode(list(sequence))
    assert never.finish == "max_tokens"
    ended = answers.Ends(frozenset({ids[at]}))
    before, engine._ends = engine._ends, ended
    (eos,) = ask(engine, (tokens, Generate(10)))
    engine._ends = before
    assert (eos.text, eos.finish, eos.n_generated) == (text(engine, tokens, ids[:at]), "eos", at + 1)


def test_text_stop_is_cut_and_ends_the_row(engine: HuggingFace) -> None:
    for start in range(12, 60):  # a prompt whose answer has a character of its own, not half of one
        tokens = prompt(12, start)
        whole = text(engine, tokens, greedy(engine, tokens, 10))
        seen = [i for i in range(1, len(whole)) if whole[i].isascii() and whole.index(whole[i]) == i]
        if seen:
            break
    stop = whole[seen[0]]
    (done,) = ask(engine, (tokens, Generate(10, stop=("never there", stop))))
    assert (done.text, done.finish, done.stop) == (whole[:seen[0]], "stop", stop)
    assert done.n_generated <= 10


def test_the_context_ends_an_answer(engine: HuggingFace) -> None:
    full, over, choice = ask(engine, (prompt(LIMIT - 3), Generate(10)), (prompt(LIMIT), Generate(10)),
                             (prompt(LIMIT), Choose(((65,),))))
    assert (full.finish, full.n_generated) == ("context", 3)
    assert (over.finish, over.text, over.n_prompt) == ("context", "", LIMIT)
    assert choice.finish == "error" and "max_model_len=96" in choice.error


def test_sampling_depends_on_the_seed_and_on_nothing_else(engine: HuggingFace) -> None:
    tokens = prompt(10)
    rows = ask(engine, *((tokens, Generate(12, temperature=0.8, top_p=0.95, seed=seed)) for seed in (5, 6, 5, 7)),
               (prompt(30), Generate(12)))
    assert rows[0].text == rows[2].text
    assert len({row.text for row in rows[:4]}) == 3
    (alone,) = ask(engine, (tokens, Generate(12, temperature=0.8, top_p=0.95, seed=6)))
    assert alone.text == rows[1].text
    (cold,) = ask(engine, (tokens, Generate(12, temperature=0.8, top_p=1e-9, seed=5)))
    assert cold.text == text(engine, tokens, greedy(engine, tokens, 12))  # only the top token is left


def test_the_models_own_sampling_defaults_are_not_used(engine: HuggingFace) -> None:
    assert engine._model.generation_config.repetition_penalty in (None, 1.0)
    assert engine.settings["eos_token_ids"] == [1]


def test_one_request_that_raises_fails_alone(engine: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = engine._model.generate

    def faulty(**inputs: Any) -> Any:
        if (inputs["input_ids"] == 77).any():
            raise RuntimeError("out of memory\nand more")
        return generate(**inputs)

    monkeypatch.setattr(engine._model, "generate", faulty)
    good, bad, wrong = ask(engine, ([0, 50, 51], Generate(3)), ([0, 77, 51], Generate(3)), ([0, 999], Generate(3)))
    assert good.finish == "max_tokens"
    assert (bad.finish, bad.error, bad.text) == ("error", "transformers: out of memory", "")
    assert wrong.finish == "error" and "vocabulary of 258" in wrong.error


def test_batches_are_of_one_kind_and_like_length() -> None:
    asks: list[Ask] = [Generate(5), Choose(((2,),)), Generate(50)]
    requests = [Request(f"{i}{n}", "c", "s", 0, [1] * n, what) for i, what in enumerate(asks) for n in (10, 500, 20)]
    batches = [[(len(r.tokens), getattr(r.ask, "max_tokens", 0)) for r in batch] for batch in _alike(requests, 2)]
    assert batches == [[(500, 50)], [(20, 50), (10, 50)], [(500, 5)], [(20, 5), (10, 5)], [(500, 0)],
                       [(20, 0), (10, 0)]]


def test_what_cannot_be_started_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="engine option of hf 'dtyp'; did you mean 'dtype'"):
        create("hf", EngineSpec(str(folder), args={"dtyp": "half"}))
    with pytest.raises(InputError, match="batch_size=0: a whole number"):
        create("hf", EngineSpec(str(folder), args={"batch_size": "0"}))
    with pytest.raises(StartError, match="transformers cannot load"):
        create("hf", EngineSpec(str(tmp_path)))
