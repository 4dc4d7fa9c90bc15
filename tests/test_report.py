"""Cells, Average and tables: from scores to what is printed."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import InputError, UnknownName
from evalkit.report import (
    average,
    metric,
    metrics_from_json,
    metrics_to_json,
    partial_mark,
    percent,
    published_row,
    render,
    render_run,
    table_from_runs,
)
from evalkit.types import Column, Completion, Health, Metric, Score

SWITCHES = {
    "average": "samples",
    "health_unparsed": 0.20,
    "health_truncated": 0.10,
    "health_empty": 0.05,
    "health_option_mass": 0.5,
    "health_failed": 0,
}
HEADERS = {
    "mmlu_0shot": "MMLU 0-shot",
    "mmlu_5shot": "MMLU 5-shot",
    "gsm_direct": "GSM Direct",
    "gsm_cot": "GSM CoT",
    "bbh_direct": "BBH Direct",
    "bbh_cot": "BBH CoT",
    "tydiqa_gp": "TydiQA Gold-Passage",
    "tydiqa_cb": "TydiQA Closed-book",
    "codex_p1": "Codex-Eval Pass@1",
    "codex_p10": "Codex-Eval Pass@10",
    "alpaca_farm": "AlpacaFarm vs Davinci-003",
}
BENCHMARKS = ("mmlu", "gsm", "bbh", "tydiqa", "codex", "alpaca_farm")
COLUMNS = [
    Column(name, name if name == "alpaca_farm" else name.split("_")[0], header, name, SWITCHES)
    for name, header in HEADERS.items()
]
CELL = COLUMNS[3]


def cell(name: str, value: float | None, half: float = 0.02, **more: Any) -> Metric:
    ends = (None, None) if value is None else (value - half, value + half)
    return replace(Metric(name, value, *ends, 100, 1, Health(n=100)), **more)


def scored(*values: float, status: str = "scored", group: str = "") -> list[Score]:
    return [Score(f"s{i}", status, v, group=group) for i, v in enumerate(values)]


def make_run(metrics: Mapping[str, Metric], model: str = "tulu-65b", **more: Any) -> dict[str, Any]:
    """What run.json and metrics.json hold together, as `table_from_runs` takes it."""
    recipe = {
        "name": "tulu-2023-06",
        "changed": [],
        "columns": [{"name": c.name, "benchmark": c.benchmark, "header": c.header} for c in COLUMNS],
        "benchmarks": list(BENCHMARKS),
    }
    base = {
        "model": {"name": model, "published": model},
        "recipe": recipe,
        "data": {"source": "hub"},
        "partial": {"limit": None, "ids": []},
        "notes": [],
        "time": {},
        "metrics": json.loads(json.dumps(metrics_to_json(metrics, average(metrics, COLUMNS, BENCHMARKS)))),
    }
    return {**base, **more}


def full_metrics(published: str = "tulu-65b") -> dict[str, Metric]:
    cells = published_row(published).cells
    return {name: cell(name, cells[name].value) for name in HEADERS}


# metric


def test_metric_of_all_samples() -> None:
    done = [Completion(str(i), "4", finish="eos") for i in range(4)]
    found = metric(CELL, scored(1.0, 0.0, 1.0, 1.0), done, 4, ("self-judged",))
    assert (found.value, found.n, found.reason, found.marks) == (0.75, 4, "", ("self-judged",))
    assert found.low == pytest.approx(0.3006, abs=1e-4) and found.high == pytest.approx(0.9544, abs=1e-4)


def test_metric_averages_as_the_column_says() -> None:
    scores = scored(1.0, 1.0, 1.0, group="a") + scored(0.0, group="b")
    by_group = replace(CELL, switches={**SWITCHES, "average": "groups"})
    assert metric(CELL, scores, [], 4).value == 0.75
    assert metric(by_group, scores, [], 4).value == 0.5
    assert metric(by_group, scores, [], 4).n_groups == 2
    with pytest.raises(InputError, match="gsm_cot: average = 'macro'"):
        metric(replace(CELL, switches={**SWITCHES, "average": "macro"}), scores, [], 4)


def test_failed_and_missing_samples_leave_no_value() -> None:
    scores = [*scored(1.0, 1.0), Score("gsm8k/main/test/3", "failed", None, verdicts=("worker died",))]
    found = metric(CELL, scores, [Completion("k", "x")] * 3, 3)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 2)
    assert found.reason == "1 of 3 samples failed (gsm8k/main/test/3: worker died)"
    assert found.marks == ("unhealthy: failed 33.3 %",) and found.health.failed == 1
    assert metric(CELL, scored(1.0), [], 40).reason == "39 of 40 samples have no score"
    assert metric(CELL, [], [], 0).reason == "no samples"
    with pytest.raises(ValueError, match="2 scores for 1 samples"):
        metric(CELL, scored(1.0, 1.0), [], 1)


def test_allow_missing_takes_the_rest_and_says_so() -> None:
    column = replace(CELL, switches={**SWITCHES, "allow_missing": True, "health_failed": 0.5})
    found = metric(column, [*scored(1.0, 0.0), Score("x", "failed", None)], [], 4)
    assert found.value == 0.5 and found.reason == "" and found.n == 2
    assert found.marks[-1] == "missing: 1 of 4 samples failed, 1 of 4 samples have no score"
    assert metric(column, [Score("x", "failed", None)], [], 1).value is None


def test_health_counts() -> None:
    completions = [
        Completion("1", " \n", finish="stop", stop="\n"),
        Completion("2", "a", finish="stop", stop="\n\n"),
        Completion("3", "a", finish="stop", stop="\n"),
        Completion("4", "a", finish="max_tokens"),
        Completion("5", "", finish="context"),
        Completion("6", finish="error", error="died"),
        Completion("7", logprobs=(math.log(0.5), math.log(0.3)), finish="choice"),
        Completion("8", logprobs=(math.log(0.1), math.log(0.1)), finish="choice"),
    ]
    scores = [*scored(0.0, 0.0, status="unparsed"), Score("x", "failed", None)]
    health = metric(CELL, scores, completions, 3).health
    assert health.stops == {"\n": 2, "\n\n": 1} and health.option_mass == pytest.approx(0.5)
    assert replace(health, stops={}, option_mass=None) == Health(8, 2, 2, 1, 1, 1)


OK = [Completion(str(i), "x") for i in range(100)]


def tripped(n: int, completion: Completion) -> tuple[str, ...]:
    return metric(CELL, scored(*[1.0] * 100), [*OK[n:], *[completion] * n], 100).marks


def test_each_threshold_trips_just_past_it() -> None:
    cut, empty = Completion("k", "x", finish="max_tokens"), Completion("k", " ")
    assert tripped(10, cut) == () and tripped(11, cut) == ("unhealthy: truncated 11 %",)
    assert tripped(5, empty) == () and tripped(6, empty) == ("unhealthy: empty 6 %",)
    died = Completion("k", finish="error", error="died")
    assert tripped(0, died) == () and tripped(1, died) == ("unhealthy: failed 1 %",)
    for n, marks in ((20, ()), (21, ("unhealthy: unparsed 21 %",))):
        scores = scored(*[1.0] * (100 - n)) + scored(*[0.0] * n, status="unparsed")
        assert metric(CELL, scores, OK, 100).marks == marks
    for mass, marks in ((0.5, ()), (0.34, ("unhealthy: option mass 34 %",))):
        asked = [Completion("k", logprobs=(math.log(mass / 2),) * 2, finish="choice")]
        assert metric(CELL, scored(1.0), asked, 1).marks == marks


def test_partial_mark() -> None:
    assert partial_mark(8, 200) == "partial: 8 of 200 samples"
    assert partial_mark(5, 1080, 5, 27) == "partial: 5 of 1080 samples, mean of 5 of 27 groups"
    assert partial_mark(200, 200) == partial_mark(1080, 1080, 27, 27) == ""


# Average


def test_average_of_published_cells(shared: Path) -> None:
    with (shared / "spec/published-rows.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["complete"] == "yes"]
    assert len(rows) == 7
    for row in rows:
        found = average({n: cell(n, float(row[n]) / 100) for n in HEADERS}, COLUMNS, BENCHMARKS)
        assert found.value is not None
        assert found.value * 100 == pytest.approx(float(row["average_recomputed_from_cells"]), abs=6e-4)
        assert abs(found.value * 100 - float(row["average"])) <= 0.05 + 0.05, row["model"]


def test_published_rows_are_the_known_ones(shared: Path) -> None:
    with (shared / "spec/published-rows.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "withdrawn" not in row["model"]]
    for row in rows:
        found = published_row(row["model"])
        given = {n: row[n] for n in [*HEADERS, "average"] if row[n]}
        assert {n: percent(m.value or 0.0) for n, m in found.cells.items()} == given
        assert row["source"] in found.notes[0]
    with pytest.raises(UnknownName, match="did you mean 'tulu-65b'"):
        published_row("tulu-66b")


def test_average_interval_by_propagation() -> None:
    columns = COLUMNS[:4]
    metrics = {
        c.name: cell(c.name, 0.5, half) for c, half in zip(columns, (0.01, 0.05, 0.02, 0.06), strict=True)
    }
    found = average(metrics, columns, ["mmlu", "gsm"])
    half = (
        math.hypot((0.01 + 0.05) / 2, (0.02 + 0.06) / 2) / 2
    )  # within a benchmark summed, between in squares
    assert found.value == 0.5 and (found.n, found.n_groups) == (400, 2)
    assert found.low == pytest.approx(0.5 - half) and found.high == pytest.approx(0.5 + half)
    skew = {n: replace(m, low=0.5) for n, m in metrics.items()}
    assert average(skew, columns, ["mmlu", "gsm"]).low == 0.5


def test_average_is_blank_with_the_reason_while_a_column_is_missing() -> None:
    metrics = full_metrics()
    del metrics["gsm_cot"], metrics["bbh_cot"]
    metrics["codex_p1"] = cell("codex_p1", None, reason="3 of 40 samples failed")
    found = average(metrics, COLUMNS, BENCHMARKS)
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.reason == (
        "no Average without GSM CoT, BBH CoT (not run); Codex-Eval Pass@1 (3 of 40 samples failed)"
    )
    assert average(full_metrics(), COLUMNS, [*BENCHMARKS, "toxigen"]).value is None


def test_average_carries_the_marks_of_its_columns() -> None:
    metrics = full_metrics()
    metrics = {
        n: replace(m, marks=(f"partial: 8 of {i} samples",)) for i, (n, m) in enumerate(metrics.items())
    }
    metrics["alpaca_farm"] = replace(metrics["alpaca_farm"], marks=("partial: x", "self-judged"))
    for name in ("gsm_cot", "bbh_cot"):
        metrics[name] = replace(
            metrics[name], marks=("partial: y", "unhealthy: truncated 34 %", "unhealthy: empty 9 %")
        )
    assert average(metrics, COLUMNS, BENCHMARKS).marks == ("partial", "unhealthy", "self-judged")


def test_metrics_json_gives_back_what_went_in() -> None:
    metrics = full_metrics()
    metrics["gsm_cot"] = metric(
        CELL, scored(1.0, 0.0), [Completion("k", "x", finish="stop", stop="\n")] * 2, 2, ("self-judged",)
    )
    mean = average(metrics, COLUMNS, BENCHMARKS)
    assert metrics_from_json(json.loads(json.dumps(metrics_to_json(metrics, mean)))) == (metrics, mean)


# tables


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0625, "6.3"), (0.4635, "46.4"), (0.46349999, "46.3"), (0.46349999999999997, "46.4"), (0.285, "28.5")],
)
def test_percent_rounds_once_and_ties_go_up(share: float, text: str) -> None:
    assert percent(share) == text
    assert [percent(x) for x in (0, 1, 1 / 3, 0.0005)] == ["0.0", "100.0", "33.3", "0.1"]


def test_average_is_rounded_from_unrounded_columns() -> None:
    metrics = {n: cell(n, 0.10044) for n in HEADERS}  # every cell prints 10.0
    metrics["mmlu_0shot"] = cell("mmlu_0shot", 0.10644)  # 10.6 by itself; the mean of printed cells is 10.05
    line = list(csv.reader(io.StringIO(render(table_from_runs([make_run(metrics)]), "csv"))))[1]
    assert line[1:3] == ["10.6", "10.0"] and line[-2] == "10.1"


def test_csv_is_a_header_and_a_line_a_run() -> None:
    part = {"gsm_cot": cell("gsm_cot", 0.5, marks=("unhealthy: truncated 34 %",))}
    runs = [make_run(full_metrics()), make_run(part, "tulu-7b", notes=["engine args: dtype=half"])]
    text = render(table_from_runs(runs), "csv")
    lines = list(csv.reader(io.StringIO(text)))
    assert lines[0] == ["model", *HEADERS.values(), "Average", "unhealthy"]
    assert lines[1] == [
        "tulu-65b",
        *["59.2", "61.1", "9.0", "60.0", "48.1", "53.5", "51.8", "13.3", "28.9", "45.9", "62.7", "46.4", ""],
    ]
    assert lines[2] == ["tulu-7b", "", "", "", "50.0", *[""] * 8, "gsm_cot"]
    assert len(lines) == 3 and text.endswith("\n") and "\r" not in text


def test_md_has_the_published_row_beneath_and_numbered_notes() -> None:
    metrics = full_metrics()
    metrics["gsm_cot"] = replace(
        metrics["gsm_cot"], marks=("partial: 8 of 200 samples", "unhealthy: empty 9 %")
    )
    metrics["bbh_cot"] = replace(metrics["bbh_cot"], marks=("partial: 8 of 200 samples",))
    run = make_run(
        metrics, data={"source": "sample"}, partial={"limit": 8, "ids": []}, notes=["format: tulu"]
    )
    run["recipe"]["changed"] = ["gsm.n_shot=4"]
    lines = render(table_from_runs([run]), "md").splitlines()
    heads, rule, ours, theirs = ([c.strip() for c in line.strip("|").split("|")] for line in lines[:4])
    assert heads == ["model", *HEADERS.values(), "Average"] and set("".join(rule)) == {"-"}
    assert ours[0] == "tulu-65b [1-4]" and ours[4] == "60.0 ±2.0 [5,6]" and ours[6] == "53.5 ±2.0 [5]"
    assert ours[12] == "46.4 ±0.8 [7,8]"
    assert theirs == [
        "tulu-65b, published [9]",
        *["59.2", "61.1", "9.0", "60.0", "48.1", "53.5", "51.8", "13.3", "28.9", "45.9", "62.7", "46.3"],
    ]
    assert [line.rstrip() for line in lines[5:]] == [
        "Percent; ± is the wider side of the 95 % interval.",
        "[1] partial (--limit 8): not comparable with a full run",
        "[2] sample data: rows invented for evalkit, not the benchmarks",
        "[3] recipe changed: gsm.n_shot=4",
        "[4] format: tulu",
        "[5] partial: 8 of 200 samples",
        "[6] unhealthy: empty 9 %",
        "[7] partial",
        "[8] unhealthy",
        "[9] published: model card allenai/tulu-65b, measured as tulu-2023-06",
    ]


def test_md_fits_a_terminal_when_asked() -> None:
    table = table_from_runs([make_run(full_metrics())])
    for width in (80, 120):
        text = render(table, "md", width)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert max(map(len, rows)) <= width and len(rows) % 4 == 0
        heads = [c.strip() for line in rows[::4] for c in line.strip("|").split("|")[1:]]
        assert len(heads) >= 12 and set(heads) >= {*HEADERS.values(), "Average"}
    assert len([line for line in render(table, "md").splitlines() if line.startswith("|")]) == 4


def test_a_cell_without_value_says_why() -> None:
    metrics = {**full_metrics(), "gsm_cot": cell("gsm_cot", None, reason="3 of 40 samples failed")}
    text = render(table_from_runs([make_run(metrics)]), "md")
    assert "| - [1] " in text and "[1] 3 of 40 samples failed" in text
    assert "[2] no Average without GSM CoT (3 of 40 samples failed)" in text


def test_json_keeps_shares_intervals_and_health() -> None:
    metrics = {**full_metrics(), "gsm_cot": metric(CELL, scored(1.0, 0.0, 0.0), OK[:3], 3)}
    data = json.loads(render(table_from_runs([make_run(metrics, notes=["format: tulu"])]), "json"))
    assert [c["header"] for c in data["columns"]] == [*HEADERS.values(), "Average"]
    ours, theirs = data["rows"]
    assert ours["cells"]["gsm_cot"]["value"] == 1 / 3 and ours["cells"]["gsm_cot"]["health"]["n"] == 3
    assert ours["cells"]["gsm_cot"]["low"] == pytest.approx(0.0615, abs=1e-4)
    assert ours["notes"] == ["format: tulu"] and (ours["model"], ours["published"]) == ("tulu-65b", False)
    assert theirs["published"] and theirs["cells"]["average"]["value"] == pytest.approx(0.463)


def test_own_columns_stand_after_average_and_rows_can_be_told_apart() -> None:
    own = make_run({**full_metrics(), "jokes": cell("jokes", 0.25)}, "mine")
    own["model"]["published"] = ""
    own["recipe"] = {**own["recipe"]}
    own["recipe"]["columns"] = [
        *own["recipe"]["columns"],
        {"name": "jokes", "benchmark": "jokes", "header": "Jokes"},
    ]
    other = {**own, "recipe": {**own["recipe"], "name": "clean"}}
    table = table_from_runs([own, other, own])
    assert list(table.columns.values())[-2:] == ["Average", "Jokes"]
    assert [row.label for row in table.rows] == [
        "mine (tulu-2023-06) #1",
        "mine (clean)",
        "mine (tulu-2023-06) #3",
    ]
    both = table_from_runs([make_run(full_metrics()), make_run(full_metrics())])
    assert [row.published for row in both.rows] == [False, False, True]


def test_latex_and_html() -> None:
    run = make_run({"gsm_cot": cell("gsm_cot", 0.5, marks=("self_judged & <odd>",))}, "a_b", notes=["50 %"])
    run["model"]["published"] = ""
    table = table_from_runs([run])
    latex, page = render(table, "latex"), render(table, "html")
    assert r"\begin{tabular}{lrr}" in latex and r"a\_b [1] & 50.0 $\pm$2.0 [2] & - [2,3] \\" in latex
    assert latex.count(r"\\") == 2 and "% [1] 50 %\n" in latex
    assert "<th>GSM CoT</th>" in page and "<td>50.0 ±2.0 [2]</td>" in page and "&amp; &lt;odd&gt;" in page
    with pytest.raises(UnknownName, match=r"unknown table format 'pdf'.*known: csv, html"):
        render(table, "pdf")


def test_one_run_a_line_a_column() -> None:
    metrics = full_metrics()
    health = Health(n=100, truncated=34, empty=2, context=1)
    metrics["gsm_cot"] = replace(
        metrics["gsm_cot"], health=health, marks=("unhealthy: truncated 34 %", "partial: x")
    )
    metrics["mmlu_0shot"] = replace(metrics["mmlu_0shot"], health=Health(n=100, option_mass=0.931))
    text = render_run(make_run(metrics))
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert (
        rows[0] == ["column", "%", "95 % interval", "n", "published", "health", "notes"] and len(rows) == 14
    )
    assert rows[2] == ["MMLU 0-shot", "59.2", "[57.2, 61.2]", "100", "59.2", "option mass 93.1 %", ""]
    gsm = [
        "GSM CoT",
        "60.0",
        "[58.0, 62.0]",
        "100",
        "60.0",
        "! truncated 34 %; empty 2, context 1",
        "[2]",
    ]
    assert rows[5] == gsm and rows[6][5] == "ok"
    assert rows[13] == ["Average", "46.4", "[45.5, 47.2]", "1100", "46.3", "", "[3,4]"]
    assert text.splitlines()[0] == "tulu-65b, recipe tulu-2023-06 [1]"
    assert "\n! unhealthy: past a threshold of the recipe  \n[1] published: model card" in text
    assert "unhealthy" not in render_run(make_run(full_metrics()))
    assert max(len(line) for line in text.splitlines()) <= 120
