"""What a child that was taken over leaves for its worker, which is not confined, to read."""

import os
import textwrap
from pathlib import Path

import pytest
from attacking import Attacks, snapshot

from app.domain.problems import WorkError
from workers import runner, usage
from workers.outcome import LOG_LINES, MAX_OUTCOME_BYTES, log_tail, made_file, outcome
from workers.runner import Limits


@pytest.mark.parametrize("name", ["result.json", "error.json"])
@pytest.mark.parametrize(
    "left",
    [
        "os.symlink({secret!r}, {name!r})",
        "os.symlink('/dev/zero', {name!r})",
        "os.mkdir({name!r})",
        "Path({name!r}).write_text('[')",
        "Path({name!r}).write_text('[' * 100000)",
        "Path({name!r}).write_text('[1]')",
        "Path({name!r}).write_bytes(bytes([255, 0, 255]))",
        f"os.truncate(os.open({{name!r}}, os.O_CREAT | os.O_RDWR), {MAX_OUTCOME_BYTES + 1})",
        "os.open({name!r}, os.O_CREAT, 0)",
    ],
)
def test_an_outcome_that_is_none(attacks: Attacks, outside: Path, name: str, left: str) -> None:
    if os.getuid() == 0 and "O_CREAT, 0" in left:
        pytest.skip("root reads every file")
    with pytest.raises(WorkError) as caught:
        attacks.run(left.format(secret=str(outside / "secret"), name=name))
    assert caught.value.code == "child_failed"
    assert "secret" not in caught.value.message


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(WorkError):
        outcome(0, tmp_path, starved=0)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../outside/secret", "out/../../x", "link/secret", "out/link", "out", "", "\0"],
)
def test_only_files_of_its_own_are_taken(tmp_path: Path, outside: Path, path: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(outside / "secret")
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(WorkError) as caught:
        made_file(tmp_path, path)
    assert caught.value.code == "child_failed"


def test_a_log_that_is_no_log(attacks: Attacks, outside: Path) -> None:
    code = f"""
        for _ in range(200):
            os.write(1, b"x" * (1 << 20))
        os.write(1, b"\\n" * 3 + b"the end\\n")
        os.rename("log.txt", "other")
        os.symlink({str(outside / "secret")!r}, "log.txt")
        os._exit(1)
    """
    with attacks.child(textwrap.dedent(code)) as made:
        with pytest.raises(WorkError):
            runner.run(made, Limits(60, 2**30), lambda event: None, lambda: False)
        assert log_tail(made.directory) is None
        os.replace(made.directory / "other", made.directory / "log.txt")
        tail = log_tail(made.directory)
        assert tail is not None
        assert tail.endswith("the end")
        assert len(tail) < LOG_LINES * 501


def test_what_it_left_is_removed_however_deep(attacks: Attacks, outside: Path) -> None:
    before = snapshot(outside)
    attacks.run(f"""
        os.chdir("out")
        os.symlink({str(outside)!r}, "link")
        for _ in range(1100):
            os.mkdir("a" * 10)
            os.chdir("a" * 10)
        denied = tried(lambda: os.mkdir("closed", 0)), tried(lambda: os.umask(0o777))
        assert denied == ("denied", "denied"), denied
        os.chdir(confinement.directory)
        result({{}})
    """)
    assert list(attacks.site.work_dir.iterdir()) == []
    assert snapshot(outside) == before


def test_closed_folders_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "left"
    (folder / "closed" / "inner").mkdir(parents=True)
    (folder / "closed").chmod(0)
    usage.remove(folder)
    assert list(tmp_path.iterdir()) == []
