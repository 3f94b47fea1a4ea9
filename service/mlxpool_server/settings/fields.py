"""The settings themselves: declared once for the file, the environment, the flags and the docs."""

import ipaddress
import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from mlxpool_server.domain import GatewayPort, Layout, ModelSpec
from mlxpool_server.settings.quantities import parse_bytes, parse_keep_alive, reject_bool

_HOST_NAME = re.compile(r"[\w.-]+", re.ASCII)
_PORT = re.compile(r"\d{1,5}", re.ASCII)
_MAX_PORT = 65535
# macOS has room for 104 bytes with the closing zero, Linux for 108.
_MAX_SOCKET_PATH_BYTES = 103


def _address(text: str) -> str:
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not 0 < len(path.encode()) <= _MAX_SOCKET_PATH_BYTES or "\0" in path:
            raise ValueError(f"needs a socket path of 1 to {_MAX_SOCKET_PATH_BYTES} bytes")
        return text
    host, _, port = text.rpartition(":")
    if not _is_host(host) or _PORT.fullmatch(port) is None or int(port) > _MAX_PORT:
        raise ValueError("no address; write HOST:PORT, [IPV6]:PORT or unix:PATH (port 0: any)")
    return text


def _is_host(text: str) -> bool:
    if not text.startswith("["):
        return _HOST_NAME.fullmatch(text) is not None
    try:
        ipaddress.IPv6Address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return text.endswith("]")


def _tcp_address(text: str) -> str:
    if text.startswith("unix:"):
        raise ValueError("no TCP address; write HOST:PORT or [IPV6]:PORT (port 0: any)")
    return _address(text)


def _http_url(text: str) -> str:
    if re.fullmatch(r"https?://[^\s/]+/?", text) is None:
        raise ValueError("no URL; write http://HOST:4317, or https:// for TLS")
    return text


Address = Annotated[str, AfterValidator(_address)]
TcpAddress = Annotated[str, AfterValidator(_tcp_address)]
Count = Annotated[int, BeforeValidator(reject_bool), Field(ge=1)]
# MLX and gRPC take sizes as 64-bit integers.
Size = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1, le=2**63 - 1)]
CacheSize = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, BeforeValidator(reject_bool), Field(allow_inf_nan=False)]
KeepAlive = Annotated[float, BeforeValidator(parse_keep_alive)]


class Settings(BaseModel):
    """What an operator can choose. A field's title is the kind of value it takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: tuple[Address, ...] = Field(
        default=("127.0.0.1:50051",),
        min_length=1,
        title="address",
        description="Addresses to serve on: `HOST:PORT` (port 0: the kernel picks), "
        "`[IPV6]:PORT` or `unix:PATH`. The flag can be repeated.",
    )
    tls_certificate: Path | None = Field(
        default=None,
        title="file",
        examples=["/etc/mlxpool/tls.crt"],
        description="Certificate chain (PEM) for TLS on every TCP address, the server's own first. "
        "Read again when it changes. Unset: plaintext.",
    )
    tls_key: Path | None = Field(
        default=None,
        title="file",
        examples=["/etc/mlxpool/tls.key"],
        description="Private key of tls_certificate (PEM, no password). Read again when it "
        "changes.",
    )
    tls_client_ca: Path | None = Field(
        default=None,
        title="file",
        examples=["/etc/mlxpool/clients-ca.crt"],
        description="Mutual TLS: only clients with a certificate from one of these (PEM) get in. "
        "Read again when it changes.",
    )
    allow_plaintext: bool = Field(
        default=False,
        title="true or false",
        description="Serve without TLS on addresses that other machines can reach. Without it the "
        "server does not start there.",
    )
    api_keys_file: Path | None = Field(
        default=None,
        title="file",
        examples=["/etc/mlxpool/keys.toml"],
        description="Hashes of the API keys, their roles and limits (TOML, docs/security.md). Read "
        "again when it changes. Unset: everyone may do everything.",
    )
    health_needs_key: bool = Field(
        default=False,
        title="true or false",
        description="Ask for an API key, of any role, for health checks too.",
    )
    models_dir: Path | None = Field(
        default=None,
        title="folder",
        examples=["/srv/models"],
        description="Every subfolder with a config.json is a model named after its folder.",
    )
    models: tuple[InstanceOf[ModelSpec], ...] = Field(
        default=(),
        title="name=source",
        examples=["NAME=ORG/REPO"],
        description="Models by name: `NAME=PATH` or `NAME=ORG/REPO[@REVISION]` (a hub id); "
        "`[[models]]` tables in the file. The flag can be repeated.",
    )
    gateway: tuple[InstanceOf[GatewayPort], ...] = Field(
        default=(),
        title="model=address",
        examples=["demo=127.0.0.1:20000"],
        description="Ports for the Shepherd Model Gateway, one a model: `MODEL=HOST:PORT`; "
        "`[[gateway]]` tables in the file (docs/scaling.md); needs the extra `gateway`. The flag "
        "can be repeated.",
    )
    pool_memory_limit_bytes: Size | None = Field(
        default=None,
        title="size",
        examples=["8GiB"],
        description="What weights, KV caches and prompt caches may take together. "
        "Unset: pool_memory_share of the device's memory.",
    )
    pool_memory_share: Annotated[float, BeforeValidator(reject_bool)] = Field(
        default=0.75,
        gt=0,
        le=1,
        title="fraction",
        description="Share of the device's recommended (or else total) memory that the pool "
        "may take when pool_memory_limit_bytes is not set.",
    )
    prompt_cache_share: Annotated[float, BeforeValidator(reject_bool)] = Field(
        default=0.1,
        ge=0,
        le=0.5,
        title="fraction",
        description="Share of the pool's limit that each model may keep of earlier prompts' KV "
        "cache, for prompts that begin the same. Given back first when memory is short. 0: off.",
    )
    mlx_cache_limit_bytes: CacheSize | None = Field(
        default=None,
        title="size",
        examples=["1GiB"],
        description="Most freed memory that MLX keeps for reuse. Unset: MLX's own default.",
    )
    default_keep_alive_s: KeepAlive = Field(
        default=math.inf,
        title="seconds or never",
        description="How long an idle model stays loaded when neither the model nor the request "
        "says; 0 unloads when idle. Eviction makes room either way.",
    )
    default_layout: Layout = Field(
        default=Layout.AUTO,
        title="layout",
        description="How weights are held in memory unless a model says: `auto` (the fastest "
        "for the device that fits), `stored`, `float32`, `bfloat16`, `float16`.",
    )
    warm_up: bool = Field(
        default=True,
        title="true or false",
        description="Run each model once at the end of its load: a GPU's kernels are compiled "
        "then, and what the model cannot do shows, before the first request waits for it.",
    )
    max_batch_size: Count = Field(
        default=32, title="count", description="Sequences decoded together per model."
    )
    prefill_step_tokens: Count = Field(
        default=512,
        title="count",
        description="Prompt tokens worked on between two decode steps: smaller keeps running "
        "streams smooth, larger starts new ones sooner.",
    )
    max_queued_requests: Count = Field(
        default=256,
        title="count",
        description="Requests that may wait per model; further ones get UNAVAILABLE.",
    )
    max_queue_wait_s: Annotated[Seconds, Field(gt=0)] | None = Field(
        default=None,
        title="seconds",
        examples=["30"],
        description="Longest wait for memory and a place in the batch, the model's load not "
        "counted; then UNAVAILABLE. Unset: as long as the caller waits.",
    )
    default_max_tokens: Count = Field(
        default=4096,
        title="count",
        description="Tokens to generate when a request does not say, or up to the model's context "
        "length if that is less. Memory is reserved for so many, so more means fewer at once.",
    )
    max_prompt_tokens: Count | None = Field(
        default=None,
        title="count",
        examples=["32768"],
        description="Longest prompt accepted. Unset: the model's context length.",
    )
    max_message_bytes: Annotated[Size, Field(ge=1024, lt=2**31)] = Field(
        default=16 * 2**20, title="size", description="Largest gRPC message in either direction."
    )
    max_stop_sequences: Annotated[int, BeforeValidator(reject_bool), Field(ge=0)] = Field(
        default=16, title="count", description="Stop sequences that one request may bring."
    )
    max_stop_sequence_chars: Count = Field(
        default=256, title="count", description="Characters in one stop sequence."
    )
    progress_interval_s: Seconds = Field(
        default=10.0,
        gt=0,
        le=10,
        title="seconds",
        description="Longest silence before a waiting stream reports its progress; "
        "the contract promises at most 10.",
    )
    max_deltas_per_s: Count = Field(
        default=1000,
        title="count",
        description="Messages with new text a second, of all streams together: where more tokens "
        "are generated, a message brings several. A stream's first one never waits.",
    )
    drain_grace_s: Seconds = Field(
        default=30.0,
        ge=0,
        title="seconds",
        description="How long streams may finish after the first SIGTERM or SIGINT.",
    )
    metrics_listen: TcpAddress | None = Field(
        default=None,
        title="address",
        examples=["127.0.0.1:9464"],
        description="Where Prometheus reads /metrics: over TLS if tls_certificate is set, with the "
        "key of an observer if api_keys_file is (docs/metrics.md). Unset: nowhere.",
    )
    otlp_endpoint: Annotated[str, AfterValidator(_http_url)] | None = Field(
        default=None,
        title="URL",
        examples=["http://127.0.0.1:4317"],
        description="Where OpenTelemetry traces go, by OTLP over gRPC (docs/tracing.md); needs the "
        "extra `otel`. Unset: no traces.",
    )
    engine_stuck_s: Annotated[Seconds, Field(gt=0)] = Field(
        default=180.0,
        title="seconds",
        description="How long one step of the engine may take before health says NOT_SERVING. The "
        "first steps on a GPU compile kernels, for most of a minute.",
    )
    engine_exit_s: Annotated[Seconds, Field(gt=0)] = Field(
        default=900.0,
        title="seconds",
        description="How long one step may take before the process ends with exit code 70, so that "
        "whoever supervises it starts a new one.",
    )
    blas_library: Path | None = Field(
        default=None,
        title="file",
        examples=["/usr/lib/libopenblas.so.0"],
        description="BLAS library loaded before MLX (Linux CPU). "
        "Unset: the OpenBLAS that was installed with the server.",
    )
    blas_threads: Count | None = Field(
        default=None,
        title="count",
        examples=["2"],
        description="Threads that BLAS uses (Linux CPU). Unset: measured while serving, up to the "
        "cores of this process.",
    )
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto",
        title="format",
        description="`text`, `json` (lines), or `auto`: text on a terminal, JSON otherwise.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        title="level",
        description="Least severe level logged: `debug`, `info`, `warning`, `error`.",
    )

    @property
    def serves_demo_model(self) -> bool:
        """No model is configured, so that the demo model is served as `demo`."""
        return not self.models and self.models_dir is None
