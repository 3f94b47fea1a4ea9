"""Embed's messages: vectors on the wire are what protobuf itself would write."""

from __future__ import annotations

from array import array

import pytest

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import EmbedRequest, EmbedResult, Pooling, TextPrompt, TokenPrompt
from mlxpool_server.rpc.convert.embeddings import POOLINGS, embed_request, embed_response, packed


@pytest.mark.parametrize("size", [1, 31, 32, 33, 384, 4096, 5000, 600_000])
def test_vectors_are_packed_as_protobuf_packs_them(size: int) -> None:
    """Of every length of the length itself."""
    vector = array("f", [0.25 * index - 3 for index in range(size)])
    assert packed(vector) == pb.Embedding(values=vector).SerializeToString()


def test_a_response() -> None:
    """One embedding a vector, in their order, and the tokens of all."""
    result = EmbedResult((array("f", [1.5, -2.0]), array("f", [0.0, 3.0])), 7)
    assert embed_response(result) == pb.EmbedResponse(
        embeddings=[pb.Embedding(values=[1.5, -2.0]), pb.Embedding(values=[0.0, 3.0])],
        usage=pb.TokenUsage(prompt_tokens=7),
    )


def test_a_request_that_says_little() -> None:
    """The model's own pooling, normalised."""
    request = pb.EmbedRequest(model="m", inputs=[pb.Prompt(text="a")])
    assert embed_request(request) == EmbedRequest("m", (TextPrompt("a"),))


def test_a_request_that_says_everything() -> None:
    """An explicit false is honoured."""
    request = pb.EmbedRequest(
        model="m",
        inputs=[pb.Prompt(tokens=pb.TokenIds(ids=[1, 2]))],
        pooling=pb.POOLING_CLS,
        normalize=False,
    )
    request.keep_alive.seconds = 5
    assert embed_request(request) == EmbedRequest(
        "m", (TokenPrompt((1, 2)),), Pooling.CLS, normalize=False, keep_alive_s=5
    )


def test_every_pooling_has_a_value() -> None:
    """Those of the contract and those of the domain."""
    assert set(POOLINGS) == set(pb.Pooling.values())
    assert set(POOLINGS.values()) == {None, *Pooling}
