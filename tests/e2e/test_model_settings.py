"""The README's settings of a model, as they are written there, with the demo model."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from e2e.readme import blocks
from e2e.server_process import ServerProcess
from mlxpool_client import Client, Finished
from mlxpool_client.requests import GenerateOptions

SENTENCE = "The quick brown fox jumps over the lazy dog near the old stone bridge."

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(300)]


def written() -> str:
    (block,) = (block for block in blocks("toml") if "prompt_lookup_tokens" in block)
    return block


def repeated(text: str, demo_folder: Path, folder: Path) -> Finished:
    """What a server with these settings answers to the same question."""
    (model,) = tomllib.loads(text)["models"]
    config = folder / "mlxpool.toml"
    config.write_text(text.replace(f'"{model["path"]}"', f'"{demo_folder}"'), encoding="utf-8")
    with (
        ServerProcess(folder / "log.jsonl", "--config", str(config)) as process,
        Client(process.address) as client,
    ):
        question = f"Repeat word for word, three times:\n{SENTENCE}"
        options: GenerateOptions = {"temperature": 0, "max_tokens": 60, "final_only": True}
        with client.generate(model["name"], question, **options) as events:
            *_, last = events
    assert isinstance(last, Finished)
    return last


def test_guesses_change_no_answer(demo_folder: Path, tmp_path: Path) -> None:
    """The same greedy tokens with them and without, and some of them were guessed."""
    (line,) = (line for line in written().splitlines() if "prompt_lookup_tokens" in line)
    with_guesses = repeated(written(), demo_folder, tmp_path)
    without = repeated(written().replace(line, ""), demo_folder, tmp_path)
    assert with_guesses.text == without.text
    assert with_guesses.usage.accepted_draft_tokens > 5
    assert without.usage.accepted_draft_tokens == 0
