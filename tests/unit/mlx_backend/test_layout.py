"""Which layout a device gets: by figures of several devices, and really measured on this one."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import mlx.core as mx
import pytest
from structlog.testing import capture_logs

from fakes.counting_lock import CountingLock
from mlxpool_server.domain import Layout, ModelInfo, ModelSpec
from mlxpool_server.mlx_backend import layout as layout_module
from mlxpool_server.mlx_backend.layout import (
    Form,
    LayoutChooser,
    Measured,
    Timings,
    form_of,
    is_dense_better,
    measure_products,
)
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.model_size import TensorHeader
from mlxpool_server.mlx_backend.openblas import OpenBlas
from tiny_models import write_model

Q4 = Form("affine", 4, 64)
# Seconds. The CPU's are this machine's; CUDA's are an 8B model's steps on an H100, at 1 and 16
# rows; Metal's quantised product is bound by memory: a quarter of the bytes, a quarter of the time.
CPU = Measured(stored=Timings(5.2e-3, 86e-3), dense=Timings(0.05e-3, 0.4e-3))
CUDA = Measured(stored=Timings(5.95e-3, 55e-3), dense=Timings(6.41e-3, 10e-3))
METAL = Measured(stored=Timings(10e-3, 30e-3), dense=Timings(35e-3, 40e-3))


def bytes_in(layout: Layout) -> int:
    return {Layout.STORED: 100, Layout.BFLOAT16: 400, Layout.FLOAT32: 800}[layout]


class FakeDevice:
    """Counts how often it is measured."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self.forms: list[Form] = []

    def measure(self, form: Form, _: Layout, processors: AbstractContextManager[None]) -> Measured:
        with processors:
            self.forms.append(form)
        return self._measured


def chooser(
    kind: str, measured: Measured, limit_bytes: int | None = None
) -> tuple[LayoutChooser, FakeDevice]:
    device = FakeDevice(measured)
    return LayoutChooser(limit_bytes, kind=kind, measure=device.measure), device


# ---------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("kind", "measured", "expected"),
    [
        ("cpu", CPU, Layout.FLOAT32),
        ("cuda", CUDA, Layout.BFLOAT16),
        ("metal", METAL, Layout.STORED),
    ],
)
def test_a_device_gets_what_is_fast_on_it(kind: str, measured: Measured, expected: Layout) -> None:
    """Dense on CPUs and CUDA, as stored on Metal."""
    choice = chooser(kind, measured)[0].choose(Q4, bytes_in)
    assert (choice.layout, choice.measured) == (expected, measured)


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        (Timings(2.0, 10.0), True),
        (Timings(2.1, 1.0), False),
        (Timings(0.1, 12.1), False),
    ],
    ids=["at the border", "slow alone", "no gain together"],
)
def test_dense_has_to_be_worth_its_bytes(dense: Timings, expected: bool) -> None:
    """It may cost one row 2x, and has to bring a batch 1.25x."""
    assert is_dense_better(Measured(Timings(1.0, 15.0), dense))[0] is expected


@pytest.mark.parametrize(("limit_bytes", "expected"), [(1334, Layout.FLOAT32), (1333, None)])
def test_dense_has_to_fit(limit_bytes: int, expected: Layout | None) -> None:
    """At most 60% of the pool's limit; what does not fit is not even measured."""
    choosing, device = chooser("cpu", CPU, limit_bytes)
    choice = choosing.choose(Q4, bytes_in)
    assert choice.layout is (expected or Layout.STORED)
    assert bool(device.forms) is (expected is not None)
    assert choice.log_fields()["dense_bytes"] == 800


def test_unquantised_models_stay_as_they_are_on_a_gpu() -> None:
    """Nothing is measured for them."""
    choosing, device = chooser("cuda", CUDA)
    assert choosing.choose(Form("F16"), bytes_in).layout is Layout.STORED
    assert device.forms == []


def test_float32_needs_no_measuring_on_a_cpu() -> None:
    """It is stored in the dense form already, whatever the limit."""
    choosing, device = chooser("cpu", CPU, 1)
    assert choosing.choose(Form("F32"), lambda _: 800).layout is Layout.FLOAT32
    assert device.forms == []


def test_each_form_is_measured_once() -> None:
    """However many models have it, and however often each is asked for."""
    choosing, device = chooser("cpu", CPU)
    for form in (Q4, Q4, Form("BF16"), Q4, Form("BF16")):
        choosing.choose(form, bytes_in)
    assert device.forms == [Q4, Form("BF16")]


@pytest.mark.parametrize(("kind", "expected"), [("cpu", Layout.FLOAT32), ("cuda", Layout.STORED)])
def test_measuring_that_fails(kind: str, expected: Layout) -> None:
    """A guess by the device, one line in the log, and no second try."""

    def measure(*_: object) -> Measured:
        raise ValueError("no kernel")

    choosing = LayoutChooser(None, kind=kind, measure=measure)
    with capture_logs() as logs:
        choices = [choosing.choose(Q4, bytes_in) for _ in range(2)]
    assert [choice.layout for choice in choices] == [expected] * 2
    assert [(each["event"], each["error"]) for each in logs] == [
        ("layout.not_measured", "no kernel")
    ]


def test_form_of_a_model() -> None:
    """By config.json if it is quantised, else by what most values are stored in."""
    headers = [TensorHeader("a", "F32", (9,)), TensorHeader("b", "BF16", (10,))]
    assert form_of(headers, {}) == Form("BF16")
    assert form_of(headers, {"bits": 4, "group_size": 64}) == Q4
    assert form_of(headers, {"quant_method": "mxfp4"}) == Form("mxfp4", 4, 32)
    assert form_of(headers, {"quant_method": "bitnet"}) is None
    assert form_of([], {}) is None


# ---------------------------------------------------------------- on this CPU


@pytest.mark.parametrize(
    ("wins_at", "asked"), [(7, [7]), (32, [7, 32]), (64, [7, 32])], ids=["few", "many", "never"]
)
def test_cuda_is_asked_about_more_rows_only_while_it_matters(
    monkeypatch: pytest.MonkeyPatch, wins_at: int, asked: list[int]
) -> None:
    """Each quantised kernel for more rows takes half a minute to compile there."""
    rows: list[int] = []

    def time_them(_: object, num_rows: int, __: object) -> Timings:
        if not rows or rows[-1] != num_rows:
            rows.append(num_rows)
            return Timings(1.0, 2.0 if num_rows >= wins_at else 1.0)
        return Timings(1.0, 1.0)

    monkeypatch.setattr(layout_module, "_time", time_them)
    monkeypatch.setattr(layout_module, "GPU_SHAPE", ((256,), 64))
    monkeypatch.setattr(layout_module, "device_kind", lambda: "cuda")
    measured = measure_products(Q4, Layout.BFLOAT16, nullcontext())
    assert (rows, measured.num_rows) == (asked, asked[-1])
    assert is_dense_better(measured)[0] is (wins_at in asked)


@pytest.fixture
def blas() -> OpenBlas:
    """What conftest.py has loaded."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "openblas_set_num_threads"):
        pytest.skip("OpenBLAS was not loaded here")
    return OpenBlas(
        threads=library.openblas_get_num_threads(), set_threads=library.openblas_set_num_threads
    )


def loader(
    blas: OpenBlas | None = None,
    limit_bytes: int | None = None,
    layout: Layout = Layout.AUTO,
    processors: AbstractContextManager[None] | None = None,
) -> MlxLoader:
    return MlxLoader(
        prefill_step_tokens=16,
        default_layout=layout,
        blas=blas,
        pool_limit_bytes=limit_bytes,
        processors=processors,
    )


def inspected(loader: MlxLoader, folder: Path) -> ModelInfo:
    info = loader.inspect(ModelSpec("tiny", folder))
    assert info is not None
    return info


def to_bfloat16(folder: Path) -> None:
    """Store the weights as most unquantised models are."""
    file = str(folder / "model.safetensors")
    arrays = mx.load(file)
    assert isinstance(arrays, dict)
    halved = {name: array.astype(mx.bfloat16) for name, array in arrays.items()}
    mx.eval(halved)
    mx.save_safetensors(file, halved, metadata={"format": "mlx"})


@pytest.mark.parametrize("quantized", [True, False], ids=["4-bit", "bf16"])
def test_measured_here(blas: OpenBlas, tmp_path: Path, quantized: bool) -> None:
    """A CPU gets float32; the files' look and the load agree, and one log line says why."""
    folder = write_model(tmp_path / "tiny", quantized=quantized)
    if not quantized:
        to_bfloat16(folder)
    lock = CountingLock()
    loading = loader(blas, processors=lock)
    info = inspected(loading, folder)
    assert info.estimated_bytes == inspected(loader(layout=Layout.FLOAT32), folder).estimated_bytes
    assert lock.num_turns > 0
    with capture_logs() as logs:
        model = loading.load(ModelSpec("tiny", folder), lambda _: None, lambda: False)
    assert model.resident_bytes == pytest.approx(info.estimated_bytes, rel=0.05)
    (line,) = [each for each in logs if each["event"] == "model.layout"]
    assert line["layout"] == "float32"
    assert line["dense_bytes"] > line["stored_bytes"]
    assert line["dense_ms"][1] < line["stored_ms"][1]


def test_blas_gets_its_threads_back(blas: OpenBlas, tmp_path: Path) -> None:
    """One thread while measuring, then as many as before."""
    told: list[int] = []
    counted = OpenBlas(threads=7, set_threads=told.append)
    inspected(loader(counted), write_model(tmp_path / "tiny", quantized=True))
    assert told
    assert told == [1, 7] * (len(told) // 2)


def test_what_does_not_fit_stays_stored(tmp_path: Path) -> None:
    """A limit below the dense size, less 40%, leaves the model as its files are."""
    folder = write_model(tmp_path / "tiny", quantized=True)
    dense_bytes = inspected(loader(layout=Layout.FLOAT32), folder).estimated_bytes
    stored_bytes = inspected(loader(layout=Layout.STORED), folder).estimated_bytes
    assert inspected(loader(limit_bytes=dense_bytes), folder).estimated_bytes == stored_bytes


def forbidden(*_: object) -> Measured:
    pytest.fail("measured")


@pytest.mark.parametrize("layout", [Layout.STORED, Layout.BFLOAT16])
def test_a_layout_that_was_set_wins(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured then."""
    monkeypatch.setattr(layout_module, "measure_products", forbidden)
    folder = write_model(tmp_path / "tiny", quantized=True)
    assert inspected(loader(layout=layout), folder).estimated_bytes > 0
