"""The catalogue: the allow-list of names, and nothing but look-ups."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlxpool_server.domain import HubSource, Layout, ModelSpec
from mlxpool_server.errors import ModelNotFoundError, SettingsError
from mlxpool_server.pool.catalog import Catalog, read_model_type
from mlxpool_server.pool.config_file import MAX_CONFIG_BYTES


def _model_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def test_a_model_is_found_by_name_and_by_alias() -> None:
    """An alias leads to the same ModelSpec as the name."""
    spec = ModelSpec("chat", HubSource("org/repo"), aliases=("default", "gpt:latest"))
    catalog = Catalog.build([spec])
    assert catalog.resolve("chat") is spec
    assert catalog.resolve("default") is spec
    assert catalog.resolve("gpt:latest") is spec


def test_models_come_in_the_order_of_their_names(models_dir: Path) -> None:
    """Iteration is by name, configured and found models together; aliases are no extra models."""
    _model_folder(models_dir, "m")
    specs = [ModelSpec("z", Path("/z")), ModelSpec("a", Path("/a"), aliases=("b",))]
    catalog = Catalog.build(specs, models_dir)
    assert [spec.name for spec in catalog] == ["a", "m", "z"]
    assert len(catalog) == 3
    assert "b" in catalog
    assert "c" not in catalog


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "/etc", ".", "./chat", "chat/", "CHAT", "chat\0", " chat", "org/x"]
)
def test_a_request_never_names_a_path(
    name: str, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a request puts in `model` is looked up as text; an unknown text is just unknown."""
    _model_folder(models_dir, "chat")
    _model_folder(models_dir.parent, "x")
    monkeypatch.chdir(models_dir)
    with pytest.raises(ModelNotFoundError) as caught:
        Catalog.build([], models_dir).resolve(name)
    assert caught.value.model == name
    assert "this server has chat" in str(caught.value)


def test_the_error_stays_small_however_long_and_many_the_names() -> None:
    """Error details travel in metadata: below 4 KiB with a huge name and a huge catalogue."""
    specs = [ModelSpec(f"{i:03}-{'n' * 190}", Path("/x")) for i in range(300)]
    with pytest.raises(ModelNotFoundError) as caught:
        Catalog.build(specs).resolve("\U0001f600\x00" * 100_000)
    assert len(str(caught.value).encode()) + len(caught.value.model.encode()) < 3000
    assert specs[0].name in str(caught.value)


def test_subfolders_with_a_config_are_models(models_dir: Path) -> None:
    """A subfolder of models_dir with a config.json is a model named after it."""
    folder = _model_folder(models_dir, "Qwen2.5-0.5B@4bit")
    assert Catalog.build([], models_dir).resolve(folder.name) == ModelSpec(folder.name, folder)


def test_what_is_not_served_is_reported(models_dir: Path) -> None:
    """Hidden, empty, ill-named and escaping folders are skipped, each with its reason."""
    outside = _model_folder(models_dir.parent, "outside")
    _model_folder(models_dir, ".cache")
    _model_folder(models_dir, "a b")
    (models_dir / "empty").mkdir()
    (models_dir / "link").symlink_to(outside)
    (models_dir / "loop").symlink_to(models_dir / "loop")
    (models_dir / "README.md").write_text("not a folder")
    catalog = Catalog.build([], models_dir)
    assert len(catalog) == 0
    assert {skipped.folder.name: skipped.reason for skipped in catalog.skipped} == {
        ".cache": "hidden",
        "a b": "its name is not a valid model name",
        "empty": "has no config.json",
        "link": "a link that leaves models_dir",
    }


def test_links_within_models_dir_are_models(models_dir: Path) -> None:
    """A link to a sibling is an honest second name; models_dir itself may be a link too."""
    _model_folder(models_dir, "v1")
    (models_dir / "latest").symlink_to("v1")
    linked_dir = models_dir.parent / "linked"
    linked_dir.symlink_to(models_dir)
    assert [spec.name for spec in Catalog.build([], linked_dir)] == ["latest", "v1"]


def test_a_configured_folder_is_not_served_twice(models_dir: Path) -> None:
    """A [[models]] entry for a folder of models_dir replaces the one that the scan would make."""
    folder = _model_folder(models_dir, "v1")
    spec = ModelSpec("v1", folder, pinned=True)
    other_name = ModelSpec("chat", folder)
    assert list(Catalog.build([spec], models_dir)) == [spec]
    assert list(Catalog.build([other_name], models_dir)) == [other_name]


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_models_dir_must_be_a_folder(kind: str, models_dir: Path) -> None:
    """A models_dir that is missing or a file is a configuration error."""
    path = models_dir / kind
    if kind == "file":
        path.write_text("")
    with pytest.raises(SettingsError, match=f"^models_dir {path}: .*; point it at a folder"):
        Catalog.build([], path)


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        (
            [ModelSpec("a", Path("/1")), ModelSpec("a", HubSource("org/2"))],
            "model 'a' of org/2: the name is taken by model 'a'",
        ),
        (
            [ModelSpec("a", Path("/1")), ModelSpec("b", Path("/2"), aliases=("a",))],
            "alias 'a' of /2: the name is taken by model 'a'",
        ),
        (
            [ModelSpec("a", Path("/1"), aliases=("x",)), ModelSpec("x", Path("/2"))],
            "model 'x' of /2: the name is taken by model 'a'",
        ),
        (
            [ModelSpec("a", Path("/1"), aliases=("a",))],
            "model 'a' of /1: the name is taken by model 'a'",
        ),
    ],
)
def test_a_name_is_taken_once(specs: list[ModelSpec], text: str) -> None:
    """Names and aliases share one space; a second taker is a configuration error."""
    with pytest.raises(SettingsError) as caught:
        Catalog.build(specs)
    assert text in str(caught.value)
    assert "rename one" in str(caught.value)


def test_a_found_folder_does_not_hide_a_configured_model(models_dir: Path) -> None:
    """A folder named like a configured model that lives elsewhere is an error, not a guess."""
    _model_folder(models_dir, "chat")
    with pytest.raises(SettingsError, match="the name is taken by model 'chat'"):
        Catalog.build([ModelSpec("chat", HubSource("org/repo"))], models_dir)


@pytest.mark.parametrize("name", ["a", "A1", "org/repo@v1.0", "llama3:8b", "x" * 200, "a._-/@:"])
def test_valid_names(name: str) -> None:
    """Letters, digits and ._-/@: are what hub ids and the field's tags are made of."""
    assert Catalog.build([ModelSpec(name, Path("/x"))]).resolve(name).name == name


@pytest.mark.parametrize(
    "name", ["", ".a", "/a", "-a", "a..b", "a b", "a\n", "é", "x" * 201, "a\\b", "a*"]
)
@pytest.mark.parametrize("as_alias", [False, True])
def test_invalid_names(name: str, as_alias: bool) -> None:
    """Anything else, in a name or an alias, is a configuration error on one line."""
    spec = ModelSpec("ok", Path("/x"), aliases=(name,)) if as_alias else ModelSpec(name, Path("/x"))
    with pytest.raises(SettingsError, match="not a valid name; write up to 200") as caught:
        Catalog.build([spec])
    assert "\n" not in str(caught.value)


def test_model_type_is_read_without_weights(tmp_path: Path) -> None:
    """config.json alone says what kind of model a folder holds."""
    assert read_model_type(_model_folder(tmp_path, "m")) == "llama"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file or directory; point the model at a folder"),
        ("{", "not JSON; fetch the model again"),
        ("[" * 100_000, "not JSON"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        (json.dumps({"model_type": 3}), "has no model_type"),
        (json.dumps({"model_type": "\x1b[2J"}), "has a model_type that is no name"),
        (json.dumps({"model_type": "a" * 1000}), "has a model_type that is no name"),
        (" " * (MAX_CONFIG_BYTES + 1), f"has more than {MAX_CONFIG_BYTES} bytes"),
    ],
    ids=range(9),
)
def test_a_folder_without_a_model_is_an_error(
    content: str | None, problem: str, tmp_path: Path
) -> None:
    """A missing or broken config.json names the file and the remedy."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingsError) as caught:
        read_model_type(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert problem in str(caught.value)


def test_no_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Invalid UTF-8 is no JSON."""
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(SettingsError, match="not JSON"):
        read_model_type(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody may ever write to it."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SettingsError, match="is no regular file"):
        read_model_type(tmp_path)


# ---------------------------------------------------------------- draft models


def test_a_draft_model_is_found_by_its_name() -> None:
    """Or by an alias; of its own settings the layout counts, and nothing else."""
    small = ModelSpec("small", Path("s"), aliases=("tiny",), layout=Layout.FLOAT16, pinned=True)
    large = ModelSpec("large", Path("l"), draft_model="tiny", num_draft_tokens=6)
    found = Catalog.build([large, small]).resolve("large")
    assert found.draft == ModelSpec("small", Path("s"), layout=Layout.FLOAT16)
    assert (found.draft_model, found.num_draft_tokens) == ("small", 6)
    assert not found.is_held_as(Catalog.build([replace(large, draft_model="")]).resolve("large"))


@pytest.mark.parametrize("name", ["nobody", "large", "also-large"])
def test_a_draft_model_has_to_be_another_one_of_the_catalogue(name: str) -> None:
    """The start says which model's it is."""
    large = ModelSpec("large", Path("l"), aliases=("also-large",), draft_model=name)
    with pytest.raises(SettingsError, match=f"'large': its draft_model '{name}' is no other model"):
        Catalog.build([large])
