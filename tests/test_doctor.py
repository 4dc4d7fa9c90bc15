"""doctor on the embedded model and on broken copies of it: the broken thing, and only that, is found."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from evalkit import doctor
from evalkit.errors import ModelError
from evalkit.models import Model, resolve

pytest.importorskip("tokenizers")


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch, made={}):  # noqa: B006
    """Copies with the same tokenizer files share the tokenizer: making one takes half a second."""
    real = doctor.Tokenizer

    def make(source):
        key = tuple(sha256(file.read_bytes()).digest() for file in sorted(Path(source).glob("tokenizer*")))
        if key not in made:
            made[key] = real(source)
        return made[key]

    monkeypatch.setattr(doctor, "Tokenizer", make)


@pytest.fixture(scope="module")
def embedded() -> Path:
    try:
        return Path(resolve("smollm2-135m-instruct").path)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def copy(tmp_path, embedded):
    """A copy to break: small files as they are, weights linked."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in embedded.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change(file: Path, **values):
    """Set keys of a JSON file; None takes a key out."""
    data = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def failed(folder: Path, spec="{}", fmt="") -> dict[str, str]:
    return {f.name: f.text for f in doctor.check(resolve(spec.format(folder), fmt)) if not f.ok}


def test_the_embedded_model_is_well(embedded):
    findings = doctor.check(resolve("smollm2-135m-instruct"))
    assert [f.name for f in findings] == ["folder", "architecture", "rope", "context", "vocabulary", "added tokens",
                                          "template", "generation", "memory"]
    assert [f.text for f in findings if not f.ok] == []
    assert all("\n" not in f.text for f in findings)


@pytest.mark.parametrize("spec", ["smollm2-135m-instruct={}", "{}"])  # known by name, or by what its config says
def test_rope_theta(copy, spec):
    change(copy / "config.json", rope_theta=10000.0)
    assert failed(copy, spec) == {
        "rope": "theta 10000, but smollm2-135m-instruct has 100000: set rope_theta in config.json"}
    change(copy / "config.json", rope_theta=None, rope_parameters={"rope_theta": 100000.0, "rope_type": "default"})
    assert failed(copy, spec) == {}  # as transformers 5 writes it


def test_rope_theta_lost_in_a_long_llama(copy):
    change(copy / "config.json", rope_theta=None, _name_or_path=None)
    assert failed(copy)["rope"].startswith("theta 10000 (not in config.json: the default) with a context of 8192")
    change(copy / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert failed(copy) == {}


def test_template_removed(copy):
    change(copy / "tokenizer_config.json", chat_template=None)
    assert failed(copy) == {
        "template": "format 'auto': the tokenizer has no chat template; name one with --format"}
    assert failed(copy, fmt="chatml") == {}


def test_template_against_the_format(copy):
    assert failed(copy, fmt="chatml") == {"template": (
        "two turns differ at token 1: format chatml writes 'user' 'Ċ' 'Name' 'Ġa', the tokenizer's template "
        "'system' 'Ċ' 'You' 'Ġare'")}
    change(copy / "tokenizer_config.json", chat_template=(
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\n' }}"))
    assert failed(copy, fmt="chatml") == {}
    change(copy / "tokenizer_config.json", chat_template="{% for m in %}")
    assert failed(copy) == {"template": "the tokenizer's chat template, line 1: Expected an expression, got 'end of "
                                        "statement block'"}


def test_added_token_missing(copy):
    file = copy / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] != "<|im_start|>"]
    file.write_text(json.dumps(data))
    change(copy / "tokenizer_config.json", bos_token=None)  # or transformers adds it again
    assert failed(copy)["added tokens"].startswith("<|im_start|> is no added token of this tokenizer (it reads < |")


def test_end_of_sequence_of_the_config_is_another(copy):
    change(copy / "generation_config.json", eos_token_id=0)
    assert failed(copy) == {"added tokens": "the tokenizer's end of sequence is id 2, the config's 0"}
    change(copy / "generation_config.json", eos_token_id=[0, 2])
    assert failed(copy) == {}


def test_vocabulary_too_small(copy):
    change(copy / "config.json", vocab_size=49000)
    assert failed(copy) == {
        "vocabulary": "49152 token ids, 49152 embedding rows, but vocab_size in config.json is 49000"}


def test_more_tokens_than_rows(copy):
    file = copy / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "content": "<extra>", "id": 49152})
    file.write_text(json.dumps(data))
    assert failed(copy) == {
        "vocabulary": "49153 token ids, 49152 embedding rows: the last 1 tokens have no embedding"}


def test_context(copy):
    change(copy / "config.json", max_position_embeddings=2048)
    assert failed(copy, "smollm2-135m-instruct={}") == {"context": "2048 tokens by config.json, 8192 by the registry"}
    assert failed(copy) == {}  # nothing known to hold it against


def test_generation_defaults(copy):
    change(copy / "generation_config.json", repetition_penalty=1.1, do_sample=True, temperature=0.6)
    assert failed(copy) == {"generation": "defaults change every answer: repetition_penalty = 1.1; take them out"}
    change(copy / "generation_config.json", repetition_penalty=1.0)
    assert failed(copy) == {}
    [text] = [f.text for f in doctor.check(resolve(str(copy))) if f.name == "generation"]
    assert text == "do_sample = True, temperature = 0.6: the recipe's decoding is used instead"


def test_unknown_architecture(copy, monkeypatch):
    change(copy / "config.json", architectures=["NoSuchForCausalLM"])
    monkeypatch.setattr(doctor, "_vllm_architectures", lambda: {"LlamaForCausalLM"})
    assert failed(copy) == {"architecture": "NoSuchForCausalLM is unknown to the installed vLLM"}
    monkeypatch.setattr(doctor, "_vllm_architectures", lambda: None)
    assert failed(copy) == {}


def test_the_table_of_vllm_is_read_without_importing_it():
    pytest.importorskip("importlib.util").find_spec("vllm") or pytest.skip("no vLLM here")
    known = doctor._vllm_architectures()
    assert known and "LlamaForCausalLM" in known and len(known) > 100


def test_memory(copy, monkeypatch):
    monkeypatch.setattr(doctor, "_room", lambda: ("1 GPU(s)", 1 << 27))
    text = failed(copy)["memory"]
    assert text == ("0.13 billion weights, BF16, 0.25 GiB; as bfloat16 0.25 GiB, more than the 0.1 GiB of 1 GPU(s): "
                    "more GPUs (tensor_parallel_size), a smaller dtype or a quantisation")
    monkeypatch.undo()
    assert doctor._room()[1] > 1 << 30


def test_a_folder_that_cannot_be_used_is_one_finding(tmp_path, copy):
    (copy / "model.safetensors").unlink()
    [finding] = doctor.check(resolve(str(copy)))
    assert (finding.name, finding.ok) == ("folder", False)
    assert "no weights" in finding.text
    [finding] = doctor.check(Model("m", str(tmp_path)))
    assert "no config.json" in finding.text


def test_a_llama_folder_with_its_sentencepiece_model(shared, tmp_path):
    """Tulu's tokenizer: 32,000 pieces and <pad>, the next id; an embedding of 32,000 rows lacks that one."""
    folder = tmp_path / "tulu"
    folder.mkdir()
    for file in (shared / "data/tokenizers/tulu").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048,
        "vocab_size": 32001, "eos_token_id": 2, "torch_dtype": "bfloat16"}))

    def weights(rows):
        head, data = {}, b""
        for name, shape in (("model.norm.weight", [2]), ("model.embed_tokens.weight", [rows, 2])):
            size = shape[0] * (shape[1] if len(shape) > 1 else 1)
            head[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + 2 * size]}
            data += b"\x80\x3f" * size
        text = json.dumps(head).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    weights(32001)
    assert failed(folder, "tulu-7b={}") == {}
    weights(32000)
    change(folder / "config.json", vocab_size=32000)
    assert failed(folder, "tulu-7b={}") == {
        "vocabulary": "32001 token ids, 32000 embedding rows: the last 1 tokens have no embedding"}


def test_a_model_that_is_not_here_is_one_finding(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    [finding] = doctor.check(resolve("nobody/nothing"))
    assert (finding.name, finding.ok) == ("folder", False)
    assert finding.text.startswith("nobody/nothing: no such folder, and the hub does not give it")
