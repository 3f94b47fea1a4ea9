"""Logs: one renderer for everything, one line an event, nothing that steers a terminal."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from grpc._cython import cygrpc

from mlxpool_server.logs import configure_logging

_LIBRARIES = ("huggingface_hub", "transformers")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    libraries = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.__class__, list(logger.handlers), logger.propagate) for logger in libraries]
    yield
    for logger, (kind, their_handlers, propagate) in zip(libraries, before, strict=True):
        logger.__class__ = kind
        logger.handlers, logger.propagate = their_handlers, propagate
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def _only_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    event: dict[str, Any] = json.loads(line)
    return event


def test_auto_is_json_lines_when_not_on_a_terminal(stream: io.StringIO) -> None:
    """Collected logs are JSON: event, level, ISO time in UTC, fields as they are."""
    configure_logging("auto", "info", stream)
    structlog.get_logger().info("request.finished", ttft_s=0.5, completion_tokens=3)
    event = _only_line(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", event.pop("timestamp"))
    assert event == {
        "event": "request.finished",
        "level": "info",
        "ttft_s": 0.5,
        "completion_tokens": 3,
    }


def test_auto_is_coloured_text_on_a_terminal() -> None:
    """People get text with colours."""
    stream = _Terminal()
    configure_logging("auto", "info", stream)
    structlog.get_logger().info("server.started")
    assert "\x1b[" in stream.getvalue()
    assert "server.started" in stream.getvalue()


def test_text_has_no_colours_off_a_terminal(stream: io.StringIO) -> None:
    """Text into a file is plain."""
    configure_logging("text", "info", stream)
    structlog.get_logger().info("server.started", port=1)
    assert "\x1b" not in stream.getvalue()
    assert "port=1" in stream.getvalue()


def test_json_is_json_on_a_terminal_too() -> None:
    """An explicit format wins over the terminal."""
    stream = _Terminal()
    configure_logging("json", "info", stream)
    structlog.get_logger().info("server.started")
    assert _only_line(stream)["event"] == "server.started"


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels(level: Any, heard: list[str], stream: io.StringIO) -> None:
    """log_level is the least severe level that is written."""
    configure_logging("json", level, stream)
    log = structlog.get_logger()
    for method in ("debug", "info", "warning", "error"):
        getattr(log, method)("event")
    levels = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert levels == heard


@pytest.mark.parametrize("name", ["grpc._cython", "asyncio", *_LIBRARIES])
def test_libraries_are_heard_from_warning_upwards(name: str, stream: io.StringIO) -> None:
    """A library's record looks like ours, with its logger's name; its info is dropped."""
    configure_logging("json", "debug", stream)
    logging.getLogger(name).info("chatter")
    logging.getLogger(name).warning("retry %d", 2)
    event = _only_line(stream)
    assert (event["event"], event["level"], event["logger"]) == ("retry 2", "warning", name)


def test_libraries_are_no_louder_than_the_log_level(stream: io.StringIO) -> None:
    """At log_level error a library's warning is dropped like ours."""
    configure_logging("json", "error", stream)
    logging.getLogger("grpc").warning("dropped")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("name", _LIBRARIES)
def test_a_library_that_configures_itself_keeps_to_our_renderer(
    name: str, stream: io.StringIO
) -> None:
    """The handler and propagate=False that these libraries set on import have no effect."""
    configure_logging("json", "info", stream)
    theirs = io.StringIO()
    logging.getLogger(name).addHandler(logging.StreamHandler(theirs))
    logging.getLogger(name).propagate = False
    logging.getLogger(f"{name}.utils").warning("hello")
    assert theirs.getvalue() == ""
    assert _only_line(stream)["event"] == "hello"


def test_python_warnings_are_logged(stream: io.StringIO) -> None:
    """A DeprecationWarning of a library is a log line, not loose text on stderr."""
    configure_logging("json", "info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # catch_warnings has put the original back; capture again inside it.
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    assert _only_line(stream)["logger"] == "py.warnings"


_HOSTILE = "a\nb\r\x1b[2J\x07\x85\u2028\x9b"


def test_control_characters_stay_within_a_json_line(stream: io.StringIO) -> None:
    """JSON escapes them, and gives them back unchanged."""
    configure_logging("json", "info", stream)
    structlog.get_logger().info(_HOSTILE, name=_HOSTILE, names=(_HOSTILE,))
    assert stream.getvalue().rstrip("\n").isprintable()
    assert _only_line(stream)["name"] == _HOSTILE


def test_control_characters_stay_within_a_text_line(stream: io.StringIO) -> None:
    """In text, neither the event nor a field can break the line or steer the terminal."""
    configure_logging("text", "info", stream)
    structlog.get_logger().info(_HOSTILE, name=_HOSTILE, names=(_HOSTILE,))
    logging.getLogger("grpc").warning("%s", _HOSTILE)
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert "a\\nb" in lines[0]


def test_infinity_is_json(stream: io.StringIO) -> None:
    """A keep-alive of never does not make a line that JSON parsers refuse."""
    configure_logging("json", "info", stream)
    structlog.get_logger().info("model.loaded", keep_alive_s=math.inf)
    assert "Infinity" not in stream.getvalue()
    assert _only_line(stream)["keep_alive_s"] == "inf"


def _fail(prompt: str) -> None:
    raise ValueError("it\nfailed")


def test_exceptions_are_structured_in_json(stream: io.StringIO) -> None:
    """A traceback is data on the same line, and holds no local variables: they hold prompts."""
    configure_logging("json", "info", stream)
    try:
        _fail("SECRET " * 2)
    except ValueError:
        structlog.get_logger().exception("engine.failed")
    (exception,) = _only_line(stream)["exception"]
    assert (exception["exc_type"], exception["exc_value"]) == ("ValueError", "it\nfailed")
    assert exception["frames"][-1]["name"] == "_fail"
    assert "SECRET SECRET" not in stream.getvalue()


def test_exceptions_are_indented_in_text(stream: io.StringIO) -> None:
    """No line of an exception's text can pass for a log line of its own."""
    configure_logging("text", "info", stream)
    try:
        _fail("SECRET " * 2)
    except ValueError:
        structlog.get_logger().exception("engine.failed")
    first, *rest = stream.getvalue().rstrip("\n").split("\n")
    assert "engine.failed" in first
    assert all(line.startswith("    ") for line in rest)
    assert "    failed" in rest
    assert "SECRET SECRET" not in stream.getvalue()


def test_context_variables_are_in_every_line(stream: io.StringIO) -> None:
    """What a request binds once is on all its lines, a library's too."""
    configure_logging("json", "info", stream)
    with structlog.contextvars.bound_contextvars(generation_id="g1"):
        structlog.get_logger().info("ours")
        logging.getLogger("grpc").warning("theirs")
    ids = [json.loads(line)["generation_id"] for line in stream.getvalue().splitlines()]
    assert ids == ["g1", "g1"]


def test_the_last_configuration_counts(stream: io.StringIO) -> None:
    """Configuring twice neither doubles lines nor leaves old loggers behind."""
    first = io.StringIO()
    configure_logging("json", "info", first)
    log = structlog.get_logger()
    log.info("one")
    configure_logging("json", "info", stream)
    log.info("two")
    assert _only_line(first)["event"] == "one"
    assert _only_line(stream)["event"] == "two"


def test_a_closed_stream_does_not_fail_the_caller(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that cannot be written is lost; the request that wrote it goes on."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    configure_logging("json", "info", stream)
    stream.close()
    structlog.get_logger().info("lost")


def test_grpc_on_callers_that_are_gone_is_not_logged(stream: io.StringIO) -> None:
    """No traceback for each client that hangs up; what else goes wrong in there is heard."""
    configure_logging("json", "debug", stream)
    for error in (cygrpc.ExecuteBatchError("gone"), ValueError("torn")):
        try:
            raise error
        except Exception:
            logging.getLogger("grpc._cython.cygrpc").exception("raised in a servicer")
    assert "torn" in str(_only_line(stream))
