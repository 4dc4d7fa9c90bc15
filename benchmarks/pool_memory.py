"""Peak memory of a whole run by the number of requests planned: mock engine, a task of its own, a process a size.

    python benchmarks/pool_memory.py [requests] [answers a sample]

Bar: 1,000,000 requests (50,000 samples of 20 answers each, HumanEval's shape) under 1 GB, from planning to the table.
Requests wait on disk and answers are read back one by one, so what grows is a key and a place for each of both;
rows and samples stay in memory: ask for 1,000,000 samples of 1 answer to see them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASK = '''
from evalkit import DataRef, Message, Prompt, Sample, Task

def sample(row, ref, i):
    return Sample(f"riddles/{i}", {"q": row["q"]}, (row["a"],))

def prompt(item, shots, setting):
    return Prompt((Message("user", item.fields["q"]),), "Answer:")

task = Task(name="riddles", version=1, refs=(DataRef("me/riddles", "main", "test"),), sample=sample, prompt=prompt,
            kind="exact", switches={"max_tokens": 64, "rule": "strict", "samples": ANSWERS, "temperature": 0.8})
'''


def model(folder: Path) -> Path:
    """A model folder that only the mock engine can use: a tokenizer of bytes, a config, no weights to speak of."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "mock", "max_position_embeddings": 4096}))
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    return folder


def inside(requests: int, answers: int, home: Path) -> None:
    """One run in this process; prints its peak."""
    from evalkit import runner
    from evalkit.types import RunSpec

    task = home / "tasks" / "riddles"
    task.mkdir(parents=True)
    (task / "task.py").write_text(TASK.replace("ANSWERS", str(answers)))
    with (task / "sample.jsonl").open("w") as rows:
        for i in range(requests // answers):
            question = f"Riddle {i}: I am odd, and if you take a letter away I am even. Which number am I, times {i}?"
            rows.write(json.dumps({"q": question, "a": str(7 * i), "config": "main", "split": "test"}) + "\n")
    from transformers import AutoTokenizer  # noqa: F401 (the run does; with torch it is a third of the bar)

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    runner.run(RunSpec(model=str(model(home / "model")), tasks="riddles", data="sample", format="tulu", engine="mock",
                       tasks_dir=str(home / "tasks"), out=str(home / "out"), name="x"))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{requests:>9,} requests of {requests // answers:,} samples: peak {peak / 1e6:.2f} GB "
          f"(before planning {base / 1e6:.2f}), {cpu:.0f} s CPU, {wall:.0f} s wall", flush=True)


def main() -> int:
    requests, answers = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 1_000_000), (2, 20)))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as home:
        done = subprocess.run([sys.executable, __file__, str(requests), str(answers), home], text=True,
                              stdout=subprocess.PIPE)
    print(done.stdout, end="")
    return done.returncode or float(done.stdout.partition("peak ")[2].split()[0]) >= 1.0


if __name__ == "__main__":
    if len(sys.argv) == 4:
        inside(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
