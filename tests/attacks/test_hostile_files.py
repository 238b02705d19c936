"""Hostile files, against what looks at them before they are opened, and then against the sandbox
alone, with that look left out."""

from pathlib import Path
from typing import Any

import h5py
import hostile
import numpy as np
import pytest
from attacking import ENOUGH, TENSORFLOW, Attacks, needs_landlock, snapshot

from app.domain.formats import DatasetFormat, ModelFormat
from app.domain.problems import WorkError
from app.domain.work import ModelSource
from workers.engine import datasets, loaders

FORMATS = {b"PK": ModelFormat.keras, b"\x89H": ModelFormat.h5}


def refused(content: bytes, folder: Path, format_: ModelFormat | None = None) -> str:
    """The code of the error that the file ends in."""
    folder.mkdir(exist_ok=True)
    (folder / "model").write_bytes(content)
    source = ModelSource(file="model", format=format_ or FORMATS[content[:2]])
    with pytest.raises(WorkError) as caught:
        loaders.inspect_model(source, folder)
    return caught.value.code


@pytest.mark.parametrize("name", hostile.CVES)
def test_known_attacks_on_keras_are_found_before_it_reads_them(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert refused(hostile.CVES[name](marker), tmp_path / "work") == "unsafe_model"
    assert not marker.exists()


def _layer(class_name: str, module: str = "keras.layers", **config: Any) -> dict[str, Any]:
    return {"module": module, "class_name": class_name, "config": {"name": "l", **config},
            "registered_name": None}  # fmt: skip


@pytest.mark.parametrize(
    "layer",
    [
        _layer("TFSMLayer", filepath="/tmp/evil", call_endpoint="serve"),
        _layer("TorchModuleWrapper", module_="gASV"),
        _layer("JaxLayer", call_fn=hostile.function("os", "system")),
        _layer("StringLookup", vocabulary="/etc/passwd"),
        _layer("TextVectorization", vocabulary="http://127.0.0.1/words"),
        _layer("IntegerLookup", module="keras.src.layers", vocabulary="/etc/passwd"),
        _layer("get_file", module="keras.utils", origin="http://127.0.0.1/x"),
        _layer("Thing", module="keras.src.utils.file_utils"),
        _layer("load_model", module="keras.saving"),
        _layer("TensorBoard", module="keras.callbacks", log_dir="/tmp"),
        hostile.dense(activation=hostile.function("builtins.os", "system")),
        hostile.dense(activation=hostile.function("keras.saving", "load_model")),
    ],
)
def test_layers_that_do_more_than_compute(layer: dict[str, Any], tmp_path: Path) -> None:
    assert refused(hostile.keras_file(hostile.sequential(layer)), tmp_path) == "unsafe_model"


@pytest.mark.parametrize(
    "function",
    ["io.write_file", "io.read_file", "compat.v1.summary.FileWriter", "raw_ops.WriteFile",
     "experimental.register_filesystem_plugin", "compat.v1.train.Saver", "load_library",
     "py_function", "compat.v1.py_func", "keras.utils.get_file", "data.Dataset.from_tensors"],
)  # fmt: skip
def test_functions_of_tensorflow_that_do_more_than_compute(function: str, tmp_path: Path) -> None:
    layer = {"class_name": "TFOpLambda", "config": {"name": "l", "function": function}}
    content = hostile.h5_file(hostile.sequential(layer, module=None))
    assert refused(content, tmp_path) == "unsafe_model"


@pytest.mark.parametrize("link", ["soft", "external", "virtual", "storage"])
def test_hdf5_that_reaches_outside(link: str, tmp_path: Path) -> None:
    path = tmp_path / "made.h5"
    path.write_bytes(hostile.h5_file(hostile.sequential(module=None)))
    with h5py.File(path, "r+") as file:
        if link == "soft":
            file["model_weights/x"] = h5py.SoftLink("/elsewhere")
        elif link == "external":
            file["model_weights/x"] = h5py.ExternalLink("/etc/passwd", "/")
        elif link == "virtual":
            layout = h5py.VirtualLayout((4,), "f4")
            layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
            file.create_virtual_dataset("model_weights/x", layout)
        else:
            file.create_dataset("model_weights/x", (4,), "u1", external=[("/etc/passwd", 0, 4)])
    assert refused(path.read_bytes(), tmp_path) == "unsafe_model"


def test_hdf5_that_declares_far_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "made.h5"
    path.write_bytes(hostile.h5_file(hostile.sequential(module=None)))
    with h5py.File(path, "r+") as file:
        file.create_dataset("model_weights/x", (1 << 36,), "f4", chunks=(1 << 20,),
                            compression="gzip")  # fmt: skip
    assert refused(path.read_bytes(), tmp_path) == "unsafe_archive"


def test_bombs_and_astray_members_of_archives(tmp_path: Path) -> None:
    bomb = hostile.bomb(0xF0000000)
    assert refused(bomb, tmp_path / "bomb", ModelFormat.keras) == "unsafe_archive"
    for number, name in enumerate(("../../evil", "/tmp/litesmith-evil", "C:evil", "a\\..\\evil")):
        work = tmp_path / str(number)
        content = hostile.zipped({"saved_model.pb": b"", name: b"evil"})
        assert refused(content, work, ModelFormat.saved_model) == "unsafe_archive"
        assert not (tmp_path / "evil").exists()
    for name, target in (("x/link", "/etc/passwd"), ("saved_model.pb", "/etc/passwd")):
        content = hostile.tarred(**{name: target})
        assert refused(content, tmp_path / name[0], ModelFormat.saved_model) == "unsafe_archive"


def test_pickles_in_datasets_are_not_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    np.savez(tmp_path / "data.npz", x=np.array([Evil(), Evil()], dtype=object))
    with pytest.raises(WorkError) as caught:
        datasets.inspect_dataset(tmp_path / "data.npz", DatasetFormat.npz, 2**30)
    assert caught.value.code == "pickled_array"
    assert not marker.exists()


def test_one_high_label_does_not_fill_the_memory(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2**62, 1], np.int64)
    np.savez(tmp_path / "data.npz", x=np.eye(4, dtype=np.float32), y=labels)
    facts = datasets.inspect_dataset(tmp_path / "data.npz", DatasetFormat.npz, 2**30)
    assert facts.splits["all"].samples == 4


@pytest.mark.parametrize(
    "header", ["{'descr': '<f4', 'shape': (1,),", "{" * 200, "(" * 9000, "x ="]
)
def test_headers_of_arrays_are_source_that_may_not_parse(header: str, tmp_path: Path) -> None:
    text = header.encode().ljust(9990) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4)
    (tmp_path / "data.npz").write_bytes(hostile.zipped({"x.npy": array}))
    with pytest.raises(WorkError) as caught:
        datasets.inspect_dataset(tmp_path / "data.npz", DatasetFormat.npz, 2**30)
    assert caught.value.code == "corrupt_file"


@pytest.mark.parametrize(
    ("graphs", "operators", "name"), [(100, 50_000, 0), (1, 2_000, 2**20), (60_000, 100, 0)]
)
def test_a_tflite_that_shares_its_parts_to_grow(
    tmp_path: Path, graphs: int, operators: int, name: int
) -> None:
    """References to one table, or one name, unpack to far more than the file has bytes."""
    content = hostile.sharing_tflite(graphs, operators, name)
    assert len(content) < 2 << 20
    assert refused(content, tmp_path, ModelFormat.tflite) == "corrupt_file"


def test_a_saved_model_that_uses_files_is_refused(models: Path, tmp_path: Path) -> None:
    content = (models / "evil.zip").read_bytes()
    assert refused(content, tmp_path, ModelFormat.saved_model) == "unsafe_model"
    assert not (models / "marker").exists()


UNSCANNED = """
import io, zipfile
import keras, tf_keras
import tensorflow as tf
import numpy as np
zipfile.ZipFile("in/saved_model").extractall("out/saved_model")
def load_and_run():
    loaded = tf.saved_model.load("out/saved_model")
    return loaded.signatures["serving_default"](tf.ones((1, 4)))
def convert():
    return tf.lite.TFLiteConverter.from_saved_model("out/saved_model").convert()
def load(library, name, suffix):
    path = Path(f"tmp/{name}{suffix}")
    path.write_bytes(Path("in", name).read_bytes())
    keras.config.enable_unsafe_deserialization()
    model = library.models.load_model(str(path), compile=False, safe_mode=False)
    return model(np.ones((1, 4), "float32"))
result(dict(
    saved_model=tried(load_and_run),
    converted=tried(convert),
    h5=tried(lambda: load(tf_keras, "CVE-2025-9905", ".h5")),
    keras=tried(lambda: load(keras, "CVE-2025-9906", ".keras")),
    written=tried(lambda: tf.io.write_file(marker, "x")),
    read=tried(lambda: tf.io.read_file("/etc/passwd")),
    library=tried(lambda: tf.load_op_library("out/none.so")),
))
"""


@needs_landlock
def test_the_sandbox_alone_stops_what_no_scan_has_seen(attacks: Attacks, models: Path) -> None:
    """TensorFlow has run before, so its threads are those that were there before the work."""
    before = snapshot(models)
    marker = models / "marker"
    files = {name: make(marker) for name, make in hostile.CVES.items()}
    found = attacks.run(
        f"marker = {str(marker)!r}\n" + UNSCANNED,
        ENOUGH,
        preload=TENSORFLOW,
        files=files | {"saved_model": (models / "evil.zip").read_bytes()},
    )
    assert not any(told == "done" for told in found.values()), found
    # They were stopped by the sandbox, and not by something that went wrong before.
    for name in ("saved_model", "written", "read", "h5"):
        assert "denied" in found[name] or "Permission" in found[name], found
    assert snapshot(models) == before
