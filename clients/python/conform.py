"""The Python client behind the conformance suite's protocol: tests/conformance/README.md."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from typing import Any

from google.protobuf import json_format

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_client import (
    ChatMessage,
    Client,
    Delta,
    EventStream,
    Finished,
    GenerateOptions,
    LoadFinished,
    LoadProgress,
    MlxpoolError,
    Priority,
    Progress,
    Role,
    Started,
    Tls,
    TokenCandidate,
    Tool,
    ToolCall,
    ToolMode,
)

Json = dict[str, Any]


def main() -> None:
    for line in sys.stdin:
        call = json.loads(line)
        try:
            for said in perform(call):
                write(said)
            write({"end": {"code": "OK"}})
        except MlxpoolError as error:
            write({"end": failure(error)})


def write(line: Json) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def failure(error: MlxpoolError) -> Json:
    return {
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "field_violations": [
            {"field": each.field, "description": each.description}
            for each in error.field_violations
        ],
        "retry_after_s": error.retry_after_s,
    }


def perform(call: Json) -> Iterator[Json]:
    """Yield what the call brings. Raises: MlxpoolError."""
    timeout_s = call.get("timeout_s")
    with Client(
        call["target"],
        tls=Tls(ca=call["tls_ca"]) if "tls_ca" in call else None,
        api_key=call.get("api_key"),
        wait_for_ready=call.get("wait_for_ready", False),
        timeout_s=timeout_s,
    ) as client:
        request = call["request"]
        if call["method"] == "Generate":
            generation = client.generate(*generate_arguments(request), **generate_options(request))
            yield from watch(generation, call.get("cancel_after_events"))
        elif call["method"] == "LoadModel":
            yield from watch(client.load_model(request["model"]), call.get("cancel_after_events"))
        else:
            yield {"response": unary(client, call["method"], request)}


def watch(stream: EventStream[Any], cancel_after: int | None) -> Iterator[Json]:
    with stream:
        for count, event in enumerate(stream, start=1):
            yield {"event": event_json(event)}
            if count == cancel_after:
                stream.close()


def unary(client: Client, method: str, request: Json) -> Json:
    match method:
        case "CountTokens":
            count = client.count_tokens(request["model"], request["prompt"]["text"])
            return {"tokenCount": count}
        case "Tokenize":
            found = client.tokenize(
                request["model"], request["prompt"]["text"], include_pieces=True
            )
            return {
                "tokenIds": list(found.token_ids),
                "pieces": [base64.b64encode(piece).decode() for piece in found.pieces],
                "renderedPrompt": found.rendered_prompt,
            }
        case "GetModel":
            return {"model": {"name": client.get_model(request["model"]).name}}
        case "CancelGeneration":
            client.cancel_generation(request["generationId"])
            return {}
    raise ValueError(method)


# ---------------------------------------------------------------- requests


def generate_arguments(request: Json) -> tuple[str, str | None]:
    return request.get("model", ""), request.get("prompt", {}).get("text")


def generate_options(request: Json) -> GenerateOptions:
    """The ProtoJSON of a GenerateRequest as arguments of generate()."""
    wire = json_format.ParseDict(request, pb.GenerateRequest())
    sampling, stop, output = wire.sampling, wire.stop, wire.output
    options: Json = {
        field.name: value
        for part in (sampling, stop, output)
        for field, value in part.ListFields()
        if field.name not in {"sequences", "token_ids", "max_duration", "logit_bias"}
    }
    options["logit_bias"] = dict(sampling.logit_bias) or None
    options["stop"] = list(stop.sequences)
    options["stop_token_ids"] = list(stop.token_ids)
    if stop.HasField("max_duration"):
        options["max_duration_s"] = seconds(stop.max_duration)
    if wire.HasField("keep_alive"):
        options["keep_alive_s"] = seconds(wire.keep_alive)
    options |= prompt_options(wire.prompt) | constraint_options(wire.constraint)
    options["priority"] = Priority(wire.priority)
    for name in ("adapter", "generation_id", "require_loaded", "disable_prompt_cache"):
        options[name] = getattr(wire, name)
    return GenerateOptions(**options)


def prompt_options(prompt: pb.Prompt) -> Json:
    match prompt.WhichOneof("input"):
        case "tokens":
            return {"token_ids": list(prompt.tokens.ids)}
        case "chat":
            chat = prompt.chat
            options: Json = {
                "messages": [typed_message(message) for message in chat.messages],
                "tools": [
                    Tool(tool.name, tool.description, tool.parameters_json) for tool in chat.tools
                ],
                "continue_final_message": chat.continue_final_message,
                "template_kwargs": json_format.MessageToDict(chat.template_kwargs),
            }
            if chat.HasField("enable_reasoning"):
                options["enable_reasoning"] = chat.enable_reasoning
            choice = chat.tool_choice.WhichOneof("choice")
            if choice == "mode":
                options["tool_choice"] = ToolMode(chat.tool_choice.mode)
            elif choice == "tool_name":
                options["tool_choice"] = chat.tool_choice.tool_name
            return options
        case _:
            return {}


def typed_message(wire: pb.ChatMessage) -> ChatMessage:
    return ChatMessage(
        Role(wire.role),
        "".join(part.text for part in wire.content),
        reasoning=wire.reasoning,
        tool_calls=tuple(
            ToolCall(call.id, call.name, call.arguments_json) for call in wire.tool_calls
        ),
        tool_call_id=wire.tool_call_id,
    )


def constraint_options(constraint: pb.OutputConstraint) -> Json:
    match constraint.WhichOneof("kind"):
        case "json_object":
            return {"json_object": True}
        case "choices":
            return {"choices": list(constraint.choices.values)}
        case "grammar":
            is_lark = constraint.grammar.syntax == pb.GRAMMAR_SYNTAX_LARK
            return {"lark" if is_lark else "gbnf": constraint.grammar.source}
        case None:
            return {}
        case kind:
            return {kind: getattr(constraint, kind)}


def seconds(duration: Any) -> float:
    return float(duration.ToNanoseconds() / 1e9)


# ---------------------------------------------------------------- events


def event_json(event: object) -> Json:
    """A typed event in the ProtoJSON of its response."""
    match event:
        case Started():
            return {"started": {**texts(event, "model", "revision", "adapter", "seed"),
                                "generationId": event.generation_id}}  # fmt: skip
        case Progress():
            return {"progress": {"phase": f"GENERATION_PHASE_{event.phase.name}"}}
        case Delta():
            return {"delta": delta_json(event)}
        case Finished():
            return {"finished": finished_json(event)}
        case LoadProgress():
            return {
                "progress": {
                    "phase": f"LOAD_PHASE_{event.phase.name}",
                    "completedBytes": str(event.completed_bytes),
                    "totalBytes": str(event.total_bytes),
                }
            }
        case LoadFinished():
            model = event.model
            return {
                "finished": {
                    "model": {"name": model.name, "residentBytes": str(model.resident_bytes)},
                    "alreadyLoaded": event.already_loaded,
                }
            }
    raise TypeError(event)


def texts(event: object, *names: str) -> Json:
    return {name: str(getattr(event, name)) for name in names}


def delta_json(delta: Delta) -> Json:
    call = delta.tool_call
    content: Json = {
        "text": delta.text,
        "reasoning": delta.reasoning,
        "toolCall": call and {
            "index": call.index,
            "id": call.id,
            "name": call.name,
            "argumentsJson": call.arguments_json,
        },
        "completionTokens": delta.completion_tokens,
        "tokenIds": list(delta.token_ids),
        "logprobs": [
            {
                "chosen": candidate_json(token.chosen),
                "top": [candidate_json(each) for each in token.top],
            }
            for token in delta.logprobs
        ],
    }  # fmt: skip
    return {name: value for name, value in content.items() if value}


def candidate_json(candidate: TokenCandidate) -> Json:
    return {
        "tokenId": candidate.token_id,
        "text": candidate.text,
        "rawBytes": base64.b64encode(candidate.raw_bytes).decode(),
        "logprob": candidate.logprob,
    }


def finished_json(event: Finished) -> Json:
    message, usage = event.message, event.usage
    content: Json = {
        "finishReason": f"FINISH_REASON_{event.finish_reason.name}",
        "message": {
            "role": f"ROLE_{message.role.name}",
            "content": [{"text": message.content}] if message.content else [],
            "reasoning": message.reasoning,
            "toolCalls": [
                {"id": call.id, "name": call.name, "argumentsJson": call.arguments_json}
                for call in message.tool_calls
            ],
        },
        "stopSequence": event.stop_sequence,
        "usage": {
            "promptTokens": usage.prompt_tokens,
            "completionTokens": usage.completion_tokens,
        },
        "tokenIds": list(event.token_ids),
    }
    if event.stop_token_id is not None:
        content["stopTokenId"] = event.stop_token_id
    return content


if __name__ == "__main__":
    main()
