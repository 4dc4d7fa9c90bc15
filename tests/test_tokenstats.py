"""Statistics against counts made by hand, and one prompt shown whole."""

from __future__ import annotations

import json
import re
from itertools import chain, count, pairwise
from pathlib import Path

import pytest

from evalkit import plan, recipes, tokenstats
from evalkit.cli import main
from evalkit.models import resolve
from evalkit.prepare import folder
from evalkit.prompts import Rendered
from evalkit.types import RunSpec, Sample


def planned(model, **more) -> plan.Plan:
    return plan.make(RunSpec(model=str(model), format="tulu", data="sample", **more), weights=False)


def texts(column: plan.ColumnPlan) -> dict[str, list[bytes]]:
    """The prompts of each group; the tiny model's tokens are bytes, so that lengths can be counted here."""
    found: dict[str, list[bytes]] = {}
    for item in plan.rendered(column):
        found.setdefault(item.sample.group, []).append(item.text.encode())
    return found


def test_counts_are_those_of_the_bytes(tiny_model):
    (column,) = planned(tiny_model, tasks="bbh_direct").columns
    groups = texts(column)
    whole, *parts = tokenstats.measure(column, 16384)
    assert [part.group for part in parts] == list(groups) and len(groups) > 3 and whole.group is None
    for one, own in ((whole, [*chain(*groups.values())]), *zip(parts, groups.values(), strict=True)):
        sizes = sorted(map(len, own))
        assert (one.accepted, one.accepted_tokens, one.skipped, one.shots_dropped) == (len(own), sum(sizes), 0, 0)
        assert (one.min_tokens, one.max_tokens, one.avg_tokens) == (sizes[0], sizes[-1], sum(sizes) / len(sizes))
    for part, own in zip(parts, groups.values(), strict=True):
        shared = sum(next(i for i in count() if a[:i + 1] != b[:i + 1]) for a, b in pairwise(own))
        assert part.shared_prefix_tokens == shared > 0 and part.shared_prefix == shared / part.accepted_tokens
    assert whole.shared_prefix_tokens == sum(part.shared_prefix_tokens for part in parts)


def fake(monkeypatch, *prompts: tuple[str, list[int], int]):
    items = [Rendered(Sample(str(i), {}, group=group), "", tokenstats.array("i", ids), 5 - dropped, dropped)
             for i, (group, ids, dropped) in enumerate(prompts)]
    monkeypatch.setattr(tokenstats, "rendered", lambda column: iter(items))


def test_by_hand(tiny_model, monkeypatch):
    (column,) = planned(tiny_model, tasks="gsm_cot").columns
    fake(monkeypatch, ("a", [1, 2, 3, 4], 0), ("b", [1, 2, 3, 4], 0), ("a", [1, 2, 9], 2), ("a", [1] * 6, 1),
         ("a", [1, 2, 9, 9, 9], 0))
    whole, a, b = tokenstats.measure(column, 6)  # the prompt of 6 tokens leaves no room for an answer
    assert a == tokenstats.Stats("gsm_cot", "a", 3, 12, 1, 3, 5, 4.0, 2, 5, 5 / 12)  # 2 of 3 and 3 of 5 are shared
    assert b == tokenstats.Stats("gsm_cot", "b", 1, 4, 0, 4, 4, 4.0, 0, 0, 0.0)
    assert whole == tokenstats.Stats("gsm_cot", None, 4, 16, 1, 3, 5, 4.0, 2, 5, 5 / 16)
    assert str(whole).splitlines() == [
        "## Stats for 'gsm_cot' (5 samples)", "  Accepted: 4/5 (80.0%)", "  Accepted tokens: 16",
        "  Skipped: 1 (20.0%)", "  Min tokens per sample: 3", "  Max tokens per sample: 5",
        "  Avg tokens per sample: 4.000", "  Shots dropped: 2", "  Shared prefix tokens: 5 (31.2%)"]


def test_all_skipped(tiny_model, monkeypatch):
    (column,) = planned(tiny_model, tasks="gsm_cot").columns
    fake(monkeypatch, ("", [1, 2, 3], 0))
    (whole,) = tokenstats.measure(column, 3)  # one nameless group is no group
    assert (whole.accepted, whole.skipped, whole.min_tokens, whole.avg_tokens) == (0, 1, None, None)
    assert "  Avg tokens per sample: None" in str(whole)
    assert tokenstats.measure(column, None)[0].skipped == 0


def test_dropped_shots_of_real_questions(shared):
    """The paper's protocol: with LLaMA's tokenizer all 204 of this subject lose shots, 163 keep 3 and 41 keep 4."""
    spec = RunSpec(model="tulu-7b", tasks="mmlu_5shot", data=str(shared / "data/hub"),
                   sets=("mmlu.config=high_school_us_history",), tokenizer=str(shared / "data/tokenizers/tulu"))
    whole, group = tokenstats.measure(plan.make(spec, weights=False).columns[0], None)
    assert (whole.group, group.group, whole.accepted) == (None, "high_school_us_history", 204)
    assert group.shots_dropped == whole.shots_dropped == 163 * 2 + 41 * 1


def test_stats_command(tiny_model, capsys):
    command = ["stats", "--tasks", "gsm", "--model", str(tiny_model), "--format", "tulu", "--data", "sample"]
    assert main([*command, "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("## Stats for 'gsm_cot' (3 samples)") == 1 and out.count("  Accepted: 3/3 (100.0%)") == 2
    assert main([*command, "--limit", "3", "--json"]) == 0
    assert [json.loads(line)["column"] for line in capsys.readouterr().out.splitlines()] == ["gsm_direct", "gsm_cot"]
    assert main([*command, "--tokenizer", "none"]) == 2
    assert "--tokenizer none: statistics count tokens" in capsys.readouterr().err


def shown(capsys, *command: str) -> list[str]:
    assert main(["prompts", *command]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture(params=["llama", "embedded"])
def real(request) -> list[str]:
    if request.param == "llama":
        return ["--model", "tulu-7b", "--tokenizer", str(request.getfixturevalue("shared") / "data/tokenizers/tulu")]
    if not (Path(folder("smollm2-135m-instruct")) / "config.json").is_file():
        pytest.skip("the embedded model is not prepared; `evalkit models prepare smollm2-135m-instruct`")
    return ["--model", resolve("smollm2-135m-instruct").path]


@pytest.mark.parametrize(("task", "sample"), [("tydiqa_gp", "korean-sample-1"), ("mmlu_5shot", "anatomy/test/1")])
def test_show_is_the_whole_prompt_in_100_columns(real, task, sample, capsys):
    command = [*real, "--data", "sample", "--tasks", task]
    (record,) = map(json.loads, shown(capsys, *command, "--ids", sample, "--json"))
    lines = shown(capsys, *command, "--show", sample)
    assert max(map(tokenstats._width, lines)) <= 100
    assert lines[0] == f"=== {task} {sample}: {record['n_tokens']} tokens, {record['n_shots']} shots ==="
    text = "".join(("\0" if line[0] == "|" else "") + line[2:] for line in lines[1:] if line[:2] in ("| ", ": "))
    assert text[1:].replace("⏎\0", "\n").removesuffix("▮") == record["text"]
    rows = lines[lines.index(""):]
    ids = [int(i) for row in rows[2::3] for i in row.split()]
    assert len(ids) == record["n_tokens"] and len(rows[1::3]) == len(rows[2::3])
    assert all(len(above.split()) == len(below.split()) for above, below in zip(rows[1::3], rows[2::3], strict=True))
    assert all(row.count("⏎") <= 2 and not re.search("⏎ +[^⏎ ]", row) for row in rows[1::3])


def test_show_marks_what_is_special_and_says_what_is_asked(shared, capsys):
    tulu = ["--model", "tulu-7b", "--tokenizer", str(shared / "data/tokenizers/tulu"), "--data", "sample"]
    mmlu = shown(capsys, *tulu, "--tasks", "mmlu_0shot", "--show", "anatomy/test/0", "--recipe", "tulu-2023-11")
    assert "asked: log-probability of A = 319 ▁A, B = 350 ▁B, C = 315 ▁C, D = 360 ▁D" in mmlu
    assert mmlu[mmlu.index("") + 1].startswith("⟦<s>⟧ ␣<") and mmlu[mmlu.index("") + 2].startswith("1     529")
    codex = shown(capsys, *tulu, "--tasks", "codex_p10", "--show", "HumanEval/0")
    said = " ".join(codex).replace("   ", " ")
    assert re.search(r"asked: 20 texts of at most 512 tokens, temperature 0.8, top_p 0.95, seeds \d+ to \d+ ", said)
    assert "stops: 13 1990 (⏎ class), 13 1753 (⏎ def), 13 29937 (⏎ #), 13 361 (⏎ if), 13 2158 (⏎ print), 2" in said
    bbh = shown(capsys, *tulu, "--tasks", "bbh_cot", "--show", "bbh/snarks/0")
    assert "asked: 1 text of at most 512 tokens, greedy" in bbh


def test_show_without_tokenizer_and_of_nothing(tiny_model, capsys):
    command = ["--model", "tulu-7b", "--tokenizer", "none", "--data", "sample", "--tasks", "mmlu_0shot"]
    lines = shown(capsys, *command, "--show", "anatomy/test/0")
    assert lines[0].endswith(": no tokenizer, 0 shots ===") and lines[-1] == "asked: one of A, B, C, D"
    assert main(["prompts", *command, "--show", "anatomy/test/99"]) == 2
    assert "no sample 'anatomy/test/99'" in capsys.readouterr().err


def test_every_recipe_can_be_counted(tiny_model):
    for recipe in recipes.names():
        for column in planned(tiny_model, recipe=recipe, limit=1, tasks="gsm,codex").columns:
            assert tokenstats.measure(column, 16384)[0].accepted == 1
