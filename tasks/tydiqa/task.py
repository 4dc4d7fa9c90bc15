"""TyDi QA, gold-passage task, nine languages, with the passage or closed-book; one exemplar of the language.

    {"id": "english-42-0", "context": "...", "question": "Who ...?", "answers": {"text": ["..."], ...}}
"""

from evalkit.types import DataRef, Message, Prompt, Sample, Task

# language: instruction with passage | passage, question and answer label | instruction without
WORDS = """
arabic|أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى.|المقطع:|السؤال:|الإجابة:|أجب على السؤال التالي.
bengali|প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।|অধ্যায়:|প্রশ্ন:|উত্তর:|নিম্নলিখিত প্রশ্নের উত্তর দিন।
english|Answer the following question based on the information in the given passage.|Passage:|Question:|Answer:|Answer the following question.
finnish|Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.|Kappale:|Kysymys:|Vastaus:|Vastaa seuraavaan kysymykseen.
indonesian|Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan.|Bagian:|Pertanyaan:|Jawaban:|Jawab pertanyaan berikut.
korean|주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.|문단:|질문:|답변:|다음 질문에 답하십시오.
russian|Ответьте на следующий вопрос на основе информации в данном отрывке.|Отрывок:|Вопрос:|Ответ:|Ответьте на следующий вопрос.
swahili|Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa.|Kifungu:|Swali:|Jibu:|Jibu swali lifuatalo.
telugu|ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి.|పేరా:|ప్రశ్న:|సమాధానం:|క్రింది ప్రశ్నకు సమాధానం ఇవ్వండి.
"""  # noqa: E501
LABELS = {line.split("|")[0]: line.split("|")[1:] for line in WORDS.strip().splitlines()}


def sample(row, ref, index):
    fields = {"question": row["question"], "context": row["context"]}
    return Sample(row["id"], fields, tuple(row["answers"]["text"]), group=row["id"].partition("-")[0])


def shots(load, switches, groups):
    found = {group: [] for group in groups}
    for i, row in enumerate(load(ref := DataRef("google-research-datasets/tydiqa", "secondary_task", "train"))):
        item = sample(row, ref, i)
        found.get(item.group, []).append(item)
    return {group: tuple(items) for group, items in found.items()}


def prompt(item, exemplars, setting):
    with_passage, p, q, a, without = LABELS[item.group]
    passage = setting.switches["passage"]

    def block(one):
        context = f"{p} {setting.cut(one.fields['context'])}\n" if passage else ""
        return f"{context}{q} {one.fields['question']}"

    parts = [with_passage if passage else without]
    parts += [f"{block(shot)}\n{a} {shot.target[0]}" for shot in exemplars]
    text = "\n\n".join([*parts, block(item)])
    if setting.chat:  # the original's turn ends in a newline, which 2023-06 strips and 2023-11 does not
        text = text.strip() if setting.switches["strip_content"] else f"{text}\n"
    return Prompt((Message("user", text),), a, len(exemplars))


task = Task(
    name="tydiqa",
    version=1,
    refs=(DataRef("google-research-datasets/tydiqa", "secondary_task", "validation"),),
    sample=sample,
    prompt=prompt,
    kind="f1",
    shots=shots,
)
