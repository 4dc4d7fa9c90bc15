"""What is asked and in which order, all columns pooled; and asking it, each answer journaled as it comes.

    todo = requests(plan, folder)       # writes <column>.requests.jsonl
    ask(engine, unanswered(todo, folder), folder, todo)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from evalkit import engines, store
from evalkit.engines import Engine, EngineSpec
from evalkit.lint import Finding, Linter, allowed, refuse
from evalkit.plan import ColumnPlan, Plan
from evalkit.progress import bar, say
from evalkit.store import RunFolder
from evalkit.types import Choose, Completion, Generate, Request


@dataclass(slots=True)
class Work:
    """All that a run asks. Equal keys are asked once, whichever samples and columns want them."""

    requests: list[Request] = field(default_factory=list)
    settled: dict[str, Completion] = field(default_factory=dict)  # key -> answer known without asking
    columns: dict[str, list[str]] = field(default_factory=dict)  # key -> the columns that want its answer
    keys: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # column -> sample id -> keys by index
    max_tokens: Mapping[str, int] = field(default_factory=dict)  # column -> what the recipe allows
    length: int = 1  # the longest prompt with its answer, in tokens
    lint: list[Finding] = field(default_factory=list)


def requests(planned: Plan, folder: RunFolder) -> Work:
    """Plan every request, write them down, and settle those that the recipe keeps from the engine.

    InputError where the lint finds what makes numbers wrong and --allow does not name it.
    """
    linter = Linter(planned.context)
    todo = Work(max_tokens={c.column.name: c.column.switches["max_tokens"] for c in planned.columns})
    for column in planned.columns:
        folder.write_lines(column.column.name, "requests", _column(planned, column, todo, linter))
    todo.lint = linter.findings(allowed(planned.spec.options))
    refuse(todo.lint)
    return todo


def _column(planned: Plan, column: ColumnPlan, todo: Work, linter: Linter) -> Iterator[dict[str, object]]:
    name, over, context = column.column.name, column.column.switches["over_context"], planned.context
    keys = todo.keys[name] = {sample.id: [] for sample in column.samples}
    for item, request in planned.requests(column):
        keys[request.sample].append(request.key)
        yield store.request_record(request, item)
        if request.index == 0:
            linter.see(column.writer, item)
        new = request.ask.max_tokens if isinstance(request.ask, Generate) else 1
        room = context - len(request.tokens)
        if new > room and over == "extend":
            pass  # the engine is made long enough
        elif room < 1:
            error = f"the prompt has {len(request.tokens)} tokens, the model's context {context}"
            todo.settled[request.key] = (Completion(request.key, finish="error", error=error) if over == "fail"
                                         else Completion(request.key, finish="context"))
        elif new > room and isinstance(request.ask, Generate):
            request, new = replace(request, ask=replace(request.ask, max_tokens=room)), room
        wanting = todo.columns.setdefault(request.key, [])
        if not wanting and request.key not in todo.settled:
            todo.requests.append(request)
            todo.length = max(todo.length, len(request.tokens) + new)
        if name not in wanting:
            wanting.append(name)


def unanswered(todo: Work, folder: RunFolder) -> list[Request]:
    """The requests without an answer in the folder, long generations first and multiple choice last to fill the
    tail; else in the order of the plan, which puts equal prefixes side by side."""
    names = {name for wanting in todo.columns.values() for name in wanting}
    done = {name: folder.completions(name, say) for name in sorted(names)}

    def is_open(key: str) -> bool:
        return any(key not in done[name] or done[name][key].finish == "error" for name in todo.columns[key])

    for key, completion in todo.settled.items():
        if is_open(key):
            _journal(completion, folder, todo)
    left = [request for request in todo.requests if is_open(request.key)]
    return sorted(left, key=lambda r: 0 if isinstance(r.ask, Choose) else -r.ask.max_tokens)


def start(planned: Plan, folder: RunFolder, todo: Work) -> Engine:
    """The run's one engine, long enough for its longest request and, where it judges itself, for its context."""
    todo.length = max(todo.length, planned.context if planned.self_judged else 1)
    args = {k: v for k, v in planned.spec.engine_args.items() if k != "max_model_len"}
    spec = EngineSpec(planned.model.path, planned.model.revision, todo.length, args, folder.path / "engine.log",
                      planned.recipe.seed, planned.spec.tokenizer or planned.model.path)
    name = engines.resolve(planned.spec.engine)
    say(f"engine: {name} loads {planned.model.name}; chat format {planned.format.name}, length {todo.length} tokens")
    return engines.create(name, spec)


def ask(engine: Engine, todo: Sequence[Request], folder: RunFolder, work: Work) -> None:
    """Send all and journal each answer as it comes."""
    for completion in bar(engine.complete(iter(todo)), len(todo), "generate"):
        _journal(completion, folder, work)


def _journal(completion: Completion, folder: RunFolder, work: Work) -> None:
    for name in work.columns[completion.key]:
        short = completion.finish == "max_tokens" and completion.n_generated < work.max_tokens[name]
        # an answer that filled a room shortened by the context was ended by the context
        folder.append(name, replace(completion, finish="context") if short else completion)
