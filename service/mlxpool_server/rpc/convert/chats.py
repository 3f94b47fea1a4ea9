"""Chat prompts: messages, tools, and what a template is told besides."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import ChatMessage, ChatPrompt, Role, Tool, ToolCall
from mlxpool_server.errors import InvalidFieldError
from mlxpool_server.rpc.convert.reading import check_count, choice

ROLES: dict[int, Role] = {
    pb.ROLE_SYSTEM: Role.SYSTEM,
    pb.ROLE_USER: Role.USER,
    pb.ROLE_ASSISTANT: Role.ASSISTANT,
    pb.ROLE_TOOL: Role.TOOL,
    pb.ROLE_DEVELOPER: Role.DEVELOPER,
}
# A template takes far fewer; a million would keep the event loop busy for seconds.
MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 4096
MAX_TOOLS = 1024
MAX_NAME_CHARS = 256
MAX_VARIABLES_BYTES = 64 * 1024
# What the server itself tells templates, and where the renderer takes its own arguments.
RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt", "bos_token", "chat_template", "continue_final_message",
        "conversation", "conversations", "documents", "eos_token", "messages", "pad_token",
        "return_assistant_tokens_mask", "return_dict", "tokenize", "tools", "unk_token",
    }
)  # fmt: skip
# Doubles hold every integer up to here.
_MAX_WHOLE = 2**53

_PATH = "prompt.chat."
# Whether the model may call tools.
_TOOL_MODES = {
    pb.TOOL_MODE_UNSPECIFIED: True,
    pb.TOOL_MODE_AUTO: True,
    pb.TOOL_MODE_NONE: False,
    pb.TOOL_MODE_REQUIRED: True,
}


def chat_prompt(chat: pb.ChatPrompt) -> ChatPrompt:
    """Raises: InvalidFieldError."""
    check_count(chat.messages, MAX_MESSAGES, f"{_PATH}messages")
    if sum(len(message.content) for message in chat.messages) > MAX_CONTENT_PARTS:
        raise InvalidFieldError(
            f"{_PATH}messages", f"have more than {MAX_CONTENT_PARTS} content parts together"
        )
    if not chat.messages:
        raise InvalidFieldError(f"{_PATH}messages", "is empty")
    messages = tuple(
        _message(message, f"{_PATH}messages[{index}].")
        for index, message in enumerate(chat.messages)
    )
    if chat.continue_final_message:
        _check_continuable(messages[-1])
    must_call, called_tool = _must_call(chat)
    return ChatPrompt(
        messages=messages,
        tools=_tools(chat),
        must_call=must_call,
        called_tool=called_tool,
        enable_reasoning=chat.enable_reasoning if chat.HasField("enable_reasoning") else None,
        continue_final_message=chat.continue_final_message,
        variables=_variables(chat),
    )


def _message(message: pb.ChatMessage, prefix: str) -> ChatMessage:
    for index, part in enumerate(message.content):
        if part.WhichOneof("part") is None:
            # A newer client's kind of part looks so: dropping it would change the prompt.
            raise InvalidFieldError(f"{prefix}content[{index}]", "has neither text nor image")
    role = choice(message.role, ROLES, f"{prefix}role")
    if role is not Role.ASSISTANT:
        for name in ("reasoning", "tool_calls"):
            if getattr(message, name):
                raise InvalidFieldError(f"{prefix}{name}", "goes with ROLE_ASSISTANT only")
    if role is not Role.TOOL and message.tool_call_id:
        raise InvalidFieldError(f"{prefix}tool_call_id", "goes with ROLE_TOOL only")
    check_count(message.tool_calls, MAX_TOOLS, f"{prefix}tool_calls")
    return ChatMessage(
        role=role,
        text="".join(part.text for part in message.content),
        has_images=any(part.HasField("image") for part in message.content),
        reasoning=message.reasoning,
        tool_calls=tuple(
            ToolCall(call.id, _name(call.name, f"{prefix}tool_calls[{index}].name"),
                     call.arguments_json)
            for index, call in enumerate(message.tool_calls)
        ),
        tool_call_id=message.tool_call_id,
    )  # fmt: skip


def _check_continuable(last: ChatMessage) -> None:
    if last.role is not Role.ASSISTANT or not last.text or last.tool_calls:
        raise InvalidFieldError(
            f"{_PATH}continue_final_message",
            "needs a last message with ROLE_ASSISTANT and text, without tool calls",
        )


def _tools(chat: pb.ChatPrompt) -> tuple[Tool, ...]:
    """Those the model may call: none with TOOL_MODE_NONE."""
    check_count(chat.tools, MAX_TOOLS, f"{_PATH}tools")
    tools = tuple(
        Tool(
            _name(tool.name, f"{_PATH}tools[{index}].name"),
            tool.description,
            tool.parameters_json,
        )
        for index, tool in enumerate(chat.tools)
    )
    may_call = choice(chat.tool_choice.mode, _TOOL_MODES, f"{_PATH}tool_choice.mode")
    return tools if may_call else ()


def _must_call(chat: pb.ChatPrompt) -> tuple[bool, str]:
    """Whether the model has to call a tool, and which; empty: any."""
    tool_choice = chat.tool_choice
    if tool_choice.WhichOneof("choice") == "tool_name":
        if all(tool.name != tool_choice.tool_name for tool in chat.tools):
            raise InvalidFieldError(
                f"{_PATH}tool_choice.tool_name", "is the name of none of prompt.chat.tools"
            )
        return True, tool_choice.tool_name
    if tool_choice.mode != pb.TOOL_MODE_REQUIRED:
        return False, ""
    if not chat.tools:
        raise InvalidFieldError(f"{_PATH}tool_choice.mode", "needs prompt.chat.tools to call")
    return True, ""


def _name(name: str, path: str) -> str:
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise InvalidFieldError(path, f"has to have 1 to {MAX_NAME_CHARS} characters")
    return name


def _variables(chat: pb.ChatPrompt) -> dict[str, object]:
    path = f"{_PATH}template_kwargs"
    if chat.template_kwargs.ByteSize() > MAX_VARIABLES_BYTES:
        raise InvalidFieldError(path, f"has more than {MAX_VARIABLES_BYTES} bytes")
    if reserved := RESERVED_VARIABLES.intersection(chat.template_kwargs.fields):
        raise InvalidFieldError(path, f"may not set {min(reserved)}, which the server sets")
    try:
        found = MessageToDict(chat.template_kwargs)
    except ValueError as error:
        # NaN and infinity have no JSON.
        raise InvalidFieldError(path, str(error)) from error
    return {name: _whole(value) for name, value in found.items()}


def _whole(value: Any) -> Any:
    """Struct's numbers are doubles: `1.0` in a prompt is rarely what was meant."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_WHOLE:
        return int(value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    return value
