"""Every kind of bad input: its status, its details, and a server that goes on serving."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb

from fakes import VOCAB_SIZE, FakeFiles, FakeTokenizer
from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import (
    MAX_DETAILS_BYTES,
    Failure,
    Server,
    chat_prompt,
    failure_of,
    running_server,
    text_request,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
HUGE = "名" * 33_000


def sampling(**fields: Any) -> pb.GenerateRequest:
    return text_request(sampling=pb.SamplingParams(**fields))


def stop(**fields: Any) -> pb.GenerateRequest:
    return text_request(stop=pb.StopConditions(**fields))


def output(**fields: Any) -> pb.GenerateRequest:
    return text_request(output=pb.OutputOptions(**fields))


def assert_contract(failure: Failure) -> None:
    """What holds for every error of ours."""
    assert failure.domain == "mlxpool"
    assert failure.details_bytes < MAX_DETAILS_BYTES
    assert len(failure.message.encode()) <= 512
    assert failure.message


INVALID_FIELDS: dict[str, tuple[pb.GenerateRequest, str]] = {
    "no model": (text_request(model=""), "model"),
    "no prompt": (text_request(prompt=pb.Prompt()), "prompt"),
    "empty text": (text_request(""), "prompt.text"),
    "empty messages": (
        text_request(prompt=pb.Prompt(chat=pb.ChatPrompt())),
        "prompt.chat.messages",
    ),
    "empty tokens": (text_request(prompt=pb.Prompt(tokens=pb.TokenIds())), "prompt.tokens.ids"),
    "token outside": (
        text_request(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[1, VOCAB_SIZE]))),
        "prompt.tokens.ids",
    ),
    "negative token": (
        text_request(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[-1]))),
        "prompt.tokens.ids",
    ),
    "role out of order": (
        text_request(prompt=chat_prompt((pb.ROLE_ASSISTANT, "first"))),
        "prompt.chat.messages",
    ),
    "unset role": (
        text_request(prompt=chat_prompt((pb.ROLE_USER, "a"), (pb.ROLE_UNSPECIFIED, "b"))),
        "prompt.chat.messages[1].role",
    ),
    "unknown role": (text_request(prompt=chat_prompt((99, "a"))), "prompt.chat.messages[0].role"),
    "unknown part": (
        text_request(
            prompt=pb.Prompt(
                chat=pb.ChatPrompt(
                    messages=[pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart()])]
                )
            )
        ),
        "prompt.chat.messages[0].content[0]",
    ),
    "unknown priority": (text_request(priority=99), "priority"),
    "temperature NaN": (sampling(temperature=math.nan), "sampling.temperature"),
    "temperature infinite": (sampling(temperature=math.inf), "sampling.temperature"),
    "temperature negative": (sampling(temperature=-0.1), "sampling.temperature"),
    "top_p zero": (sampling(top_p=0), "sampling.top_p"),
    "top_p seven": (sampling(top_p=7), "sampling.top_p"),
    "top_p NaN": (sampling(top_p=math.nan), "sampling.top_p"),
    "top_k negative": (sampling(top_k=-1), "sampling.top_k"),
    "min_p above one": (sampling(min_p=1.5), "sampling.min_p"),
    "repetition_penalty zero": (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    "presence_penalty": (sampling(presence_penalty=2.5), "sampling.presence_penalty"),
    "frequency_penalty": (sampling(frequency_penalty=-math.inf), "sampling.frequency_penalty"),
    "penalty_context_size": (sampling(penalty_context_size=0), "sampling.penalty_context_size"),
    "xtc_probability": (sampling(xtc_probability=-1), "sampling.xtc_probability"),
    "xtc_threshold": (sampling(xtc_threshold=0.6), "sampling.xtc_threshold"),
    "logit_bias NaN": (sampling(logit_bias={1: math.nan}), "sampling.logit_bias"),
    "logit_bias too large": (sampling(logit_bias={1: 101}), "sampling.logit_bias"),
    "logit_bias outside": (sampling(logit_bias={VOCAB_SIZE: 1}), "sampling.logit_bias"),
    "too many logit biases": (
        sampling(logit_bias=dict.fromkeys(range(1025), 1.0)),
        "sampling.logit_bias",
    ),
    "top_logprobs negative": (output(top_logprobs=-1), "output.top_logprobs"),
    "top_logprobs too many": (output(top_logprobs=21), "output.top_logprobs"),
    "top_logprobs without deltas": (
        output(top_logprobs=0, final_only=True),
        "output.top_logprobs",
    ),
    "max_tokens zero": (stop(max_tokens=0), "stop.max_tokens"),
    "max_tokens negative": (stop(max_tokens=-5), "stop.max_tokens"),
    "too many stop sequences": (stop(sequences=["x"] * 17), "stop.sequences"),
    "long stop sequence": (stop(sequences=["x" * 257]), "stop.sequences"),
    "empty stop sequence": (stop(sequences=[""]), "stop.sequences"),
    "stop token outside": (stop(token_ids=[VOCAB_SIZE]), "stop.token_ids"),
    "too many stop tokens": (stop(token_ids=[1] * 257), "stop.token_ids"),
    "max_duration zero": (stop(max_duration=Duration()), "stop.max_duration"),
    "max_duration negative": (stop(max_duration=Duration(seconds=-1)), "stop.max_duration"),
    "keep_alive negative": (text_request(keep_alive=Duration(nanos=-1)), "keep_alive"),
    "long generation_id": (text_request(generation_id="g" * 129), "generation_id"),
    "unprintable generation_id": (text_request(generation_id="a\nb"), "generation_id"),
}


@pytest.mark.parametrize(("request_", "field"), INVALID_FIELDS.values(), ids=INVALID_FIELDS.keys())
async def test_invalid_field(server: Server, request_: pb.GenerateRequest, field: str) -> None:
    """INVALID_ARGUMENT names the field; nothing was sent before; the next request is served."""
    failure = await failure_of(server.models.Generate(request_))
    assert (failure.code, failure.reason, failure.field) == (INVALID, "INVALID_FIELD", field)
    assert_contract(failure)
    await server.assert_serves()


async def test_prompt_longer_than_the_context(server: Server) -> None:
    """PROMPT_TOO_LONG tells both figures; a prompt that leaves room for one token runs."""
    failure = await failure_of(server.models.Generate(text_request("x" * 1000)))
    assert (failure.code, failure.reason, failure.field) == (INVALID, "PROMPT_TOO_LONG", "prompt")
    assert failure.metadata == {"promptTokens": "1000", "limitTokens": "1000"}
    assert_contract(failure)
    events = await server.generate(text_request("x" * 999))
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_CONTEXT_LENGTH
    await server.assert_serves()


@pytest.mark.parametrize("name", ["nope", "../etc/passwd", "/", HUGE], ids=len)
async def test_unknown_model(server: Server, name: str) -> None:
    """NOT_FOUND with ResourceInfo, whatever the name, from every RPC that has one."""
    calls = [
        server.models.Generate(text_request(model=name)),
        server.models.LoadModel(pb.LoadModelRequest(model=name)),
        server.models.UnloadModel(pb.UnloadModelRequest(model=name)),
        server.models.GetModel(pb.GetModelRequest(model=name)),
        server.models.Tokenize(pb.TokenizeRequest(model=name, prompt=pb.Prompt(text="a"))),
        server.models.CountTokens(pb.CountTokensRequest(model=name, prompt=pb.Prompt(text="a"))),
    ]
    for call in calls:
        failure = await failure_of(call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        resource = failure.detail(details_pb.ResourceInfo)
        assert resource.resource_type == "model"
        assert resource.resource_name[:50] == name[:50]
        assert_contract(failure)
    assert len(str((await server.log_line("Generate"))["model"])) < 300
    await server.assert_serves()


async def test_chat_without_a_template() -> None:
    """CAPABILITY_MISSING, and raw text still works."""
    files = {"m": FakeFiles(tokenizer=FakeTokenizer(has_chat_template=False))}
    async with running_server(files) as server:
        prompt = chat_prompt((pb.ROLE_USER, "a"))
        failure = await failure_of(server.models.Generate(text_request(prompt=prompt)))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert failure.reason == "CAPABILITY_MISSING"
        assert "prompt.text" in failure.message
        assert_contract(failure)
        await server.assert_serves()


async def test_an_image(server: Server) -> None:
    """CAPABILITY_MISSING, to generate from and to count: no model here can see."""
    image = pb.ContentPart(image=pb.ImagePart(data=b"x", mime_type="image/png"))
    prompt = _message(content=[image])
    for call in (
        server.models.Generate(text_request(prompt=prompt)),
        server.models.CountTokens(pb.CountTokensRequest(model="m", prompt=prompt)),
    ):
        failure = await failure_of(call)
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert failure.reason == "CAPABILITY_MISSING"
        assert "image input" in failure.message
        assert_contract(failure)
    await server.assert_serves()


async def test_a_part_of_no_kind(server: Server) -> None:
    """A newer client's kind of part looks so: dropping it would change the prompt."""
    prompt = _message(content=[pb.ContentPart()])
    failure = await failure_of(server.models.Generate(text_request(prompt=prompt)))
    assert failure.reason == "INVALID_FIELD"
    assert failure.field == "prompt.chat.messages[0].content[1]"


async def test_generation_id_in_use(server: Server) -> None:
    """The second is refused and the first is not harmed; later the id is free again."""
    files = server.files["m"]
    files.may_load.clear()
    first = server.reader(text_request("first", generation_id="same"))
    await first.next()
    failure = await failure_of(server.models.Generate(text_request(generation_id="same")))
    assert failure.code is grpc.StatusCode.ALREADY_EXISTS
    assert failure.reason == "GENERATION_ID_IN_USE"
    assert_contract(failure)
    files.may_load.set()
    assert (await first.rest())[-1].finished.message.content[0].text == "first"
    again = await server.generate(text_request(generation_id="same"))
    assert again[-1].HasField("finished")


async def test_unknown_generation(server: Server) -> None:
    """CancelGeneration of nothing is NOT_FOUND, also with an enormous id."""
    for name in ("gone", HUGE):
        call = server.models.CancelGeneration(pb.CancelGenerationRequest(generation_id=name))
        failure = await failure_of(call)
        assert (failure.code, failure.reason) == (
            grpc.StatusCode.NOT_FOUND,
            "GENERATION_NOT_FOUND",
        )
        assert failure.detail(details_pb.ResourceInfo).resource_type == "generation"
        assert_contract(failure)


async def test_require_loaded(server: Server) -> None:
    """MODEL_NOT_LOADED, and it does not load."""
    failure = await failure_of(server.models.Generate(text_request(require_loaded=True)))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "MODEL_NOT_LOADED"
    assert_contract(failure)
    assert server.files["m"].num_loads == 0


async def test_message_over_the_size_limit() -> None:
    """It is refused by gRPC itself, and the connection lives on."""
    async with running_server(max_message_bytes=4096) as server:
        failure = await failure_of(server.models.Generate(text_request("x" * 5000)))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        await server.assert_serves()


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_message_that_does_not_parse(server: Server, kind: str) -> None:
    """INVALID_ARGUMENT, not grpc's UNKNOWN with the exception's text; it is logged like others."""
    if kind == "unary":
        call = server.channel.unary_unary("/mlxpool.v1.ModelService/GetModel")(b"\xff\xff")
    else:
        call = server.channel.unary_stream("/mlxpool.v1.ModelService/Generate")(b"\xff\xff")
    failure = await failure_of(call)
    assert (failure.code, failure.reason, failure.field) == (INVALID, "INVALID_FIELD", "request")
    line = await server.log_line("GetModel" if kind == "unary" else "Generate")
    assert line["status"] == "INVALID_ARGUMENT"
    await server.assert_serves()


async def test_load_that_fails(server: Server) -> None:
    """LOAD_FAILED with one line, for the load and for the generation that waits for it."""
    from mlxpool_server.errors import LoadFailedError  # noqa: PLC0415 - only here

    server.files["m"].load_error = LoadFailedError("m", "no tensors")
    for call in (
        server.models.LoadModel(pb.LoadModelRequest(model="m")),
        server.models.Generate(text_request()),
    ):
        failure = await failure_of(call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "LOAD_FAILED")
        assert "no tensors" in failure.message
        assert_contract(failure)
    model = (await server.models.GetModel(pb.GetModelRequest(model="m"))).model
    assert model.state == pb.MODEL_STATE_FAILED
    assert "no tensors" in model.error_message
    server.files["m"].load_error = None
    await server.assert_serves()


async def test_load_that_fails_unforeseen(server: Server) -> None:
    """The exception's text is logged and not sent."""
    server.files["m"].load_error = RuntimeError("/secret/path")
    failure = await failure_of(server.models.LoadModel(pb.LoadModelRequest(model="m")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "LOAD_FAILED")
    assert "secret" not in failure.message
    server.files["m"].load_error = None
    await server.assert_serves()


async def test_folder_that_is_no_model() -> None:
    """Its requests fail, the list shows why, and the other models are served."""
    files = {"bad": FakeFiles(inspect_error="its config.json has no model_type"), "m": FakeFiles()}
    async with running_server(files) as server:
        failure = await failure_of(server.models.Generate(text_request(model="bad")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "LOAD_FAILED")
        assert_contract(failure)
        listed = (await server.models.ListModels(pb.ListModelsRequest())).models
        assert {model.name: model.state for model in listed} == {
            "bad": pb.MODEL_STATE_FAILED,
            "m": pb.MODEL_STATE_UNLOADED,
        }
        assert "model_type" in listed[0].error_message
        await server.assert_serves()


async def test_model_larger_than_the_limit() -> None:
    """POOL_MEMORY_LIMIT with the figures and QuotaFailure, before any event."""
    files = {"big": FakeFiles(estimated_bytes=5000), "m": FakeFiles()}
    async with running_server(files, pool_memory_limit_bytes=1000) as server:
        await server.assert_serves()
        for call in (
            server.models.Generate(text_request(model="big")),
            server.models.LoadModel(pb.LoadModelRequest(model="big")),
        ):
            failure = await failure_of(call)
            assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert failure.reason == "POOL_MEMORY_LIMIT"
            assert failure.metadata is not None
            assert failure.metadata["requiredBytes"] == "5000"
            assert int(failure.metadata["availableBytes"]) <= 1000
            assert failure.detail(details_pb.QuotaFailure).violations[0].subject == "big"
            assert_contract(failure)
        await server.assert_serves()
        assert server.files["m"].num_loads == 1


async def test_limit_below_what_is_in_use(server: Server) -> None:
    """MEMORY_IN_USE with both figures, and nothing changes."""
    await server.models.LoadModel(pb.LoadModelRequest(model="m", pinned=True)).read()
    await server.assert_serves()
    before = (await server.memories.GetMemoryUsage(memory_pb.GetMemoryUsageRequest())).usage.limits
    limits = memory_pb.MemoryLimits(pool_bytes=10, cache_bytes=1)
    request = memory_pb.SetMemoryLimitsRequest(limits=limits)
    failure = await failure_of(server.memories.SetMemoryLimits(request))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "MEMORY_IN_USE"
    assert failure.metadata is not None
    assert failure.metadata["limitBytes"] == "10"
    assert int(failure.metadata["inUseBytes"]) >= 100
    assert_contract(failure)
    after = (await server.memories.GetMemoryUsage(memory_pb.GetMemoryUsageRequest())).usage.limits
    assert before == after


OTHERS: dict[str, tuple[Callable[[Server], Any], str]] = {
    "negative limit": (
        lambda server: server.memories.SetMemoryLimits(
            memory_pb.SetMemoryLimitsRequest(limits=memory_pb.MemoryLimits(cache_bytes=-1))
        ),
        "limits.cache_bytes",
    ),
    "unknown cache": (
        lambda server: server.memories.ClearCache(memory_pb.ClearCacheRequest(kinds=[77])),
        "kinds",
    ),
    "unset cache": (
        lambda server: server.memories.ClearCache(memory_pb.ClearCacheRequest(kinds=[0])),
        "kinds",
    ),
    "negative interval": (
        lambda server: server.memories.WatchMemoryUsage(
            memory_pb.WatchMemoryUsageRequest(interval=Duration(seconds=-1))
        ),
        "interval",
    ),
    "unknown state": (
        lambda server: server.models.ListModels(pb.ListModelsRequest(states=[42])),
        "states",
    ),
    "negative page": (
        lambda server: server.models.ListModels(pb.ListModelsRequest(page_size=-1)),
        "page_size",
    ),
    "negative load keep_alive": (
        lambda server: server.models.LoadModel(
            pb.LoadModelRequest(model="m", keep_alive=Duration(seconds=-3))
        ),
        "keep_alive",
    ),
    "empty names": (
        lambda server: server.models.UnloadModel(pb.UnloadModelRequest()),
        "model",
    ),
    "empty prompt to count": (
        lambda server: server.models.CountTokens(pb.CountTokensRequest(model="m")),
        "prompt",
    ),
    "token outside to tokenize": (
        lambda server: server.models.Tokenize(
            pb.TokenizeRequest(model="m", prompt=pb.Prompt(tokens=pb.TokenIds(ids=[2**31 - 1])))
        ),
        "prompt.tokens.ids",
    ),
}


@pytest.mark.parametrize(("call", "field"), OTHERS.values(), ids=OTHERS.keys())
async def test_invalid_field_of_other_calls(
    server: Server, call: Callable[[Server], Any], field: str
) -> None:
    """The same status and details as Generate's."""
    failure = await failure_of(call(server))
    assert (failure.code, failure.reason, failure.field) == (INVALID, "INVALID_FIELD", field)
    assert_contract(failure)


# ---------------------------------------------------------------- not implemented


def _chat(**fields: Any) -> pb.Prompt:
    prompt = chat_prompt((pb.ROLE_USER, "hi"))
    prompt.chat.MergeFrom(pb.ChatPrompt(**fields))
    return prompt


def _message(**fields: Any) -> pb.Prompt:
    prompt = chat_prompt((pb.ROLE_USER, "hi"))
    prompt.chat.messages[0].MergeFrom(pb.ChatMessage(**fields))
    return prompt


CHAT = "prompt.chat."
NOT_IMPLEMENTED: list[tuple[str, Message]] = [
    ("adapter", pb.EmbedRequest(model="m", adapter="a")),
]


@pytest.mark.parametrize(
    ("field", "request_"),
    NOT_IMPLEMENTED,
    ids=[f"{type(request).__name__}-{field}" for field, request in NOT_IMPLEMENTED],
)
async def test_not_implemented(server: Server, field: str, request_: Message) -> None:
    """UNIMPLEMENTED names the field; it is never ignored."""
    method = getattr(server.models, type(request_).__name__.removesuffix("Request"))
    failure = await failure_of(method(request_))
    assert failure.code is grpc.StatusCode.UNIMPLEMENTED
    assert (failure.reason, failure.field) == ("NOT_IMPLEMENTED", field)
    assert field in failure.message
    assert_contract(failure)


# Fields that this server honours, or that name what another field of the table is about.
HONOURED = {
    "GenerateRequest": "model adapter prompt sampling stop constraint output generation_id "
    "priority keep_alive require_loaded disable_prompt_cache",
    "StopConditions": "max_tokens max_reasoning_tokens sequences token_ids ignore_eos max_duration",
    "OutputOptions": "final_only include_token_ids top_logprobs",
    "ChatPrompt": "messages tools tool_choice enable_reasoning continue_final_message "
    "template_kwargs",
    "ChatMessage": "role content reasoning tool_calls tool_call_id",
    "ContentPart": "text image",
    "LoadModelRequest": "model adapter draft_model pinned keep_alive disallow_eviction "
    "validate_only",
    "GetModelRequest": "model adapter",
    "UnloadModelRequest": "model adapter force",
    "TokenizeRequest": "model prompt include_pieces",
    "CountTokensRequest": "model prompt",
    "EmbedRequest": "model inputs pooling normalize keep_alive",
}


@pytest.mark.parametrize("message", HONOURED)
def test_every_other_field_is_refused(message: str) -> None:
    """A field that the contract gains is either honoured or in the table of refusals above."""
    refused = {field.rpartition(".")[2] for field, _ in NOT_IMPLEMENTED}
    names = {field.name for field in getattr(pb, message).DESCRIPTOR.fields}
    assert names - set(HONOURED[message].split()) <= refused
