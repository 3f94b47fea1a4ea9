"""Settings: three sources, one frozen value, errors that name the setting and the remedy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlxpool_server.domain import GatewayPort, HubSource, KvQuantization, Layout, ModelSpec
from mlxpool_server.errors import SettingsError
from mlxpool_server.settings import (
    Settings,
    describe_settings,
    fields,
    load_settings,
    render_settings_table,
)

_DOCS = Path(__file__).parents[2] / "docs"
_SOURCES = ("file", "environment", "flag")


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working_folder = tmp_path / "working"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    return folder / "mlxpool.toml"


def _load(source: str, name: str, text: str, config_file: Path) -> Settings:
    match source:
        case "file":
            config_file.write_text(f"{name} = '{text}'\n")
            return load_settings(config_file, {}, {})
        case "environment":
            return load_settings(None, {}, {f"MLXPOOL_{name.upper()}": text})
        case _:
            is_list = name in {"listen", "models", "gateway"}
            return load_settings(None, {name: [text] if is_list else text}, {})


def _origin(source: str, name: str, config_file: Path) -> str:
    flag = {"models": "model"}.get(name, name).replace("_", "-")
    return {
        "file": f"(file {config_file})",
        "environment": f"(environment variable MLXPOOL_{name.upper()})",
        "flag": f"(flag --{flag})",
    }[source]


def _problem(config_text: str, config_file: Path) -> str:
    config_file.write_text(config_text)
    with pytest.raises(SettingsError) as caught:
        load_settings(config_file, {}, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- sources


def test_defaults_need_no_source() -> None:
    """With nothing given, the defaults serve the demo model on the loopback address."""
    settings = load_settings(None, {}, {})
    assert settings == Settings()
    assert settings.listen == ("127.0.0.1:50051",)
    assert settings.default_keep_alive_s == math.inf
    assert settings.serves_demo_model


def test_flags_win_over_environment_over_file(config_file: Path) -> None:
    """A flag beats the environment, which beats the file; each setting on its own."""
    config_file.write_text("max_batch_size = 1\nmax_queued_requests = 1\nblas_threads = 1\n")
    settings = load_settings(
        config_file,
        {"max_batch_size": "3", "max_queued_requests": None},
        {"MLXPOOL_MAX_BATCH_SIZE": "2", "MLXPOOL_MAX_QUEUED_REQUESTS": "2", "HOME": "/"},
    )
    assert (settings.max_batch_size, settings.max_queued_requests, settings.blas_threads) == (
        3,
        2,
        1,
    )


def test_a_list_is_taken_from_its_last_source_as_a_whole(config_file: Path) -> None:
    """Lists are replaced, not joined."""
    config_file.write_text('listen = ["127.0.0.1:1", "127.0.0.1:2"]\n')
    settings = load_settings(config_file, {}, {"MLXPOOL_LISTEN": "127.0.0.1:3, [::1]:4"})
    assert settings.listen == ("127.0.0.1:3", "[::1]:4")


def test_an_empty_variable_is_an_unset_one() -> None:
    """Compose files set variables to nothing where they mean not to set them."""
    assert load_settings(None, {}, {"MLXPOOL_MAX_BATCH_SIZE": ""}) == Settings()


def test_settings_are_frozen() -> None:
    """Nobody changes a setting after the start."""
    with pytest.raises(ValidationError):
        Settings().max_batch_size = 1


@pytest.mark.parametrize("source", _SOURCES)
def test_every_example_is_accepted(source: str, config_file: Path) -> None:
    """The example value of every setting in the reference is valid from every source."""
    for row in describe_settings():
        text = row.example.split(",")[0]
        settings = _load(source, row.name, text, config_file)
        if not row.default:
            assert getattr(settings, row.name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("pool_memory_limit_bytes", "8GiB", 8 * 2**30),
        ("pool_memory_limit_bytes", "8GB", 8 * 10**9),
        ("pool_memory_limit_bytes", "1.5 kib", 1536),
        ("pool_memory_limit_bytes", "9007199254740993", 9007199254740993),
        ("mlx_cache_limit_bytes", "0", 0),
        ("default_keep_alive_s", "never", math.inf),
        ("default_keep_alive_s", "90", 90.0),
        ("default_layout", "float32", Layout.FLOAT32),
        ("pool_memory_share", "0.5", 0.5),
        ("log_level", "debug", "debug"),
        ("listen", "[::1]:0", ("[::1]:0",)),
        ("listen", "unix:/run/mlxpool.sock", ("unix:/run/mlxpool.sock",)),
        ("listen", "unix:///run/mlxpool.sock", ("unix:///run/mlxpool.sock",)),
    ],
)
@pytest.mark.parametrize("source", _SOURCES)
def test_text_is_read_the_same_from_every_source(
    source: str, name: str, text: str, value: object, config_file: Path
) -> None:
    """What an operator writes means the same in the file, the environment and a flag."""
    assert getattr(_load(source, name, text, config_file), name) == value


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("max_batch_size", "0", "greater than or equal to 1; write a value such as 32"),
        ("max_batch_size", "many", "valid integer"),
        ("pool_memory_limit_bytes", "8G", "write bytes, or a unit as in 8GiB"),
        ("pool_memory_limit_bytes", "-1", "write bytes"),
        ("pool_memory_limit_bytes", "75%", "write bytes"),
        ("pool_memory_limit_bytes", "9" * 400 + ".5", "write bytes"),
        ("pool_memory_limit_bytes", "8388608TiB", "less than or equal to"),
        ("pool_memory_share", "1.5", "less than or equal to 1"),
        ("pool_memory_share", "nan", "write a value such as 0.75"),
        ("default_keep_alive_s", "-1", 'write seconds, 0 (unload when idle) or "never"'),
        ("default_keep_alive_s", "nan", "write seconds"),
        ("default_keep_alive_s", "5m", "write seconds"),
        ("progress_interval_s", "11", "less than or equal to 10"),
        ("progress_interval_s", "0", "greater than 0"),
        ("drain_grace_s", "inf", "finite number"),
        ("default_layout", "int4", "'auto', 'stored', 'float32', 'bfloat16' or 'float16'"),
        ("log_format", "xml", "'auto', 'text' or 'json'"),
        ("max_message_bytes", "4GiB", "less than 2147483648"),
        ("listen", "50051", "write HOST:PORT"),
        ("listen", "localhost:65536", "write HOST:PORT"),
        ("listen", "::1:50051", "[IPV6]:PORT"),
        ("listen", "[::g]:50051", "[IPV6]:PORT"),
        ("listen", "[::1:50051", "[IPV6]:PORT"),
        ("listen", "localhost:٣", "write HOST:PORT"),
        ("listen", "unix:", "needs a socket path"),
        ("listen", "unix:/" + "x" * 103, "1 to 103 bytes"),
        ("models", "chat", "write NAME=PATH or NAME=ORG/REPO[@REVISION]"),
        ("models", "chat=gpt2", "'gpt2' is neither a folder nor a hub id"),
        ("models", "chat=org/../x", "is neither a folder nor a hub id"),
        ("models_dir", "~nobody-here/models", "no home folder"),
    ],
)
@pytest.mark.parametrize("source", _SOURCES)
def test_a_wrong_value_names_setting_source_and_remedy(
    source: str, name: str, text: str, remedy: str, config_file: Path
) -> None:
    """An error is one line with the setting, where it came from, and what to write instead."""
    with pytest.raises(SettingsError) as caught:
        _load(source, name, text, config_file)
    message = str(caught.value)
    assert message.startswith(name)
    assert _origin(source, name, config_file) in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["max_batch_size", "drain_grace_s", "pool_memory_limit_bytes"])
def test_a_bool_is_no_number(name: str, config_file: Path) -> None:
    """TOML's true is not read as 1."""
    assert f"{name} = True" in _problem(f"{name} = true\n", config_file)


def test_an_empty_path_is_an_error_in_a_flag() -> None:
    """An empty --models-dir does not mean the working folder."""
    with pytest.raises(SettingsError, match=r"^models_dir \(flag --models-dir\): not a path"):
        load_settings(None, {"models_dir": ""}, {})


def test_a_long_value_is_cut_in_the_error() -> None:
    """A pasted file does not become the error's text."""
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"max_batch_size": "9" * 10_000}, {})
    assert len(str(caught.value)) < 400


# ---------------------------------------------------------------- unknown names


def test_an_unknown_key_gets_a_suggestion(config_file: Path) -> None:
    """A misspelt key in the file names the key that was meant."""
    assert _problem("max_batchsize = 1\n", config_file) == (
        f"max_batchsize (file {config_file}): no such setting; did you mean max_batch_size?"
    )


def test_an_unknown_key_cannot_break_the_error_line(config_file: Path) -> None:
    """A quoted key may hold anything; it is shown escaped."""
    assert _problem('"a\\nb" = 1\n', config_file).startswith("'a\\nb' (file ")


def test_an_unknown_variable_gets_a_suggestion() -> None:
    """A misspelt variable names the variable that was meant."""
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {}, {"MLXPOOL_MODEL_DIR": "/srv"})
    assert str(caught.value) == (
        "MLXPOOL_MODEL_DIR (environment): no such setting; did you mean MLXPOOL_MODELS_DIR?"
    )


def test_an_unknown_name_without_a_likeness_points_to_the_docs(config_file: Path) -> None:
    """Where nothing is close, the error says where the settings are listed."""
    assert "docs/configuration.md lists them all" in _problem("zzz = 1\n", config_file)


def test_an_unknown_flag_name_is_an_error() -> None:
    """Flags are checked like every other source."""
    with pytest.raises(SettingsError, match="did you mean max_batch_size"):
        load_settings(None, {"max_batch": "1"}, {})


@pytest.mark.parametrize(
    "variable",
    [
        "MLXPOOL_CONFIG",
        "MLXPOOL_CACHE_DIR",
        "MLXPOOL_SERVICE_HOST",
        "MLXPOOL_SERVICE_PORT_GRPC",
        "MLXPOOL_PORT",
        "MLXPOOL_PORT_50051_TCP_ADDR",
        "MLXPOOL_CHAT_SERVICE_PORT",
        "MLXPOOLING",
    ],
)
def test_variables_that_are_no_settings_are_left_alone(variable: str) -> None:
    """Kubernetes puts MLXPOOL_PORT and its like beside a service named mlxpool: no error."""
    assert load_settings(None, {}, {variable: "tcp://10.0.0.1:50051"}) == Settings()


# ---------------------------------------------------------------- ports for the gateway


@pytest.mark.parametrize("source", ["environment", "flag"])
def test_gateway_ports_as_one_word(source: str, config_file: Path) -> None:
    """MODEL=HOST:PORT, in the environment and as a flag; a model's name may hold `=`-free signs."""
    settings = _load(source, "gateway", "org/m:4bit=[::1]:20000", config_file)
    assert settings.gateway == (GatewayPort("org/m:4bit", "[::1]:20000"),)


def test_gateway_ports_as_tables(config_file: Path) -> None:
    """`[[gateway]]` tables, with a time limit of their own."""
    config_file.write_text(
        '[[gateway]]\nmodel = "a"\nlisten = "127.0.0.1:1"\n'
        '[[gateway]]\nmodel = "b"\nlisten = "127.0.0.1:2"\nmax_duration_s = 30\n'
    )
    assert load_settings(config_file, {}, {}).gateway == (
        GatewayPort("a", "127.0.0.1:1"),
        GatewayPort("b", "127.0.0.1:2", 30.0),
    )


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('model = "a"', "has no listen; add listen"),
        ('model = "a"\nlisten = "unix:/run/a.sock"', "no TCP address; write HOST:PORT"),
        ('model = "a"\nlisten = "here:1"\nmax_duration_s = 0', "greater than 0"),
        ('model = "a"\nlisen = "here:1"\nlisten = "here:1"', "lisen: no such key; did you mean"),
        ('listen = "here:1"\nmodel = "a"\nlog_level = "info"', "above the first [[gateway]]"),
    ],
)
def test_a_wrong_gateway_table(table: str, problem: str, config_file: Path) -> None:
    """The error names the table and the remedy."""
    message = _problem(f"[[gateway]]\n{table}\n", config_file)
    assert message.startswith(f"[[gateway]] number 1 (file {config_file}): ")
    assert problem in message


@pytest.mark.parametrize("text", ["demo", "=127.0.0.1:1", "demo=", "demo=unix:/x", "demo=here"])
def test_a_wrong_gateway_flag(text: str) -> None:
    """The error quotes it and says what to write."""
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"gateway": [text]}, {})
    assert str(caught.value).startswith(f"gateway '{text}' (flag --gateway): ")
    assert "HOST:PORT" in str(caught.value)


# ---------------------------------------------------------------- the file


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """A config file that is named must exist."""
    missing = tmp_path / "none.toml"
    with pytest.raises(SettingsError, match="No such file or directory; name a TOML file"):
        load_settings(missing, {}, {})


@pytest.mark.parametrize(
    "content",
    [b"max_batch_size", b"\xff = 1", b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000],
    ids=["syntax", "encoding", "nesting", "number"],
)
def test_a_file_that_is_no_toml_is_an_error(content: bytes, config_file: Path) -> None:
    """Broken syntax, encoding or nesting is one error line, never a traceback."""
    config_file.write_bytes(content)
    with pytest.raises(SettingsError, match="not TOML") as caught:
        load_settings(config_file, {}, {})
    assert "\n" not in str(caught.value)


def test_relative_paths_start_from_their_source(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file a path starts from the file's folder, elsewhere from the working folder."""
    # Temporary folders on macOS have longer names than a socket's path may.
    monkeypatch.setattr(fields, "_MAX_SOCKET_PATH_BYTES", 1000)
    config_file.write_text(
        'models_dir = "models"\nlisten = ["unix:mlxpool.sock"]\n'
        'models = [{ name = "chat", path = "../chat" }]\n'
    )
    settings = load_settings(config_file, {"blas_library": "lib/blas.so"}, {})
    assert settings.models_dir == config_file.parent / "models"
    assert settings.models[0].source == config_file.parent / "../chat"
    assert settings.listen == (f"unix:{config_file.parent}/mlxpool.sock",)
    assert settings.blas_library == Path.cwd() / "lib/blas.so"


# ---------------------------------------------------------------- models


def test_a_model_table_becomes_a_model(config_file: Path) -> None:
    """Every key of a [[models]] table reaches the ModelSpec."""
    config_file.write_text(
        '[[models]]\nname = "chat"\nhub = "org/repo"\nrevision = "v1"\naliases = ["default"]\n'
        'pinned = true\npreload = true\nkeep_alive_s = "never"\nlayout = "bfloat16"\n'
        "kv_bits = 4\nkv_group_size = 32\nprompt_lookup_tokens = 8\n"
        '[[models]]\nname = "local"\npath = "/srv/local"\nkv_bits = 8\n'
        'draft_model = "chat"\nnum_draft_tokens = 7\n'
        'adapters = { pirate = "/srv/pirate", poet = "poet" }\n'
    )
    settings = load_settings(config_file, {}, {})
    assert settings.models == (
        ModelSpec(
            "chat",
            HubSource("org/repo", "v1"),
            aliases=("default",),
            pinned=True,
            preload=True,
            keep_alive_s=math.inf,
            layout=Layout.BFLOAT16,
            kv_quantization=KvQuantization(4, 32),
            prompt_lookup_tokens=8,
        ),
        ModelSpec(
            "local",
            Path("/srv/local"),
            kv_quantization=KvQuantization(8),
            adapters=(("pirate", Path("/srv/pirate")), ("poet", config_file.parent / "poet")),
            draft_model="chat",
            num_draft_tokens=7,
        ),
    )
    assert not settings.serves_demo_model


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('name = "a"', "needs either path or hub; write exactly one of the two"),
        ('name = "a"\npath = "x"\nhub = "o/r"', "needs either path or hub"),
        ('path = "x"', "has no name; add name"),
        ('name = "a"\npath = "x"\nrevision = "v1"', "revision belongs to hub, not to path"),
        ('name = "a"\nhub = "o/r@v1"\nrevision = "v1"', "has two revisions"),
        ('name = "a"\nhub = "repo"', "'repo' is neither a folder nor a hub id"),
        ('name = "a"\npath = "x"\nalias = "b"', "alias: no such key; did you mean aliases?"),
        ('name = "a"\npath = "x"\nlisten = "b"', "move it above the first [[models]]"),
        ('name = "a"\npath = "x"\naliases = "b"', "aliases = 'b': input should be"),
        ('name = "a"\npath = "x"\nkeep_alive_s = -1', "keep_alive_s = -1: not a keep-alive"),
        ('name = "a"\npath = "x"\nprompt_lookup_tokens = 17', "less than or equal to 16"),
        ('name = "a"\npath = "x"\nnum_draft_tokens = 2', "num_draft_tokens without draft_model"),
        (
            'name = "a"\npath = "x"\ndraft_model = "b"\nprompt_lookup_tokens = 2',
            "has draft_model and prompt_lookup_tokens",
        ),
        ('name = "a"\npath = "x"\nadapters = { "a+b" = "y" }', "adapters: 'a+b' is not a valid"),
        ('name = "a"\npath = "x"\nkv_bits = 5', "kv_bits = 5: input should be 4 or 8"),
        ('name = "a"\npath = "x"\nkv_group_size = 32', "kv_group_size without kv_bits"),
        ('name = "a"\npath = "x"\nlayout = "q4"', "layout = 'q4': input should be 'auto'"),
    ],
)
def test_a_wrong_model_table_is_named_by_number(
    table: str, problem: str, config_file: Path
) -> None:
    """An error in a [[models]] table says which table, which key, and the remedy."""
    good = '[[models]]\nname = "good"\npath = "x"\n'
    message = _problem(f"{good}[[models]]\n{table}\n", config_file)
    assert message.startswith(f"[[models]] number 2 (file {config_file}): ")
    assert problem in message


def test_an_entry_that_is_no_table_is_an_error(config_file: Path) -> None:
    """An array of numbers is refused like any other wrong value."""
    assert "the table = 1" in _problem("models = [1]\n", config_file)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("org/repo", HubSource("org/repo")),
        ("org/repo@v1.0", HubSource("org/repo", "v1.0")),
        ("org/repo@refs/pr/1", HubSource("org/repo", "refs/pr/1")),
        ("/srv/a=b", Path("/srv/a=b")),
        ("./chat", "chat"),
        ("org/local", "org/local"),
    ],
)
def test_a_model_flag_is_a_path_or_a_hub_id(text: str, source: HubSource | Path | str) -> None:
    """NAME=SOURCE is a path by its first character or because the folder exists, else a hub id."""
    Path("org/local").mkdir(parents=True)
    settings = load_settings(None, {"models": [f"chat={text}"]}, {})
    expected = Path.cwd() / source if isinstance(source, str) else source
    assert settings.models == (ModelSpec("chat", expected),)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of NAME=~/x to us."""
    monkeypatch.setenv("HOME", "/home/me")
    settings = load_settings(None, {"models": ["chat=~/x"]}, {})
    assert settings.models[0].source == Path("/home/me/x")


def test_several_models_fit_one_variable() -> None:
    """MLXPOOL_MODELS separates its models by commas."""
    settings = load_settings(None, {}, {"MLXPOOL_MODELS": "a=org/a, b=org/b"})
    assert [spec.name for spec in settings.models] == ["a", "b"]


# ---------------------------------------------------------------- documentation


def test_every_setting_is_described() -> None:
    """A setting cannot be added without a kind of value, a description and an example."""
    for row in describe_settings():
        assert row.type, row.name
        assert row.description.endswith("."), row.name
        assert row.example, row.name
        assert "|" not in row.type + row.default + row.description, row.name


def test_the_documented_table_is_the_fields() -> None:
    """docs/configuration.md holds exactly the table that the fields give."""
    assert render_settings_table() in (_DOCS / "configuration.md").read_text(), (
        "replace the table by what `python -m mlxpool_server.settings` prints"
    )


def test_the_example_config_is_valid_and_complete() -> None:
    """docs/example.toml loads as it is, and mentions every setting."""
    example = _DOCS / "example.toml"
    assert load_settings(example, {}, {}) == Settings()
    lines = [line.removeprefix("# ") for line in example.read_text().splitlines()]
    for row in describe_settings():
        is_table = row.name in {"models", "gateway"}
        prefixes = f"[[{row.name}]]" if is_table else f"{row.name} = "
        assert any(line.startswith(prefixes) for line in lines), row.name


def test_the_example_config_is_valid_with_every_comment_opened(tmp_path: Path) -> None:
    """Each commented setting of docs/example.toml is accepted once its `# ` is removed."""
    lines = (_DOCS / "example.toml").read_text().splitlines()
    opened = [line.removeprefix("# ") for line in lines if not line.startswith("## ")]
    file = tmp_path / "opened.toml"
    file.write_text("\n".join(opened))
    settings = load_settings(file, {}, {})
    assert settings.models
    for row in describe_settings():
        assert row.name in settings.model_fields_set
