"""Peak memory of `recover` on a pair of 1 GB each (run by hand): python benchmarks/recover_memory.py [FOLDER]

Makes a Llama-shaped base and diff in float32 (32,000 and 32,001 rows, width 2,048), recovers in a process of its own
and prints that process's peak beside the largest tensor and beside two whole models, as the original holds them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# VmHWM and not ru_maxrss, which a child inherits from its parent.
CHILD = """
import re, sys, time
from pathlib import Path
import torch
from evalkit.recover import recover
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before, began = peak(), time.monotonic()
recover(*map(Path, sys.argv[1:4]))
print(before, peak(), time.monotonic() - began)
"""


def make(folder: Path, rows: int, seed: int, scale: float) -> tuple[int, int]:
    """A folder of about 1 GB; returns its bytes and those of its largest tensor."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (rows, 2048), "lm_head.weight": (rows, 2048), "model.norm.weight": (2048,)}
    for layer in range(8):
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (2048, 5632) if name == "down" else (5632, 2048)
                   for name in ("gate", "up", "down")[: 2 if layer else 3]}
    state = {name: torch.randn(shape, generator=draw) * scale for name, shape in shapes.items()}
    state["model.norm.weight"] += 0.0 if scale < 0.01 else 1.0
    sizes = [value.nbytes for value in state.values()]
    for i, name in enumerate(state):
        save_file({name: state[name]}, folder / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(state)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    (folder / "tokenizer.json").write_text("{}")
    return sum(sizes), max(sizes)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        here = Path(scratch)
        size, largest = make(here / "raw", 32_000, 0, 0.02)
        make(here / "diff", 32_001, 1, 0.001)
        command = [sys.executable, "-c", CHILD, str(here / "raw"), str(here / "diff"), str(here / "out")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        before, peak, seconds = map(float, done.stdout.split())
        print(f"base and diff {size / 1e9:.2f} GB each, largest tensor {largest / 1e6:.0f} MB")
        print(f"peak {peak / 1e6:.0f} MB, of which {before / 1e6:.0f} MB before the start (Python and torch)")
        print(f"recover itself {(peak - before) / 1e6:.0f} MB = {(peak - before) / largest:.1f} x the largest tensor; "
              f"two models would be {2 * size / 1e6:.0f} MB; {seconds:.0f} s")


if __name__ == "__main__":
    main()
