"""Folders to models: what loads, how large it is, and what is refused in one line."""

from __future__ import annotations

import gc
import json
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlxpool_server.domain import (
    Capability,
    HubSource,
    Layout,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelSpec,
    SamplingParams,
)
from mlxpool_server.errors import LoadFailedError, LoadSupersededError
from mlxpool_server.mlx_backend import inspector as inspector_module
from mlxpool_server.mlx_backend import weights as weights_module
from mlxpool_server.mlx_backend.inspector import UNKNOWN_CONTEXT_LENGTH
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.weights import embedding_rows
from tiny_models import ARCHITECTURES, VOCAB_SIZE, write_byte_level, write_model

LAYOUTS = [Layout.STORED, Layout.FLOAT32, Layout.BFLOAT16, Layout.FLOAT16]


def make_loader(layout: Layout = Layout.AUTO, *, warm_up: bool = True) -> MlxLoader:
    return MlxLoader(prefill_step_tokens=16, default_layout=layout, warm_up=warm_up)


def load(folder: Path, loader: MlxLoader | None = None) -> MlxModel:
    spec = ModelSpec("tiny", folder)
    return (loader or make_loader()).load(spec, lambda _: None, lambda: False)


def inspect(folder: Path) -> ModelInfo:
    info = make_loader().inspect(ModelSpec("tiny", folder))
    assert info is not None
    return info


def run_a_little(model: MlxModel) -> None:
    batch = model.new_runner()
    batch.add(0, [1, 2, 3], SamplingParams(temperature=0))
    for _ in range(4):
        batch.step()
    batch.close()


def active_bytes() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# What every model can whose tokenizer is read.
PLAIN = {Capability.CONSTRAINTS, Capability.EMBEDDINGS}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A model of its own, to be broken."""
    return shutil.copytree(original, tmp_path / "tiny")


# ---------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [(["LlamaForCausalLM"], ("LlamaForCausalLM",)), (None, ()), ("Llama", ()), ([1, {}], ())],
)
def test_class_names(architectures: object, expected: tuple[str, ...], tmp_path: Path) -> None:
    """What config.json lists, if it is a list of names."""
    folder = write_model(tmp_path / "tiny")
    change_config(folder, architectures=architectures)
    info = make_loader(Layout.STORED).inspect(ModelSpec("tiny", folder))
    assert info is not None
    assert info.class_names == expected


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes(architecture: str, quantized: bool, tmp_path: Path) -> None:
    """Estimated, measured and allocated bytes agree, in every layout; dropping it frees them."""
    folder = write_model(tmp_path / "tiny", architecture, quantized=quantized)
    for layout in LAYOUTS:
        # The CPU has no 16-bit experts.
        can_run = layout in (Layout.STORED, Layout.FLOAT32)
        loader = make_loader(layout, warm_up=can_run)
        spec = ModelSpec("tiny", folder)
        info = loader.inspect(spec)
        assert info is not None
        before = active_bytes()
        model = load(folder, loader)
        allocated = active_bytes() - before
        assert info.estimated_bytes == pytest.approx(model.resident_bytes, rel=0.05)
        # Small arrays take a page each; real models have none to speak of.
        assert allocated == pytest.approx(model.resident_bytes, rel=0.05, abs=32_768)
        if can_run:
            run_a_little(model)
        del model
        assert active_bytes() <= before + 32_768


def test_tied_output_layer_is_not_counted(folder: Path, tmp_path: Path) -> None:
    """mlx-lm drops an lm_head that the config says is the embedding."""
    change_config(folder, tie_word_embeddings=True)
    info = inspect(folder)
    assert info.estimated_bytes == pytest.approx(load(folder).resident_bytes, rel=0.05)


def test_layout_of_the_model_wins(folder: Path) -> None:
    """The server's default is for models that do not say."""
    loader = make_loader(Layout.FLOAT32)
    info = loader.inspect(ModelSpec("tiny", folder, layout=Layout.BFLOAT16))
    full = loader.inspect(ModelSpec("tiny", folder))
    assert info is not None
    assert full is not None
    assert info.estimated_bytes * 2 == full.estimated_bytes


# ---------------------------------------------------------------- what files say


def test_inspect(folder: Path) -> None:
    """Architecture, context, vocabulary and capabilities, from the files alone."""
    info = inspect(folder)
    assert (info.architecture, info.context_length, info.vocab_size) == ("llama", 512, 320)
    assert info.capabilities == PLAIN | {Capability.CHAT}
    assert (info.quantization, info.revision) == ("", "")


def test_quantization_is_described(tmp_path: Path) -> None:
    """As the contract's example."""
    folder = write_model(tmp_path / "tiny", quantized=True)
    assert inspect(folder).quantization == "4-bit, group 32"


def test_model_without_a_template(folder: Path) -> None:
    """It cannot chat; a template in a file of its own counts."""
    write_byte_level(folder, chat_template=None)
    assert inspect(folder).capabilities == PLAIN
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect(folder).capabilities == PLAIN | {Capability.CHAT}


def test_unknown_context_length(tmp_path: Path) -> None:
    """Recurrent models name none: they are not refused every prompt for it."""
    folder = write_model(tmp_path / "tiny", "mamba")
    assert inspect(folder).context_length == UNKNOWN_CONTEXT_LENGTH


def test_vocabulary_from_the_embedding(folder: Path) -> None:
    """Where config.json leaves it to the code's default."""
    config = json.loads((folder / "config.json").read_text())
    del config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).vocab_size == 320
    assert make_loader().load_tokenizer(ModelSpec("tiny", folder)).vocab_size == 320


def test_nested_text_config(folder: Path) -> None:
    """Multimodal configs keep the text model's figures there."""
    config = json.loads((folder / "config.json").read_text())
    text = {"vocab_size": 320, "max_position_embeddings": 77}
    del config["vocab_size"], config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text}))
    assert (inspect(folder).context_length, inspect(folder).vocab_size) == (77, 320)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 10**15},
        {"max_position_embeddings": None},
        {"max_position_embeddings": "many"},
        {"vocab_size": True},
        {"quantization": 4},
        {"text_config": []},
    ],
    ids=str,
)
def test_odd_figures_stay_in_range(folder: Path, changes: dict[str, Any]) -> None:
    """One model's odd config must not break the list of all models: int32 on the wire."""
    change_config(folder, **changes)
    info = inspect(folder)
    assert 0 < info.context_length < 2**31
    assert 0 < info.vocab_size < 2**31


# ---------------------------------------------------------------- what is refused


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def scramble_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"\xff" * 100)


def endless_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "weights cannot be read"),
    "header": (scramble_header, "weights cannot be read"),
    "endless header": (endless_header, "weights cannot be read"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "missing shard": (missing_shard, "model-00002-of-00002.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config of bytes": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        "config.json is not JSON",
    ),
    "config no object": (lambda folder: (folder / "config.json").write_text("[]"), "no model_type"),
    "no model_type": (lambda folder: change_config(folder, model_type=None), "no model_type"),
    "own code": (lambda folder: change_config(folder, model_file="evil.py"), "its own code"),
}


@pytest.mark.parametrize(("break_", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_folder(folder: Path, break_: Callable[[Path], Any], problem: str) -> None:
    """LoadFailedError with one short line, from the look at the files already."""
    break_(folder)
    for attempt in (lambda: inspect(folder), lambda: load(folder)):
        with pytest.raises(LoadFailedError) as error:
            attempt()
        assert problem in error.value.problem
        assert "\n" not in error.value.problem
        assert len(error.value.problem) < 600


UNFIT: dict[str, Callable[[Path], Any]] = {
    "unknown architecture": lambda folder: change_config(folder, model_type="nonesuch"),
    "wrong width": lambda folder: change_config(folder, hidden_size=128),
    "too many layers": lambda folder: change_config(folder, num_hidden_layers=9),
    "too few layers": lambda folder: change_config(folder, num_hidden_layers=1),
    "no width": lambda folder: change_config(folder, hidden_size=None),
}


@pytest.mark.parametrize("break_", UNFIT.values(), ids=UNFIT.keys())
def test_weights_that_do_not_fit(folder: Path, break_: Callable[[Path], Any]) -> None:
    """What the headers cannot tell, the load does, and leaves nothing allocated."""
    break_(folder)
    before = active_bytes()
    with pytest.raises(LoadFailedError) as error:
        load(folder)
    assert "\n" not in error.value.problem
    assert 0 < len(error.value.problem) < 600
    del error
    assert active_bytes() <= before + 32_768


def test_own_code_is_never_run(folder: Path) -> None:
    """Neither a model_file nor a tokenizer's auto_map, and nobody is asked on stdin."""
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    change_config(folder, model_file="evil.py", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(LoadFailedError):
        load(folder)
    change_config(folder, model_file=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}, "tokenizer_class": "Tok"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadFailedError, match="tokenizer cannot be read"):
        make_loader().load_tokenizer(ModelSpec("tiny", folder))
    assert not ran.exists()


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer(folder: Path, broken: str) -> None:
    """One line too; the weights still load."""
    (folder / broken).write_text("{")
    with pytest.raises(LoadFailedError, match="tokenizer cannot be read") as error:
        make_loader().load_tokenizer(ModelSpec("tiny", folder))
    assert "\n" not in error.value.problem
    assert load(folder).resident_bytes


def test_folder_that_went_away(folder: Path) -> None:
    """Deleted after the catalogue was made."""
    shutil.rmtree(folder)
    loader = make_loader()
    for call in (loader.inspect, loader.load_tokenizer):
        with pytest.raises(LoadFailedError, match="does not exist"):
            call(ModelSpec("tiny", folder))


# ---------------------------------------------------------------- the load itself


def test_progress_rises_to_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes grow from portion to portion, up to the measured size."""
    monkeypatch.setattr(weights_module, "PORTION_BYTES", 100_000)
    seen: list[LoadProgress] = []
    model = make_loader().load(ModelSpec("tiny", folder), seen.append, lambda: False)
    assert seen.pop().phase is LoadPhase.WARMING_UP
    done = [progress.completed_bytes for progress in seen]
    assert done == sorted(set(done))
    assert len(done) > 3
    assert done[-1] == model.resident_bytes == seen[-1].total_bytes
    assert {progress.phase for progress in seen} == {LoadPhase.LOADING}


def test_cancel_stops_between_portions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was loaded so far is freed."""
    monkeypatch.setattr(weights_module, "PORTION_BYTES", 100_000)
    before = active_bytes()
    seen: list[LoadProgress] = []
    with pytest.raises(LoadSupersededError):
        make_loader().load(ModelSpec("tiny", folder), seen.append, lambda: len(seen) >= 2)
    assert len(seen) == 2
    assert active_bytes() <= before + 32_768


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_on_one_thread_runs_on_another(architecture: str, tmp_path: Path) -> None:
    """No array is left lazy: MLX cannot evaluate it on the engine's thread."""
    folder = write_model(tmp_path / "tiny", architecture)
    models: list[MlxModel] = []
    loading = threading.Thread(target=lambda: models.append(load(folder)))
    loading.start()
    loading.join()
    batch = models[0].new_runner()
    batch.add(0, list(range(20)), SamplingParams(temperature=0))
    assert any(batch.step().tokens for _ in range(6))
    batch.close()


# ---------------------------------------------------------------- the hub


def test_hub_model_that_was_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unknown, not failed; nor is a snapshot with a tokenizer and no weights a model."""
    spec = ModelSpec("tiny", HubSource("nobody/nothing"))
    monkeypatch.setattr(inspector_module, "cached_folder", lambda *_: None)
    assert make_loader().inspect(spec) is None
    folder = write_model(tmp_path / "abc123")
    monkeypatch.setattr(inspector_module, "cached_folder", lambda *_: folder)
    info = make_loader().inspect(spec)
    assert info is not None
    assert info.revision == "abc123"
    (folder / "model.safetensors").unlink()
    assert make_loader().inspect(spec) is None


def test_a_stamp_of_the_tokenizers_files(tmp_path: Path) -> None:
    """It differs once one of them was replaced, came or went, and does not when nothing did."""
    folder = write_model(tmp_path / "m")
    loader = MlxLoader(prefill_step_tokens=64, default_layout=Layout.FLOAT32)
    spec = ModelSpec("m", folder)
    stamps = [loader.tokenizer_stamp(spec)]
    assert loader.tokenizer_stamp(spec) == stamps[0]
    text = (folder / "tokenizer.json").read_text()
    (folder / "new").write_text(text)
    (folder / "new").rename(folder / "tokenizer.json")
    stamps.append(loader.tokenizer_stamp(spec))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    stamps.append(loader.tokenizer_stamp(spec))
    assert len({repr(stamp) for stamp in stamps}) == 3


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama4"])
def test_a_vocabulary_larger_than_its_embedding(tmp_path: Path, architecture: str) -> None:
    """An id beyond the embedding's rows would end the process: no such id passes for one."""
    folder = write_model(tmp_path / "m", architecture)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vocab_size": 10**9}))
    loader = MlxLoader(prefill_step_tokens=64, default_layout=Layout.FLOAT32)
    spec = ModelSpec("m", folder)
    try:
        loader.load(spec, lambda _: None, lambda: False)
    except LoadFailedError:
        return
    info = loader.inspect(spec)
    assert info is not None
    assert info.vocab_size == loader.load_tokenizer(spec).vocab_size == VOCAB_SIZE


def test_no_more_tokens_than_embeddings(tmp_path: Path) -> None:
    """Wherever the lie is told: here the code's own name for the size is another one."""
    folder = write_model(tmp_path / "m", "llama4")
    module, _ = load_model(folder)
    assert embedding_rows(module) == VOCAB_SIZE
    claimed = MlxLoader(prefill_step_tokens=64, default_layout=Layout.FLOAT32)
    with (
        mock.patch.object(inspector_module, "vocab_size_of", return_value=10**9),
        pytest.raises(LoadFailedError, match="and has embeddings for 320"),
    ):
        claimed.load(ModelSpec("m", folder), lambda _: None, lambda: False)
