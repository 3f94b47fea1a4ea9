"""Chat messages: what a chat prompt consists of, and what a generation ends with."""

from __future__ import annotations

from dataclasses import dataclass

from mlxpool_client.enums import Role


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters_json` is JSON Schema text."""

    name: str
    description: str = ""
    parameters_json: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments_json` is as the model wrote it: it may be invalid JSON."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; append `Finished.message` to the list for the next turn."""

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    # With Role.TOOL: the call answered.
    tool_call_id: str = ""
