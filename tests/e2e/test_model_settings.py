"""The README's settings of a model, as they are written there, with the demo model."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from e2e.readme import blocks
from e2e.server_process import ServerProcess
from mlxpool_client import Client, Finished
from mlxpool_client.requests import GenerateOptions

SENTENCE = "The quick brown fox jumps over the lazy dog near the old stone bridge."

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(300)]


def written(setting: str) -> str:
    (block,) = (block for block in blocks("toml") if setting in block)
    return block


def repeated(text: str, demo_folder: Path, folder: Path) -> Finished:
    """What a server with these settings, the demo model everywhere, says to a repetitive prompt."""
    text = re.sub(r'^path = ".*?"', f'path = "{demo_folder}"', text, flags=re.MULTILINE)
    name = tomllib.loads(text)["models"][0]["name"]
    config = folder / "mlxpool.toml"
    config.write_text(text, encoding="utf-8")
    prompt = f"{SENTENCE} " * 4
    options: GenerateOptions = {"temperature": 0, "max_tokens": 60, "final_only": True}
    with (
        ServerProcess(folder / "log.jsonl", "--config", str(config)) as process,
        Client(process.address) as client,
        client.generate(name, prompt, **options) as events,
    ):
        *_, last = events
    assert isinstance(last, Finished)
    return last


@pytest.mark.parametrize("setting", ["prompt_lookup_tokens", "draft_model"])
def test_guesses_change_no_answer(setting: str, demo_folder: Path, tmp_path: Path) -> None:
    """The same greedy tokens with them and without, and some of them were guessed."""
    text = written(setting)
    others = [line for line in text.splitlines() if setting not in line]
    without_guesses = "\n".join(line for line in others if "num_draft_tokens" not in line)
    with_guesses = repeated(text, demo_folder, tmp_path)
    without = repeated(without_guesses, demo_folder, tmp_path)
    assert with_guesses.text == without.text
    assert with_guesses.usage.accepted_draft_tokens > 5
    assert without.usage.accepted_draft_tokens == 0
