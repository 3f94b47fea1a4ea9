"""What a folder's small files say, whoever wrote them; FAMILIES are in test_model_families."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mlxpool_server.domain import Capability
from mlxpool_server.mlx_backend.capabilities import capabilities_of

CHAT = frozenset({Capability.CHAT})


def test_constraints(tmp_path: Path) -> None:
    """A vocabulary that can be read is all they need."""
    (tmp_path / "tokenizer.json").write_text("{}")
    assert capabilities_of(tmp_path) == {Capability.CONSTRAINTS}


def test_without_a_template(tmp_path: Path) -> None:
    """No chat, and so neither tools nor thoughts."""
    assert capabilities_of(tmp_path) == frozenset()


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "{{ messages }}"},
        {"chat_template": [{"name": "default", "template": "{{ messages }}"}]},
        {"chat_template_type": "deepseek_v32"},
        {"chat_template": "{{ messages }}", "added_tokens_decoder": {"0": 5, "1": {"content": 1}}},
    ],
    ids=["text", "named", "of mlx-lm", "odd tokens"],
)
def test_templates_in_the_tokenizers_config(config: object, tmp_path: Path) -> None:
    """However it is written there, it makes a chat model."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert capabilities_of(tmp_path) == CHAT


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "", "{"], ids=["deep", "list", "", "cut"])
def test_files_that_are_no_json(text: str, tmp_path: Path) -> None:
    """They say nothing; the model is served all the same."""
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (tmp_path / name).write_text(text)
    (tmp_path / "tokenizer.json").write_text(f'{{"added_tokens": {text}')
    assert capabilities_of(tmp_path) == CHAT | {Capability.CONSTRAINTS}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "tokenizer.json"],
)
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    """Listing the models takes no longer for one that has a pipe in a file's place."""
    os.mkfifo(tmp_path / name)
    assert capabilities_of(tmp_path) == frozenset()
