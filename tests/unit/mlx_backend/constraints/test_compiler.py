"""Each kind of constraint, by the texts it lets through; and what is refused, with its place."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator

import pytest

from mlxpool_server.domain import Constraint, ConstraintSyntax
from mlxpool_server.engine.backend import Guide
from mlxpool_server.errors import BadConstraintError
from mlxpool_server.mlx_backend.constraints import compiler
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer
from tiny_models import write_byte_level, write_sentence_piece

SYNTAX = ConstraintSyntax
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["he", "hello"]}, "age": {"type": "integer", "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EXPRESSION = """\
root ::= term (op term){0,3}   # a sum
op ::= "+" | "-"
term ::= [0-9]{1,2} | "(" root ")"
"""


@pytest.fixture(scope="module", params=[write_byte_level, write_sentence_piece])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MlxTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return MlxTokenizer.read(folder, 0, None)


def allowed(guide: Guide) -> list[int]:
    bits = guide.allowed()
    return [token for token in range(len(bits) * 8) if bits[token // 8] >> token % 8 & 1]


def is_text(tokenizer: MlxTokenizer, constraint: Constraint, text: str) -> bool:
    """Whether the whole text may come, and then the end."""
    guide = tokenizer.compile(constraint)
    left = text.encode()
    while left:
        fitting = [
            token
            for token in allowed(guide)
            if token not in tokenizer.eos_token_ids
            and tokenizer.piece(token)
            and left.startswith(tokenizer.piece(token))
        ]
        if not fitting:
            return False
        token = max(fitting, key=lambda each: len(tokenizer.piece(each)))
        guide.advance(token)
        left = left[len(tokenizer.piece(token)) :]
    return not tokenizer.eos_token_ids.isdisjoint(allowed(guide))


def random_text(tokenizer: MlxTokenizer, constraint: Constraint, seed: int) -> str:
    """What a model that knows nothing would write; it ends where it may."""
    numbers = random.Random(seed)  # noqa: S311 - no secret
    guide = tokenizer.compile(constraint)
    decoder = tokenizer.new_decoder(is_exact=True)
    text = ""
    for _ in range(400):
        tokens = allowed(guide)
        ends = sorted(tokenizer.eos_token_ids.intersection(tokens))
        token = ends[0] if ends else numbers.choice(tokens)
        if token in tokenizer.eos_token_ids:
            return text + decoder.finish()
        text += decoder.push(token)
        guide.advance(token)
    raise AssertionError(f"no end: {text}")


def cases() -> Iterator[tuple[ConstraintSyntax, str, str, bool]]:
    choices = json.dumps(["yes", 'no "way"', "é\n"])
    yield SYNTAX.CHOICES, choices, "yes", True
    yield SYNTAX.CHOICES, choices, 'no "way"', True
    yield SYNTAX.CHOICES, choices, "é\n", True
    yield SYNTAX.CHOICES, choices, "ye", False
    yield SYNTAX.CHOICES, choices, "yesno", False
    yield SYNTAX.REGEX, "[0-9]{2}-a+", "12-aaa", True
    yield SYNTAX.REGEX, "[0-9]{2}-a+", "1-a", False
    yield SYNTAX.REGEX, "[0-9]{2}-a+", "12-", False
    schema = json.dumps(SCHEMA)
    yield SYNTAX.JSON_SCHEMA, schema, '{"name": "he", "age": 7}', True
    yield SYNTAX.JSON_SCHEMA, schema, '{"name": "he"}', False
    yield SYNTAX.JSON_SCHEMA, schema, '{"name": "she", "age": 7}', False
    yield SYNTAX.JSON_SCHEMA, schema, '{"name": "he", "age": 10}', False
    yield SYNTAX.JSON_SCHEMA, '{"type": "object"}', '{"a": [1, {"b": null}]}', True
    yield SYNTAX.JSON_SCHEMA, '{"type": "object"}', "[]", False
    lark = 'start: "a" list? "z"\nlist: ITEM ("," ITEM)*\nITEM: /[0-9]+/\n'
    yield SYNTAX.LARK, lark, "a1,22z", True
    yield SYNTAX.LARK, lark, "az", True
    yield SYNTAX.LARK, lark, "a1,z", False
    yield SYNTAX.GBNF, EXPRESSION, "1+(22-3)", True
    yield SYNTAX.GBNF, EXPRESSION, "1+", False
    yield SYNTAX.GBNF, EXPRESSION, "(1", False
    # Lexemes that take all they can would leave no "a" here.
    yield SYNTAX.GBNF, 'root ::= [a-z]* "a"', "banana", True
    yield SYNTAX.GBNF, 'root ::= [a-z]* "a"', "ban", False
    yield SYNTAX.GBNF, 'root ::= [^\\x00-z\\]]{2} "\\u00e9\\n"', "{|é\n", True
    yield SYNTAX.GBNF, 'root ::= [^\\x00-z\\]]{2} "\\u00e9\\n"', "aaé\n", False


@pytest.mark.parametrize(("syntax", "source", "text", "expected"), list(cases()))
def test_texts(
    tokenizer: MlxTokenizer, syntax: ConstraintSyntax, source: str, text: str, expected: bool
) -> None:
    """What may be written, and where it may end."""
    assert is_text(tokenizer, Constraint(syntax, source), text) is expected


@pytest.mark.parametrize("seed", range(8))
def test_any_end_is_valid(tokenizer: MlxTokenizer, seed: int) -> None:
    """Random tokens, as the decoder shows them, are JSON of the schema."""
    value = json.loads(
        random_text(tokenizer, Constraint(SYNTAX.JSON_SCHEMA, json.dumps(SCHEMA)), seed)
    )
    assert set(value) == {"name", "age"}
    assert value["name"] in {"he", "hello"}
    assert value["age"] <= 9


def test_as_many_choices_as_are_accepted(tokenizer: MlxTokenizer) -> None:
    """All 4096 can be written, with any character in them."""
    choices = [*(f"he{i}" for i in range(4095)), "\x00\x7f\u2028"]
    constraint = Constraint(SYNTAX.CHOICES, json.dumps(choices, ensure_ascii=False))
    assert all(is_text(tokenizer, constraint, choices[i]) for i in (0, 2500, 4094, 4095))


class PanicException(BaseException):
    """As a Rust library raises it: its class cannot be imported."""


@pytest.mark.parametrize("error", [PanicException("x"), ValueError("x"), RecursionError("x")])
def test_whatever_compiling_raises_is_the_constraints(
    tokenizer: MlxTokenizer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A caller hears that the constraint is bad, never that the server is."""

    def fail(self: compiler.ConstraintCompiler, constraint: Constraint) -> object:
        raise error

    monkeypatch.setattr(compiler.ConstraintCompiler, "_new_matcher", fail)
    with pytest.raises(BadConstraintError, match="cannot be compiled"):
        tokenizer.compile(Constraint(SYNTAX.REGEX, "unheard of"))


def test_a_first_space_is_kept(tokenizer: MlxTokenizer) -> None:
    """Decoders that trim it would show what the constraint does not allow."""
    assert random_text(tokenizer, Constraint(SYNTAX.CHOICES, '[" he"]'), 0) == " he"


def test_forced_tokens_are_the_tokenizers_own(tokenizer: MlxTokenizer) -> None:
    """Where one text is left, one token is allowed, as the tokenizer writes it."""
    guide = tokenizer.compile(Constraint(SYNTAX.REGEX, "xhehez"))
    lengths: list[int] = []
    while True:
        (token,) = allowed(guide)
        if token in tokenizer.eos_token_ids:
            break
        lengths.append(len(tokenizer.piece(token)))
        guide.advance(token)
    assert lengths == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("syntax", "source", "place"),
    [
        (SYNTAX.JSON_SCHEMA, '{"a":\n x}', "line 2, column 2"),
        (SYNTAX.JSON_SCHEMA, "[1]", ""),
        (SYNTAX.JSON_SCHEMA, '{"type": "strng"}', ""),
        (SYNTAX.JSON_SCHEMA, '{"properties": {"a/b": {"type": "strng"}}}', "#/properties/a~1b"),
        (
            SYNTAX.JSON_SCHEMA,
            '{"items": {"anyOf": [{}, {"$ref": "#/$defs/q"}]}, "$defs": {"q": {"not": {}}}}',
            "#/items/anyOf/1",
        ),
        (SYNTAX.JSON_SCHEMA, '{"a": ' * 10_000, "" ),
        (SYNTAX.JSON_SCHEMA, "false", ""),
        (SYNTAX.JSON_SCHEMA, '{"minimum": ' + "9" * 5000 + "}", ""),
        (SYNTAX.JSON_SCHEMA, '{"const": ' + "[" * 900 + "]" * 900 + "}", ""),
        (SYNTAX.JSON_SCHEMA, '{"const": "\\ud800"}', ""),
        (SYNTAX.JSON_SCHEMA, '{"items": {"$ref": "http://localhost:1/schema"}}', "#/items"),
        (SYNTAX.JSON_SCHEMA, '{"items": {"$ref": "file:///etc/hostname"}}', "#/items"),
        (SYNTAX.LARK, "start: start", ""),
        (SYNTAX.LARK, 'start: A\nA: "x" B\nB: A', ""),
        (SYNTAX.LARK, '%import "/etc/hostname"\nstart: "a"', ""),
        (SYNTAX.GBNF, "root ::= root", ""),
        (SYNTAX.REGEX, "(", ""),
        (SYNTAX.LARK, "start: x", ""),
        (SYNTAX.GBNF, 'root ::= "a"\nb ::= c', "line 2, column 7"),
        (SYNTAX.GBNF, 'x ::= "a"', "line 1, column 1"),
        (SYNTAX.GBNF, 'root ::= "a', "line 1, column 12"),
        (SYNTAX.GBNF, "root ::= " + "(" * 200, "line 1, column 110"),
        (SYNTAX.GBNF, 'root ::= "a"{999999}', "line 1, column 13"),
    ],
)  # fmt: skip
def test_errors_have_a_place(
    tokenizer: MlxTokenizer, syntax: ConstraintSyntax, source: str, place: str
) -> None:
    """In the schema or in the text; grammars of llguidance's own have it in their message."""
    with pytest.raises(BadConstraintError) as caught:
        tokenizer.compile(Constraint(syntax, source, "constraint.here"))
    assert (caught.value.field, caught.value.place) == ("constraint.here", place)
    assert caught.value.problem


DOUBLING = "".join(f"a{i} ::= a{i + 1} a{i + 1}\n" for i in range(490))


def _chain(name: str, length: int) -> str:
    rules = "".join(f"{name}{i}:{name}{i + 1}\n" for i in range(length))
    return f'start:{name}0\n{rules}{name}{length}:"x"\n'


@pytest.mark.parametrize(
    ("syntax", "source"),
    [
        (SYNTAX.LARK, _chain("a", 490)),
        (SYNTAX.LARK, _chain("a", 4500)),
        (SYNTAX.LARK, _chain("A", 4500)),
        (SYNTAX.LARK, "start: x\nx: x x | /[a-z]/ | x x x\n"),
        (SYNTAX.LARK, "start: " + "(" * 30_000),
        (SYNTAX.REGEX, "(" * 30_000 + ")" * 30_000),
        (SYNTAX.REGEX, "|".join(f".*{char}.{{18}}" for char in "abcdefghijklmnop")),
        (SYNTAX.JSON_SCHEMA, '{"items":' * 5000 + "{}" + "}" * 5000),
        (SYNTAX.JSON_SCHEMA, '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
        (
            SYNTAX.JSON_SCHEMA,
            json.dumps({"properties": {f"value{i}": {"type": "string"} for i in range(1500)}}),
        ),
        (SYNTAX.GBNF, f'root ::= a0\n{DOUBLING}a490 ::= "x"\n'),
    ],
    ids=range(11),
)  # fmt: skip
def test_hostile_constraints(
    tokenizer: MlxTokenizer, syntax: ConstraintSyntax, source: str
) -> None:
    """They are refused or run, within seconds, and the process goes on."""
    assert len(source) <= 1 << 16
    with contextlib.suppress(BadConstraintError):
        guide = tokenizer.compile(Constraint(syntax, source))
        for _ in range(20):
            tokens = allowed(guide)
            if not tokenizer.eos_token_ids.isdisjoint(tokens):
                break
            guide.advance(tokens[-1])
    assert is_text(tokenizer, Constraint(SYNTAX.REGEX, "he"), "he")


def test_what_is_compiled_is_kept(tokenizer: MlxTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same constraint is compiled once, until too many others came after it."""
    monkeypatch.setattr(compiler, "MAX_KEPT", 2)
    compiled: list[str] = []
    new = compiler.ConstraintCompiler._new_matcher

    def counted(self: compiler.ConstraintCompiler, constraint: Constraint) -> object:
        compiled.append(constraint.source)
        return new(self, constraint)

    monkeypatch.setattr(compiler.ConstraintCompiler, "_new_matcher", counted)
    for source in ("ka", "kb", "ka", "kc", "ka", "kb"):
        guide = tokenizer.compile(Constraint(SYNTAX.REGEX, source))
        guide.advance(allowed(guide)[0])
    assert compiled == ["ka", "kb", "kc", "kb"]
