import pytest

from workers.engine.targets.edgetpu_compiler import parse_log, parse_stdout
from workers.engine.targets.edgetpu_report import reason_of

PARTLY = """Edge TPU Compiler version 15.0.340273435

Model compiled successfully in 577 ms.

Input model: /models/small.tflite
Input size: 8.50MiB
Output model: /models/small_edgetpu.tflite
Output size: 8.70MiB
On-chip memory used for caching model parameters: 3.00KiB
On-chip memory remaining for caching model parameters: 7.67MiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: 1
Total number of operations: 5
Operation log: /models/small_edgetpu.log

Model successfully compiled but not all operations are supported by the Edge TPU.
Number of operations that will run on Edge TPU: 2
Number of operations that will run on CPU: 3

Operator                       Count      Status

CONV_2D                        2          Mapped to Edge TPU
CONV_2D                        1          More than one subgraph is not supported
LEAKY_RELU                     1          Operation not supported
RESIZE_NEAREST_NEIGHBOR        1          Operation version not supported
"""
WHOLE = """Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.

Model compiled successfully in 24 ms.

Input model: small.tflite
Input size: 12.00KiB
Output model: small_edgetpu.tflite
Output size: 60.00KiB
On-chip memory used for caching model parameters: 8.00KiB
On-chip memory remaining for caching model parameters: 7.50MiB
Off-chip memory used for streaming uncached model parameters: 1.25MiB
Number of Edge TPU subgraphs: 1
Total number of operations: 9
Operation log: small_edgetpu.log
See the operation log file for individual operation details.
Compilation child process completed within timeout period.
Compilation succeeded!
"""
SEARCHED = """Edge TPU Compiler version 16.0.384591198
Searching for valid delegate with step 1
Try to compile segment with 3 ops
Started a compilation timeout timer of 180 seconds.
ERROR: Restored original execution plan after delegate application failure.
Compilation failed: Compilation failed due to large activation tensors in model.
Compilation child process completed within timeout period.
Compilation failed!
Try to compile segment with 2 ops
Intermediate tensors: Identity
"""
LOG = """Edge TPU Compiler version 14.1.317412892
Input: small.tflite
Output: small_edgetpu.tflite

Operator                       Count      Status

MAX_POOL_2D                    6          Mapped to Edge TPU
QUANTIZE                       1          Operation is otherwise supported, but not mapped due to some unspecified limitation
CUSTOM                         1          Operation is working on an unsupported data type
"""  # noqa: E501
MIB = 2**20


def test_a_model_of_which_a_part_is_mapped():
    report = parse_stdout(PARTLY)
    assert report.success
    assert report.version == "15.0.340273435"
    assert report.compile_ms == 577
    assert report.input_bytes == 8.5 * MIB
    assert report.on_chip_bytes == 3 * 1024
    assert report.on_chip_remaining_bytes == round(7.67 * MIB)
    assert report.off_chip_bytes == 0
    assert (report.subgraphs, report.ops, report.mapped, report.cpu) == (1, 5, 2, 3)
    assert [(row.operator, row.count, row.reason, row.mapped) for row in report.rows] == [
        ("CONV_2D", 2, "mapped", True),
        ("CONV_2D", 1, "after_cpu", False),
        ("LEAKY_RELU", 1, "unsupported_operation", False),
        ("RESIZE_NEAREST_NEIGHBOR", 1, "unsupported_version", False),
    ]


def test_counts_that_the_compiler_leaves_out():
    report = parse_stdout(WHOLE)
    assert (report.ops, report.mapped, report.cpu) == (9, 9, 0)
    assert report.off_chip_bytes == 1.25 * MIB
    assert report.rows == []


def test_a_search_that_succeeds_after_failing():
    found = parse_stdout(SEARCHED + WHOLE.split("\n", 1)[1])
    assert found.success
    assert found.ops == 9
    assert not parse_stdout(SEARCHED).success


def test_segments_are_summed():
    second = WHOLE.split("\n", 1)[1]
    report = parse_stdout(WHOLE + second)
    assert len(report.segments) == 2
    assert report.ops == 18
    assert report.off_chip_bytes == 2.5 * MIB
    assert report.success
    failed = parse_stdout(WHOLE + second + "Compilation failed!\n")
    assert not failed.success


def test_models_that_were_compiled_together():
    block = WHOLE.split("\n\n")[2]
    text = "Models compiled successfully in 30 ms.\n\n" + block + "\n" + block
    report = parse_stdout(text)
    assert report.success
    assert [each.ops for each in report.segments] == [9, 9]
    assert report.compile_ms == 30


def test_rows_as_they_are_quoted_in_posts():
    text = "> ADD  2\tMapped to Edge TPU\n> TRANSPOSE 1 Operation not supported\n> 3 lines more"
    assert [(row.operator, row.count, row.reason) for row in parse_log(text).rows] == [
        ("ADD", 2, "mapped"),
        ("TRANSPOSE", 1, "unsupported_operation"),
    ]


def test_a_log():
    report = parse_log(LOG)
    assert report.success
    assert (report.input, report.output) == ("small.tflite", "small_edgetpu.tflite")
    assert (report.ops, report.mapped, report.cpu) == (8, 6, 2)
    assert [row.reason for row in report.rows] == ["mapped", "limitation", "unsupported_type"]


def test_what_release_2_tells_of_the_memory():
    text = PARTLY.replace(
        "remaining for caching model parameters: 7.67MiB",
        "available for caching model parameters: 7.50MiB",
    )
    assert parse_stdout(text).on_chip_remaining_bytes == 7.5 * MIB - 3 * 1024


@pytest.mark.parametrize(
    "text",
    ["", "nothing of the kind", "\x00\x01\xff", "Input size: lots", "CONV_2D  x  y\n" * 3],
)
def test_garbage(text):
    assert not parse_stdout(text).success
    assert not parse_log(text).success


def test_a_status_that_is_new():
    assert reason_of("The moon is in the wrong quarter") == "unknown"
    assert reason_of("Tensor has unsupported rank (up to 3 innermost dimensions mapped)") == (
        "unsupported_rank"
    )
    assert reason_of("Only Strided-Slice with unitary strides supported") == "limitation"
    assert reason_of("For example, a fully-connected or softmax layer with 2D output") == (
        "limitation"
    )
    assert reason_of("Image-interpolation layer won't run precisely enough on Edge TPU") == (
        "imprecise_resize"
    )
