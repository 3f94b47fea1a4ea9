"""What a folder in sentence-transformers' layout says besides the model: what makes an embedding.

modules.json lists what a text goes through: the model, pooling, at times more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpool_server.domain import Pooling
from mlxpool_server.regular_file import opened_regular

_MODULES = "modules.json"
_LENGTHS = "sentence_bert_config.json"
# Where the pooling is when no modules.json says so.
_POOLING_FOLDER = "1_Pooling"
# One of these may follow the pooling: whether vectors are normalised is the request's choice.
_NORMALIZE = "Normalize"
_MAX_BYTES = 1024 * 1024
# As the file calls them, and as its newer form does.
_POOLINGS = {
    "cls_token": Pooling.CLS,
    "mean_tokens": Pooling.MEAN,
    "lasttoken": Pooling.LAST_TOKEN,
    "cls": Pooling.CLS,
    "mean": Pooling.MEAN,
}
_PREFIX = "pooling_mode_"


@dataclass(frozen=True, slots=True)
class Pipeline:
    # None: one that this server does not know.
    pooling: Pooling | None
    # None: as many as the model's context.
    max_tokens: int | None = None
    # What it asks for that this server cannot do; empty: nothing.
    problem: str = ""


def read_pipeline(folder: Path, default: Pooling) -> Pipeline:
    """`default` is the pooling where the folder names none."""
    modules = _read(folder / _MODULES)
    lengths = _read(folder / _LENGTHS)
    most = lengths.get("max_seq_length") if isinstance(lengths, dict) else None
    max_tokens = most if type(most) is int and most > 0 else None
    pooling_folder, problem = _POOLING_FOLDER, ""
    for module in modules if isinstance(modules, list) else ():
        kind, path = _described(module)
        if kind == "Pooling":
            pooling_folder = path
        elif kind not in ("Transformer", _NORMALIZE):
            problem = f"its {_MODULES} has a {kind!r:.50}, which this server does not run"
    if isinstance(lengths, dict) and lengths.get("do_lower_case") is True:
        problem = f"its {_LENGTHS} asks for texts in lower case"
    return Pipeline(_pooling(folder / pooling_folder, default), max_tokens, problem)


def _described(module: object) -> tuple[str, str]:
    """Its class, and the folder of its configuration: one inside the model's."""
    entry = module if isinstance(module, dict) else {}
    path = str(entry.get("path", ""))
    kind = str(entry.get("type", "")).rpartition(".")[2]
    return kind, path if Path(path).name == path else ""


def _pooling(folder: Path, default: Pooling) -> Pooling | None:
    config = _read(folder / "config.json")
    if not isinstance(config, dict):
        return default
    named = [config["pooling_mode"]] if "pooling_mode" in config else []
    named += [
        key.removeprefix(_PREFIX)
        for key, is_on in config.items()
        if key.startswith(_PREFIX) and is_on is True
    ]
    if not named:
        return default
    # Several are joined to a longer vector, which nothing here does.
    return _POOLINGS.get(str(named[0])) if len(named) == 1 else None


def _read(file: Path) -> Any:
    """None for what is not there or cannot be read."""
    try:
        with opened_regular(file) as opened:
            return json.loads(opened.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
