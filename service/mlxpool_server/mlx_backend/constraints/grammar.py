"""Constraints as llguidance's grammars, and where in one an error is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher

from mlxpool_server.domain import Constraint, ConstraintSyntax
from mlxpool_server.errors import BadConstraintError
from mlxpool_server.mlx_backend.constraints.gbnf import MAX_RULES, GbnfError, lark_of
from mlxpool_server.mlx_backend.constraints.schema_place import find_place

# A chain of so many takes llguidance three seconds, one of 1500 fifteen.
_LARK_RULE = re.compile(r"^[ \t]*[!?]?[A-Za-z_]\w*[^\n:\"/]*:", re.MULTILINE)
# As json.dumps writes it: a model that may choose its white space may choose it for ever.
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


def grammar_of(constraint: Constraint) -> str:
    """Return llguidance's own form, which is not checked yet. Raises: BadConstraintError."""
    source = constraint.source
    match constraint.syntax:
        case ConstraintSyntax.JSON_SCHEMA:
            schema = _parsed(constraint)
            try:
                return _json_grammar(schema)
            except RecursionError:
                raise BadConstraintError(constraint.field, "is nested too deeply") from None
            except ValueError as error:
                raise BadConstraintError(constraint.field, str(error)) from error
        case ConstraintSyntax.REGEX:
            return LLMatcher.grammar_from_regex(source)
        case ConstraintSyntax.LARK:
            if len(_LARK_RULE.findall(source)) > MAX_RULES:
                raise BadConstraintError(constraint.field, f"has more than {MAX_RULES} rules")
            return LLMatcher.grammar_from_lark(source)
        case ConstraintSyntax.GBNF:
            try:
                return LLMatcher.grammar_from_lark(lark_of(source))
            except GbnfError as error:
                raise BadConstraintError(
                    constraint.field, error.problem, f"line {error.line}, column {error.column}"
                ) from error
        case ConstraintSyntax.CHOICES:
            # One token of the lexer: as a rule, each choice would take a place in the parser's row.
            choices = " | ".join(map(quoted, json.loads(source)))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")


def quoted(text: str) -> str:
    """Return a text as Lark writes it."""
    # Lark takes DEL for the end of a line; JSON leaves it as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def place_of_error(constraint: Constraint, error_of: Callable[[str], str]) -> str:
    """Empty when it is not known, or in the error's own words. `error_of` compiles a grammar."""
    if constraint.syntax is not ConstraintSyntax.JSON_SCHEMA:
        return ""
    return find_place(json.loads(constraint.source), lambda schema: error_of(_json_grammar(schema)))


def _parsed(constraint: Constraint) -> dict[str, Any]:
    try:
        schema = json.loads(constraint.source)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise BadConstraintError(constraint.field, f"is no JSON: {error.msg}", place) from error
    except RecursionError:
        raise BadConstraintError(constraint.field, "is nested too deeply") from None
    except ValueError:
        # Python reads no integer of more than 4300 digits.
        raise BadConstraintError(constraint.field, "has a number of too many digits") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise BadConstraintError(constraint.field, "has to be a JSON object, or true")
    return schema


def _json_grammar(schema: object) -> str:
    # In the order in which its properties are written: so are the output's.
    text = json.dumps(schema, ensure_ascii=False)
    return LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS)  # type: ignore[arg-type]
