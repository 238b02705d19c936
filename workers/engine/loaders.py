"""Models of all four formats, loaded and inspected; TensorFlow is imported only where needed.

The process must have `TF_USE_LEGACY_KERAS=1` in its environment before TensorFlow is imported.
"""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.formats import ModelFormat
from app.domain.problems import WorkError
from app.domain.work import ModelFacts, ModelSource, TensorFact
from workers.engine import keras_saved_model, scan, scan_saved_model, scan_tflite
from workers.engine.archives import Limits, unpack
from workers.engine.names import clean_errors

log = logging.getLogger(__name__)

MAX_MODEL_BYTES = 16 * 2**30
MODEL_LIMITS = Limits(members=10_000, total_bytes=MAX_MODEL_BYTES)
DTYPES = frozenset({"float32", "float64", "float16", "int8", "int16", "int32", "int64",
                    "uint8", "uint16", "uint32", "uint64", "bool"})  # fmt: skip
# Children of saved objects whose variables are no weights, or, with Keras 3, copies of them.
_NO_WEIGHTS = frozenset({"keras_api", "optimizer", "_optimizer", "keras_metrics", "_all_variables"})
_NO_LAYERS = (
    "A .tflite file holds no layers that could be trained: upload the Keras model that it was made"
    " from."
)
INITIALIZER = "__saved_model_init_op"


@dataclass(frozen=True)
class LoadedModel:
    """A model that was checked and read once: its facts, and what the converter starts from.

    One of the three is set: `keras` (a Keras 2 or 3 model), `saved_model` (its unpacked folder,
    with the `signature` to use) or `content` (the bytes of a .tflite). `load_keras` sets `keras`
    of a SavedModel too, and `variables`: its tf.Variables by their keys in the checkpoint.
    """

    source: ModelSource
    facts: ModelFacts
    keras: Any | None = None
    saved_model: Path | None = None
    signature: str = ""
    tags: tuple[str, ...] = ()
    content: bytes | None = None
    variables: Mapping[str, Any] | None = None


def inspect_model(source: ModelSource, directory: Path) -> ModelFacts:
    """Inputs, outputs and parameters of the model file `directory / source.file`.

    Raises WorkError: `corrupt_file`, `unsafe_archive`, `unsafe_model`, `custom_objects`,
    `weights_only`, `unsupported_model`, `unsupported_ops`, `not_float32`, `no_signature`,
    `tensor_type`.
    """
    return load(source, directory).facts


def load(source: ModelSource, directory: Path) -> LoadedModel:
    """Check and load a model, to inspect and convert it without loading it twice.

    Raises as `inspect_model` does.
    """
    with clean_errors():
        return _load(source, directory)


def load_keras(source: ModelSource, directory: Path) -> LoadedModel:
    """As `load`, with `keras` set to layers that can be trained, in every format that has them.

    Inputs and outputs of a SavedModel's layers stand in the order of its facts. Raises as `load`
    does, and WorkError `not_trainable`.
    """
    with clean_errors():
        loaded = _load(source, directory)
        if not loaded.facts.trainable:
            reason = loaded.facts.not_trainable or "The model holds no layers."
            raise WorkError("not_trainable", reason, keras_saved_model.UPLOAD_KERAS)
        if loaded.keras is not None:
            return loaded
        assert loaded.saved_model is not None
        facts = loaded.facts
        model, variables = keras_saved_model.load_layers(
            loaded.saved_model, loaded.tags, loaded.signature, facts.inputs, facts.outputs
        )
        return replace(loaded, keras=model, variables=variables)


def _load(source: ModelSource, directory: Path) -> LoadedModel:
    path = directory / source.file
    if not path.is_file() or path.stat().st_size == 0:
        raise WorkError("corrupt_file", f"the file {path.name} is empty", scan.REPEAT_HINT)
    if source.format == ModelFormat.tflite:
        return _load_tflite(source, path)
    if source.format == ModelFormat.saved_model:
        return _load_saved_model(source, path, directory)
    return _load_keras(source, path)


def _load_tflite(source: ModelSource, path: Path) -> LoadedModel:
    from ai_edge_litert.interpreter import Interpreter

    content = path.read_bytes()
    model = scan_tflite.scan_tflite(content)
    scan_tflite.check_float(model)
    try:
        interpreter = Interpreter(model_content=content, num_threads=1)
        inputs = [_detail_fact(detail) for detail in interpreter.get_input_details()]
        outputs = [_detail_fact(detail) for detail in interpreter.get_output_details()]
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError, TypeError) as error:
        raise WorkError(
            "unsupported_model",
            f"the LiteRT interpreter refuses the .tflite file: {_gist(error)}",
            "Convert the model anew with a current TFLiteConverter, built-in operators only.",
        ) from None
    parameters, depthwise = scan_tflite.count_parameters(model), scan_tflite.has_depthwise(model)
    facts = _facts(inputs, outputs, parameters, _NO_LAYERS, depthwise)
    return LoadedModel(source, facts, content=content)


def _detail_fact(detail: dict[str, Any]) -> TensorFact:
    shape = [int(size) for size in detail["shape_signature"]]
    if not shape:
        shape = [int(size) for size in detail["shape"]]
    return TensorFact(name=detail["name"], shape=shape, dtype=np.dtype(detail["dtype"]).name)


def _facts(
    inputs: list[TensorFact],
    outputs: list[TensorFact],
    parameters: int,
    not_trainable: str | None = None,
    depthwise: bool | None = None,
) -> ModelFacts:
    if not inputs or not outputs:
        raise WorkError(
            "unsupported_model",
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs",
            "A model needs at least one of each.",
        )
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                raise WorkError(
                    "tensor_type",
                    f"the model's {kind} '{tensor.name}' is of type {tensor.dtype},"
                    " which edge devices cannot be fed with",
                    "Take text and other preprocessing out of the model; feed it numbers.",
                )
    return ModelFacts(
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
        trainable=not_trainable is None,
        not_trainable=not_trainable,
        depthwise=depthwise,
    )


def _load_keras(source: ModelSource, path: Path) -> LoadedModel:
    if source.format == ModelFormat.keras:
        version = scan.scan_keras(path, MODEL_LIMITS)
        library = "tf_keras" if version.startswith("2.") else "keras"
    else:
        version = scan.scan_h5(path)
        library = "keras" if version.startswith("3.") else "tf_keras"
    model = _read_keras(path, library)
    try:
        inputs = [_keras_fact(tensor) for tensor in model.inputs or []]
        outputs = [_keras_fact(tensor) for tensor in model.outputs or []]
    except AttributeError:
        inputs, outputs = [], []
    if not inputs or not outputs:
        raise WorkError(
            "unsupported_model",
            "the Keras model has no fixed inputs: it was never built, or it is a subclass of Model",
            scan.EXPORT_HINT,
        )
    # Keras 3 knows outputs by the tensors inside; the names of the layers say more.
    names = list(getattr(model, "output_names", None) or [])
    if len(names) == len(outputs) and len(set(names)) == len(names):
        outputs = [
            fact.model_copy(update={"name": n}) for fact, n in zip(outputs, names, strict=True)
        ]
    facts = _facts(inputs, outputs, int(model.count_params()), depthwise=_has_depthwise(model))
    return LoadedModel(source, facts, keras=model)


def _has_depthwise(model: Any) -> bool:
    """Whether a layer, of nested models too, convolves each channel by itself."""
    depthwise = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")
    layers = model._flatten_layers(include_self=False, recursive=True)
    return any(type(layer).__name__ in depthwise for layer in layers)


def _read_keras(path: Path, library: str) -> Any:
    """Load by the library that wrote the file, without what compiled the model."""
    if library == "keras":
        import keras
    else:
        # Not `tf.keras`: that depends on the environment of the process.
        import tf_keras as keras

    suffix = ".h5" if path.read_bytes()[:4] == b"\x89HDF" else ".keras"
    with tempfile.TemporaryDirectory() as scratch:
        # Keras tells formats apart by the file's name, which an upload does not keep.
        named = Path(scratch) / f"model{suffix}"
        named.symlink_to(path.resolve())
        try:
            return keras.models.load_model(str(named), compile=False, safe_mode=True)
        except WorkError:
            raise
        except Exception as error:
            # Keras raises whatever its layers raise on a configuration that does not fit.
            raise _keras_problem(error, library) from error


def _keras_problem(error: Exception, library: str) -> WorkError:
    text = str(error)
    lowered = text.lower()
    custom = ("unknown layer", "could not locate", "unknown activation", "unknown object",
              "unknown initializer", "custom_objects", "unknown regularizer",
              "unknown constraint", "could not be located")  # fmt: skip
    if "unsafe" in lowered or "lambda" in lowered:
        return scan.unsafe(f"Keras refuses the model as unsafe: {_gist(error)}")
    if any(phrase in lowered for phrase in custom):
        return WorkError(
            "custom_objects",
            "the model uses a layer or function which is not part of Keras but of the program"
            f" that saved it: {_gist(error)}",
            scan.EXPORT_HINT,
        )
    if isinstance(error, OSError | KeyError | EOFError) or "synchronously" in lowered:
        return scan.corrupt(f"the Keras file is damaged or incomplete: {_gist(error)}")
    return WorkError(
        "unsupported_model",
        f"{library} cannot load the model: {_gist(error)}",
        scan.EXPORT_HINT,
    )


def _gist(error: Exception, limit: int = 300) -> str:
    """The first telling line of an error, without its trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def _keras_fact(tensor: Any) -> TensorFact:
    name = str(tensor.name).split(":")[0]
    shape = [-1 if size is None else int(size) for size in tensor.shape]
    dtype = tensor.dtype if isinstance(tensor.dtype, str) else tensor.dtype.name
    return TensorFact(name=name, shape=shape, dtype=dtype)


def _load_saved_model(source: ModelSource, path: Path, directory: Path) -> LoadedModel:
    target = Path(tempfile.mkdtemp(prefix="saved_model-", dir=directory))
    unpack(path, target, MODEL_LIMITS)
    found = sorted(target.rglob("saved_model.pb"), key=lambda file: len(file.parts))
    if not found:
        raise WorkError(
            "corrupt_file",
            "the archive holds no saved_model.pb",
            "Pack the folder that holds saved_model.pb and variables/.",
        )
    folder = found[0].parent
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    message = saved_model_pb2.SavedModel()
    try:
        message.ParseFromString(found[0].read_bytes())
    except DecodeError:
        raise scan.corrupt("saved_model.pb is damaged or cut off") from None
    if not message.meta_graphs:
        raise scan.corrupt("saved_model.pb holds no graph")
    scan_saved_model.scan(message)
    graph = _serving_graph(message)
    key = _signature_key(graph)
    signature = graph.signature_def[key]
    _check_variables(graph, folder)
    facts = _facts(
        [_signature_fact(name, signature.inputs[name]) for name in sorted(signature.inputs)],
        [_signature_fact(name, signature.outputs[name]) for name in sorted(signature.outputs)],
        _count_saved(graph),
        keras_saved_model.why_not_trainable(folder),
        _has_depthwise_nodes(graph),
    )
    tags = tuple(graph.meta_info_def.tags)
    return LoadedModel(source, facts, saved_model=folder, signature=key, tags=tags)


def _serving_graph(message: Any) -> Any:
    graphs = message.meta_graphs
    return next((graph for graph in graphs if "serve" in graph.meta_info_def.tags), graphs[0])


def _signature_key(graph: Any) -> str:
    keys = [key for key in graph.signature_def if key != INITIALIZER]
    usable = [key for key in keys if graph.signature_def[key].outputs]
    if "serving_default" in usable:
        return "serving_default"
    if len(usable) == 1:
        return str(usable[0])
    told = f"several, none of them 'serving_default': {', '.join(usable)}" if usable else "none"
    raise WorkError(
        "no_signature",
        f"a SavedModel is used by its signature, and this one has {told}",
        "Save it with `tf.saved_model.save(module, path, signatures=module.f.get_concrete_function"
        "(tf.TensorSpec([None, …], tf.float32)))`.",
    )


def _signature_fact(name: str, info: Any) -> TensorFact:
    import tensorflow as tf

    dtype = tf.dtypes.as_dtype(info.dtype).name
    if info.tensor_shape.unknown_rank:
        raise WorkError(
            "unsupported_model",
            f"the signature leaves open how many dimensions '{name}' has",
            "Give its TensorSpec a shape, with None for the sizes that stay open.",
        )
    return TensorFact(name=name, shape=[int(d.size) for d in info.tensor_shape.dim], dtype=dtype)


def _check_variables(graph: Any, folder: Path) -> None:
    """A SavedModel whose variables are lost or damaged loads with an error nobody understands."""
    stored = any(node.op in ("VarHandleOp", "VariableV2") for node in graph.graph_def.node)
    if not stored:
        return
    if not (folder / "variables" / "variables.index").is_file():
        raise WorkError(
            "corrupt_file",
            "the archive holds saved_model.pb without variables/variables.index",
            "Pack the whole folder that the model was saved to.",
        )
    import tensorflow as tf

    try:
        tf.train.list_variables(str(folder / "variables" / "variables"))
    except (tf.errors.OpError, LookupError, ValueError, RuntimeError) as error:
        raise scan.corrupt(f"the variables of the SavedModel are damaged: {_gist(error)}") from None


def _count_saved(graph: Any) -> int:
    """Floating weights that the object graph reaches, without optimizer and metrics."""
    nodes = graph.object_graph_def.nodes
    floating = {1, 2, 14, 19}  # DT_FLOAT, DT_DOUBLE, DT_BFLOAT16, DT_HALF
    total, seen, pending = 0, {0}, [0] if nodes else []
    while pending:
        node = nodes[pending.pop()]
        if node.HasField("variable") and node.variable.dtype in floating:
            total += _elements(node.variable.shape)
        for child in node.children:
            skip = child.local_name in _NO_WEIGHTS
            if child.node_id not in seen and not skip and 0 <= child.node_id < len(nodes):
                seen.add(child.node_id)
                pending.append(child.node_id)
    if total:
        return total
    # TensorFlow 1: variables without an object graph, or a frozen graph of constants.
    values = [node.attr["value"].tensor for node in graph.graph_def.node if node.op == "Const"]
    variables = [n.attr["shape"].shape for n in graph.graph_def.node if n.op == "VariableV2"]
    constants = [value.tensor_shape for value in values if value.dtype in floating]
    return sum(_elements(shape) for shape in variables + constants)


def _has_depthwise_nodes(graph: Any) -> bool:
    """Whether the graph or one of its functions has a depthwise convolution."""
    functions = graph.graph_def.library.function
    bodies = [graph.graph_def.node, *(function.node_def for function in functions)]
    return any(node.op == "DepthwiseConv2dNative" for nodes in bodies for node in nodes)


def _elements(shape: Any) -> int:
    product = 1
    for dimension in shape.dim:
        product *= max(int(dimension.size), 0)
    return product
