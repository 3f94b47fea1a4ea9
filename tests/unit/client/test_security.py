"""TLS and API keys, as both clients and the command send them."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc import aio

from fakes.certificates import Authority
from mlxpool_client import AsyncClient, Client, Tls
from mlxpool_client.cli import main
from mlxpool_client.errors import AccessDeniedError, RateLimitedError
from mlxpool_server.rpc.access.keys import hash_of, new_key
from rpc.harness import running_server

KEY = new_key()
REMOTE = "gpu-box:50051"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(
        f'[[keys]]\nname = "k"\nsha256 = "{hash_of(KEY)}"\nroles = ["inference", "observer"]\n'
    )
    return file


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


async def test_the_async_client(tmp_path: Path, keys_file: Path) -> None:
    """Mutual TLS and a key: every kind of call gets through; without the key none does."""
    authority, clients = Authority(), Authority("clients")
    certificate, key = authority.issue().write(tmp_path)
    ca, clients_ca = tmp_path / "ca.crt", tmp_path / "clients.crt"
    ca.write_bytes(authority.pem)
    clients_ca.write_bytes(clients.pem)
    mine = clients.issue("me").write(tmp_path, "me")
    async with running_server(
        credentials=grpc.ssl_channel_credentials(authority.pem),
        tls_certificate=certificate,
        tls_key=key,
        tls_client_ca=clients_ca,
        api_keys_file=keys_file,
    ) as server:
        tls = Tls(ca, *mine)
        async with AsyncClient(server.address, tls=tls, api_key=KEY) as client:
            assert await client.generate_text("m", "hello") == "hello"
            assert await client.count_tokens("m", "hello") == 5
            async with client.watch_memory_usage() as usages:
                await anext(aiter(usages))
            with pytest.raises(AccessDeniedError, match="needs the role admin"):
                await client.load_model("m").result()
        async with AsyncClient(server.address, tls=tls) as client:
            with pytest.raises(AccessDeniedError, match="needs an API key"):
                await client.list_models()


async def test_a_rate_limit_has_its_error(keys_file: Path) -> None:
    """With the time to wait."""
    _append(keys_file, "requests_per_minute = 1\n")
    async with (
        running_server(api_keys_file=keys_file) as server,
        AsyncClient(server.address, api_key=KEY) as client,
    ):
        await client.list_models()
        with pytest.raises(RateLimitedError) as caught:
            await client.list_models()
        assert caught.value.retry_after_s is not None
        assert 0 < caught.value.retry_after_s <= 60


def test_a_key_is_not_sent_in_plaintext() -> None:
    """Not to another machine, unless the caller says that the network is trusted."""
    with pytest.raises(ValueError, match="would travel to gpu-box:50051 in plaintext"):
        Client(REMOTE, api_key=KEY)
    for client in (
        Client(REMOTE, api_key=KEY, tls=True),
        Client(REMOTE, api_key=KEY, tls=False),
        Client("127.0.0.1:1", api_key=KEY),
        Client("unix:/tmp/socket", api_key=KEY),
        Client(REMOTE),
    ):
        client.close()


async def test_the_async_client_does_not_either() -> None:
    """The same rule."""
    with pytest.raises(ValueError, match="in plaintext"):
        AsyncClient(REMOTE, api_key=KEY)
    async with aio.insecure_channel(REMOTE) as channel:
        # A channel of the caller's own is the caller's own business.
        AsyncClient(REMOTE, api_key=KEY, channel=channel)


@pytest.mark.parametrize("key", ["", " ", "a b", "line\n", "schlüssel", "\0"])
def test_what_is_no_key(key: str) -> None:
    """Is refused before a call fails on it, and not repeated."""
    with pytest.raises(ValueError, match="characters that no key has"):
        Client(api_key=key)


def test_half_a_client_certificate() -> None:
    """A certificate is nothing without its key."""
    with pytest.raises(ValueError, match="needs its key"):
        Client(tls=Tls(certificate="me.crt"))


def test_tls_and_credentials() -> None:
    """One of the two."""
    with pytest.raises(ValueError, match="not both"):
        Client(tls=True, credentials=grpc.ssl_channel_credentials())


# ---------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGET", "TLS", "CA", "CLIENT_CERT", "CLIENT_KEY", "API_KEY"):
        monkeypatch.delenv(f"MLXPOOL_{name}", raising=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What the command makes its client with; it fails there."""
    seen: list[dict[str, object]] = []

    def client(target: str, **options: object) -> None:
        seen.append({"target": target} | options)
        raise ValueError("far enough")

    monkeypatch.setattr("mlxpool_client.cli.arguments.Client", client)
    return seen


@pytest.mark.parametrize(
    ("flags", "variables", "tls"),
    [
        ([], {}, None),
        (["--tls"], {}, True),
        (["--no-tls"], {"TLS": "1", "CA": "ca"}, False),
        ([], {"TLS": "1"}, True),
        ([], {"TLS": "0"}, False),
        (["--ca", "ca"], {}, Tls("ca")),
        ([], {"CA": "ca"}, Tls("ca")),
        (["--ca", "mine"], {"CA": "ca"}, Tls("mine")),
        (["--cert", "c", "--key", "k"], {}, Tls(None, "c", "k")),
        ([], {"CLIENT_CERT": "c", "CLIENT_KEY": "k"}, Tls(None, "c", "k")),
    ],
)
def test_tls_options(
    opened: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    variables: dict[str, str],
    tls: object,
) -> None:
    """Flags before and after the command, and the environment where there is no flag."""
    for name, value in variables.items():
        monkeypatch.setenv(f"MLXPOOL_{name}", value)
    main([*flags, "models"])
    main(["models", *flags])
    assert [each["tls"] for each in opened] == [tls, tls]


def test_the_keys_file(
    opened: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its one line is the key; the environment's is used without it."""
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("MLXPOOL_API_KEY", "from-environment")
    main(["models"])
    main(["models", "--api-key-file", str(file)])
    assert [each["api_key"] for each in opened] == ["from-environment", "from-file"]


@pytest.mark.parametrize(
    ("arguments", "variables", "problem"),
    [
        (["--api-key-file", "/nowhere"], {}, "/nowhere: No such file or directory"),
        (["--ca", "/nowhere"], {}, "/nowhere: No such file or directory"),
        (["--cert", "/nowhere"], {}, "needs its key"),
        ([], {"TLS": "maybe"}, "MLXPOOL_TLS is 'maybe'; write 1 or 0"),
        (["--target", REMOTE], {"API_KEY": KEY}, "use TLS (tls=True, --tls)"),
    ],
)
def test_what_cannot_be_used(
    arguments: list[str],
    variables: dict[str, str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong usage, in one line that repeats no key."""
    for name, value in variables.items():
        monkeypatch.setenv(f"MLXPOOL_{name}", value)
    assert main(["models", *arguments]) == 64
    shown = capsys.readouterr().err
    assert problem in shown
    assert KEY not in shown
    assert len(shown.splitlines()) == 1
