"""The embedded default as processes: alone on its directory, restarted, gone when stopped."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import LITESMITH, Files, Service, embedded, environment, until


def serve(data_dir: Path, port: int) -> subprocess.CompletedProcess[str]:
    command = [str(LITESMITH), "serve", "--port", str(port), "--data-dir", str(data_dir)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)


def family(service: Service) -> list[psutil.Process]:
    root = psutil.Process(service.processes["serve"].pid)
    return [root, *root.children(recursive=True)]


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_second_service_on_the_same_directory_is_refused(service: Service) -> None:
    refused = serve(service.data_dir, 0)
    assert refused.returncode == 1
    assert "already uses" in refused.stderr
    assert str(service.data_dir) in refused.stderr
    assert f"process {service.processes['serve'].pid}" in refused.stderr
    assert "--data-dir" in refused.stderr
    assert service.http.get("/readyz").status_code == 200


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = serve(tmp_path / "data", port)
    assert refused.returncode == 1
    assert f"127.0.0.1:{port}" in refused.stderr
    assert "--port" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    command = [str(LITESMITH), "serve", "--data-dir", str(tmp_path)]
    wrong = subprocess.run(
        command, env=environment(lease_s="soon"), capture_output=True, text=True, timeout=60
    )
    assert wrong.returncode == 2
    assert "LITESMITH_LEASE_S" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("how", ["ctrl-c", "kill -9"])
def test_nothing_is_left_running(tmp_path: Path, how: str) -> None:
    """Ctrl-C reaches the whole process group; kill -9 lets the supervisor do nothing any more."""
    with embedded(tmp_path / "data", light_spares=1, tensorflow_spares=0) as service:
        service.spare()
        processes = family(service)
        names = " ".join(" ".join(process.cmdline()) for process in processes)
        for part in ("serve", "app api", "app beat", "workers.celery", "workers.child"):
            assert part in names
        supervisor = service.processes["serve"]
        if how == "ctrl-c":
            os.killpg(supervisor.pid, signal.SIGINT)
            assert supervisor.wait(30) == 0
            assert service.log("serve").rstrip().endswith("stopped")
            assert list((service.data_dir / "work").glob("*/")) == []
        else:
            supervisor.kill()
            supervisor.wait()
        until(lambda: not any(lives(process) for process in processes), "all are gone", 10)
        # For the fixture, which stops what has stopped.
        supervisor.returncode = 0


def test_a_service_with_time_to_drain_waits_for_what_runs(tmp_path: Path, files: Files) -> None:
    with embedded(tmp_path / "data", light_spares=1, fast_slots=1, drain_s=60) as service:
        model = service.upload("model", files.tflite)["id"]
        _, child = service.hang(model=model, variants=["float16"])
        supervisor = service.processes["serve"]
        supervisor.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            supervisor.wait(3)
        child.resume()
        assert supervisor.wait(30) == 0
        assert list((service.data_dir / "work").glob("*/")) == []
        assert '"task ended"' in service.log("worker").rpartition("Warm shutdown")[2]


def test_a_broker_that_loses_everything_loses_no_job(
    service: Service, model: str, dataset: str, finished: dict[str, Any]
) -> None:
    broker = next(process for process in family(service) if "valkey" in process.name())
    running, child = service.hang(model=model, dataset=dataset, variants=["int8"], seed=41)
    waiting = service.submit(model=model, dataset=dataset, variants=["int8"], seed=42)
    broker.kill()
    unheard = service.submit(model=model, dataset=dataset, variants=["int8"], seed=43)
    child.resume()
    for job in (running, waiting, unheard):
        assert service.job(job["id"], wait=60)["status"] == "succeeded"


def test_a_part_that_ends_is_started_again(service: Service) -> None:
    api = next(process for process in family(service) if process.cmdline()[-1] == "api")
    api.kill()

    def answers() -> bool:
        try:
            return bool(service.http.get("/readyz").status_code == 200)
        except OSError:
            return False
        except Exception:
            return False

    until(lambda: not lives(api), "it is dead")
    until(answers, "another one answers")
    assert "api ended (-9); starting it again" in service.log("serve")


def test_a_job_that_was_under_way_when_the_service_stopped_is_ended_by_the_next(
    tmp_path: Path, files: Files
) -> None:
    settings = {"light_spares": 1, "tensorflow_spares": 0}
    with embedded(tmp_path / "data", **settings) as service:
        model = service.upload("model", files.tflite)["id"]
        data = service.upload("dataset", files.npz)["id"]
        job, child = service.hang(model=model, dataset=data, variants=["int8"])
    assert not lives(child)
    with embedded(tmp_path / "data", **settings) as service:
        # Handed back by the worker that stopped: no lease has to end first.
        assert service.job(job["id"], wait=25)["status"] == "succeeded"


def test_a_killed_service_leaves_nothing_that_the_next_cannot_use(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "work" / "of-a-killed-worker").mkdir(parents=True)
    (folder / "work" / "of-a-killed-worker" / "lock").touch()
    with embedded(folder, light_spares=0, tensorflow_spares=0) as service:
        left = [path.name for path in (service.data_dir / "work").glob("*/")]
        assert "of-a-killed-worker" not in left
        assert len(left) == 1
    shutil.rmtree(folder)
