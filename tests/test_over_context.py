"""Prompts and answers past the model's context: extended, empty or failed, as the recipe says, and always counted."""

import json
from pathlib import Path

import pytest

from evalkit import runner
from evalkit.engines import mock
from evalkit.types import Completion, RunSpec


def run(tmp_path: Path, model: Path, how: str, context: int, monkeypatch) -> tuple[dict, dict, list, list]:
    built, asked = [], []

    def create(spec):
        built.append(spec)

        def answer(request):
            asked.append(request)
            return Completion("", " 7", finish="max_tokens", n_generated=request.ask.max_tokens)

        return mock.Mock(answer)

    monkeypatch.setattr(mock, "from_spec", create)
    spec = RunSpec(model=str(model), format="tulu", tasks="gsm_direct", data="sample", limit=3, engine="mock",
                   engine_args={"max_model_len": str(context)}, out=str(tmp_path), name="x",
                   sets=(f"gsm.over_context={how}",), options={"allow": "over-context"})
    folder = Path(runner.run(spec).folder)
    metrics = json.loads((folder / "metrics.json").read_text())["columns"]["gsm_direct"]
    return metrics, json.loads((folder / "run.json").read_text()), built, asked


def test_extend_raises_the_engines_length_as_the_original_ran_past_it(tmp_path, tiny_model, monkeypatch):
    metrics, run_json, built, asked = run(tmp_path, tiny_model, "extend", 1000, monkeypatch)
    assert {r.ask.max_tokens for r in asked} == {512} and len(asked) == 3
    assert built[0].max_model_len == max(len(r.tokens) for r in asked) + 512 > 1000
    assert metrics["health"]["truncated"] == 3 and metrics["health"]["context"] == 0
    assert any("the engine runs past it, as the original did" in note for note in run_json["notes"]), run_json["notes"]


def test_empty_counts_a_prompt_over_the_context_as_an_empty_answer(tmp_path, tiny_model, monkeypatch):
    metrics, _, _, asked = run(tmp_path, tiny_model, "empty", 1000, monkeypatch)
    assert asked == [] and metrics["value"] == 0 and metrics["n"] == 3
    assert metrics["health"]["context"] == metrics["health"]["empty"] == 3


def test_fail_blanks_the_cell(tmp_path, tiny_model, monkeypatch):
    metrics, _, _, asked = run(tmp_path, tiny_model, "fail", 1000, monkeypatch)
    assert asked == [] and metrics["value"] is None and metrics["health"]["failed"] == 3
    assert "3 of 3 samples failed" in metrics["reason"]


@pytest.mark.parametrize("how", ["empty", "fail"])
def test_an_answer_that_fills_what_is_left_was_ended_by_the_context(tmp_path, tiny_model, monkeypatch, how):
    metrics, run_json, built, asked = run(tmp_path, tiny_model, how, 1800, monkeypatch)
    assert asked and all(len(r.tokens) + r.ask.max_tokens == 1800 for r in asked)
    assert built[0].max_model_len == run_json["model"]["context"] == 1800
    assert metrics["health"]["context"] == 3 and metrics["health"]["truncated"] == 0
