"""What a request wants of a model that not every model can."""

from __future__ import annotations

from mlxpool_server.domain import ChatPrompt, GenerationRequest, ModelInfo
from mlxpool_server.errors import CapabilityMissingError, InvalidFieldError
from mlxpool_server.pool.backend import Tokenizer


def check_generates(model: str, info: ModelInfo) -> None:
    """Raises: CapabilityMissingError."""
    if not info.can_generate:
        raise CapabilityMissingError(model, "text generation", "it only embeds: call Embed")


def check_chat(model: str, tokenizer: Tokenizer, chat: ChatPrompt) -> None:
    """Raises: CapabilityMissingError."""
    if any(message.has_images for message in chat.messages):
        # mlx-lm runs language models: where one can see, that part of it is left out.
        raise CapabilityMissingError(model, "image input", "send text parts only")
    if not tokenizer.has_chat_template:
        raise CapabilityMissingError(model, "chat template", "send prompt.text instead")
    if chat.tools and not tokenizer.has_tools:
        raise CapabilityMissingError(model, "tool calls", "send no prompt.chat.tools")
    if chat.must_call and not tokenizer.can_force_calls:
        raise CapabilityMissingError(
            model, "tool calls that can be forced", "leave prompt.chat.tool_choice to the model"
        )
    if chat.enable_reasoning and not tokenizer.has_reasoning:
        raise CapabilityMissingError(model, "reasoning", "leave enable_reasoning unset")


def check_reasoning_limit(model: str, tokenizer: Tokenizer, request: GenerationRequest) -> None:
    """Raises: InvalidFieldError, CapabilityMissingError."""
    if request.stop.max_reasoning_tokens is None:
        return
    if not isinstance(request.prompt, ChatPrompt):
        raise InvalidFieldError("stop.max_reasoning_tokens", "goes with prompt.chat only")
    if not tokenizer.has_reasoning:
        raise CapabilityMissingError(model, "reasoning", "leave max_reasoning_tokens unset")
