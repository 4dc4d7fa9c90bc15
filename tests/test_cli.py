"""The command line: what it lists, what it refuses. A refusal is one line, exit 2, and leaves no run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import evalkit
from evalkit.cli import main


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def base(tiny_model, tmp_path):
    return {"--model": str(tiny_model), "--format": "tulu", "--tasks": "gsm_cot", "--data": "sample", "--limit": "2",
            "--engine": "mock", "--out": str(tmp_path / "results")}


def refused(capsys, tmp_path, options: dict[str, str]) -> str:
    code, out, err = run(capsys, "run", *(part for pair in options.items() for part in pair))
    assert code == 2, (code, out, err)
    lines = [line for line in err.splitlines() if line.startswith("evalkit: ")]
    assert len(lines) == 1 and "Traceback" not in err and out == ""
    assert not list((tmp_path / "results").glob("*/*")), "a run folder was made"
    return lines[0]


@pytest.mark.parametrize(("option", "value", "said"), [
    ("--model", "tulu-56b", "unknown model 'tulu-56b'; did you mean 'tulu-65b'"),
    ("--model", "tulu-65b", "weight diff"),
    ("--model", "/no/such/folder", "no such folder"),
    ("--tasks", "gsm_cott", "unknown task 'gsm_cott'; did you mean 'gsm_cot'"),
    ("--format", "tullu", "unknown format 'tullu'; did you mean 'tulu'"),
    ("--recipe", "tulu-2023-07", "unknown recipe 'tulu-2023-07'; did you mean 'tulu-2023-06'"),
    ("--recipe", "mine.toml", "recipe file mine.toml does not exist"),
    ("--ids", "gsm8k/main/test/99999", "no sample 'gsm8k/main/test/99999'"),
    ("--data", "/no/such/data", "/no/such/data"),
    ("--engine", "vlm", "unknown engine 'vlm'; did you mean 'vllm'?"),
    ("--engine-args", "dtype", "the form is key=value"),
    ("--set", "gsm.drow=1", "unknown switch 'drow'; did you mean 'draw'?"),
    ("--judge", "gpt-4", "the forms are self and openai:MODEL@URL"),
    ("--limit", "none", "must be a whole number"),
    ("--name", "a/b", "letters, digits"),
    ("--tasks-dir", "/no/such/tasks", "/no/such/tasks"),
    ("--tokenizer", "/no/such/tokenizer", "/no/such/tokenizer"),
])
def test_bad_input_is_one_line(capsys, tmp_path, base, option, value, said):
    line = refused(capsys, tmp_path, {**base, option: value})
    assert said in line, line


def test_a_model_folder_without_tokenizer(capsys, tmp_path, base, tiny_model):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    assert "no tokenizer" in refused(capsys, tmp_path, {**base, "--model": str(folder)})


def test_a_data_folder_that_lacks_a_split(capsys, tmp_path, base):
    (tmp_path / "hub" / "openai" / "gsm8k").mkdir(parents=True)
    line = refused(capsys, tmp_path, {**base, "--data": str(tmp_path / "hub")})
    assert "openai/gsm8k" in line and "evalkit data get" in line


def test_without_a_hub_the_line_names_the_ways_out(tmp_path, base):
    argv = [part for pair in {**base, "--data": "hub"}.items() for part in pair]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-m", "evalkit.cli", "run", *argv], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert all(word in last for word in ("--data DIR", "evalkit data get", "HF_HOME"))


def test_without_vllm_the_line_names_the_extras(monkeypatch, capsys, tmp_path, base):
    from evalkit import engines

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    line = refused(capsys, tmp_path, {**base, "--engine": "vllm"})
    assert "evalkit[cpu]" in line and "evalkit[vllm]" in line and "evalkit[hf]" in line


@pytest.mark.parametrize("command", ["tasks", "models", "recipes", "formats"])
def test_listings_for_people_and_programs(capsys, command):
    code, out, _ = run(capsys, command)
    assert code == 0 and len(out.splitlines()) > 3
    code, out, _ = run(capsys, command, "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) >= 3 and all(rows[0].keys() == row.keys() for row in rows)


def test_models_has_the_reference_models(capsys):
    names = {row["model"] for row in json.loads(run(capsys, "models", "--json")[1])}
    assert {"tulu-7b", "tulu-13b", "tulu-30b", "tulu-65b", "codellama-13b-oasst-sft-v10", "llama2-70b-oasst-sft-v10",
            "airoboros-13b-gpt4-1.4", "smollm2-135m-instruct"} == names


def test_prompts_as_json_lines(capsys):
    code, out, _ = run(capsys, "prompts", "--model", "tulu-7b", "--tokenizer", "none", "--format", "tulu", "--tasks",
                       "gsm_cot,mmlu_5shot", "--data", "sample", "--limit", "2", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["n_shots"] for r in rows] == [5, 5, 8, 8] and {r["n_tokens"] for r in rows} == {None}
    assert all({"id", "column", "text", "n_tokens", "n_shots"} <= r.keys() for r in rows)


def test_a_users_task_stands_after_average(capsys, tmp_path, base):
    folder = tmp_path / "mine" / "riddles"
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(
        "from evalkit import DataRef, Message, Prompt, Sample, Task\n"
        "def sample(row, ref, i):\n"
        "    return Sample(f'riddles/{i}', {'q': row['q']}, (row['a'],))\n"
        "def prompt(item, shots, setting):\n"
        "    return Prompt((Message('user', item.fields['q']),), 'Answer:')\n"
        "task = Task(name='riddles', version=1, refs=(DataRef('me/riddles', 'main', 'test'),), sample=sample,\n"
        "            prompt=prompt, kind='exact', header='Riddles', switches={'max_tokens': 9, 'rule': 'strict'})\n")
    rows = [{"q": f"What is {i}?", "a": str(i), "config": "main", "split": "test"} for i in range(5)]
    (folder / "sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, "tasks", "check", str(tmp_path / "mine"))
    assert (code, out) == (0, "riddles: 5 samples in 1 groups, 1 columns: every target, fed back as the answer, "
                              "scores 100\n"), err
    options = {**base, "--tasks": "riddles,gsm_cot", "--tasks-dir": str(tmp_path / "mine")}
    code, out, err = run(capsys, "run", *(part for pair in options.items() for part in pair))
    assert code == 0, err
    run_folder = out.splitlines()[-1].removeprefix("run: ")
    code, out, _ = run(capsys, "table", run_folder, "--format", "csv")
    assert out.splitlines()[0] == "model,GSM CoT,Average,Riddles,unhealthy" and len(out.splitlines()) == 2


def test_a_broken_task_names_file_and_line(capsys, tmp_path):
    folder = tmp_path / "mine" / "bad"
    folder.mkdir(parents=True)
    (folder / "task.py").write_text("import json\n\ntask = Tusk()\n")
    code, _, err = run(capsys, "tasks", "check", str(tmp_path / "mine"))
    assert code == 2 and f"{folder / 'task.py'}:3: NameError: name 'Tusk' is not defined" in err


def test_shipped_tasks_hold(capsys):
    code, out, _ = run(capsys, "tasks", "check", str(Path(evalkit.__file__).parent.parent / "tasks"))
    assert code == 0 and len(out.splitlines()) == 6


def test_import_is_light():
    probe = ("import evalkit, sys; "
             "print(len(sys.modules), {'torch', 'vllm', 'datasets', 'pandas', 'openai'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    count, heavy = done.stdout.split(" ", 1)
    assert int(count) <= 150 and heavy.strip() == "set()"


def test_all_names_are_sorted_and_there():
    assert evalkit.__all__ == sorted(evalkit.__all__) and all(hasattr(evalkit, name) for name in evalkit.__all__)


def test_run_has_at_most_twenty_options(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    assert 10 <= sum(line.startswith("  --") for line in shown.splitlines()) <= 20
