"""GSM8K: eight fixed exemplars, with the reasoning (cot) or the number alone (direct).

    {"question": "Janet has ...", "answer": "She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7"}
"""

import re

from evalkit.lmeval import gsm_cot_shots
from evalkit.types import DataRef, Message, Prompt, Sample, Task


def sample(row, ref, index):
    number = re.sub(r"(\d),(\d)", r"\1\2", row["answer"].rpartition("####")[2].strip())
    return Sample(f"gsm8k/{ref.config}/{ref.split}/{index}", {"question": row["question"].strip()}, (number,))


def shots(load, switches, groups):
    items = (Sample(f"gsm_cot/{i}", shot, (shot["answer"],)) for i, shot in enumerate(gsm_cot_shots()))
    return {"": tuple(items)}


def exemplar(shot, switches):
    if switches["style"] == "cot":
        return f"Question: {shot.fields['question']}\nAnswer: {shot.fields['reasoning']}"
    # the original misspells the label in all eight direct exemplars and not in the test question
    label = "Quesion" if switches["misspelling"] else "Question"
    return f"{label}: {shot.fields['question']}\nAnswer: {shot.target[0]}"


def prompt(item, exemplars, setting):
    parts = ["Answer the following questions."]
    parts += [exemplar(shot, setting.switches) for shot in exemplars]
    parts += [f"Question: {item.fields['question']}"]
    return Prompt((Message("user", "\n\n".join(parts)),), "Answer:", len(exemplars))


task = Task(
    name="gsm",
    version=1,
    refs=(DataRef("openai/gsm8k", "main", "test"),),
    sample=sample,
    prompt=prompt,
    kind="exact",
    shots=shots,
)
