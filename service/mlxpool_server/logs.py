"""Logs: structlog and the libraries' own logging through one renderer, text or JSON lines."""

from __future__ import annotations

import logging
import math
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import ExcInfo, Processor

LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_OWN_LOGGER = "mlxpool_server"
# When imported they hang a handler of their own on their logger.
_SELF_CONFIGURING = ("huggingface_hub", "transformers")
# A traceback from here says that a caller was gone when its next message was sent, which the line
# of its call says, too.
_GRPC_LOGGER = "grpc._cython.cygrpc"
_GRPC_CALLER_GONE = "ExecuteBatchError"


def configure_logging(
    log_format: LogFormat, log_level: LogLevel, stream: TextIO | None = None
) -> None:
    """Send all logs of this process to `stream` (None: stderr); `auto` is text on a terminal.

    Libraries are heard from warning upwards, and no lower than `log_level`. Call it before they
    are imported; it may be called again, and the last call counts.
    """
    stream = sys.stderr if stream is None else stream
    as_text = log_format == "text" or (log_format == "auto" and stream.isatty())
    level = _LEVELS[log_level]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering = _text_processors(colors=stream.isatty()) if as_text else _json_processors()
    _route_stdlib(stream, level, shared, rendering)
    structlog.configure(
        processors=[*shared, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One stdlib logger for all our events: its level then needs no knowledge of module names,
        # and a closed or full stderr is a handler's problem, never a request's.
        logger_factory=lambda *_: logging.getLogger(_OWN_LOGGER),
        # A logger made at import must follow a later configure_logging.
        cache_logger_on_first_use=False,
    )


def _route_stdlib(
    stream: TextIO, level: int, shared: list[Processor], rendering: list[Processor]
) -> None:
    handler = logging.StreamHandler(stream)
    handler.setLevel(level)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_OWN_LOGGER).setLevel(level)
    for name in _SELF_CONFIGURING:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.__class__ = _RoutedLogger
    grpc_logger = logging.getLogger(_GRPC_LOGGER)
    if _is_news not in grpc_logger.filters:
        grpc_logger.addFilter(_is_news)
    logging.captureWarnings(capture=True)


def _is_news(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != _GRPC_CALLER_GONE


class _RoutedLogger(logging.Logger):
    """A library's logger that keeps to the root's handler whatever the library configures."""

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802  # logging's name
        """Ignore the library's handler: its lines would bypass the renderer."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "propagate":
            super().__setattr__(name, value)


# ---------------------------------------------------------------- JSON


def _json_processors() -> list[Processor]:
    # Locals stay out of tracebacks: they hold prompts and generated text.
    transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [
        structlog.processors.ExceptionRenderer(transformer),
        _spell_non_finite,
        structlog.processors.JSONRenderer(),
    ]


def _spell_non_finite(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Write infinity and NaN as strings: JSON has no numbers for them."""
    for key, value in event.items():
        if isinstance(value, float) and not math.isfinite(value):
            event[key] = str(value)
    return event


# ---------------------------------------------------------------- text


def _text_processors(*, colors: bool) -> list[Processor]:
    return [
        _escape_strings,
        structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_write_traceback),
    ]


def _escape_strings(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Escape control characters: a value must neither break its line nor steer the terminal."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _escaped(value)
    return event


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _write_traceback(sio: TextIO, exc_info: ExcInfo) -> None:
    """Write a plain traceback, indented: no line of an exception's text passes for a log line."""
    lines = "".join(traceback.format_exception(*exc_info)).splitlines()
    sio.writelines(f"\n    {_escaped(line)}" for line in lines)
