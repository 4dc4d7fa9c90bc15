"""Choosing an engine, and what is said when vLLM cannot be started. No engine is started here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evalkit import engines
from evalkit.engines import EngineSpec, StartError, vllm_start
from evalkit.engines.quiet import quiet
from evalkit.errors import InputError, UnknownName

GIB = vllm_start.GIB


def test_the_default_is_vllm_and_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert engines.resolve("") == "vllm" and engines.resolve("hf") == "hf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("", "vllm"):
        with pytest.raises(InputError, match=r"vLLM is not installed.*evalkit\[vllm\].*evalkit\[cpu\].*evalkit\[hf\]"):
            engines.resolve(name)
    with pytest.raises(InputError, match=r"torch is not installed: pip install 'evalkit\[hf\]'"):
        engines.resolve("hf")
    assert engines.resolve("mock") == "mock"


def test_an_unknown_engine_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="unknown engine 'vlm'; did you mean 'vllm'"):
        engines.create("vlm", EngineSpec("none"))


def test_choosing_an_engine_imports_none() -> None:
    code = ("import sys; from evalkit import engines; engines.resolve('mock'); import evalkit.engines.vllm;"
            "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("needed", "visible", "heads", "keys", "expected"), [
    (14, 8, 32, 32, 1),  # 7B in 16 bits
    (70, 8, 32, 32, 1),
    (71, 8, 40, 40, 2),
    (131, 8, 64, 64, 2),  # 65B on 80 GB cards
    (141, 3, 64, 64, None),  # three do not divide 64 heads, two do not hold it
    (150, 8, 40, 8, 4),  # 3 and 5 do not fit the heads
    (150, 8, 9, 3, 3),
    (999, 8, 64, 64, None),
])
def test_fewest_gpus(needed: int, visible: int, heads: int, keys: int, expected: int | None) -> None:
    assert vllm_start.fewest_gpus(needed * GIB, 70 * GIB, visible, heads, keys) == expected


def test_weight_bytes_counts_one_kind_of_file_and_halves_float32(tmp_path: Path) -> None:
    for name, size in (("model-1.safetensors", 400), ("model-2.safetensors", 200), ("pytorch_model.bin", 600)):
        (tmp_path / name).write_bytes(b"0" * size)
    spec = EngineSpec(str(tmp_path))
    assert vllm_start.weight_bytes(spec, "torch.bfloat16", "auto") == 600
    assert vllm_start.weight_bytes(spec, "torch.float32", "auto") == 300  # a model recovered from its diff
    assert vllm_start.weight_bytes(spec, "torch.float32", "float32") == 600
    with pytest.raises(StartError, match="no weight files"):
        vllm_start.weight_bytes(EngineSpec(str(Path(__file__).parent)), "", "auto")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048,
        "num_attention_heads": 64, "num_key_value_heads": 64, "hidden_size": 8192, "num_hidden_layers": 80,
        "dtype": "bfloat16"}))
    return tmp_path


def options(llama: Path, cpu: bool, length: int = 2048, **args: str) -> dict[str, Any]:
    from dataclasses import make_dataclass

    names = ("dtype", "quantization", "max_num_seqs", "tensor_parallel_size", "gpu_memory_utilization")
    vllm = SimpleNamespace(EngineArgs=make_dataclass("EngineArgs", names))
    return vllm_start.options(EngineSpec(str(llama), max_model_len=length, args=args), vllm, cpu)


def test_cpu_options_are_for_the_cpu_only(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    cpu, gpu = options(llama, True, dtype="float32"), options(llama, False, max_num_seqs="512")
    assert cpu["enable_chunked_prefill"] is False and cpu["max_num_batched_tokens"] == 2048
    assert cpu["kv_cache_memory_bytes"] == 2 * GIB and cpu["dtype"] == "float32" and "tensor_parallel_size" not in cpu
    assert gpu["tensor_parallel_size"] == 1 and gpu["max_num_seqs"] == 512
    assert not {"enforce_eager", "enable_chunked_prefill", "max_num_batched_tokens", "kv_cache_memory_bytes",
                "distributed_executor_backend"} & set(gpu)
    assert options(llama, True, kv_cache_gib="2.5")["kv_cache_memory_bytes"] == int(2.5 * GIB)


def test_tensor_parallel_is_counted_unless_given(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(vllm_start, "weight_bytes", lambda *_: 131 * GIB)
    platform = SimpleNamespace(get_device_total_memory=lambda _: 80 * GIB)
    real = vllm_start.importlib.import_module
    monkeypatch.setattr(vllm_start.importlib, "import_module", lambda name: SimpleNamespace(
        current_platform=platform) if name == "vllm.platforms" else real(name))
    assert options(llama, False)["tensor_parallel_size"] == 2
    assert options(llama, False, gpu_memory_utilization="0.5")["tensor_parallel_size"] == 4
    assert options(llama, False, tensor_parallel_size="8")["tensor_parallel_size"] == 8
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(StartError, match=r"needs 136 GiB .* 2 visible GPUs .*dtype.*max_model_len.*tensor_parallel"):
        options(llama, False, gpu_memory_utilization="0.5")


def test_an_unknown_engine_option_names_the_nearest(llama: Path) -> None:
    with pytest.raises(UnknownName, match="unknown engine option of vllm 'dtyp'; did you mean 'dtype'"):
        options(llama, True, dtyp="half")


def test_past_the_models_own_length_the_rotation_table_grows_too(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    assert "hf_overrides" not in options(llama, True, 2048)
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0")  # so that it is put back afterwards
    assert options(llama, True, 3112)["hf_overrides"] == {"max_position_embeddings": 3112}
    assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"


@pytest.mark.parametrize(("said", "package"), [
    ("RuntimeError: operator torchvision::nms does not exist", "torchvision"),
    ("OSError: Could not load this library: /venv/torchaudio/lib/_torchaudio.abi3.so", "torchaudio"),
    ("OSError: Could not load this library: /venv/torchcodec/libtorchcodec_image.so", "torchcodec"),
])
def test_a_package_made_for_another_torch_is_named(said: str, package: str) -> None:
    assert (vllm_start.misfit(f"Traceback ...\n{said}\n") or "").endswith(f"pip uninstall -y {package}")
    assert vllm_start.misfit("ValueError: no such thing") is None


def test_why_reads_the_log_of_this_start_only(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("an earlier run: torch.OutOfMemoryError: CUDA out of memory\n")
    begin, spec = log.stat().st_size, EngineSpec("m", max_model_len=8192, log=log)
    fault = RuntimeError("Engine core initialization failed. See root cause above.")
    assert vllm_start.why(fault, spec, begin) == f"vLLM does not start: RuntimeError: {fault}"
    with log.open("a") as lines:
        lines.write("INFO ok\nValueError: To serve at least one request with the model's max seq len (8192), (4.0 GiB "
                    "KV cache is needed, which is larger than ...). Try\n")
    said = vllm_start.why(fault, spec, begin)
    assert all(word in said for word in ("(4.0 GiB KV cache is needed", "tensor_parallel_size", "8192", "dtype"))
    assert "\n" not in said


def test_quiet_sends_c_level_output_to_the_log_and_puts_the_terminal_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "log").open("a") as log:
        with quiet(log):
            os.write(1, b"from C\n")
            subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
        os.write(1, b"after\n")
    assert (tmp_path / "log").read_text() == "from C\nfrom a child\n"
    assert capfd.readouterr() == ("after\n", "")
