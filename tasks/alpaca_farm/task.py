"""AlpacaFarm's 805 evaluation instructions, answered freely and compared with davinci-003's answers.

    {"instruction": "Rewrite this.", "input": "It are late.", "dataset": "selfinstruct", "datasplit": "eval"}
"""

from evalkit.types import DataRef, Message, Prompt, Sample, Task

ITEMS = {
    "farm": DataRef("tatsu-lab/alpaca_farm", "alpaca_farm_evaluation", "eval", file="alpaca_farm_evaluation.json"),
    "eval": DataRef("tatsu-lab/alpaca_eval", "alpaca_eval", "eval", file="alpaca_eval.json"),
}


def sample(row, ref, index):
    given = row.get("input") or ""
    # without an input the original does not strip; instruction, blank line, input is also alpaca_eval's text
    text = f"{row['instruction'].strip()}\n\n{given.strip()}" if given else row["instruction"]
    return Sample(f"{ref.config}/{ref.split}/{index}", {"instruction": text})


def references(load):
    return {row["instruction"].strip(): row["output"] for row in load(ITEMS["eval"])}


def prompt(item, exemplars, setting):
    return Prompt((Message("user", item.fields["instruction"]),))


task = Task(
    name="alpaca_farm",
    version=1,
    refs=tuple(ITEMS.values()),
    sample=sample,
    prompt=prompt,
    kind="pairwise",
    references=references,
)
