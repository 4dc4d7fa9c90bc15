"""What each command does: one function a command, from parsed options to an exit code."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evalkit import recipes
from evalkit import tasks as task_folders
from evalkit.cli import parser, spec_from
from evalkit.errors import InputError
from evalkit.types import RunSpec


def _table(rows: Iterable[Mapping[str, Any]], as_json: bool) -> int:
    """Rows as aligned text, or as a JSON list."""
    found = list(rows)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return 0
    heads = list(found[0]) if found else []
    lines = [heads, *([str(row[h]) for h in heads] for row in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def do_run(args: Namespace) -> int:
    from evalkit import report, runner, store

    if args.resume:
        base = parser().parse_args(["run"])
        if extra := [name for name, value in vars(args).items() if name != "resume" and value != getattr(base, name)]:
            raise InputError(f"--resume takes all from the run: leave --{extra[0].replace('_', '-')} out")
        outcomes = iter([runner.resume(args.resume)])
    elif args.model:
        specs = [spec_from(Namespace(**vars(args) | {"model": model})) for model in args.model]
        if args.dry_run:
            return _dry_run(specs)
        outcomes = runner.run_all(specs)
    else:
        raise InputError("evalkit run needs --model; `evalkit models` lists known ones")
    runs: list[dict[str, Any]] = []
    bad = 0
    for outcome in outcomes:
        print(f"{outcome.table}\nrun: {outcome.folder}", flush=True)
        folder = store.open_run(outcome.folder)
        runs.append({**folder.read_json("run.json"), "metrics": folder.read_json("metrics.json")})
        bad += bool(outcome.failed or (outcome.unhealthy and "strict" in runs[-1]["spec"]["options"]))
    if len(runs) > 1:
        print(report.render(report.table_from_runs(runs), "md"), end="")
    return 1 if bad or len(runs) < len(args.model) else 0  # one of several models may have died


def _dry_run(specs: Iterable[RunSpec]) -> int:
    from evalkit import dryrun

    for spec in specs:
        rows, notes = dryrun.estimate(spec)
        print(f"{spec.model}, {spec.recipe}")
        _table(rows, False)
        print("\n".join(notes))
    return 0


def do_prompts(args: Namespace) -> int:
    from evalkit import lint, plan, tokenstats

    planned = plan.make(spec_from(args), weights=False)
    if args.lint:
        return lint.print_findings(planned, args.json)
    if args.show and not args.json:
        print("\n".join(tokenstats.show(planned)))
        return 0
    if not args.json:
        for note in planned.notes:
            print(f"# {note}")
    for column in planned.columns:
        for item in plan.rendered(column):
            n_tokens = None if item.tokens is None else len(item.tokens)
            if args.json:
                record = {"id": item.sample.id, "column": column.column.name, "text": item.text, "n_tokens": n_tokens,
                          "n_shots": item.n_shots, "shots_dropped": item.dropped, "group": item.sample.group,
                          "target": item.sample.target}
                print(json.dumps(record, ensure_ascii=False))
            else:
                print(f"=== {column.column.name} {item.sample.id} ({n_tokens} tokens, {item.n_shots} shots) ===")
                print(item.text)
    return 0


def do_stats(args: Namespace) -> int:
    from evalkit import plan, tokenstats

    return tokenstats.print_stats(plan.make(spec_from(args), weights=False), args.json)


def do_table(args: Namespace) -> int:
    from evalkit import report, store

    runs = []
    for path in args.runs:
        folder = store.open_run(path)
        runs.append({**folder.read_json("run.json"), "metrics": folder.read_json("metrics.json")})
    sys.stdout.write(report.render(report.table_from_runs(runs), args.format))
    return 0


def do_score(args: Namespace) -> int:
    from evalkit import rescore

    if Path(args.target).is_dir():
        return _score_run(args)
    if not args.task or not args.rule:
        raise InputError("evalkit score FILE needs --task and --rule; a run folder needs neither")
    for record in rescore.score_file(args.task, args.rule, Path(args.target), args.tokenizer, args.sandbox):
        print(json.dumps(record, ensure_ascii=False))
    return 0


def _score_run(args: Namespace) -> int:
    """Every rule over a run's stored answers, a line a column, then the samples on which the rules differ."""
    from evalkit import results, store

    folder = store.open_run(args.target)
    wanted = () if args.rules in ("", "all") else tuple(args.rules.split(","))
    compared = list(results.compare_rules(folder, wanted))
    if args.json:
        for column, values, changed in compared:
            print(json.dumps({"column": column, "values": values, "changed": changed}, ensure_ascii=False))
        return 0
    rules = list(dict.fromkeys(rule for _, values, _ in compared for rule in values))
    _table(({"column": column, **{r: report_percent(values.get(r)) for r in rules}, "changed": len(changed)}
            for column, values, changed in compared), False)
    for column, _, changed in compared:
        for sample, verdicts in changed.items():
            shown = "; ".join(f"{rule}: {v['value']:g} ({v['answer'][:40]!r})" for rule, v in verdicts.items())
            print(f"{column} {sample}: {shown}")
    return 0


def report_percent(value: float | None) -> str:
    from evalkit import report

    return "" if value is None else report.percent(value)


def do_data(args: Namespace) -> int:
    from evalkit import data, plan

    folders, own = plan.all_tasks(args.tasks_dir)
    recipe = recipes.with_tasks(recipes.load(args.recipe), own)
    record = data.get(plan.data_refs(recipes.select(recipe, args.tasks), folders), Path(args.dir),
                      data.open_source("hub", recipe.revisions, folders))
    print(f"{len(record)} splits in {args.dir}; use them with --data {args.dir}")
    return 0


def do_sandbox(args: Namespace) -> int:
    from evalkit import sandbox

    layers = sandbox.check(args.sandbox)
    for layer in layers:
        print(f"{'holds ' if layer.active else 'ABSENT'}  {layer.name}: {layer.proof}")
    return 0 if all(layer.active for layer in layers) else 1


def do_doctor(args: Namespace) -> int:
    from evalkit import doctor
    from evalkit import models as registry

    findings = doctor.check(registry.resolve(args.model, args.format))
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1


def do_tasks(args: Namespace) -> int:
    if getattr(args, "action", None) == "check":
        from evalkit import checking

        return checking.check_tasks(Path(args.names[0]))
    recipe = recipes.load(recipes.DEFAULT)
    folders = task_folders.find()
    return _table(({"column": c.name, "benchmark": c.benchmark, "header": c.header, "shots": c.switches["shots"],
                    "folder": str(folders[c.task])} for c in recipe.columns), args.json)


def do_models(args: Namespace) -> int:
    from evalkit import models as registry

    if getattr(args, "action", None) == "prepare":
        print(registry.resolve(args.names[0]).path)
        return 0
    known = registry.registry()
    return _table(({"model": name, "format": table.get("format") or "(the tokenizer's own)",
                    "context": table.get("context", ""), "source": table.get("hub") or table.get("path")
                    or table.get("package", ""), "note": "weight diff: see `evalkit recover`"
                    if table.get("checks", {}).get("weight_diff") else ""} for name, table in known.items()), args.json)


def do_formats(args: Namespace) -> int:
    from evalkit import formats as chat

    def row(name: str) -> dict[str, Any]:
        if name == "auto":
            return {"format": name, "stop": "", "guard": "", "source": "the tokenizer's own chat template"}
        found = chat.load(name)
        return {"format": name, "stop": " ".join(found.stop), "guard": " ".join(found.guard),
                "source": Path(found.source).name}

    return _table(map(row, chat.names()), args.json)


def do_recipes(args: Namespace) -> int:
    action = getattr(args, "action", None)
    if action == "show":
        flat = recipes.flat(recipes.load(args.names[0]))
        docs = {key: recipes.SWITCHES[key.partition(".")[2]].doc for key in flat}
        rows = ({"switch": key, "value": json.dumps(value), "meaning": docs[key]} for key, value in flat.items())
        return _table(rows, args.json)
    if action == "diff":
        a, b = (recipes.flat(recipes.load(name)) for name in args.names)
        keys = dict.fromkeys([*a, *b])
        return _table(({"switch": key, args.names[0]: json.dumps(a.get(key)), args.names[1]: json.dumps(b.get(key))}
                       for key in keys if a.get(key) != b.get(key)), args.json)
    found = (recipes.load(name) for name in recipes.names())
    return _table(({"recipe": r.name, "columns": len(r.columns), "title": r.title} for r in found), args.json)


def do_recover(args: Namespace) -> int:
    from evalkit import progress, recover

    with progress.stages() as tell:
        out = recover.recover(Path(args.raw), Path(args.diff), Path(args.out), args.dtype, tell)
    print(f"{out}: the recovered model; hashes of inputs and outputs stand in {out / 'recovery.json'}")
    return 0


def do_check_engines(args: Namespace) -> int:
    from dataclasses import asdict, replace

    from evalkit import noise

    spec = replace(spec_from(args), engine=args.engine)
    found = noise.check(spec, args.against, args.max_tokens)
    if args.json:
        return _table(map(asdict, found), True)
    failed = sum(d.failed for d in found)
    return _table(({
        "column": d.column, "compared": d.compared, "same text": f"{d.same} of {d.texts}" if d.texts else "",
        "first differing token": "" if d.first is None else d.first,
        "letters flipped": f"{d.flipped} of {d.letters}" if d.letters else "",
        "largest logprob difference": "" if d.logprob is None else f"{d.logprob:.3f}", "failed": d.failed or "",
    } for d in found), False) or int(failed > 0)


COMMANDS = {"run": do_run, "prompts": do_prompts, "stats": do_stats, "table": do_table, "score": do_score,
            "tasks": do_tasks,
            "models": do_models, "formats": do_formats, "recipes": do_recipes, "data": do_data, "sandbox": do_sandbox,
            "doctor": do_doctor, "recover": do_recover,
            "check-engines": do_check_engines}
