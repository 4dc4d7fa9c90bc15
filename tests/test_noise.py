"""check-engines: what differs between two engines' answers is counted and placed."""

import json

from evalkit import noise, plan
from evalkit.cli import main
from evalkit.types import Completion, RunSpec


def test_differences_are_counted_and_placed(tiny_model):
    spec = RunSpec(model=str(tiny_model), format="tulu", data="sample", tasks="gsm_cot,mmlu_0shot", limit=3)
    planned = plan.make(spec)
    asked = noise.greedy(planned, 9)
    assert len(asked) == 6 and {r.ask.max_tokens for r in asked if r.column == "gsm_cot"} == {9}
    texts, letters = ([r.key for r in asked if r.column == name] for name in ("gsm_cot", "mmlu_0shot"))
    one = {k: Completion(k, "abcd") for k in texts} | {k: Completion(k, logprobs=(-1.0, -2.0), finish="choice")
                                                       for k in letters}
    two = dict(one)
    two[texts[1]] = Completion(texts[1], "abXd")
    two[texts[2]] = Completion(texts[2], finish="error", error="broke")
    two[letters[0]] = Completion(letters[0], logprobs=(-1.5, -1.25), finish="choice")
    choice, text = sorted(noise.compare(planned, asked, "a against b", one, two), key=lambda d: d.column, reverse=True)
    assert (text.same, text.texts, text.first, text.failed, text.letters) == (1, 2, 2, 1, 0)
    assert (choice.flipped, choice.letters, choice.logprob, choice.texts) == (1, 3, 0.75, 0)


def test_an_engine_equals_itself_in_another_order(tiny_model, capsys):
    code = main(["check-engines", "--model", str(tiny_model), "--format", "tulu", "--tasks", "gsm_cot,codex_p10",
                 "--engine", "mock", "--against", "mock", "--json", "--limit", "2"])
    rows = json.loads(capsys.readouterr().out)
    assert code == 0 and [r["compared"] for r in rows] == ["mock, other order"] * 2 + ["mock against mock"] * 2
    assert all((r["same"], r["texts"], r["first"], r["failed"]) == (2, 2, None, 0) for r in rows)
