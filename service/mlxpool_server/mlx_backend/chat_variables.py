"""A chat as templates know it: dictionaries of OpenAI's and transformers' shape."""

from __future__ import annotations

import json
from typing import Any

from mlxpool_server.domain import ChatMessage, ChatPrompt, Role, Tool
from mlxpool_server.errors import InvalidFieldError

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def conversation(chat: ChatPrompt, template: object) -> list[dict[str, Any]]:
    """`template` decides what the role developer is called."""
    names = {call.id: call.name for message in chat.messages for call in message.tool_calls}
    return [_message(message, template, names) for message in chat.messages]


def tools(chat: ChatPrompt) -> list[dict[str, Any]] | None:
    """None without any: templates ask whether there are tools.

    Raises: InvalidFieldError for parameters that are no JSON object.
    """
    described = [_tool(tool, index) for index, tool in enumerate(chat.tools)]
    return described or None


def reasoning_switches(chat: ChatPrompt) -> dict[str, bool]:
    """Under the names that templates have for it; none leaves the template its default."""
    if chat.enable_reasoning is None:
        return {}
    return {"enable_thinking": chat.enable_reasoning, "thinking": chat.enable_reasoning}


def with_text_arguments(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls' arguments as JSON text instead of objects."""
    return [
        message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in conversation
    ]


def _message(message: ChatMessage, template: object, names: dict[str, str]) -> dict[str, Any]:
    described: dict[str, Any] = {"role": _role(message.role, template), "content": message.text}
    if message.reasoning:
        # transformers tells the template under the other names, too.
        described["reasoning_content"] = message.reasoning
    if message.tool_calls:
        described["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments_json)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        described["tool_call_id"] = message.tool_call_id
        if name := names.get(message.tool_call_id):
            described["name"] = name
    return described


def _role(role: Role, template: object) -> str:
    # Templates older than the role know it as system.
    if role is Role.DEVELOPER and isinstance(template, str) and "developer" not in template:
        return Role.SYSTEM.value
    return role.value


def _arguments(text: str) -> object:
    """An object where it is one: templates go through its items."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _tool(tool: Tool, index: int) -> dict[str, Any]:
    try:
        parameters = json.loads(tool.parameters_json) if tool.parameters_json else _NO_PARAMETERS
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        field = f"prompt.chat.tools[{index}].parameters_json"
        raise InvalidFieldError(field, "is no JSON object")
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": parameters,
        },
    }


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}
