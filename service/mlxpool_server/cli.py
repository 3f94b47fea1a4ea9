"""The command line of `mlxpool serve`: flags made from the settings, and the exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import structlog

from mlxpool_server import new_key
from mlxpool_server.domain import HubSource, ModelSpec
from mlxpool_server.errors import MlxpoolError, SettingsError
from mlxpool_server.logs import configure_logging
from mlxpool_server.pool.catalog import Catalog, read_model_type
from mlxpool_server.rpc.access.keys import read_keys
from mlxpool_server.settings import (
    CONFIG_VARIABLE,
    Settings,
    check_exposure,
    describe_settings,
    load_settings,
)
from mlxpool_server.version import __version__

_PROG = "mlxpool serve"
_SIGINT = 2
_EPILOG = f"""\
Every setting can also stand in the TOML file and in the environment; flags win over the
environment, the environment over the file. {CONFIG_VARIABLE} names the file like --config.
With no model configured the demo model is served as `demo`. `mlxpool new-key` makes an API key.

exit codes:
  0      drained and stopped
  1      failed at run time
  64     wrong usage of the command line
  69     an address is not available
  70     the engine was stuck for engine_exit_s
  78     wrong configuration: a setting, wherever it was given, or a model's folder
  128+N  stopped at once by signal N, without draining
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mlxpool serve` with these arguments (None: sys.argv's) and return the exit code.

    A first argument `new-key` makes an API key instead.
    """
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["new-key"]:
        return new_key.main(given[1:])
    try:
        arguments = _parser().parse_args(given)
    except SystemExit as stop:
        # argparse leaves so after --help, --version and wrong usage.
        return stop.code if isinstance(stop.code, int) else os.EX_USAGE
    try:
        settings = _settings(arguments)
        if arguments.check:
            return _check(settings)
        return _serve(settings, partial(_settings, arguments))
    except SettingsError as error:
        return _fail(error, os.EX_CONFIG)
    except KeyboardInterrupt:
        return 128 + _SIGINT


def _serve(settings: Settings, read_settings: Callable[[], Settings]) -> int:
    configure_logging(settings.log_format, settings.log_level)
    log = structlog.get_logger()
    try:
        # Late: --help and --check must work without mlx, and logging is configured before it loads.
        from mlxpool_server.app import run  # noqa: PLC0415  # see above

        return run(settings, read_settings)
    except MlxpoolError as error:
        log.error("server.failed", problem=str(error))  # noqa: TRY400  # the text says it all
        return os.EX_CONFIG if isinstance(error, SettingsError) else 1
    except Exception:
        # The edge: what nobody foresaw is logged in full and becomes an exit code.
        log.exception("server.crashed")
        return 1


class _Parser(argparse.ArgumentParser):
    """argparse, but wrong usage exits with EX_USAGE: its own 2 is no sysexits code."""

    def error(self, message: str) -> NoReturn:
        self.exit(os.EX_USAGE, f"{self.prog}: error: {message}; try {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROG,
        usage=f"{_PROG} [--config FILE] [--model NAME=PATH_OR_HUB_ID]... [settings]",
        description="Serve MLX language models over gRPC.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviation that works today is ambiguous once a flag is added.
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="read settings from this TOML")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check settings and model folders without loading weights, then exit",
    )
    parser.add_argument("--version", action="version", version=f"mlxpool {__version__}")
    group = parser.add_argument_group("settings")
    for row in describe_settings():
        default = f" (default: {row.default})" if row.default else ""
        group.add_argument(
            row.flag,
            dest=row.name,
            action="append" if row.is_list else "store",
            # `--allow-plaintext` alone means true.
            nargs="?" if row.is_switch else None,
            const="true" if row.is_switch else None,
            metavar=row.type.replace(" ", "_").upper(),
            # argparse formats help with %.
            help=f"{row.description}{default}".replace("%", "%%"),
        )
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings. Raises: SettingsError."""
    config_file: Path | None = arguments.config
    if config_file is None and (named := os.environ.get(CONFIG_VARIABLE)):
        config_file = Path(named)
    flags = {row.name: getattr(arguments, row.name) for row in describe_settings()}
    settings = load_settings(config_file, flags, os.environ)
    check_exposure(settings)
    return settings


def _check(settings: Settings) -> int:
    """Print a line per model. Raises: SettingsError for certificates, keys or a catalogue."""
    if settings.api_keys_file is not None:
        read_keys(settings.api_keys_file)
    if settings.tls_certificate is not None:
        # Late: only certificates need grpc.
        from mlxpool_server.front_door import certificates_for  # noqa: PLC0415  # see above

        certificates_for(settings)
    catalog = Catalog.build(settings.models, settings.models_dir)
    for skipped in catalog.skipped:
        sys.stderr.write(f"{_PROG}: skipped {skipped.folder}: {skipped.reason}\n")
    if settings.gateway:
        # Late: only these ports need grpc.
        from mlxpool_server.gateway_ports import check_gateway_models  # noqa: PLC0415  # see above

        demo = (ModelSpec("demo", Path("demo")),)
        check_gateway_models(
            settings.gateway, Catalog.build(demo) if settings.serves_demo_model else catalog
        )
    if settings.serves_demo_model:
        sys.stdout.write("demo: the demo model, since no model is configured\n")
    code = 0
    for spec in catalog:
        try:
            sys.stdout.write(f"{spec.name}: {_what_is_served(spec)}\n")
        except SettingsError as error:
            code = _fail(f"model {spec.name!r}: {error}", os.EX_CONFIG)
    return code


def _what_is_served(spec: ModelSpec) -> str:
    if isinstance(spec.source, HubSource):
        revision = f"@{spec.source.revision}" if spec.source.revision else ""
        what = f"hub model {spec.source.repo_id}{revision}, not looked up"
    else:
        what = f"{read_model_type(spec.source)} in {spec.source}"
    return f"{what} (also {', '.join(spec.aliases)})" if spec.aliases else what


def _fail(problem: object, code: int) -> int:
    sys.stderr.write(f"{_PROG}: error: {problem}\n")
    return code
