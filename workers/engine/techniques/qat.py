"""qat: training with the rounding of 8-bit weights and activations in it (TFMOT's wrappers).

TFMOT's own layout (`quantize_model`) refuses lone batch norms, Conv1D, Rescaling, nested and
sliced models. Here each layer is wrapped by its place in the graph instead, which needs none of
its patterns: weights are rounded per output channel as the delivered file does, outputs where the
file will hold an 8-bit tensor. What no rule knows stays float in training, and is quantized after
it. Learned ranges start from real samples, not from -6..6, which short trainings never leave.
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
Only Inference".)
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapperV2,
)

from app.domain.problems import Note, WorkError
from app.domain.recipes import Qat, Training
from workers.engine import kernels
from workers.engine.fit import Prepared
from workers.engine.samples import Array
from workers.engine.twin import Twin
from workers.engine.twin_layers import Opaque

_LAYERS = tf_keras.layers
# Rounded weights, by layer.
_WEIGHTS = {
    _LAYERS.Conv1D: ("kernel",),
    _LAYERS.Conv2D: ("kernel",),
    _LAYERS.Conv3D: ("kernel",),
    _LAYERS.Conv2DTranspose: ("kernel",),
    _LAYERS.DepthwiseConv2D: ("depthwise_kernel",),
    _LAYERS.SeparableConv2D: ("depthwise_kernel", "pointwise_kernel"),
    _LAYERS.Dense: ("kernel",),
}
# Their outputs are tensors of their own in the file.
_OUTPUTS = (
    *_WEIGHTS,
    _LAYERS.BatchNormalization,
    _LAYERS.ReLU,
    _LAYERS.LeakyReLU,
    _LAYERS.PReLU,
    _LAYERS.ELU,
    _LAYERS.Activation,
    _LAYERS.Softmax,
    _LAYERS.Add,
    _LAYERS.Subtract,
    _LAYERS.Multiply,
    _LAYERS.Average,
    _LAYERS.Maximum,
    _LAYERS.Minimum,
    _LAYERS.Concatenate,
    _LAYERS.AveragePooling1D,
    _LAYERS.AveragePooling2D,
    _LAYERS.GlobalAveragePooling1D,
    _LAYERS.GlobalAveragePooling2D,
    _LAYERS.UpSampling2D,
    _LAYERS.Rescaling,
    _LAYERS.Normalization,
)
# They move values and make none: quantized as their input is.
_MOVING = (
    _LAYERS.InputLayer,
    _LAYERS.Flatten,
    _LAYERS.Reshape,
    _LAYERS.Permute,
    _LAYERS.RepeatVector,
    _LAYERS.Dropout,
    _LAYERS.SpatialDropout1D,
    _LAYERS.SpatialDropout2D,
    _LAYERS.ActivityRegularization,
    _LAYERS.GaussianNoise,
    _LAYERS.GaussianDropout,
    _LAYERS.AlphaDropout,
    _LAYERS.ZeroPadding1D,
    _LAYERS.ZeroPadding2D,
    _LAYERS.Cropping1D,
    _LAYERS.Cropping2D,
    _LAYERS.MaxPooling1D,
    _LAYERS.MaxPooling2D,
    _LAYERS.GlobalMaxPooling1D,
    _LAYERS.GlobalMaxPooling2D,
)
_RELUS = frozenset({"relu", "relu6"})
_START_BATCH = 8
_NAMED = 10


class _PerChannel(tfmot.quantization.keras.quantizers.Quantizer):  # type: ignore[misc]
    """Symmetric 8 bits for each output channel, by the weights as they are: no state."""

    def __init__(self, layer: Any, attribute: str) -> None:
        self._swapped = isinstance(layer, _LAYERS.Conv2DTranspose)
        # Each input channel of a depthwise kernel has output channels of its own: [.., in, times].
        self._axes = 2 if attribute == "depthwise_kernel" else 1

    def build(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        return {}

    def __call__(self, inputs: Any, training: Any, weights: Any, **kwargs: Any) -> Any:
        turned = self._swap(inputs)
        flat = tf.reshape(turned, [-1, int(np.prod(turned.shape[-self._axes :]))])
        limit = tf.stop_gradient(tf.maximum(tf.reduce_max(tf.abs(flat), axis=0), 1e-8))
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            flat, -limit, limit, num_bits=8, narrow_range=True
        )
        return self._swap(tf.reshape(rounded, turned.shape))

    def _swap(self, kernel: Any) -> Any:
        """[.., out, in] of a transposed convolution to [.., in, out], and back."""
        return tf.einsum("hwoi->hwio", kernel) if self._swapped else kernel

    def get_config(self) -> dict[str, Any]:
        return {}


class _PerTensor(tfmot.quantization.keras.quantizers.Quantizer):  # type: ignore[misc]
    """Symmetric 8 bits for a kernel as a whole, by the weights as they are: no state."""

    def build(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        return {}

    def __call__(self, inputs: Any, training: Any, weights: Any, **kwargs: Any) -> Any:
        limit = tf.stop_gradient(tf.maximum(tf.reduce_max(tf.abs(inputs)), 1e-8))
        return tf.quantization.fake_quant_with_min_max_vars(
            inputs, -limit, limit, num_bits=8, narrow_range=True
        )

    def get_config(self) -> dict[str, Any]:
        return {}


def _activations() -> Any:
    return tfmot.quantization.keras.quantizers.MovingAverageQuantizer(
        num_bits=8, per_axis=False, symmetric=False, narrow_range=False
    )


class _Config(tfmot.quantization.keras.QuantizeConfig):  # type: ignore[misc]
    """Which weights of a layer are rounded, and how, and whether its output is."""

    def __init__(
        self, attributes: tuple[str, ...] = (), *, output: bool = False, per_tensor: bool = False
    ) -> None:
        self.attributes, self.output, self.per_tensor = attributes, output, per_tensor

    def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
        return [
            (getattr(layer, name), _PerTensor() if self.per_tensor else _PerChannel(layer, name))
            for name in self.attributes
        ]

    def get_activations_and_quantizers(self, layer: Any) -> list[Any]:
        return []

    def set_quantize_weights(self, layer: Any, quantize_weights: list[Any]) -> None:
        for name, value in zip(self.attributes, quantize_weights, strict=True):
            setattr(layer, name, value)

    def set_quantize_activations(self, layer: Any, quantize_activations: list[Any]) -> None:
        pass

    def get_output_quantizers(self, layer: Any) -> list[Any]:
        return [_activations()] if self.output else []

    def get_config(self) -> dict[str, Any]:
        names = ("attributes", "output", "per_tensor")
        return {name: getattr(self, name) for name in names}


def prepare(
    twin: Twin, step: Qat, before: list[Training], fed: list[Array]
) -> tuple[Prepared, Callable[[], dict[str, tuple[float, float]]], list[Note]]:
    """The twin with its layers wrapped; what gives it its trained variables back and tells the
    ranges that its layers' outputs have learned, by layer name; and notes.

    `fed`: samples to start the ranges from, an array for each input.
    """
    places = _places(twin.model, step)
    if not places:
        raise WorkError(
            "nothing_to_train",
            "No layer of the model can be trained with quantization.",
            "Ask for int8, which quantizes after training, or fewer exclude patterns.",
        )
    started = _start(twin.model, [name for name, config in places.items() if config.output], fed)
    for layer in twin.model.layers:
        # Statistics of small batches would move under the ranges learned behind them.
        if isinstance(layer, _LAYERS.BatchNormalization):
            layer.trainable = False
    own = list(twin.model.variables)
    wrappers: dict[str, Any] = {}

    def wrap(layer: Any) -> Any:
        if layer.name not in places:
            return layer
        wrapper = QuantizeWrapperV2(layer, places[layer.name])
        wrappers[layer.name] = kernels.with_masks(wrapper)
        return wrappers[layer.name]

    put_back = kernels.keep(twin, before)
    model = tf_keras.models.clone_model(twin.model, clone_function=wrap)
    ranges = {
        name: wrapper._output_quantizer_vars
        for name, wrapper in wrappers.items()
        if places[name].output
    }
    for name, variables in ranges.items():
        low, high = started[name]
        variables["min_var"].assign(min(low, 0.0))
        variables["max_var"].assign(max(high, 0.0))
    learned = [variable for pair in ranges.values() for variable in pair.values()]
    prepared = Prepared(model=model, keep=[*own, *learned], after_batch=put_back)

    def finish() -> dict[str, tuple[float, float]]:
        for name, wrapper in wrappers.items():
            originals = [variable for variable, _, _ in wrapper._weight_vars]
            places[name].set_quantize_weights(wrapper.layer, originals)
        return {
            name: (float(pair["min_var"].numpy()), float(pair["max_var"].numpy()))
            for name, pair in ranges.items()
        }

    return prepared, finish, _notes(twin.model, places, step.exclude)


def _places(model: Any, step: Qat) -> dict[str, _Config]:
    """Layer name -> what is rounded there."""
    consumers: dict[str, list[Any]] = {}
    for nodes in model._nodes_by_depth.values():
        for node in nodes:
            for tensor in tf.nest.flatten(node.keras_inputs):
                producer = tensor._keras_history.layer
                consumers.setdefault(producer.name, []).append(node.layer)
    ends = {tensor._keras_history.layer.name for tensor in model.outputs}
    places = {}
    for layer in model.layers:
        attributes = _WEIGHTS.get(type(layer), ())
        # What the model answers is left as it is: a rounded softmax has no gradient to learn by.
        output = (
            (type(layer) in _OUTPUTS or _is_operation(layer))
            and layer.name not in ends
            and not _fused(layer, consumers.get(layer.name, []))
        )
        excluded = any(re.search(pattern, layer.name) for pattern in step.exclude)
        if (attributes or output) and not excluded:
            whole = isinstance(layer, _LAYERS.Dense) and step.dense_granularity == "per_tensor"
            places[layer.name] = _Config(attributes, output=output, per_tensor=whole)
    return places


def _fused(layer: Any, consumers: list[Any]) -> bool:
    """Whether the file will hold no tensor between this layer and the one after it."""
    if len(consumers) != 1:
        return False
    after = consumers[0]
    relu = (
        isinstance(after, _LAYERS.ReLU)
        or (
            isinstance(after, _LAYERS.Activation)
            and getattr(after.activation, "__name__", "") in _RELUS
        )
        or _operation(after) in _RELUS
    )
    linear = getattr(getattr(layer, "activation", None), "__name__", "linear") == "linear"
    if type(layer) in _WEIGHTS:
        return linear and (relu or isinstance(after, _LAYERS.BatchNormalization))
    return relu and (
        isinstance(layer, _LAYERS.BatchNormalization | _LAYERS.Add) or _operation(layer) == "add"
    )


def _operation(layer: Any) -> str:
    """What an operator called as a layer is (`x + y`, `keras.ops.relu`), in lower case; "" where
    it is none, or has weights of its own."""
    if not isinstance(layer, Opaque) or layer.weights:
        return ""
    return type(layer.live).__name__.lower()


def _is_operation(layer: Any) -> bool:
    """Whether a layer is an operator with one real output, which the file holds in 8 bits."""
    if not _operation(layer):
        return False
    output = layer.get_output_at(0)
    return not isinstance(output, list | tuple) and bool(output.dtype.is_floating)


def _start(model: Any, names: list[str], fed: list[Array]) -> dict[str, tuple[float, float]]:
    """(min, max) of layers' float outputs on samples."""
    if not names:
        return {}
    probe = tf_keras.Model(model.inputs, [model.get_layer(n).get_output_at(0) for n in names])

    @tf.function
    def extremes(*arrays: Any) -> Any:
        outputs = tf.nest.flatten(probe(list(arrays), training=False))
        return [tf.reduce_min(each) for each in outputs], [tf.reduce_max(each) for each in outputs]

    size = model.inputs[0].shape[0] or _START_BATCH
    count = len(fed[0]) // size * size or len(fed[0])
    parts = [extremes(*(a[i : i + size] for a in fed)) for i in range(0, count, size)]
    lows = np.min([[float(v) for v in low] for low, _ in parts], axis=0)
    highs = np.max([[float(v) for v in high] for _, high in parts], axis=0)
    return {n: (float(a), float(b)) for n, a, b in zip(names, lows, highs, strict=True)}


def _notes(model: Any, places: dict[str, _Config], exclude: list[str]) -> list[Note]:
    """The layers that compute and were trained in float."""
    left = [
        layer.name
        for layer in model.layers
        if layer.name not in places
        and type(layer) not in (*_MOVING, *_OUTPUTS)
        and not _operation(layer)
        and not any(re.search(pattern, layer.name) for pattern in exclude)
    ]
    if not left:
        return []
    told = ", ".join(f"'{name}'" for name in left[:_NAMED])
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    return [
        Note(
            code="not_trained_quantized",
            message=f"{len(left)} layers were trained in float, and quantized after the training"
            f" where the file format allows: {told}{more}.",
        )
    ]
