"""Domain values to responses."""

from __future__ import annotations

import math
from typing import assert_never

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server import domain
from mlxpool_server.rpc.convert.requests import STATES

# The end of the year 9999, where Timestamp ends: JSON printers fail on anything later.
LAST_TIMESTAMP_S = 253_402_300_799

STATE_TO_WIRE = {state: value for value, state in STATES.items()}
CAPABILITY_TO_WIRE = {
    domain.Capability.CHAT: pb.MODEL_CAPABILITY_CHAT,
    domain.Capability.CONSTRAINTS: pb.MODEL_CAPABILITY_CONSTRAINTS,
    domain.Capability.TOOLS: pb.MODEL_CAPABILITY_TOOLS,
    domain.Capability.REASONING: pb.MODEL_CAPABILITY_REASONING,
    domain.Capability.EMBEDDINGS: pb.MODEL_CAPABILITY_EMBEDDINGS,
}
LOAD_PHASE_TO_WIRE = {
    domain.LoadPhase.QUEUED: pb.LOAD_PHASE_QUEUED,
    domain.LoadPhase.DOWNLOADING: pb.LOAD_PHASE_DOWNLOADING,
    domain.LoadPhase.EVICTING: pb.LOAD_PHASE_EVICTING,
    domain.LoadPhase.LOADING: pb.LOAD_PHASE_LOADING,
    domain.LoadPhase.WARMING_UP: pb.LOAD_PHASE_WARMING_UP,
}
PHASE_TO_WIRE = {
    domain.GenerationPhase.QUEUED: pb.GENERATION_PHASE_QUEUED,
    domain.GenerationPhase.LOADING: pb.GENERATION_PHASE_LOADING,
    domain.GenerationPhase.PREFILLING: pb.GENERATION_PHASE_PREFILLING,
    domain.GenerationPhase.DECODING: pb.GENERATION_PHASE_DECODING,
}
REASON_TO_WIRE = {
    domain.FinishReason.STOP: pb.FINISH_REASON_STOP,
    domain.FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    domain.FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    domain.FinishReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
    domain.FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
    domain.FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
    domain.FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


def model(status: domain.ModelStatus) -> pb.Model:
    message = pb.Model(
        name=status.name,
        adapter=status.adapter,
        available_adapters=status.available_adapters,
        state=STATE_TO_WIRE[status.state],
        error_message=status.error_message,
        resident_bytes=status.resident_bytes,
        active_requests=status.active_requests,
        queued_requests=status.queued_requests,
        pinned=status.pinned,
        aliases=status.aliases,
        activity=_activity(status.activity),
    )
    if status.info is not None:
        message.revision = status.info.revision
        message.architecture = status.info.architecture
        message.quantization = status.info.quantization
        message.context_length = status.info.context_length
        message.vocab_size = status.info.vocab_size
        message.estimated_bytes = status.info.estimated_bytes
        message.capabilities.extend(
            sorted(CAPABILITY_TO_WIRE[each] for each in status.info.capabilities)
        )
    for name in ("load_time", "last_used_time", "expire_time"):
        time = getattr(status, name)
        if time is not None:
            getattr(message, name).CopyFrom(timestamp(time))
    return message


def _activity(activity: domain.ModelActivity) -> pb.ModelActivity:
    return pb.ModelActivity(
        finished_generations=activity.finished_generations,
        prompt_tokens=activity.prompt_tokens,
        cached_prompt_tokens=activity.cached_prompt_tokens,
        completion_tokens=activity.completion_tokens,
        first_tokens=activity.first_tokens,
        time_to_first_token=duration(activity.time_to_first_token_s),
        loads=activity.loads,
        failed_loads=activity.failed_loads,
        evictions=activity.evictions,
    )


def load_event(event: domain.LoadProgress | domain.LoadFinished) -> pb.LoadModelResponse:
    match event:
        case domain.LoadProgress():
            return pb.LoadModelResponse(progress=_load_progress(event))
        case domain.LoadFinished():
            return pb.LoadModelResponse(
                finished=pb.LoadFinished(
                    model=model(event.model),
                    already_loaded=event.already_loaded,
                    evicted_models=event.evicted_models,
                    duration=duration(event.duration_s),
                )
            )


def generation_event(event: domain.GenerationEvent) -> pb.GenerateResponse:
    match event:
        case domain.GenerationStarted():
            started = pb.GenerationStarted(
                generation_id=event.generation_id,
                model=event.model,
                revision=event.revision,
                adapter=event.adapter,
                seed=event.seed,
            )
            return pb.GenerateResponse(started=started)
        case domain.GenerationProgress():
            return pb.GenerateResponse(progress=_generation_progress(event))
        case domain.GenerationDelta():
            return pb.GenerateResponse(delta=_delta(event))
        case domain.GenerationFinished():
            return pb.GenerateResponse(finished=_generation_finished(event))
        case _:
            assert_never(event)


def tokenization(result: domain.Tokenization) -> pb.TokenizeResponse:
    return pb.TokenizeResponse(
        token_ids=result.token_ids, pieces=result.pieces, rendered_prompt=result.rendered_prompt
    )


def memory_limits(limits: domain.MemoryLimits) -> memory_pb.MemoryLimits:
    return memory_pb.MemoryLimits(
        pool_bytes=limits.pool_bytes,
        memory_bytes=limits.memory_bytes,
        cache_bytes=limits.cache_bytes,
        wired_bytes=limits.wired_bytes,
    )


def memory_usage(usage: domain.MemoryUsage) -> memory_pb.MemoryUsage:
    return memory_pb.MemoryUsage(
        sample_time=timestamp(usage.sample_time),
        active_bytes=usage.active_bytes,
        peak_bytes=usage.peak_bytes,
        cache_bytes=usage.cache_bytes,
        limits=memory_limits(usage.limits),
        device_bytes=usage.device_bytes,
        recommended_bytes=usage.recommended_bytes,
        models=[
            memory_pb.ModelMemory(
                model=each.model,
                adapter=each.adapter,
                resident_bytes=each.resident_bytes,
                prompt_cache_bytes=each.prompt_cache_bytes,
                active_kv_bytes=each.active_kv_bytes,
            )
            for each in usage.models
        ],
    )


def limits_change(change: domain.LimitsChange) -> memory_pb.SetMemoryLimitsResponse:
    return memory_pb.SetMemoryLimitsResponse(
        previous=memory_limits(change.previous),
        current=memory_limits(change.current),
        evicted_models=change.evicted_models,
    )


def server_info(
    device: domain.DeviceInfo, server_version: str, start_time: float
) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        version=server_version,
        mlx_version=device.mlx_version,
        mlx_lm_version=device.mlx_lm_version,
        device_name=device.name,
        device_architecture=device.architecture,
        start_time=timestamp(start_time),
    )


def duration(value_s: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(max(0, round(value_s * 1e9)))
    return message


def timestamp(posix_time: float) -> Timestamp:
    message = Timestamp()
    whole = math.floor(posix_time)
    message.nanos = min(999_999_999, int((posix_time - whole) * 1e9))
    message.seconds = min(whole, LAST_TIMESTAMP_S)
    return message


def _load_progress(progress: domain.LoadProgress) -> pb.LoadProgress:
    return pb.LoadProgress(
        phase=LOAD_PHASE_TO_WIRE[progress.phase],
        completed_bytes=progress.completed_bytes,
        total_bytes=progress.total_bytes,
    )


def _generation_progress(progress: domain.GenerationProgress) -> pb.GenerationProgress:
    return pb.GenerationProgress(
        phase=PHASE_TO_WIRE[progress.phase],
        queue_position=progress.queue_position,
        load=None if progress.load is None else _load_progress(progress.load),
        prefilled_tokens=progress.prefilled_tokens,
        prompt_tokens=progress.prompt_tokens,
    )


def _delta(event: domain.GenerationDelta) -> pb.GenerationDelta:
    delta = pb.GenerationDelta(completion_tokens=event.completion_tokens, token_ids=event.token_ids)
    delta.logprobs.extend(
        pb.TokenLogprob(chosen=_candidate(each.chosen), top=map(_candidate, each.top))
        for each in event.logprobs
    )
    # No channel at all when only ids or log-probabilities came.
    if event.text:
        delta.text = event.text
    elif event.reasoning:
        delta.reasoning = event.reasoning
    elif event.tool_call is not None:
        call = event.tool_call.call
        delta.tool_call.index = event.tool_call.index
        delta.tool_call.id = call.id
        delta.tool_call.name = call.name
        delta.tool_call.arguments_json = call.arguments_json
    return delta


def _candidate(candidate: domain.TokenCandidate) -> pb.TokenCandidate:
    return pb.TokenCandidate(
        token_id=candidate.token_id,
        text=candidate.raw_bytes.decode("utf-8", "replace"),
        raw_bytes=candidate.raw_bytes,
        logprob=candidate.logprob,
    )


def _generation_finished(event: domain.GenerationFinished) -> pb.GenerationFinished:
    usage, timings = event.usage, event.timings
    first = timings.time_to_first_token_s
    return pb.GenerationFinished(
        finish_reason=REASON_TO_WIRE[event.finish_reason],
        message=pb.ChatMessage(
            role=pb.ROLE_ASSISTANT,
            content=[pb.ContentPart(text=event.text)] if event.text else [],
            reasoning=event.reasoning,
            tool_calls=[
                pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
                for call in event.tool_calls
            ],
        ),
        stop_sequence=event.stop_sequence,
        stop_token_id=event.stop_token_id,
        usage=pb.TokenUsage(
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            completion_tokens=usage.completion_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            accepted_draft_tokens=usage.accepted_draft_tokens,
        ),
        timings=pb.GenerationTimings(
            queue=duration(timings.queue_s),
            load=duration(timings.load_s),
            prefill=duration(timings.prefill_s),
            decode=duration(timings.decode_s),
            time_to_first_token=None if first is None else duration(first),
            total=duration(timings.total_s),
        ),
        token_ids=event.token_ids,
    )
