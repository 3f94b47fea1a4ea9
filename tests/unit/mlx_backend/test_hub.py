"""The hub client against a hub of our own: progress in bytes, no code, one-line errors."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from structlog.testing import capture_logs

from mlxpool_server.domain import HubSource, Layout, LoadPhase, LoadProgress, ModelSpec
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend.loader import MlxLoader
from tiny_models import write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = HubSource("someone/tiny")


class Hub:
    """One repository, as much of the protocol as a download needs."""

    def __init__(self, folder: Path) -> None:
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.served: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, call: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = call.path.partition("?")[0]
        body: bytes | None = None
        if path.startswith("/api/models/someone/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in self.files.items()
            ]
            body = json.dumps(tree).encode()
        elif path.startswith("/api/models/someone/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/someone/tiny/resolve/"):
            body = self.files.get(path.rpartition("/")[2])
        if body is None:
            call.send_response(404)
            call.send_header("X-Error-Code", "RepoNotFound")
            call.send_header("Content-Length", "0")
            call.end_headers()
            return
        call.send_response(200)
        call.send_header("Content-Length", str(len(body)))
        call.send_header("ETag", f'"{_etag(body)}"')
        call.send_header("X-Repo-Commit", COMMIT)
        call.end_headers()
        if with_body:
            self.served.append(path.rpartition("/")[2])
            call.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = write_model(tmp_path / "tiny")
    (folder / "evil.py").write_text("raise SystemExit\n")
    (folder / "README.md").write_text("hello\n")
    hub = Hub(folder)
    # The client reads these from the environment, once, when it is imported.
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


@pytest.fixture
def loader() -> MlxLoader:
    return MlxLoader(prefill_step_tokens=16, default_layout=Layout.STORED)


def test_fetch_inspect_load(hub: Hub, loader: MlxLoader, capfd: pytest.CaptureFixture[str]) -> None:
    """Unknown before, told in bytes while it comes, a model after, and nothing drawn."""
    spec = ModelSpec("tiny", SOURCE)
    assert loader.inspect(spec) is None
    seen: list[LoadProgress] = []
    loader.fetch(spec, seen.append)
    assert {progress.phase for progress in seen} == {LoadPhase.DOWNLOADING}
    assert seen[-1].completed_bytes == seen[-1].total_bytes > len(hub.files["model.safetensors"])
    assert not {"evil.py", "README.md"} & set(hub.served)
    info = loader.inspect(spec)
    assert info is not None
    assert info.revision == COMMIT
    with capture_logs():
        model = loader.load(spec, lambda _: None, lambda: False)
    assert model.resident_bytes == info.estimated_bytes
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_tokenizer_needs_no_weights(hub: Hub, loader: MlxLoader) -> None:
    """Only its own files are fetched, and the model still counts as not fetched."""
    spec = ModelSpec("tiny", SOURCE)
    assert loader.load_tokenizer(spec).encode("hello", add_special_tokens=False)
    assert "tokenizer.json" in hub.served
    assert "model.safetensors" not in hub.served
    assert loader.inspect(spec) is None
    loader.fetch(spec, lambda _: None)
    assert loader.inspect(spec) is not None


def test_fetched_model_needs_no_hub(hub: Hub, loader: MlxLoader) -> None:
    """A second start without network loads what is cached."""
    spec = ModelSpec("tiny", SOURCE)
    loader.fetch(spec, lambda _: None)
    hub.server.shutdown()
    hub.server.server_close()
    started = time.monotonic()
    loader.fetch(spec, lambda _: None)
    # Not as long as the client's patience with an absent network.
    assert time.monotonic() - started < 5
    assert loader.inspect(spec) is not None
    assert loader.load(spec, lambda _: None, lambda: False).resident_bytes


def test_repository_that_does_not_exist(hub: Hub, loader: MlxLoader) -> None:
    """One line, whatever the client's message looks like."""
    spec = ModelSpec("tiny", HubSource("someone/else"))
    with pytest.raises(LoadFailedError, match="the hub did not give it") as error:
        loader.fetch(spec, lambda _: None)
    assert "\n" not in error.value.problem
    assert len(error.value.problem) < 400
