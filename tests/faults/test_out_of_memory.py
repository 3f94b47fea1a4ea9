"""A real server whose address space is limited while it runs: MLX's own allocations fail.

It dies of it today, which this pins; test_failed_steps has the errors that MLX does raise.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from e2e.server_process import ServerProcess
from mlxpool_client import Client, GenerationFailedError, UnavailableError
from tiny_models import write_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="prlimit and /proc are Linux's"),
    pytest.mark.timeout(300),
    # ml-explore/mlx#2874 took the check of what malloc returns out of the CPU's allocator: MLX
    # writes to address zero. Strict, so that an MLX that raises again is noticed.
    pytest.mark.xfail(
        strict=True, reason="MLX 0.32.4 dies of a failed malloc on a CPU", raises=UnavailableError
    ),
]

# A token takes 1 MiB of KV cache: a long prompt needs far more than HEADROOM_BYTES, a short one
# next to nothing, and what threads and sockets take meanwhile is nothing beside it.
MODEL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 1024,
    "max_position_embeddings": 4096,
}
HEADROOM_BYTES = 512 << 20
SHORT = [3, 1, 4, 1, 5]
LONG = [number % 256 for number in range(2048)]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "m", **MODEL)
    return root


@pytest.fixture
def server(models_dir: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    # The pool believes in memory without end: the step has to find out.
    options = ("--models-dir", str(models_dir), "--pool-memory-limit-bytes", str(1 << 40))
    with ServerProcess(tmp_path / "log.jsonl", *options) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address, timeout_s=120) as client:
        yield client


def answer(client: Client, prompt: list[int]) -> tuple[int, ...]:
    """The first tokens of the greedy answer."""
    generation = client.generate(
        "m",
        token_ids=prompt,
        temperature=0.0,
        max_tokens=4,
        ignore_eos=True,
        final_only=True,
        include_token_ids=True,
        timeout_s=120,
    )
    return generation.result().token_ids


def limit_memory(server: ServerProcess) -> None:
    """Let the server have HEADROOM_BYTES more than it has now."""
    pid = server.process.pid
    status = Path(f"/proc/{pid}/status").read_text()
    size = re.search(r"^VmSize:\s+(\d+) kB$", status, re.MULTILINE)
    assert size is not None
    limit = int(size[1]) * 1024 + HEADROOM_BYTES
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def lift_limit(server: ServerProcess) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(server.process.pid, resource.RLIMIT_AS, unlimited)


def is_serving(server: ServerProcess) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def failed_steps(server: ServerProcess) -> list[str]:
    """The causes that the log gives."""
    return [str(event) for event in server.events() if event["event"] == "engine.step_failed"]


def test_step_without_memory(server: ServerProcess, client: Client) -> None:
    """Its generation fails with INTERNAL; the model, still loaded, answers the next as before."""
    expected = answer(client, SHORT)
    limit_memory(server)
    with pytest.raises(GenerationFailedError) as error:
        answer(client, LONG)
    assert error.value.reason == "GENERATION_FAILED"
    assert answer(client, SHORT) == expected
    assert is_serving(server)
    (cause,) = failed_steps(server)
    assert "allocate" in cause
    lift_limit(server)
    assert len(answer(client, LONG)) == 4
