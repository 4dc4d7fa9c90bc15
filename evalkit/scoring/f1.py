"""Token F1 and exact match of SQuAD v1.1 over several gold answers (Rajpurkar et al. 2016), TydiQA's metric.

    "the Eiffel Tower, Paris" against ("Eiffel Tower",)  ->  F1 0.8, exact match 0

The original drops ASCII punctuation and English articles in every language; `strict` drops every script's
punctuation: danda, Arabic comma, en dash, curly quotes, guillemets.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from evalkit.extract import find_rule
from evalkit.types import Completion, Sample, Score, Switches


def tokens(text: str, every_script: bool = False) -> list[str]:
    """Lower case, without punctuation and the words a, an, the; split at white space, the no-break kind too."""
    kept = (c for c in text.lower()
            if c not in string.punctuation and not (every_script and unicodedata.category(c)[0] == "P"))
    return re.sub(r"\b(a|an|the)\b", " ", "".join(kept)).split()


def f1(answer: str, golds: Sequence[str], every_script: bool = False) -> float:
    """The best F1 over `golds`, 0 to 1; 0 where nothing is left of the answer, even if nothing is of a gold."""
    return max(_f1(tokens(answer, every_script), tokens(gold, every_script)) for gold in golds)


def _f1(answer: list[str], gold: list[str]) -> float:
    common = sum((Counter(answer) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def exact(answer: str, golds: Sequence[str], every_script: bool = False) -> float:
    """1 where the answer's tokens are those of a gold answer."""
    return float(any(tokens(answer, every_script) == tokens(gold, every_script) for gold in golds))


def score(sample: Sample, completion: Completion, switches: Switches) -> Score:
    """The best F1 over the sample's targets, by `switches["rule"]` of `switches["benchmark"]`."""
    name, read = find_rule(switches["benchmark"], switches["rule"])
    answer = read(completion.text, sample)
    value = f1(answer.text, sample.target, every_script=name == "strict")
    return Score(sample.id, "scored" if answer.parsed else "unparsed", value, answer.text, sample.group)
