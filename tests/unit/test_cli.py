"""`mlxpool serve`: flags from the settings, exit codes, --check without weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from structlog.testing import capture_logs

from mlxpool_server import cli
from mlxpool_server.errors import DemoModelError, SettingsError
from mlxpool_server.settings import Settings, describe_settings
from mlxpool_server.version import __version__

Run = Callable[[Settings, Callable[[], Settings]], int]
SetRun = Callable[[Run], None]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("MLXPOOL_")]:
        monkeypatch.delenv(variable)
    # Tests leave the process's logging alone.
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)


@pytest.fixture
def set_run(monkeypatch: pytest.MonkeyPatch) -> SetRun:
    """Put a fake in the place of app.run."""

    def set_run(run: Run) -> None:
        app = ModuleType("mlxpool_server.app")
        app.run = run  # type: ignore[attr-defined]  # that is what the fake is for
        monkeypatch.setitem(sys.modules, "mlxpool_server.app", app)

    return set_run


@pytest.fixture
def served(set_run: SetRun) -> list[Settings]:
    """Return the list that each started server's settings are added to."""
    started: list[Settings] = []

    def run(settings: Settings, _: object) -> int:
        started.append(settings)
        return 0

    set_run(run)
    return started


def _model_folder(folder: Path, config: str = '{"model_type": "llama"}') -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    return folder


def test_every_setting_has_a_flag(served: list[Settings]) -> None:
    """Each setting's flag reaches its field."""
    arguments = []
    for row in describe_settings():
        arguments += [row.flag, row.example.split(",")[0]]
    assert cli.main(arguments) == 0
    assert served[0].model_fields_set == set(Settings.model_fields)


def test_listen_and_model_can_be_repeated(served: list[Settings]) -> None:
    """Repeated flags add up."""
    models = ["--model", "a=org/a", "--model", "b=org/b"]
    assert cli.main(["--listen", "127.0.0.1:1", "--listen", "127.0.0.1:2", *models]) == 0
    assert served[0].listen == ("127.0.0.1:1", "127.0.0.1:2")
    assert [spec.name for spec in served[0].models] == ["a", "b"]


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_config_file_is_named_by_flag_or_variable(
    how: str, served: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--config and MLXPOOL_CONFIG both name the file."""
    file = tmp_path / "mlxpool.toml"
    file.write_text("max_batch_size = 3\n")
    if how == "variable":
        monkeypatch.setenv("MLXPOOL_CONFIG", str(file))
    assert cli.main(["--config", str(file)] if how == "flag" else []) == 0
    assert served[0].max_batch_size == 3


def test_the_config_flag_wins_over_the_variable(
    served: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like every flag."""
    monkeypatch.setenv("MLXPOOL_CONFIG", str(tmp_path / "missing.toml"))
    file = tmp_path / "mlxpool.toml"
    file.write_text("")
    assert cli.main(["--config", str(file)]) == 0
    assert len(served) == 1


def test_logging_is_configured_before_the_server_runs(
    set_run: SetRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's first line is in the chosen format already."""
    order: list[object] = []
    monkeypatch.setattr(cli, "configure_logging", lambda *arguments: order.append(arguments))

    def run(_: Settings, __: object) -> int:
        order.append("run")
        return 0

    set_run(run)
    cli.main(["--log-format", "json", "--log-level", "debug"])
    assert order == [("json", "debug"), "run"]


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize("code", [0, 1, 69, 137])
def test_the_servers_exit_code_is_returned(code: int, set_run: SetRun) -> None:
    """The exit code is what app.run returned."""
    set_run(lambda _, __: code)
    assert cli.main([]) == code


@pytest.mark.parametrize(
    "arguments", [["--no-such-flag"], ["serve"], ["--max-batch-size"], ["--max-batch", "1"]]
)
def test_wrong_usage_exits_with_64(
    arguments: list[str], served: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown, incomplete or abbreviated flag is wrong usage, told on one line."""
    assert cli.main(arguments) == 64
    stderr = capsys.readouterr().err
    assert stderr.startswith("mlxpool serve: error: ")
    assert stderr.endswith("; try mlxpool serve --help\n")
    assert stderr.count("\n") == 1
    assert served == []


def test_a_wrong_setting_exits_with_78(
    served: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that is wrong stops the start with one line."""
    assert cli.main(["--max-batch-size", "0"]) == 78
    assert capsys.readouterr().err == (
        "mlxpool serve: error: max_batch_size = '0' (flag --max-batch-size): "
        "input should be greater than or equal to 1; write a value such as 32\n"
    )
    assert served == []


@pytest.mark.parametrize(
    ("error", "code"), [(SettingsError("name taken"), 78), (DemoModelError("no network"), 1)]
)
def test_an_expected_failure_is_one_log_line(error: Exception, code: int, set_run: SetRun) -> None:
    """An error raised on purpose is logged by its text, without a traceback."""

    def run(_: Settings, __: object) -> int:
        raise error

    set_run(run)
    with capture_logs() as logs:
        assert cli.main([]) == code
    assert logs == [{"event": "server.failed", "problem": str(error), "log_level": "error"}]


def test_an_unforeseen_failure_is_logged_in_full(set_run: SetRun) -> None:
    """What nobody foresaw is logged with its traceback and exits with 1."""

    def run(_: Settings, __: object) -> int:
        raise ZeroDivisionError

    set_run(run)
    with capture_logs() as logs:
        assert cli.main([]) == 1
    assert logs == [{"event": "server.crashed", "exc_info": True, "log_level": "error"}]


def test_an_interrupt_before_the_server_runs_exits_with_130(set_run: SetRun) -> None:
    """Ctrl-C during the start is 128 + SIGINT, without a traceback."""

    def run(_: Settings, __: object) -> int:
        raise KeyboardInterrupt

    set_run(run)
    assert cli.main([]) == 130


# ---------------------------------------------------------------- --help, --version


def test_help_names_every_flag_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """--help is complete and exits with 0."""
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for row in describe_settings():
        assert f"  {row.flag} " in text
    for code in ("0", "1", "64", "69", "78", "128+N"):
        assert f"\n  {code} " in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the version and exits with 0."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlxpool {__version__}\n"


def test_the_command_line_imports_neither_mlx_nor_grpc() -> None:
    """--help and --check start fast, and work where mlx cannot be imported."""
    program = (
        "import sys, mlxpool_server.cli as cli; code = cli.main(['--check']); "
        "sys.exit(code or bool({'mlx', 'mlx_lm', 'grpc'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)


# ---------------------------------------------------------------- --check


def test_check_prints_a_line_per_model_and_serves_nothing(
    served: list[Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check names each model's type and place, reports skipped folders, and exits with 0."""
    found = _model_folder(tmp_path / "models" / "found")
    (tmp_path / "models" / "empty").mkdir()
    file = tmp_path / "mlxpool.toml"
    file.write_text(
        'models_dir = "models"\n[[models]]\nname = "chat"\nhub = "org/repo"\nrevision = "v1"\n'
        'aliases = ["default", "gpt"]\n'
    )
    assert cli.main(["--config", str(file), "--check"]) == 0
    output = capsys.readouterr()
    assert output.out == (
        f"chat: hub model org/repo@v1, not looked up (also default, gpt)\nfound: llama in {found}\n"
    )
    empty = tmp_path / "models" / "empty"
    assert output.err == f"mlxpool serve: skipped {empty}: has no config.json\n"
    assert served == []


def test_check_reports_every_broken_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check goes on after the first error, and exits with 78."""
    _model_folder(tmp_path / "a", config="{}")
    _model_folder(tmp_path / "c")
    flags = [f"--model={name}={tmp_path / name}" for name in ("a", "b", "c")]
    assert cli.main(["--check", *flags]) == 78
    output = capsys.readouterr()
    assert output.out == f"c: llama in {tmp_path / 'c'}\n"
    first, second = output.err.splitlines()
    assert first.startswith("mlxpool serve: error: model 'a': ")
    assert "has no model_type" in first
    assert second.startswith("mlxpool serve: error: model 'b': ")
    assert "No such file or directory" in second


def test_check_refuses_a_name_that_is_taken_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """The catalogue is built by --check as it is by the server."""
    assert cli.main(["--check", "--model", "a=org/a", "--model", "a=org/b"]) == 78
    assert "the name is taken by model 'a'" in capsys.readouterr().err


def test_check_without_models_says_what_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    """With no model configured the demo model is served."""
    assert cli.main(["--check"]) == 0
    assert capsys.readouterr().out == "demo: the demo model, since no model is configured\n"


def test_check_looks_at_the_gateways_models(capsys: pytest.CaptureFixture[str]) -> None:
    """A port for a model that is not served is found before the start, the demo model's is fine."""
    assert cli.main(["--check", "--gateway", "demo=127.0.0.1:0"]) == 0
    assert cli.main(["--check", "--gateway", "other=127.0.0.1:0"]) == 78
    assert "no model named 'other'; this server has demo" in capsys.readouterr().err


def test_the_package_runs_as_a_module() -> None:
    """`python -m mlxpool_server` is `mlxpool serve`, exit codes included."""
    command = [sys.executable, "-m", "mlxpool_server", "--max-batch-size", "0"]
    finished = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert finished.returncode == 78
    assert finished.stderr.startswith("mlxpool serve: error: max_batch_size")


# ---------------------------------------------------------------- who gets in


def test_plaintext_for_others_does_not_start(
    served: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 78 and the remedy, with --check too."""
    for flags in ([], ["--check"]):
        assert cli.main(["--listen", "0.0.0.0:1", *flags]) == os.EX_CONFIG
        assert "--allow-plaintext" in capsys.readouterr().err
    assert served == []


@pytest.mark.parametrize("flag", [["--allow-plaintext"], ["--allow-plaintext", "true"]])
def test_a_switch_alone_means_true(served: list[Settings], flag: list[str]) -> None:
    """And `false` after it means false."""
    assert cli.main([*flag, "--listen", "0.0.0.0:1"]) == 0
    assert served[0].allow_plaintext
    assert cli.main(["--allow-plaintext", "false"]) == 0
    assert not served[1].allow_plaintext


def test_check_reads_certificates_and_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would stop the start stops the check."""
    missing = str(tmp_path / "none")
    for flags in (
        ["--tls-certificate", missing, "--tls-key", missing],
        ["--api-keys-file", missing],
    ):
        assert cli.main(["--check", *flags]) == os.EX_CONFIG
        assert f"{missing}: No such file" in capsys.readouterr().err


def test_new_key(capsys: pytest.CaptureFixture[str]) -> None:
    """`mlxpool new-key` arrives here as the first argument."""
    assert cli.main(["new-key", "web"]) == 0
    assert 'name = "web"' in capsys.readouterr().out
