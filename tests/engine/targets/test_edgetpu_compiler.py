import os
import sys
from pathlib import Path

import pytest

from app.domain.edgetpu import CompileOptions
from app.domain.problems import WorkError
from tests.engine.targets.models import single
from workers import compilers
from workers.engine.targets import edgetpu_compiler

MODEL = single("LOGISTIC")
FAKE = Path(__file__).with_name("fake_edgetpu_compiler.py")
# Long enough never to end a run that ends by itself.
PATIENCE = 120.0
VERSION = "16.0.384591198"


@pytest.fixture
def fake(tmp_path):
    """Makes the test double for a scenario; it is no edgetpu_compiler and compiles nothing."""

    def make(scenario):
        script = tmp_path / "fake_edgetpu_compiler"
        script.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
        script.chmod(0o755)
        (tmp_path / "scenario").write_text(scenario)
        return script

    return make


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def compile_with(executable, work, version=VERSION, **options):
    given = CompileOptions(**{"timeout_s": PATIENCE, **options})
    return edgetpu_compiler.compile(MODEL, given, work, str(executable), version)


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_a_compiled_file_with_its_log(fake, work):
    compiled = compile_with(fake("success"), work)
    assert [path.name for path in compiled.files] == ["model_edgetpu.tflite"]
    assert compiled.files[0].read_bytes() == MODEL
    assert "Mapped to Edge TPU" in compiled.log
    assert (compiled.report.mapped, compiled.report.cpu) == (2, 1)
    # The screen leaves out what is mapped; the log has it.
    assert [(row.operator, row.count) for row in compiled.report.rows] == [
        ("LEAKY_RELU", 1),
        ("CONV_2D", 2),
    ]


def test_options_reach_the_program(fake, work, tmp_path):
    compile_with(
        fake("success"),
        work,
        min_runtime_version=13,
        multiple_subgraphs=True,
        search_delegate=True,
        delegate_search_step=4,
    )
    assert calls(tmp_path)[0].startswith(f"-s -m 13 -a -d -k 4 -t {PATIENCE:.0f} -o ")


def test_segments(fake, work):
    compiled = compile_with(fake("success"), work, num_segments=11)
    assert [path.name for path in compiled.files] == [
        f"model_segment_{index}_of_11_edgetpu.tflite" for index in range(11)
    ]
    assert len(compiled.report.segments) == 11
    assert compiled.report.ops == 33


def test_an_older_release(fake, work, tmp_path):
    executable = fake("release_15")
    compile_with(executable, work, "15.0.340273435")
    assert " -t " not in calls(tmp_path)[0]
    with pytest.raises(WorkError) as error:
        compile_with(executable, work, "15.0.340273435", search_delegate=True)
    assert error.value.code == "option_unsupported"


def test_an_internal_error_is_tried_once_more(fake, work, tmp_path):
    assert compile_with(fake("internal_once"), work).report.success
    assert len(calls(tmp_path)) == 2


def test_an_internal_error_twice_is_told(fake, work, tmp_path):
    with pytest.raises(WorkError) as error:
        compile_with(fake("internal"), work)
    assert error.value.code == "compiler_internal_error"
    assert len(calls(tmp_path)) == 2


@pytest.mark.parametrize(
    ("scenario", "code", "told"),
    [
        ("not_quantized", "not_quantized", "fully quantized"),
        ("dynamic", "dynamic_tensors", "size is known only when"),
        ("op_version", "op_version_unsupported", "FULLY_CONNECTED in version 12"),
        ("custom_op", "unsupported_ops", "MyDecoder"),
        ("activations", "activations_too_large", "too large"),
        ("bare", "compiler_failed", "without a reason"),
        ("crash", "compiler_crashed", "signal 6"),
        ("garbage", "compiler_output_unreadable", "no output of"),
        ("no_output", "compiler_no_output", "0 of 1"),
        ("broken_output", "compiler_output_unreadable", "no model"),
    ],
)
def test_failures_have_a_cause_and_a_next_step(fake, work, scenario, code, told):
    with pytest.raises(WorkError, match=told) as error:
        compile_with(fake(scenario), work)
    assert error.value.code == code
    assert error.value.hint


def test_what_it_printed_last_comes_along(fake, work):
    with pytest.raises(WorkError) as error:
        compile_with(fake("bare"), work)
    assert error.value.log_tail.endswith("Compilation failed!")


def test_a_hanging_program_is_stopped_with_its_children(fake, work, tmp_path):
    with pytest.raises(WorkError) as error:
        compile_with(fake("hang"), work, timeout_s=3.0)
    assert error.value.code == "compiler_timeout"
    child = tmp_path / "child"
    if child.exists():  # a slow machine may stop it before it has one
        assert not _is_running(int(child.read_text()))


@pytest.mark.parametrize("scenario", ["print_forever", "fill_disk"])
def test_a_program_that_writes_without_end_is_stopped(fake, work, scenario, monkeypatch):
    monkeypatch.setattr(edgetpu_compiler, "MAX_WRITTEN_BYTES", 5_000_000)
    with pytest.raises(WorkError) as error:
        compile_with(fake(scenario), work)
    assert error.value.code == "compiler_wrote_too_much"


def test_no_compiler_installed(work):
    with pytest.raises(WorkError) as error:
        compile_with(work / "nowhere", work)
    assert error.value.code == "compiler_not_installed"


def test_the_compiler_is_found_by_its_version(fake, tmp_path, monkeypatch):
    executable = fake("success")
    assert compilers.installed(str(executable))["edgetpu_compiler"] == VERSION
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert compilers.installed(executable.name)["edgetpu_compiler"] == VERSION
    assert "edgetpu_compiler" not in compilers.installed(str(tmp_path / "nowhere"))


def test_another_program_under_its_name(fake):
    assert "edgetpu_compiler" not in compilers.installed(str(fake("other_program")))


def _is_running(pid):
    """Not a zombie, which nobody may have collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
    except OSError:
        return os.path.exists(f"/proc/{pid}")
