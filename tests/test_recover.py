"""recover: base + diff give back the tuned weights, as the original adds them; wrong inputs are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evalkit import recover as module
from evalkit.errors import ModelError
from evalkit.models import check_folder, is_weight_diff
from evalkit.recover import recover
from evalkit.weights import read, tensors

torch = pytest.importorskip("torch")
SHAPES = {"model.embed_tokens.weight": (40, 64), "model.layers.0.self_attn.q_proj.weight": (64, 64),
          "model.layers.0.mlp.up_proj.weight": (128, 64), "model.layers.0.input_layernorm.weight": (64,),
          "model.norm.weight": (64,), "lm_head.weight": (40, 64)}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 41, "torch_dtype": "float32"}


def weights(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return {name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * 0.02).to(dtype)
            for name, shape in SHAPES.items()}


def tune(base, seed=1, dtype=torch.float32, scale=0.004):
    """The base with small changes and one row more for <pad>, as the released models have."""
    draw = torch.Generator().manual_seed(seed)
    tuned = {name: (value.float() + torch.randn(value.shape, generator=draw) * scale).to(dtype)
             for name, value in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([tuned[name], (torch.randn((1, 64), generator=draw) * 0.02).to(dtype)])
    return tuned


def difference(tuned, base):
    """make_diff in float32; the pad row is whatever the resized base had there: here the mean of its rows."""
    grown = {name: value.float() for name, value in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = torch.cat([grown[name], grown[name].mean(0, keepdim=True)])
    return {name: value.float() - grown[name] for name, value in tuned.items()}


def save(folder: Path, state, form="safetensors", shards=1):
    from safetensors.torch import save_file

    folder.mkdir()
    names = list(state)
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts):
        stem = "model" if form == "safetensors" else "pytorch_model"
        file = f"{stem}{f'-{i}' if shards > 1 else ''}.{form}"
        values = {name: state[name].contiguous() for name in part}
        if form == "safetensors":
            save_file(values, folder / file)
        else:
            torch.save(values, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return folder


def loaded(folder):
    return {name: read(tensor) for name, tensor in tensors(folder).items()}


@pytest.fixture
def pair(tmp_path):
    base = weights(0)
    tuned = tune(base)
    return save(tmp_path / "raw", base), save(tmp_path / "diff", difference(tuned, base)), tuned


@pytest.mark.parametrize(("form", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_gives_back_the_tuned_weights(tmp_path, monkeypatch, form, shards):
    monkeypatch.setattr(module, "SHARD", 30_000)  # several output files
    monkeypatch.setattr(module, "CHUNK", 4 * 64 * 8)  # 8 rows at a time: the pad row comes alone
    base = weights(0, torch.float16)
    tuned = tune(base)
    raw = save(tmp_path / "raw", base, form, shards)
    diff = save(tmp_path / "diff", difference(tuned, base), form, shards)
    seen = []
    out = recover(raw, diff, tmp_path / "out", progress=lambda *step: seen.append(step))
    got = loaded(out)
    assert got.keys() == tuned.keys()
    for name, value in got.items():
        assert value.dtype == torch.float32
        rows = len(base[name])
        assert torch.equal(value[:rows], difference(tuned, base)[name][:rows] + base[name].float()), name
        assert torch.allclose(value, tuned[name], rtol=0, atol=1e-8), name
    assert len(list(out.glob("*.safetensors"))) > 1
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert (out / "tokenizer.json").read_text() == '{"a": "tokenizer"}'
    assert [step[1] for step in seen if step[0] == "add"][-1] == next(step[2] for step in seen if step[0] == "add")


def test_pad_row_is_the_mean_of_the_base_plus_the_diff(tmp_path, pair):
    raw, diff, _ = pair
    got = loaded(recover(raw, diff, tmp_path / "out"))["lm_head.weight"]
    base, delta = loaded(raw)["lm_head.weight"], loaded(diff)["lm_head.weight"]
    assert torch.allclose(got[40], delta[40] + base.mean(dim=0), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(got[40], delta[40], rtol=0.01)


def test_dtype_of_choice(tmp_path, pair):
    raw, diff, tuned = pair
    out = recover(raw, diff, tmp_path / "out", dtype="bfloat16")
    assert torch.equal(loaded(out)["model.norm.weight"], tuned["model.norm.weight"].to(torch.bfloat16))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ModelError, match="float32, float16, bfloat16"):
        recover(raw, diff, tmp_path / "other", dtype="int8")


def test_record_has_hashes_of_all_files(tmp_path, pair):
    from hashlib import sha256

    raw, diff, _ = pair
    out = recover(raw, diff, tmp_path / "out")
    record = json.loads((out / "recovery.json").read_text())
    for file, digest in {**record["inputs"], **{str(out / k): v for k, v in record["outputs"].items()}}.items():
        assert sha256(Path(file).read_bytes()).hexdigest() == digest
    assert len(record["inputs"]) == 2
    assert record["base_check"] == "confirmed"


def test_goes_on_with_the_next_shard(tmp_path, monkeypatch, pair):
    monkeypatch.setattr(module, "SHARD", 30_000)
    raw, diff, _ = pair
    out = tmp_path / "out"

    def stop(what, done, total):
        if what == "add" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(raw, diff, out, progress=stop)
    first = sorted(out.glob("model-*.safetensors"))
    assert first and not (out / "config.json").exists()
    times = {file: file.stat().st_mtime_ns for file in first}
    recover(raw, diff, out)
    assert {file: file.stat().st_mtime_ns for file in first} == times
    whole = loaded(recover(raw, diff, tmp_path / "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in loaded(out).items())
    with pytest.raises(ModelError, match="another dtype"):
        recover(raw, diff, out, dtype="float16")


def test_refuses_before_writing(tmp_path, pair):
    raw, diff, _ = pair
    out = tmp_path / "out"
    small = {name: value[:, :32] if value.dim() == 2 else value[:32] for name, value in weights(0).items()}
    with pytest.raises(ModelError, match="another size"):
        recover(save(tmp_path / "small", small), diff, out)
    renamed = {name.replace("model.", "transformer."): value for name, value in weights(0).items()}
    with pytest.raises(ModelError, match="5 tensors of the diff are not there"):
        recover(save(tmp_path / "renamed", renamed), diff, out)
    with pytest.raises(ModelError, match="swapped"):
        recover(diff, raw, out)
    with pytest.raises(ModelError, match=r"no config\.json"):
        recover(tmp_path, diff, out)
    with pytest.raises(ModelError, match="no recovery to go on with"):
        recover(raw, diff, raw)
    assert not out.exists()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tuned_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0005, 0.004, 0.02])
def test_wrong_base_of_the_same_shape(tmp_path, base_dtype, tuned_dtype, scale):
    base = weights(0, base_dtype)
    diff = save(tmp_path / "diff", difference(tune(base, dtype=tuned_dtype, scale=scale), base))
    right = recover(save(tmp_path / "raw", base), diff, tmp_path / "out")
    assert json.loads((right / "recovery.json").read_text())["base_check"] == "confirmed"
    with pytest.raises(ModelError, match="not the weights that the diff was made from"):
        recover(save(tmp_path / "wrong", weights(7, base_dtype)), diff, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_diff_that_is_no_difference_is_not_judged(tmp_path):
    base, noise = weights(0), weights(5)
    diff = save(tmp_path / "diff", {name: value * 0.1 for name, value in noise.items()})
    out = recover(save(tmp_path / "raw", base), diff, tmp_path / "out")
    assert json.loads((out / "recovery.json").read_text())["base_check"] == "undecided"


def test_old_rotary_buffers_are_left_out_when_the_base_has_none(tmp_path, pair):
    raw, diff, _ = pair
    state = loaded(diff) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    got = loaded(recover(raw, save(tmp_path / "old", state), tmp_path / "out"))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in got
    assert len(got) == len(SHAPES)


def test_a_diff_is_told_by_its_weights(tmp_path, pair):
    raw, diff, _ = pair
    assert is_weight_diff(diff)
    assert not is_weight_diff(raw)
    assert not is_weight_diff(recover(raw, diff, tmp_path / "out"))


def llama(folder: Path, rows: int, change: float, tokenizer: Path | None):
    """A small random Llama of a form that vLLM runs; `change` is the size of what tuning did to its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=2048, initializer_range=0.2)
    model = LlamaForCausalLM(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if rows > 32000:
        model.resize_token_embeddings(rows, mean_resizing=False)
        state = {name: torch.cat([value, value.mean(0, keepdim=True)]) if len(value) == 32000 else value
                 for name, value in state.items()}
    model.load_state_dict({name: value + change * torch.randn(value.shape) for name, value in state.items()})
    model.save_pretrained(folder)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    return model.state_dict(), state


@pytest.mark.real
def test_the_engine_says_the_same_from_both(tmp_path, shared):
    """Base + diff through `evalkit run --model tulu-7b=DIR`, with LLaMA's tokenizer and real vLLM."""
    pytest.importorskip("vllm")
    from safetensors.torch import save_file

    tokenizer = shared / "data/tokenizers/tulu"
    llama(tmp_path / "raw", 32000, 0.0, None)
    tuned, grown = llama(tmp_path / "tuned", 32001, 0.02, tokenizer)
    (tmp_path / "diff").mkdir()
    for file in (tmp_path / "tuned").iterdir():
        (tmp_path / "diff" / file.name).write_bytes(file.read_bytes())
    save_file({name: value - grown[name] for name, value in tuned.items()}, tmp_path / "diff" / "model.safetensors")
    with pytest.raises(ModelError, match="a weight diff and no model"):
        check_folder(tmp_path / "diff")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "recovered")
    answers = []
    for name in ("tuned", "recovered"):
        done = subprocess.run(
            [sys.executable, "-m", "evalkit.cli", "run", "--model", f"tulu-7b={tmp_path / name}",
             "--tasks", "tydiqa_cb", "--data", "sample", "--limit", "2", "--name", "once",
             "--out", str(tmp_path / "results"), "--engine-args", "dtype=float32"],
            capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / "results" / name / "once" / "tydiqa_cb.completions.jsonl").read_text().splitlines()
        answers.append(sorted(json.loads(line)["text"] for line in lines))
    assert len(answers[0]) == 2 and all(answers[0])
    assert answers[0] == answers[1]
