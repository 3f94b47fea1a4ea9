"""Who makes the call that runs: each call has a context of its own."""

from __future__ import annotations

from contextvars import ContextVar

from mlxpool_server.rpc.access.gate import Pass

_caller: ContextVar[Pass | None] = ContextVar("caller", default=None)


def enter(caller: Pass) -> None:
    _caller.set(caller)


def owner() -> str:
    """Whom the generations that this call starts belong to; empty: nobody in particular."""
    caller = _caller.get()
    return "" if caller is None else caller.name or ""


def may_cancel() -> str | None:
    """Whose generations this call may cancel; None: anybody's."""
    caller = _caller.get()
    return None if caller is None or caller.is_admin else owner()
