"""mlx-lm's parsers of tool calls, without the rest of mlx-lm: for the worker process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import secrets
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxpool_server.mlx_backend import harmony
from mlxpool_server.mlx_backend.parameter_kinds import with_types

# Mistral's templates take only ids of this form.
ID_CHARS = 9
_PACKAGE = "mlxpool_call_parsers"

Parser = Callable[[str, Any], Any]


class CallParsers:
    """Every parser is imported when this is made: afterwards no file may be open to it."""

    def __init__(self) -> None:
        self._parsers: dict[str, Parser] = {harmony.PARSER: harmony.parse_tool_call}
        # Importing mlx_lm would import mlx, and wake the device up.
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None or not spec.submodule_search_locations:
            return
        folder = Path(spec.submodule_search_locations[0]) / "tool_parsers"
        package = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if package is None or package.loader is None:
            return
        module = importlib.util.module_from_spec(package)
        sys.modules[_PACKAGE] = module
        package.loader.exec_module(module)
        for path in sorted(folder.glob("*.py")):
            if path.stem != "__init__":
                parser = importlib.import_module(f"{_PACKAGE}.{path.stem}")
                self._parsers[path.stem] = parser.parse_tool_call

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._parsers)

    def read(self, name: str, text: str, tools: Any) -> list[tuple[str, str, str]]:
        """Return (id, name, arguments as JSON) of each call in the text.

        Raises: what the parser raises, ValueError when it finds no call.
        """
        found = self._parsers[name](text, with_types(tools))
        calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
        if not calls:
            raise ValueError("there is no call in it")
        return calls


def _call(found: Any) -> tuple[str, str, str]:
    name = found.get("name") if isinstance(found, dict) else None
    if not name or not isinstance(name, str):
        raise ValueError("it names no function")
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):
        # Some models write JSON in a string; what is none is not arguments.
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are no object")  # noqa: TRY004 - of the text, not a caller
    given = found.get("id")
    call_id = given if isinstance(given, str) and given else _new_id()
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not _is_whole(text):
        text = json.dumps(arguments, allow_nan=False)
    if not (_is_whole(name) and _is_whole(call_id)):
        raise ValueError("it has half a character in its name")
    return call_id, name, text


def _is_whole(text: str) -> bool:
    """Whether the wire can carry it: a JSON escape may be half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _new_id() -> str:
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(ID_CHARS))
