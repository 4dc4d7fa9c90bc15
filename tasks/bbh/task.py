"""BIG-Bench Hard: 27 subtasks, three exemplars each, with the reasoning (cot) or the answer alone (direct).

    {"input": "not ( True ) and ( True ) is", "target": "False"}
"""

from evalkit.lmeval import bbh_cot_text
from evalkit.types import DataRef, Message, Prompt, Sample, Task

SUBTASKS = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()


def sample(row, ref, index):
    return Sample(f"bbh/{ref.config}/{index}", {"input": row["input"]}, (row["target"],), group=ref.config)


def shots(load, switches, groups):
    # one Sample carries the whole text: the task's description and its three exemplars
    return {group: (Sample(f"bbh_cot/{group}", {"text": bbh_cot_text(group)}),) for group in groups}


def without_reasoning(text):
    parts = []
    for part in text.split("\n\n"):
        if part.startswith("Q:"):
            question = part.partition("\nA:")[0]
            part = f"{question}\nA: {part.rpartition('So the answer is')[2].strip()}"
        parts.append(part)
    return "\n\n".join(parts)


def prompt(item, exemplars, setting):
    text = "".join(shot.fields["text"] for shot in exemplars).strip()
    n_shots = sum(part.startswith("Q:") for part in text.split("\n\n"))
    if setting.switches["style"] == "direct":
        text = without_reasoning(text)
    text = f"{text}\n\nQ: {item.fields['input']}" if text else f"Q: {item.fields['input']}"
    return Prompt((Message("user", text),), "A:", n_shots)


task = Task(
    name="bbh",
    version=1,
    refs=tuple(DataRef("SaylorTwift/bbh", subtask, "test") for subtask in SUBTASKS),
    sample=sample,
    prompt=prompt,
    kind="exact",
    shots=shots,
)
