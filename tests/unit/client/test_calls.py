"""The sync client's other calls: what they send and what they return."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_client import (
    CacheKind,
    Capability,
    Client,
    LoadFinished,
    LoadPhase,
    LoadProgress,
    MemoryLimits,
    ModelState,
    Pooling,
    UnavailableError,
)

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer


def test_list_models_reads_every_page(client: Client, server: FakeServer) -> None:
    """list_models() follows the page tokens to the last page."""
    server.models.models = [pb.Model(name=name) for name in ("a", "b", "c")]
    assert [model.name for model in client.list_models()] == ["a", "b", "c"]


def test_list_models_can_filter(client: Client, server: FakeServer) -> None:
    """The states asked for go to the server, on every page."""
    client.list_models(states=[ModelState.READY])
    assert [list(request.states) for request in server.models.requests] == [[pb.MODEL_STATE_READY]]


def test_models_are_typed(client: Client) -> None:
    """A model has enums for enums, aware UTC times for timestamps, None for an unset one."""
    model = client.get_model("demo")
    assert model.state is ModelState.READY
    assert model.capabilities == (Capability.CHAT,)
    assert model.last_used_time is not None
    assert str(model.last_used_time.tzinfo) == "UTC"
    assert model.expire_time is None


def test_a_load_is_watched_to_its_end(client: Client, server: FakeServer) -> None:
    """A load is LoadProgress events and then one LoadFinished."""
    server.models.load.insert(0, pb.LoadModelResponse())
    progress, finished = client.load_model("demo")
    assert progress == LoadProgress(LoadPhase.LOADING, 1 << 20, 1 << 22)
    assert isinstance(finished, LoadFinished)
    assert finished.model.name == "demo"
    assert client.load_model("demo").result().evicted_models == ("old",)


def test_load_options_reach_the_server(client: Client, server: FakeServer) -> None:
    """pinned=False is sent, unlike None; math.inf is the longest Duration, which means never."""
    client.load_model("demo").result()
    client.load_model(
        "demo",
        pinned=False,
        keep_alive_s=math.inf,
        disallow_eviction=True,
        validate_only=True,
    ).result()
    plain, full = server.models.requests
    assert not plain.HasField("pinned")
    assert not plain.HasField("keep_alive")
    assert full.HasField("pinned")
    assert not full.pinned
    assert full.keep_alive.seconds == 315_576_000_000
    assert full.disallow_eviction
    assert full.validate_only


def test_unloading(client: Client, server: FakeServer) -> None:
    """unload_model() sends force and returns what was freed."""
    unloaded = client.unload_model("demo", force=True)
    assert unloaded.was_loaded
    assert unloaded.freed_bytes == 1 << 30
    assert server.models.requests == [pb.UnloadModelRequest(model="demo", force=True)]


def test_cancelling_somebody_elses_generation(client: Client, server: FakeServer) -> None:
    """cancel_generation() names the generation to the server."""
    client.cancel_generation("g1")
    assert server.models.requests == [pb.CancelGenerationRequest(generation_id="g1")]


def test_tokenizing(client: Client, server: FakeServer) -> None:
    """tokenize() and count_tokens() take the same inputs as generate()."""
    tokens = client.tokenize("demo", "Hi", include_pieces=True)
    assert tokens.token_ids == (7, 8)
    assert tokens.pieces == (b"Hi", b"\xe2\x82")
    assert tokens.rendered_prompt == "<user>Hi"
    assert client.count_tokens("demo", messages=[{"role": "user", "content": "Hi"}]) == 2
    assert server.models.requests[1].prompt.chat.messages[0].role == pb.ROLE_USER


def test_embedding(client: Client, server: FakeServer) -> None:
    """embed() takes texts, chats and tokens; what is not given is not sent."""
    chat = [{"role": "user", "content": "Hi"}]
    embedded = client.embed("demo", ["Hi", chat, [1, 2]])
    assert embedded.vectors == ((0.5, -2.0),) * 3
    assert embedded.prompt_tokens == 5
    (request,) = server.models.requests
    kinds = [each.WhichOneof("input") for each in request.inputs]
    assert kinds == ["text", "chat", "tokens"]
    assert not request.HasField("normalize")
    assert request.pooling == pb.POOLING_UNSPECIFIED


def test_embedding_options(client: Client, server: FakeServer) -> None:
    """normalize=False is sent, unlike None."""
    client.embed("demo", ["Hi"], pooling=Pooling.CLS, normalize=False, keep_alive_s=3)
    (request,) = server.models.requests
    assert request.pooling == pb.POOLING_CLS
    assert request.HasField("normalize")
    assert not request.normalize
    assert request.keep_alive.seconds == 3


@pytest.mark.parametrize("inputs", ["one text", [[1, "two"]], [[1, {"role": "user"}]]])
def test_inputs_that_are_none(client: Client, server: FakeServer, inputs: Any) -> None:
    """What cannot be meant is refused before anything is sent."""
    with pytest.raises(TypeError):
        client.embed("demo", inputs)
    with pytest.raises(TypeError, match="no option dimensions"):
        client.embed("demo", ["a"], dimensions=3)  # type: ignore[call-arg]
    assert server.models.requests == []


def test_server_info(client: Client) -> None:
    """server_info() returns versions and device; a time that is not set is None."""
    info = client.server_info()
    assert (info.version, info.mlx_version, info.device_name) == ("0.1.0", "0.32.4", "cpu")
    assert info.start_time is None


def test_memory_usage(client: Client) -> None:
    """A limit of 0 differs from one that the device does not have."""
    usage = client.memory_usage()
    assert usage.limits == MemoryLimits(pool_bytes=4 << 30, cache_bytes=0)
    assert usage.models[0].resident_bytes == 1 << 30


def test_watching_memory_skips_unknown_messages(client: Client, server: FakeServer) -> None:
    """A watch yields samples and ends when the server ends it."""
    assert len(list(client.watch_memory_usage(0.5))) == 2
    assert server.memory.requests[0].interval.nanos == 500_000_000


def test_setting_limits(client: Client, server: FakeServer) -> None:
    """Only the limits that are given are sent; 0 is given."""
    change = client.set_memory_limits(pool_bytes=5, cache_bytes=0)
    assert change.previous.pool_bytes == 4 << 30
    assert change.current == MemoryLimits(pool_bytes=5, cache_bytes=0)
    assert change.evicted_models == ("old",)
    assert not server.memory.requests[0].limits.HasField("wired_bytes")


def test_clearing_and_resetting(client: Client, server: FakeServer) -> None:
    """clear_cache() sends the kinds that are named; both calls return bytes."""
    assert client.clear_cache(CacheKind.PROMPTS) == 1 << 20
    assert client.reset_peak_memory() == 2 << 30
    assert server.memory.requests[0].kinds == [memory_pb.CACHE_KIND_PROMPTS]


def test_waiting_until_ready(client: Client, nobody: str) -> None:
    """wait_until_ready() returns once the server answers, and gives up after its time."""
    client.wait_until_ready(10)
    with Client(nobody) as lonely, pytest.raises(UnavailableError, match="nothing answered"):
        lonely.wait_until_ready(0.1)


def test_nobody_listening_is_a_connection_error(nobody: str) -> None:
    """A call to a port where nothing listens fails by itself, without a deadline."""
    with Client(nobody) as lonely, pytest.raises(ConnectionError) as caught:
        lonely.server_info()
    assert isinstance(caught.value, UnavailableError)


def test_waiting_calls_obey_their_deadline(nobody: str) -> None:
    """With wait_for_ready a call waits for a server, but no longer than its deadline."""
    with (
        Client(nobody, wait_for_ready=True, timeout_s=0.1) as lonely,
        pytest.raises(TimeoutError),
    ):
        lonely.server_info()


def test_a_borrowed_channel_stays_open(server: FakeServer) -> None:
    """Closing a client leaves a channel alone that the caller brought."""
    with grpc.insecure_channel(server.target) as channel:
        Client(channel=channel).close()
        assert Client(channel=channel).server_info().version == "0.1.0"
