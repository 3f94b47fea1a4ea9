"""SIGHUP to a real server process."""

from __future__ import annotations

import signal
from pathlib import Path

import grpc

from e2e.server_process import ServerProcess
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool.v1 import model_service_pb2_grpc as rpc


def test_sighup_reads_the_configuration_again(demo_folder: Path, tmp_path: Path) -> None:
    """A wrong file changes nothing and says why; a right one brings its models."""
    config = tmp_path / "mlxpool.toml"
    model = f'[[models]]\nname = "{{}}"\npath = "{demo_folder}"\n'
    config.write_text(model.format("first"))
    with ServerProcess(tmp_path / "log.jsonl", "--config", str(config)) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.ModelServiceStub(channel)

            def names() -> list[str]:
                return [each.name for each in stub.ListModels(pb.ListModelsRequest()).models]

            config.write_text("max_batch_sizes = 3\n")
            server.signal(signal.SIGHUP)
            problem = server.wait_for("settings.not_reloaded")["problem"]
            assert "did you mean max_batch_size?" in problem
            assert names() == ["first"]
            config.write_text("max_prompt_tokens = 9\n" + model.format("second"))
            server.signal(signal.SIGHUP)
            line = server.wait_for("settings.reloaded")
            assert (line["added"], line["removed"]) == (["second"], ["first"])
            assert line["changed"] == ["max_prompt_tokens", "models"]
            assert names() == ["second"]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
