"""What the output has to be, to the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlxpool.v1 import model_service_pb2 as model_pb

KINDS = ("json_object", "json_schema", "regex", "lark", "gbnf", "choices")


def constraint_message(options: Mapping[str, Any]) -> model_pb.OutputConstraint | None:
    """None: any text. Raises: TypeError when more than one kind is given."""
    given = [kind for kind in KINDS if options.get(kind) not in (None, False)]
    if not given:
        return None
    if len(given) > 1:
        raise TypeError(f"give only one of {', '.join(given)}")
    (kind,) = given
    value = options[kind]
    match kind:
        case "json_object":
            return model_pb.OutputConstraint(json_object=model_pb.JsonObject())
        case "json_schema":
            schema = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            return model_pb.OutputConstraint(json_schema=schema)
        case "regex":
            return model_pb.OutputConstraint(regex=value)
        case "choices":
            return model_pb.OutputConstraint(choices=model_pb.Choices(values=value))
    syntax = model_pb.GRAMMAR_SYNTAX_LARK if kind == "lark" else model_pb.GRAMMAR_SYNTAX_GBNF
    return model_pb.OutputConstraint(grammar=model_pb.Grammar(syntax=syntax, source=value))
