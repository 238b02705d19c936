"""Uploads in several requests: the protocol, what broken connections leave, who may go on."""

import os
import signal
import socket
import sqlite3
from base64 import b64encode
from contextlib import closing
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running import MAX_UPLOAD_BYTES, Files, Service, embedded, npz, problem, unique, until

TUS = {"Tus-Resumable": "1.0.0"}
BODY = TUS | {"Content-Type": "application/offset+octet-stream"}


def metadata(**values: str) -> str:
    return ",".join(f"{key} {b64encode(value.encode()).decode()}" for key, value in values.items())


def create(service: Service, length: int, **given: str) -> str:
    """The path of a new upload."""
    headers = TUS | {"Upload-Length": str(length)}
    if given:
        headers["Upload-Metadata"] = metadata(**given)
    answer = service.http.post("/v1/uploads", headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["tus-resumable"] == "1.0.0"
    assert answer.headers["upload-expires"].endswith("GMT")
    return str(answer.headers["location"])


def append(service: Service, path: str, offset: int, body: bytes, **more: str) -> httpx.Response:
    headers = BODY | {"Upload-Offset": str(offset)} | more
    return service.http.patch(path, headers=headers, content=body)


def offset(service: Service, path: str) -> int:
    answer = service.http.head(path, headers=TUS)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return int(answer.headers["upload-offset"])


def content(service: Service, kind: str, id_: str) -> bytes:
    return service.http.get(f"/v1/{kind}s/{id_}/content").content


def big(tag: str, size: int) -> bytes:
    """A valid dataset of a little more than `size` bytes."""
    import numpy as np

    seed = int.from_bytes(sha256(tag.encode()).digest()[:4])
    return npz(x=np.random.default_rng(seed).integers(0, 256, (size // 100, 100), np.uint8))


def test_what_the_service_can_do(service: Service) -> None:
    answer = service.http.options("/v1/uploads")
    assert answer.status_code == 204
    assert answer.headers["tus-version"] == "1.0.0"
    assert answer.headers["tus-extension"] == "creation,expiration,checksum,termination"
    assert answer.headers["tus-max-size"] == str(MAX_UPLOAD_BYTES)
    assert "sha1" in answer.headers["tus-checksum-algorithm"].split(",")


def test_a_model_in_three_requests(service: Service, files: Files) -> None:
    whole = files.tflite.read_bytes()
    path = create(service, len(whole), kind="model", name="three.tflite", other="ignored")
    first = append(service, path, 0, whole[:1000])
    assert (first.status_code, first.headers["upload-offset"]) == (204, "1000")
    head = service.http.head(path, headers=TUS)
    assert (head.headers["upload-offset"], head.headers["upload-length"]) == (
        "1000",
        str(len(whole)),
    )
    given = metadata(kind="model", name="three.tflite", other="ignored")
    assert head.headers["upload-metadata"] == given
    half = service.http.get(path).json()
    assert (half["offset"], half["model"], half["name"]) == (1000, None, "three.tflite")
    problem(append(service, path, 999, whole[999:]), 409, "offset_mismatch")
    assert append(service, path, 1000, whole[1000:1500]).status_code == 204
    assert append(service, path, 1500, whole[1500:]).status_code == 204
    made = service.http.get(path).json()
    assert service.inspected("model", made["model"])["status"] == "ready"
    assert content(service, "model", made["model"]) == whole
    # The same bytes sent at once are the same model; a request repeated does no harm.
    assert service.upload("model", files.tflite)["id"] == made["model"]
    again = append(service, path, len(whole), b"")
    assert (again.status_code, again.headers["upload-offset"]) == (204, str(len(whole)))


def test_a_dataset_is_found_again_by_its_digest(service: Service) -> None:
    whole = unique("found again")
    digest = sha256(whole).hexdigest()
    path = create(service, len(whole), kind="dataset", sha256=digest)
    append(service, path, 0, whole[:10])
    (found,) = service.http.get("/v1/uploads", params={"sha256": digest}).json()["items"]
    assert (f"/v1/uploads/{found['id']}", found["offset"], found["kind"]) == (path, 10, "dataset")
    append(service, path, 10, whole[10:])
    row = service.inspected("dataset", service.http.get(path).json()["dataset"])
    assert (row["status"], row["sha256"]) == ("ready", digest)


def test_what_is_refused_at_the_beginning(service: Service) -> None:
    def post(**headers: str) -> httpx.Response:
        return service.http.post("/v1/uploads", headers=headers)

    length = {"Upload-Length": "10"}
    answer = post(**length)
    problem(answer, 412, "unsupported_version")
    assert answer.headers["tus-version"] == "1.0.0"
    problem(post(**TUS), 422, "validation_error")
    problem(post(**TUS, **{"Upload-Length": "-1"}), 422, "validation_error")
    problem(post(**TUS, **{"Upload-Length": "0"}), 422, "empty_upload")
    problem(post(**TUS, **{"Upload-Length": str(MAX_UPLOAD_BYTES + 1)}), 413, "too_large")
    for wrong in ("kind ???", metadata(kind="job"), metadata(sha256="abc")):
        answer = post(**TUS, **length, **{"Upload-Metadata": wrong})
        problem(answer, 422, "validation_error")
    assert service.http.head("/v1/uploads/upl_0", headers=TUS).status_code == 404
    problem(service.http.get("/v1/uploads/upl_0"), 404, "not_found")


def test_what_is_refused_on_the_way(service: Service) -> None:
    path = create(service, 100)
    plain = TUS | {"Upload-Offset": "0"}
    problem(service.http.patch(path, headers=plain, content=b"x"), 415, "unsupported_media_type")
    problem(service.http.patch(path, headers=BODY, content=b"x"), 422, "validation_error")
    problem(append(service, path, 0, bytes(101)), 413, "too_large")
    assert offset(service, path) == 0
    # What is no model is refused when it is whole, and leaves nothing.
    problem(append(service, path, 0, bytes(100)), 415, "unsupported_format")
    assert service.http.head(path, headers=TUS).status_code == 404
    assert not (service.data_dir / "objects" / "partials" / Path(path).name).exists()


def test_checksums(service: Service) -> None:
    whole = unique("checksums")
    path = create(service, len(whole), kind="dataset", sha256=sha256(whole).hexdigest())

    def checked(at: int, body: bytes, text: str) -> httpx.Response:
        return append(service, path, at, body, **{"Upload-Checksum": text})

    right = b64encode(sha1(whole[:50]).digest()).decode()
    problem(checked(0, whole[:50], f"crc32 {right}"), 400, "invalid_checksum")
    body = problem(checked(0, whole[:49] + b"?", f"sha1 {right}"), 460, "checksum_mismatch")
    assert body["title"] == "Checksum Mismatch"
    assert offset(service, path) == 0
    assert checked(0, whole[:50], f"sha1 {right}").headers["upload-offset"] == "50"
    # The whole does not have the digest that was announced: it has to be sent again.
    problem(append(service, path, 50, bytes(len(whole) - 50)), 460, "checksum_mismatch")
    assert service.http.head(path, headers=TUS).status_code == 404


def test_an_upload_that_is_given_up(service: Service) -> None:
    path = create(service, 100)
    append(service, path, 0, b"x")
    file = service.data_dir / "objects" / "partials" / Path(path).name
    assert file.read_bytes() == b"x"
    assert service.http.delete(path, headers=TUS).status_code == 204
    assert not file.exists()
    assert service.http.head(path, headers=TUS).status_code == 404
    assert service.http.delete(path, headers=TUS).status_code == 404


def send_slowly(service: Service, path: str, at: int, rest: bytes, announced: int) -> socket.socket:
    """A connection that has sent `rest`, of a body announced to be longer."""
    url = httpx.URL(service.url)
    connection = socket.create_connection((url.host, url.port))
    lines = [f"PATCH {path} HTTP/1.1", f"Host: {url.host}", f"Content-Length: {announced}"]
    lines += [f"{name}: {value}" for name, value in (BODY | {"Upload-Offset": str(at)}).items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + rest)
    return connection


def free(service: Service, path: str) -> int:
    """The offset, once no other request holds the upload."""

    def ask() -> str | None:
        answer = append(service, path, offset(service, path), b"")
        return answer.headers["upload-offset"] if answer.status_code == 204 else None

    return int(until(ask, "the connection that broke holds the upload no more"))


def test_what_came_before_the_connection_broke_is_there(service: Service) -> None:
    whole = big("broken connection", 6_000_000)
    path = create(service, len(whole), kind="dataset", sha256=sha256(whole).hexdigest())
    at = 0
    for upto in (1_000_000, 5_200_001):
        connection = send_slowly(service, path, at, whole[at:upto], len(whole) - at)
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        before, at = at, free(service, path)
        assert before < at <= upto
    assert append(service, path, at, whole[at:]).status_code == 204
    row = service.inspected("dataset", service.http.get(path).json()["dataset"])
    assert row["sha256"] == sha256(whole).hexdigest()
    assert content(service, "dataset", row["id"]) == whole


def test_two_connections_do_not_mix(service: Service) -> None:
    whole = big("two connections", 5_000_000)
    path = create(service, len(whole), kind="dataset")
    first = send_slowly(service, path, 0, whole[:4_500_000], len(whole))
    until(lambda: offset(service, path) > 4_000_000, "the first one writes")
    answer = append(service, path, offset(service, path), b"other bytes")
    problem(answer, 423, "upload_locked")
    assert answer.headers["retry-after"] == "1"
    first.sendall(whole[4_500_000:])
    assert first.recv(1000).startswith(b"HTTP/1.1 204")
    first.close()
    assert content(service, "dataset", service.http.get(path).json()["dataset"]) == whole


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with embedded(tmp_path_factory.mktemp("own"), light_spares=1, tensorflow_spares=0) as running:
        yield running


def api_process(service: Service) -> psutil.Process:
    def find() -> psutil.Process | None:
        for child in psutil.Process(service.processes["serve"].pid).children():
            if child.cmdline()[-2:] == ["app", "api"] or child.cmdline()[-1:] == ["api"]:
                return child
        return None

    found: psutil.Process = until(find, "an api process runs")
    return found


def answers(service: Service) -> bool:
    try:
        return service.http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_an_api_that_is_killed_in_the_middle(own: Service) -> None:
    whole = big("killed api", 30_000_000)
    path = create(own, len(whole), kind="dataset", sha256=sha256(whole).hexdigest())
    connection = send_slowly(own, path, 0, whole[:20_000_000], len(whole))
    until(lambda: offset(own, path) >= 12_000_000, "most of it is there")
    killed = api_process(own)
    os.kill(killed.pid, signal.SIGKILL)
    connection.close()
    until(lambda: not killed.is_running() and answers(own), "the api is there again")
    at = offset(own, path)
    assert 12_000_000 <= at <= 20_000_000
    assert append(own, path, at, whole[at:]).status_code == 204
    row = own.inspected("dataset", own.http.get(path).json()["dataset"])
    assert (row["status"], row["sha256"]) == ("ready", sha256(whole).hexdigest())
    assert content(own, "dataset", row["id"]) == whole


def test_a_whole_file_whose_api_died_is_finished_by_the_next_look(own: Service) -> None:
    """The bytes are all there, but nobody has made a model of them: as after a kill at the end."""
    whole = big("finished later", 10_000)
    path = create(own, len(whole), kind="dataset")
    file = own.data_dir / "objects" / "partials" / Path(path).name
    file.write_bytes(whole)
    assert offset(own, path) == len(whole)
    assert content(own, "dataset", own.http.get(path).json()["dataset"]) == whole
    assert not file.exists()


def test_what_nobody_goes_on_with_is_gone(service: Service) -> None:
    path = create(service, 100)
    append(service, path, 0, b"x")
    with closing(sqlite3.connect(service.data_dir / "litesmith.db")) as connection:
        old = "UPDATE partial_uploads SET expires_at = '2026-01-01 00:00:00' WHERE id = ?"
        connection.execute(old, (Path(path).name,))
        connection.commit()
    assert service.http.head(path, headers=TUS).status_code == 410
    problem(append(service, path, 1, b"x"), 410, "upload_expired")


def test_a_name_is_kept_as_people_can_read_it(service: Service) -> None:
    path = create(service, 5, name="a\0b\x1b[31m.tflite")
    assert service.http.get(path).json()["name"] == "ab[31m.tflite"
