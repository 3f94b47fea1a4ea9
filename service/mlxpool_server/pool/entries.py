"""Every model the pool knows: what the catalogue names, and what has left it but still runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import structlog

from mlxpool_server.domain import ModelSpec, ModelState
from mlxpool_server.errors import LoadSupersededError
from mlxpool_server.pool.activity import Activity
from mlxpool_server.pool.broadcast import Broadcast
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.tasks import Tasks
from mlxpool_server.pool.unloads import Unloads

log = structlog.get_logger(__name__)


class Entries(Mapping[str, Entry]):
    """By name. Event loop only."""

    def __init__(
        self,
        catalog: Catalog,
        default_keep_alive_s: float,
        *,
        activity: Activity,
        changed: Broadcast,
        tasks: Tasks,
        heartbeat_s: float,
    ) -> None:
        self._catalog = catalog
        self._default_keep_alive_s = default_keep_alive_s
        self._activity = activity
        self._changed = changed
        self._tasks = tasks
        self._heartbeat_s = heartbeat_s
        self._is_closed = False
        self._entries = {spec.name: self._new(spec) for spec in _all(catalog)}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def resolve(self, name: str, adapter: str = "") -> Entry:
        """By name or alias, for a new request; the entry of its adapter, if one is named.

        Raises: ModelNotFoundError, AdapterNotFoundError.
        """
        if adapter:
            return self._entries[self._catalog.resolve_adapter(name, adapter).name]
        return self._entries[self._catalog.resolve(name).name]

    def known(self, name: str) -> Entry:
        """As `resolve`, for who uses it already: it may have left the catalogue."""
        return self._entries.get(name) or self.resolve(name)

    def set_catalog(
        self, catalog: Catalog, default_keep_alive_s: float, unloads: Unloads
    ) -> tuple[Entry, ...]:
        """Take over another catalogue; return the entries that are new.

        One that is gone is not found any more; what runs on it ends in peace, and then it goes. One
        whose files are others, or are held in another way, leaves likewise, and is loaded anew by
        the next request.
        """
        self._catalog = catalog
        self._default_keep_alive_s = default_keep_alive_s
        added: list[Entry] = []
        for spec in _all(catalog):
            entry = self._entries.get(spec.name)
            if entry is None:
                added.append(self._new(spec))
            else:
                self._renew(entry, spec, unloads)
        self._entries |= {entry.spec.name: entry for entry in added}
        names = {spec.name for spec in _all(catalog)}
        for name, entry in self._entries.items():
            if name not in names and not entry.is_retired:
                entry.is_retired = True
                self._tasks.start(self._retire(entry, unloads))
        self._changed.notify()
        return tuple(added)

    def close(self) -> None:
        """Wait for no one's end any more: everyone is being ended."""
        self._is_closed = True
        self._changed.notify()

    def _new(self, spec: ModelSpec) -> Entry:
        return Entry(spec, self._default_keep_alive_s, self._activity, self._changed)

    def _renew(self, entry: Entry, spec: ModelSpec, unloads: Unloads) -> None:
        """What an operator changed is in force; what LoadModel set otherwise stays."""
        is_other = not entry.spec.is_held_as(spec)
        entry.is_retired = False
        entry.renew(spec, self._default_keep_alive_s)
        if is_other:
            entry.info = None
            entry.error_message = ""
            _let_go(entry, unloads)
        unloads.schedule_expiry(entry)

    async def _retire(self, entry: Entry, unloads: Unloads) -> None:
        """Drop it once nothing uses it; a later catalogue may bring it back before that."""
        while entry.is_retired and not self._is_closed:
            residency = entry.residency
            if entry.num_leases > 0:
                await self._changed.wait(self._heartbeat_s)
            elif residency is not None:
                _let_go(entry, unloads)
                await residency.gone.wait()
            else:
                # A second removal may have been quicker.
                if self._entries.pop(entry.spec.name, None) is not None:
                    log.info("model.removed", model=entry.spec.name)
                return


def _let_go(entry: Entry, unloads: Unloads) -> None:
    is_loading = entry.residency is not None and entry.residency.state is ModelState.LOADING
    unloads.start(entry, LoadSupersededError(entry.spec.name) if is_loading else None)


def _all(catalog: Catalog) -> Iterator[ModelSpec]:
    yield from catalog
    yield from catalog.adapters()
