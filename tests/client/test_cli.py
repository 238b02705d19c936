"""The `litesmith` command against the stand-in."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli import main
from app.cli_output import Watch
from app.client import Event
from tests.client.conftest import StandIn


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("m.keras").write_bytes(b"m" * 1000)
    Path("d.npz").write_bytes(b"d" * 1000)
    return tmp_path


def litesmith(service: StandIn, *args: str) -> Result:
    return CliRunner().invoke(main, ["--url", service.url, *args])


def test_optimize_prints_the_table_and_writes_the_files(service: StandIn, folder: Path) -> None:
    done = litesmith(
        service, "optimize", "m.keras", "--data", "d.npz", "--variants", "float16,int8",
        "--max-drop", "0.01", "--max-size", "30kB", "--scale", "0.5", "--resize", "32x16",
        "--out", "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert service.submitted[0]["budgets"] == {"max_accuracy_drop": 0.01, "max_size_bytes": 30_000}
    assert service.submitted[0]["preprocessing"] == {"scale": 0.5, "resize": [32, 16]}
    assert "p50 latency" in done.stdout
    assert "int8: size 25 kB, at most 30 kB: kept" in done.stdout
    assert "job job_0: succeeded in 2.5 s" in done.stdout
    assert "out/report.html" in done.stdout
    assert "upload m.keras: 1 kB sent" in done.stderr
    assert "int8: quantize" in done.stderr
    assert "\x1b" not in done.output
    assert (folder / "out" / "report.md").read_text() == "markdown report of job_0\n"


def test_exit_codes(service: StandIn, folder: Path) -> None:
    broken = litesmith(service, "optimize", "m.keras", "-v", "float16", "--max-size", "20kB")
    assert broken.exit_code == 1
    assert "BROKEN" in broken.stdout
    service.failing = {"int8"}
    partial = litesmith(service, "optimize", "m.keras", "-d", "d.npz", "-v", "float16,int8")
    assert partial.exit_code == 1
    assert "failed: collapsed" in partial.stdout
    assert "One class for all samples. Try float16." in partial.stdout
    refused = litesmith(service, "optimize", "m.keras", "-v", "qat")
    assert refused.exit_code == 2
    assert "variants.0: needs labels" in refused.stderr
    assert "next: Add y to the dataset" in refused.stderr
    for wrong in (
        ("absent.keras", "-v", "int8"),
        ("m.keras", "-v", "int9"),
        ("m.keras", "-v", "int8+prune"),
        ("m.keras", "--max-size", "much"),
        ("m.keras", "--resize", "224"),
        ("m.keras", "--no-such-option"),
    ):
        done = litesmith(service, "optimize", *wrong)
        assert done.exit_code == 2, wrong
        assert "Traceback" not in done.output
    nobody = CliRunner().invoke(main, ["--url", "http://127.0.0.1:1", "models", "list"])
    assert nobody.exit_code == 3
    assert "No service at http://127.0.0.1:1" in nobody.stderr
    assert "litesmith serve" in nobody.stderr


def test_json_and_spec_file(service: StandIn, folder: Path) -> None:
    Path("spec.json").write_text(
        json.dumps({"variants": ["int8"], "dataset": "d.npz", "budgets": {"max_size_bytes": 9}})
    )
    done = litesmith(
        service, "optimize", "m.keras", "--spec", "spec.json", "--max-size", "1MB", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["variants"][0]["name"] == "int8"
    assert done.stderr == ""
    assert service.submitted[0]["budgets"] == {"max_size_bytes": 1_000_000}
    later = litesmith(service, "optimize", "m.keras", "-v", "float16", "--no-wait")
    assert "litesmith jobs watch job_1" in later.stdout


def test_resources(service: StandIn, folder: Path) -> None:
    assert litesmith(service, "models", "upload", "m.keras", "--name", "mine").exit_code == 0
    assert "mine" in litesmith(service, "models", "list").stdout
    assert "sha256" in litesmith(service, "models", "show", "mdl_0").stdout
    litesmith(service, "optimize", "mdl_0", "-v", "float16")
    assert "float16" in litesmith(service, "jobs", "list").stdout
    report = litesmith(service, "jobs", "report", "job_0", "--format", "csv")
    assert report.stdout == "csv report of job_0\n"
    absent = litesmith(service, "jobs", "show", "job_9")
    assert absent.exit_code == 2
    assert "There is no job 'job_9'." in absent.stderr


def test_analyze(service: StandIn, folder: Path) -> None:
    Path("m.tflite").write_bytes(b"TFL3")
    done = litesmith(service, "analyze", "m.tflite", "--compiler", "14.1")
    assert done.exit_code == 0, done.output
    assert "compiler 14.1: 1 of 3 operators map, in 1 part(s)" in done.stdout
    assert "4 kB on the chip (8 MB left)" in done.stdout
    assert "2       ELU       unsupported_operation" in done.stdout
    assert "advice for ELU (l, l, l and 2 more): Replace ELU by RELU" in done.stdout
    assert "CONV_2D" not in done.stdout
    everything = litesmith(service, "analyze", "m.tflite", "--all", "--multiple-subgraphs")
    assert "CONV_2D" in everything.stdout
    assert "in 2 part(s)" in everything.stdout
    as_json = litesmith(service, "analyze", "art_1", "--json")
    assert json.loads(as_json.stdout)["mapped"] == 1
    assert json.loads(service.analyzed[-1]) == {"artifact": "art_1"}
    Path("m.tflite").write_bytes(b"NEW")
    refused = litesmith(service, "analyze", "m.tflite")
    assert refused.exit_code == 1
    assert "the compiler would refuse it: " in refused.stdout
    Path("m.tflite").write_bytes(b"BAD")
    refused = litesmith(service, "analyze", "m.tflite")
    assert refused.exit_code == 2
    assert "next: Quantize it" in refused.stderr
    absent = litesmith(service, "analyze", "absent.tflite")
    assert (absent.exit_code, "there is no file" in absent.stderr) == (2, True)


def test_what_is_known_and_advised(service: StandIn, folder: Path) -> None:
    told = litesmith(service, "targets").stdout
    assert "compiler: edgetpu_compiler, not installed" in told
    listed = litesmith(service, "catalog").stdout
    assert "475,544" in listed
    assert "49.8%" in listed
    advice = litesmith(service, "advise", "--samples-only", "--target", "edgetpu", "--rejected")
    assert advice.exit_code == 0, advice.output
    for line in (
        "note: no model was named",
        "1. int8: size 0.25 to 0.5×, download 0.3×, drop 0 to 0.01",
        "it is small",
        "needs samples",
        "not qat: nothing to train on",
        "missing training_data: Samples.",
    ):
        assert line in advice.stdout
    assert service.submitted[0] == {
        "target": "edgetpu", "goal": "balanced", "has_representative_data": True,
    }  # fmt: skip
    litesmith(service, "advise", "m.keras", "--data", "d.npz", "--max-size", "1MB", "--json")
    assert service.submitted[1]["model"] == "mdl_0"
    assert service.submitted[1]["dataset"] == "dat_1"
    assert service.submitted[1]["max_size_bytes"] == 1_000_000
    assert litesmith(service, "advise", "absent.keras").exit_code == 2
    made = litesmith(service, "models", "from-catalog", "small", "--weights", "random")
    assert "of the catalog" in made.stdout
    assert service.submitted[2] == {"catalog": "small", "weights": "random", "seed": 0}


@pytest.mark.parametrize("asked", [("-v", "auto"), ("--goal", "size"), ("--spec", "auto.json")])
def test_auto_leaves_the_variants_to_the_service(
    service: StandIn, folder: Path, asked: tuple[str, str]
) -> None:
    Path("auto.json").write_text('{"variants": "auto"}')
    litesmith(service, "optimize", "m.keras", *asked)
    assert service.submitted[0]["variants"] == "auto"
    assert service.submitted[0].get("goal") == ("size" if "size" in asked else None)


def test_a_training_tells_a_line_an_epoch_where_there_is_no_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = Watch()
    for epoch, step in ((1, 1), (1, 9), (2, 1), (2, 9)):
        training = {"technique": "prune", "epoch": epoch, "step": step, "score": None}
        data = {
            "name": "prune+int8",
            "status": "running",
            "stage": "prune",
            "message": f"prune: epoch {epoch}/2, step {step}/9",
            "training": training,
        }
        watch.event(Event(id=1, name="variant", data=data))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("] ")[1] for line in lines] == [
        "prune+int8: prune: epoch 1/2, step 1/9",
        "prune+int8: prune: epoch 2/2, step 1/9",
    ]
