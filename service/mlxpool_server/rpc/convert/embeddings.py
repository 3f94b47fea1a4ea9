"""Embed: its inputs, and vectors as they are on the wire."""

from __future__ import annotations

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import EmbedRequest, EmbedResult, Pooling, Prompt, Vector
from mlxpool_server.errors import InvalidFieldError, MlxpoolError, of_input
from mlxpool_server.rpc.convert.reading import choice, refuse, seconds
from mlxpool_server.rpc.convert.requests import model_field, prompt

# However short the vectors: a reply has room for more of some models' than one request should ask.
MAX_INPUTS = 2048
POOLINGS: dict[int, Pooling | None] = {
    pb.POOLING_UNSPECIFIED: None,
    pb.POOLING_MEAN: Pooling.MEAN,
    pb.POOLING_LAST_TOKEN: Pooling.LAST_TOKEN,
    pb.POOLING_CLS: Pooling.CLS,
}
# A field that holds others, its length next.
_LENGTH_DELIMITED = 2
_TAG = pb.Embedding.VALUES_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


def embed_request(request: pb.EmbedRequest) -> EmbedRequest:
    """Raises: InvalidFieldError, NotImplementedFieldError."""
    refuse(request, "", "adapter")
    if not request.inputs:
        raise InvalidFieldError("inputs", "is empty")
    if len(request.inputs) > MAX_INPUTS:
        raise InvalidFieldError(
            f"inputs[{MAX_INPUTS}]", f"is one too many: a request has at most {MAX_INPUTS}"
        )
    return EmbedRequest(
        model=model_field(request.model),
        inputs=tuple(_input(index, message) for index, message in enumerate(request.inputs)),
        pooling=choice(request.pooling, POOLINGS, "pooling"),
        normalize=request.normalize if request.HasField("normalize") else True,
        keep_alive_s=(
            seconds(request.keep_alive, "keep_alive") if request.HasField("keep_alive") else None
        ),
    )


def embed_response(result: EmbedResult) -> pb.EmbedResponse:
    response = pb.EmbedResponse(usage=pb.TokenUsage(prompt_tokens=result.prompt_tokens))
    for vector in result.vectors:
        # A million floats by the message's constructor keep the event loop busy for 35 ms; so, 4.
        response.embeddings.add().MergeFromString(packed(vector))
    return response


def packed(vector: Vector) -> bytes:
    """An Embedding on the wire: its tag, its length in bytes, float32 with the lowest byte first.

    https://protobuf.dev/programming-guides/encoding/#packed
    """
    numbers = vector.tobytes()
    head, left = bytearray([_TAG]), len(numbers)
    while left > 0x7F:  # noqa: PLR2004 - seven bits a byte, one says that more follow
        head.append(left & 0x7F | 0x80)
        left >>= 7
    head.append(left)
    return bytes(head) + numbers


def _input(index: int, message: pb.Prompt) -> Prompt:
    try:
        return prompt(message)
    except MlxpoolError as error:
        raise of_input(error, index) from error
