"""A model folder from a stranger: what is wrong with it is found before it is read."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxpool_server.domain import HubSource, Layout, ModelSpec
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend import checked_loader, model_folder
from mlxpool_server.mlx_backend.checked_loader import CheckedLoader
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.model_folder import check_folder
from tiny_models import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "models" / "m")


@pytest.fixture
def loader() -> CheckedLoader:
    return CheckedLoader(MlxLoader(prefill_step_tokens=64, default_layout=Layout.FLOAT32))


def problem_of(folder: Path) -> str:
    with pytest.raises(LoadFailedError) as caught:
        check_folder("m", folder)
    return caught.value.problem


def grow(file: Path, num_bytes: int) -> None:
    """A sparse file: as large as it says, and empty."""
    with file.open("ab") as opened:
        opened.truncate(num_bytes)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------- links


def test_a_good_folder(folder: Path, loader: CheckedLoader) -> None:
    """Files, folders and links inside it are fine; it can be named through a link itself."""
    (folder / "more").mkdir()
    (folder / "more" / "merges.txt").write_text("")
    (folder / "link.json").symlink_to("config.json")
    (folder / "linked").symlink_to("more")
    link = folder.parent / "by-link"
    link.symlink_to(folder)
    for each in (folder, link):
        check_folder("m", each)
        assert loader.inspect(ModelSpec("m", each)) is not None


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "by a folder"])
def test_a_link_out_of_the_folder(folder: Path, file: str, kind: str) -> None:
    """Whatever leads there: the file is named, and nothing of its target is read."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / file).rename(outside / file)
    if kind == "by a folder":
        (folder / "deep").symlink_to("../outside")
        (folder / file).symlink_to(f"deep/{file}")
    else:
        target = outside / file if kind == "absolute" else Path("../outside") / file
        (folder / file).symlink_to(target)
    assert "is a link that leaves the model's folder" in problem_of(folder)


@pytest.mark.parametrize("target", ["/etc/passwd", "/proc/self/environ", "/dev/zero", "/"])
def test_a_link_into_the_system(folder: Path, target: str) -> None:
    """Refused, whatever it is called."""
    (folder / "chat_template.jinja").symlink_to(target)
    assert problem_of(folder) == ("chat_template.jinja is a link that leaves the model's folder")


@pytest.mark.parametrize("target", ["nothing", "loop"])
def test_a_link_that_leads_nowhere(folder: Path, target: str) -> None:
    """Neither is one in circles."""
    (folder / "loop").symlink_to(target)
    assert "loop is a link that leads nowhere" in problem_of(folder)


def cached(root: Path, folder: Path) -> Path:
    """The folder as a snapshot in a hub cache: links into the repository's blobs."""
    repository = root / "hub" / "models--org--m"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


def test_the_hubs_cache_is_made_of_links(
    tmp_path: Path, folder: Path, loader: CheckedLoader
) -> None:
    """From a snapshot into the blobs beside it, and nowhere else."""
    snapshot = cached(tmp_path, folder)
    check_folder("m", snapshot)
    assert loader.load_tokenizer(ModelSpec("m", snapshot)).encode("a", add_special_tokens=False)
    (tmp_path / "hub" / "secret.json").write_text("{}")
    (snapshot / "evil.json").symlink_to("../../../secret.json")
    assert "evil.json is a link that leaves" in problem_of(snapshot)


# ---------------------------------------------------------------- kinds and sizes


def test_what_is_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would be waited for without end."""
    os.mkfifo(folder / "config.jsonl")
    assert problem_of(folder) == "config.jsonl is no regular file"
    (folder / "config.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        # The path of a socket has to be short.
        monkeypatch.chdir(folder)
        listener.bind("s.json")
        assert problem_of(folder) == "s.json is no regular file"


@pytest.mark.parametrize(
    ("file", "limit"),
    [
        ("config.json", model_folder.MAX_TEXT_BYTES),
        ("generation_config.json", model_folder.MAX_TEXT_BYTES),
        ("model.safetensors.index.json", model_folder.MAX_TEXT_BYTES),
        ("more/tokenizer_config.json", model_folder.MAX_TEXT_BYTES),
        ("tokenizer.json", model_folder.MAX_VOCABULARY_BYTES),
        ("tokenizer.model", model_folder.MAX_VOCABULARY_BYTES),
        ("vocab.txt", model_folder.MAX_VOCABULARY_BYTES),
        ("chat_template.jinja", model_folder.MAX_TEMPLATE_BYTES),
    ],
)
def test_a_file_that_is_too_large(folder: Path, file: str, limit: int) -> None:
    """Found by its size, without reading it."""
    (folder / "more").mkdir()
    grow(folder / file, limit + 1)
    assert problem_of(folder) == f"{file} has {limit + 1} bytes; at most {limit} are read"


def test_weights_may_be_large(folder: Path) -> None:
    """And so may what is never opened."""
    grow(folder / "model-2.safetensors", 1 << 36)
    grow(folder / "pytorch_model.bin", 1 << 36)
    check_folder("m", folder)


def test_a_folder_with_too_many_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting ends there."""
    monkeypatch.setattr(model_folder, "MAX_FILES", 3)
    assert "more than 3 files" in problem_of(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layers", "n_layer", "num_layers"])
@pytest.mark.parametrize("nested", [False, True])
def test_too_many_layers(folder: Path, key: str, *, nested: bool) -> None:
    """Each would be built before anybody looks at the weights."""
    change_config(folder, **({"text_config": {key: 10**7}} if nested else {key: 10**7}))
    assert f"{key} = 10000000; at most 1000" in problem_of(folder)


# ---------------------------------------------------------------- through the loader


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def tensor(shape: list[int], end: int, dtype: str = "F32") -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return header(json.dumps({"model.embed_tokens.weight": entry}).encode())


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\xff" * 7,
        header(b"{}", 2**63),
        header(b"{}", 2**40),
        header(b"{}", 99 * 2**20),
        header(b"[" * 100_000),
        header(b"not json"),
        tensor([2**40, 2**40], 16),
        tensor([2**31, 2**31, 4], 0),
        tensor([10**6, 10**6], 4 * 10**12),
        tensor([4], 2**60),
        tensor([4], 12),
        tensor([-4], 16),
        tensor([4], 16, "F9"),
        tensor([4], 16),
    ],
    ids=range(15),
)
def test_hostile_weights(folder: Path, loader: CheckedLoader, weights: bytes) -> None:
    """Sizes that the file does not have are refused by their header; nothing is allocated."""
    (folder / "model.safetensors").write_bytes(weights)
    spec = ModelSpec("m", folder)
    with pytest.raises(LoadFailedError):
        loader.inspect(spec)
    with pytest.raises(LoadFailedError):
        loader.load(spec, lambda _: None, lambda: False)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=300) | st.binary(max_size=200).map(header))
def test_any_bytes_as_weights(folder: Path, loader: CheckedLoader, weights: bytes) -> None:
    """A domain error, or a model without tensors; never a crash."""
    (folder / "model.safetensors").write_bytes(weights)
    with contextlib.suppress(LoadFailedError):
        loader.inspect(ModelSpec("m", folder))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: grow(folder / "tokenizer.json", 1 << 33),
        lambda folder: (folder / "evil.json").symlink_to("/etc/passwd"),
        lambda folder: change_config(folder, num_hidden_layers=10**7),
    ],
    ids=["size", "link", "layers"],
)
def test_every_way_into_the_folder_is_checked(
    folder: Path, loader: CheckedLoader, spoil: Callable[[Path], None]
) -> None:
    """inspect, load_tokenizer and load alike."""
    spoil(folder)
    spec = ModelSpec("m", folder)
    for read in (
        loader.inspect,
        loader.load_tokenizer,
        lambda spec: loader.load(spec, lambda _: None, lambda: False),
    ):
        with pytest.raises(LoadFailedError):
            read(spec)


def test_a_hub_models_tokenizer_is_checked_before_it_is_read(
    folder: Path, loader: CheckedLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its download and its reading."""
    (folder / "evil.json").symlink_to("/etc/passwd")
    monkeypatch.setattr(checked_loader, "cached_folder", lambda *_: None)
    monkeypatch.setattr(checked_loader, "download", lambda *_: folder)
    with pytest.raises(LoadFailedError, match=r"evil\.json is a link"):
        loader.load_tokenizer(ModelSpec("m", HubSource("org/m")))


def test_no_pickle(folder: Path, loader: CheckedLoader, tmp_path: Path) -> None:
    """A pickle that would run is not opened, under any of the names it usually has."""
    marker = tmp_path / "pickle-ran"
    bomb = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "weights.npz", "vocab.pkl"):
        (folder / name).write_bytes(bomb)
    spec = ModelSpec("m", folder)
    loader.load_tokenizer(spec)
    loader.load(spec, lambda _: None, lambda: False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadFailedError, match=r"no model\*\.safetensors"):
        loader.load(spec, lambda _: None, lambda: False)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(LoadFailedError):
        loader.load(spec, lambda _: None, lambda: False)
    assert not marker.exists()


# ---------------------------------------------------------------- quantisation


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        ({"group_size": -64, "bits": 4}, "group_size = -64"),
        ({"group_size": 0, "bits": 4}, "group_size = 0"),
        ({"group_size": 10**9, "bits": 4}, "group_size = 1000000000"),
        ({"group_size": "64", "bits": 4}, "group_size = '64'"),
        ({"group_size": True, "bits": 4}, "group_size = True"),
        ({"group_size": 32, "bits": -4}, "bits = -4"),
        ({"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": -1}}, "= -1"),
    ],
)
def test_lies_about_quantisation(
    folder: Path, loader: CheckedLoader, lie: dict[str, Any], problem: str
) -> None:
    """A negative size would reserve less than nothing: such a model is refused with the value."""
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {"model.embed_tokens.scales": mx.zeros((4, 4)), "model.norm.weight": mx.zeros((4,))},
    )
    change_config(folder, quantization=lie)
    with pytest.raises(LoadFailedError) as caught:
        loader.inspect(ModelSpec("m", folder))
    assert problem in caught.value.problem
