"""Domain errors: each carries the facts a caller needs. rpc/status.py alone picks the status."""

from __future__ import annotations

# How soon a caller may ask again whom a full, slow or draining server has refused.
RETRY_AFTER_S = 1.0


class MlxpoolError(Exception):
    """The base of every error this service raises on purpose; its text may be shown to callers."""


class InvalidFieldError(MlxpoolError, ValueError):
    """`field` is the request's field path, in proto names."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class BadConstraintError(MlxpoolError, ValueError):
    """`field` is the request's field path; `place` is where in the constraint, empty: all of it."""

    def __init__(self, field: str, problem: str, place: str = "") -> None:
        self.problem = f"at {place}: {problem}" if place else problem
        super().__init__(f"{field}: {self.problem}")
        self.field = field
        self.place = place


class NotImplementedFieldError(MlxpoolError, NotImplementedError):
    """The contract has the field or RPC; this server does not honour it yet."""

    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is not implemented by this server; leave it unset")
        self.field = field


class PromptTooLongError(MlxpoolError, ValueError):
    """`limit_tokens` is `what`: the model's context, which has to hold the answer too, or less.

    `is_lower_bound`: nobody counted; so many tokens it has at the least. `field` is the request's
    field path.
    """

    def __init__(
        self,
        prompt_tokens: int,
        limit_tokens: int,
        what: str = "the model's context",
        *,
        is_lower_bound: bool = False,
        field: str = "prompt",
    ) -> None:
        has = "has at least" if is_lower_bound else "has"
        subject = "the prompt" if field == "prompt" else field
        super().__init__(f"{subject} {has} {prompt_tokens} tokens, {what} is {limit_tokens}")
        self.prompt_tokens = prompt_tokens
        self.limit_tokens = limit_tokens
        self.what = what
        self.is_lower_bound = is_lower_bound
        self.field = field


class ModelNotFoundError(MlxpoolError, LookupError):
    def __init__(self, model: str, known: tuple[str, ...] = ()) -> None:
        hint = f"; this server has {', '.join(known)}" if known else ""
        super().__init__(f"no model named {model!r}{hint}")
        self.model = model


class GenerationNotFoundError(MlxpoolError, LookupError):
    def __init__(self, generation_id: str) -> None:
        super().__init__(f"no generation {generation_id!r} is in flight")
        self.generation_id = generation_id


class GenerationIdInUseError(MlxpoolError):
    def __init__(self, generation_id: str) -> None:
        super().__init__(f"generation_id {generation_id!r} is in flight already")
        self.generation_id = generation_id


class ModelNotLoadedError(MlxpoolError):
    def __init__(self, model: str) -> None:
        super().__init__(f"{model!r} is not loaded and the request asked not to load it")
        self.model = model


class CapabilityMissingError(MlxpoolError):
    def __init__(self, model: str, capability: str, remedy: str) -> None:
        super().__init__(f"{model!r} has no {capability}; {remedy}")
        self.model = model
        self.capability = capability


class AdapterNotFoundError(MlxpoolError, LookupError):
    """`known` are a few of the model's adapters."""

    def __init__(self, model: str, adapter: str, known: tuple[str, ...] = ()) -> None:
        what = f"; it has {', '.join(known)}" if known else ""
        super().__init__(f"{model!r} has no adapter {adapter!r}{what}")
        self.model = model
        self.adapter = adapter
        self.known = known


class ModelInUseError(MlxpoolError):
    """It is in memory in another form than was asked for."""

    def __init__(self, model: str, draft: str) -> None:
        has = f"the draft model {draft!r}" if draft else "no draft model"
        super().__init__(f"{model!r} is loaded with {has}; unload it first")
        self.model = model


class MalformedCallError(ValueError):
    """The model wrote no tool call that can be read: its text goes to the caller, no error."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"no tool call: {problem}")
        self.problem = problem


class GenerationCancelledError(MlxpoolError):
    """For a caller whose protocol has no finish reason for it."""

    def __init__(self, generation_id: str) -> None:
        super().__init__(f"the generation {generation_id!r} was cancelled")
        self.generation_id = generation_id


class GenerationTooLateError(MlxpoolError, TimeoutError):
    """Its time was over before its first token."""

    def __init__(self, max_duration_s: float) -> None:
        super().__init__(f"no token came in the {max_duration_s:g} s that a generation may last")
        self.max_duration_s = max_duration_s


class GenerationInterruptedError(MlxpoolError):
    """It ended in the middle, by what would have been worth a retry before its first token."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"interrupted after its first token: {problem}")
        self.problem = problem


class PoolMemoryLimitError(MlxpoolError, MemoryError):
    """`available_bytes` is what the pool could free at most for this request."""

    def __init__(self, model: str, required_bytes: int, available_bytes: int) -> None:
        super().__init__(
            f"{model!r} needs {required_bytes} bytes; "
            f"the pool has {available_bytes} that are free or could be freed"
        )
        self.model = model
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes


class MemoryInUseError(MlxpoolError):
    def __init__(self, limit_bytes: int, in_use_bytes: int) -> None:
        super().__init__(
            f"the limit of {limit_bytes} bytes is below the {in_use_bytes} bytes "
            "that are pinned or in use"
        )
        self.limit_bytes = limit_bytes
        self.in_use_bytes = in_use_bytes


class LoadFailedError(MlxpoolError):
    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"{model!r} could not be loaded: {problem}")
        self.model = model
        self.problem = problem


class LoadSupersededError(MlxpoolError):
    def __init__(self, model: str) -> None:
        super().__init__(f"the load of {model!r} was stopped by an unload")
        self.model = model


class ModelUnloadedError(MlxpoolError):
    def __init__(self, model: str) -> None:
        super().__init__(f"{model!r} was unloaded by force while it generated")
        self.model = model


class GenerationFailedError(MlxpoolError):
    """The engine failed; the cause is logged, never sent."""

    def __init__(self, model: str, what: str = "generation") -> None:
        super().__init__(f"the {what} on {model!r} failed inside the engine")
        self.model = model


class QueueFullError(MlxpoolError):
    def __init__(self, queued: int, retry_after_s: float) -> None:
        super().__init__(f"{queued} requests are running or waiting already")
        self.queued = queued
        self.retry_after_s = retry_after_s


class DrainingError(MlxpoolError):
    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the server is shutting down")
        self.retry_after_s = retry_after_s


class QueueTimeoutError(MlxpoolError, TimeoutError):
    """It waited for memory or a place in the batch, and never ran."""

    def __init__(self, waited_s: float, retry_after_s: float) -> None:
        super().__init__(f"the request waited {waited_s:.1f} s for its turn, which did not come")
        self.waited_s = waited_s
        self.retry_after_s = retry_after_s


class DeadlineUnmeetableError(MlxpoolError, TimeoutError):
    """Refused before it started: its deadline would pass while it waits."""

    def __init__(self, deadline_s: float, expected_wait_s: float) -> None:
        super().__init__(
            f"the deadline is in {deadline_s:.1f} s, and the queue is about "
            f"{expected_wait_s:.1f} s long"
        )
        self.deadline_s = deadline_s
        self.expected_wait_s = expected_wait_s


class ApiKeyMissingError(MlxpoolError, PermissionError):
    def __init__(self) -> None:
        super().__init__("this server needs an API key in the metadata: authorization: Bearer KEY")


class ApiKeyInvalidError(MlxpoolError, PermissionError):
    """What was sent is never repeated: it may be a key of somewhere else."""

    def __init__(self) -> None:
        super().__init__("the API key is not one of this server's")


class RoleMissingError(MlxpoolError, PermissionError):
    """`roles` are those that may make the call; one of them is enough."""

    def __init__(self, key_name: str, method: str, roles: tuple[str, ...]) -> None:
        super().__init__(
            f"the API key {key_name!r} may not call {method}; "
            f"that needs the role {' or '.join(roles)}"
        )
        self.key_name = key_name
        self.method = method
        self.roles = roles


class RateLimitedError(MlxpoolError):
    def __init__(self, key_name: str, requests_per_minute: int, retry_after_s: float) -> None:
        super().__init__(
            f"the API key {key_name!r} may make {requests_per_minute} requests a minute"
        )
        self.key_name = key_name
        self.requests_per_minute = requests_per_minute
        self.retry_after_s = retry_after_s


class TooManyStreamsError(MlxpoolError):
    def __init__(self, key_name: str, max_streams: int, retry_after_s: float) -> None:
        super().__init__(f"the API key {key_name!r} has its {max_streams} streams open already")
        self.key_name = key_name
        self.max_streams = max_streams
        self.retry_after_s = retry_after_s


class SettingsError(MlxpoolError, ValueError):
    """A setting is unknown or wrong; the text names it and the remedy."""


class DemoModelError(MlxpoolError):
    """The demo model could not be fetched or converted; the text names the remedy."""


class AddressUnavailableError(MlxpoolError, OSError):
    def __init__(self, address: str) -> None:
        super().__init__(
            f"cannot listen on {address}: it is in use, or not an address of this host"
        )
        self.address = address


def of_input(error: MlxpoolError, index: int) -> MlxpoolError:
    """The error of a prompt that is one of several inputs: its field says which."""
    path = f"inputs[{index}]"
    match error:
        case InvalidFieldError(field=field, problem=problem):
            return InvalidFieldError(path + field.removeprefix("prompt"), problem)
        case NotImplementedFieldError(field=field):
            return NotImplementedFieldError(path + field.removeprefix("prompt"))
        case PromptTooLongError():
            return PromptTooLongError(
                error.prompt_tokens,
                error.limit_tokens,
                error.what,
                is_lower_bound=error.is_lower_bound,
                field=path,
            )
        case _:
            return error
