"""What a request's output has to be, to the domain."""

from __future__ import annotations

import json

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import Constraint, ConstraintSyntax
from mlxpool_server.errors import BadConstraintError, InvalidFieldError
from mlxpool_server.rpc.convert.reading import choice

# Compiling takes memory and time in proportion, and Rust's stack on top.
MAX_SOURCE_BYTES = 1 << 16
MAX_CHOICES = 4096
_SYNTAXES = {
    pb.GRAMMAR_SYNTAX_LARK: ConstraintSyntax.LARK,
    pb.GRAMMAR_SYNTAX_GBNF: ConstraintSyntax.GBNF,
}
_ANY_OBJECT = '{"type": "object"}'


def output_constraint(request: pb.GenerateRequest) -> Constraint | None:
    """None: any text. Raises: InvalidFieldError, BadConstraintError."""
    if not request.HasField("constraint"):
        return None
    constraint = _read(request.constraint)
    size = len(constraint.source.encode())
    if size > MAX_SOURCE_BYTES:
        problem = f"has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed"
        raise BadConstraintError(constraint.field, problem)
    if not constraint.source:
        raise BadConstraintError(constraint.field, "is empty")
    return constraint


def _read(message: pb.OutputConstraint) -> Constraint:
    match message.WhichOneof("kind"):
        case "json_object":
            path = "constraint.json_object"
            return Constraint(ConstraintSyntax.JSON_SCHEMA, _ANY_OBJECT, path)
        case "json_schema":
            path = "constraint.json_schema"
            return Constraint(ConstraintSyntax.JSON_SCHEMA, message.json_schema, path)
        case "regex":
            return Constraint(ConstraintSyntax.REGEX, message.regex, "constraint.regex")
        case "grammar":
            syntax = choice(message.grammar.syntax, _SYNTAXES, "constraint.grammar.syntax")
            return Constraint(syntax, message.grammar.source, "constraint.grammar.source")
        case "choices":
            return _choices(message.choices)
        case _:
            raise InvalidFieldError(
                "constraint", "needs one of json_object, json_schema, regex, grammar, choices"
            )


def _choices(choices: pb.Choices) -> Constraint:
    path = "constraint.choices.values"
    if not 0 < len(choices.values) <= MAX_CHOICES:
        problem = f"has {len(choices.values)} entries; 1 to {MAX_CHOICES} are allowed"
        raise BadConstraintError(path, problem)
    for index, value in enumerate(choices.values):
        if not value:
            raise BadConstraintError(path, "is empty", f"[{index}]")
    source = json.dumps(list(choices.values), ensure_ascii=False)
    return Constraint(ConstraintSyntax.CHOICES, source, path)
