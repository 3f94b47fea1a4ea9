"""Every client's `conformance` program: how it is built, started and spoken to."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

from e2e.server_process import ROOT, environment

BUILD_TIMEOUT_S = 900
ANSWER_TIMEOUT_S = 90

Json = dict[str, Any]


class MissingToolchainError(Exception):
    """The client cannot be built here; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Client:
    """build, run, checks: commands in `folder`; checks are the client's own tests.

    chat, readme: run the example, and the README's first program, which is in "{out}/" + source.
    tools: the programs that they need. "{out}" is a folder for what is built.
    """

    name: str
    folder: Path
    run: tuple[str, ...]
    tools: tuple[str, ...] = ()
    build: tuple[tuple[str, ...], ...] = ()
    checks: tuple[tuple[str, ...], ...] = ()
    chat: tuple[str, ...] = ()
    readme: tuple[str, ...] = ()
    source: str = ""

    def build_in(self, folder: Path) -> None:
        """Raises: MissingToolchainError."""
        missing = [tool for tool in self.tools if not _works(tool)]
        if missing:
            raise MissingToolchainError(f"no {' and no '.join(missing)} on this machine")
        for step in self.build:
            self.perform(step, folder)

    def perform(self, step: Sequence[str], folder: Path) -> None:
        """Run one of the commands; what it writes is seen where pytest shows output."""
        command = [word.format(out=folder) for word in step]
        subprocess.run(command, cwd=self.folder, check=True, timeout=BUILD_TIMEOUT_S)


@cache
def _works(tool: str) -> bool:
    """Whether it is there: one of rustup's may be, without a toolchain behind it."""
    if shutil.which(tool) is None:
        return False
    asked = "version" if tool == "go" else "--version"
    return subprocess.run([tool, asked], capture_output=True, check=False).returncode == 0


_CARGO = (str(ROOT / "scripts" / "cargo"),)
_AS_A_DEPENDENCY = 'mkdir "{out}/node_modules" && ln -s "$PWD" "{out}/node_modules/mlxpool" && '

CLIENTS = {
    client.name: client
    for client in (
        Client(
            "python",
            ROOT / "clients" / "python",
            run=(sys.executable, str(ROOT / "clients" / "python" / "conform.py")),
        ),
        Client(
            "go",
            ROOT / "clients" / "go",
            tools=("go",),
            build=(("go", "build", "-o", "{out}/conformance", "./internal/conformance"),),
            run=("{out}/conformance",),
            checks=(("go", "vet", "./..."), ("go", "test", "./...")),
            chat=("go", "run", "./examples/chat", "-target", "{target}", "-max-tokens", "12"),
            readme=("go", "run", "{out}/main.go"),
            source="main.go",
        ),
        Client(
            "typescript",
            ROOT / "clients" / "typescript",
            tools=("node", "npm"),
            build=(
                ("npm", "ci", "--ignore-scripts", "--silent"),
                ("npm", "run", "build", "--silent"),
            ),
            run=("node", "dist/conformance/main.js"),
            checks=(("npm", "test", "--silent"),),
            chat=("node", "dist/examples/chat.js", "--target", "{target}", "--max-tokens", "12"),
            readme=("sh", "-c", _AS_A_DEPENDENCY + "node {out}/main.mjs"),
            source="main.mjs",
        ),
        Client(
            "rust",
            ROOT / "clients" / "rust",
            tools=("cargo", "rustfmt", "cargo-clippy"),
            build=((*_CARGO, "build", "--quiet", "--locked", "--examples"),),
            run=(*_CARGO, "run", "--quiet", "--locked", "--example", "conformance"),
            checks=(
                (*_CARGO, "fmt", "--check", "--all"),
                (
                    *_CARGO,
                    "clippy",
                    "--quiet",
                    "--locked",
                    "--all-targets",
                    "--features",
                    "server",
                    "--",
                    "--deny",
                    "warnings",
                ),
                (*_CARGO, "test", "--quiet", "--locked", "--features", "server"),
            ),
            chat=(*_CARGO, "run", "--quiet", "--example", "chat", "{target}", "demo", "12"),
            readme=(*_CARGO, "run", "--quiet", "--offline", "--manifest-path", "{out}/Cargo.toml"),
            source="main.rs",
        ),
    )
}


@dataclass(slots=True)
class Outcome:
    """What a program wrote about one call."""

    events: list[Json] = field(default_factory=list)
    response: Json | None = None
    end: Json = field(default_factory=dict)


class Program:
    """A running program, which makes one call after the other."""

    def __init__(self, command: list[str], folder: Path, errors: IO[str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(ANSWER_TIMEOUT_S) == 0
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()

    def perform(self, call: Json) -> Outcome:
        """Make one call and return all that came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        outcome = Outcome()
        while not outcome.end:
            line = self._lines.get(timeout=ANSWER_TIMEOUT_S)
            assert line, "the program ended in the middle of a call; its errors are above"
            said = json.loads(line)
            if "event" in said:
                outcome.events.append(said["event"])
            elif "response" in said:
                outcome.response = said["response"]
            else:
                outcome.end = said["end"]
        return outcome

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")
