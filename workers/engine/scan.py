"""What a Keras file holds, read without running any of it: done before loading.

Keras files name Python code by module and class; loading one would import it. That is looked for
here as data, so that a hostile file is refused before a library that trusts it sees it. The sandbox
of the process stands behind this (docs/sandbox.md).
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.domain.problems import WorkError
from workers.engine.archives import Limits, open_zip, refuse

MAX_CONFIG_BYTES = 64 * 2**20
# HDF5 stores zeros in no space: a small file may declare arrays that fill the memory.
MAX_WEIGHTS_RATIO = 50
WEIGHTS_RATIO_FREE_BYTES = 256 * 2**20
MAX_WEIGHTS_BYTES = 16 * 2**30

EXPORT_HINT = (
    "Save it as a SavedModel instead: `model.export('model')` (Keras 3) or"
    " `tf.saved_model.save(model, 'model')`, then upload that folder as a .zip."
)
REPEAT_HINT = "Upload the file again; check its size and checksum against the original."

_KERAS_MODULE = re.compile(r"^(?:tf_)?keras(?:\.|$)|^tensorflow\.(?:python\.)?keras(?:\.|$)")
# Parts of Keras that define what a model is made of. Others download, open and import.
_CLASS_MODULES = re.compile(
    r"^(?:(?:tf_)?keras|tensorflow\.(?:python\.)?keras)(?:\.(?:src|api|_tf_keras|keras))*"
    r"(?:$|\.(?:activations|constraints|dtype_policies|engine|initializers|layers|losses|metrics|"
    r"mixed_precision|models|ops|optimizers|quantizers|random|regularizers)(?:\.|$)|"
    r"\.backend\.common\.|\.utils\.(?:generic_utils|tf_utils)$)"
)
# Modules of Keras whose functions compute and touch nothing else.
_FUNCTION_MODULES = re.compile(
    r"^(?:tf_)?keras\.(?:src\.)?"
    r"(?:activations|initializers|regularizers|constraints|losses|metrics|ops|optimizers|layers|"
    r"backend)(?:\.|$)"
)
_LAMBDA_CLASSES = frozenset({"Lambda", "__lambda__", "__bytes__"})
# Layers of Keras that hold another library's program, pickled, or load one from a path.
_FOREIGN_CLASSES = frozenset({"TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"})
# Namespaces of TensorFlow whose functions a functional Keras 2 model may call as layers.
_TF_NAMESPACES = frozenset(
    {"math", "nn", "image", "linalg", "signal", "keras", "bitwise", "random", "strings", "dtypes",
     "sparse", "ragged", "__operators__", "quantization", "sets"}
)  # fmt: skip
_TF_BANNED = re.compile(
    r"py_func|numpy_function|load_|read_|write_|import_graph|(?:^|\.)io(?:\.|$)|"
    r"print|raw_ops|gfile|saved_model|utils|get_file|decode_proto|register|dlpack|summary|train\."
)
# Functions are written so; classes, which may open files, begin with a capital.
_TF_FUNCTION = re.compile(r"^(?:\w+\.)*[a-z_]\w*$")


def unsafe(message: str) -> WorkError:
    return WorkError(
        "unsafe_model", message, "Only models that compute, and do nothing else, are accepted."
    )


def corrupt(message: str) -> WorkError:
    return WorkError("corrupt_file", message, REPEAT_HINT)


def scan_keras(path: Path, limits: Limits) -> str:
    """Check a `.keras` archive; returns the version of Keras that wrote it ("" where untold).

    Raises WorkError `corrupt_file`, `unsafe_archive`, `unsafe_model` or `custom_objects`.
    """
    with open_zip(path, limits) as (archive, members):
        sizes = {member.name: member.size for member in members}
        for name in ("config.json", "metadata.json", "model.weights.h5"):
            if name not in sizes:
                raise corrupt(f"the Keras archive holds no {name}")
        config = _json(_read(archive, "config.json", sizes), "config.json")
        metadata = _json(_read(archive, "metadata.json", sizes), "metadata.json")
        scan_config(config)
        with archive.open("model.weights.h5") as weights:
            _scan_hdf5(weights, sizes["model.weights.h5"], "model.weights.h5")
    version = metadata.get("keras_version")
    return version if isinstance(version, str) else ""


def _read(archive: zipfile.ZipFile, name: str, sizes: dict[str, int]) -> bytes:
    if sizes[name] > MAX_CONFIG_BYTES:
        refuse(f"{name} of the Keras archive unpacks to {sizes[name]} bytes")
    return archive.read(name)


def _json(content: bytes | str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise corrupt(f"{name} of the Keras file is not readable as JSON") from None
    if not isinstance(value, dict):
        raise corrupt(f"{name} of the Keras file holds no object")
    return value


def scan_h5(path: Path) -> str:
    """Check a Keras `.h5` file; returns the version of Keras that wrote it ("" where untold).

    Raises WorkError `corrupt_file`, `weights_only`, `unsafe_model` or `custom_objects`.
    """
    import h5py

    with path.open("rb") as raw:
        _scan_hdf5(raw, path.stat().st_size, path.name)
    try:
        with h5py.File(path, "r") as file:
            config = _text(file.attrs.get("model_config"))
            version = _text(file.attrs.get("keras_version")) or ""
            holds_weights = (
                "model_weights" in file or "layers" in file or "layer_names" in file.attrs
            )
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise corrupt(f"the HDF5 file {path.name} is damaged or cut off: {error}") from None
    if config is None and not holds_weights:
        raise WorkError(
            "unsupported_model",
            "the HDF5 file holds no Keras model: the attribute 'model_config' is missing",
            "Upload a file that `model.save('model.h5')` wrote.",
        )
    if config is None:
        raise WorkError(
            "weights_only",
            "the .h5 file holds weights only, no architecture",
            "Save the whole model (`model.save(...)`, not `model.save_weights(...)`).",
        )
    if len(config) > MAX_CONFIG_BYTES:
        raise corrupt("the model_config of the .h5 file is larger than 64 MiB")
    scan_config(_json(config, "model_config"))
    return version


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _scan_hdf5(raw: Any, size: int, name: str) -> None:
    """Refuse links and storage outside the file, and arrays far larger than the file."""
    import h5py

    declared = 0
    try:
        # HDF5 seeks back and forth, which a deflated zip member does by starting over.
        source = raw if not isinstance(raw, zipfile.ZipExtFile) else io.BytesIO(raw.read())
        with h5py.File(source, "r") as file:
            for where, dataset in _datasets(file, 0):
                if dataset.external or dataset.is_virtual:
                    raise unsafe(f"the array '{where}' of {name} lies in another file")
                declared += int(dataset.size or 0) * dataset.dtype.itemsize
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise corrupt(f"the HDF5 file {name} is damaged or cut off: {error}") from None
    too_many = declared > WEIGHTS_RATIO_FREE_BYTES and declared > size * MAX_WEIGHTS_RATIO
    if declared > MAX_WEIGHTS_BYTES or too_many:
        refuse(f"{name} of {size} bytes declares arrays of {declared} bytes, as a bomb does")


def _datasets(group: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """(name, dataset) of all arrays below a group, by hard links only."""
    import h5py

    if depth > 64:
        refuse("the HDF5 file nests groups more than 64 deep")
    for key in group:
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise unsafe(f"the HDF5 file holds a soft or external link, '{key}'")
        item = group[key]
        if isinstance(item, h5py.Group):
            yield from _datasets(item, depth + 1)
        elif isinstance(item, h5py.Dataset):
            yield f"{group.name}/{key}", item


def scan_config(config: dict[str, Any], traced: bool = False) -> None:
    """Refuse a Keras model configuration that names code which is not of Keras.

    `traced`: custom layers are fine, as in a SavedModel, which holds them as graphs. Raises
    WorkError `unsafe_model` (Lambda, pickled code, functions from anywhere) or `custom_objects`
    (layers that only the author's program knows).
    """
    # What compiled the model is never loaded, so a custom loss or metric does no harm. What
    # compiled a model inside it is.
    pending: list[Any] = [{k: v for k, v in config.items() if k != "compile_config"}]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            if isinstance(item.get("class_name"), str):
                (_scan_traced if traced else _scan_object)(item)
            pending.extend(item.values())


def _scan_object(item: dict[str, Any]) -> None:
    class_name, module = item["class_name"], item.get("module")
    registered = item.get("registered_name")
    inner = item.get("config")
    settings = inner if isinstance(inner, dict) else {}
    title = settings.get("name") or item.get("name") or class_name
    last = class_name.rsplit(">", 1)[-1]
    if last in _LAMBDA_CLASSES:
        raise unsafe(
            f"the layer '{title}' is a Lambda layer: it holds Python code, which loading would run"
        )
    if last in _FOREIGN_CLASSES:
        raise unsafe(f"the layer '{title}' is a {last}: it runs a program that Keras cannot check")
    for key in ("vocabulary", "idf_weights"):
        if isinstance(settings.get(key), str):
            raise unsafe(
                f"the layer '{title}' reads its {key} from the file '{settings[key][:100]}'"
            )
    if class_name in ("TFOpLambda", "SlicingOpLambda"):
        _scan_function(str(settings.get("function", "")), str(title))
    if class_name == "ClassMethod":
        _scan_function(str(settings.get("cls_symbol", "")), str(title))
    if ">" in class_name or (isinstance(registered, str) and ">" in registered):
        raise _custom(registered if isinstance(registered, str) and ">" in registered else last)
    if class_name == "function":
        # Keras 3 writes a custom function with the module "builtins".
        if module == "builtins" and isinstance(inner, str):
            raise _custom(inner)
        if not isinstance(module, str) or not _FUNCTION_MODULES.match(module):
            raise unsafe(f"the model calls the function '{inner}' of the module '{module}'")
        return
    if "module" not in item or module == "builtins":
        return
    if module is None or module == "__main__":
        if registered or module == "__main__":
            raise _custom(last)
        return
    if not isinstance(module, str) or not _KERAS_MODULE.match(module):
        raise _custom(f"{module}.{last}")
    if not _CLASS_MODULES.match(module):
        raise unsafe(f"the model names '{last}' of '{module}', which is no part of a model")


def _scan_traced(item: dict[str, Any]) -> None:
    """`_scan_object` for classes that Keras does not find and then replaces by their graph: so
    they must not name a module, which Keras would import to look for them."""
    last, module = item["class_name"].rsplit(">", 1)[-1], item.get("module")
    known = isinstance(module, str) and _KERAS_MODULE.match(module)
    builtin = module in (None, "builtins") and last != "function"
    if not known and not builtin:
        raise unsafe(f"the model names '{last}' of the Python module '{module}'")
    plain = {key: value for key, value in item.items() if key != "registered_name"}
    try:
        _scan_object({**plain, "class_name": last})
    except WorkError as error:
        if error.code != "custom_objects":
            raise


def scan_keras_metadata(folder: Path) -> str | None:
    """Check what a SavedModel says of its Keras layers; returns the class of the model in it, None
    where it says nothing.

    It stands in `keras_metadata.pb`, and before TensorFlow 2.5 in the object graph. Raises
    WorkError `corrupt_file` or `unsafe_model`.
    """
    root = None
    for path, text in _keras_nodes(folder):
        metadata = _json(text, f"the Keras metadata of {path}")
        # What compiled the model is not loaded.
        metadata.pop("training_config", None)
        scan_config(metadata, traced=True)
        if path == "root":
            root = str(metadata.get("class_name"))
    return root


def _keras_nodes(folder: Path) -> list[tuple[str, str]]:
    """(path, JSON) of each layer that the metadata tells of."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2
    from tf_keras.protobuf import saved_metadata_pb2

    file = folder / "keras_metadata.pb"
    if file.is_file():
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise corrupt("keras_metadata.pb is larger than 64 MiB")
        try:
            nodes = saved_metadata_pb2.SavedMetadata.FromString(file.read_bytes()).nodes
        except DecodeError:
            raise corrupt("keras_metadata.pb is damaged") from None
        return [(node.node_path, node.metadata) for node in nodes]
    message = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    objects = message.meta_graphs[0].object_graph_def.nodes
    return [
        ("root" if place == 0 else f"node {place}", node.user_object.metadata)
        for place, node in enumerate(objects)
        if node.user_object.identifier.startswith("_tf_keras_") and node.user_object.metadata
    ]


def _scan_function(function: str, title: str) -> None:
    plain = re.sub(r"^compat\.v[12]\.", "", function)
    head = plain.split(".", 1)[0] if "." in plain else ""
    told = _TF_BANNED.search(function) or not _TF_FUNCTION.match(function)
    if told or (head and head not in _TF_NAMESPACES):
        raise unsafe(f"the layer '{title}' calls tf.{function}")


def _custom(name: str) -> WorkError:
    return WorkError(
        "custom_objects",
        f"the model uses '{name}', which is not part of Keras but of the program that saved it",
        EXPORT_HINT,
    )
