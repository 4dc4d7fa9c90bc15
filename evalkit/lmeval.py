"""The exemplars of GSM CoT and BBH, read from the files of the installed lm-eval, which is not imported.

They are the original's texts byte for byte (seen with lm-eval 0.4.13), and so need not be shipped here. The
text as it goes into a prompt is pinned by hash: a release that only lays its files out anew passes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from evalkit.errors import InputError, UnknownName

RELEASE = "0.4.13"
GSM_FILE = "gsm8k/gsm8k-cot.yaml"
# the first 32 hex digits of sha256
GSM_HASH = "2da30bde0b4022a3b8162c96dda08638"
BBH_FILE = "bbh/cot_fewshot/{}.yaml"
BBH_HASH = {
    "boolean_expressions": "84d89ef2ebf255217e5b4b195bbdb5bc",
    "causal_judgement": "b76a33493a1da78a766626e0921a00a2",
    "date_understanding": "ec60ecb5998c5e396e71de91b0de56cd",
    "disambiguation_qa": "aa108ba978ed948df6e6d18205780b9c",
    "dyck_languages": "52dec948d978cd0a9eb83b757aaf8cae",
    "formal_fallacies": "58daee21cb8ac0268dc073e3fb1b3a54",
    "geometric_shapes": "e219fdcdf28ca3b1eab833ec5aecb97c",
    "hyperbaton": "266bfd031bdfa606cbb22d0d73fdffc5",
    "logical_deduction_five_objects": "2c8a9581185b0f5b79a21bf91465be42",
    "logical_deduction_seven_objects": "2c8a9581185b0f5b79a21bf91465be42",
    "logical_deduction_three_objects": "2c8a9581185b0f5b79a21bf91465be42",
    "movie_recommendation": "82430ef6ed36e54738442941790b45d7",
    "multistep_arithmetic_two": "83b6388b22747d01a65b22d85b0cdaaa",
    "navigate": "0c04ef97ca6a58e6e5c76eb44779ae0a",
    "object_counting": "a536307309edfb2ca91c9f6144bc8355",
    "penguins_in_a_table": "8ee12e67dee1069f2f81097f9a42a202",
    "reasoning_about_colored_objects": "e4a2503c80dd08f93246693dae22831e",
    "ruin_names": "3aa1204d5f34cdf1fc32edbf2199293c",
    "salient_translation_error_detection": "9c13f5b5cb46b8bf2908162f1f704d5b",
    "snarks": "41200ac2cece7f4f4d76b9853e324909",
    "sports_understanding": "be04f01eee26a3021e0ad69a0f6e1f46",
    "temporal_sequences": "c597815135af9c04f78cbf1281026a88",
    "tracking_shuffled_objects_five_objects": "466b860c8cec8d636dd59964aa67ab2c",
    "tracking_shuffled_objects_seven_objects": "466b860c8cec8d636dd59964aa67ab2c",
    "tracking_shuffled_objects_three_objects": "466b860c8cec8d636dd59964aa67ab2c",
    "web_of_lies": "68f58c5e0ea6760a2a31aa3c39cde372",
    "word_sorting": "ba1451cfccb485f1c8f7aa25252f4853",
}


def gsm_cot_shots() -> list[dict[str, str]]:
    """The eight exemplars in order: `question`, `reasoning` with its last sentence, `answer` (the number).

    lm-eval ends them in `The answer is 6.`, the original in `So the answer is 6.`; all else is equal.
    """
    shots = []
    for item in _read(GSM_FILE, ("question", "target"))[1]:
        body, _, number = item["target"].rpartition(" The answer is ")
        reasoning = f"{body} So the answer is {number}"
        shots.append({"question": item["question"], "reasoning": reasoning, "answer": number.rstrip(".")})
    _check(GSM_FILE, json.dumps(shots), GSM_HASH)
    return shots


def bbh_cot_text(subtask: str) -> str:
    """The original's cot-prompts text of one of the 27 subtasks, less its first two lines (canary, dashes).

    The description, then three times `Q: ...`, `A: Let's think step by step.` and the reasoning.
    """
    if subtask not in BBH_HASH:
        raise UnknownName("BBH subtask", subtask, BBH_HASH)
    file = BBH_FILE.format(subtask)
    description, samples = _read(file, ("input", "target"))
    # in this one file the original goes on in the same line
    gap = " " if subtask == "sports_understanding" else "\n"
    shots = (f"Q: {one['input']}\nA: Let's think step by step.{gap}{one['target']}" for one in samples)
    text = description + "\n\n".join(shots)
    _check(file, text, BBH_HASH[subtask])
    return text


def _read(file: str, keys: tuple[str, str]) -> tuple[str, list[dict[str, str]]]:
    """`description` and the few-shot samples of one of lm-eval's task files."""
    import yaml

    spec = importlib.util.find_spec("lm_eval")  # finds the folder, runs nothing of it
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"lm-eval is not installed and carries the exemplars of {file}: pip install lm-eval")

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Reads `!function module.name` as None."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        text = (Path(spec.submodule_search_locations[0]) / "tasks" / file).read_text(encoding="utf-8")
        content = yaml.load(text, Loader)
        samples = [{key: str(item[key]) for key in keys} for item in content["fewshot_config"]["samples"]]
        return str(content.get("description", "")), samples
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise _changed(file) from error


def _check(file: str, text: str, pin: str) -> None:
    if hashlib.sha256(text.encode()).hexdigest()[:32] != pin:
        raise _changed(file)


def _changed(file: str) -> InputError:
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("lm-eval")
    except PackageNotFoundError:
        release = "an unknown release"
    return InputError(
        f"lm_eval/tasks/{file} of the installed lm-eval ({release}) has not the exemplars of {RELEASE}, so "
        f"prompts would differ from the original's: pip install lm-eval=={RELEASE}"
    )
