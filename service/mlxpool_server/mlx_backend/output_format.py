"""Which markers a model writes: mlx-lm's knowledge, and GPT-OSS's harmony format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxpool_server.domain import Capability
from mlxpool_server.mlx_backend import harmony
from mlxpool_server.mlx_backend.channel_sorter import CALL, NORMAL, REASONING, OutputFormat

# Where in tokenizer.json the added tokens are: before the vocabulary.
_HEAD_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Family:
    """`parser` is the module of mlx_lm.tool_parsers, "harmony", or empty."""

    format: OutputFormat
    parser: str = ""
    reasoning_start: str = ""
    reasoning_end: str = ""


def family_of(wrapper: TokenizerWrapper, special_ids: frozenset[int]) -> Family:
    if harmony.is_spoken(wrapper.get_vocab()):
        edges: Mapping[str, tuple[tuple[str, str], ...]] = harmony.EDGES
        family = Family(
            OutputFormat(edges, _shown(wrapper, edges, special_ids), harmony.INITIAL),
            harmony.PARSER, harmony.REASONING_START, harmony.REASONING_END,
        )  # fmt: skip
    else:
        edges = _edges(wrapper)
        initial = wrapper.response_initial_state or NORMAL
        family = Family(
            OutputFormat(edges, _shown(wrapper, edges, special_ids), initial),
            _parser_name(wrapper), wrapper.think_start or "", wrapper.think_end or "",
        )  # fmt: skip
    return family


def capabilities_of(folder: Path) -> frozenset[Capability]:
    """What the markers in a chat model's small files say; reads no vocabulary."""
    config = _read_json(folder / "tokenizer_config.json")
    known = _AddedTokens(_template(folder, config), _added_tokens(folder, config))
    found = {Capability.CHAT}
    is_harmony = harmony.is_spoken(known.vocab)
    # mlx-lm asks a tokenizer, which takes a second to read; this has all that it asks for.
    infer_parser: Any = tokenizer_utils._infer_tool_parser  # noqa: SLF001 - see above
    infer_thinking: Any = tokenizer_utils._infer_thinking  # noqa: SLF001 - see above
    if is_harmony or config.get("tool_parser_type") or infer_parser(known):
        found.add(Capability.TOOLS)
    if is_harmony or infer_thinking(known)[0]:
        found.add(Capability.REASONING)
    return frozenset(found)


def _edges(wrapper: TokenizerWrapper) -> dict[str, tuple[tuple[str, str], ...]]:
    """As mlx-lm's make_text_state_machine connects them."""
    edges: dict[str, list[tuple[str, str]]] = {}

    def add(state: str, marker: str | None, target: str) -> None:
        if marker:
            edges.setdefault(state, []).append((marker, target))

    transitions = wrapper.response_transitions
    add(NORMAL, wrapper.think_start, REASONING)
    if wrapper.has_thinking:
        add(REASONING, wrapper.think_end, NORMAL)
    if wrapper.has_tool_calling:
        start = wrapper.tool_call_start
        # A response format that says where calls start knows better.
        if all(target != CALL for each in transitions.values() for _, target in each):
            add(NORMAL, start, CALL)
        if wrapper.has_thinking:
            add(REASONING, start, CALL)
        add(CALL, wrapper.tool_call_end, NORMAL)
    for marker in wrapper.structural_markers:
        add(NORMAL, marker, NORMAL)
    for state, each in transitions.items():
        for marker, target in each:
            add(state, marker, target)
    return {state: tuple(each) for state, each in edges.items()}


def _shown(
    wrapper: TokenizerWrapper,
    edges: Mapping[str, Sequence[tuple[str, str]]],
    special_ids: frozenset[int],
) -> frozenset[int]:
    """The special tokens that markers consist of."""
    markers = {marker for each in edges.values() for marker, _ in each}
    return special_ids & {
        token_id
        for marker in markers
        for token_id in wrapper.encode(marker, add_special_tokens=False)
    }


def _parser_name(wrapper: TokenizerWrapper) -> str:
    parser = wrapper.tool_parser
    return "" if parser is None else str(parser.__module__).rpartition(".")[2]


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
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        template = _read_json(folder / "chat_template.json").get("chat_template")
        template = template or config.get("chat_template")
        return template if isinstance(template, str) else ""


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> frozenset[str]:
    declared = config.get("added_tokens_decoder")
    entries: list[Any] = list(declared.values()) if isinstance(declared, dict) else []
    tokens = {*_read_json(folder / "added_tokens.json")}
    try:
        with (folder / "tokenizer.json").open("rb") as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
        place = head.index("[", head.index('"added_tokens"'))
        found, _ = json.JSONDecoder().raw_decode(head, place)
        entries += found
    except (OSError, ValueError, RecursionError):
        # Not there, or not where it is written usually: the other files may say it.
        pass
    contents = (each.get("content") for each in entries if isinstance(each, dict))
    return frozenset(tokens | {text for text in contents if isinstance(text, str)})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
