import subprocess
import sys

import numpy as np
import pytest

from app.domain import recipes
from app.domain.problems import WorkError
from tests.engine import tiny
from tests.engine.conftest import convert
from tests.engine.helpers import ends, infer, ranges_of, weights
from workers.engine import graph as tfl
from workers.engine import quantize
from workers.engine.quantize import Request
from workers.engine.samples import Samples


@pytest.fixture(scope="session")
def ranges(digits, digits_float_model):
    return ranges_of(digits_float_model, digits[0][:100])


@pytest.fixture
def made(digits, digits_float_model, ranges):
    """Makes a variant from a technique and its options."""

    def make(technique, **options):
        step = recipes.STEP_TYPES[technique](**options)
        samples = Samples.of({"image": digits[0][:100]})
        return quantize.apply(Request(digits_float_model, step, ranges, samples))

    return make


def accuracy(content, digits):
    x, y = digits[0][-400:], digits[1][-400:]
    return float((infer(content, x).argmax(axis=1) == y).mean())


def codes(result):
    return [note.code for note in result.notes]


@pytest.mark.parametrize("technique", ["float16", "dynamic_range", "int8", "int16x8"])
def test_every_technique_keeps_the_accuracy_and_shrinks_the_file(
    technique, made, digits, digits_float_model
):
    result = made(technique)
    wanted = accuracy(digits_float_model, digits)
    assert wanted > 0.9
    assert accuracy(result.content, digits) >= wanted - 0.02
    assert len(result.content) < 0.75 * len(digits_float_model)


def test_int8_is_integers_from_end_to_end(made):
    result = made("int8", integer_only=True)
    (source, _), (target, _) = ends(result.content)
    assert (source, target) == (np.int8, np.int8)
    assert "float_ops" not in codes(result)


def test_int16x8_has_16_bit_activations_and_64_bit_biases(made):
    result = made("int16x8", integer_only=True)
    (source, _), (target, _) = ends(result.content)
    assert (source, target) == (np.int16, np.int16)
    model = tfl.read(result.content)
    types = {tfl.TYPE_NAMES[tensor.type] for tensor in model.subgraphs[0].tensors}
    assert {"INT16", "INT8", "INT64"} <= types


def test_uint8_ends_shift_the_zero_point_and_change_no_result(made, digits):
    x = digits[0][-50:]
    signed, unsigned = made("int8"), made("int8", input_type="uint8", output_type="uint8")
    for (_, (scale, zero)), (dtype, (wide_scale, wide_zero)) in zip(
        ends(signed.content), ends(unsigned.content), strict=True
    ):
        assert dtype == np.uint8
        assert wide_scale == scale
        assert wide_zero == zero + 128
    np.testing.assert_array_equal(infer(unsigned.content, x), infer(signed.content, x))
    model = tfl.read(unsigned.content)
    signature = model.signatureDefs[0]
    assert signature.inputs[0].tensorIndex == model.subgraphs[0].inputs[0]
    assert signature.outputs[0].tensorIndex == model.subgraphs[0].outputs[0]


@pytest.mark.parametrize("technique", ["int8", "int16x8"])
def test_float_ends_where_asked(made, technique):
    result = made(technique, input_type="float32")
    (source, _), (target, _) = ends(result.content)
    assert source == np.float32
    assert target != np.float32
    result = made(technique, output_type="float32")
    (source, _), (target, _) = ends(result.content)
    assert source != np.float32
    assert target == np.float32


def test_per_tensor_weights_have_one_scale_and_per_channel_ones_many(made):
    for technique in ("int8", "dynamic_range"):
        one = weights(made(technique, granularity="per_tensor").content, "CONV_2D")
        many = weights(made(technique).content, "CONV_2D")
        assert [len(weight.quantization.scale) for weight in one] == [1, 1, 1]
        assert [len(weight.quantization.scale) for weight in many] == [16, 16, 32]


@pytest.mark.parametrize("technique", ["int8", "int16x8"])
def test_dense_layers_alone_can_be_per_tensor(technique, made, digits):
    content = made(technique, dense_granularity="per_tensor").content
    (dense,) = weights(content, "FULLY_CONNECTED")
    assert len(dense.quantization.scale) == 1
    assert [len(w.quantization.scale) for w in weights(content, "CONV_2D")] == [16, 16, 32]
    assert accuracy(content, digits) > 0.9


@pytest.mark.parametrize("technique", ["float16", "dynamic_range", "int8", "int16x8"])
def test_an_excluded_layer_stays_float(made, technique, digits):
    result = made(technique, exclude=["down/"])
    types = [tfl.TYPE_NAMES[weight.type] for weight in weights(result.content, "CONV_2D")]
    assert types[2] == "FLOAT32"
    if technique != "float16":
        assert types[:2] == ["INT8", "INT8"]
    assert "exclude_matched_nothing" not in codes(result)
    assert accuracy(result.content, digits) > 0.9


def test_excluding_the_last_layer_leaves_the_asked_output_type(made):
    result = made("int8", exclude=["StatefulPartitionedCall"])
    assert "excluded" in codes(result)
    assert ends(result.content)[1][0] == np.int8


def test_the_last_layer_is_excluded_by_its_own_name_too(made):
    result = made("int8", exclude=["^probabilities$"])
    assert "excluded" in codes(result)
    assert "exclude_matched_nothing" not in codes(result)


def test_a_pattern_that_finds_no_layer_is_told(made):
    for technique in ("float16", "dynamic_range", "int8"):
        assert "exclude_matched_nothing" in codes(made(technique, exclude=["no_such_layer"]))


def test_integer_only_names_what_stays_float(made):
    with pytest.raises(WorkError) as caught:
        made("int8", integer_only=True, exclude=["down/"])
    assert caught.value.code == "not_integer_only"
    assert "CONV_2D" in caught.value.message
    assert "down" in caught.value.message
    with pytest.raises(WorkError) as caught:
        made("int8", integer_only=True, input_type="float32")
    assert "QUANTIZE" in caught.value.message


def test_operators_that_the_quantizer_cannot_do_are_listed(digits):
    import tf_keras as keras

    inputs = keras.Input((8, 8, 1))
    y = keras.layers.Conv2D(4, 3)(inputs)
    y = keras.layers.Lambda(lambda t: __import__("tensorflow").sin(t))(y)
    model = keras.Model(inputs, keras.layers.Conv2D(2, 3)(y))
    content = convert(model)
    x = digits[0][:10]
    request = Request(content, recipes.Int8(), ranges_of(content, x), Samples.of({"image": x}))
    result = quantize.apply(request)
    (note,) = [note for note in result.notes if note.code == "float_ops"]
    assert "SIN" in note.message
    with pytest.raises(WorkError) as caught:
        quantize.apply(
            Request(content, recipes.Int8(integer_only=True), request.ranges, request.samples)
        )
    assert "SIN" in caught.value.message


def test_float16_is_no_larger_than_the_converters(made, digits_keras_model, digits):
    import tensorflow

    def half(converter):
        converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tensorflow.float16]

    result = made("float16")
    assert len(result.content) <= 1.01 * len(convert(digits_keras_model, half))
    types = [tfl.TYPE_NAMES[weight.type] for weight in weights(result.content, "CONV_2D")]
    assert types == ["FLOAT32"] * 3  # what a DEQUANTIZE gives
    names = [name for _, _, name, _ in _layers(result.content)]
    assert names.count("DEQUANTIZE") >= 4


def _layers(content):
    model = tfl.read(content)
    return list(tfl.layers(model, model.subgraphs[0]))


def test_a_constant_beyond_float16_stays_float32(digits_float_model):
    model = tfl.read(digits_float_model)
    tensor = weights(digits_float_model, "CONV_2D")[2]
    values = tfl.constant(model, tensor).copy()
    values.flat[0] = 1e6
    model.buffers[tensor.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    result = quantize.apply(Request(tfl.write(model), recipes.Float16()))
    assert codes(result) == ["float16_overflow"]


def test_depthwise_weights_stay_float_in_dynamic_range_unless_asked(made):
    (default,) = weights(made("dynamic_range").content, "DEPTHWISE_CONV_2D")
    (asked,) = weights(made("dynamic_range", depthwise="int8").content, "DEPTHWISE_CONV_2D")
    assert tfl.TYPE_NAMES[default.type] == "FLOAT32"
    assert tfl.TYPE_NAMES[asked.type] == "INT8"


def test_repeated_tensor_names_do_not_confuse(digits, digits_float_model):
    model = tfl.read(digits_float_model)
    for tensor in model.subgraphs[0].tensors[1:]:
        tensor.name = b"same"
    content = tfl.write(model)
    x = digits[0][:50]
    request = Request(content, recipes.Int8(), ranges_of(content, x), Samples.of({"image": x}))
    assert accuracy(quantize.apply(request).content, digits) > 0.9


@pytest.mark.parametrize("technique", ["int8", "int16x8"])
def test_a_dead_channel_still_passes_its_bias_on(technique, digits, digits_float_model):
    model = tfl.read(digits_float_model)
    graph = model.subgraphs[0]
    (operator,) = [o for _, o, name, _ in _layers(digits_float_model) if name == "FULLY_CONNECTED"]
    weight, bias = graph.tensors[operator.inputs[1]], graph.tensors[operator.inputs[2]]
    dead = tfl.constant(model, weight).copy()
    dead[4] = 0
    shifted = tfl.constant(model, bias).copy()
    shifted[4] = 3.0
    for tensor, values in ((weight, dead), (bias, shifted)):
        model.buffers[tensor.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    content = tfl.write(model)
    x = digits[0][:50]
    step = recipes.STEP_TYPES[technique](bias_correction="off")
    result = quantize.apply(Request(content, step, ranges_of(content, x)))
    np.testing.assert_allclose(infer(result.content, x), infer(content, x), atol=0.1)


def test_an_all_zero_layer_does_not_crash(digits, digits_float_model):
    model = tfl.read(digits_float_model)
    for weight in weights(digits_float_model, "CONV_2D"):
        size = len(model.buffers[weight.buffer].data)
        model.buffers[weight.buffer].data = np.zeros(size, np.uint8)
    content = tfl.write(model)
    x = digits[0][:20]
    for technique in ("int8", "int16x8"):
        step = recipes.STEP_TYPES[technique]()
        request = Request(content, step, ranges_of(content, x), Samples.of({"image": x}))
        assert np.isfinite(infer(quantize.apply(request).content, x)).all()


def test_ranges_of_another_file_are_refused(digits_float_model, ranges):
    model = tfl.read(digits_float_model)
    model.subgraphs[0].tensors[3].name = b"other"
    with pytest.raises(WorkError) as caught:
        quantize.apply(Request(tfl.write(model), recipes.Int8(), ranges))
    assert caught.value.code == "calibration_mismatch"


def test_missing_ranges_and_a_quantized_file_are_refused(made, digits, digits_float_model):
    with pytest.raises(WorkError) as caught:
        quantize.apply(Request(digits_float_model, recipes.Int8()))
    assert caught.value.code == "calibration_missing"
    with pytest.raises(WorkError) as caught:
        ranges_of(made("int8").content, digits[0][:5])
    assert caught.value.code == "unsupported_model"


def test_no_tensorflow_is_imported(digits, digits_float_model, tmp_path):
    (tmp_path / "model.tflite").write_bytes(digits_float_model)
    np.save(tmp_path / "x.npy", digits[0][:20])
    program = """
import sys
import numpy as np
from app.domain import options, recipes
from workers.engine import calibrate, quantize
from workers.engine.samples import Samples, silent
content, samples = open(sys.argv[1], "rb").read(), Samples.of({"image": np.load(sys.argv[2])})
ranges = calibrate.collect_ranges(content, samples, options.CalibrationOptions(), 1, silent)
for step in (recipes.Float16(), recipes.DynamicRange(), recipes.Int8(), recipes.Int16x8()):
    quantize.apply(quantize.Request(content, step, ranges, samples))
assert "tensorflow" not in sys.modules
"""
    paths = [str(tmp_path / "model.tflite"), str(tmp_path / "x.npy")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, timeout=60)


def test_a_model_of_small_constants_alone_is_halved_all_the_same():
    content = tiny.dense(np.arange(6, dtype=np.float32).reshape(2, 3))
    result = quantize.apply(Request(content, recipes.Float16()))
    assert codes(result) == []
    assert [tfl.TYPE_NAMES[t.type] for t in tfl.read(result.content).subgraphs[0].tensors].count(
        "FLOAT16"
    )
