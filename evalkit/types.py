"""The nouns of evalkit: frozen values, no logic. One word for one thing, in code, files and docs.

    Row -> Sample -> Prompt -> Request -> Completion -> Score -> Metric -> Table

A Row is a mapping as the data set has it; the runner reads like the line above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Switches = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a benchmark. `id` as in `anatomy/test/12`; `group` is the subject, language or subtask."""

    id: str
    fields: Mapping[str, Any]
    target: tuple[str, ...] = ()  # every gold answer; a choice task has one letter
    options: tuple[str, ...] = ()  # the labels of a choice task, in order
    group: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is said to the model, before any chat format. `prefill` is the beginning of its answer."""

    messages: tuple[Message, ...]
    prefill: str = ""
    n_shots: int = 0


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for text. `stop` are strings, `stop_tokens` sequences of token ids; both are cut off the answer."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[tuple[int, ...], ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Choose:
    """Ask for the log-probabilities of exactly these continuations, each a tuple of token ids."""

    options: tuple[tuple[int, ...], ...]


Ask = Generate | Choose


@dataclass(frozen=True, slots=True)
class Request:
    """One answer asked for. `key` is the hash of all that decides the answer (see `prompts.request_key`)."""

    key: str
    column: str
    sample: str
    index: int  # 0 .. n-1 where a sample is asked n times
    tokens: Sequence[int]
    ask: Ask


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. An error is data: `finish == "error"` and `error` says what.

    `finish`: `eos` (the model ended it), `stop` (`stop` names which), `max_tokens`, `context` (the model's
    length ran out), `choice` (option log-probabilities, natural log over the whole vocabulary), `error`.
    """

    key: str
    text: str = ""
    logprobs: tuple[float, ...] = ()
    finish: str = "eos"
    stop: str = ""
    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict on one sample. `value` is a share, 0 to 1; None when `status` is `failed`, and for a comparison
    whose judge's reply said nothing (`unparsed`), which is dropped from the count as the original does."""

    sample: str
    status: str  # scored, unparsed (counts as `value` says, normally 0) or failed (no value)
    value: float | None
    answer: str = ""  # what was read from the completion
    group: str = ""
    verdicts: tuple[str, ...] = ()  # one per completion where a sample has several (Codex), or why it failed


@dataclass(frozen=True, slots=True)
class Health:
    """How the answers behind a metric came about: counts of completions, except `unparsed` (samples)."""

    n: int = 0  # completions
    unparsed: int = 0
    empty: int = 0
    truncated: int = 0  # ended by max_tokens
    context: int = 0  # ended by the model's length, or refused because the prompt is over it
    failed: int = 0
    stops: Mapping[str, int] = field(default_factory=dict)  # which stop ended how many
    option_mass: float | None = None  # mean probability of all options together; None where nothing is chosen


@dataclass(frozen=True, slots=True)
class Metric:
    """One cell: never a bare number. `value`, `low`, `high` are shares; None with `reason` when there is none."""

    column: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    n_groups: int
    health: Health
    reason: str = ""
    marks: tuple[str, ...] = ()  # self-judged, partial, unhealthy: ..., shown with the cell


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a recipe: a task and every switch it is run with."""

    name: str
    benchmark: str
    header: str
    task: str
    switches: Switches


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    title: str
    columns: tuple[Column, ...]
    benchmarks: tuple[str, ...]  # those in Average, in order
    seed: int
    notes: tuple[str, ...] = ()
    revisions: Mapping[str, str] = field(default_factory=dict)  # data set -> revision; `main` when absent
    changed: tuple[str, ...] = ()  # `--set` overrides, as given


@dataclass(frozen=True, slots=True)
class DataRef:
    """A split of a data set: `DataRef("openai/gsm8k", "main", "test")`. `file`: read this JSON file instead."""

    repo: str
    config: str
    split: str
    file: str = ""
    package: str = ""  # the installed package that carries it, instead of the hub


@dataclass(frozen=True, slots=True)
class Setting:
    """What a task may know when it writes a prompt: its switches, whether a chat format follows, how to cut."""

    switches: Switches
    chat: bool
    cut: Callable[[str], str]  # text -> text cut to the recipe's context_tokens; the identity without tokenizer


Loader = Callable[[DataRef], Sequence[Row]]
Shots = Mapping[str, tuple[Sample, ...]]  # group -> its exemplars in order; "" serves every group


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark as a Python value: `task = Task(...)` in `tasks/<name>/task.py`. Functions are pure."""

    name: str
    version: int
    refs: tuple[DataRef, ...]  # the evaluated splits, in the order of the draw
    sample: Callable[[Row, DataRef, int], Sample]
    prompt: Callable[[Sample, Sequence[Sample], Setting], Prompt]
    kind: str  # choice, exact, f1, code or pairwise: how it is asked and scored (evalkit.scoring)
    shots: Callable[[Loader, Switches, Sequence[str]], Shots] | None = None  # loader, switches, groups
    references: Callable[[Loader], Mapping[str, str]] | None = None  # pairwise: instruction -> the baseline's text
    header: str = ""  # a user's task: the head of its column, the name when empty
    switches: Switches = field(default_factory=dict)  # a user's task: its switches besides the recipe's defaults


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What was asked: the command line as one value."""

    model: str
    tasks: str = "all"
    recipe: str = "tulu-2023-06"
    data: str = "hub"
    limit: int | None = None
    ids: tuple[str, ...] = ()
    format: str = ""
    tokenizer: str = ""
    engine: str = ""
    engine_args: Mapping[str, str] = field(default_factory=dict)
    sets: tuple[str, ...] = ()
    tasks_dir: str = ""
    out: str = "results"
    name: str = ""
    judge: str = "self"
    system: str = ""
    sandbox: str = "auto"
    options: Mapping[str, str] = field(default_factory=dict)  # the rare rest
