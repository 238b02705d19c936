import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from tests.engine.targets.models import Int8, options, single
from workers.engine.targets.edgetpu import analyze


def told(content, compiler="16.0"):
    """The reason of each operator."""
    return [op.reason for op in analyze(content, compiler).ops]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LOGISTIC", "mapped"),
        ("TANH", "mapped"),
        ("RELU6", "mapped"),
        ("L2_NORMALIZATION", "mapped"),
        ("HARD_SWISH", "unsupported_operation"),
        ("LEAKY_RELU", "unsupported_operation"),
        ("EXP", "unsupported_operation"),
        ("GATHER", "unsupported_operation"),
    ],
)
def test_operators_of_the_table(name, expected):
    assert told(single(name)) == [expected]


def test_types_other_than_8_bit():
    assert told(single("DEQUANTIZE", dtype="float32")) == ["unsupported_type"]
    assert told(single("ARG_MAX", to=(1, 4, 4), operands=[3], dtype="int64")) == [
        "unsupported_type"
    ]
    assert told(single("ADD", dtype="int16")) == ["unsupported_type"]


def test_kernels_are_8_bit():
    b = Int8()
    x = b.activation("x", [1, 4])
    w = b.constant("w", np.ones((3, 4), np.float32))
    y = b.activation("y", [1, 3])
    b.op("FULLY_CONNECTED", [x, w, -1], [y], schema.FullyConnectedOptionsT(), 4)
    assert told(b.build([x], [y])) == ["unsupported_type"]


def test_quantizing_maps_between_8_bit_types_only():
    b = Int8()
    x = b.activation("x", [1, 4], "float32")
    inside = b.unary("QUANTIZE", x)
    other = b.unary("QUANTIZE", inside, dtype="uint8")
    assert told(b.build([x], [other])) == ["limitation", "mapped"]


def test_versions_that_are_not_mapped():
    half_pixel = single("RESIZE_NEAREST_NEIGHBOR", to=(1, 8, 8, 4), operands=[[8, 8]], version=3)
    assert told(half_pixel, "15.0.340273435") == ["unsupported_version"]
    assert told(half_pixel, "16.0.384591198") == ["mapped"]


def test_dense_layers_that_keep_their_dimensions():
    def dense(version):
        b = Int8()
        x = b.activation("x", [1, 8])
        w = b.constant("w", np.ones((3, 8), np.int8), 0.1)
        y = b.activation("y", [1, 3])
        b.op("FULLY_CONNECTED", [x, w, -1], [y], schema.FullyConnectedOptionsT(), version)
        return b.build([x], [y])

    assert told(dense(4), "14.1.317412892") == ["mapped"]
    assert told(dense(5), "14.1.317412892") == ["unsupported_version"]
    assert told(dense(5), "16.0.384591198") == ["mapped"]


def test_runtime_that_is_too_old():
    content = single("PRELU")
    transposed = single("TRANSPOSE", to=(1, 4, 4, 4), operands=[[0, 2, 1, 3]])
    assert told(transposed, "15.0") == ["newer_runtime"]
    assert told(transposed, "16.0") == ["mapped"]
    assert told(content, "2.1") == ["newer_runtime"]


def test_only_the_three_innermost_dimensions_may_exceed_1():
    assert told(single("RELU", (1, 8, 8, 3))) == ["mapped"]
    assert told(single("RELU", (1, 1, 8, 8, 3))) == ["mapped"]
    assert told(single("RELU", (2, 8, 8, 3))) == ["unsupported_rank"]


def test_upsampling_by_packing_a_tensor_with_itself():
    b = Int8()
    x = b.activation("x", [1, 4, 4, 2])
    wide = b.unary("PACK", x, [1, 4, 4, 2, 2], options=options("Pack", axis=3), more=[x])
    high = b.unary("PACK", wide, [1, 4, 2, 4, 2, 2], options=options("Pack", axis=2), more=[wide])
    y = b.unary("RESHAPE", high, [1, 8, 8, 2], more=[b.integers("shape", [1, 8, 8, 2])])
    content = b.build([x], [y])
    assert told(content, "16.0") == ["mapped"] * 3
    assert told(content, "15.0")[1] == "unsupported_rank"


def test_weights_must_be_constant():
    b = Int8()
    x, w = b.activation("x", [1, 4]), b.activation("w", [3, 4])
    y = b.activation("y", [1, 3])
    b.op("FULLY_CONNECTED", [x, w, -1], [y], schema.FullyConnectedOptionsT(), 4)
    assert told(b.build([x, w], [y])) == ["not_constant"]


def test_computed_shape_is_dynamic_and_fails_the_compilation():
    b = Int8()
    x, shape = b.activation("x", [1, 4, 4, 2]), b.tensor("shape", [2], "int32")
    y = b.activation("y", [1, 32])
    b.op("RESHAPE", [x, shape], [y])
    analysis = analyze(b.build([x, shape], [y]))
    assert analysis.ops[0].reason == "dynamic_tensor"
    assert analysis.failure is not None
    assert analysis.failure.code == "dynamic_tensors"
    assert "batch to 1" in analysis.advice[0].message


def test_dilation_must_be_square():
    for width, expected in ((2, "mapped"), (1, "limitation")):
        b = Int8()
        x = b.activation("x", [1, 8, 8, 4])
        y = b.conv(x, [1, 8, 8, 4], size=3, dilationHFactor=2, dilationWFactor=width)
        assert told(b.build([x], [y])) == [expected]


@pytest.mark.parametrize("name", ["MAX_POOL_2D", "AVERAGE_POOL_2D"])
def test_pooling_has_no_activation(name):
    assert told(single(name, options=options("Pool2D"))) == ["mapped"]
    fused = options("Pool2D", fusedActivationFunction=1)
    assert told(single(name, options=fused)) == ["limitation"]


@pytest.mark.parametrize(
    ("compiler", "shape", "expected"),
    [
        ("16.0", (1, 1001), "mapped"),
        ("16.0", (1, 16_001), "limitation"),
        ("15.0", (1, 8, 16), "limitation"),
        ("16.0", (1, 8, 16), "mapped"),
    ],
)
def test_softmax(compiler, shape, expected):
    assert told(single("SOFTMAX", shape), compiler) == [expected]


def test_dense_layers_over_several_rows():
    b = Int8()
    x = b.activation("x", [4, 8])
    w = b.constant("w", np.ones((3, 8), np.int8), 0.1)
    y = b.activation("y", [4, 3])
    b.op("FULLY_CONNECTED", [x, w, -1], [y], schema.FullyConnectedOptionsT(), 4)
    content = b.build([x], [y])
    assert told(content, "15.0") == ["limitation"]
    assert told(content, "16.0") == ["mapped"]


def test_concatenation():
    def joined(axis=3, constant=None, activation=0):
        b = Int8()
        x = b.activation("x", [1, 4, 4, 2])
        other = b.activation("z", [1, 4, 4, 2])
        if constant is not None:
            other = b.constant("c", np.full((1, 4, 4, 2), constant, np.int8), 0.1)
        made = options("Concatenation", axis=axis, fusedActivationFunction=activation)
        shape = [2, 1, 4, 2] if axis == 0 else [1, 4, 4, 4]
        y = b.unary("CONCATENATION", x, shape, options=made, more=[other])
        return told(b.build([x] if constant is not None else [x, other], [y]))

    assert joined() == ["mapped"]
    assert joined(constant=0) == ["mapped"]
    assert joined(constant=1) == ["limitation"]
    assert joined(activation=1) == ["limitation"]
    assert joined(axis=0) != ["mapped"]


def test_lists_of_scores_that_are_too_large():
    assert told(single("LOGISTIC", (1, 19_206, 90))) == ["mapped"]
    assert told(single("LOGISTIC", (1, 49_104, 90))) == ["too_large"]
    assert told(single("LOGISTIC", (1, 512, 512, 64))) == ["mapped"]

    def reshaped(size):
        to = (1, size * size * 9, 90)
        return told(single("RESHAPE", (1, size, size, 810), to, operands=[to]))

    assert reshaped(56) == ["mapped"]
    assert reshaped(80) == ["too_large"]


@pytest.mark.parametrize(
    ("name", "axes", "shape", "to", "expected"),
    [
        ("MEAN", [1, 2], (1, 7, 7, 30), (1, 30), "mapped"),
        ("MEAN", [3], (1, 7, 7, 32), (1, 7, 7), "mapped"),
        ("MEAN", [3], (1, 7, 7, 30), (1, 7, 7), "limitation"),
        ("MEAN", [1, 2], (1, 256, 128, 3), (1, 3), "limitation"),
        ("MEAN", [0, 1], (1, 7, 7, 32), (7, 32), "limitation"),
        ("SUM", [1, 2], (1, 7, 7, 30), (1, 30), "mapped"),
        ("REDUCE_MAX", [0], (1, 7, 7, 30), (7, 7, 30), "limitation"),
    ],
)
def test_reductions(name, axes, shape, to, expected):
    assert told(single(name, shape, to, operands=[axes])) == [expected]


def test_maxima_are_older_than_minima():
    for name, expected in (("REDUCE_MAX", "mapped"), ("REDUCE_MIN", "newer_runtime")):
        content = single(name, (1, 7, 7, 30), (1, 30), operands=[[1, 2]])
        assert told(content, "14.1.317412892") == [expected]


def test_padding():
    inside = [[0, 0], [1, 1], [1, 1], [0, 0]]
    assert told(single("PAD", to=(1, 6, 6, 4), operands=[inside])) == ["mapped"]
    channels = [[0, 0], [0, 0], [0, 0], [0, 4]]
    assert told(single("PAD", to=(1, 4, 4, 8), operands=[channels])) == ["mapped"]
    assert told(single("PAD", to=(1, 4, 4, 8), operands=[channels]), "2.1") == ["newer_runtime"]
    batch = [[0, 1], [0, 0], [0, 0], [0, 0]]
    assert told(single("PAD", (1, 1, 4, 4), (2, 1, 4, 4), operands=[batch])) != ["mapped"]


def test_resizing():
    def resized(name, source, target):
        return told(single(name, source, target, operands=[list(target[1:3])]))

    assert resized("RESIZE_BILINEAR", (1, 32, 32, 64), (1, 64, 64, 64)) == ["mapped"]
    assert resized("RESIZE_BILINEAR", (1, 1, 1, 64), (1, 33, 33, 64)) == ["imprecise_resize"]
    assert resized("RESIZE_BILINEAR", (1, 512, 512, 3), (1, 1024, 1024, 3)) == ["limitation"]
    assert resized("RESIZE_NEAREST_NEIGHBOR", (1, 1, 1, 64), (1, 2, 2, 64)) == ["mapped"]


def test_slices():
    def sliced(compiler="16.0", stride=1, **masks):
        operands = [[0, 0, 0, 0], [1, 4, 4, 2], [1, stride, 1, 1]]
        made = options("StridedSlice", **masks)
        return told(
            single("STRIDED_SLICE", to=(1, 4, 4, 2), options=made, operands=operands), compiler
        )

    assert sliced() == ["mapped"]
    assert sliced(stride=2) == ["mapped"]
    assert sliced("15.0", stride=2) == ["limitation"]
    assert sliced(stride=-1) == ["limitation"]
    assert sliced(ellipsisMask=1) == ["limitation"]
    assert sliced(newAxisMask=2) == ["limitation"]


@pytest.mark.parametrize(("axis", "expected"), [(3, "mapped"), (0, "limitation")])
def test_splitting(axis, expected):
    b = Int8()
    along, x = b.integers("axis", axis), b.activation("x", [1, 4, 4, 4])
    parts = [b.activation(f"part{i}", [1, 4, 4, 2]) for i in range(2)]
    b.op("SPLIT", [along, x], parts, options("Split", numSplits=2))
    assert told(b.build([x], parts)) == [expected]


def test_slopes_of_prelu_differ_by_channel_only():
    for shape, expected in (((1, 1, 4), "mapped"), ((4, 4, 4), "limitation")):
        b = Int8()
        x = b.activation("x", [1, 4, 4, 4])
        alpha = b.constant("alpha", np.ones(shape, np.int8), 0.1)
        y = b.unary("PRELU", x, more=[alpha])
        assert told(b.build([x], [y])) == [expected]


def test_transposing_much():
    for size, expected in ((196, "mapped"), (784, "limitation")):
        to = (1, 3, size, 85)
        assert told(single("TRANSPOSE", (1, size, 3, 85), to, operands=[[0, 2, 1, 3]])) == [
            expected
        ]
    channels_first = [0, 3, 1, 2]
    for size, expected in ((24, "mapped"), (80, "limitation")):
        to = (1, 144, size, size)
        content = single("TRANSPOSE", (1, size, size, 144), to, operands=[channels_first])
        assert told(content) == [expected]
    # No value moves where only sizes of 1 change places.
    still = single("TRANSPOSE", (1, 1, 784, 255), (1, 784, 1, 255), operands=[[0, 2, 1, 3]])
    assert told(still) == ["mapped"]


def test_squeezing_for_old_runtimes():
    content = single("SQUEEZE", (1, 5, 1, 10), (5, 10))
    assert told(content) == ["mapped"]
    inner = single("SQUEEZE", (1, 5, 10, 1), (1, 5, 10))
    assert told(inner, "2.1") == ["newer_runtime"]


def test_recurrent_layers_keep_16_bit_states():
    b = Int8()
    x = b.activation("x", [1, 5, 4])
    state = b.tensor("state", [1, 4], "int16", 0.1)
    y = b.activation("y", [1, 5, 4])
    b.op("UNIDIRECTIONAL_SEQUENCE_LSTM", [x, state], [y])
    content = b.build([x], [y])
    assert told(content) == ["mapped"]
    assert told(content, "15.0") == ["newer_runtime"]
