"""SIGKILL at random moments of a run: nothing given is lost or changed, nothing is asked twice, the end is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

KILLS = 1000 if os.environ.get("EVALKIT_LONG") else 200
VICTIM = Path(__file__).with_name("victim.py")


class Victim:
    def __init__(self, model: Path, out: Path) -> None:
        self.out = out
        self._process = subprocess.Popen([sys.executable, str(VICTIM), str(model), str(out)], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout.readline() == "ready\n"

    def run(self, name: str, seconds: float) -> int:
        """Wait status of a session that is killed after `seconds`: 0 when it reached its end before."""
        print(name, seconds, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait() == 0


@pytest.fixture
def victim(tiny_model, tmp_path):
    memory = Path("/dev/shm")  # each session forces files to the disk several times: that is waiting, no test
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as out:
        made = Victim(tiny_model, Path(out))
        yield made
        made.close()


def journals(folder: Path) -> dict[str, bytes]:
    """The whole lines of each journal."""
    found = {file.name: file.read_bytes() for file in folder.glob("*.completions.jsonl")}
    return {name: data[:data.rfind(b"\n") + 1] for name, data in found.items()}


def keys(journal: bytes) -> list[str]:
    return [json.loads(line)["key"] for line in journal.splitlines()]


def results(folder: Path) -> dict[str, object]:
    """Scores sorted by id, metrics and table, as bytes."""
    scores = {file.name: sorted(file.read_bytes().splitlines()) for file in sorted(folder.glob("*.scores.jsonl"))}
    return {**scores, **{name: (folder / name).read_bytes() for name in ("metrics.json", "table.md")}}


def test_sigkill_at_random_moments(victim, tiny_model):
    began = time.monotonic()
    assert victim.run("whole", 60) == 0
    length = time.monotonic() - began
    home = victim.out / tiny_model.name
    unbroken = results(home / "whole")
    draw = random.Random(5)
    kills = runs = 0
    while kills < KILLS:
        name, before, n_given = f"run{runs}", {}, 0
        runs += 1
        status = -1
        while status != 0:
            status = victim.run(name, draw.uniform(0, 0.7 * length))
            assert status in (0, signal.SIGKILL), (victim.out / f"{name}.log").read_text()
            kills += status != 0
            now = journals(home / name)
            for journal, lines in before.items():
                assert now[journal].startswith(lines), f"{name}: an answer that was kept has changed"
            answered = [key for lines in now.values() for key in keys(lines)]
            assert len(answered) == len(set(answered)), f"{name}: a request was answered twice"
            path = victim.out / f"{name}.given"
            given = path.read_text().split() if path.is_file() else []
            lost = set(given[n_given:]) - set(answered)
            assert len(lost) <= 1, f"{name}: more was lost than the answer on its way"
            assert set(answered) <= set(given)
            before, n_given = now, len(given)
        assert results(home / name) == unbroken
    print(f"{kills} kills in {runs} runs, {time.monotonic() - began:.0f} s")
