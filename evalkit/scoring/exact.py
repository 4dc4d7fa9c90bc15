"""Exact match of what a rule read, by that rule's own idea of equal.

    tulu-2023-06, -11   case and ASCII punctuation dropped: `18.00` is 1800, `(B)` is `b`, `] ]` is `> >`
    strict              read the gold answer with the same rule and compare: numbers as numbers, letters as letters
    fasteval            numbers within 1e-8; nothing readable among n options is worth 1/n
"""

from __future__ import annotations

import string
from collections.abc import Callable

from evalkit.extract import Answer, Rule, find_rule, first_paragraph, options_of
from evalkit.types import Completion, Sample, Score, Switches

PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(text: str) -> str:
    """As `exact_match` of evaluate 0.4.0 with ignore_case and ignore_punctuation."""
    return text.lower().translate(PUNCTUATION)


def _tulu(answer: Answer, sample: Sample, read: Rule) -> float:
    return float(any(_bare(answer.text) == _bare(gold) for gold in sample.target))


def _strict(answer: Answer, sample: Sample, read: Rule) -> float:
    return float(answer.parsed and any(answer.text == read(gold, sample).text for gold in sample.target))


def _fasteval(answer: Answer, sample: Sample, read: Rule) -> float:
    options, gold = options_of(sample), sample.target[0].rpartition("####")[2].strip()
    if not answer.parsed:
        return 1 / len(options) if options else 0.0
    if options:
        return float(answer.text == gold.replace("(", "").replace(")", ""))
    return float(abs(float(answer.text) - float(gold.replace(",", ""))) < 1e-8)


MATCH: dict[str, Callable[[Answer, Sample, Rule], float]] = {
    "tulu-2023-06": _tulu, "tulu-2023-11": _tulu, "strict": _strict, "fasteval": _fasteval,
}


def score(sample: Sample, completion: Completion, switches: Switches) -> Score:
    """`switches["rule"]` of `switches["benchmark"]` over the completion's text, or, with `paragraph_cut`, over its
    first paragraph. UnknownName for a rule it lacks."""
    name, read = find_rule(switches["benchmark"], switches["rule"])
    answer = read(first_paragraph(completion.text) if switches.get("paragraph_cut", False) else completion.text, sample)
    status = "scored" if answer.parsed else "unparsed"
    return Score(sample.id, status, MATCH[name](answer, sample, read), answer.text, sample.group)
