"""The catalogue: the only names that requests can reach, and where each one's weights are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mlxpool_server.domain import ModelSpec
from mlxpool_server.errors import AdapterNotFoundError, ModelNotFoundError, SettingsError
from mlxpool_server.pool.config_file import ConfigFileError, read_config_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:-]{0,199}")
# Together these keep an error's text and details well below the 4 KiB that metadata has room for.
_MAX_ECHOED_CHARS = 100
_MAX_KNOWN_NAMES = 8
_MAX_KNOWN_CHARS = 500


@dataclass(frozen=True, slots=True)
class SkippedFolder:
    """A subfolder of models_dir that is not served, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Catalog:
    """The allow-list. Immutable, so any thread may read it; look-ups never touch the disk."""

    skipped: tuple[SkippedFolder, ...]
    _specs: Mapping[str, ModelSpec]
    # Aliases and names alike, to the name.
    _names: Mapping[str, str]

    @classmethod
    def build(cls, specs: Iterable[ModelSpec], models_dir: Path | None = None) -> Catalog:
        """Join the configured models with the folders of `models_dir`.

        A folder that a configured model points to is that model, not a second one.
        Raises: SettingsError when a name is invalid or taken twice, or models_dir is no folder.
        """
        configured = tuple(specs)
        found: tuple[ModelSpec, ...] = ()
        skipped: tuple[SkippedFolder, ...] = ()
        if models_dir is not None:
            taken = {s.source.resolve() for s in configured if isinstance(s.source, Path)}
            found, skipped = _scan(models_dir, taken)
        by_name = {spec.name: spec for spec in (*configured, *found)}
        names = _index((*configured, *found))
        paired = {name: _paired(spec, by_name, names) for name, spec in by_name.items()}
        return cls(
            skipped=skipped,
            _specs=MappingProxyType(dict(sorted(paired.items()))),
            _names=MappingProxyType(names),
        )

    def resolve(self, name: str) -> ModelSpec:
        """Return the model with this name or alias. Raises: ModelNotFoundError."""
        try:
            return self._specs[self._names[name]]
        except KeyError:
            raise ModelNotFoundError(_clipped(name), known=self._some_names()) from None

    def resolve_adapter(self, name: str, adapter: str) -> ModelSpec:
        """Return the adapter of the model with this name or alias.

        Raises: ModelNotFoundError, AdapterNotFoundError.
        """
        spec = self.resolve(name)
        folders = dict(spec.adapters)
        if adapter not in folders:
            known = tuple(list(folders)[:_MAX_KNOWN_NAMES])
            raise AdapterNotFoundError(spec.name, _clipped(adapter), known)
        return spec.of_adapter(adapter, folders[adapter])

    def adapters(self) -> Iterator[ModelSpec]:
        """Iterate over the adapters of all models."""
        return (spec.of_adapter(*each) for spec in self for each in spec.adapters)

    def __iter__(self) -> Iterator[ModelSpec]:
        """Iterate over the models in the order of their names."""
        return iter(self._specs.values())

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _some_names(self) -> tuple[str, ...]:
        some: list[str] = []
        for name in self._specs:
            if len(some) == _MAX_KNOWN_NAMES or sum(map(len, (*some, name))) > _MAX_KNOWN_CHARS:
                break
            some.append(name)
        return tuple(some)


def read_model_type(folder: Path) -> str:
    """Return `model_type` from the folder's config.json; reads no weights.

    Raises: SettingsError when the folder holds no model.
    """
    config_file = folder / "config.json"
    try:
        config = read_config_file(config_file)
    except OSError as error:
        raise SettingsError(
            f"{config_file}: {error.strerror or 'cannot be read'}; "
            "point the model at a folder that holds a model in MLX format"
        ) from None
    except ConfigFileError as error:
        raise SettingsError(f"{config_file}: {error}") from None
    return str(config["model_type"])


def _clipped(name: str) -> str:
    return name if len(name) <= _MAX_ECHOED_CHARS else f"{name[:_MAX_ECHOED_CHARS]}…"


def _is_valid(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and ".." not in name


def _index(specs: Iterable[ModelSpec]) -> dict[str, str]:
    """Map every name and alias to its model's name. Raises: SettingsError."""
    names: dict[str, str] = {}
    for spec in specs:
        for name in (spec.name, *spec.aliases):
            what = f"model {spec.name!r}" if name == spec.name else f"alias {name!r}"
            if not _is_valid(name):
                raise SettingsError(
                    f"{_clipped(what)}: not a valid name; write up to 200 letters, digits and "
                    "._-/@: without '..', with a letter or digit first"
                )
            if name in names:
                raise SettingsError(
                    f"{what} of {_where(spec)}: the name is taken by model {names[name]!r}; "
                    "rename one of the two"
                )
            names[name] = spec.name
    return names


def _paired(spec: ModelSpec, specs: Mapping[str, ModelSpec], names: Mapping[str, str]) -> ModelSpec:
    """With its draft model. Raises: SettingsError."""
    if not spec.draft_model:
        return spec
    name = names.get(spec.draft_model)
    if name is None or name == spec.name:
        raise SettingsError(
            f"model {spec.name!r}: its draft_model {_clipped(spec.draft_model)!r} is no other "
            "model of the catalogue; name one that is"
        )
    return spec.with_draft(specs[name])


def _where(spec: ModelSpec) -> str:
    return str(spec.source) if isinstance(spec.source, Path) else spec.source.repo_id


def _scan(
    models_dir: Path, taken: set[Path]
) -> tuple[tuple[ModelSpec, ...], tuple[SkippedFolder, ...]]:
    """Return the models in `models_dir` and the folders that are none."""
    try:
        root = models_dir.resolve()
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    except (OSError, RuntimeError) as error:
        problem = getattr(error, "strerror", None) or "cannot be read"
        raise SettingsError(
            f"models_dir {models_dir}: {problem}; point it at a folder that holds model folders"
        ) from None
    found: list[ModelSpec] = []
    skipped: list[SkippedFolder] = []
    for folder in folders:
        if folder.resolve() in taken:
            continue
        reason = _reason_to_skip(folder, root)
        if reason:
            skipped.append(SkippedFolder(folder, reason))
        else:
            found.append(ModelSpec(folder.name, folder))
    return tuple(found), tuple(skipped)


def _reason_to_skip(folder: Path, root: Path) -> str:
    if folder.name.startswith("."):
        return "hidden"
    if not folder.resolve().is_relative_to(root):
        return "a link that leaves models_dir"
    if not _is_valid(folder.name):
        return "its name is not a valid model name"
    try:
        return "" if (folder / "config.json").is_file() else "has no config.json"
    except OSError:
        return "cannot be read"
