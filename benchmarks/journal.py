"""Speed of the journal: answers appended a second, and a finished run read in.

    python benchmarks/journal.py [answers]

Bars: at least 20,000 completions a second appended; 100,000 completions read, each parsed and checked, in under 5 s.
Answers have 400 characters of text, as those of GSM CoT have. CPU time beside wall time, for a machine that is shared.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path

from evalkit import store
from evalkit.types import Completion


def answers(n: int) -> list[Completion]:
    text = " She eats 3 eggs and bakes with 4, so 16 - 3 - 4 = 9 are left. 9 * 2 = 18.\nSo the answer is 18." * 4
    return [Completion(hashlib.sha256(b"%d" % i).hexdigest()[:32], f"{i}{text}", finish="stop", stop="\n\n",
                       n_prompt=900, n_cached=880, n_generated=120) for i in range(n)]


def main(n: int) -> int:
    made = answers(n)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as home:
        folder = store.create(home, "model", "run")
        wall, cpu = time.perf_counter(), time.process_time()
        with folder:
            for answer in made:
                folder.append("gsm_cot", answer)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = folder.file("gsm_cot", "completions").stat().st_size
        print(f"appended {n} completions ({size / 2**20:.0f} MiB): {wall:.2f} s wall, {cpu:.2f} s CPU, "
              f"{n / wall:,.0f} a second")
        fast = n / wall >= 20_000
        wall, cpu = time.perf_counter(), time.process_time()
        found = folder.completions("gsm_cot")
        same = all(found[answer.key] == answer for answer in made)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"read {len(found)} completions, each compared: {wall:.2f} s wall, {cpu:.2f} s CPU")
    return 0 if fast and same and wall < 5 * n / 100_000 else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000))
