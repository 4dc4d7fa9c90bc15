"""Chat formats: messages -> the text up to the beginning of the answer, as Hugging Face chat templates.

A format is one Jinja file in `templates/`. Its first comment, `{#- evalkit ... -#}`, is TOML and says what the
text can't: `stop` (ends an answer), `guard` (the model speaks for the user), `special` (one token each), `chat`
(false: plain text). `tulu` turns [user "Q"] and the prefill "A:" into `<|user|>\\nQ\\n<|assistant|>\\nA:`.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, UnknownName, nearest
from evalkit.types import Message

TEMPLATES = Path(__file__).parent / "templates"
KEYS = ("stop", "guard", "special", "chat")
_HEADER = re.compile(r"\A\s*\{#-?[ \t]*evalkit[ \t]*\n(.*?)-?#\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Format:
    """`source` is the file's path, or "tokenizer". An end-of-sequence token always stops as well."""

    name: str
    template: str
    stop: tuple[str, ...] = ()
    guard: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    chat: bool = True
    source: str = "tokenizer"


def names() -> list[str]:
    """The known formats, sorted; `auto` is the tokenizer's own chat template."""
    return sorted([*(path.stem for path in TEMPLATES.glob("*.jinja")), "auto"])


def load(name: str, chat_template: str | None = None) -> Format:
    """The format called `name`: one of `names()`, or a path to a Jinja file.

    `chat_template` is the tokenizer's own, needed by `auto` alone. Raises UnknownName, and InputError for a
    template or header that can't be read (names file and line).
    """
    if name == "auto":
        if not chat_template:
            raise InputError("format 'auto': the tokenizer has no chat template; name one with --format")
        special = sorted({token for path in TEMPLATES.glob("*.jinja") for token in load(path.stem).special})
        _compile(chat_template, "the tokenizer's chat template")
        return Format("auto", chat_template, special=tuple(t for t in special if t in chat_template))
    path = TEMPLATES / f"{name}.jinja" if name in names() else Path(name)
    if path.suffix not in (".jinja", ".jinja2", ".j2") and not path.is_file():
        raise UnknownName("format", name, names(), "or a path to a .jinja file")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--format {name}: cannot read the template: {e}") from e
    _compile(text, str(path))
    return Format(name if name in names() else path.stem, text, source=str(path), **_header(text, path))


def _header(text: str, path: Path) -> dict[str, Any]:
    found = _HEADER.match(text)
    if not found:
        return {}
    try:
        header = tomllib.loads(found[1])
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"{path}: the evalkit header is not TOML: {e}") from e
    for key, value in header.items():
        if key not in KEYS:
            raise InputError(f"{path}: unknown header key {key!r}{nearest(key, KEYS)}")
        if key == "chat":
            good, wanted = isinstance(value, bool), "true or false"
        else:
            good = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
            wanted = "a list of strings"
        if not good:
            raise InputError(f"{path}: header key {key!r} must be {wanted}")
    return {key: tuple(value) if key != "chat" else value for key, value in header.items()}


def render(
    fmt: Format, messages: Sequence[Message], prefill: str = "", tokens: Mapping[str, str] | None = None
) -> str:
    """The text up to the beginning of the answer, nothing stripped. `tokens`: bos_token, eos_token and so on.

    Equal to `apply_chat_template(..., add_generation_prompt=True)` for the same Jinja text. The prefill follows
    as it is after a newline or blank, else after one blank; without chat after a newline (nothing if empty).
    """
    import jinja2

    template = _compile(fmt.template, fmt.source)
    chat = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text: str = template.render(
            messages=chat, tools=None, documents=None, add_generation_prompt=True, **(tokens or {})
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as e:
        raise InputError(f"format {fmt.name} ({fmt.source}) cannot be rendered: {e}") from e
    if not prefill:
        return text
    if not fmt.chat:
        return f"{text}\n{prefill}"
    return text + prefill if text.endswith(("\n", " ")) else f"{text} {prefill}"


@functools.lru_cache(maxsize=64)
def _compile(text: str, source: str) -> Any:
    """Compiled with the options of transformers' `apply_chat_template`, so that both give the same text."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the answer for training masks; it writes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **kw: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **kw)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        raise InputError(f"{source}, line {e.lineno}: {e.message}") from e
