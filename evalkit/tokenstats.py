"""Token statistics of the planned prompts (`evalkit stats`), and one prompt seen by its tokens (`prompts --show`).

    ## Stats for 'gsm_cot' (24 samples)        the lines of Open-Assistant's pretokenizer, and two more
      Accepted tokens: 21384

A prompt counts once, however many answers are asked. Skipped: it fills the model's context, whatever the recipe does
then; the other numbers are of accepted prompts. Shared prefix: the tokens at a prompt's start that the prompt before
it in its group has at the same places, which a prefix cache does not compute again.
"""

from __future__ import annotations

import json
import textwrap
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

from evalkit.errors import InputError
from evalkit.lint import known_context
from evalkit.plan import ColumnPlan, Plan, rendered
from evalkit.prompts import Rendered, Writer, asks, stops
from evalkit.tokens import Tokenizer
from evalkit.types import Choose

WIDTH = 100  # columns of a terminal


@dataclass(frozen=True, slots=True)
class Stats:
    """Of a column (`group` None) or one of its groups. Tokens are of accepted prompts; without any, min is None."""

    column: str
    group: str | None
    accepted: int
    accepted_tokens: int
    skipped: int
    min_tokens: int | None
    max_tokens: int | None
    avg_tokens: float | None
    shots_dropped: int
    shared_prefix_tokens: int
    shared_prefix: float | None  # share of the accepted tokens

    def __str__(self) -> str:
        n = self.accepted + self.skipped
        return "\n".join([
            f"## Stats for '{self.column}{'' if self.group is None else ', ' + self.group}' ({n} samples)",
            f"  Accepted: {self.accepted}/{n} ({self.accepted / n:.1%})",
            f"  Accepted tokens: {self.accepted_tokens}",
            f"  Skipped: {self.skipped} ({self.skipped / n:.1%})",
            f"  Min tokens per sample: {self.min_tokens}",
            f"  Max tokens per sample: {self.max_tokens}",
            "  Avg tokens per sample: " + ("None" if self.avg_tokens is None else f"{self.avg_tokens:.3f}"),
            f"  Shots dropped: {self.shots_dropped}",
            f"  Shared prefix tokens: {self.shared_prefix_tokens} ({self.shared_prefix or 0:.1%})"])


def measure(column: ColumnPlan, context: int | None) -> list[Stats]:
    """The column's statistics, then those of its groups, in the order of the plan, where it has any."""
    groups: dict[str, list[tuple[int, int, int]]] = {}  # tokens, shots dropped, shared of each accepted prompt
    skipped: Counter[str] = Counter()
    before: dict[str, array[int]] = {}
    for item in rendered(column):
        if item.tokens is None:
            raise InputError("--tokenizer none: statistics count tokens; name a tokenizer's folder")
        group, n = item.sample.group, len(item.tokens)
        own = groups.setdefault(group, [])
        if context is not None and n >= context:
            skipped[group] += 1
        else:
            own.append((n, item.dropped, shared_prefix(before.get(group, ()), item.tokens)))
            before[group] = item.tokens
    parts = [(None, list(chain(*groups.values())), skipped.total()),
             *((group, own, skipped[group]) for group, own in groups.items() if set(groups) != {""})]
    return [_stats(column.column.name, *part) for part in parts if part[1] or part[2]]


def _stats(column: str, group: str | None, accepted: Sequence[tuple[int, int, int]], skipped: int) -> Stats:
    if not accepted:
        return Stats(column, group, 0, 0, skipped, None, None, None, 0, 0, None)
    sizes, dropped, shared = zip(*accepted, strict=True)
    total = sum(sizes)
    return Stats(column, group, len(sizes), total, skipped, min(sizes), max(sizes), total / len(sizes), sum(dropped),
                 sum(shared), sum(shared) / max(1, total))


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def print_stats(plan: Plan, as_json: bool) -> int:
    """Print every column and group: a block each, or with `as_json` one JSON object a line."""
    context = known_context(plan)
    if not as_json:
        print(f"# Stats for {plan.spec.model}, recipe {plan.recipe.name}, context {context or 'unknown'}")
    for column in plan.columns:
        for one in measure(column, context):
            print(json.dumps(asdict(one), ensure_ascii=False) if as_json else f"\n{one}")
    return 0


def show(plan: Plan) -> Iterator[str]:
    """The lines of `prompts --show`: for each planned prompt its text, what is asked, and its tokens."""
    for column in plan.columns:
        for item in rendered(column):
            n = "no tokenizer" if item.tokens is None else f"{len(item.tokens)} tokens"
            less = f" ({item.dropped} dropped)" if item.dropped else ""
            yield f"=== {column.column.name} {item.sample.id}: {n}, {item.n_shots} shots{less} ==="
            *lines, last = item.text.split("\n")
            for line in [*(f"{line}⏎" for line in lines), f"{last}▮"]:  # ▮: here the model goes on
                yield from _folded(line)
            for line in _asked(column.writer, item):
                yield from textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            if item.tokens is not None and column.writer.tokenizer is not None:
                yield from _tokens(column.writer, column.writer.tokenizer, item.tokens)


def _folded(line: str) -> Iterator[str]:
    """`line` behind a bar, what goes over the width behind colons."""
    row = "| "
    for c in line:
        if _width(row + c) > WIDTH:
            yield row
            row = ": "
        row += c
    yield row


def _asked(writer: Writer, item: Rendered) -> Iterator[str]:
    tokenizer, switches = writer.tokenizer, writer.column.switches
    if tokenizer is None:
        yield f"asked: {'one of ' + ', '.join(item.sample.options) if writer.task.kind == 'choice' else 'a text'}"
        return
    wanted = asks(writer, item.sample)
    first, last = wanted[0], wanted[-1]
    if isinstance(first, Choose):
        ids = [option[-1] for option in first.options]
        read = zip(item.sample.options, ids, tokenizer.pieces(ids), strict=True)
        yield "asked: log-probability of " + ", ".join(f"{letter} = {i} {piece}" for letter, i, piece in read)
        return
    assert not isinstance(last, Choose)
    how = (f"temperature {first.temperature}, top_p {first.top_p}, seeds {first.seed} to {last.seed}"
           if first.temperature else "greedy")
    yield f"asked: {len(wanted)} text{'s' * (len(wanted) > 1)} of at most {switches['max_tokens']} tokens, {how}"
    texts, sequences = stops(writer)
    found = [*map(repr, texts), *(f"{' '.join(map(str, s))} ({_seen(tokenizer, s)})" for s in sequences)]
    ends = f"{tokenizer.eos} ({tokenizer.token('eos')})" if tokenizer.eos is not None else "the model's own end"
    yield f"stops: {', '.join([*found, ends])}"


def _tokens(writer: Writer, tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[str]:
    """Pieces over their ids, in rows; a row ends behind a newline. Special ones stand in ⟦ ⟧."""
    fmt = writer.format
    known = [tokenizer.encode(text) for text in (*fmt.special, *fmt.stop)]
    special = {tokenizer.bos, tokenizer.eos, *(one[0] for one in known if len(one) == 1)}
    above, below = "", ""
    for i in ids:
        piece = f"⟦{tokenizer.pieces([i])[0]}⟧" if i in special else _seen(tokenizer, [i])
        size = max(_width(piece), len(str(i))) + 1
        if above and (above.rstrip().endswith("⏎") or _width(above) + size > WIDTH):
            yield from ("", above.rstrip(), below.rstrip())
            above = below = ""
        above += piece + " " * (size - _width(piece))
        below += str(i).ljust(size)
    yield from ("", above.rstrip(), below.rstrip())


def _seen(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Pieces as one sees them: ␣ a blank, ⏎ a newline, ⇥ a tab; a part of a character as the tokenizer names it."""
    shown = []
    for i, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        text = piece.replace("▁", " ") if "▁" in piece else tokenizer.decode([i])
        shown.append(piece if "\ufffd" in text else text.translate(str.maketrans(" \n\t", "␣⏎⇥")))
    return " ".join(shown)


def _width(text: str) -> int:
    """Columns of a terminal that `text` takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
