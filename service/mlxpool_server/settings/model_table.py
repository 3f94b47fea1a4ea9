"""A model as operators write it: a `[[models]]` table or `NAME=PATH_OR_HUB_ID`."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlxpool_server.domain import DRAFT_TOKENS, HubSource, KvQuantization, Layout, ModelSpec
from mlxpool_server.settings.quantities import parse_keep_alive, reject_bool

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,254}))?",
    re.ASCII,
)


_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class ModelTable(BaseModel):
    """One `[[models]]` table. Exactly one of `path` and `hub` says where the weights are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    preload: bool = False
    keep_alive_s: Annotated[float | None, BeforeValidator(parse_keep_alive)] = None
    layout: Layout = Layout.AUTO
    kv_bits: Literal[4, 8] | None = None
    kv_group_size: Literal[32, 64, 128] | None = None
    adapters: dict[str, str] = Field(default_factory=dict)
    draft_model: str | None = None
    num_draft_tokens: Annotated[int | None, BeforeValidator(reject_bool), Field(ge=1, le=16)] = None
    prompt_lookup_tokens: Annotated[int, BeforeValidator(reject_bool), Field(ge=0, le=16)] = 0

    def domain_value(self, folder: Path) -> ModelSpec:
        """Return the domain's value; a relative path starts from `folder`.

        Raises: ValueError, whose text ends with the remedy.
        """
        return ModelSpec(
            name=self.name,
            source=self._source(folder),
            aliases=self.aliases,
            pinned=self.pinned,
            preload=self.preload,
            keep_alive_s=self.keep_alive_s,
            layout=self.layout,
            kv_quantization=self._kv_quantization(),
            prompt_lookup_tokens=self.prompt_lookup_tokens,
            adapters=self._adapters(folder),
            draft_model=self._draft_model(),
            num_draft_tokens=self.num_draft_tokens or DRAFT_TOKENS,
        )

    def _adapters(self, folder: Path) -> tuple[tuple[str, Path], ...]:
        for name in self.adapters:
            if _ADAPTER_NAME.fullmatch(name) is None:
                raise ValueError(
                    f"adapters: {name[:100]!r} is not a valid name; write up to 200 letters, "
                    "digits and ._-, with a letter or digit first"
                )
        return tuple((name, anchored_path(path, folder)) for name, path in self.adapters.items())

    def _draft_model(self) -> str:
        if self.num_draft_tokens is not None and self.draft_model is None:
            raise ValueError("has num_draft_tokens without draft_model; write both or neither")
        if self.draft_model is not None and self.prompt_lookup_tokens:
            raise ValueError("has draft_model and prompt_lookup_tokens; write one of them")
        return self.draft_model or ""

    def _kv_quantization(self) -> KvQuantization | None:
        if self.kv_bits is None:
            if self.kv_group_size is not None:
                raise ValueError("has kv_group_size without kv_bits; write both or neither")
            return None
        if self.kv_group_size is None:
            return KvQuantization(self.kv_bits)
        return KvQuantization(self.kv_bits, self.kv_group_size)

    def _source(self, folder: Path) -> Path | HubSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("needs either path or hub; write exactly one of the two")
        if self.path is not None:
            if self.revision is not None:
                raise ValueError("revision belongs to hub, not to path; remove it")
            return anchored_path(self.path, folder)
        source = parse_hub_id(self.hub or "")
        if self.revision is None:
            return source
        if source.revision is not None:
            raise ValueError("has two revisions; write it after @ or as revision, not both")
        return parse_hub_id(f"{source.repo_id}@{self.revision}")


def parse_model_flag(text: str, folder: Path) -> ModelSpec:
    """Read `NAME=PATH_OR_HUB_ID`; a relative path starts from `folder`.

    A value that starts with / . or ~, or names an existing folder, is a path.
    Raises: ValueError, whose text ends with the remedy.
    """
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise ValueError("not a model; write NAME=PATH or NAME=ORG/REPO[@REVISION]")
    if source.startswith(("/", ".", "~")) or (folder / source).is_dir():
        return ModelSpec(name, anchored_path(source, folder))
    return ModelSpec(name, parse_hub_id(source))


def parse_hub_id(text: str) -> HubSource:
    """Read `ORG/REPO[@REVISION]`. Raises: ValueError, whose text ends with the remedy."""
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text:
        raise ValueError(
            f"{text[:200]!r} is neither a folder nor a hub id; "
            "write a path that starts with / . or ~, or ORG/REPO[@REVISION]"
        )
    return HubSource(match["repo"], match["revision"])


def anchored_path(text: str, folder: Path) -> Path:
    """Return `text` as an absolute path; `~` is the home, a relative path starts from `folder`.

    Raises: ValueError, whose text ends with the remedy.
    """
    if not text or "\0" in text:
        raise ValueError("not a path; write a file's or folder's name")
    try:
        # Not resolved: a symlink that is swapped while the server runs is followed anew.
        return folder.absolute() / Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder for {text[:200]!r}; write the path in full") from None
