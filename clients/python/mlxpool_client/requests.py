"""From arguments to the wire's requests; shared by both clients, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypedDict, Unpack

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as model_pb
from mlxpool_client.constraints import constraint_message
from mlxpool_client.durations import optional_duration
from mlxpool_client.enums import CacheKind, ModelState, Priority, Role, ToolMode
from mlxpool_client.memory import MemoryLimits
from mlxpool_client.messages import ChatMessage, Tool

# A message as {"role": "user", "content": "hi"} or typed.
Message = ChatMessage | Mapping[str, object]

_MESSAGE_KEYS = frozenset({"role", "content", "reasoning", "tool_call_id"})


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of generate(); None or absent = the model's or server's default.

    Exactly one of the prompt argument, `messages` and `token_ids` is the input.
    """

    # A chat: dicts {"role": "user", "content": "hi"} or ChatMessage objects.
    messages: Sequence[Message] | None
    # An input that is tokenised already.
    token_ids: Sequence[int] | None
    # With messages: extend the last (assistant) message instead of opening a new one.
    continue_final_message: bool
    # With messages: None = the template's default.
    enable_reasoning: bool | None
    # With messages: the functions that the model may call.
    tools: Sequence[Tool] | None
    # With tools: None = the model decides; a str = it has to call the tool of that name.
    tool_choice: ToolMode | str | None
    # With messages: what the chat template gets besides.
    template_kwargs: Mapping[str, Any] | None
    adapter: str

    # 0 = greedy.
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    # How many of the last tokens the penalties look at.
    penalty_context_size: int | None
    xtc_probability: float | None
    xtc_threshold: float | None
    # Token id to what is added to its logit.
    logit_bias: Mapping[int, float] | None
    seed: int | None

    max_tokens: int | None
    max_reasoning_tokens: int | None
    # Stop sequences, cut from the output.
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    # Seconds; ends with FinishReason.TIME_LIMIT and keeps the partial result.
    max_duration_s: float | None

    # What the output has to be, one of these; a schema as JSON text or as a mapping.
    json_object: bool
    json_schema: str | Mapping[str, object] | None
    regex: str | None
    lark: str | None
    gbnf: str | None
    choices: Sequence[str] | None

    # No deltas: Started, Progress, Finished.
    final_only: bool
    include_token_ids: bool
    # Return log-probabilities, with this many alternatives for each token.
    top_logprobs: int | None

    # Unique among the generations in flight; for cancel_generation(). Empty: the server makes one.
    generation_id: str
    priority: Priority | None
    # Seconds of idle time until the model is unloaded; 0 = when idle, math.inf = never.
    keep_alive_s: float | None
    # Fail with ModelNotLoadedError instead of loading on demand.
    require_loaded: bool
    disable_prompt_cache: bool


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of load_model()."""

    adapter: str
    # For speculative decoding.
    draft_model: str
    # True exempts the model from eviction and expiry. None leaves it as it is.
    pinned: bool | None
    # Seconds of idle time until it is unloaded; 0 = when idle, math.inf = never, None = the
    # server's default.
    keep_alive_s: float | None
    # Fail with PoolMemoryLimitError rather than evict other models.
    disallow_eviction: bool
    # Say what a load would do, and change nothing.
    validate_only: bool


def generate_request(
    model: str, prompt: str | None, **options: Unpack[GenerateOptions]
) -> model_pb.GenerateRequest:
    """Raises: TypeError for an unknown option or not exactly one input, ValueError for a value
    the wire cannot carry.
    """
    refuse_unknown("generate()", options.keys() - GenerateOptions.__optional_keys__)
    return model_pb.GenerateRequest(
        model=model,
        adapter=options.get("adapter", ""),
        prompt=prompt_message(
            prompt,
            options.get("messages"),
            options.get("token_ids"),
            continue_final_message=options.get("continue_final_message", False),
            enable_reasoning=options.get("enable_reasoning"),
            tools=options.get("tools") or (),
            tool_choice=options.get("tool_choice"),
            template_kwargs=options.get("template_kwargs") or {},
        ),
        sampling=_sampling(options),
        stop=_stop(options),
        constraint=constraint_message(options),
        output=model_pb.OutputOptions(
            final_only=options.get("final_only", False),
            include_token_ids=options.get("include_token_ids", False),
            top_logprobs=options.get("top_logprobs"),
        ),
        generation_id=options.get("generation_id", ""),
        priority=model_pb.Priority.ValueType((options.get("priority") or Priority.UNKNOWN).value),
        keep_alive=optional_duration(options.get("keep_alive_s"), "keep_alive_s"),
        require_loaded=options.get("require_loaded", False),
        disable_prompt_cache=options.get("disable_prompt_cache", False),
    )


def prompt_message(
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    *,
    continue_final_message: bool = False,
    enable_reasoning: bool | None = None,
    tools: Sequence[Tool] = (),
    tool_choice: ToolMode | str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> model_pb.Prompt:
    """Raises: TypeError unless exactly one of prompt, messages and token_ids is given."""
    given = [value for value in (prompt, messages, token_ids) if value is not None]
    if len(given) != 1:
        raise TypeError("give exactly one of prompt, messages and token_ids")
    if messages is not None:
        chat = model_pb.ChatPrompt(
            messages=[_chat_message(message) for message in messages],
            continue_final_message=continue_final_message,
            enable_reasoning=enable_reasoning,
            tools=[
                model_pb.Tool(
                    name=tool.name,
                    description=tool.description,
                    parameters_json=tool.parameters_json,
                )
                for tool in tools
            ],
            tool_choice=_tool_choice(tool_choice),
        )
        if template_kwargs:
            chat.template_kwargs.update(dict(template_kwargs))
        return model_pb.Prompt(chat=chat)
    chat_only = (tools, tool_choice, template_kwargs, continue_final_message)
    if any(chat_only) or enable_reasoning is not None:
        raise TypeError(
            "tools, tool_choice, template_kwargs, continue_final_message and enable_reasoning "
            "go with messages only"
        )
    if prompt is not None:
        return model_pb.Prompt(text=prompt)
    return model_pb.Prompt(tokens=model_pb.TokenIds(ids=token_ids))


def _tool_choice(choice: ToolMode | str | None) -> model_pb.ToolChoice | None:
    if choice is None:
        return None
    if isinstance(choice, ToolMode):
        return model_pb.ToolChoice(mode=model_pb.ToolMode.ValueType(choice.value))
    return model_pb.ToolChoice(tool_name=choice)


def load_request(model: str, **options: Unpack[LoadOptions]) -> model_pb.LoadModelRequest:
    """Raises: TypeError for an unknown option, ValueError for a negative keep_alive_s."""
    refuse_unknown("load_model()", options.keys() - LoadOptions.__optional_keys__)
    return model_pb.LoadModelRequest(
        model=model,
        adapter=options.get("adapter", ""),
        draft_model=options.get("draft_model", ""),
        pinned=options.get("pinned"),
        keep_alive=optional_duration(options.get("keep_alive_s"), "keep_alive_s"),
        disallow_eviction=options.get("disallow_eviction", False),
        validate_only=options.get("validate_only", False),
    )


def list_request(states: Sequence[ModelState], page_token: str) -> model_pb.ListModelsRequest:
    return model_pb.ListModelsRequest(
        states=[model_pb.ModelState.ValueType(state.value) for state in states],
        page_token=page_token,
    )


def limits_request(limits: MemoryLimits) -> memory_pb.SetMemoryLimitsRequest:
    return memory_pb.SetMemoryLimitsRequest(
        limits=memory_pb.MemoryLimits(
            pool_bytes=limits.pool_bytes,
            memory_bytes=limits.memory_bytes,
            cache_bytes=limits.cache_bytes,
            wired_bytes=limits.wired_bytes,
        )
    )


def clear_cache_request(kinds: Sequence[CacheKind]) -> memory_pb.ClearCacheRequest:
    return memory_pb.ClearCacheRequest(
        kinds=[memory_pb.CacheKind.ValueType(kind.value) for kind in kinds]
    )


def refuse_unknown(method: str, unknown: AbstractSet[str]) -> None:
    # At run time a TypedDict checks nothing, and a mistyped option must not be ignored.
    if unknown:
        raise TypeError(f"{method} has no option {', '.join(sorted(unknown))}")


def _sampling(options: GenerateOptions) -> model_pb.SamplingParams:
    return model_pb.SamplingParams(
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        min_p=options.get("min_p"),
        repetition_penalty=options.get("repetition_penalty"),
        presence_penalty=options.get("presence_penalty"),
        frequency_penalty=options.get("frequency_penalty"),
        penalty_context_size=options.get("penalty_context_size"),
        xtc_probability=options.get("xtc_probability"),
        xtc_threshold=options.get("xtc_threshold"),
        logit_bias=options.get("logit_bias"),
        seed=options.get("seed"),
    )


def _stop(options: GenerateOptions) -> model_pb.StopConditions:
    sequences = options.get("stop") or ()
    return model_pb.StopConditions(
        max_tokens=options.get("max_tokens"),
        max_reasoning_tokens=options.get("max_reasoning_tokens"),
        # A str is a sequence of its characters, which nobody means.
        sequences=(sequences,) if isinstance(sequences, str) else sequences,
        token_ids=options.get("stop_token_ids") or (),
        ignore_eos=options.get("ignore_eos", False),
        max_duration=optional_duration(options.get("max_duration_s"), "max_duration_s"),
    )


def _chat_message(message: Message) -> model_pb.ChatMessage:
    if not isinstance(message, ChatMessage):
        message = _typed_message(message)
    return model_pb.ChatMessage(
        role=model_pb.Role.ValueType(message.role.value),
        content=[model_pb.ContentPart(text=message.content)] if message.content else [],
        reasoning=message.reasoning,
        tool_calls=[
            model_pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
    )


def _typed_message(message: Mapping[str, object]) -> ChatMessage:
    unknown = message.keys() - _MESSAGE_KEYS
    if unknown or "role" not in message or "content" not in message:
        raise ValueError(f"a message is {{'role': …, 'content': …}}, not one with {set(message)}")
    for key, value in message.items():
        if key != "role" and not isinstance(value, str):
            raise TypeError(f"a message's {key} must be a str, not {type(value).__name__}")
    return ChatMessage(
        role=_role(message["role"]),
        content=str(message["content"]),
        reasoning=str(message.get("reasoning", "")),
        tool_call_id=str(message.get("tool_call_id", "")),
    )


def _role(role: object) -> Role:
    if isinstance(role, Role):
        return role
    known = {member.name.lower(): member for member in Role if member is not Role.UNKNOWN}
    if role not in known:
        raise ValueError(f"a message's role is one of {', '.join(known)}, not {role!r}")
    return known[str(role)]
