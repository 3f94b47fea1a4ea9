"""What a command ends with: an exit code, and for failures one line with the remedy."""

from __future__ import annotations

import enum

from mlxpool_client import errors
from mlxpool_client.channel import is_loopback


class ExitCode(enum.IntEnum):
    """The numbers of sysexits.h, where they fit."""

    OK = 0
    USAGE = 64
    BAD_REQUEST = 65
    NOT_FOUND = 66
    UNAVAILABLE = 69
    SERVER_FAILED = 70
    NO_MEMORY = 71
    TRY_AGAIN = 75
    NOT_SUPPORTED = 76
    NOT_ALLOWED = 77
    FORBIDDEN_NOW = 78
    INTERRUPTED = 130
    BROKEN_PIPE = 141


EPILOG = """\
exit codes:
  0    done
  64   wrong usage
  65   the request is wrong: a field, a prompt that is too long
  66   no such model, adapter or generation
  69   nothing answers at the target, or the connection broke
  70   the server failed, or this command did
  71   the model or the request does not fit the memory
  75   try again: queue full, shutting down, deadline, over the key's limit, unloaded or cancelled
       by somebody else
  76   the server does not support that
  77   access denied
  78   the state forbids it: not loaded, in use, a missing capability or server installation
  130  interrupted
  141  the reader of the output went away
"""

# The first match counts: kinds come before what they are kinds of.
_CODES: tuple[tuple[type[errors.MlxpoolError], ExitCode], ...] = (
    (errors.InvalidRequestError, ExitCode.BAD_REQUEST),
    (errors.NotFoundError, ExitCode.NOT_FOUND),
    (errors.QueueFullError, ExitCode.TRY_AGAIN),
    (errors.QueueTimeoutError, ExitCode.TRY_AGAIN),
    (errors.DeadlineUnmeetableError, ExitCode.TRY_AGAIN),
    (errors.DrainingError, ExitCode.TRY_AGAIN),
    (errors.RateLimitedError, ExitCode.TRY_AGAIN),
    (errors.UnavailableError, ExitCode.UNAVAILABLE),
    (errors.ResourceExhaustedError, ExitCode.NO_MEMORY),
    (errors.DeadlineError, ExitCode.TRY_AGAIN),
    (errors.AbortedError, ExitCode.TRY_AGAIN),
    (errors.GenerationCancelledError, ExitCode.TRY_AGAIN),
    (errors.GenerationIdInUseError, ExitCode.FORBIDDEN_NOW),
    (errors.PreconditionError, ExitCode.FORBIDDEN_NOW),
    (errors.NotSupportedError, ExitCode.NOT_SUPPORTED),
    (errors.AccessDeniedError, ExitCode.NOT_ALLOWED),
)

_REMEDIES: tuple[tuple[type[errors.MlxpoolError], str], ...] = (
    (errors.ModelNotFoundError, "list the models with: mlxpool models"),
    (errors.ModelNotLoadedError, "load it with: mlxpool load NAME"),
    (errors.PoolMemoryLimitError, "see what holds the memory with: mlxpool memory"),
    (errors.DeadlineError, "give it longer with --timeout"),
    (errors.ServerError, "the server's log says why"),
)


class CommandError(Exception):
    """A command cannot go on; the text says why and what to do."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: errors.MlxpoolError) -> ExitCode:
    """Return the exit code for a failed call."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return ExitCode.SERVER_FAILED


def describe(error: errors.MlxpoolError, target: str) -> str:
    """Return what went wrong and the remedy, for people."""
    if isinstance(error, errors.UnavailableError) and not error.reason:
        return _describe_connection(error, target)
    if error.retry_after_s is not None:
        return f"{error.message}; try again in {error.retry_after_s:g} s"
    if error.reason == "API_KEY_MISSING":
        return f"{target} needs an API key; name the file that has yours with --api-key-file"
    for kind, remedy in _REMEDIES:
        if isinstance(error, kind):
            return f"{error.message}; {remedy}"
    return error.message


def _describe_connection(error: errors.UnavailableError, target: str) -> str:
    # gRPC has no code for "never connected": its text is all there is.
    never_connected = ("failed to connect", "Connection refused", "DNS resolution", "resolve")
    if any(text in error.message for text in never_connected):
        remedy = "start a server with: mlxpool serve" if is_loopback(target) else "check --target"
        return f"nothing answers at {target}; {remedy}"
    return f"lost the connection to {target}: {error.message}"
