"""What sentence-transformers' files say of pooling, lengths and further modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxpool_server.domain import Pooling
from mlxpool_server.mlx_backend.embedding.pipeline import Pipeline, read_pipeline
from tiny_models import write_pipeline


def read(folder: Path) -> Pipeline:
    return read_pipeline(folder, Pooling.LAST_TOKEN)


def write_pooling(folder: Path, config: Any) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [
        ("mean_tokens", Pooling.MEAN),
        ("cls_token", Pooling.CLS),
        ("lasttoken", Pooling.LAST_TOKEN),
        ("max_tokens", None),
        ("mean_sqrt_len_tokens", None),
        ("weightedmean_tokens", None),
    ],
)
def test_pooling(mode: str, pooling: Pooling | None, tmp_path: Path) -> None:
    """The three that the contract has; another one is unknown, not the default."""
    write_pipeline(tmp_path, mode)
    assert read(tmp_path) == Pipeline(pooling)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "cls"}, Pooling.CLS),
        ({"pooling_mode": "max"}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
        ({"word_embedding_dimension": 32}, Pooling.LAST_TOKEN),
        (["no object"], Pooling.LAST_TOKEN),
    ],
)
def test_other_forms(config: Any, pooling: Pooling | None, tmp_path: Path) -> None:
    """The newer form, several kinds at once, and files that say nothing; no modules.json."""
    write_pooling(tmp_path, config)
    assert read(tmp_path).pooling is pooling


def test_a_plain_folder(tmp_path: Path) -> None:
    """Nothing there: the default, and no limit."""
    assert read(tmp_path) == Pipeline(Pooling.LAST_TOKEN)


def test_lengths(tmp_path: Path) -> None:
    """The longest text that the model was made for; nonsense is no limit."""
    write_pipeline(tmp_path, max_seq_length=256, do_lower_case=False)
    assert read(tmp_path) == Pipeline(Pooling.MEAN, 256)
    write_pipeline(tmp_path, max_seq_length="many")
    assert read(tmp_path) == Pipeline(Pooling.MEAN)


def test_what_is_not_run(tmp_path: Path) -> None:
    """A layer behind the pooling, and texts in lower case, are problems in words."""
    write_pipeline(tmp_path, "mean_tokens", "Dense")
    assert "'Dense'" in read(tmp_path).problem
    write_pipeline(tmp_path, do_lower_case=True)
    assert "lower case" in read(tmp_path).problem


def test_pooling_stays_in_the_folder(tmp_path: Path) -> None:
    """A path that leads out of the model's folder is not followed."""
    write_pooling(tmp_path, {"pooling_mode": "cls"})
    inside = tmp_path / "models" / "m"
    inside.mkdir(parents=True)
    modules = [{"type": "x.Pooling", "path": "../../1_Pooling"}]
    (inside / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    assert read(inside).pooling is Pooling.LAST_TOKEN
