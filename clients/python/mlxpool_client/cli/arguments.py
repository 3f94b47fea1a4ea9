"""The options that commands share, and the model they are about when none is named."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mlxpool_client.cli.exits import CommandError, ExitCode
from mlxpool_client.cli.quantities import duration_s, keep_alive_s
from mlxpool_client.client import Client
from mlxpool_client.requests import GenerateOptions
from mlxpool_client.security import Tls

if TYPE_CHECKING:
    from mlxpool_client.models import Model


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the exit code of the table."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"mlxpool: {message}; see: {self.prog} --help\n")


def connection_options(target: str | None, timeout_s: str | None) -> Parser:
    """Return the options of the connection, to be understood before and after the command.

    argparse.SUPPRESS as a default leaves what was given before the command alone.
    """
    parser = Parser(add_help=False)
    parser.add_argument(
        "--target",
        metavar="HOST:PORT",
        default=target,
        help="the server; default: $MLXPOOL_TARGET or 127.0.0.1:50051",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=duration_s,
        default=timeout_s,
        help="give up after this long; default: never",
    )
    _add_security_options(parser, default=None if target is not argparse.SUPPRESS else target)
    return parser


def _add_security_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    group = parser.add_argument_group("security")
    group.add_argument(
        "--tls",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="talk TLS; --no-tls: plaintext, even with a key; default: $MLXPOOL_TLS (1 or 0)",
    )
    files = {
        "--ca": "trust these authorities (PEM), not the system's; default: $MLXPOOL_CA",
        "--cert": "the client's own certificate (PEM); default: $MLXPOOL_CLIENT_CERT",
        "--key": "the key of --cert (PEM); default: $MLXPOOL_CLIENT_KEY",
        "--api-key-file": "send the API key in this file; default: the key $MLXPOOL_API_KEY",
    }
    for flag, text in files.items():
        group.add_argument(flag, metavar="FILE", default=default, help=text)


def open_client(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Client:
    """Connect as the options say, and the environment where they say nothing.

    Raises: CommandError for files that cannot be read; ValueError as Client.
    """
    ca = arguments.ca or environ.get("MLXPOOL_CA") or None
    certificate = arguments.cert or environ.get("MLXPOOL_CLIENT_CERT") or None
    key = arguments.key or environ.get("MLXPOOL_CLIENT_KEY") or None
    tls: Tls | bool | None = arguments.tls
    if tls is None:
        tls = _switch("MLXPOOL_TLS", environ.get("MLXPOOL_TLS", ""))
    if tls is not False and (ca or certificate or key):
        tls = Tls(ca, certificate, key)
    try:
        api_key = environ.get("MLXPOOL_API_KEY") or None
        if arguments.api_key_file is not None:
            api_key = Path(arguments.api_key_file).read_text(encoding="utf-8").strip()
        return Client(arguments.target, timeout_s=arguments.timeout, tls=tls, api_key=api_key)
    except UnicodeDecodeError:
        raise CommandError(f"{arguments.api_key_file}: holds no API key") from None
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error


def _switch(name: str, text: str) -> bool | None:
    """Raises: CommandError."""
    values = {"": None, "1": True, "true": True, "0": False, "false": False}
    if text.lower() not in values:
        raise CommandError(f"{name} is {text!r}; write 1 or 0")
    return values[text.lower()]


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", metavar="NAME", help="default: the only model that the server has"
    )


def add_json_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def pick_model(client: Client, name: str | None) -> Model:
    """Return the model named, else the only one.

    Raises: CommandError when there is none or more than one to choose from.
    """
    if name is not None:
        return client.get_model(name)
    models = client.list_models()
    if len(models) == 1:
        return models[0]
    if not models:
        raise CommandError("the server has no models; see: mlxpool serve --help")
    names = ", ".join(model.name for model in models)
    raise CommandError(f"the server has more than one model; name one with -m: {names}")


_FLOATS = {
    "--temperature": "0 = always the likeliest token",
    "--top-p": "sample from the likeliest tokens that sum to this probability",
    "--min-p": "leave out tokens below this share of the likeliest one's probability",
    "--repetition-penalty": "1 = none",
    "--presence-penalty": "0 = none",
    "--frequency-penalty": "0 = none",
    "--xtc-probability": "how often to leave out the likeliest tokens",
    "--xtc-threshold": "above which probability a token counts as one of them",
}
_INTS = {
    "--top-k": "sample from this many of the likeliest tokens",
    "--penalty-context-size": "how many of the last tokens the penalties look at",
    "--seed": "repeat a run",
    "--max-tokens": "the longest answer",
}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a generation; what is not given is the model's or server's default."""
    group = parser.add_argument_group("generation")
    group.add_argument("--adapter", metavar="NAME", help="one of the model's LoRA adapters")
    for flag, text in _FLOATS.items():
        group.add_argument(flag, type=float, metavar="X", help=text)
    for flag, text in _INTS.items():
        group.add_argument(flag, type=int, metavar="N", help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end there; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence")
    group.add_argument(
        "--max-duration", type=duration_s, metavar="SECONDS", help="end after this long"
    )
    group.add_argument(
        "--keep-alive",
        type=keep_alive_s,
        metavar="SECONDS",
        help="unload the model after this long without use; 0 = at once, or never",
    )
    group.add_argument(
        "--require-loaded", action="store_true", help="fail rather than load the model"
    )


def generation_options(arguments: argparse.Namespace) -> GenerateOptions:
    """Return what add_generation_options() parsed."""
    return GenerateOptions(
        adapter=arguments.adapter or "",
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        penalty_context_size=arguments.penalty_context_size,
        xtc_probability=arguments.xtc_probability,
        xtc_threshold=arguments.xtc_threshold,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        max_duration_s=arguments.max_duration,
        keep_alive_s=arguments.keep_alive,
        require_loaded=arguments.require_loaded,
    )
