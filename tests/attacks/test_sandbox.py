"""Code that runs in a child, with all that a file could have smuggled in, against each layer."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from attacking import ENOUGH, Attacks, needs_landlock, snapshot
from running import until

from app.domain.problems import WorkError
from workers.runner import Limits, Site
from workers.sandbox import ACTIVE, landlock, limits, probe, seccomp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


def test_the_network_is_closed(attacks: Attacks) -> None:
    found = attacks.run("""
        families = [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK,
                    socket.AF_PACKET, 40]  # vsock
        kinds = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW]
        tries = [tried(lambda: socket.socket(f, k)) for f in families for k in kinds]
        tries += [tried(socket.socketpair), tried(lambda: socket.create_server(("", 0)))]
        result({"result": tries})
    """)
    assert set(found) == {"denied"}


def test_what_may_use_the_network_may_do_no_more(attacks: Attacks, outside: Path) -> None:
    """Weights that Keras publishes are fetched by a child that opens no user's file."""
    code = f"""
        open_socket = tried(lambda: socket.create_server(("127.0.0.1", 0)))
        result(dict(
            udp=tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
            connect=tried(lambda: socket.create_connection(("127.0.0.1", 9), timeout=1)),
            server=open_socket,
            unix=tried(lambda: socket.socket(socket.AF_UNIX)),
            fork=tried(os.fork),
            read=tried(lambda: open({str(outside / "secret")!r})),
        ))
    """
    found = attacks.run(code, network=True)
    assert found.pop("udp") == "done"
    assert found.pop("connect").startswith("ConnectionRefusedError")
    if landlock.abi() < landlock.LEAST_ABI:
        del found["read"]
    assert set(found.values()) == {"denied"}, found


@needs_landlock
def test_a_lock_elsewhere_is_held_and_not_written(attacks: Attacks, outside: Path) -> None:
    attacks.site = replace(attacks.site, readable=(outside / "secret",))
    code = f"""
        from workers.engine.latency import machine_lock
        path = {str(outside / "secret")!r}
        with machine_lock(path):
            result(dict(write=tried(lambda: open(path, "a")), read=open(path).read()))
    """
    assert attacks.run(code) == {"write": "denied", "read": "the secret"}


@needs_landlock
def test_files_outside_are_neither_read_nor_written(attacks: Attacks, outside: Path) -> None:
    before = snapshot(outside)
    found = attacks.run(f"""
        outside = Path({str(outside)!r})
        other = Path(confinement.directory).parent.parent
        result(dict(
            passwd=tried(lambda: Path("/etc/passwd").read_text()),
            read=tried(lambda: (outside / "secret").read_text()),
            link=tried(lambda: os.symlink(outside / "secret", "out/link") or open("out/link")),
            hard=tried(lambda: os.link(outside / "secret", "out/hard")),
            up=tried(lambda: open("../../../outside/secret")),
            list=tried(lambda: os.listdir(outside)),
            root=tried(lambda: os.listdir("/")),
            others=tried(lambda: os.listdir(other)),
            environ=tried(lambda: open(f"/proc/{{os.getppid()}}/environ").read()),
            memory=tried(lambda: open(f"/proc/{{os.getppid()}}/mem")),
            write=tried(lambda: (outside / "secret").write_text("broken")),
            create=tried(lambda: (outside / "new").write_text("")),
            temporary=tried(lambda: Path("/tmp/litesmith-attack").write_text("")),
            remove=tried(lambda: (outside / "secret").unlink()),
            move=tried(lambda: os.rename(outside / "secret", "out/secret")),
            truncate=tried(lambda: os.truncate(outside / "secret", 0)),
            mode=tried(lambda: os.chmod(outside / "secret", 0o777)),
            owner=tried(lambda: os.chown(outside / "secret", 12345, -1)),
            time=tried(lambda: os.utime(outside / "secret", (0, 0))),
            attribute=tried(lambda: os.setxattr(outside / "secret", "user.x", b"")),
            device=tried(lambda: os.mknod("out/disk", 0o60600, 0x0800)),
            fifo=tried(lambda: os.mkfifo("out/fifo")),
            mount=tried(lambda: Path("/proc/self/mountinfo").read_text()) and "denied",
        ))
    """)
    # A hard link out of another folder is refused as if it were another disk.
    assert found.pop("hard").startswith(("denied", "OSError: [Errno 18]"))
    assert found.pop("move").startswith(("denied", "OSError: [Errno 18]"))
    assert set(found.values()) == {"denied"}, found
    assert snapshot(outside) == before
    assert not Path("/tmp/litesmith-attack").exists()


@needs_landlock
def test_its_inputs_are_not_its_own_to_change(attacks: Attacks) -> None:
    """They may be the very files of the storage."""
    code = """
        result(dict(
            read=Path("in/model").read_text(),
            write=tried(lambda: Path("in/model").write_text("broken")),
            append=tried(lambda: open("in/model", "a")),
            remove=tried(lambda: Path("in/model").unlink()),
            mode=tried(lambda: os.chmod("in/model", 0)),
            fd_mode=tried(lambda: os.fchmod(os.open("in/model", os.O_RDONLY), 0)),
            real=tried(lambda: Path(confinement.inputs, "model").write_text("broken")),
            more=tried(lambda: Path("in/more").write_text("")),
            writes=tried(lambda: Path("out/file").write_text("mine")),
            moves=tried(lambda: os.rename("out/file", "tmp/file")),
            scratch=tried(lambda: Path(os.environ["TMPDIR"], "file").unlink()),
        ))
    """
    found = attacks.run(code, files={"model": b"the model"})
    assert found.pop("read") == "the model"
    assert [found.pop(name) for name in ("writes", "moves", "scratch")] == ["done"] * 3
    assert set(found.values()) == {"denied"}, found


def test_nothing_is_started_and_nobody_is_signalled(attacks: Attacks) -> None:
    found = attacks.run("""
        import ctypes, subprocess
        libc = ctypes.CDLL(None, use_errno=True)
        def call(*arguments):
            if libc.syscall(*arguments) < 0:
                raise OSError(ctypes.get_errno(), "")
        machine = os.uname().machine
        ptrace, unshare = {"x86_64": (101, 272), "aarch64": (117, 97)}[machine]
        result(dict(
            fork=tried(os.fork),
            execute=tried(lambda: os.execv(sys.executable, [sys.executable])),
            shell=tried(lambda: subprocess.run(["/bin/sh", "-c", "true"])),
            spawn=tried(lambda: os.posix_spawn("/bin/true", ["true"], {})),
            kill=tried(lambda: os.kill(os.getppid(), signal.SIGCONT)),
            everyone=tried(lambda: os.kill(-1, 0)),
            ptrace=tried(lambda: call(ptrace, 16, os.getppid(), 0, 0)),
            namespace=tried(lambda: call(unshare, 0x10000000)),
            io_uring=tried(lambda: call(425, 8, 0)),
            keys=tried(lambda: call({"x86_64": 250, "aarch64": 219}[machine], 0, -4, 0)),
            shared=tried(lambda: call({"x86_64": 29, "aarch64": 194}[machine], 0, 4096, 0o1600)),
            memory_file=tried(lambda: os.memfd_create("x")),
            limits=tried(lambda: __import__("resource").prlimit(os.getppid(), 7, (0, 0))),
            outlive=tried(lambda: call({"x86_64": 157, "aarch64": 167}[machine], 1, 0)),
        ))
    """)
    assert set(found.values()) == {"denied"}, found


def test_threads_of_before_are_held_too(attacks: Attacks, outside: Path) -> None:
    """As those that TensorFlow has started when the work comes."""
    preload = """
import queue
asked, answers = queue.Queue(), queue.Queue()
def work():
    while True:
        answers.put(asked.get()())
threading.Thread(target=work, daemon=True).start()
"""
    code = f"""
        def ask(act):
            asked.put(lambda: tried(act))
            return answers.get(timeout=10)
        result(dict(
            socket=ask(socket.socket),
            fork=ask(os.fork),
            read=ask(lambda: open({str(outside / "secret")!r})),
        ))
    """
    found = attacks.run(code, preload=preload)
    if landlock.abi() < landlock.LEAST_ABI:
        del found["read"]
    assert set(found.values()) == {"denied"}, found


def test_the_environment_holds_no_secret(attacks: Attacks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LITESMITH_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    found = attacks.run("result(dict(os.environ))")
    assert "secret" not in str(found)
    assert set(found) <= {
        "PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME", "TMPDIR",
        "KERAS_HOME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "TF_USE_LEGACY_KERAS",
        "TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES",
    }  # fmt: skip


def test_no_privilege_is_left_or_regained(attacks: Attacks) -> None:
    found = attacks.run("""
        status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines())
        result({name: status[name] for name in ("NoNewPrivs", "CapEff", "CapPrm", "CapBnd")})
    """)
    assert found.pop("NoNewPrivs") == "1"
    if os.getuid() == 0:
        assert {int(value, 16) for value in found.values()} == {0}


NOBODY = 65534


def python_of(user: int) -> str | None:
    """A Python that this user can run: one below /root can't be read by others."""
    for python in (sys.executable, "/usr/bin/python3"):
        told = "import sys, ctypes, json; sys.exit(sys.version_info < (3, 11))"
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", told], user=user, capture_output=True).returncode == 0:
                return python
    return None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_child_of_root_becomes_another_user(attacks: Attacks, outside: Path) -> None:
    # From pytest's own folder down: others may pass through.
    for folder in (attacks.site.work_dir, *attacks.site.work_dir.parents[:3]):
        folder.chmod(0o755)
    python = python_of(NOBODY)
    if python is None:
        pytest.skip("no Python here can be read by another user")
    attacks.site, attacks.python = replace(attacks.site, user=NOBODY), python
    code = f"""
        result(dict(
            user=os.getresuid(), groups=os.getgroups(),
            back=tried(lambda: os.setuid(0)),
            write=tried(lambda: Path("out/file").write_text("x")),
            read=tried(lambda: open({str(outside / "secret")!r})),
        ))
    """
    found = attacks.run(code)
    assert found == {
        "user": [NOBODY] * 3, "groups": [], "back": "denied", "write": "done", "read": "denied"
    }  # fmt: skip


def test_a_memory_bomb_ends_as_out_of_memory(attacks: Attacks) -> None:
    with pytest.raises(WorkError) as caught:
        attacks.run(
            "hoard = []\nwhile True: hoard.append(b'x' * (64 << 20))",
            replace(ENOUGH, memory_bytes=512 << 20),
        )
    assert caught.value.code in ("out_of_memory", "child_failed")


def test_a_memory_bomb_at_once_is_refused_by_the_limit(attacks: Attacks) -> None:
    found = attacks.run("result({'result': tried(lambda: bytearray(64 << 30))})")
    assert found.startswith("MemoryError")


def test_a_file_without_end_meets_its_limit(attacks: Attacks) -> None:
    code = """
        def write():
            with open("out/huge", "wb") as file:
                file.seek(3 << 30)
                file.write(b"x")
        result({"result": tried(write)})
    """
    assert "File too large" in attacks.run(code)


def test_many_files_meet_the_limit_of_all(attacks: Attacks) -> None:
    code = """
        for number in range(10**6):
            Path(f"out/{number}").write_bytes(b"x" * (1 << 20))
            time.sleep(0.01)
    """
    with pytest.raises(WorkError) as caught:
        attacks.run(code, replace(ENOUGH, disk_bytes=32 << 20))
    assert caught.value.code == "out_of_disk"
    assert list(attacks.site.work_dir.iterdir()) == []


def test_a_fork_bomb_does_not_take_off(attacks: Attacks) -> None:
    found = attacks.run("""
        result({"result": [tried(os.fork) for _ in range(1000)]})
    """)
    assert set(found) == {"denied"}


def test_a_thread_bomb_ends(attacks: Attacks) -> None:
    code = """
        threading.stack_size(64 << 10)
        while True:
            try:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            except (RuntimeError, MemoryError):
                time.sleep(0.1)
    """
    with pytest.raises(WorkError) as caught:
        attacks.run(code)
    assert caught.value.code == "too_many_processes"


TOOLS = (Path(sys.executable),)


@needs_landlock
def test_work_with_tools_starts_them_and_nothing_else(
    attacks: Attacks, tmp_path: Path, outside: Path
) -> None:
    attacks.site = replace(attacks.site, tools=TOOLS)
    script = "import socket\ntry: socket.socket()\nexcept PermissionError: print('no socket')\n"
    script += f"try: open({str(outside / 'secret')!r})\nexcept PermissionError: print('no file')"
    code = f"""
        import subprocess
        Path("out/own").write_text("#!/bin/sh\\n")
        def start(*command):
            return subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        result(dict(
            python=start(sys.executable, "-I", "-c", {script!r}).stdout,
            shell=tried(lambda: start("/bin/sh", "-c", "true")),
            own=tried(lambda: start("./out/own")),
            socket=tried(socket.socket),
            parent=tried(lambda: os.kill(os.getppid(), signal.SIGCONT)),
        ))
    """
    found = attacks.run(code, tools=True)
    assert found.pop("python") == "no socket\nno file\n"
    if landlock.abi() < 6:
        del found["parent"]  # signals are held back by Landlock alone here
    assert set(found.values()) == {"denied"}, found


def test_a_fork_bomb_of_work_with_tools_is_ended(attacks: Attacks) -> None:
    """Each leaves its process group and its parent: none of them is lost sight of."""
    code = """
        import ctypes
        ctypes.CDLL(None).prctl(36, 1)
        for _ in range(100000):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(100)
                os._exit(0)
    """
    attacks.site = replace(attacks.site, tools=TOOLS)
    with pytest.raises(WorkError) as caught:
        attacks.run(code, replace(ENOUGH, memory_bytes=64 << 30), tools=True)
    assert caught.value.code == "too_many_processes"
    until(lambda: not _running(str(attacks.site.work_dir)), "all of them are gone", 20)


def _running(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        told = " ".join(process.info["cmdline"] or [])
        if mark in told and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_the_probe_tells_what_holds() -> None:
    found = probe.layers("auto")
    assert set(found) == set(probe.LAYERS)
    assert found["environment"] == found["limits"] == ACTIVE
    assert found["network"] == found["processes"] == found["privileges"] == ACTIVE
    assert (found["user"] == ACTIVE) == (os.getuid() != 0)
    if landlock.abi() >= landlock.LEAST_ABI:
        assert found["filesystem"] == ACTIVE


def test_a_missing_layer_is_told_and_may_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(probe.layers("off").values()) == {"off: LITESMITH_SANDBOX=off"}
    lacking = dict.fromkeys(probe.LAYERS, ACTIVE) | {"filesystem": "no Landlock"}
    monkeypatch.setattr(probe, "layers", lambda mode, user: lacking)
    assert probe.check("auto") == lacking
    with pytest.raises(probe.SandboxMissing, match="filesystem: no Landlock"):
        probe.check("require")


def test_a_layer_that_is_required_is_not_gone_without(
    attacks: Attacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks.site = replace(attacks.site, mode="require")
    broken = """
from workers.sandbox import seccomp
def refuse(**_):
    raise OSError(38, "no filters here")
seccomp.install = refuse
"""
    with pytest.raises(WorkError) as caught:
        attacks.run("result({})", preload=broken)
    assert caught.value.code == "child_failed"
    attacks.site = replace(attacks.site, mode="auto")
    assert attacks.run("result({'went': 'on'})", preload=broken) == {"went": "on"}


def test_off_is_off(attacks: Attacks, outside: Path) -> None:
    attacks.site = Site(attacks.site.work_dir, mode="off")
    assert attacks.run(f"result({{'read': open({str(outside / 'secret')!r}).read()}})") == {
        "read": "the secret"
    }


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filters_jump_within_themselves(machine: str) -> None:
    for tools in (False, True):
        for network in (False, True):
            program = seccomp.program(machine, 1234, tools=tools, network=network)
            assert len(program) < 4096
            for place, (code, true, false, _) in enumerate(program):
                if code & 0x07 == 0x05:
                    assert place + 1 + max(true, false) < len(program)
            assert program[-1][0] == 0x06


def test_limits_leave_room_for_the_work() -> None:
    assert limits.threads() >= 256
    assert Limits(1, 1).disk_bytes >= 2**36
