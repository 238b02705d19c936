import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from app.domain.micro import OPERATORS
from app.domain.problems import WorkError
from tests.engine import tiny
from tests.engine.targets import small_models as models
from workers.engine import graph as tfl
from workers.engine import inspect_tflite
from workers.engine.targets import commands, micro
from workers.engine.targets.commands import Ended

pytestmark = pytest.mark.skipif(
    micro.version() is None, reason="TensorFlow Lite Micro is not installed"
)


@pytest.mark.parametrize("io", ["int8", "float32"])
def test_an_integer_model_runs_and_agrees(io, tmp_path):
    content = models.convolutions(io=io)
    report = micro.measure(content, models.image(3), tmp_path)
    assert report.runs
    assert report.reason is None
    assert (report.samples_compared, report.agrees) == (3, True)
    assert report.missing_operators == []
    assert report.flash_bytes == -(-len(content) // 16) * 16
    assert report.nonpersistent_bytes >= 2 * 8 * 8 * 4
    assert report.arena_bytes >= report.nonpersistent_bytes + report.persistent_bytes - 15
    assert report.arena_bytes % 16 == 0
    assert report.notes == []


def test_the_arena_told_is_enough_and_half_of_it_is_not(tmp_path):
    from tflite_micro import runtime

    content = models.convolutions()
    arena = micro.measure(content, None, tmp_path).arena_bytes
    runtime.Interpreter.from_bytes(content, arena_size=arena).invoke()
    with pytest.raises(RuntimeError):
        runtime.Interpreter.from_bytes(content, arena_size=arena // 2)


def test_an_arena_too_small_that_crashes_it_is_no_more_than_too_small(tmp_path):
    content = tiny.dense_integer(np.random.default_rng(0).integers(-90, 90, (10, 64)))
    report = micro.measure(per_channel(content), None, tmp_path)
    assert report.runs, report.reason
    assert report.arena_bytes


def per_channel(content):
    """The weights' one scale given for each output channel, which TFLM copies when it runs."""
    model = tfl.read(content)
    graph = model.subgraphs[0]
    kernel = graph.tensors[graph.operators[0].inputs[1]]
    for tensor in [kernel, *(graph.tensors[i] for i in graph.operators[0].inputs[2:])]:
        found, channels = tensor.quantization, kernel.shape[0]
        found.scale = [float(found.scale[0])] * channels
        found.zeroPoint = [0] * channels
    return tfl.write(model)


def test_a_float_model_runs_too(tmp_path):
    content = tiny.dense(np.random.default_rng(0).normal(size=(4, 8)))
    report = micro.measure(content, {"x": np.ones((2, 8), np.float32)}, tmp_path)
    assert (report.runs, report.agrees) == (True, True)


def test_without_samples_nothing_is_said_of_the_answers(tmp_path):
    report = micro.measure(models.convolutions(), None, tmp_path)
    assert report.runs
    assert (report.samples_compared, report.steps_apart, report.agrees) == (0, None, None)


def test_missing_operators_are_named(tmp_path):
    report = micro.measure(models.elementwise("GELU"), None, tmp_path)
    assert (report.runs, report.missing_operators) == (False, ["GELU"])
    assert "GELU" in report.reason
    assert report.arena_bytes is None
    assert micro.measure(models.custom("Mine"), None, tmp_path).missing_operators == ["Mine"]


def test_what_a_kernel_refuses_is_the_reason(tmp_path):
    # TFLM has FLOOR, of float only.
    report = micro.measure(models.elementwise("FLOOR"), None, tmp_path)
    assert (report.runs, report.missing_operators) == (False, [])
    assert "FLOOR" in report.reason


def test_the_list_of_operators_is_the_runtimes(capfd):
    """The resolver is asked for all operators of a file before any is prepared: with one that is
    absent at the end, none is ever given a model that it could not stand."""
    from tflite_micro import runtime

    listed = {name for name in vars(schema.BuiltinOperator) if not name.startswith("_")}
    found = set()
    for name in sorted(listed - {"CUSTOM"}):
        b = tiny.Builder()
        x, y, z = (b.tensor(n, [1, 8], "int8", 0.1) for n in "xyz")
        options = schema.VarHandleOptionsT() if name == "VAR_HANDLE" else None
        b.op(name, [x], [y], options)
        b.op("CUSTOM", [y], [z])
        b.codes[-1].customCode = b"absent"
        with pytest.raises(RuntimeError):
            runtime.Interpreter.from_bytes(b.build([x], [z]), arena_size=2**16)
        if "op code CUSTOM" in capfd.readouterr().err:
            found.add(name)
    assert found == OPERATORS


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (models.custom("ethos-u"), "already_compiled"),
        (b"", "invalid_model"),
        (models.convolutions()[:400], "invalid_model"),
    ],
)
def test_what_is_no_model_for_it_is_refused(content, code, tmp_path):
    with pytest.raises(WorkError) as told:
        micro.measure(content, None, tmp_path)
    assert told.value.code == code


@pytest.mark.parametrize(
    "sample",
    [{"x": np.zeros((1, 4, 8, 4), np.float32)}, {}, {"x": np.zeros((0, 8, 8, 4), np.float32)}],
)
def test_samples_that_do_not_fit_are_refused(sample, tmp_path):
    with pytest.raises(WorkError) as told:
        micro.measure(models.convolutions(), sample, tmp_path)
    assert told.value.code == "inputs_do_not_fit"


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (Ended(-11, False, "kernel.cc:1 bad\n"), "crashed with SIGSEGV: kernel.cc:1 bad"),
        (Ended(-9, True, ""), "stopped after 120 s"),
    ],
)
def test_an_interpreter_that_dies_is_the_reason(ended, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "run_python", lambda *_, **__: ended)
    report = micro.measure(models.convolutions(), models.image(), tmp_path)
    assert not report.runs
    assert reason in report.reason


@pytest.mark.parametrize(
    ("said", "status", "codes", "agrees"),
    [
        ('"compared": 4, "apart": 3.0', 0, ["answers_differ"], False),
        ('"compared": 4, "apart": 1.0', -6, ["comparison_ended"], True),
        ('"tail": 10', -6, ["comparison_ended"], None),
    ],
)
def test_a_comparison_that_ends_badly_is_told(said, status, codes, agrees, tmp_path, monkeypatch):
    def write(*_, **__):
        (tmp_path / "micro.json").write_text(f'{{"arena": 64, "head": 16, {said}}}')
        return Ended(status, False, "abort")

    monkeypatch.setattr(commands, "run_python", write)
    report = micro.measure(models.convolutions(), models.image(), tmp_path)
    assert (report.runs, report.agrees) == (True, agrees)
    assert [note.code for note in report.notes] == codes


def test_missing_operators_by_the_list():
    graph = inspect_tflite.parse(models.convolutions("GELU"))
    assert micro.missing_operators(graph) == ["GELU"]
