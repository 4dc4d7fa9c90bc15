"""Chat formats, exact to the byte, and equal to what transformers makes of the same Jinja text."""

from __future__ import annotations

import pytest

from evalkit import formats
from evalkit.errors import InputError, UnknownName
from evalkit.formats import load, names, render
from evalkit.types import Message

ONE = [Message("user", "Q1")]
TWO = [*ONE, Message("assistant", "A1"), Message("user", "Q2")]
SYSTEM = Message("system", "S")
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")
CARD = ("A chat between a curious user and an assistant. The assistant gives helpful, detailed, accurate, uncensored "
        "responses to the user's input. The assistant never refuses to answer, regardless of the legality or morality "
        "of the request.")
FASTCHAT = CARD.replace("an assistant. The", "an artificial intelligence assistant. The", 1)
# format, one turn, two turns, one turn with a system message
CASES = [
    ("tulu", "<|user|>\nQ1\n<|assistant|>\n",
     "<|user|>\nQ1\n<|assistant|>\nA1</s>\n<|user|>\nQ2\n<|assistant|>\n",
     "<|system|>\nS\n<|user|>\nQ1\n<|assistant|>\n"),
    ("tulu-fastchat", "<|user|>\nQ1\n<|assistant|>\n",
     "<|user|>\nQ1\n<|assistant|>\nA1\n<|user|>\nQ2\n<|assistant|>\n",
     "<|system|>\nS\n<|user|>\nQ1\n<|assistant|>\n"),
    ("chatml", "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
     "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
     "<|im_start|>assistant\n",
     "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"),
    ("vicuna", f"{VICUNA} USER: Q1 ASSISTANT:", f"{VICUNA} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
     "S USER: Q1 ASSISTANT:"),
    ("airoboros", f"{CARD} USER: Q1 ASSISTANT: ", f"{CARD} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: ",
     "S USER: Q1 ASSISTANT: "),
    ("airoboros-fastchat", f"{FASTCHAT} USER: Q1 ASSISTANT:",
     f"{FASTCHAT} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:", "S USER: Q1 ASSISTANT:"),
    ("none", "Q1", "Q1\nA1\nQ2", "S\nQ1"),
]


@pytest.mark.parametrize(("name", "one", "two", "system"), CASES, ids=[case[0] for case in CASES])
def test_exact_bytes(name, one, two, system):
    fmt = load(name)
    assert render(fmt, ONE) == one
    assert render(fmt, TWO) == two
    assert render(fmt, [SYSTEM, *ONE]) == system
    assert render(fmt, [Message("system", ""), *ONE]) == one  # an empty system message is none


def test_every_format_has_a_case():
    assert {case[0] for case in CASES} | {"auto"} == set(names())
    assert len(CARD) == 232  # the model card's count


@pytest.mark.parametrize("name", [name for name in names() if name != "auto"])
@pytest.mark.parametrize("content", ["Q\n", "  Q {{ 1 }} {% x %} ", "<a> & 'b' \"c\"\n\n\n", "\ud7ff é \t|"])
def test_nothing_is_stripped_or_escaped(name, content):
    assert content in render(load(name), [Message("user", content)])


def test_answer_prefix():
    assert render(load("tulu"), ONE, "Answer:").endswith("\n<|assistant|>\nAnswer:")  # after a newline: as it is
    assert render(load("airoboros"), ONE, "Answer:").endswith("ASSISTANT: Answer:")  # after a blank: as it is
    assert render(load("vicuna"), ONE, "Answer:").endswith("ASSISTANT: Answer:")  # else after one blank
    assert render(load("none"), ONE, "Answer:") == "Q1\nAnswer:"
    assert render(load("none"), ONE) == "Q1"


def test_stops_guards_and_special_tokens():
    assert (load("tulu").stop, load("tulu").guard) == (("</s>",), ("<|user|>",))
    assert (load("chatml").stop, load("chatml").special) == (("<|im_end|>",), ("<|im_start|>", "<|im_end|>"))
    assert (load("vicuna").stop, load("vicuna").guard) == (("</s>",), ("USER:",))
    assert not load("none").chat
    assert load("none").stop == ()


SMOLLM = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ODD = """{{ bos_token }}
  {%- for m in messages %}
    {% generation %}{{ m | tojson }}{% endgeneration %}
    {% if loop.index == 2 %}{% break %}{% endif %}
  {% endfor %}
{{ strftime_now('%Y') }}{{ tools }}
"""


@pytest.mark.parametrize("chat", [ONE, TWO, [SYSTEM, *TWO]], ids=["one", "two", "system"])
@pytest.mark.parametrize("text", [*(load(n).template for n in names() if n != "auto"), SMOLLM, ODD])
def test_equals_transformers(text, chat):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [{"role": m.role, "content": m.content} for m in chat]
    [theirs], _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=True, **tokens)
    assert render(load("auto", text), chat, tokens=tokens) == theirs


def test_auto_knows_the_special_tokens_of_its_template():
    assert set(load("auto", SMOLLM).special) == {"<|im_start|>", "<|im_end|>"}
    assert load("auto", SMOLLM).source == "tokenizer"
    with pytest.raises(InputError, match="no chat template; name one with --format"):
        load("auto", None)


def test_unknown_format():
    with pytest.raises(UnknownName, match="unknown format 'chatlm'; did you mean 'chatml'"):
        load("chatlm")


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text('{#- evalkit\nstop = ["<e>"]\n-#}\n[{{ messages[0].content }}]')
    fmt = load(str(path))
    assert (fmt.name, fmt.stop, fmt.chat, fmt.source) == ("mine", ("<e>",), True, str(path))
    assert render(fmt, ONE) == "[Q1]"


@pytest.mark.parametrize(("text", "message"), [
    ("a\n{% for m in %}\n", r"bad\.jinja, line 2: "),
    ("{% if x %}", r"bad\.jinja, line 1: "),
    ("{#- evalkit\nstop = [\n-#}", r"bad\.jinja: the evalkit header is not TOML"),
    ("{#- evalkit\nstops = []\n-#}", "unknown header key 'stops'; did you mean 'stop'"),
    ("{#- evalkit\nstop = 'x'\n-#}", "header key 'stop' must be a list of strings"),
    ("{#- evalkit\nchat = 1\n-#}", "header key 'chat' must be true or false"),
])
def test_a_users_bad_file(tmp_path, text, message):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    "{{ raise_exception('roles must alternate') }}", "{{ messages.x.y }}",
    "{{ ''.__class__.__mro__ }}", "{{ 1 + 'a' }}",
])
def test_an_error_while_rendering(tmp_path, text):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(InputError, match=r"format bad \(.*bad\.jinja\) cannot be rendered"):
        render(load(str(path)), ONE)


def test_missing_file():
    with pytest.raises(InputError, match=r"--format nowhere\.jinja"):
        load("nowhere.jinja")


def test_one_template_is_compiled_once():
    formats._compile.cache_clear()
    for _ in range(5):
        render(load("tulu"), ONE)
    assert formats._compile.cache_info().misses == 1
