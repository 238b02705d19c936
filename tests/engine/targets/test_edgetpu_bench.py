import flatbuffers
import numpy as np
import pytest

from bench import edgetpu as bench
from bench import edgetpu_package
from tests.engine.targets.models import Int8, single


def source():
    b = Int8()
    x = b.activation("x", [1, 8, 8, 4])
    leaky = b.unary("LEAKY_RELU", b.conv(x, [1, 8, 8, 4], "first"))
    return b.build([x], [b.conv(leaky, [1, 8, 8, 4], "second")])


def compiled(keep_second=True):
    """As the compiler would leave it: the first operator inside a custom one."""
    b = Int8()
    x = b.activation("x", [1, 8, 8, 4])
    h = b.activation("first/out", [1, 8, 8, 4])
    b.op("CUSTOM", [x], [h])
    b.codes[-1].customCode = b"edgetpu-custom-op"
    b.operators[-1].customOptions = np.frombuffer(package(b"p" * 96), np.uint8)
    y = b.unary("LEAKY_RELU", h)
    if keep_second:
        y = b.conv(y, [1, 8, 8, 4], "second")
    return b.build([x], [y])


def package(parameters):
    """A package with one executable for its parameters, by the public schema."""
    executable = flatbuffers.Builder()
    values = executable.CreateByteVector(parameters)
    executable.StartObject(14)
    executable.PrependUOffsetTRelativeSlot(6, values, 0)
    executable.PrependInt8Slot(13, 1, 0)
    executable.Finish(executable.EndObject())
    several = flatbuffers.Builder()
    content = several.CreateByteVector(bytes(executable.Output()))
    several.StartVector(4, 1, 4)
    several.PrependUOffsetTRelative(content)
    vector = several.EndVector()
    several.StartObject(1)
    several.PrependUOffsetTRelativeSlot(0, vector, 0)
    several.Finish(several.EndObject())
    made = flatbuffers.Builder()
    content = made.CreateByteVector(bytes(several.Output()))
    made.StartObject(2)
    made.PrependInt32Slot(0, 13, 0)
    made.PrependUOffsetTRelativeSlot(1, content, 0)
    made.Finish(made.EndObject(), file_identifier=b"DWN1")
    return b"1\0" + bytes(made.Output())


def test_reading_a_package():
    assert edgetpu_package.read(package(b"p" * 96)) == edgetpu_package.Package(13, 96, 0)
    with pytest.raises(ValueError, match="no Edge TPU package"):
        edgetpu_package.read(b"something else")


def test_a_pair(tmp_path):
    (tmp_path / "small.tflite").write_bytes(source())
    (tmp_path / "small_edgetpu.tflite").write_bytes(compiled())
    (pair,) = bench.pairs(tmp_path)
    score = bench.score(*pair)
    assert score.split_right
    assert (score.right, score.ops) == (3, 3)
    assert (score.estimated, score.actual) == (4 * (4 + 16), 96)


def test_an_operator_on_the_wrong_side(tmp_path):
    (tmp_path / "small.tflite").write_bytes(source())
    (tmp_path / "small_edgetpu.tflite").write_bytes(compiled(keep_second=False))
    score = bench.score(*next(bench.pairs(tmp_path)))
    assert not score.split_right
    assert score.right == 2
    assert "second/out" in score.wrong[0]


LEAKY = "LEAKY_RELU  1   Operation not supported\n"
REST = "CONV_2D  {}   More than one subgraph is not supported\nCONV_2D  1   Mapped to Edge TPU\n"


def put(folder, **texts):
    """A model `small` and texts beside it, each under its key with "__" for the last dot."""
    (folder / "small.tflite").write_bytes(source())
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return bench.score(*next(bench.pairs(folder)))


def test_a_log(tmp_path):
    assert put(tmp_path, small__log=LEAKY + REST.format(1)).split_right
    score = put(tmp_path, small__log=LEAKY + REST.format(2))
    assert (score.right, score.ops) == (2, 3)


def test_a_log_without_a_table(tmp_path):
    text = (
        "Edge TPU Compiler version 16.0.384591198\nModel compiled successfully in 2 ms.\n"
        "Input model: /home/me/small.tflite\nTotal number of operations: 3\n"
        "Number of operations that will run on Edge TPU: {}\n"
        "Number of operations that will run on CPU: {}\n"
    )
    score = put(tmp_path, printed__txt=text.format(1, 2))
    assert (score.truth, score.right, score.split_right) == ("printed.txt", 3, True)
    score = put(tmp_path, printed__txt=text.format(3, 0))
    assert (score.right, score.split_right) == (1, False)
    assert "LEAKY_RELU" in score.wrong[0]


def test_of_several_texts_the_table_is_taken_and_a_failure_last(tmp_path):
    failed = "Edge TPU Compiler version 16.0\nCompilation failed!\n"
    whole = "Model compiled successfully in 2 ms.\nInput model: small.tflite\n"
    texts = {"small__log": failed, "a__txt": whole + "Total number of operations: 3\n"}
    score = put(tmp_path, **texts, small_edgetpu__log=LEAKY + REST.format(1))
    assert score.truth == "small_edgetpu.log"
    assert score.split_right


def test_a_log_and_what_was_printed_beside_it(tmp_path):
    """The table is in the one, the number of parts in the other."""
    table = LEAKY + "CONV_2D  2   Mapped to Edge TPU\n"
    printed = (
        "Model compiled successfully in 2 ms.\nInput model: small.tflite\n"
        "On-chip memory used for caching model parameters: 1.00KiB\n"
        "Off-chip memory used for streaming uncached model parameters: 0.00B\n"
        "Number of Edge TPU subgraphs: 2\nTotal number of operations: 3\n"
    )
    assert not put(tmp_path, small_edgetpu__log=table).split_right
    score = put(tmp_path, small_edgetpu__log=table, small_stdout__txt=printed)
    assert (score.truth, score.split_right) == ("small_edgetpu.log", True)
    assert score.actual == 1024


def test_labels_are_no_log(tmp_path):
    (tmp_path / "small.tflite").write_bytes(source())
    (tmp_path / "small.txt").write_text("0  person\n1  bicycle\n")
    assert list(bench.pairs(tmp_path)) == []


def test_the_release_that_a_log_tells(tmp_path):
    (tmp_path / "small.tflite").write_bytes(
        single("TRANSPOSE", to=(1, 4, 4, 4), operands=[[0, 2, 1, 3]])
    )
    log = tmp_path / "small_edgetpu.log"
    log.write_text("Edge TPU Compiler version 15.0.3\nTRANSPOSE  1   Operation not supported\n")
    pair = next(bench.pairs(tmp_path))
    assert bench.score(*pair).split_right
    assert not bench.score(*pair, compiler="16.0").split_right


def test_models_that_the_compiler_refuses(tmp_path):
    score = put(tmp_path, small__log="Compilation failed!\n")
    assert (score.ops, score.split_right) == (0, False)
    b = Int8()
    x = b.activation("x", [1, 4], "float32")
    y = b.unary("LOGISTIC", x, dtype="float32")
    (tmp_path / "small.tflite").write_bytes(b.build([x], [y]))
    (tmp_path / "small.log").write_text("Invalid model: small.tflite\nModel not quantized\n")
    score = bench.score(*next(bench.pairs(tmp_path)))
    assert (score.ops, score.split_right) == (0, True)


def test_a_compiled_file_of_another_export(tmp_path):
    """Results are named otherwise there, so kinds are counted."""
    (tmp_path / "small.tflite").write_bytes(source())
    renamed = compiled().replace(b"second/out", b"third_/out")
    (tmp_path / "small_edgetpu.tflite").write_bytes(renamed)
    score = bench.score(*next(bench.pairs(tmp_path)))
    assert (score.right, score.ops) == (3, 3)


def test_folders_below_and_models_without_truth(tmp_path, capsys, monkeypatch):
    below = tmp_path / "posenet"
    below.mkdir()
    (below / "small.tflite").write_bytes(source())
    (below / "small-edgetpu.tflite").write_bytes(compiled())
    (tmp_path / "alone.tflite").write_bytes(source())
    (tmp_path / "other_edgetpu.tflite").write_bytes(compiled())
    monkeypatch.setattr("sys.argv", ["bench.edgetpu", str(tmp_path)])
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert "small (small-edgetpu.tflite): 3/3 operators, split right" in printed
    assert "alone: not scored" in printed
    assert "split right: 1 of 1 models" in printed


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "small.tflite").write_bytes(b"nothing of the kind")
    (tmp_path / "small_edgetpu.tflite").write_bytes(compiled())
    score = bench.score(*next(bench.pairs(tmp_path)))
    assert score.error is not None
    assert (score.ops, score.split_right) == (0, False)


def test_a_model_that_the_analysis_refuses(tmp_path):
    b = Int8()
    x = b.activation("x", [1, 4], "float32")
    y = b.unary("LOGISTIC", x, dtype="float32")
    (tmp_path / "float.tflite").write_bytes(b.build([x], [y]))
    (tmp_path / "float.log").write_text("LOGISTIC  1   Operation is working on an unsupported\n")
    score = bench.score(*next(bench.pairs(tmp_path)))
    assert score.error is not None
    assert score.error.startswith("not_quantized")
