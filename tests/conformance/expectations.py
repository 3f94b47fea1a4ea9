"""What a case's `expect` means, and what holds for every stream.

code, reason        of the end; OK and none by default
message             a part of the end's message
metadata            keys that the error has (a list), or its whole metadata (an object)
fields              the paths of its field violations
retry_after_s       the server's advice; null = none, "some" = any
kinds               the kinds of all events, in order; progress is left out
text, reasoning     the deltas' texts, joined
text_contains       a part of it
raw_bytes           the bytes of all logprobs' chosen tokens, joined, are this text
finish_reason       without its prefix; null = one that this client does not know
events              these events, by position: what is named in them is the same
response            what is named in it is the same
attempts            how many calls the scripted server got
like_stubs          the text, ids and seed are those of a call with the bare stubs
min_prompt_tokens   at least so many
"""

from __future__ import annotations

import base64
from typing import Any

from conformance.programs import Json, Outcome


def kinds(events: list[Json]) -> list[str]:
    return [kind for event in events for kind in event if kind != "progress"]


def joined(events: list[Json], channel: str) -> str:
    return "".join(event.get("delta", {}).get(channel, "") for event in events)


def check_stream(events: list[Json], method: str) -> None:
    """The contract's order, and deltas that add up to the message."""
    assert list(events[-1]) == ["finished"], kinds(events)
    if method != "Generate":
        assert kinds(events) == ["finished"]
        return
    assert list(events[0]) == ["started"], kinds(events)
    assert set(kinds(events)[1:-1]) <= {"delta"}, kinds(events)
    if "delta" not in kinds(events):
        return
    message = events[-1]["finished"].get("message", {})
    content = "".join(part.get("text", "") for part in message.get("content", ()))
    assert joined(events, "text") == content
    assert joined(events, "reasoning") == message.get("reasoning", "")


def check(expect: Json, outcome: Outcome) -> None:
    for name, wanted in ({"code": "OK", "reason": ""} | expect).items():
        if check_this := globals().get(f"_{name}"):
            check_this(outcome, wanted)
        else:
            assert name in {"attempts", "like_stubs"}, f"no such expectation: {name}"


def contains(found: Any, wanted: Any) -> bool:
    """Whether what is named in `wanted` is the same in `found`; empty is as good as absent."""
    if isinstance(wanted, dict):
        return all(contains((found or {}).get(name), each) for name, each in wanted.items())
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(map(contains, found, wanted))
    return (found or 0) == (wanted or 0)


def _code(outcome: Outcome, wanted: str) -> None:
    assert outcome.end["code"] == wanted, outcome.end


def _reason(outcome: Outcome, wanted: str) -> None:
    assert outcome.end.get("reason", "") == wanted, outcome.end


def _message(outcome: Outcome, wanted: str) -> None:
    assert wanted in outcome.end["message"]


def _metadata(outcome: Outcome, wanted: list[str] | dict[str, str]) -> None:
    metadata = outcome.end.get("metadata") or {}
    assert metadata == wanted if isinstance(wanted, dict) else set(wanted) <= set(metadata)


def _fields(outcome: Outcome, wanted: list[str]) -> None:
    violations = outcome.end.get("field_violations") or []
    assert [each["field"] for each in violations] == wanted
    assert all(each["description"] for each in violations)


def _retry_after_s(outcome: Outcome, wanted: float | str | None) -> None:
    found = outcome.end.get("retry_after_s")
    assert found is not None and found > 0 if wanted == "some" else found == wanted


def _kinds(outcome: Outcome, wanted: list[str]) -> None:
    assert kinds(outcome.events) == wanted


def _text(outcome: Outcome, wanted: str) -> None:
    assert joined(outcome.events, "text") == wanted


def _reasoning(outcome: Outcome, wanted: str) -> None:
    assert joined(outcome.events, "reasoning") == wanted


def _text_contains(outcome: Outcome, wanted: str) -> None:
    assert wanted in joined(outcome.events, "text")


def _raw_bytes(outcome: Outcome, wanted: str) -> None:
    tokens = [
        token["chosen"]
        for event in outcome.events
        for token in event.get("delta", {}).get("logprobs", ())
    ]
    raw = b"".join(base64.b64decode(token.get("rawBytes", "")) for token in tokens)
    assert raw.decode().startswith(wanted)
    assert all(token["logprob"] <= 0 for token in tokens if "logprob" in token)


def _finish_reason(outcome: Outcome, wanted: str | None) -> None:
    found = outcome.events[-1]["finished"].get("finishReason", 0)
    if wanted is None:
        # What a newer server says is a number, or unspecified: each language's own way.
        assert isinstance(found, int) or found in {
            "FINISH_REASON_UNSPECIFIED", "FINISH_REASON_UNKNOWN", "UNRECOGNIZED"
        }  # fmt: skip
    else:
        assert found == f"FINISH_REASON_{wanted}"


def _events(outcome: Outcome, wanted: list[Json]) -> None:
    assert len(outcome.events) == len(wanted)
    for found, each in zip(outcome.events, wanted, strict=True):
        assert contains(found, each), (found, each)


def _response(outcome: Outcome, wanted: Json) -> None:
    assert contains(outcome.response, wanted), outcome.response


def _min_prompt_tokens(outcome: Outcome, wanted: int) -> None:
    assert outcome.events[-1]["finished"]["usage"]["promptTokens"] >= wanted
