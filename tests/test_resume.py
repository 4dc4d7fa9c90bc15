"""Going on: by key, with what is said; taking over from another run; several models; the order of asking."""

import json
import shutil
from pathlib import Path

import pytest
from records import lines

from evalkit.cli import main
from evalkit.engines.mock import Mock
from evalkit.types import Choose


@pytest.fixture
def base(tiny_model, tmp_path) -> list[str]:
    return ["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", "gsm_cot", "--data", "sample", "--limit",
            "4", "--engine", "mock", "--sandbox", "process", "--out", str(tmp_path / "out")]


@pytest.fixture
def home(tiny_model, tmp_path) -> Path:
    return tmp_path / "out" / tiny_model.name


def mark(folder: Path, status: str) -> None:
    run = json.loads((folder / "run.json").read_text()) | {"status": status}
    (folder / "run.json").write_text(json.dumps(run))


def test_sample_13_of_20_comes_back_with_its_own_seed(base, home, asked):
    argv = [*base, "--tasks", "codex_p10", "--limit", "2", "--name", "x"]
    assert main(argv) == 0
    journal = home / "x" / "codex_p10.completions.jsonl"
    lost = next(r for r in lines(home / "x" / "codex_p10.requests.jsonl") if r["index"] == 13)
    assert lost["ask"]["temperature"] == 0.8
    before = lines(journal)
    gone = next(r for r in before if r["key"] == lost["key"])
    journal.write_text("".join(line + "\n" for line in journal.read_text().splitlines() if lost["key"] not in line))
    asked.clear()
    assert main(["run", "--resume", str(home / "x")]) == 0
    assert [(r.key, r.index, r.ask.seed) for r in asked] == [(lost["key"], 13, lost["ask"]["seed"])]
    assert lines(journal)[-1] == gone and len(lines(journal)) == len(before)


@pytest.mark.parametrize(("part", "file"), [("template", "mine.jinja"), ("tokenizer", "tokenizer_config.json"),
                                            ("weights", "model.safetensors")])
def test_what_decides_an_answer_has_changed(base, home, asked, capsys, tiny_model, tmp_path, part, file):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    argv = [*base, "--model", str(model), "--format", str(template)]
    argv[argv.index("--model"):argv.index("--model") + 2] = []
    assert main([*argv, "--name", "x"]) == 0
    place = template if part == "template" else model / file
    if part == "weights":
        place.write_bytes(place.read_bytes() + b" ")
    else:
        text = place.read_text()
        place.write_text(text.replace("content'] }}", "content'] }}!") if part == "template" else text + "\n")
    asked.clear()
    capsys.readouterr()
    assert main(["run", "--resume", str(home.parent / "model" / "x")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "changed" in line] == [
        f"resume: the {part} changed since the run began, so all its earlier answers are asked for again"]
    assert "resume: 0 of 4 answers are there" in said and len(asked) == 4


def test_a_changed_task_is_named(base, home, capsys, tmp_path):
    folder = tmp_path / "mine" / "riddles"
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(
        "from evalkit import DataRef, Message, Prompt, Sample, Task\n"
        "task = Task(name='riddles', version=1, refs=(DataRef('me/riddles', 'main', 'test'),), kind='exact',\n"
        "            sample=lambda row, ref, i: Sample(f'riddles/{i}', {'q': row['q']}, (row['a'],)),\n"
        "            prompt=lambda item, shots, setting: Prompt((Message('user', item.fields['q']),), 'Answer:'))\n")
    row = {"q": "1 + 1?", "a": "2", "config": "main", "split": "test"}
    (folder / "sample.jsonl").write_text(json.dumps(row) + "\n")
    assert main([*base, "--tasks", "riddles", "--tasks-dir", str(tmp_path / "mine"), "--name", "x"]) == 0
    (folder / "task.py").write_text((folder / "task.py").read_text().replace("'Answer:'", "'Reply:'"))
    capsys.readouterr()
    assert main(["run", "--resume", str(home / "x")]) == 0
    said = capsys.readouterr().err
    assert "resume: the task riddles changed since the run began; prompts that differ by it are asked for again" in said
    assert "resume: 0 of 1 answers are there" in said


def test_an_equal_run_that_stands_unfinished_is_named(base, home, capsys):
    assert main([*base, "--name", "one"]) == 0
    assert main([*base, "--name", "other", "--limit", "3"]) == 0
    for name in ("one", "other"):
        mark(home / name, "running")
    capsys.readouterr()
    assert main([*base, "--name", "two"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "unfinished" in line]
    assert said == [f"an equal run stands unfinished; to go on with it instead: evalkit run --resume {home / 'one'}"]
    mark(home / "one", "done")
    assert main([*base, "--name", "three"]) == 0
    assert "unfinished" not in capsys.readouterr().err


def test_resume_needs_no_other_option_and_takes_none(base, home, asked, capsys):
    assert main([*base, "--name", "x"]) == 0
    asked.clear()
    assert main(["run", "--resume", str(home / "x")]) == 0 and asked == []
    capsys.readouterr()
    assert main(["run", "--resume", str(home / "x"), "--limit", "9"]) == 2
    assert capsys.readouterr().err == "evalkit: --resume takes all from the run: leave --limit out\n"
    sessions = json.loads((home / "x" / "run.json").read_text())["time"]["sessions"]
    assert [session.get("requests") for session in sessions] == [4, None]


def test_reuse_takes_equal_keys_over(base, home, asked, capsys):
    tasks = ["--tasks", "gsm_cot,alpaca_farm"]
    assert main([*base, *tasks, "--name", "x"]) == 0
    whole = {name: (home / "x" / name).read_text() for name in ("gsm_cot.scores.jsonl", "alpaca_farm.scores.jsonl")}
    asked.clear()
    assert main([*base, *tasks, "--limit", "6", "--name", "y", "--reuse", str(home / "x")]) == 0
    said = capsys.readouterr().err
    journal = {record["key"] for record in lines(home / "y" / "gsm_cot.completions.jsonl")}
    shared = {r["sample"] for r in lines(home / "x" / "gsm_cot.requests.jsonl")} & {
        r["sample"] for r in lines(home / "y" / "gsm_cot.requests.jsonl")}
    assert len(journal) == 6 and 0 < len(shared) <= 4
    assert {r.sample for r in asked if r.column == "gsm_cot"}.isdisjoint(shared)
    assert f"of 12 answers taken over from {home / 'x'}" in said
    asked.clear()
    assert main([*base, *tasks, "--name", "z", "--reuse", str(home / "x")]) == 0
    assert asked == [] and {name: (home / "z" / name).read_text() for name in whole} == whole
    shutil.rmtree(home / "x")
    assert main(["run", "--resume", str(home / "z")]) == 0


@pytest.mark.parametrize(("change", "said"), [
    (["--engine", "replay"], "engine mock there, replay here"),
    (["--engine-args", "max_model_len=9000"], "context 16384 there, 9000 here"),
    (["--answers", "others.jsonl"], "engine option answers none there, others.jsonl here"),
    (["--engine-args", "dtype=float32"], "engine option dtype none there, float32 here"),
    (["--reuse", "/no/such/run"], "not a run folder")])
def test_reuse_refuses_what_no_key_tells(base, home, capsys, change, said):
    assert main([*base, "--name", "x"]) == 0
    argv = [*base, "--name", "y", *([] if "--reuse" in change else ["--reuse", str(home / "x")]), *change]
    assert main(argv) == 2
    assert said in capsys.readouterr().err and not (home / "y").exists()


def test_several_models_one_after_the_other(base, home, capsys, tiny_model, tmp_path, monkeypatch):
    second = tmp_path / "second"
    shutil.copytree(tiny_model, second)
    alive, most = [], []
    begin, close = Mock.__init__, Mock.close

    def started(self, *args, **more):
        begin(self, *args, **more)
        alive.append(self)
        most.append(len(alive))

    monkeypatch.setattr(Mock, "__init__", started)
    monkeypatch.setattr(Mock, "close", lambda self: (alive.remove(self), close(self)))
    assert main([*base, "--model", str(second), "--name", "x"]) == 0
    assert most == [1, 1] and alive == []
    out = capsys.readouterr().out
    runs = [line.removeprefix("run: ") for line in out.splitlines() if line.startswith("run: ")]
    assert runs == [str(home / "x"), str(home.parent / "second" / "x")]
    rows = [line for line in out.rpartition("run: ")[2].splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows[1:]] == ["-" * len(rows[1].split()[1]), tiny_model.name, "second"]
    capsys.readouterr()
    assert main([*base, "--model", "tulu-56b", "--name", "y"]) == 2 and not (home / "y").exists()
    assert main([*base, "--model", str(tiny_model), "--name", "y"]) == 2 and not (home / "y").exists()


def test_a_model_whose_engine_dies_does_not_stop_the_next(base, home, capsys, tiny_model, tmp_path, monkeypatch):
    from evalkit.errors import EngineError

    second = tmp_path / "second"
    shutil.copytree(tiny_model, second)
    complete = Mock.complete
    times = []

    def dying(self, requests):
        times.append(self)
        if self is times[0]:
            raise EngineError("no memory")
        yield from complete(self, requests)

    monkeypatch.setattr(Mock, "complete", dying)
    assert main([*base, "--model", str(second), "--name", "x"]) == 1
    said = capsys.readouterr()
    assert f"evalkit: {tiny_model}: no memory" in said.err and f"run: {home.parent / 'second' / 'x'}" in said.out


def test_pooled_long_answers_come_first_and_sequential_goes_by_column(base, asked):
    tasks = ["--tasks", "mmlu_0shot,gsm_cot,tydiqa_gp"]
    assert main([*base, *tasks]) == 0
    longest = [0 if isinstance(r.ask, Choose) else r.ask.max_tokens for r in asked]
    assert longest == sorted(longest, reverse=True) and longest[-1] == 0
    asked.clear()
    assert main([*base, *tasks, "--sequential"]) == 0
    assert [r.column for r in asked] == ["mmlu_0shot"] * 4 + ["gsm_cot"] * 4 + ["tydiqa_gp"] * 4


def test_sequential_asks_a_column_only_when_the_one_before_is_answered(base, monkeypatch):
    calls = []
    complete = Mock.complete

    def counted(self, requests):
        requests = list(requests)
        calls.append({r.column for r in requests})
        yield from complete(self, requests)

    monkeypatch.setattr(Mock, "complete", counted)
    assert main([*base, "--tasks", "mmlu_0shot,gsm_cot", "--option", "sequential"]) == 0
    assert calls == [{"mmlu_0shot"}, {"gsm_cot"}]


@pytest.mark.parametrize(("more", "said"), [
    (["--option", "sequentially"], "unknown option 'sequentially'; did you mean 'sequential'?"),
    (["--option", "allow=bos-twicee"], "unknown lint rule 'bos-twicee'; did you mean 'bos-twice'")])
def test_options_that_are_none(base, capsys, more, said):
    assert main([*base, *more]) == 2
    assert said in capsys.readouterr().err
