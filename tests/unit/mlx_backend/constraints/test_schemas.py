"""A random model under small schemas of others, and jsonschema's word on what it wrote.

`schemas.json` has schemas of the JSON-Schema-Test-Suite (MIT) and parts of SchemaStore's
(Apache-2.0), without their descriptions: those that llguidance takes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from mlxpool_server.domain import Constraint, ConstraintSyntax, Layout, ModelSpec, SamplingParams
from mlxpool_server.mlx_backend.loader import MlxLoader
from tiny_models import write_model

SCHEMAS = json.loads(Path(__file__).with_name("schemas.json").read_text(encoding="utf-8"))
ROWS = 32
TOKENS = 400


@pytest.mark.timeout(300)
def test_what_ends_by_itself_is_valid(tmp_path: Path) -> None:
    """Over 200 schemas; most end, since what closes a value is made likely."""
    spec = ModelSpec("tiny", write_model(tmp_path / "tiny", max_position_embeddings=1024))
    loader = MlxLoader(prefill_step_tokens=64, default_layout=Layout.FLOAT32)
    tokenizer = loader.load_tokenizer(spec)
    closing = {tokenizer.encode(char, add_special_tokens=False)[0]: 8.0 for char in '"}]'}
    bias = closing | dict.fromkeys(tokenizer.eos_token_ids, 12.0)
    batch = loader.load(spec, lambda _: None, lambda: False).new_runner()
    waiting = list(range(len(SCHEMAS)))
    running: dict[int, list[int]] = {}
    ended = 0
    while waiting or running:
        while waiting and len(running) < ROWS:
            slot = waiting.pop()
            source = json.dumps(SCHEMAS[slot]["schema"])
            guide = tokenizer.compile(Constraint(ConstraintSyntax.JSON_SCHEMA, source))
            sampling = SamplingParams(temperature=1.0, seed=slot, logit_bias=bias)
            batch.add(slot, [slot % 256, 7], sampling, guide)
            running[slot] = []
        output = batch.step()
        assert not output.failed, [SCHEMAS[slot]["name"] for slot, _ in output.failed]
        for slot, token in output.tokens:
            tokens = running[slot]
            tokens.append(token)
            if token in tokenizer.eos_token_ids:
                value = json.loads(b"".join(map(tokenizer.piece, tokens[:-1])))
                Draft202012Validator(SCHEMAS[slot]["schema"]).validate(value)
                ended += 1
            elif len(tokens) < TOKENS:
                continue
            batch.remove([slot])
            del running[slot]
    batch.close()
    assert ended > 200
