"""Scores and completions -> Metric (a cell with interval and health) -> Table -> md, csv, json, latex, html.

    | model        | GSM Direct | GSM CoT       | Average |        [1] partial: 8 of 200 samples
    | tulu-65b [1] | 9.5 ±4.0   | 60.0 ±6.7 [2] | - [3]   |        [2] unhealthy: truncated 34 %

Values are shares, 0 to 1, everywhere; only what is printed here is in percent, rounded once, at the end.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
import tomllib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, UnknownName
from evalkit.stats import mean_interval
from evalkit.types import Column, Completion, Health, Metric, Score, Switches

FORMATS = ("md", "csv", "json", "latex", "html")
AVERAGE, AVERAGE_HEADER = "average", "Average"
LEGEND = "Percent; ± is the wider side of the 95 % interval."
BAD = "unhealthy: "  # how a mark about health begins
LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"±": r"$\pm$", "\\": r"\textbackslash{}"})
Json = Mapping[str, Any]


def metric(
    column: Column,
    scores: Sequence[Score],
    completions: Iterable[Completion],
    expected: int,
    marks: tuple[str, ...] = (),
) -> Metric:
    """The cell of `column` from its `expected` samples; `marks` stand before those about health.

    No value, but the reason, where a sample failed or has no score yet; the switch `allow_missing` takes the
    mean of the rest and marks it. Raises InputError for an `average` that is not `samples` or `groups`.
    """
    if len(scores) > expected:
        raise ValueError(f"{column.name}: {len(scores)} scores for {expected} samples")
    average = column.switches["average"]
    if average not in ("samples", "groups"):
        raise InputError(f"{column.name}: average = {average!r}; use 'samples' or 'groups'")
    have = [(s.value, s.group) for s in scores if s.status != "failed" and s.value is not None]
    health = measure_health(scores, completions)
    marks += tuple(BAD + what for what in unhealthy(health, len(scores), column.switches))
    reason = _missing(scores, expected)
    if reason and have and column.switches.get("allow_missing", False):
        marks, reason = (*marks, f"missing: {reason}"), ""
    if reason or not have:
        groups = len({group for _, group in have})
        reason = reason or ("no sample has a verdict" if scores else "no samples")
        return Metric(column.name, None, None, None, len(have), groups, health, reason, marks)
    values, names = zip(*have, strict=True)
    mean, low, high, groups = mean_interval(values, names, average == "groups")
    return Metric(column.name, mean, low, high, len(have), groups, health, marks=marks)


def _missing(scores: Sequence[Score], expected: int) -> str:
    failed = [s for s in scores if s.status == "failed"]
    why = next((f" ({s.sample}: {' '.join(s.verdicts)[:80]})" for s in failed if s.verdicts), "")
    parts = [f"{len(failed)} of {expected} samples failed{why}"] if failed else []
    if len(scores) < expected:
        parts.append(f"{expected - len(scores)} of {expected} samples have no score")
    return ", ".join(parts)


def measure_health(scores: Sequence[Score], completions: Iterable[Completion]) -> Health:
    """How the answers came about. `failed`: completions that are errors or, if more, failed samples."""
    finish: Counter[str] = Counter()
    stops: Counter[str] = Counter()
    mass, empty = array("d"), 0
    for c in completions:  # once: they may come from the disk
        finish[c.finish] += 1
        if c.finish == "choice":
            mass.append(math.fsum(map(math.exp, c.logprobs)))
        elif c.finish != "error":
            stops[c.stop] += c.finish == "stop"
            empty += not c.text.strip()
    return Health(
        n=finish.total(),
        unparsed=sum(s.status == "unparsed" for s in scores),
        empty=empty,
        truncated=finish["max_tokens"],
        context=finish["context"],
        failed=max(finish["error"], sum(s.status == "failed" for s in scores)),
        stops=dict(sorted((+stops).items())),
        option_mass=math.fsum(mass) / len(mass) if mass else None,
    )


def unhealthy(health: Health, n_samples: int, switches: Switches) -> list[str]:
    """What is past the recipe's `health_*` thresholds (all shares), as `truncated 34 %`."""
    n = max(1, health.n, health.failed)
    shares = {"truncated": health.truncated / n, "empty": health.empty / n, "failed": health.failed / n}
    shares["unparsed"] = health.unparsed / max(1, n_samples)
    found = [f"{k} {_short(s)} %" for k, s in shares.items() if s > switches[f"health_{k}"]]
    if health.option_mass is not None and health.option_mass < switches["health_option_mass"]:
        found.append(f"option mass {_short(health.option_mass)} %")
    return found


def partial_mark(n: int, of: int, groups: int = 0, of_groups: int = 0) -> str:
    """`partial: 8 of 1080 samples, mean of 8 of 27 groups`; "" for all. Leave groups out for a plain mean."""
    mean = f", mean of {groups} of {of_groups} groups" if groups < of_groups else ""
    return f"partial: {n} of {of} samples{mean}" if n < of or mean else ""


def average(metrics: Mapping[str, Metric], columns: Sequence[Column], benchmarks: Sequence[str]) -> Metric:
    """The mean over `benchmarks` of each one's mean over its columns, from unrounded values.

    Interval: columns of a benchmark share their samples, so their errors are added as if they always went
    together (conservative); benchmarks are independent, and their errors add in squares, each side by itself
    (MOVER, Zou and Donner 2008). No value, but the reason, while a column has none. `n` sums the samples.
    """
    sets = [[c for c in columns if c.benchmark == b] for b in benchmarks]
    wanted = [c for group in sets for c in group]
    have = {c.name: metrics[c.name] for c in wanted if c.name in metrics}
    marks, n = _average_marks(wanted, have), sum(m.n for m in have.values())
    lacking: dict[str, list[str]] = {}  # reason -> headers
    for c in wanted:
        if c.name not in have or have[c.name].value is None:
            lacking.setdefault(have[c.name].reason if c.name in have else "not run", []).append(c.header)
    reason = "; ".join(f"{', '.join(heads)} ({why})" for why, heads in lacking.items())
    if not reason and not (sets and all(sets)):
        reason = "a column of every benchmark it is to hold"
    if reason:
        reason = f"no Average without {reason}"
        return Metric(AVERAGE, None, None, None, n, len(sets), Health(), reason, marks)
    mean, low, high = (
        [math.fsum(getattr(have[c.name], side) for c in group) / len(group) for group in sets]
        for side in ("value", "low", "high")
    )
    value = math.fsum(mean) / len(sets)
    down, up = math.dist(mean, low) / len(sets), math.dist(high, mean) / len(sets)
    return Metric(AVERAGE, value, value - down, value + up, n, len(sets), Health(), marks=marks)


def _average_marks(columns: Sequence[Column], metrics: Mapping[str, Metric]) -> tuple[str, ...]:
    """The kinds of its columns' marks: `partial`, `unhealthy`, `self-judged`; which columns, their own cells say."""
    own = [mark.split(":")[0] for c in columns if c.name in metrics for mark in metrics[c.name].marks]
    return tuple(dict.fromkeys(own))


def metrics_to_json(metrics: Mapping[str, Metric], average: Metric) -> dict[str, Any]:
    """What metrics.json holds: {"columns": {name: metric}, "average": metric}, unrounded shares."""
    columns = {name: dataclasses.asdict(m) for name, m in metrics.items()}
    return {"columns": columns, "average": dataclasses.asdict(average)}


def metrics_from_json(data: Json) -> tuple[dict[str, Metric], Metric]:
    """(column name -> metric, average) of a parsed metrics.json."""

    def metric(m: Json) -> Metric:
        return Metric(**{**m, "health": Health(**m["health"]), "marks": tuple(m["marks"])})

    return {name: metric(m) for name, m in data["columns"].items()}, metric(data["average"])


@dataclass(frozen=True, slots=True)
class TableRow:
    """One run, or the published row of its model. `cells`: column name or "average" -> metric, where run."""

    label: str
    cells: Mapping[str, Metric]
    notes: tuple[str, ...]  # about the whole row
    recipe: str
    published: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`columns`: name -> header, of the recipe's columns in order, then Average, then a user's own."""

    columns: Mapping[str, str]
    rows: tuple[TableRow, ...]


def table_from_runs(runs: Sequence[Json]) -> Table:
    """The table of run folders, each given as its run.json with metrics.json under the key "metrics".

    Directly beneath a model's run (the last, where its runs follow each other) stands its published row.
    """
    inside: dict[str, str] = {}
    after: dict[str, str] = {}
    for run in runs:
        recipe, seen = run["recipe"], run["metrics"]["columns"]
        for c in [c for c in recipe["columns"] if c["name"] in seen]:
            (inside if c["benchmark"] in recipe["benchmarks"] else after)[c["name"]] = c["header"]
        after |= {name: name for name in seen if name not in inside and name not in after}
    rows: list[TableRow] = []
    for run, following, label in zip(runs, [*runs[1:], None], _labels(runs), strict=True):
        metrics, mean = metrics_from_json(run["metrics"])
        rows.append(TableRow(label, {**metrics, AVERAGE: mean}, run_notes(run), run["recipe"]["name"]))
        name = run["model"].get("published")
        if name and not (following and following["model"].get("published") == name):
            rows.append(published_row(name))
    own = {name: header for name, header in after.items() if name not in inside}
    return Table({**inside, AVERAGE: AVERAGE_HEADER, **own}, tuple(rows))


def run_notes(run: Json) -> tuple[str, ...]:
    """What holds for the whole row: partial, sample data, recipe changed, then the run's own notes."""
    notes = []
    cut = run.get("partial") or {}
    if cut.get("limit") or cut.get("ids"):
        how = f"--limit {cut['limit']}" if cut.get("limit") else f"--ids, {len(cut['ids'])} named"
        notes.append(f"partial ({how}): not comparable with a full run")
    if run["data"]["source"] == "sample":
        notes.append("sample data: rows invented for evalkit, not the benchmarks")
    if run["recipe"].get("changed"):
        notes.append(f"recipe changed: {', '.join(run['recipe']['changed'])}")
    return tuple(dict.fromkeys([*notes, *run.get("notes", ())]))


def published_row(name: str) -> TableRow:
    """A row of published.toml; its values have no interval. Raises UnknownName."""
    facts = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
    if name not in facts["rows"]:
        raise UnknownName("published row", name, facts["rows"])
    row, cells = facts["rows"][name], {}
    for column, value in zip(facts["columns"], row["percent"], strict=True):
        if value != "-":
            cells[column] = Metric(column, value / 100, None, None, 0, 0, Health(), marks=("published",))
    note = f"published: {row['source']}, measured as {facts['recipe']}"
    return TableRow(f"{name}, published", cells, (note,), facts["recipe"], True)


def _labels(runs: Sequence[Json]) -> list[str]:
    """The models' names; where equal, with the recipe; where still equal, numbered."""
    labels = [str(run["model"]["name"]) for run in runs]
    for more in ([f" ({run['recipe']['name']})" for run in runs], [f" #{i + 1}" for i in range(len(runs))]):
        count = Counter(labels)
        labels = [x + m if count[x] > 1 else x for x, m in zip(labels, more, strict=True)]
    return labels


def percent(share: float) -> str:
    """A share as percent with one decimal; ties go up: 0.0625 -> 6.3, where Python's round gives 6.2.

    Taken to nine decimals first, so that float noise (46.349999999999994) decides no tie.
    """
    return str(Decimal(f"{share * 100:.9f}").quantize(Decimal("0.1"), ROUND_HALF_UP))


def _short(share: float) -> str:
    return percent(share).removesuffix(".0")


def render(table: Table, fmt: str, width: int | None = None) -> str:
    """The table, a row a run, as one of FORMATS. `width` (md): in tables that fit a terminal that wide.

    csv has a header and one line a run, its last column naming the unhealthy cells; json shares,
    intervals, health, marks and notes.
    """
    if fmt not in FORMATS:
        raise UnknownName("table format", fmt, FORMATS)
    if fmt == "json":
        columns = [{"name": name, "header": header} for name, header in table.columns.items()]
        rows = [{**dataclasses.asdict(row), "model": row.label} for row in table.rows]
        return json.dumps({"columns": columns, "rows": rows}, ensure_ascii=False, indent=1) + "\n"
    if fmt == "csv":
        out = io.StringIO()
        lines = [["model", *table.columns.values(), "unhealthy"]]
        for row in [row for row in table.rows if not row.published]:
            cells = [row.cells.get(name) for name in table.columns]
            sick = [c.column for c in cells if c is not None and any(mark.startswith(BAD) for mark in c.marks)]
            values = ["" if c is None or c.value is None else percent(c.value) for c in cells]
            lines.append([row.label, *values, " ".join(sick)])
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue()
    notes = _Notes()
    grid = [["model", *table.columns.values()]]
    for row in table.rows:
        label = f"{row.label} {notes.refs(row.notes)}".strip()
        grid.append([label, *(_cell(row.cells.get(name), notes) for name in table.columns)])
    if fmt == "md":
        return "\n\n".join([*map(_md, _blocks(grid, width)), "  \n".join([LEGEND, *notes.lines()])]) + "\n"
    foot = [LEGEND, *notes.lines()]
    if fmt == "html":
        body = "\n".join(
            f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in line)}</tr>"
            for tag, line in zip(["th", *["td"] * len(table.rows)], grid, strict=True)
        )
        return f"<table>\n{body}\n</table>\n<p>{'<br>'.join(map(html.escape, foot))}</p>\n"
    first, *others = [" & ".join(text.translate(LATEX) for text in line) + r" \\" for line in grid]
    body = "\n".join([first, r"\hline", *others])
    head = f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}"
    return "\n".join([head, body, r"\end{tabular}", *(f"% {line}" for line in foot)]) + "\n"


def render_run(run: Json) -> str:
    """One run, a line a column: value, interval, n, published value, health, notes. Input as the above."""
    table, notes = table_from_runs([run]), _Notes()
    row = table.rows[0]
    shown = table.rows[1].cells if len(table.rows) > 1 else None
    refs = notes.refs([note for r in table.rows for note in r.notes])
    grid = [["column", "%", "95 % interval", "n", *(["published"] if shown else []), "health", "notes"]]
    for name, header in table.columns.items():
        cell = row.cells[name]
        beside = [_value(shown.get(name))] if shown else []
        texts = [m for m in cell.marks if not m.startswith(BAD) or cell.health.n == 0]
        ends = [percent(end) for end in (cell.low, cell.high) if end is not None]
        interval = f"[{', '.join(ends)}]" if ends else ""
        line = [header, _value(cell), interval, str(cell.n), *beside, _health(cell)]
        grid.append([*line, notes.refs([*texts, cell.reason])])
    title = f"{row.label}, recipe {row.recipe} {refs}".strip()
    sick = ["! unhealthy: past a threshold of the recipe"] if any("! " in line[-2] for line in grid) else []
    return "\n\n".join([title, _md(grid), "  \n".join([*sick, *notes.lines()])]).strip() + "\n"


def _value(cell: Metric | None) -> str:
    return "" if cell is None else "-" if cell.value is None else percent(cell.value)


def _cell(cell: Metric | None, notes: _Notes) -> str:
    """`44.5 ±1.2 [3]`; a published value stands alone."""
    text = _value(cell)
    if cell is None or cell.marks == ("published",):
        return text
    if cell.value is not None and cell.low is not None and cell.high is not None:
        text += f" ±{percent(max(cell.value - cell.low, cell.high - cell.value))}"
    return f"{text} {notes.refs([*cell.marks, cell.reason])}".strip()


def _health(cell: Metric) -> str:
    """`! truncated 34 %; empty 2`: what is past a threshold, then what else there is, in counts."""
    h, bad = cell.health, [m.removeprefix(BAD) for m in cell.marks if m.startswith(BAD)]
    if not h.n:
        return ""
    counts = {"unparsed": h.unparsed, "empty": h.empty, "truncated": h.truncated, "context": h.context}
    counts["failed"], said = h.failed, " ".join(bad)
    more = [f"{kind} {n}" for kind, n in counts.items() if n and f"{kind} " not in said]
    if h.option_mass is not None and "option mass" not in said:
        more.append(f"option mass {_short(h.option_mass)} %")
    return (
        "; ".join([*(["! " + ", ".join(bad)] if bad else []), *([", ".join(more)] if more else [])]) or "ok"
    )


class _Notes:
    """Numbers equal notes once, in the order met: refs(["a", "b", "c"]) is `[1-3]`, and "" for nothing."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def refs(self, texts: Sequence[str]) -> str:
        found = sorted({self.numbers.setdefault(text, len(self.numbers) + 1) for text in texts if text})
        if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
            return f"[{found[0]}-{found[-1]}]"
        return f"[{','.join(map(str, found))}]" if found else ""

    def lines(self) -> list[str]:
        return [f"[{i}] {text}" for text, i in self.numbers.items()]


def _blocks(grid: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """The columns in as few tables as fit `width`, the first column in each."""
    sizes = [max(3, *(len(line[i]) for line in grid)) + 3 for i in range(len(grid[0]))]
    parts: list[list[int]] = [[]]
    for i, size in enumerate(sizes[1:], 1):
        if width and parts[-1] and 1 + sizes[0] + sum(sizes[j] for j in parts[-1]) + size > width:
            parts.append([])
        parts[-1].append(i)
    return [[[line[0], *(line[i] for i in part)] for line in grid] for part in parts]


def _md(grid: list[list[str]]) -> str:
    grid = [[text.replace("|", "\\|") for text in line] for line in grid]
    sizes = [max(3, *(len(line[i]) for line in grid)) for i in range(len(grid[0]))]
    lines = [grid[0], ["-" * size for size in sizes], *grid[1:]]
    return "\n".join(f"| {' | '.join(t.ljust(s) for t, s in zip(x, sizes, strict=True))} |" for x in lines)
