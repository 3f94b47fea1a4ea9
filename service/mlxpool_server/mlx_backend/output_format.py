"""Which markers a model writes: mlx-lm's knowledge, and GPT-OSS's harmony format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxpool_server.mlx_backend import harmony
from mlxpool_server.mlx_backend.channel_sorter import CALL, NORMAL, REASONING, OutputFormat


@dataclass(frozen=True, slots=True)
class Family:
    """`parser` is the module of mlx_lm.tool_parsers, "harmony", or empty."""

    format: OutputFormat
    parser: str = ""
    reasoning_start: str = ""
    reasoning_end: str = ""
    # Where `reasoning_end` begins the answer, too: what ends the thought alone.
    thought_end: str = ""


def family_of(wrapper: TokenizerWrapper, special_ids: frozenset[int]) -> Family:
    if harmony.is_spoken(wrapper.get_vocab()):
        edges: Mapping[str, tuple[tuple[str, str], ...]] = harmony.EDGES
        family = Family(
            OutputFormat(edges, _shown(wrapper, edges, special_ids), harmony.INITIAL),
            harmony.PARSER, harmony.REASONING_START, harmony.REASONING_END, harmony.THOUGHT_END,
        )  # fmt: skip
    else:
        edges = _edges(wrapper)
        initial = wrapper.response_initial_state or NORMAL
        family = Family(
            OutputFormat(edges, _shown(wrapper, edges, special_ids), initial),
            _parser_name(wrapper), wrapper.think_start or "", wrapper.think_end or "",
            wrapper.think_end or "",
        )  # fmt: skip
    return family


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
