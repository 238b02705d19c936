"""Any model to a float32 .tflite, by TensorFlow's converter, once; and that converter's own
quantizer for what the service's quantizer cannot do.

Keras models are traced and frozen here instead of handed to `from_keras_model`, which writes a
SavedModel first and reads it back: the same file in a fraction of the time.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.formats import ModelFormat
from app.domain.problems import WorkError
from app.domain.recipes import DynamicRange, Int8, Int16x8, Quantization
from app.domain.work import ModelFacts, ModelSource, TensorFact
from workers.engine import graph as tfl
from workers.engine import loaders
from workers.engine.loaders import LoadedModel
from workers.engine.names import find
from workers.engine.samples import Array, Emit, Samples, silent

log = logging.getLogger(__name__)

# Sets the converter's options; told whether samples go by input name or by position.
Configure = Callable[[Any, bool], None]

MAX_INPUT_ELEMENTS = 2**28
_OPEN_BATCH_FAILURES = ("TensorList", "element_shape", "dynamic")


def to_float_tflite(source: ModelSource, directory: Path, emit: Emit) -> bytes:
    """The float32 .tflite of a model; a .tflite is returned as it is, without TensorFlow.

    The batch axis stays open where the model leaves it open (default 1), unless the source asks
    for a fixed one. Raises WorkError
    `dynamic_shape`, `conversion_failed`, `unsupported_ops`, and all that `loaders.load` raises.
    """
    emit("convert", 0.0, "loading the model")
    return convert(loaders.load(source, directory), emit)


def convert(model: LoadedModel, emit: Emit) -> bytes:
    """`to_float_tflite` for a model that is loaded already."""
    if model.content is not None:
        shapes = _fixed_inputs(model)
        if shapes != [fact.shape for fact in model.facts.inputs]:
            return tfl.with_sizes(model.content, shapes)
        return model.content
    emit("convert", 0.3, "converting to float32 .tflite")
    content = _run(model, lambda _converter, _named: None)
    emit("convert", 1.0, None)
    return content


def to_sparse_tflite(source: ModelSource, directory: Path, emit: Emit) -> bytes:
    """The float32 .tflite with weights that are mostly zeros stored sparsely.

    Raises WorkError `option_unsupported` for a .tflite source, and all that `to_float_tflite`
    raises.
    """
    emit("quantize", 0.0, "loading the model")
    model = loaders.load(source, directory)
    if model.content is not None:
        raise WorkError(
            "option_unsupported",
            "sparse_encoding starts from a Keras model, not from a .tflite",
            "Leave out sparse_encoding, or upload the model that the .tflite was made from.",
        )
    emit("quantize", 0.3, "converting to .tflite with sparse weights")
    content = _run(model, lambda converter, _named: _store_sparsely(converter))
    emit("quantize", 1.0, None)
    return content


def _store_sparsely(converter: Any) -> None:
    import tensorflow as tf

    # Together with Optimize.DEFAULT the file would not allocate.
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]


def quantize_with_converter(
    source: ModelSource,
    directory: Path,
    step: Quantization,
    samples: Samples | None,
    emit: Emit,
) -> bytes:
    """A quantized .tflite by TFLiteConverter's own quantizer.

    `samples` calibrate int8 and int16x8; the first `step.calibration.samples` are used. Raises
    WorkError `option_unsupported` for a .tflite source, `missing_data` without samples, and all
    that `to_float_tflite` raises.
    """
    emit("quantize", 0.0, "loading the model")
    model = loaders.load(source, directory)
    if model.content is not None:
        raise WorkError(
            "option_unsupported",
            'engine "converter" starts from a Keras model or a SavedModel, not from a .tflite',
            'Leave out "engine", or upload the model that the .tflite was made from.',
        )
    if isinstance(step, Int8 | Int16x8) and (samples is None or samples.count == 0):
        raise WorkError(
            "missing_data", f"{step.technique} needs samples to calibrate with", "Name a dataset."
        )
    emit("quantize", 0.3, "converting with TFLiteConverter's quantizer")
    content = _run(model, lambda tool, named: _configure(tool, model, step, samples, named))
    emit("quantize", 1.0, None)
    return content


def _configure(
    converter: Any,
    model: LoadedModel,
    step: Quantization,
    samples: Samples | None,
    named: bool,
) -> None:
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if step.technique == "float16":
        converter.target_spec.supported_types = [tf.float16]
        return
    if isinstance(step, DynamicRange | Int8 | Int16x8) and step.granularity == "per_tensor":
        converter._experimental_disable_per_channel = True
    if not isinstance(step, Int8 | Int16x8):
        return
    if step.dense_granularity == "per_tensor":
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    assert samples is not None
    wide = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    integer = tf.lite.OpsSet.TFLITE_BUILTINS_INT8 if step.technique == "int8" else wide
    fallback = [] if step.integer_only else [tf.lite.OpsSet.TFLITE_BUILTINS]
    converter.target_spec.supported_ops = [integer, *fallback]
    converter.inference_input_type = getattr(tf, step.input_type)
    converter.inference_output_type = getattr(tf, step.output_type)
    used = samples.head(step.calibration.samples)
    converter.representative_dataset = lambda: _representative(model, used, named)


def _representative(
    model: LoadedModel, samples: Samples, named: bool
) -> Iterator[list[Array] | dict[str, Array]]:
    """Samples as the converter asks for them, in batches that the inputs take."""
    facts = model.facts.inputs
    sizes = [fact.shape[0] for fact in facts if fact.shape and fact.shape[0] > 0]
    size = max(sizes, default=1)
    for start in range(0, samples.count - size + 1, size):
        batch = samples.read(start, start + size)
        arrays = {fact.name: _array_of(fact, batch, len(facts)) for fact in facts}
        yield arrays if named else list(arrays.values())


def _array_of(fact: TensorFact, batch: dict[str, Array], inputs: int) -> Array:
    name = next(iter(batch)) if inputs == 1 and len(batch) == 1 else find(fact.name, list(batch))
    if name is None:
        raise WorkError(
            "missing_input",
            f"the data has no array for the model's input '{fact.name}'; it has: "
            + ", ".join(batch),
            "Name the arrays as the model's inputs are named.",
        )
    return np.ascontiguousarray(batch[name], dtype=fact.dtype)


def _fixed_inputs(model: LoadedModel) -> list[list[int]]:
    """The full shape of every input; only the batch axis may stay open (-1).

    Raises WorkError `dynamic_shape`, or `shape_mismatch` where a given shape contradicts.
    """
    given = model.source.input_shapes
    shapes = []
    for fact in model.facts.inputs:
        name = find(fact.name, list(given))
        shape = list(fact.shape)
        if name is not None:
            shape = _merge(fact, given[name])
        if model.source.fixed_batch and shape and shape[0] == -1:
            shape = [1, *shape[1:]]
        if -1 in shape[1:]:
            raise WorkError(
                "dynamic_shape",
                f"the input '{fact.name}' of shape {shape} leaves sizes open that edge devices"
                " need fixed",
                f'Give them in the spec: "input_shapes": {{"{fact.name}": '
                f"{[1, *(size if size > 0 else 224 for size in shape[1:])]}}}, or name a dataset"
                " whose samples have the size.",
            )
        if np.prod([abs(size) for size in shape], dtype=np.float64) > MAX_INPUT_ELEMENTS:
            raise WorkError(
                "shape_mismatch",
                f"the input '{fact.name}' of shape {shape} is larger than any device can hold",
                "Give smaller sizes in input_shapes.",
            )
        shapes.append(shape)
    return shapes


def _merge(fact: TensorFact, given: list[int]) -> list[int]:
    fits = len(given) == len(fact.shape) and all(
        size >= 1 and own in (-1, size) for size, own in zip(given, fact.shape, strict=True)
    )
    if not fits:
        raise WorkError(
            "shape_mismatch",
            f"input_shapes gives {given} for the input '{fact.name}', whose shape is {fact.shape}",
            "Give the full shape with batch; sizes that the model fixes must stay the same.",
        )
    # A batch of 1 is what an open batch axis runs with anyway, and open it can still be resized.
    batch = -1 if fact.shape[0] == -1 and given[0] == 1 else given[0]
    return [batch, *given[1:]]


def _run(model: LoadedModel, configure: Configure) -> bytes:
    """Convert; once more with a batch of 1 where the open batch axis is what stood in the way."""
    shapes = _fixed_inputs(model)
    try:
        return _convert(model, shapes, configure)
    except WorkError:
        raise
    except Exception as error:
        text = str(error)
        is_open = any(shape and shape[0] == -1 for shape in shapes)
        if not (is_open and any(word in text for word in _OPEN_BATCH_FAILURES)):
            # The converter raises its own errors, and whatever its passes trip over.
            raise _problem(error) from error
    fixed = [[1, *shape[1:]] if shape and shape[0] == -1 else shape for shape in shapes]
    try:
        return _convert(model, fixed, configure)
    except WorkError:
        raise
    except Exception as error:
        raise _problem(error) from error


def _convert(model: LoadedModel, shapes: list[list[int]], configure: Configure) -> bytes:
    """One conversion; a SavedModel that does not freeze is handed to the converter whole."""
    import tensorflow as tf

    with quiet():
        if model.keras is not None:
            traced, _ = _trace(model, shapes)
            converter = tf.lite.TFLiteConverter.from_concrete_functions([traced])
            # The converter freezes the function itself then, instead of saving and loading it.
            converter.experimental_lower_to_saved_model = False
            configure(converter, False)
            return bytes(converter.convert())
        try:
            converter = tf.lite.TFLiteConverter.from_concrete_functions([_freeze(model, shapes)])
            configure(converter, False)
            return bytes(converter.convert())
        except WorkError:
            raise
        except Exception:
            if shapes != [fact.shape for fact in model.facts.inputs]:
                raise
            log.info("the frozen function did not convert; trying the SavedModel", exc_info=True)
        converter = tf.lite.TFLiteConverter.from_saved_model(
            str(model.saved_model), signature_keys=[model.signature], tags=set(model.tags)
        )
        configure(converter, True)
        return bytes(converter.convert())


def _trace(model: LoadedModel, shapes: list[list[int]]) -> tuple[Any, Any]:
    """The model as one function, its inputs of `shapes` named as in its facts; and its owner,
    which must live as long as the function."""
    import tensorflow as tf

    specs = [
        tf.TensorSpec([None if s == -1 else s for s in shape], fact.dtype, name=fact.name)
        for fact, shape in zip(model.facts.inputs, shapes, strict=True)
    ]
    call, owner = _callable(model)
    # Autograph would rewrite Keras's own code, which needs none.
    traced = tf.function(call, input_signature=specs, autograph=False)
    return traced.get_concrete_function(), owner


def _freeze(model: LoadedModel, shapes: list[list[int]]) -> Any:
    """`_trace` with the variables made constants, and calls of functions inlined."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    traced, _owner = _trace(model, shapes)
    return convert_variables_to_constants_v2(traced, lower_control_flow=False)


def _callable(model: LoadedModel) -> tuple[Callable[..., Any], Any]:
    """The model as a function of its inputs in order, giving outputs in order; and its owner."""
    import tensorflow as tf

    names = [fact.name for fact in model.facts.inputs]
    if model.keras is None:
        owner = tf.saved_model.load(str(model.saved_model), tags=list(model.tags))
        signature = owner.signatures[model.signature]
        outputs = [fact.name for fact in model.facts.outputs]

        def call_signature(*tensors: Any) -> list[Any]:
            given = signature(**dict(zip(names, tensors, strict=True)))
            return [given[name] for name in outputs]

        return call_signature, owner
    keras_model = model.keras
    structure = getattr(keras_model, "_inputs_struct", None)
    if structure is None:
        structure = getattr(keras_model, "_nested_inputs", None)

    def call_keras(*tensors: Any) -> list[Any]:
        fed: Any = tensors[0] if len(tensors) == 1 else list(tensors)
        if structure is not None and not hasattr(structure, "shape"):
            fed = tf.nest.pack_sequence_as(structure, list(tensors))
        return list(tf.nest.flatten(keras_model(fed, training=False)))

    return call_keras, keras_model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep TensorFlow's and absl's chatter below errors while converting."""
    loggers = [logging.getLogger("tensorflow"), logging.getLogger("absl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _problem(error: Exception) -> WorkError:
    """What the converter's log says, in short: the operators, and its first lines of error."""
    text = str(error)
    if re.search(r"TensorBundle|Checksum|Unable to read file|DataLoss", text):
        return WorkError(
            "corrupt_file",
            f"the variables of the SavedModel are damaged: {text.splitlines()[0][:300]}",
            "Upload the file again; check its size and checksum against the original.",
        )
    named = re.findall(r"\b(?:Flex|tf\.)([A-Z]\w+)\b", text)
    needed = re.search(r"(?:TF Select ops|Flex ops|Custom ops): ([\w, ]+)", text)
    operators = [op.strip() for op in needed[1].split(",")] if needed else named
    operators = sorted({op for op in operators if op})
    lines = [
        re.sub(r"^.*?error: ", "", line).strip()
        for line in text.splitlines()
        if "error:" in line or (line.strip() and "error" not in text)
    ] or text.splitlines()[:1]
    gist = "; ".join(dict.fromkeys(lines))[:600]
    if operators:
        return WorkError(
            "conversion_failed",
            f"LiteRT has no built-in operator for: {', '.join(operators)}. {gist}",
            "Replace these operators by ones that LiteRT has; recurrent layers need"
            " `unroll=True` or a fixed batch.",
        )
    return WorkError(
        "conversion_failed",
        f"TensorFlow's converter could not convert the model: {gist}",
        "See that the model runs on one sample in TensorFlow; a simpler SavedModel signature may"
        " help.",
    )


def warm_up() -> None:
    """Import TensorFlow and both Kerases and convert one tiny model with each, so that a process
    that waits for a job has paid for it before the job comes. About half a second of work beside
    the import."""
    import keras
    import tf_keras

    for library in (tf_keras, keras):
        model = library.Sequential(
            [
                library.Input((8, 8, 1)),
                library.layers.Conv2D(2, 3),
                library.layers.BatchNormalization(),
                library.layers.ReLU(),
                library.layers.Flatten(),
                library.layers.Dense(2),
            ]
        )
        source = ModelSource(file="", format=ModelFormat.keras)
        fact = TensorFact(name="x", shape=[-1, 8, 8, 1], dtype="float32")
        facts = ModelFacts(inputs=[fact], outputs=[fact], parameters=0)
        convert(LoadedModel(source, facts, keras=model), silent)
