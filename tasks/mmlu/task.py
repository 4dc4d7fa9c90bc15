"""MMLU: 57 subjects, four options, exemplars are the first dev rows of the subject.

    {"question": "Find ...", "subject": "anatomy", "choices": ["0", "4", "2", "6"], "answer": 1}
"""

from evalkit.types import DataRef, Message, Prompt, Sample, Task

SUBJECTS = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics "
    "high_school_mathematics high_school_microeconomics high_school_physics high_school_psychology "
    "high_school_statistics high_school_us_history high_school_world_history human_aging human_sexuality "
    "international_law jurisprudence logical_fallacies machine_learning management marketing medical_genetics "
    "miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting "
    "professional_law professional_medicine professional_psychology public_relations security_studies sociology "
    "us_foreign_policy virology world_religions"
).split()
LETTERS = ("A", "B", "C", "D")


def sample(row, ref, index):
    fields = {"question": row["question"], "choices": tuple(row["choices"])}
    return Sample(f"{ref.config}/{ref.split}/{index}", fields, (LETTERS[row["answer"]],), LETTERS, ref.config)


def shots(load, switches, groups):
    dev = {group: DataRef("cais/mmlu", group, "dev") for group in groups}
    return {g: tuple(sample(row, ref, i) for i, row in enumerate(load(ref))) for g, ref in dev.items()}


def block(item, none_cell):
    # pandas 2 reads the option text None as missing and the original then prints nan: `none_cell = "nan"`
    choices = (none_cell if choice == "None" else choice for choice in item.fields["choices"])
    lines = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{item.fields['question']}{lines}\nAnswer:"


def prompt(item, exemplars, setting):
    none_cell = "nan" if setting.switches["none_cell"] == "nan" else "None"
    subject = item.group.replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about{' ' * setting.switches['subject_blanks']}"
    text += f"{subject}.\n\n"
    text += "".join(f"{block(shot, none_cell)} {shot.target[0]}\n\n" for shot in exemplars)
    prefill = setting.switches["answer_prefix"] if setting.chat else ""
    return Prompt((Message("user", text + block(item, none_cell)),), prefill, len(exemplars))


task = Task(
    name="mmlu",
    version=1,
    refs=tuple(DataRef("cais/mmlu", subject, "test") for subject in SUBJECTS),
    sample=sample,
    prompt=prompt,
    kind="choice",
    shots=shots,
)
