"""What a reader of a client's page copies and runs, against the real server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from conformance.programs import BUILD_TIMEOUT_S, CLIENTS, Client
from e2e.readme import at, blocks

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(900)]


@pytest.fixture
def client(client_name: str, built: Path) -> Client:
    """Of another language than Python, whose examples are in the README of the project."""
    found = CLIENTS[client_name]
    if not found.chat:
        pytest.skip(f"the {client_name} client's examples are in the README of the project")
    return found


def output_of(client: Client, command: tuple[str, ...], said: str, **values: object) -> str:
    done = subprocess.run(
        [word.format(**values) for word in command], cwd=client.folder, input=said,
        capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_program(client: Client, demo_address: str, tmp_path: Path) -> None:
    """The page's first program streams the model's answer and says how long it was."""
    page = client.folder / "README.md"
    tag = {"main.go": "go", "main.mjs": "ts", "main.rs": "rust"}[client.source]
    program = blocks(tag, page)[0]
    if tag == "rust":
        package = '[package]\nname = "readme"\nedition = "2024"\n[[bin]]\nname = "readme"\n'
        dependencies = blocks("toml", page)[0]
        dependencies = dependencies.replace("/path/to/mlxpool/clients/rust", str(page.parent))
        manifest = f'{package}path = "main.rs"\n{dependencies}'
        (tmp_path / "Cargo.toml").write_text(manifest, encoding="utf-8")
        shutil.copy(page.parent / "Cargo.lock", tmp_path)
    (tmp_path / client.source).write_text(at(demo_address, program), encoding="utf-8")
    output = output_of(client, client.readme, "", out=tmp_path)
    assert " tokens, " in output
    assert len(output.splitlines()[0]) > 10


def test_chat(client: Client, demo_address: str) -> None:
    """The example answers two questions, and leaves at the end of its input."""
    questions = "What is the capital of France?\nSay yes.\n"
    output = output_of(client, client.chat, questions, target=demo_address)
    assert "Paris" in output
    assert output.count("> ") == 3
