"""Each lint rule tripped by a format or tokenizer made for it, and silent on a right one; runs refused and allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evalkit import formats, lint, recipes
from evalkit.cli import main
from evalkit.errors import UnknownName
from evalkit.formats import Format
from evalkit.prompts import Writer
from evalkit.tokens import Tokenizer
from evalkit.types import Column, Message, Prompt, Sample, Task

LETTERS = ("A", "B", "C", "D")
TULU = formats.load("tulu").template
BARE_TAG = TULU.replace(r"{{- '<|assistant|>\n' -}}", "{{- '<|assistant|>' -}}")
AIROBOROS_CUT = formats.load("airoboros").template.replace("{{- ' ASSISTANT: ' -}}", "{{- ' ASSISTANT:' -}}")
OWN_TURNS = ("{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '[Q]' + m.content + '[R]' -}}"
             "{%- else -%}{{- GAP + m.content -}}{%- endif -%}{%- endfor -%}")


@pytest.fixture(scope="module")
def tokenizer(tiny_model, tmp_path_factory):
    """make(special tokens, BOS, whether it is added, merges) -> a byte-level tokenizer; equal ones are made once."""
    from tokenizers import Tokenizer as Raw
    from tokenizers.processors import TemplateProcessing

    made: dict[tuple, Tokenizer] = {}

    def make(special=(), bos="<s>", adds=False, merges=()) -> Tokenizer:
        key = (tuple(special), bos, adds, tuple(merges))
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("tokenizer")
        data = json.loads((tiny_model / "tokenizer.json").read_text())
        vocab = data["model"]["vocab"]
        for a, b in merges:
            vocab[a + b] = len(vocab)
        data["model"]["merges"] = [list(pair) for pair in merges]
        raw = Raw.from_str(json.dumps(data))
        raw.add_special_tokens(list(special))
        if adds:
            raw.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))])
        raw.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        made[key] = Tokenizer(str(folder))
        return made[key]

    return make


def writer(tok, fmt="tulu", kind="exact", prefill="", **switches) -> Writer:
    task = Task("riddles", 1, (), lambda row, ref, i: Sample(str(i), row),
                lambda s, shots, setting: Prompt((Message("user", s.fields["q"]),), prefill, len(shots)), kind)
    chosen = recipes.switch_values({"bos": "none", "max_tokens": 8, **switches}, "test") | {"benchmark": "riddles"}
    made = formats.load(fmt) if isinstance(fmt, str) else fmt
    return Writer(task, Column("riddles", "riddles", "Riddles", "riddles", chosen), made, tok)


def found(w: Writer, *questions: str, context=1000, options=(), shots=(), allow=()) -> list[lint.Finding]:
    linter = lint.Linter(context)
    for i, question in enumerate(questions or ("What has keys?",)):
        linter.see(w, w.render(Sample(f"r/{i}", {"q": question}, options=options), shots))
    return linter.findings(frozenset(allow))


def rules(*args, **kwargs) -> dict[str, str]:
    return {f.rule: f.severity for f in found(*args, **kwargs)}


def mine(template: str, **more) -> Format:
    return Format("mine", template, source="mine.jinja", **more)


BLANK_LETTERS = tuple(("Ġ", letter) for letter in LETTERS)
CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("fmt", [name for name in formats.names() if name != "auto"])
@pytest.mark.parametrize("bos", ["none", "tokenizer"])
def test_right_formats_are_silent(tokenizer, fmt, bos):
    for tok in (tokenizer(CHATML, adds=True, merges=BLANK_LETTERS), None):
        assert found(writer(tok, fmt, "choice", "The answer:", bos=bos), "One?", "Two?", options=LETTERS) == []


def test_bos_twice(tokenizer):
    fmt = mine("<s>" + TULU.partition("-#}")[2])
    once = tokenizer(), writer(tokenizer(adds=True), "tulu", bos="tokenizer")
    assert found(once[1]) == []
    assert rules(writer(tokenizer(adds=True), fmt, bos="tokenizer")) == {"bos-twice": "error"}
    assert rules(writer(once[0], mine("<s><s>" + fmt.template[3:]), bos="tokenizer"))["bos-twice"] == "error"
    assert rules(writer(once[0], fmt, bos="tokenizer")) == {}  # this tokenizer adds none, the format writes it


def test_bos_unwanted(tokenizer):
    fmt = mine("<s>" + TULU.partition("-#}")[2])
    assert rules(writer(tokenizer(), fmt)) == {"bos-unwanted": "error"}
    assert rules(writer(tokenizer(), fmt), allow=["bos-unwanted"]) == {"bos-unwanted": "warning"}
    for w in (writer(tokenizer(), "tulu"), writer(tokenizer(CHATML, bos="<|im_start|>"), "chatml"),  # BOS begins a turn
              writer(tokenizer(CHATML, bos="<|im_start|>"), mine(formats.load("chatml").template))):
        assert found(w) == []


def test_bos_missing(tokenizer):
    tok = tokenizer(adds=True)
    linter, sent = lint.Linter(None), writer(tok, bos="none")
    item = sent.render(Sample("r/0", {"q": "What has keys?"}), ())
    linter.see(writer(tok, bos="tokenizer"), item)
    assert [(f.rule, f.severity) for f in linter.findings()] == [("bos-missing", "error")]


def test_bos_inside(tokenizer):
    for tok, bos in ((tokenizer(), "none"), (tokenizer(adds=True), "tokenizer")):
        got = found(writer(tok, bos=bos), "A passage.", "<s> A passage that was cut.", "<s> Another.")
        assert [(f.rule, f.severity, f.count, f.example) for f in got] == [("bos-inside", "warning", 2, "r/1")]


def test_special_split(tokenizer):
    assert rules(writer(tokenizer(), "chatml")) == {"special-split": "error"}
    (finding,) = found(writer(tokenizer(CHATML[:1]), "chatml"))
    assert "<|im_end|> is < | i m _ e n d | >" in finding.text and "<|im_start|>" not in finding.text
    assert found(writer(tokenizer(), "chatml", chat=False)) == []


@pytest.mark.parametrize(("fmt", "severity"), [
    (mine(BARE_TAG), "error"),
    (mine("{{ messages[0].content }}\n<|assistant|>"), "error"),
    (mine("{{ messages[0].content }}<|im_start|>assistant"), "error"),
    (mine("{{ messages[0].content }}\n<|assistant|> "), "error"),
    (mine(AIROBOROS_CUT), "error"),
    (mine(OWN_TURNS.replace("GAP", "'\n'")), "error"),  # its own finished turns have a newline there
    (mine("[Q]{{ messages[0].content }}[R]"), "warning"),  # nothing to compare with
    (Format("auto", BARE_TAG), "warning"),  # the tokenizer's own
    (mine(OWN_TURNS.replace("GAP", "' '")), None),  # the answer's first token brings the blank
    (mine(OWN_TURNS.replace("GAP", "''")), None),
    (mine("{{ messages[0].content + '\n<|assistant|>\n' }}"), None),
])
def test_header_tail(tokenizer, fmt, severity):
    assert rules(writer(tokenizer(), fmt)) == ({"header-tail": severity} if severity else {})


def test_header_whose_blank_would_melt_into_it(tokenizer):
    glued = tokenizer(merges=[("]", "Ġ")])
    assert rules(writer(glued, mine(OWN_TURNS.replace("GAP", "' '")))) == {}  # byte level: blanks go to what follows
    assert "header-tail" in rules(writer(tokenizer(special=["[R] "]), mine(OWN_TURNS.replace("GAP", "' '"))))


def test_prefill_split(tokenizer):
    blank_t = tokenizer(merges=[("Ġ", "T")])
    (finding,) = found(writer(blank_t, "vicuna", prefill="The:"), "One?", "Two?")
    assert (finding.rule, finding.severity, finding.count) == ("prefill-split", "warning", 2)
    assert finding.text == "'The:' is T h e : alone, ĠT h e : here"
    assert found(writer(blank_t, "tulu", prefill="The:"), "One?", "Two?") == []


def test_option_tokens(tokenizer):
    blanks = tokenizer(merges=BLANK_LETTERS)
    choice = writer(blanks, "tulu", "choice", prefill="Answer:")
    assert found(choice, options=LETTERS) == []
    (torn,) = found(choice, options=("AA", "B"))
    assert (torn.rule, torn.severity) == ("option-tokens", "error") and "'AA' by 'A'" in torn.text
    assert rules(choice, options=("A", "A")) == {"option-tokens": "error"}
    assert rules(writer(tokenizer(), "tulu", "choice", prefill="Answer:"), options=LETTERS) == {
        "option-tokens": "warning"}  # the blank is a token of its own, and first


def test_over_context_follows_the_switch(tokenizer):
    n = len(writer(tokenizer()).render(Sample("r/0", {"q": "Why?"}), ()).tokens)
    for over, severity in (("fail", "error"), ("empty", "warning"), ("extend", "warning")):
        w = writer(tokenizer(), over_context=over)
        assert rules(w, "Why?", context=n) == {"over-context": severity}
        assert rules(w, "Why?", context=n + 7) == {"answer-room": "warning"}
        assert rules(w, "Why?", context=n + 8) == rules(w, "Why?", context=None) == {}
    choice = writer(tokenizer(merges=BLANK_LETTERS), kind="choice", prefill="A:")
    assert rules(choice, "Why?", options=LETTERS, context=n + 3) == {}  # one token is all that it asks for


def test_shots_dropped_and_duplicates(tokenizer):
    shots = (Sample("s/0", {"q": "x" * 50}),) * 2
    w = writer(tokenizer(), fit="wrapped", fit_tokens=5)
    assert [(f.rule, f.severity, f.count) for f in found(w, "One?", "Two?", "One?", shots=shots)] == [
        ("shots-dropped", "warning", 3), ("duplicate-prompts", "warning", 1)]
    assert found(writer(tokenizer(), fit="wrapped"), "One?", "Two?", shots=shots) == []


def test_notes_are_one_line_a_rule():
    a = lint.Finding("shots-dropped", "warning", "mmlu_5shot", "exemplars dropped to fit 2048 tokens", 522, "x")
    b = lint.Finding("shots-dropped", "warning", "gsm_cot", "exemplars dropped to fit 2048 tokens", 1, "y")
    c = lint.Finding("shots-dropped", "warning", "mine", "exemplars dropped to fit 9 tokens", 2, "z")
    assert lint.notes([a, b]) == ["shots-dropped: exemplars dropped to fit 2048 tokens (mmlu_5shot 522, gsm_cot 1)"]
    (both,) = lint.notes([a, c])
    assert both.startswith("shots-dropped: exemplars dropped to fit; in mmlu_5shot exemplars dropped to fit 2048")
    assert both.endswith(" (mmlu_5shot 522, mine 2)")


def test_rules_are_documented_and_allowed_by_name():
    assert lint.allowed({}) == frozenset()
    assert lint.allowed({"allow": "bos-twice, header-tail"}) == {"bos-twice", "header-tail"}
    with pytest.raises(UnknownName, match="unknown lint rule 'bos-twise'; did you mean 'bos-twice'"):
        lint.allowed({"allow": "bos-twise"})


# through the command line

@pytest.fixture
def bare_tag(tmp_path) -> Path:
    path = tmp_path / "bare.jinja"
    path.write_text(BARE_TAG)
    return path


def run(model, fmt, out, *more) -> int:
    return main(["run", "--model", str(model), "--format", str(fmt), "--tasks", "gsm,tydiqa_cb", "--data", "sample",
                 "--limit", "2", "--engine", "mock", "--out", str(out), "--name", "x", *more])


def test_an_error_stops_the_run_before_anything_is_kept(tiny_model, bare_tag, tmp_path, capsys):
    assert run(tiny_model, bare_tag, tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evalkit: ")]
    assert line.startswith("evalkit: lint header-tail in gsm_direct, 2 prompts, first gsm8k/main/test/")
    assert "(2 more: see `evalkit prompts --lint`); --allow header-tail runs it" in line
    assert not list((tmp_path / "out").rglob("run.json"))


def test_an_allowed_error_is_a_note(tiny_model, bare_tag, tmp_path, capsys):
    assert run(tiny_model, bare_tag, tmp_path / "out", "--allow", "header-tail") == 0
    assert "header-tail: " in capsys.readouterr().out
    record = json.loads(next((tmp_path / "out").rglob("run.json")).read_text())
    assert [(f["rule"], f["severity"], f["column"]) for f in record["lint"]] == [
        ("header-tail", "warning", name) for name in ("gsm_direct", "gsm_cot", "tydiqa_cb")]
    assert sum(note.startswith("header-tail: ") for note in record["notes"]) == 1
    assert record["spec"]["options"] == {"allow": "header-tail"}


def test_prompts_over_the_context_stop_a_strict_recipe_alone(tiny_model, tmp_path, capsys):
    short = ("--engine-args", "max_model_len=200")
    assert run(tiny_model, "tulu", tmp_path / "a", "--recipe", "clean", *short) == 2
    assert "--allow over-context" in capsys.readouterr().err
    assert run(tiny_model, "tulu", tmp_path / "b", "--recipe", "tulu-2023-11", *short) == 0
    notes = json.loads(next((tmp_path / "b").rglob("run.json")).read_text())["notes"]
    assert sum("over the context" in note for note in notes) == 1


def test_prompts_lint(tiny_model, bare_tag, capsys):
    command = ["prompts", "--lint", "--model", str(tiny_model), "--data", "sample", "--limit", "2", "--tasks", "gsm"]
    assert main([*command, "--format", "tulu"]) == 0 and capsys.readouterr().out == ""
    assert main([*command, "--format", str(bare_tag)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("error    header-tail") for line in lines)
    assert main([*command, "--format", str(bare_tag), "--allow", "header-tail", "--json"]) == 0
    assert {json.loads(line)["severity"] for line in capsys.readouterr().out.splitlines()} == {"warning"}
    assert main([*command, "--format", str(bare_tag), "--allow", "header"]) == 2
    assert "unknown lint rule 'header'; did you mean 'header-tail'" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", recipes.names())
def test_the_paper_s_tokenizer_has_notes_and_no_error(shared, recipe, capsys):
    code = main(["prompts", "--lint", "--json", "--model", "tulu-7b", "--data", "sample", "--recipe", recipe,
                 "--tokenizer", str(shared / "data/tokenizers/tulu")])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert {f["rule"] for f in found} <= {"bos-inside", "prefill-split", "answer-room"}
    assert ("bos-inside" in {f["rule"] for f in found}) == (recipe != "clean")
