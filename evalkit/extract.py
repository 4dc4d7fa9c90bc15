"""Text -> answer: stop rules and the named extraction rules of each benchmark. Pure functions.

    RULES["gsm"]["tulu-2023-06"]("That is -1,234.", sample)  ->  Answer("1234", parsed=True)   # the original's
    RULES["gsm"]["strict"]("That is -1,234.", sample)        ->  Answer("-1234", parsed=True)

The `tulu-*` and `fasteval` rules keep their originals' quirks on purpose; `strict` has none and is written here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from evalkit.errors import UnknownName
from evalkit.types import Sample


@dataclass(frozen=True, slots=True)
class Answer:
    """What was read. `parsed` False: nothing was found; `text` is then what the original would have compared."""

    text: str
    parsed: bool


Rule = Callable[[str, Sample], Answer]
Reader = Callable[[str, Sample], Sequence[str]]  # a piece of text -> the answers of one kind in it, canonical


def cut_text(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """`text` up to the first place where a stop occurs, and which one ("" for none; the first listed on a tie)."""
    hits = [(at, i) for i, stop in enumerate(stops) if stop and (at := text.find(stop)) >= 0]
    at, i = min(hits, default=(len(text), -1))
    return text[:at], stops[i] if i >= 0 else ""


def cut_tokens(ids: Sequence[int], sequences: Sequence[Sequence[int]]) -> tuple[list[int], int | None]:
    """`ids` up to the first place where one of `sequences` stands whole, and the index of that sequence."""
    for at in range(len(ids)):
        for i, sequence in enumerate(sequences):
            if sequence and list(ids[at : at + len(sequence)]) == list(sequence):
                return list(ids[:at]), i
    return list(ids), None


def find_rule(benchmark: str, name: str) -> tuple[str, Rule]:
    """(`strict`, its function). A name may say whose rule it is: `gsm/strict` in a task of your own.

    A benchmark without rules here takes those of `text`. UnknownName gives the nearest known ones.
    """
    family, _, rule = name.rpartition("/")
    if family and family not in RULES:
        raise UnknownName("benchmark", family, RULES, f"in rule {name!r}")
    known = RULES.get(family or benchmark, RULES["text"])
    if rule not in known:
        raise UnknownName("rule", name, known, f"for {benchmark}")
    return rule, known[rule]


# ---- tulu-2023-06 and tulu-2023-11 (allenai/open-instruct e44fcf588, 4a2e9dd0c)


def _whole(text: str, sample: Sample) -> Answer:
    kept = text.strip()
    return Answer(kept, bool(kept))


def _tulu_number(text: str, sample: Sample) -> Answer:
    # One pass from left to right, so "1,2,3" becomes "12,3". A sign stays only with a decimal point, and \d takes
    # every script's digits, which then equal no target.
    joined = re.sub(r"(\d),(\d)", r"\1\2", text)
    found = re.findall(r"[-+]?\d*\.\d+|\d+", joined)
    return Answer(found[-1] if found else joined, bool(found))


def first_paragraph(text: str) -> str:
    """What stands before the first blank line, stripped: read from a BBH answer under `paragraph_cut`."""
    return text.strip().split("\n\n")[0].strip()


PARAGRAPH_CUT = {"bbh": ("tulu-2023-06",)}  # the rules whose original cut so; a recipe has a switch for it


def _tulu_stated(pattern: str) -> Rule:
    def read(text: str, sample: Sample) -> Answer:
        kept = text.strip()
        found = re.search(pattern, kept)
        kept = found.group(1).strip() if found else kept
        return Answer(kept, bool(kept))

    return read


# ---- fasteval (FastEval, evaluation/benchmarks/cot.py)


def options_of(sample: Sample) -> list[tuple[str, str]]:
    """(letter, text) of each line `(A) text` of the question, then of the row's `choices`: one line an option."""
    fields = sample.fields
    lines = [str(fields.get("question") or fields.get("input") or "")]
    lines += [f"({chr(65 + i)}) {choice}" for i, choice in enumerate(fields.get("choices") or ())]
    return [(line[1], line[4:]) for line in "\n".join(lines).split("\n") if re.match(r"\([A-Z]\)..", line)]


def _fasteval_number(text: str, sample: Sample) -> Answer:
    for line in reversed(text.split("\n")):
        if found := re.findall(r"\d+(?:,\d+)*(?:\.\d+)?", line):  # no sign
            return Answer(found[-1].replace(",", ""), True)
    return Answer(text, False)


def _fasteval_choice(text: str, sample: Sample) -> Answer:
    """Letter forms in falling strictness on each line from the end, then an option's text."""
    options = options_of(sample)
    lines = text.split("\n")[::-1]
    x = f"([{''.join(letter for letter, _ in options)}])"
    forms = (rf"\({x}\)", rf" {x}\)", rf" {x}$", rf" {x}[^a-zA-Z]", rf"[^a-zA-Z]{x}$", rf"[^a-zA-Z]{x}[^a-zA-Z]")
    for line in lines if options else ():
        for form in forms:
            if found := re.findall(form, line):
                return Answer(found[-1], True)
    for line in lines if options else ():
        place = {letter: line.rfind(option) for letter, option in options}
        right = max(place, key=lambda letter: place[letter])
        if place[right] >= 0:
            return Answer(right, True)
    return Answer(text, False)


# ---- strict

# "the answer to the question is", "Answer:", "correct option is", "####", "\boxed{": what follows is the answer
STATED = re.compile(
    r"(?:\banswers?\b(?:\s+(?:to|for|of)(?:\s+[a-z']+){1,6}?)?\s*(?:\b(?:is|are|was)\b|[:=])|####|\\boxed\s*\{"
    r"|\b(?:correct|right|best|final)\s+(?:option|choice|statement|sentence|result|value)\s*(?:\bis\b|[:=]))(?:[\s:…]|\.\.+)*",
    re.IGNORECASE,
)
NEXT_QUESTION = re.compile(r"\n\s*(?:Q|Question|Quesion)\s*:")  # a base model goes on with a question of its own
MARKUP = re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|[`$]|\\[!,]|[{}](?=,)|(?<=,)[{}]")  # **bold**, `code`, $1{,}000$; not 2**3
SENTENCE_END = re.compile(r"[.!?。।](?=\s|$)")


def _strict(read: Reader) -> Rule:
    """The last stated answer; without one, the last answer in the last line that has any."""

    def rule(text: str, sample: Sample) -> Answer:
        first = NEXT_QUESTION.split(text.strip())[0]
        plain = MARKUP.sub("", first.replace("\\$", "$"))
        end = len(plain)
        for mark in reversed(list(STATED.finditer(plain))):
            sentence = SENTENCE_END.split(plain[mark.end() : end].partition("\n")[0])[0]
            end = mark.start()
            for piece in (sentence.rpartition("=")[2], sentence) if read is _numbers else (sentence,):
                if found := read(piece, sample):
                    return Answer(found[0], True)
        for line in _fallback_lines(plain, read):
            if found := read(line, sample):
                return Answer(found[-1], True)
        return Answer(text.strip(), False)

    return rule


def _fallback_lines(text: str, read: Reader) -> Iterator[str]:
    if read is _words:  # may stand one a line: the last paragraph, less a heading and the numbering
        lines = [line for line in text.split("\n\n")[-1].split("\n") if not line.rstrip().endswith(":")]
        yield " ".join(re.sub(r"^\s*(?:\d+[.)]|[-•])\s+", "", line).rpartition(":")[2] for line in lines)
    else:
        yield from reversed(text.split("\n"))


SPACE = r"[ \u00a0\u2007\u2009\u202f]"
NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}.%-])(?<![\d)\]}}]\ )[-+])?   # a minus between two terms is no sign
    [€£¥₹]?
    (?<![\^\d.])(?<!\^\{{)(?<!\d/)                          # not the exponent of cm^2, not the end of a date
    (?:(?P<whole>\d{{1,3}}(?:,\d{{3}})+ | \d{{1,2}}(?:,\d{{2}})+,\d{{3}} | \d{{1,3}}(?:{SPACE}\d{{3}})+
        | \d{{1,3}}(?:['’]\d{{3}})+ | \d{{1,3}}(?:\.\d{{3}}){{2,}} | \d{{1,3}}(?:\.\d{{3}})+(?=,\d{{1,2}}(?!\d))
        | \d+)(?!\d) (?:\.(?P<part>\d+) | ,(?P<comma>\d{{1,2}})(?![\d,]))?
      | \.(?P<bare>\d+))
    (?:\^\{{?(?P<power>\d{{1,2}})\}}?)?
    (?:(?:\ (?P<over>\d{{1,2}}))?\s?/\s?(?P<below>\d{{1,9}})(?![\d/]))?      # 3/4, 2 1/2
    (?:\s(?P<times>thousand|million|billion)\b(?!-))?""",
    re.VERBOSE | re.IGNORECASE,
)
TIMES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
MAX_DIGITS = 200  # beyond, a model has only repeated itself: kept as written, equal to no target


def _ascii_numbers(text: str) -> str:
    """Other scripts' digits, signs and separators as ASCII: `−٣٬٠٠٠` -> `-3,000`, `2½` -> `2 1/2`."""
    text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", text)
    text = re.sub(r"(?<![\d,])\d{1,2}(?:,\d{1,2}){2,}(?![\d,])", lambda found: found[0].replace(",", ", "), text)
    if text.isascii():
        return text
    text = text.translate({0x2212: "-", 0xFF0D: "-", 0x66C: ",", 0x66B: ".", 0xFF0C: ",", 0xFF0E: "."})
    text = "".join(f" {unicodedata.normalize('NFKC', c)}" if unicodedata.category(c) == "No" and
                   unicodedata.decomposition(c).startswith("<fraction>") else c for c in text).replace("⁄", "/")
    return "".join(str(unicodedata.decimal(c, c)) for c in text)


def _numbers(piece: str, sample: Sample) -> list[str]:
    """The numbers in `piece` as the shortest decimals, or as `1/3`: sign, separators, fraction, power, million."""
    return [_canonical(found) for found in NUMBER.finditer(_ascii_numbers(piece))]


def _canonical(found: re.Match[str]) -> str:
    whole = re.sub(r"\D", "", found["whole"] or "")
    part = found["part"] or found["comma"] or found["bare"] or ""
    sign = -1 if found["sign"] == "-" else 1
    if len(whole + part) * int(found["power"] or 1) > MAX_DIGITS:
        return found.group()
    value = Fraction(int(whole + part or "0"), 10 ** len(part)) ** int(found["power"] or 1)
    if below := int(found["below"] or 0):
        value = value + Fraction(int(found["over"]), below) if found["over"] else value / below
    value *= sign * TIMES.get((found["times"] or "").lower(), 1)
    if value.denominator == 1:
        return str(value.numerator)
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return f"{decimal.normalize():f}" if Fraction(decimal) == value else str(value)


def _letters(piece: str, sample: Sample) -> list[str]:
    """Option letters, upper case: `(b)` or `B)`, else a bare `B`, else an option's text and nothing more.

    Two options stated together, `(A) and (B)`, are read as `A B`, which is no option.
    """
    options = options_of(sample)
    labels = set(sample.options) or {letter for letter, _ in options} or set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    piece = unicodedata.normalize("NFKC", piece)
    if both := re.match(r"[^(]*\(([A-Z])\)[^(]*\b(?:and|or)\s+\(([A-Z])\)", piece):
        return [" ".join(sorted(set(both.groups())))]
    # "A" and "I" before a lower-case word are words; a letter beside an operator is a variable
    for form in (r"(?:(?<!\w)\(\s*(?=[A-Za-z])|^\W*(?=[A-Z]))([A-Za-z])\s*\)",
                 r"(?<![\w'’.-])(?<![*/+=^] )(?![AI]\s+[a-z])([A-Z])(?![\w'’-]|\s*=)", r"^\W*([a-z])\W*$"):
        if kept := [letter.upper() for letter in re.findall(form, piece) if letter.upper() in labels]:
            return kept
    plain = piece.strip(" .\"'").casefold()
    return [letter for letter, text in options if plain and text.strip(" .\"'").casefold() == plain]


def _one_of(*words: str) -> Reader:
    """Either of two words, lower case; `not valid` is invalid."""
    pattern = re.compile(rf"(\bnot\s+(?:\w+ly\s+)?)?\b({'|'.join(words)})\b", re.IGNORECASE)
    other = dict(zip(words, reversed(words), strict=True))

    def read(piece: str, sample: Sample) -> list[str]:
        found = pattern.findall(unicodedata.normalize("NFKC", piece))
        return [other[w.lower()] if negated and "valid" in words else w.lower() for negated, w in found]

    return read


def _words(piece: str, sample: Sample) -> list[str]:
    """One word list, lower case, one blank between; commas, quotes and a final period are dropped."""
    words = [re.sub(r"^\W+|\W+$", "", word).casefold() for word in re.split(r"[\s,;]+", piece)]
    return [" ".join(filter(None, words))] if any(words) else []


def _brackets(piece: str, sample: Sample) -> list[str]:
    """One bracket sequence, without the blanks."""
    kept = "".join(c for c in piece if c in "()[]{}<>")
    return [kept] if kept else []


# The kind of a BBH answer is read off the gold one: it is the same for a whole subtask, but for three rows (two of
# ruin_names, one of movie_recommendation) whose options the data set split at commas and whose gold is a text.
KINDS: dict[str, tuple[str, Rule]] = {
    "letter": (r"\(?[a-z]\)?", _strict(_letters)),
    "yes/no": ("yes|no", _strict(_one_of("yes", "no"))),
    "true/false": ("true|false", _strict(_one_of("true", "false"))),
    "valid/invalid": ("valid|invalid", _strict(_one_of("valid", "invalid"))),
    "number": (r"[-+]?\d[\d.,]*", _strict(_numbers)),
    "brackets": (r"[][(){}<>\s]+", _strict(_brackets)),
    "words": (".*", _strict(_words)),
}


def kind_of(sample: Sample) -> str:
    """`letter`, `number`, `words` ...: the kind of answer a BBH sample asks for; `letter` without a gold answer."""
    gold = sample.target[0].strip() if sample.target else "A"
    return next(kind for kind, (form, _) in KINDS.items() if re.fullmatch(form, gold, re.IGNORECASE | re.DOTALL))


def _strict_bbh(text: str, sample: Sample) -> Answer:
    return KINDS[kind_of(sample)][1](text, sample)


def _strict_text(text: str, sample: Sample) -> Answer:
    kept = " ".join(text.split()).rstrip(".").casefold()
    return Answer(kept, bool(kept))


RULES: dict[str, dict[str, Rule]] = {
    "gsm": {"tulu-2023-06": _tulu_number, "tulu-2023-11": _tulu_number, "strict": KINDS["number"][1],
            "fasteval": _fasteval_number},
    "bbh": {"tulu-2023-06": _tulu_stated(r"So the answer is (.*?)\."),
            # `|` stands inside the brackets in the original too
            "tulu-2023-11": _tulu_stated(r"[t|T]he answer is (.*?)\."),
            "strict": _strict_bbh, "fasteval": _fasteval_choice},
    "mmlu": {"strict": KINDS["letter"][1], "fasteval": _fasteval_choice},  # of answers in words; logits: scoring.choice
    "tydiqa": {"tulu-2023-06": _whole, "tulu-2023-11": _whole, "strict": _whole},
    "text": {"tulu-2023-06": _whole, "tulu-2023-11": _whole, "strict": _strict_text},
}
