"""One arrow: a module imports only from layers below its own; heavy packages are imported where they are used."""

import ast
from pathlib import Path

import pytest

import evalkit

ROOT = Path(evalkit.__file__).parent
LAYERS = [
    {"errors", "types"},
    {"extract", "stats", "draws", "progress", "weights", "tasks", "quiet", "endpoint"},
    {"formats", "data", "lmeval", "tokens", "recipes", "models", "prepare", "sandbox", "report"},
    {"prompts", "scoring", "engines", "recover", "rescore"},
    {"store", "plan", "doctor"},
    {"judge", "lint", "tokenstats", "environment", "checking"},
    {"pool", "results", "dryrun", "noise", "probe"},
    {"runner"},
    {"cli", "commands"},
]
HEAVY = {"torch", "vllm", "datasets", "pandas", "transformers", "openai", "matplotlib", "sentencepiece", "pyarrow",
         "huggingface_hub", "gguf", "safetensors", "jinja2", "yaml", "tqdm", "numpy"}
MODULES = sorted(ROOT.rglob("*.py"))


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def own_name(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            base = f"evalkit.{base}".rstrip(".") if node.level else base
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "evalkit" else {base}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards_and_are_light(path):
    if path == ROOT / "__init__.py":
        return
    name = own_name(path)
    for module in top_level_imports(path):
        first, *rest = module.split(".")
        assert first not in HEAVY, f"{path.name} imports {module} at its top"
        if first == "evalkit" and rest and rest[0] not in (name, "__version__"):
            assert layer(rest[0]) <= layer(name), f"{name} imports {module} from a layer above"


def test_every_module_has_a_layer_and_a_docstring():
    for path in MODULES:
        if path != ROOT / "__init__.py":
            layer(own_name(path))
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
