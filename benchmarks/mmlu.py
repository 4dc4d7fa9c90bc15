"""MMLU as both MMLU benchmarks ask it: 5 shots, the four subjects with the longest shots, questions spread evenly."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Planned, ask, planned

from evalkit.types import Choose, RunSpec

# By what two questions of a subject have in common, in tokens, these four lead (SmolLM2 and LLaMA alike).
SIZES = {"high_school_us_history": 204, "high_school_european_history": 165, "professional_law": 1534,
         "high_school_world_history": 237}
TIE = 0.25  # natural log; bf16 kernels of two engines differ by up to 0.2


def spec(data: str, model: str, questions: int) -> RunSpec:
    ids = tuple(f"{subject}/test/{i * size // questions}" for subject, size in SIZES.items() for i in range(questions))
    return RunSpec(model=model, tasks="mmlu_5shot", data=data, ids=ids)


def write(work: Planned, file: Path) -> None:
    """The requests for the other side, subject by subject."""
    lines = [{"key": r.key, "subject": r.sample.split("/")[0], "tokens": list(r.tokens), "options": r.ask.options}
             for r in work.requests() if isinstance(r.ask, Choose)]
    settings = {"length": work.todo.length + 2, "model": work.plan.model.path, "seed": work.plan.recipe.seed}
    file.write_text(json.dumps({**settings, "requests": lines}))


def ours(folder: str, data: str, model: str, questions: int) -> dict[str, Any]:
    """evalkit's side: planned again, the very requests of the other side, asked through the pool."""
    given = json.loads((Path(folder) / "requests.json").read_text())
    work = planned(spec(data, model, questions), Path(folder) / f"ours-{questions}-{len(list(Path(folder).iterdir()))}")
    requests = work.requests()
    same = {r.key: array("i", r.tokens) for r in requests}
    if questions * len(SIZES) == len(given["requests"]) and same != {
            r["key"]: array("i", r["tokens"]) for r in given["requests"]}:
        raise SystemExit("the two sides have different requests")
    work.todo.length = max(work.todo.length, given["length"])
    return {**ask(work), "tokens": sum(len(r.tokens) for r in requests)}


def letters(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How two sides' answers agree; `differ` are other letters where theirs has a margin of more than TIE."""
    def best(row: Sequence[float]) -> int:
        return max(range(len(row)), key=lambda i: row[i])

    def margin(row: Sequence[float]) -> float:
        first, second = sorted(row, reverse=True)[:2]
        return first - second

    other = [key for key in theirs if best(ours[key]) != best(theirs[key])]
    return {"questions": len(theirs), "other_letter": len(other),
            "differ": sum(margin(theirs[key]) > TIE for key in other),
            "largest_difference": max(abs(a - b) for key, row in theirs.items()
                                      for a, b in zip(ours[key], row, strict=True))}


def relative(row: Sequence[float]) -> list[float]:
    """Log-probabilities less the first one's: comparable where a side knows only the options' shares."""
    return [value - row[0] for value in row]
