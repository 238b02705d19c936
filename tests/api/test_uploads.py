"""Uploads over HTTP: raw and multipart, limits, broken ones, the same bytes, content."""

import hashlib
import http.client
import io
import json
import socket
import struct
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from running import MAX_UPLOAD_BYTES, Files, Service, npz, problem, unique, until

FORM_START = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'


def spooled(service: Service) -> list[Path]:
    return list((service.data_dir / "objects" / "spool").iterdir())


def stored(service: Service) -> int:
    return len(list((service.data_dir / "objects").glob("??/*")))


def test_a_model_is_known_by_its_content(service: Service, model: str, files: Files) -> None:
    content = files.tflite.read_bytes()
    row = service.http.get(f"/v1/models/{model}").json()
    assert row["format"] == "tflite"
    assert row["sha256"] == hashlib.sha256(content).hexdigest()
    assert row["size_bytes"] == len(content)
    assert row["parameters"] == 650
    assert row["inputs"] == [{"name": "x", "shape": [-1, 64], "dtype": "float32"}]
    assert row["outputs"][0]["shape"] == [-1, 10]
    assert row["error"] is None


def test_the_same_bytes_are_one_model(service: Service, model: str, files: Files) -> None:
    first = service.http.post("/v1/models?name=other", content=files.tflite.read_bytes())
    assert first.status_code == 200
    assert first.json()["id"] == model
    assert first.json()["name"] == "digits.tflite"
    again = service.http.post("/v1/models", files={"file": files.tflite.open("rb")})
    assert again.status_code == 200
    assert again.json()["id"] == model


def test_curl_minus_t_sends_put(service: Service, model: str, files: Files) -> None:
    answer = service.http.put("/v1/models", content=files.tflite.read_bytes())
    assert answer.json()["id"] == model


def test_raw_and_multipart_make_a_resource(service: Service) -> None:
    raw = service.http.post("/v1/datasets?name=räw", content=unique("raw"))
    assert raw.status_code == 201
    assert raw.json()["name"] == "räw"
    assert raw.json()["status"] == "inspecting"
    assert raw.headers["location"] == f"/v1/datasets/{raw.json()['id']}"
    form = service.http.post("/v1/datasets", files={"file": ("form.npz", unique("form"))})
    assert form.status_code == 201
    assert form.json()["name"] == "form.npz"
    read = service.inspected("dataset", form.json()["id"])
    assert read["splits"] == {"all": {"samples": 4, "labelled": False}}
    assert service.http.get(form.headers["location"]).json() == read


def test_no_file_is_422(service: Service) -> None:
    problem(service.http.post("/v1/models", content=b""), 422, "empty_upload")
    problem(service.http.post("/v1/models", files={"other": b"x"}), 422, "missing_file")
    problem(service.http.post("/v1/models", data={"file": "text"}), 415, "unsupported_format")


@pytest.mark.parametrize(
    "body", [b"", b"--x", b"--x\r\n\r\n", b"--x\r\nContent-Disposition: a\r\n"]
)
def test_a_broken_form_is_a_client_error(service: Service, body: bytes) -> None:
    for type_ in ("multipart/form-data", "multipart/form-data; boundary=x"):
        answer = service.http.post("/v1/models", content=body, headers={"content-type": type_})
        assert answer.status_code in (400, 422), answer.text
        assert answer.json()["code"]


@pytest.mark.parametrize("kind", ["models", "datasets"])
@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04 not a zip", b"\x1f\x8b no gzip", b"\0"])
def test_what_is_no_known_format_is_415_with_advice(
    service: Service, kind: str, content: bytes
) -> None:
    before = stored(service)
    body = problem(service.http.post(f"/v1/{kind}", content=content), 415, "unsupported_format")
    assert "content" in body["hint"]
    assert stored(service) == before
    assert spooled(service) == []


def test_too_large_is_413_by_its_announced_length(service: Service) -> None:
    parts = urlsplit(service.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    connection.putrequest("POST", "/v1/models")
    connection.putheader("Content-Length", str(MAX_UPLOAD_BYTES + 1))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    body = json.loads(answer.read())
    assert body["code"] == "too_large"
    assert "LITESMITH_MAX_UPLOAD_BYTES" in body["hint"]
    connection.close()


@pytest.mark.parametrize("form", [False, True])
def test_too_large_is_413_however_it_comes(service: Service, form: bool) -> None:
    chunk = bytes(2**20)

    def chunks() -> Iterator[bytes]:
        if form:
            yield FORM_START
        for _ in range(MAX_UPLOAD_BYTES // len(chunk) + 1):
            yield chunk

    headers = {"content-type": "multipart/form-data; boundary=x"} if form else {}
    answer = service.http.post("/v1/models", content=chunks(), headers=headers)
    problem(answer, 413, "too_large")
    assert spooled(service) == []


@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_broken_upload_leaves_nothing(service: Service, form: bool, chunked: bool) -> None:
    before = stored(service), service.http.get("/v1/models").json()
    parts = urlsplit(service.url)
    connection = socket.create_connection((parts.hostname, parts.port))
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 7000000"
    type_ = "multipart/form-data; boundary=x" if form else "application/octet-stream"
    start = FORM_START if form else b""
    body = start + b"TFL3" * 1_500_000
    head = (
        f"POST /v1/models HTTP/1.1\r\nHost: localhost\r\n{length}\r\nContent-Type: {type_}\r\n\r\n"
    )
    connection.sendall(head.encode() + (f"{len(body):x}\r\n".encode() if chunked else b""))
    connection.sendall(body)
    if not form:
        until(lambda: spooled(service), "the upload is being spooled")
    # Reset, not closed: the service learns it at once.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: not spooled(service), "the spool is empty")
    assert (stored(service), service.http.get("/v1/models").json()) == before


def test_content_comes_with_its_digest(service: Service, model: str, files: Files) -> None:
    content = files.tflite.read_bytes()
    answer = service.http.get(f"/v1/models/{model}/content")
    assert answer.content == content
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    digest = b64encode(hashlib.sha256(content).digest()).decode()
    assert answer.headers["content-digest"] == f"sha-256=:{digest}:"
    assert 'filename="digits.tflite"' in answer.headers["content-disposition"]
    assert answer.headers["content-length"] == str(len(content))


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=100-", 100, None),
     ("bytes=-7", -7, None), ("bytes=5-999999999", 5, None), ("bytes=-999999999", 0, None)],
)  # fmt: skip
def test_ranges(
    service: Service, model: str, files: Files, header: str, start: int, stop: int | None
) -> None:
    content = files.tflite.read_bytes()
    answer = service.http.get(f"/v1/models/{model}/content", headers={"range": header})
    assert answer.status_code == 206
    assert answer.content == content[start:stop]
    first = start % len(content) if start else 0
    last = first + len(answer.content) - 1
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(content)}"


@pytest.mark.parametrize("header", ["bytes=99999999-", "bytes=-0", "bytes=9-3"])
def test_ranges_outside_are_416(service: Service, model: str, header: str) -> None:
    answer = service.http.get(f"/v1/models/{model}/content", headers={"range": header})
    problem(answer, 416, "range_not_satisfiable")
    size = service.http.get(f"/v1/models/{model}").json()["size_bytes"]
    assert answer.headers["content-range"] == f"bytes */{size}"


@pytest.mark.parametrize(
    "header", ["bytes=a-b", "items=0-1", "bytes=0-1,3-4", "bytes=" + "9" * 5000 + "-"]
)
def test_ranges_that_cannot_be_read_are_ignored(service: Service, model: str, header: str) -> None:
    answer = service.http.get(f"/v1/models/{model}/content", headers={"range": header})
    assert answer.status_code == 200


def test_what_the_client_has_is_not_sent_again(service: Service, model: str) -> None:
    path = f"/v1/models/{model}/content"
    etag = service.http.get(path).headers["etag"]
    for known in (etag, f'"other", W/{etag}', "*"):
        answer = service.http.get(path, headers={"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert service.http.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    changed = {"range": "bytes=0-1", "if-range": '"other"'}
    assert service.http.get(path, headers=changed).status_code == 200


def test_head_answers_as_get_without_the_body(service: Service, model: str) -> None:
    path = f"/v1/models/{model}/content"
    head, get = service.http.head(path), service.http.get(path)
    assert head.status_code == 200
    assert head.content == b""
    for name in ("etag", "content-length", "content-digest"):
        assert head.headers[name] == get.headers[name]
    assert service.http.head("/healthz").status_code == 200
    assert service.http.head("/v1/models").status_code == 405


def test_a_deleted_dataset_is_gone(service: Service) -> None:
    row = service.upload("dataset", unique("deleted"))
    path = f"/v1/datasets/{row['id']}"
    answer = service.http.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")
    problem(service.http.get(path), 404, "not_found")
    problem(service.http.get(f"{path}/content"), 404, "not_found")
    problem(service.http.delete(path), 404, "not_found")
    again = service.http.post("/v1/datasets", content=unique("deleted"))
    assert again.status_code == 201
    assert again.json()["id"] != row["id"]


def pickled() -> bytes:
    return npz(x=np.array([{"a": 1}, None], dtype=object))


def bomb() -> bytes:
    """70 KB that unpack to 64 MiB of a claimed terabyte."""
    buffer = io.BytesIO()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**28, 2**10)}
    )
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(64 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pickled(),
        bomb(),
        npz(x=np.zeros((4, 2)))[:-40] + bytes(40),
        npz(x=np.zeros((4, 2)), y=np.zeros(3)),
        npz(x=np.float32(1)),
        npz(x=np.array(["text"])),
    ],
    ids=["pickled", "bomb", "damaged", "lengths", "scalar", "text"],
)
def test_a_hostile_dataset_becomes_invalid_with_the_cause(service: Service, content: bytes) -> None:
    answer = service.http.post("/v1/datasets", content=content)
    if answer.status_code == 415:
        return
    assert answer.status_code == 201
    row = service.inspected("dataset", answer.json()["id"])
    assert row["status"] == "invalid", row
    assert row["error"]["code"] not in ("internal_error", "child_failed", "child_crashed"), row
    assert row["error"]["message"]
    assert row["error"]["hint"]


@pytest.mark.parametrize(
    "content",
    [b"\x1c\0\0\0TFL3" + bytes(200), b"\x89HDF\r\n\x1a\n" + bytes(2000)],
    ids=["tflite", "h5"],
)
def test_a_damaged_model_becomes_invalid_with_the_cause(service: Service, content: bytes) -> None:
    row = service.upload("model", content)
    assert row["status"] == "invalid", row
    assert row["error"]["hint"]
    refused = service.http.post("/v1/jobs", json={"model": row["id"], "variants": ["float16"]})
    problem(refused, 422, "model_invalid")
    # Sent again, it is looked at again: the cause may have been a passing one.
    again = service.http.post("/v1/models", content=content)
    assert (again.status_code, again.json()["status"]) == (200, "inspecting")
    assert service.inspected("model", row["id"])["status"] == "invalid"
