"""From the wire's responses to typed values; shared by both clients, no I/O.

An event whose oneof is unset comes from a newer server: it becomes None, and the streams skip it.
"""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING

from mlxpool_client import enums, events, memory, messages, models
from mlxpool_client.durations import to_seconds

if TYPE_CHECKING:
    from datetime import datetime

    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    from mlxpool.v1 import memory_service_pb2 as memory_pb
    from mlxpool.v1 import model_service_pb2 as model_pb

# ---------------------------------------------------------------- models


def model(wire: model_pb.Model) -> models.Model:
    return models.Model(
        name=wire.name,
        state=enums.ModelState(wire.state),
        revision=wire.revision,
        adapter=wire.adapter,
        error_message=wire.error_message,
        capabilities=tuple(enums.Capability(number) for number in wire.capabilities),
        architecture=wire.architecture,
        quantization=wire.quantization,
        context_length=wire.context_length,
        vocab_size=wire.vocab_size,
        estimated_bytes=wire.estimated_bytes,
        resident_bytes=wire.resident_bytes,
        active_requests=wire.active_requests,
        queued_requests=wire.queued_requests,
        pinned=wire.pinned,
        load_time=_time(wire, "load_time"),
        last_used_time=_time(wire, "last_used_time"),
        expire_time=_time(wire, "expire_time"),
        aliases=tuple(wire.aliases),
        available_adapters=tuple(wire.available_adapters),
        activity=_activity(wire.activity),
    )


def _activity(wire: model_pb.ModelActivity) -> models.ModelActivity:
    return models.ModelActivity(
        finished_generations=wire.finished_generations,
        prompt_tokens=wire.prompt_tokens,
        cached_prompt_tokens=wire.cached_prompt_tokens,
        completion_tokens=wire.completion_tokens,
        first_tokens=wire.first_tokens,
        time_to_first_token_s=to_seconds(wire.time_to_first_token),
        loads=wire.loads,
        failed_loads=wire.failed_loads,
        evictions=wire.evictions,
    )


def load_event(wire: model_pb.LoadModelResponse) -> models.LoadEvent | None:
    match wire.WhichOneof("event"):
        case "progress":
            return load_progress(wire.progress)
        case "finished":
            return models.LoadFinished(
                model=model(wire.finished.model),
                already_loaded=wire.finished.already_loaded,
                evicted_models=tuple(wire.finished.evicted_models),
                duration_s=to_seconds(wire.finished.duration),
            )
        case _:
            return None


def load_progress(wire: model_pb.LoadProgress) -> models.LoadProgress:
    return models.LoadProgress(
        phase=enums.LoadPhase(wire.phase),
        completed_bytes=wire.completed_bytes,
        total_bytes=wire.total_bytes,
    )


def unloaded(wire: model_pb.UnloadModelResponse) -> models.Unloaded:
    return models.Unloaded(was_loaded=wire.was_loaded, freed_bytes=wire.freed_bytes)


def tokenization(wire: model_pb.TokenizeResponse) -> models.Tokenization:
    return models.Tokenization(
        token_ids=tuple(wire.token_ids),
        pieces=tuple(wire.pieces),
        rendered_prompt=wire.rendered_prompt,
    )


def server_info(wire: model_pb.GetServerInfoResponse) -> models.ServerInfo:
    return models.ServerInfo(
        version=wire.version,
        mlx_version=wire.mlx_version,
        mlx_lm_version=wire.mlx_lm_version,
        device_name=wire.device_name,
        device_architecture=wire.device_architecture,
        start_time=_time(wire, "start_time"),
    )


# ---------------------------------------------------------------- generation


def generation_event(wire: model_pb.GenerateResponse) -> events.GenerationEvent | None:
    match wire.WhichOneof("event"):
        case "started":
            return _started(wire.started)
        case "progress":
            return _progress(wire.progress)
        case "delta":
            return _delta(wire.delta)
        case "finished":
            return _finished(wire.finished)
        case _:
            return None


def _started(wire: model_pb.GenerationStarted) -> events.Started:
    return events.Started(
        generation_id=wire.generation_id,
        model=wire.model,
        revision=wire.revision,
        adapter=wire.adapter,
        seed=wire.seed,
    )


def _progress(wire: model_pb.GenerationProgress) -> events.Progress:
    return events.Progress(
        phase=enums.GenerationPhase(wire.phase),
        queue_position=wire.queue_position,
        load=load_progress(wire.load) if wire.HasField("load") else None,
        prefilled_tokens=wire.prefilled_tokens,
        prompt_tokens=wire.prompt_tokens,
    )


def _delta(wire: model_pb.GenerationDelta) -> events.Delta:
    call = wire.tool_call if wire.HasField("tool_call") else None
    return events.Delta(
        text=wire.text,
        reasoning=wire.reasoning,
        tool_call=None
        if call is None
        else events.ToolCallDelta(call.index, call.id, call.name, call.arguments_json),
        completion_tokens=wire.completion_tokens,
        token_ids=tuple(wire.token_ids),
        logprobs=tuple(
            events.TokenLogprob(
                chosen=_candidate(logprob.chosen),
                top=tuple(_candidate(candidate) for candidate in logprob.top),
            )
            for logprob in wire.logprobs
        ),
    )


def _candidate(wire: model_pb.TokenCandidate) -> events.TokenCandidate:
    return events.TokenCandidate(
        token_id=wire.token_id, text=wire.text, raw_bytes=wire.raw_bytes, logprob=wire.logprob
    )


def _finished(wire: model_pb.GenerationFinished) -> events.Finished:
    return events.Finished(
        finish_reason=enums.FinishReason(wire.finish_reason),
        message=_chat_message(wire.message),
        stop_sequence=wire.stop_sequence,
        stop_token_id=wire.stop_token_id if wire.HasField("stop_token_id") else None,
        usage=events.TokenUsage(
            prompt_tokens=wire.usage.prompt_tokens,
            cached_prompt_tokens=wire.usage.cached_prompt_tokens,
            completion_tokens=wire.usage.completion_tokens,
            reasoning_tokens=wire.usage.reasoning_tokens,
            accepted_draft_tokens=wire.usage.accepted_draft_tokens,
        ),
        timings=_timings(wire.timings),
        token_ids=tuple(wire.token_ids),
    )


def _timings(wire: model_pb.GenerationTimings) -> events.Timings:
    has_first_token = wire.HasField("time_to_first_token")
    return events.Timings(
        queue_s=to_seconds(wire.queue),
        load_s=to_seconds(wire.load),
        prefill_s=to_seconds(wire.prefill),
        decode_s=to_seconds(wire.decode),
        time_to_first_token_s=to_seconds(wire.time_to_first_token) if has_first_token else None,
        total_s=to_seconds(wire.total),
    )


def _chat_message(wire: model_pb.ChatMessage) -> messages.ChatMessage:
    return messages.ChatMessage(
        role=enums.Role(wire.role),
        content="".join(part.text for part in wire.content),
        reasoning=wire.reasoning,
        tool_calls=tuple(
            messages.ToolCall(call.id, call.name, call.arguments_json) for call in wire.tool_calls
        ),
        tool_call_id=wire.tool_call_id,
    )


# ---------------------------------------------------------------- memory


def memory_usage(wire: memory_pb.MemoryUsage) -> memory.MemoryUsage:
    return memory.MemoryUsage(
        sample_time=_time(wire, "sample_time"),
        active_bytes=wire.active_bytes,
        peak_bytes=wire.peak_bytes,
        cache_bytes=wire.cache_bytes,
        limits=_limits(wire.limits),
        device_bytes=wire.device_bytes,
        recommended_bytes=wire.recommended_bytes,
        models=tuple(
            memory.ModelMemory(
                model=part.model,
                adapter=part.adapter,
                resident_bytes=part.resident_bytes,
                prompt_cache_bytes=part.prompt_cache_bytes,
                active_kv_bytes=part.active_kv_bytes,
            )
            for part in wire.models
        ),
    )


def memory_sample(wire: memory_pb.WatchMemoryUsageResponse) -> memory.MemoryUsage | None:
    return memory_usage(wire.usage) if wire.HasField("usage") else None


def limits_change(wire: memory_pb.SetMemoryLimitsResponse) -> memory.LimitsChange:
    return memory.LimitsChange(
        previous=_limits(wire.previous),
        current=_limits(wire.current),
        evicted_models=tuple(wire.evicted_models),
    )


def _limits(wire: memory_pb.MemoryLimits) -> memory.MemoryLimits:
    return memory.MemoryLimits(
        pool_bytes=wire.pool_bytes if wire.HasField("pool_bytes") else None,
        memory_bytes=wire.memory_bytes if wire.HasField("memory_bytes") else None,
        cache_bytes=wire.cache_bytes if wire.HasField("cache_bytes") else None,
        wired_bytes=wire.wired_bytes if wire.HasField("wired_bytes") else None,
    )


def _time(wire: Message, field: str) -> datetime | None:
    if not wire.HasField(field):
        return None
    timestamp: Timestamp = getattr(wire, field)
    return timestamp.ToDatetime(tzinfo=UTC)
