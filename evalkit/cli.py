"""The command line: options -> RunSpec -> one call. Errors are one line on stderr, without a traceback.

Exit codes: 0 all scored; 1 the run ended but something in it failed or a check said no; 2 bad input; 130 and 143
for SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from evalkit import __version__
from evalkit.errors import EvalkitError, InputError, UnknownName
from evalkit.types import RunSpec

RARE = {  # what --option takes: its value and what it does
    "allow": ("RULES", "run in spite of these lint errors"),
    "judge-price": ("P,R", "USD per million tokens of the judge's prompts and replies, for --dry-run"),
    "no-probe": ("", "--dry-run starts no engine"),
    "reuse": ("RUN", "take equal answers over from another run"),
    "sequential": ("", "ask column by column, not pooled"),
    "strict": ("", "exit 1 when a cell is unhealthy"),
}
GRACE = 10.0  # seconds after a signal in which a second one changes nothing: the engine is being closed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="evalkit", description="Benchmark an instruction-tuned model: one command, one row.")
    top.add_argument("--version", action="version", version=f"evalkit {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _run(commands.add_parser("run", help="evaluate a model: prompts, answers, scores, table"))
    _prompts(commands.add_parser("prompts", help="print what would be sent; starts no engine"))
    _stats(commands.add_parser("stats", help="token statistics of the prompts, by column and group"))
    table = commands.add_parser("table", help="the paper-style table of finished runs")
    table.add_argument("runs", nargs="+", metavar="RUN", help="run folder: results/<model>/<run>")
    table.add_argument("--format", default="md", metavar="F", help="md (default), csv, json, latex or html")
    _score(commands.add_parser("score", help="score answers again, by any rule; no engine"))
    for name, what in (("tasks", "columns and benchmarks"), ("models", "known models"), ("recipes", "recipes"),
                       ("formats", "chat formats")):
        _listing(name, commands.add_parser(name, help=f"list {what}"))
    data = commands.add_parser("data", help="get data for a machine without a hub")
    get = data.add_subparsers(dest="action", required=True, metavar="get", parser_class=_Parser).add_parser(
        "get", help="write all that a recipe needs to DIR, in hub layout, with hashes")
    get.add_argument("dir", metavar="DIR")
    _what(get)
    sandbox = commands.add_parser("sandbox", help="how model-written programs are held")
    check = sandbox.add_subparsers(dest="action", required=True, metavar="check", parser_class=_Parser).add_parser(
        "check", help="try each layer and say which hold")
    check.add_argument("--sandbox", default="auto", metavar="LEVEL", help="auto (default), bwrap, kernel or process")
    _model_checks(commands)
    _noise(commands.add_parser("check-engines", help="how much engines differ: below that, a gain is noise"))
    return top


def _what(p: argparse.ArgumentParser) -> None:
    p.add_argument("--tasks", default="all", metavar="LIST", help="columns or benchmarks, by commas (default all)")
    p.add_argument("--recipe", default="tulu-2023-06", metavar="R", help="name or FILE.toml (default tulu-2023-06)")
    p.add_argument("--tasks-dir", default="", metavar="DIR", help="a folder of your own tasks")


def _common(p: argparse.ArgumentParser, run: bool = False) -> None:
    what = p.add_argument_group("what to evaluate")
    what.add_argument("--model", required=not run, action="append" if run else "store", default=[], metavar="M",
                      help="a known NAME, NAME=DIR, a folder or a hub id" + " (repeatable)" * run)
    _what(what)  # type: ignore[arg-type]
    what.add_argument("--set", action="append", default=[], metavar="C.SWITCH=V", dest="sets",
                      help="override a switch of a column or benchmark (repeatable)")
    rows = p.add_argument_group("on which rows")
    rows.add_argument("--data", default="hub", metavar="D", help="hub (default), sample, or a folder in hub layout")
    rows.add_argument("--limit", type=_positive, metavar="N", help="N samples a column, inside the recipe's draw")
    rows.add_argument("--ids", default="", metavar="LIST", help="these samples: ids by commas, or @FILE")
    form = p.add_argument_group("in which form")
    form.add_argument("--format", default="", metavar="F", help="format: a name or FILE.jinja (default the model's)")
    form.add_argument("--system", default="", metavar="S", help="system message: a text, or a name the model knows")
    form.add_argument("--tokenizer", default="", metavar="DIR", help="another folder's tokenizer")


def _run(p: argparse.ArgumentParser) -> None:
    _common(p, run=True)
    how = p.add_argument_group("how")
    how.add_argument("--engine", default="", metavar="E", help="vllm (default), hf, openai, replay or mock")
    how.add_argument("--engine-args", nargs="+", action="extend", default=[], metavar="K=V",
                     help="dtype, max_model_len, tensor_parallel_size, ...; of replay: answers=FILE, of openai: "
                          "base_url=URL; these two also as --answers FILE, --base-url URL")
    how.add_argument("--judge", default="self", metavar="J", help="self (default) or openai:MODEL@URL")
    how.add_argument("--sandbox", default="auto", metavar="LEVEL", help="auto (default), bwrap, kernel or process")
    how.add_argument("--dry-run", action="store_true", help="say what would be asked and what it costs; writes nothing")
    how.add_argument("--option", action="append", default=[], metavar="K[=V]",
                     help="; ".join(f"{name}{'=' * bool(value)}{value}: {text}" for name, (value, text) in RARE.items())
                          + "; also as --sequential, --reuse RUN and so on")
    out = p.add_argument_group("where to")
    out.add_argument("--out", default="results", metavar="DIR", help="results folder (default results)")
    out.add_argument("--name", default="", metavar="N", help="the run's name (default time and short hash)")
    out.add_argument("--resume", default="", metavar="RUN", help="go on with this run; needs no other option")
    for name, (value, _) in RARE.items():
        _short(p, "option", name, name + "={}" if value else "")
    _short(p, "engine_args", "answers", "answers={}")
    _short(p, "engine_args", "base-url", "base_url={}")


def _short(p: argparse.ArgumentParser, dest: str, name: str, form: str) -> None:
    """`--reuse RUN` for `--option reuse=RUN`: not in the help by itself."""
    if form:
        p.add_argument(f"--{name}", action="append", dest=dest, type=form.format, default=[], help=argparse.SUPPRESS)
    else:
        p.add_argument(f"--{name}", action="append_const", dest=dest, const=name, default=[], help=argparse.SUPPRESS)


def _prompts(p: argparse.ArgumentParser) -> None:
    _common(p)
    only = p.add_argument_group("instead of the texts").add_mutually_exclusive_group()
    only.add_argument("--lint", action="store_true",
                      help="what is wrong with the prompts, a line a finding; exit 2 where a run would be refused")
    only.add_argument("--show", default="", metavar="ID", help="one sample's prompts as text and as tokens")
    p.add_argument("--allow", action="append", dest="option", type="allow={}".format, default=[], metavar="RULES",
                   help="with --lint: as for `evalkit run`")
    p.add_argument("--json", action="store_true", help="one JSON object a line")


def _stats(p: argparse.ArgumentParser) -> None:
    _common(p)
    p.add_argument("--json", action="store_true", help="one JSON object a line")


def _score(p: argparse.ArgumentParser) -> None:
    p.add_argument("target", metavar="RUN|FILE", help="a run folder, or with --task a file of JSON lines")
    p.add_argument("--task", default="", metavar="T", help="column or benchmark of FILE's answers")
    p.add_argument("--rule", default="", metavar="R", help="rule for FILE's answers")
    p.add_argument("--rules", default="all", metavar="LIST", help="rules to set side by side over RUN (default all)")
    p.add_argument("--tokenizer", default="", metavar="DIR", help="tokenizer of FILE's token-level stops")
    p.add_argument("--sandbox", default="auto", metavar="LEVEL", help="for FILE's programs: auto, bwrap, ...")
    p.add_argument("--json", action="store_true", help="one JSON object a line")


def _listing(name: str, p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="for programs")
    actions = {"tasks": (("check", "run your tasks on their own sample rows", ["DIR"]),),
               "models": (("prepare", "fetch an embedded model into the cache", ["NAME"]),),
               "recipes": (("show", "every switch of a recipe", ["NAME"]),
                           ("diff", "the switches in which two recipes differ", ["A", "B"]))}
    if name in actions:
        subs = p.add_subparsers(dest="action", metavar="ACTION", parser_class=_Parser)
        for action, text, arguments in actions[name]:
            sub = subs.add_parser(action, help=text)
            metavar = arguments[0] if len(arguments) == 1 else tuple(arguments)
            sub.add_argument("names", nargs=len(arguments), metavar=metavar)
            if action in ("show", "diff"):
                sub.add_argument("--json", action="store_true", help="for programs")


def _model_checks(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = commands.add_parser("doctor", help="check a model folder without loading its weights")
    doctor.add_argument("--model", required=True, metavar="M")
    doctor.add_argument("--format", default="", metavar="F", help="the chat format to hold the template against")
    recover = commands.add_parser("recover", help="rebuild a model released as a weight diff")
    recover.add_argument("--raw", required=True, metavar="BASE", help="folder of the base model")
    recover.add_argument("--diff", required=True, metavar="DIFF", help="folder of the weight diff")
    recover.add_argument("--out", required=True, metavar="DIR", help="folder of the rebuilt model")
    recover.add_argument("--dtype", default="float32", metavar="T", help="float32 (default), float16 or bfloat16")


def _noise(p: argparse.ArgumentParser) -> None:
    _common(p)
    p.set_defaults(data="sample", limit=4)
    p.add_argument("--engine", default="", metavar="E", help="the engine that is held against itself (default vllm)")
    p.add_argument("--engine-args", nargs="+", action="extend", default=[], metavar="K=V", help="dtype, ...")
    p.add_argument("--against", default="hf", metavar="E", help="and against this one (default hf)")
    p.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new tokens at most (default 64)")
    p.add_argument("--json", action="store_true", help="for programs")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--limit {text}: must be a whole number of at least 1")
    return int(text)


def spec_from(args: argparse.Namespace) -> RunSpec:
    """The RunSpec of parsed options. InputError for --ids @FILE that can't be read and --engine-args without =."""
    from pathlib import Path

    ids = getattr(args, "show", "") or args.ids
    if ids.startswith("@"):
        try:
            ids = Path(ids[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"--ids {args.ids}: {error.strerror}") from None
    names = tuple(dict.fromkeys(ids.replace(",", "\n").split()))
    if args.ids and not names:
        raise InputError(f"--ids {args.ids}: no id there")
    given = dict(item.partition("=")[::2] for item in getattr(args, "engine_args", []))
    bad = [item for item in getattr(args, "engine_args", []) if "=" not in item]
    if bad:
        raise InputError(f"--engine-args {bad[0]}: the form is key=value")
    fields = {key: getattr(args, key) for key in ("model", "tasks", "recipe", "data", "limit", "format", "tokenizer",
                                                 "system", "tasks_dir")}
    if args.command == "run":
        fields |= {key: getattr(args, key) for key in ("engine", "out", "name", "judge", "sandbox")}
    options: dict[str, str] = {}
    for name, _, value in (item.partition("=") for item in getattr(args, "option", [])):
        if name not in RARE:
            raise UnknownName("option", name, RARE, "--option")
        options[name] = ",".join(filter(None, (options.get(name), value)))
    if "allow" in options:
        from evalkit import lint

        lint.allowed(options)
    return RunSpec(**fields, ids=names, engine_args=given, sets=tuple(args.sets), options=options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    handler = _Signals()
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on configurations is not for our users
    try:
        args = parser().parse_args(argv)
        from evalkit import commands

        code = commands.COMMANDS[args.command](args)
        sys.stdout.flush()
    except EvalkitError as error:
        print(f"evalkit: {error}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, _Terminated) as ended:
        before = dict.fromkeys(before, signal.SIG_IGN)  # a second one may still come, while Python shuts down
        code = 143 if isinstance(ended, _Terminated) else 130
        print(f"evalkit: {'terminated' if code == 143 else 'interrupted'}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    for number, earlier in before.items():
        signal.signal(number, earlier)
    return code


class _Terminated(BaseException):
    """SIGTERM: ends like SIGINT, with another exit code."""


class _Signals:
    """The first signal ends what is done, wherever it is; one that follows within GRACE disturbs no closing."""

    def __init__(self) -> None:
        self.last = -GRACE

    def __call__(self, number: int, _: object) -> None:
        now = time.monotonic()
        if now - self.last >= GRACE:
            self.last = now
            raise KeyboardInterrupt if number == signal.SIGINT else _Terminated


if __name__ == "__main__":
    sys.exit(main())
