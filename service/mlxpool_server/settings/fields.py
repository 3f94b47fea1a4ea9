"""The settings themselves: declared once for the file, the environment, the flags and the docs."""

import ipaddress
import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from mlxpool_server.domain import Layout, ModelSpec
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


Address = Annotated[str, AfterValidator(_address)]
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
    drain_grace_s: Seconds = Field(
        default=30.0,
        ge=0,
        title="seconds",
        description="How long streams may finish after the first SIGTERM or SIGINT.",
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
        description="Threads that BLAS uses (Linux CPU). Unset: by the cores of this process.",
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
