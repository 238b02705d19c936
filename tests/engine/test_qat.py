"""Training with 8-bit rounding in it, on models that TFMOT's own layout refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.problems import Note, WorkError
from app.domain.recipes import Qat
from app.domain.work import LEARNED_RANGES
from tests.engine import keras_models as models
from tests.engine.test_kernels import lesson_of
from tests.engine.test_training import bench
from workers.engine import fit, inspect_tflite, twin
from workers.engine.samples import silent
from workers.engine.techniques import qat
from workers.engine.twin import Twin

KERAS3, KERAS2 = models.keras3, models.keras2
tf = models.tf


def activated(keras: Any) -> Any:
    """Batch norms before activations, as in ResNet V2, behind a Rescaling."""
    layers = keras.layers
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv")(
        layers.Rescaling(0.5, name="scale")(inputs)
    )
    y = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    y = layers.Add(name="add")([x, layers.Conv2D(4, 3, padding="same", name="inner")(y)])
    y = layers.BatchNormalization(name="last_norm")(y)
    y = layers.GlobalAveragePooling2D(name="pool")(y)
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="out")(y))


def series(keras: Any) -> Any:
    """One-dimensional convolutions and a recurrence."""
    layers = keras.layers
    inputs = keras.Input((8, 4), name="series")
    x = layers.Conv1D(6, 3, activation="relu", name="conv")(inputs)
    x = layers.AveragePooling1D(2, name="pool")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(layers.GRU(3, name="gru")(x)))


def nested(keras: Any) -> Any:
    layers = keras.layers
    inner_in = keras.Input((8, 8, 3))
    inner = keras.Model(
        inner_in, layers.ReLU(name="relu")(layers.Conv2D(4, 3, name="conv")(inner_in)), name="base"
    )
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Flatten(name="flat")(inner(inputs))
    return keras.Model(inputs, layers.Dense(3, name="out")(x))


def residual(keras: Any) -> Any:
    """Operations on tensors, which are no layers of tf_keras."""
    layers = keras.layers
    inputs = keras.Input((8, 8, 2), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="one")(inputs)
    x = keras.ops.relu(x + layers.Conv2D(4, 3, padding="same", name="two")(x))
    return keras.Model(inputs, layers.Dense(3, name="out")(layers.Flatten()(x)))


def kernels_of_all_kinds(keras: Any) -> Any:
    layers = keras.layers
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2DTranspose(3, 3, name="up")(inputs)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(layers.Flatten()(x)))


def run(
    make: Callable[[Any], Any], keras: Any = KERAS2, **options: Any
) -> tuple[Twin, list[Any], dict[str, tuple[float, float]], list[Note]]:
    """(twin, its weights before, learned ranges, notes) after a training."""
    keras.utils.set_random_seed(0)
    copy = twin.build(make(keras))
    before = [variable.numpy() for variable in copy.model.variables]
    samples, lesson, inputs = lesson_of(copy)
    step = Qat(epochs=1, batch_size=8, **options)
    fed = [samples.read(0, 16)[name] for name in inputs]
    prepared, finish, notes = qat.prepare(copy, step, [], fed)
    result = fit.fit(prepared, step, inputs, samples, lesson, 0, 0, silent)
    assert result.epochs[0].loss < 0.1
    return copy, before, finish(), notes


def left_float(notes: list[Note]) -> str:
    assert {note.code for note in notes} <= {"not_trained_quantized"}
    return "".join(note.message for note in notes)


def test_rounding_stands_where_the_file_holds_eight_bits() -> None:
    copy, before, ranges, notes = run(activated)
    assert notes == []
    # Fused: norm into relu; the last layer's answer is left as it is.
    assert set(ranges) == {"scale", "conv", "relu", "inner", "add", "last_norm", "pool"}
    assert all(low <= 0 <= high and low < high for low, high in ranges.values())
    assert ranges["relu"][0] == 0
    # Ranges start from samples: halved normal values, not TFMOT's -6..6.
    assert -3 < ranges["scale"][0] < -1
    assert 1 < ranges["scale"][1] < 3
    # The layers have their own variables back, trained, and compute in float with them.
    kernel = copy.layers["conv"].layer.kernel
    assert any(kernel is variable for variable in copy.model.variables)
    after = {v.name: (old, v.numpy()) for old, v in zip(before, copy.model.variables, strict=True)}
    assert len(np.unique(kernel.numpy())) == kernel.numpy().size
    changed = {name for name, (old, new) in after.items() if not np.array_equal(old, new)}
    assert {"conv/kernel:0", "inner/kernel:0", "out/kernel:0"} <= changed
    # Statistics and scales that move would move the ranges behind them.
    assert not any("norm" in name for name in changed)


def test_what_no_rule_knows_is_named() -> None:
    _, _, ranges, notes = run(series)
    assert set(ranges) == {"conv", "pool"}
    assert left_float(notes) == (
        "1 layers were trained in float, and quantized after the training where the file format"
        " allows: 'gru'."
    )


def test_nested_models_are_trained_inside() -> None:
    copy, before, ranges, notes = run(nested)
    assert notes == []
    assert set(ranges) == {"relu"}
    assert "conv" in copy.layers
    for old, variable in zip(before, copy.model.variables, strict=True):
        assert not np.array_equal(old, variable.numpy()) or not old.any()


def test_operations_of_keras_3_are_rounded_where_the_file_has_a_tensor() -> None:
    _, _, ranges, notes = run(residual, KERAS3)
    # The file adds and cuts off in one operator.
    assert set(ranges) == {"one", "two", "relu"}
    assert notes == []


def test_every_kind_of_kernel_is_rounded_for_each_output_channel() -> None:
    copy, _, ranges, notes = run(kernels_of_all_kinds)
    assert notes == []
    assert set(ranges) == {"up", "depthwise", "separable"}
    for name, attribute, axes in (
        ("up", "kernel", (0, 1, 3)),
        ("depthwise", "depthwise_kernel", (0, 1)),
        ("separable", "pointwise_kernel", (0, 1, 2)),
        ("out", "kernel", (0,)),
    ):
        layer = copy.layers[name].layer
        kernel = getattr(layer, attribute)
        rounded = qat._PerChannel(layer, attribute)(kernel, False, {}).numpy()
        scale = np.abs(kernel.numpy()).max(axis=axes, keepdims=True) / 127
        steps = rounded / scale
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3, err_msg=name)
        np.testing.assert_allclose(rounded, kernel.numpy(), atol=float(scale.max()) * 0.51)


def test_dense_layers_are_rounded_as_a_whole_where_asked() -> None:
    places = qat._places(
        twin.build(kernels_of_all_kinds(KERAS2)).model, Qat(dense_granularity="per_tensor")
    )
    assert {name: place.per_tensor for name, place in places.items()} == {
        "up": False,
        "depthwise": False,
        "separable": False,
        "out": True,
    }
    kernel = tf.constant(np.random.default_rng(0).normal(size=(20, 3)), tf.float32)
    rounded = qat._PerTensor()(kernel, False, {}).numpy()
    scale = float(np.abs(kernel.numpy()).max()) / 127
    np.testing.assert_allclose(rounded / scale, np.rint(rounded / scale), atol=1e-3)
    np.testing.assert_allclose(rounded, kernel.numpy(), atol=scale * 0.51)
    _, _, ranges, notes = run(kernels_of_all_kinds, dense_granularity="per_tensor")
    assert (set(ranges), notes) == ({"up", "depthwise", "separable"}, [])


def test_excluded_layers_stay_float_and_are_not_named() -> None:
    _, _, ranges, notes = run(residual, KERAS3, exclude=["two", "add", "relu"])
    assert notes == []
    assert set(ranges) == {"one"}
    with pytest.raises(WorkError) as caught:
        run(residual, KERAS3, exclude=["."])
    assert caught.value.code == "nothing_to_train"


def test_a_custom_layer_of_a_saved_model_is_trained_around(tmp_path: Path) -> None:
    def custom(keras: Any) -> Any:
        class Gain(keras.layers.Layer):  # type: ignore[misc]
            def build(self, shape: Any) -> None:
                self.gain = self.add_weight(name="gain", shape=shape[-1:], initializer="ones")

            def call(self, x: Any) -> Any:
                return x * self.gain

        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,), name="x")
        x = Gain(name="gain")(keras.layers.Dense(8, activation="relu", name="first")(inputs))
        return keras.Model(inputs, keras.layers.Dense(3, name="out")(x))

    x = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    trained = bench(tmp_path, custom, "saved_model", 48, x=x)
    step = Qat(epochs=1)
    folder, result = trained.train(step)
    notes = {note.code: note.message for note in result.notes}
    assert "gain" in notes["opaque_layers"]
    assert "'gain'" in notes["not_trained_quantized"]
    with np.load(folder / LEARNED_RANGES) as file:
        assert list(file["names"]) == ["first"]
    content, made = trained.deliver(step)
    assert inspect_tflite.inspect(content).integer_only
    told = {note.code: note.message for note in made.notes}
    assert told["learned_ranges"] == "Ranges learned in training: 1 of 1 used."
    assert made.metrics.sqnr_db > 20
