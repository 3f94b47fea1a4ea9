"""What a model folder's small files say that it can do; reads no vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils

from mlxpool_server.domain import Capability
from mlxpool_server.mlx_backend import harmony
from mlxpool_server.regular_file import opened_regular

# Where in tokenizer.json the added tokens are: before the vocabulary.
_HEAD_BYTES = 4 * 1024 * 1024
# With each added token described, some have a megabyte.
_MAX_BYTES = 32 * 1024 * 1024


def capabilities_of(folder: Path) -> frozenset[Capability]:
    """Those of a chat need a chat template, constraints a vocabulary that can be read."""
    found = {Capability.CONSTRAINTS} if (folder / "tokenizer.json").is_file() else set()
    config = _read_json(folder / "tokenizer_config.json")
    template = _template(folder, config)
    # mlx-lm has templates of its own, by their type.
    if not (template or config.get("chat_template_type")):
        return frozenset(found)
    known = _AddedTokens(template, _added_tokens(folder, config))
    found.add(Capability.CHAT)
    is_harmony = harmony.is_spoken(known.vocab)
    # mlx-lm asks a tokenizer, which takes a second to read; this has all that it asks for.
    infer_parser: Any = tokenizer_utils._infer_tool_parser  # noqa: SLF001 - see above
    infer_thinking: Any = tokenizer_utils._infer_thinking  # noqa: SLF001 - see above
    if is_harmony or config.get("tool_parser_type") or infer_parser(known):
        found.add(Capability.TOOLS)
    if is_harmony or infer_thinking(known)[0]:
        found.add(Capability.REASONING)
    return frozenset(found)


class _AddedTokens:
    """As much of a tokenizer as mlx-lm looks at to tell families apart."""

    def __init__(self, template: str, tokens: frozenset[str]) -> None:
        self.chat_template = template
        self.vocab = dict.fromkeys(tokens, 0)

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def encode(self, _text: str, **_options: object) -> list[int]:
        return []


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    """The one that transformers takes: a file of its own wins."""
    if raw := _read(folder / "chat_template.jinja"):
        return raw.decode("utf-8", "replace")
    template = _read_json(folder / "chat_template.json").get("chat_template")
    template = template or config.get("chat_template")
    if isinstance(template, list):
        # Named ones: for tools, for instance.
        return "".join(str(each.get("template")) for each in template if isinstance(each, dict))
    return template if isinstance(template, str) else ""


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> frozenset[str]:
    declared = config.get("added_tokens_decoder")
    entries: list[Any] = list(declared.values()) if isinstance(declared, dict) else []
    tokens = {*_read_json(folder / "added_tokens.json")}
    head = _read(folder / "tokenizer.json", _HEAD_BYTES).decode("utf-8", "replace")
    try:
        place = head.index("[", head.index('"added_tokens"'))
        found, _ = json.JSONDecoder().raw_decode(head, place)
        entries += found
    except (ValueError, RecursionError):
        # Not there, or not where it is written usually: the other files may say it.
        pass
    contents = (each.get("content") for each in entries if isinstance(each, dict))
    return frozenset(tokens | {text for text in contents if isinstance(text, str)})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(file))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(file: Path, most_bytes: int = _MAX_BYTES) -> bytes:
    """The file's beginning; nothing of one that is no regular file."""
    try:
        with opened_regular(file) as opened:
            return opened.read(most_bytes)
    except (OSError, ValueError):
        return b""
