"""What the output has to be: read from the wire, refused before the first event."""

from __future__ import annotations

import grpc
import pytest

from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import Server, failure_of, text_request

GRAMMAR = "constraint.grammar"
CHOICES = "constraint.choices.values"


def generate(**kind: object) -> pb.GenerateRequest:
    return text_request(constraint=pb.OutputConstraint(**kind))


@pytest.mark.parametrize(
    "request_",
    [
        generate(json_object=pb.JsonObject()),
        generate(json_schema='{"type": "string"}'),
        generate(regex="a"),
        generate(grammar=pb.Grammar(syntax=pb.GRAMMAR_SYNTAX_LARK, source='start: "a"')),
        generate(grammar=pb.Grammar(syntax=pb.GRAMMAR_SYNTAX_GBNF, source='root ::= "a"')),
        generate(choices=pb.Choices(values=["a", "b"])),
    ],
    ids=lambda request: request.constraint.WhichOneof("kind"),
)
async def test_every_kind_reaches_the_batch(server: Server, request_: pb.GenerateRequest) -> None:
    """Its row has a guide, and runs to its end."""
    events = await server.generate(request_)
    assert events[-1].HasField("finished")
    (batch,) = server.model.batches
    assert all(guide is not None for guide in batch.guides.values())


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (generate(), "INVALID_FIELD", "constraint"),
        (generate(json_schema="{"), "BAD_CONSTRAINT", "constraint.json_schema"),
        (generate(json_schema=""), "BAD_CONSTRAINT", "constraint.json_schema"),
        (generate(regex="a" * 70_000), "BAD_CONSTRAINT", "constraint.regex"),
        (generate(grammar=pb.Grammar(source="x")), "INVALID_FIELD", f"{GRAMMAR}.syntax"),
        (
            generate(grammar=pb.Grammar(syntax=pb.GRAMMAR_SYNTAX_LARK)),
            "BAD_CONSTRAINT", f"{GRAMMAR}.source",
        ),
        (generate(choices=pb.Choices()), "BAD_CONSTRAINT", CHOICES),
        (generate(choices=pb.Choices(values=["a", ""])), "BAD_CONSTRAINT", CHOICES),
        (generate(choices=pb.Choices(values=["a"] * 5000)), "BAD_CONSTRAINT", CHOICES),
        (
            text_request(
                constraint=pb.OutputConstraint(regex="a"), stop=pb.StopConditions(ignore_eos=True)
            ),
            "INVALID_FIELD", "stop.ignore_eos",
        ),
    ],
)  # fmt: skip
async def test_bad_constraint(
    server: Server, request_: pb.GenerateRequest, reason: str, field: str
) -> None:
    """INVALID_ARGUMENT before the first event names the field."""
    failure = await failure_of(server.models.Generate(request_))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (failure.reason, failure.field) == (reason, field)


async def test_the_place_is_told(server: Server) -> None:
    """Where in the schema the error is."""
    failure = await failure_of(server.models.Generate(generate(json_schema="{")))
    assert failure.message == "constraint.json_schema: at line 1, column 2: is no JSON"


async def test_a_model_that_grammars_cannot_read(server: Server) -> None:
    """FAILED_PRECONDITION: its tokens are no plain bytes."""
    server.files["m"].tokenizer.has_constraints = False
    failure = await failure_of(server.models.Generate(generate(regex="a")))
    assert (failure.code, failure.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "CAPABILITY_MISSING",
    )
