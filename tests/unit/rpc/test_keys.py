"""API keys: the file, its errors, and a lookup that tells nothing."""

from __future__ import annotations

import hmac
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mlxpool_server import new_key as command
from mlxpool_server.errors import ApiKeyInvalidError, SettingsError
from mlxpool_server.rpc.access import keys as keys_module
from mlxpool_server.rpc.access.keys import KeyRing, hash_of, new_key, read_keys
from mlxpool_server.rpc.access.roles import Role

HASH = "0" * 64


def entry(name: str, key: str, more: str = "") -> str:
    text = f'[[keys]]\nname = "{name}"\nsha256 = "{hash_of(key)}"\nroles = ["inference"]\n'
    return f"{text}{more}\n"


def problem_of(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_keys(file)
    assert str(caught.value).startswith(f"api_keys_file {file}: ")
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_new_keys_are_random() -> None:
    """256 bits each, with a prefix that scanners find."""
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("mlxpool_") and len(key) == 51 for key in made)


def test_an_entry(file: Path) -> None:
    """Name, roles and limits are what the file says."""
    file.write_text(entry("web", "secret", "max_streams = 3\nrequests_per_minute = 60"))
    (key,) = read_keys(file)
    assert (key.name, key.roles) == ("web", {Role.INFERENCE})
    assert (key.max_streams, key.requests_per_minute) == (3, 60)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[keys", "not TOML"),
        ('name = "x"', "holds [[keys]] tables and nothing else"),
        ("keys = 3", "holds [[keys]] tables"),
        ("keys = [3]", "number 1: is no table"),
        (f'[[keys]]\nsha256 = "{HASH}"', "needs a name"),
        (f'[[keys]]\nname = "a b"\nsha256 = "{HASH}"', "needs a name"),
        ('[[keys]]\nname = "a"\nroles = ["admin"]', "needs the key's sha256"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH.upper()}F"', "needs the key's sha256"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"', "needs roles, a list of inference"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\nroles = []', "needs roles"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\nroles = "admin"', "needs roles, a list"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\nroles = ["root"]', "unknown role"),
        (entry("a", "k", "max_streams = 0"), "max_streams has to be a whole number from 1"),
        (entry("a", "k", "max_streams = true"), "max_streams has to be"),
        (entry("a", "k", "requests_per_minute = 1.5"), "requests_per_minute has to be"),
        (entry("a", "k", "max_stream = 3"), "has an unknown field; there are name, sha256"),
        (entry("a", "k") + entry("a", "l"), "two keys have the same name"),
        (entry("a", "k") + entry("b", "k"), "two keys have the same sha256"),
    ],
)
def test_a_wrong_file(file: Path, text: str, problem: str) -> None:
    """One line that names the file, the entry and the remedy."""
    message = problem_of(file, text)
    assert problem in message
    assert "\n" not in message


def test_errors_quote_nothing_of_the_file(file: Path) -> None:
    """A key that somebody put there by mistake does not get into the log."""
    key = new_key()
    for text in (
        f"keys = {key}",
        f'[[keys]]\nname = "{key}!"',
        f'[[keys]]\nname = "a"\nsha256 = "{key}"',
        f'[[keys]]\n{key} = "a"',
        f'{entry("a", "k")}x = "{key}"',
    ):
        assert key not in problem_of(file, text)


def test_a_missing_file(file: Path) -> None:
    """Stops the start."""
    with pytest.raises(SettingsError, match="No such file"):
        KeyRing(file)


def test_a_huge_file_is_not_read(file: Path) -> None:
    """Its size is looked at first."""
    with file.open("wb") as sparse:
        sparse.truncate(keys_module.MAX_FILE_BYTES + 1)
    with pytest.raises(SettingsError, match="larger than"):
        KeyRing(file)


def test_find(file: Path) -> None:
    """By the whole key, and nothing but the key."""
    file.write_text(entry("a", "key-a") + entry("b", "key-b"))
    ring = KeyRing(file)
    assert ring.find("key-b").name == "b"
    for wrong in (
        "key-",
        "key-a ",
        "key-bb",
        "KEY-A",
        "",
        hash_of("key-a"),
        "k" * 10_000,
        "\udc80",
    ):
        with pytest.raises(ApiKeyInvalidError):
            ring.find(wrong)


@pytest.fixture(scope="module")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    """A ring without keys."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.touch()
    return KeyRing(file)


@given(key=st.text(max_size=600))
def test_nobody_guesses(nobody: KeyRing, key: str) -> None:
    """Whatever is sent, it is refused as invalid, and not repeated."""
    with pytest.raises(ApiKeyInvalidError) as caught:
        nobody.find(key)
    assert len(key) < 8 or key not in str(caught.value)


@pytest.mark.parametrize("key", ["key-a", "key-b", "key-c"])
def test_every_entry_is_compared(file: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """In constant time, and all of them, so that timing does not say which one matched."""
    file.write_text(entry("a", "key-a") + entry("b", "key-b"))
    ring = KeyRing(file)
    compared: list[str] = []

    def compare(known: str, given: str) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, given)

    monkeypatch.setattr(keys_module, "hmac", SimpleNamespace(compare_digest=compare))
    try:
        ring.find(key)
    except ApiKeyInvalidError:
        assert key == "key-c"
    assert compared == [hash_of("key-a"), hash_of("key-b")]


def test_a_changed_file_is_read_again(file: Path) -> None:
    """From the next call on: a key that was taken out is refused."""
    file.write_text(entry("a", "key-a"))
    ring = KeyRing(file)
    file.write_text(entry("b", "key-b") + entry("c", "key-c"))
    with capture_logs() as logs:
        assert ring.find("key-c").name == "c"
        with pytest.raises(ApiKeyInvalidError):
            ring.find("key-a")
    assert [line["event"] for line in logs] == ["api_keys.reloaded"]


@pytest.mark.parametrize("how", ["broken", "gone"])
def test_a_bad_file_changes_nothing(file: Path, how: str) -> None:
    """The keys in force stay, and the log says why, once."""
    file.write_text(entry("a", "key-a"))
    ring = KeyRing(file)
    if how == "gone":
        file.unlink()
    else:
        file.write_text("[[keys")
    with capture_logs() as logs:
        assert ring.find("key-a").name == "a"
        assert ring.find("key-a").name == "a"
    assert [line["event"] for line in logs] == ["api_keys.not_reloaded"]
    file.write_text(entry("b", "key-b"))
    assert ring.find("key-b").name == "b"


# ---------------------------------------------------------------- mlxpool new-key


def test_the_commands_entry_is_what_the_file_wants(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlxpool new-key NAME >> keys.toml` adds a key that then works."""
    for name in ("web", "ops"):
        flags = ["--role", "admin", "--role", "observer", "--max-streams", "3"]
        assert command.main([name, *flags, "--requests-per-minute", "60"]) == 0
        shown = capsys.readouterr()
        (key,) = [word for word in shown.err.split() if word.startswith("mlxpool_")]
        assert key not in shown.out
        with file.open("a") as out:
            out.write(shown.out)
        found = KeyRing(file).find(key)
        assert (found.name, found.roles) == (name, {Role.ADMIN, Role.OBSERVER})
        assert (found.max_streams, found.requests_per_minute) == (3, 60)
    assert len(tomllib.loads(file.read_text())["keys"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a b"],
        ["a", "--role", "root"],
        ["a", "--max-streams", "0"],
        ["a", "--max-streams", "x"],
    ],
)
def test_wrong_usage_makes_no_key(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 64, one line, and nothing that could be appended to a file."""
    assert command.main(arguments) == 64
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "mlxpool new-key: error: " in shown.err
    assert "mlxpool_" not in shown.err


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """The event loop reads the file: nobody may ever write to a pipe."""
    os.mkfifo(tmp_path / "keys.toml")
    with pytest.raises(SettingsError, match="is no regular file"):
        read_keys(tmp_path / "keys.toml")


def test_a_file_that_everyone_may_write_to(tmp_path: Path) -> None:
    """Whoever writes to it lets himself in."""
    file = tmp_path / "keys.toml"
    file.write_text("")
    file.chmod(0o666)
    with pytest.raises(SettingsError, match="chmod o-w"):
        read_keys(file)
    file.chmod(0o664)
    assert read_keys(file) == ()
