"""Embed's request and its answer; shared by both clients, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from mlxpool.v1 import model_service_pb2 as model_pb
from mlxpool_client.durations import optional_duration
from mlxpool_client.enums import Pooling
from mlxpool_client.requests import Message, prompt_message, refuse_unknown

# A text, a chat, or tokens.
Input = str | Sequence[Message] | Sequence[int]


class EmbedOptions(TypedDict, total=False):
    """The keyword arguments of embed(); None or absent = the model's or server's default."""

    # Which hidden states become the embedding.
    pooling: Pooling | None
    # None = yes: each embedding has length 1.
    normalize: bool | None
    # Seconds of idle time until the model is unloaded; 0 = when idle, math.inf = never.
    keep_alive_s: float | None
    adapter: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector an input, in their order."""

    vectors: tuple[tuple[float, ...], ...]
    # Of all inputs together.
    prompt_tokens: int


def embed_request(
    model: str, inputs: Sequence[Input], **options: Unpack[EmbedOptions]
) -> model_pb.EmbedRequest:
    """Raises: TypeError for an unknown option or a single input, ValueError for a value that the
    wire cannot carry.
    """
    refuse_unknown("embed()", options.keys() - EmbedOptions.__optional_keys__)
    if isinstance(inputs, str):
        raise TypeError("inputs is a list of texts, not one text")
    pooling = options.get("pooling") or Pooling.UNKNOWN
    return model_pb.EmbedRequest(
        model=model,
        adapter=options.get("adapter", ""),
        inputs=[_input(each) for each in inputs],
        pooling=model_pb.Pooling.ValueType(pooling.value),
        normalize=options.get("normalize"),
        keep_alive=optional_duration(options.get("keep_alive_s"), "keep_alive_s"),
    )


def embeddings(wire: model_pb.EmbedResponse) -> Embeddings:
    return Embeddings(
        vectors=tuple(tuple(each.values) for each in wire.embeddings),
        prompt_tokens=wire.usage.prompt_tokens,
    )


def _input(given: Input) -> model_pb.Prompt:
    if isinstance(given, str):
        return prompt_message(given, None, None)
    token_ids = [each for each in given if isinstance(each, int)]
    if len(token_ids) == len(given):
        return prompt_message(None, None, token_ids)
    messages = [each for each in given if not isinstance(each, int)]
    if token_ids:
        raise TypeError("an input is a text, a list of messages, or a list of token ids")
    return prompt_message(None, messages, None)
