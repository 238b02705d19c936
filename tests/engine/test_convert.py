"""Every kind of model becomes a float32 .tflite that computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from app.domain.problems import WorkError
from app.domain.recipes import DynamicRange, Float16, Int8, Int16x8
from app.domain.work import ModelSource
from tests.engine import keras_models as models
from tests.engine import tiny
from tests.engine.helpers import weights
from workers.engine import convert, inspect_tflite, loaders, verify
from workers.engine.names import plain
from workers.engine.samples import Array, Samples, silent

RNG = np.random.default_rng(0)


def source(path: Path, **shapes: list[int]) -> ModelSource:
    name = path.name
    kind = "saved_model" if name.endswith((".zip", ".gz")) else path.suffix.lstrip(".")
    return ModelSource(file=name, format=loaders.ModelFormat(kind), input_shapes=shapes)


def run(content: bytes, *arrays: Array) -> list[Array]:
    """Outputs in order; inputs in the file's order."""
    interpreter = Interpreter(model_content=content)
    for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.resize_tensor_input(detail["index"], array.shape)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]


def values(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def converted(path: Path, **shapes: list[int]) -> bytes:
    return convert.to_float_tflite(source(path, **shapes), path.parent, silent)


@pytest.mark.parametrize("format", ["keras", "h5"])
@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (models.sequential, [(8, 8, 1)]),
        (models.functional, [(8, 8, 2)]),
        (models.two_inputs, [(4,), (4,)]),
    ],
)
def test_keras_models_compute_the_same(
    tmp_path: Path, format: str, build: Callable[[Any], Any], shapes: list[tuple[int, ...]]
) -> None:
    path = tmp_path / f"m.{format}"
    model = models.save_keras(build(models.LIBRARIES[format]), path)
    content = converted(path)
    arrays = [values(3, *shape) for shape in shapes]
    expected = model(arrays if len(arrays) > 1 else arrays[0], training=False)
    expected = expected if isinstance(expected, list | tuple) else [expected]
    found = run(content, *arrays)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-4)
    names = [plain(d["name"]) for d in Interpreter(model_content=content).get_input_details()]
    facts = loaders.inspect_model(source(path), tmp_path)
    assert names == [fact.name for fact in facts.inputs]


@pytest.mark.parametrize("route", ["keras2", "keras3", "subclassed", "module"])
def test_saved_models_compute_the_same(tmp_path: Path, route: str) -> None:
    import tensorflow as tf

    x = values(2, 8, 8, 1)
    if route == "module":
        x = values(2, 4)
        path = tmp_path / "m.zip"
        spec = tf.TensorSpec([None, 4], tf.float32, name="features")
        models.save_module(path, lambda self, v: tf.nn.softmax(v @ self.w), spec)
        owner = tf.saved_model.load(str(tmp_path / "m.zip-folder"))
        expected = owner.score(x)
    else:
        model = models.sequential(models.keras2 if route == "keras2" else models.keras3)
        if route == "subclassed":

            class Wrapped(models.keras3.Model):  # type: ignore[misc]
                def __init__(self) -> None:
                    super().__init__()
                    self.inner = model

                def call(self, v: Any) -> Any:
                    return self.inner(v) * 2.0

            model = Wrapped()
        expected = model(x, training=False)
        if route == "keras2":
            model.save(str(tmp_path / "folder"), save_format="tf")
        else:
            model.export(str(tmp_path / "folder"), verbose=False)
        path = models.pack(tmp_path / "folder", tmp_path / "m.tar.gz")
    facts = loaders.inspect_model(source(path), tmp_path)
    assert facts.parameters > 0
    assert facts.inputs[0].shape[0] == -1
    (found,) = run(converted(path), x)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-4)


def test_a_fixed_batch_leaves_no_size_open(tmp_path: Path) -> None:
    def reshaped(keras: Any) -> Any:
        inputs = keras.Input((4, 6), name="x")
        y = keras.layers.Reshape((6, 4))(inputs)
        return keras.Model(inputs, keras.layers.Dense(3)(y))

    path = tmp_path / "m.keras"
    model = models.save_keras(reshaped(models.keras3), path)
    fixed = source(path).model_copy(update={"fixed_batch": True})
    content = convert.to_float_tflite(fixed, tmp_path, silent)
    graph = inspect_tflite.parse(content).main
    assert {op.name for op in graph.ops} <= {"RESHAPE", "FULLY_CONNECTED"}
    assert all(-1 not in tensor.signature for tensor in graph.tensors)
    x = values(1, 4, 6)
    np.testing.assert_allclose(run(content, x)[0], np.asarray(model(x)), atol=1e-4)
    # A .tflite that leaves its batch open is closed without TensorFlow.
    (tmp_path / "m.tflite").write_bytes(converted(path))
    given = source(tmp_path / "m.tflite").model_copy(update={"fixed_batch": True})
    closed = inspect_tflite.parse(convert.to_float_tflite(given, tmp_path, silent)).main
    assert [closed.tensors[i].signature for i in closed.inputs] == [(1, 4, 6)]


@pytest.mark.parametrize("format", ["keras", "h5", "zip"])
def test_open_sizes_are_fixed_from_the_spec(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"m.{format}"
    model = models.dynamic_size(models.LIBRARIES.get(format, models.keras3))
    if format == "zip":
        model.export(str(tmp_path / "folder"), verbose=False)
        models.pack(tmp_path / "folder", path)
    else:
        models.save_keras(model, path)
    name = loaders.inspect_model(source(path), tmp_path).inputs[0].name
    with pytest.raises(WorkError) as caught:
        converted(path)
    assert caught.value.code == "dynamic_shape"
    assert name in caught.value.message
    assert "input_shapes" in (caught.value.hint or "")
    content = converted(path, **{name: [1, 10, 12, 3]})
    detail = Interpreter(model_content=content).get_input_details()[0]
    assert detail["shape_signature"].tolist() == [-1, 10, 12, 3]
    x = values(1, 10, 12, 3)
    np.testing.assert_allclose(run(content, x)[0], np.asarray(model(x)), atol=1e-4)
    with pytest.raises(WorkError) as caught:
        converted(path, **{name: [1, 10, 12, 4]})
    assert caught.value.code == "shape_mismatch"


@pytest.mark.parametrize("format", ["keras", "h5"])
def test_recurrent_layers_convert_to_builtin_operators(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"m.{format}"
    model = models.save_keras(models.lstm(models.LIBRARIES[format]), path)
    x = values(1, 5, 3)
    np.testing.assert_allclose(run(converted(path), x)[0], np.asarray(model(x)), atol=1e-4)


def test_operators_that_litert_lacks_are_named(tmp_path: Path) -> None:
    import tensorflow as tf

    path = models.save_module(
        tmp_path / "m.zip",
        lambda self, v: tf.linalg.det(tf.reshape(v @ self.w, [-1, 3, 3])),
        tf.TensorSpec([3, 4], tf.float32),
    )
    with pytest.raises(WorkError) as caught:
        converted(path)
    assert caught.value.code == "conversion_failed"
    assert "MatrixDeterminant" in caught.value.message


def test_a_tflite_is_taken_as_it_is(tmp_path: Path) -> None:
    models.save_keras(models.sequential(models.keras3), tmp_path / "m.keras")
    content = converted(tmp_path / "m.keras")
    (tmp_path / "m.tflite").write_bytes(content)
    assert converted(tmp_path / "m.tflite") == content
    facts = loaders.inspect_model(source(tmp_path / "m.tflite"), tmp_path)
    assert facts.inputs[0].shape == [-1, 8, 8, 1]
    assert facts.parameters > 0


@pytest.mark.parametrize("format", ["h5", "zip"])
def test_the_converters_own_quantizer(tmp_path: Path, format: str) -> None:
    model = models.sequential(models.keras2)
    if format == "zip":
        model.save(str(tmp_path / "folder"), save_format="tf")
        path = models.pack(tmp_path / "folder", tmp_path / "m.zip")
    else:
        path = tmp_path / "m.h5"
        models.save_keras(model, path)
    samples = Samples.of({"x": values(20, 8, 8, 1)})

    def made(step: Any) -> Any:
        content = convert.quantize_with_converter(source(path), tmp_path, step, samples, silent)
        return Interpreter(model_content=content).get_input_details()[0]["dtype"], content

    float_size = len(converted(path))
    dtype, half = made(Float16())
    assert dtype is np.float32
    assert len(half) < float_size
    dtype, _ = made(DynamicRange(granularity="per_tensor"))
    assert dtype is np.float32
    assert made(Int8(input_type="uint8", integer_only=True))[0] is np.uint8
    assert made(Int8(input_type="float32", granularity="per_tensor"))[0] is np.float32
    assert made(Int16x8())[0] is np.int16
    dense = made(Int8(dense_granularity="per_tensor"))[1]
    (kernel,) = weights(dense, "FULLY_CONNECTED")
    assert len(kernel.quantization.scale) == 1
    assert len(weights(dense, "CONV_2D")[0].quantization.scale) == 4


def test_a_waiting_process_can_be_warmed_up() -> None:
    convert.warm_up()


def test_pruned_weights_are_stored_sparsely(tmp_path: Path) -> None:
    model = models.sequential(models.LIBRARIES["h5"])
    for layer in model.layers:
        for weight in layer.weights:
            if len(weight.shape) > 1:
                weight.assign(values(*weight.shape) * (RNG.random(weight.shape) < 0.1))
    models.save_keras(model, tmp_path / "m.h5")
    dense = converted(tmp_path / "m.h5")
    sparse = convert.to_sparse_tflite(source(tmp_path / "m.h5"), tmp_path, silent)

    verify.check_sparse(sparse, dense, None)
    found, wanted = inspect_tflite.inspect(sparse), inspect_tflite.inspect(dense)
    assert len(found.kernels) == len(wanted.kernels) == 2
    for ours, theirs in zip(found.kernels, wanted.kernels, strict=True):
        assert ours.tensor.sparsity is not None
        np.testing.assert_array_equal(ours.tensor.values(), theirs.tensor.values())


def test_a_tflite_has_no_sparse_encoding(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(tiny.dense(np.ones((2, 2))))
    with pytest.raises(WorkError) as caught:
        convert.to_sparse_tflite(source(tmp_path / "m.tflite"), tmp_path, silent)
    assert caught.value.code == "option_unsupported"
