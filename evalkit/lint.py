"""Prompt lint: what is wrong with the planned prompts, before anything is spent on them.

    error    bos-twice  gsm_cot   200 prompts, first gsm8k/main/test/0: the prompt begins with <s> twice

An error makes numbers wrong and stops the run (exit 2) unless `--allow RULE` names it; a warning stands in run.json
and under the table. Each prompt is looked at as it passes, format and option letters once a column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from evalkit import formats
from evalkit.errors import InputError, UnknownName
from evalkit.plan import Plan, rendered
from evalkit.prompts import Rendered, Writer
from evalkit.types import Message, Prompt

# Error: other tokens than the model was trained on or the recipe wants, or no answer at all. Warning: to be known.
RULES: Mapping[str, str] = {
    "bos-twice": "the prompt begins with two BOS",
    "bos-unwanted": "the prompt begins with BOS, though the recipe says none",
    "bos-missing": "the prompt begins without the BOS that the recipe leaves to the tokenizer",
    "bos-inside": "a BOS stands inside the prompt, as where a passage was cut with it",
    "special-split": "the tokenizer splits what the chat format declares special",
    "header-tail": "the assistant header lacks the newline or blank behind it",
    "prefill-split": "the answer's beginning has other tokens alone than in the prompt, with which it is sent",
    "option-tokens": "the token read for an option is not the one that a model would write",
    "over-context": "prompts over the model's context",
    "answer-room": "prompt and longest answer together are over the model's context",
    "shots-dropped": "exemplars dropped to fit",
    "duplicate-prompts": "prompts equal to an earlier sample's",
}
ERROR, WARNING = "error", "warning"
Hit = tuple[str, str, str]  # rule, severity, text
ASK, REPLY = Message("user", "QUESTION-1"), Message("assistant", "ANSWER-1")


@dataclass(frozen=True, slots=True)
class Finding:
    """`count` prompts of `column` break `rule`; `example` is the first one's sample id, `text` what is wrong there."""

    rule: str
    severity: str  # error or warning
    column: str
    text: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.count} prompt{'s' * (self.count > 1)}, first {self.example}: {self.text}"


class Linter:
    """Sees each prompt once. `context`: the model's length in tokens, None where it is not known."""

    def __init__(self, context: int | None) -> None:
        self._context = context
        self._columns: dict[str, _Column] = {}
        self._found: dict[tuple[str, str, str], tuple[str, int, str]] = {}

    def see(self, writer: Writer, item: Rendered) -> None:
        name = writer.column.name
        if name not in self._columns:
            self._columns[name] = _Column(writer, self._context)
        for rule, severity, text in self._columns[name].hits(item):
            first, count, example = self._found.get((rule, severity, name), (text, 0, item.sample.id))
            self._found[rule, severity, name] = first, count + 1, example

    def findings(self, allow: frozenset[str] = frozenset()) -> list[Finding]:
        """What was found so far, errors first, then by rule. Errors that `allow` names are warnings."""
        found = [Finding(rule, WARNING if rule in allow else severity, column, *rest)
                 for (rule, severity, column), rest in self._found.items()]
        return sorted(found, key=lambda f: (f.severity, list(RULES).index(f.rule)))


class _Column:
    """What is known of one column, and the look at each of its prompts."""

    def __init__(self, writer: Writer, context: int | None) -> None:
        self.writer, self.context = writer, context
        self.tokenizer, self.switches = writer.tokenizer, writer.column.switches
        self.choice = writer.task.kind == "choice"
        self.seen: set[int] = set()
        self.prefills: dict[str, tuple[str, Sequence[int], str]] = {}  # group -> prefill, its ids here, what is wrong
        self.options: dict[tuple[tuple[str, ...], str], list[Hit]] = {}

    def hits(self, item: Rendered) -> Iterator[Hit]:
        yield from self.fixed
        mark = hash(item.text)
        if mark in self.seen:
            yield "duplicate-prompts", WARNING, RULES["duplicate-prompts"]
        self.seen.add(mark)
        if item.dropped:
            yield "shots-dropped", WARNING, f"exemplars dropped to fit {self.switches['fit_tokens']} tokens"
        if item.tokens is None:
            return
        yield from self._bos(item.text, item.tokens)
        yield from self._length(len(item.tokens))
        if wrong := self._prefill(item, item.tokens):
            yield "prefill-split", WARNING, wrong
        if self.choice and item.sample.options:
            key = item.sample.options, item.text[-1:]
            if key not in self.options:
                self.options[key] = list(self._options(*key))
            yield from self.options[key]

    @cached_property
    def fixed(self) -> list[Hit]:
        """What holds for every prompt of the column: its chat format against the tokenizer and against itself."""
        fmt, found = self.writer.format, []
        if fmt.chat and (fault := header_fault(self.writer)):
            found.append(("header-tail", *fault))
        ids = {text: self.tokenizer.encode(text) for text in fmt.special} if self.tokenizer is not None else {}
        split = [f"{text} is {self._pieces(own)}" for text, own in ids.items() if len(own) != 1]
        if split:
            found.append(("special-split", ERROR, f"format {fmt.name}: {'; '.join(split)} in this tokenizer"))
        return found

    @cached_property
    def bos(self) -> tuple[int, str, bool]:
        """BOS as id (-1: none) and text, and whether it begins every turn besides (SmolLM2's is <|im_start|>)."""
        if self.tokenizer is None or self.tokenizer.bos is None:
            return -1, "", True
        text = self.tokenizer.token("bos")
        return self.tokenizer.bos, text, (text in self.writer.format.special
                                          or self.writer.text(Prompt((ASK,))).count(text) > 1)

    def _bos(self, text: str, tokens: Sequence[int]) -> Iterator[Hit]:
        bos, written, begins_turns = self.bos
        if bos < 0 or not tokens or self.tokenizer is None:
            return
        wanted, first = self.switches["bos"] == "tokenizer", tokens[0] == bos
        if first and tokens[1:2] == tokens[:1]:
            by = "added by the tokenizer and written" if wanted and self.tokenizer.adds_bos else "written"
            yield "bos-twice", ERROR, f"the prompt begins with {written} twice, {by} by the format or the sample"
        elif first and not wanted and not begins_turns:
            yield "bos-unwanted", ERROR, f"the prompt begins with {written}, but the recipe says bos = none"
        elif not first and wanted and self.tokenizer.adds_bos:
            yield "bos-missing", ERROR, f"the prompt begins without {written}, but the recipe says bos = tokenizer"
        if not begins_turns and text.find(written, 1) > 0 and bos in tokens[1:]:
            yield "bos-inside", WARNING, f"{written} stands inside the prompt"

    def _length(self, n: int) -> Iterator[Hit]:
        if self.context is None:
            return
        over, new, room = self.switches["over_context"], self.switches["max_tokens"], self.context - n
        if room < 1:
            how = {"extend": "the engine runs past it, as the original did", "empty": "they count as empty answers",
                   "fail": "they have no answer; over_context = empty or extend gives one"}[over]
            yield ("over-context", ERROR if over == "fail" else WARNING,
                   f"prompts over the context of {self.context} tokens: {how}")
        elif new > room and not self.choice:
            how = "the engine may run past it, as the original did" if over == "extend" else "it may end the answer"
            yield "answer-room", WARNING, f"prompt and {new} new tokens are over the context of {self.context}: {how}"

    def _prefill(self, item: Rendered, tokens: Sequence[int]) -> str:
        known = self.prefills.get(item.sample.group)
        if known is None or not item.text.endswith(known[0]) or tokens[len(tokens) - len(known[1]):] != known[1]:
            prefill = self.writer.task.prompt(item.sample, (), self.writer.setting).prefill
            alone = self._encode(prefill)
            here = tokens[max(0, len(tokens) - len(alone)):]
            wrong = "" if here == alone else f"{prefill!r} is {self._pieces(alone)} alone, {self._pieces(here)} here"
            known = self.prefills[item.sample.group] = prefill, here, wrong
        return known[2]

    def _options(self, letters: tuple[str, ...], end: str) -> Iterator[Hit]:
        """The tokens read for `letters`: each its whole letter, no two alike, and what follows `end` by itself."""
        assert self.tokenizer is not None
        ids = [option[-1] for option in self.tokenizer.option_ids(letters, self.switches["option_ids"])[0]]
        read = [self.tokenizer.decode([i]).strip() for i in ids]
        if read != list(letters) or len(set(ids)) < len(ids):
            shown = ", ".join(f"{letter!r} by {text!r}" for letter, text in zip(letters, read, strict=True))
            yield "option-tokens", ERROR, f"options of several tokens cannot be told apart by one: {shown}"
            return
        joint = "" if end.isspace() else " "
        for letter, i in zip(letters, ids, strict=True):
            after = self._encode(f"{end}{joint}{letter}")[len(self._encode(end)):]
            if list(after) != [i]:
                yield "option-tokens", WARNING, (f"after {end!r} {letter!r} is {self._pieces(after)}, but read is "
                                                 f"{self._pieces([i])}")
                return

    def _encode(self, text: str) -> Sequence[int]:
        return self.tokenizer.encode(text) if self.tokenizer is not None else ()

    def _pieces(self, ids: Sequence[int]) -> str:
        return " ".join(self.tokenizer.pieces(ids)) if self.tokenizer is not None else ""


def header_fault(writer: Writer) -> tuple[str, str] | None:
    """Severity and text where the white space behind the assistant header is not what it should be.

    Held against the shipped format that is the same up to there (the whole turn, else the header's last line), then
    against the template's own finished turns. None at all is right where the answer's first token brings the blank.
    """
    def ends(writer: Writer) -> tuple[str, str, str]:
        text = writer.text(Prompt((ASK,)))
        bare = text.rstrip()
        return bare, bare.partition(ASK.content)[2].rpartition("\n")[2], text[len(bare):]

    whole, line, tail = ends(writer)
    wrong = WARNING if writer.format.source == "tokenizer" else ERROR  # a model's own template is its own affair
    behind = f"behind {line[-30:]!r} stands {repr(tail) if tail else 'nothing'}"
    shipped = {name: ends(replace(writer, chat_format=formats.load(name)))
               for name in formats.names() if name not in ("auto", "none")}
    alike = ({name: end[2] for name, end in shipped.items() if end[0] == whole}
             or {name: end[2] for name, end in shipped.items() if end[1] == line})
    if alike and tail not in alike.values():
        name, wanted = next(iter(alike.items()))
        return wrong, f"{behind}, in format {name} {wanted!r}"
    if alike or tail:
        return None
    try:
        before, answered, _ = writer.text(Prompt((ASK, REPLY, ASK))).partition(REPLY.content)
    except InputError:  # a template for one turn alone
        before = answered = ""
    if not answered:
        return WARNING, f"{behind}, and the template shows no finished answer to compare"
    missing = before.removeprefix(whole)
    if not missing.isspace() or ("\n" not in missing and _carried(writer, whole, missing)):
        return None
    return wrong, f"{behind}, in the template's finished turns {missing!r}"


def _carried(writer: Writer, header: str, blank: str) -> bool:
    """Whether an answer's first token can bring the blank: the header's own tokens stay as they are."""
    if writer.tokenizer is None:
        return True
    alone = writer.tokenizer.encode(header)
    return writer.tokenizer.encode(f"{header}{blank}A")[:len(alone)] == alone


def allowed(options: Mapping[str, str]) -> frozenset[str]:
    """The rules that `--allow` names. UnknownName for one that is none."""
    named = frozenset(options.get("allow", "").replace(",", " ").split())
    for name in sorted(named - set(RULES)):
        raise UnknownName("lint rule", name, RULES, "--allow")
    return named


def refuse(found: Sequence[Finding]) -> None:
    """InputError for the first error in `found`; it says how many others there are."""
    errors = [f for f in found if f.severity == ERROR]
    if errors:
        f, names = errors[0], ",".join(dict.fromkeys(e.rule for e in errors))
        more = f" ({len(errors) - 1} more: see `evalkit prompts --lint`)" if len(errors) > 1 else ""
        raise InputError(f"lint {f.rule} in {f.column}, {f}{more}; --allow {names} runs it as it is")


def notes(found: Sequence[Finding]) -> list[str]:
    """One note a rule for the table: `shots-dropped: exemplars dropped to fit 2048 tokens (mmlu_5shot 522)`."""
    lines = []
    for rule in dict.fromkeys(f.rule for f in found):
        own = [f for f in found if f.rule == rule]
        text = own[0].text if len({f.text for f in own}) == 1 else f"{RULES[rule]}; in {own[0].column} {own[0].text}"
        lines.append(f"{rule}: {text} ({', '.join(f'{f.column} {f.count}' for f in own)})")
    return lines


def known_context(plan: Plan) -> int | None:
    """The model's length, or None where only its name is at hand (`evalkit prompts` with another tokenizer)."""
    given = plan.spec.engine_args.get("max_model_len") or plan.model.context
    return plan.context if given or (Path(plan.model.path) / "config.json").is_file() else None


def print_findings(plan: Plan, as_json: bool) -> int:
    """Print a line a finding over every planned prompt; 2 when an error stands, since a run would be refused."""
    linter = Linter(known_context(plan))
    for column in plan.columns:
        for item in rendered(column):
            linter.see(column.writer, item)
    found = linter.findings(allowed(plan.spec.options))
    for f in found:
        print(json.dumps(asdict(f), ensure_ascii=False) if as_json else
              f"{f.severity:8} {f.rule:18} {f.column:12} {f}")
    return 2 if any(f.severity == ERROR for f in found) else 0
