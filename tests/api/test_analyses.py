"""POST /v1/analyze: what maps to the Edge TPU, and clear problems for what cannot be analyzed."""

import hashlib
import socket
import struct
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from running import MAX_UPLOAD_BYTES, Files, Service, problem, until

from tests.engine.targets.models import Int8


def model(tag: str = "", middle: str = "LEAKY_RELU") -> bytes:
    """Two convolutions with an operator between them; another file for each tag."""
    b = Int8()
    x = b.activation("x", [1, 8, 8, 4])
    h = b.unary(middle, b.conv(x, [1, 8, 8, 4], f"first{tag}"))
    return b.build([x], [b.conv(h, [1, 8, 8, 4], f"second{tag}")])


def compiled() -> bytes:
    b = Int8()
    x = b.activation("x", [1, 8, 8, 4])
    return b.build([x], b.custom("edgetpu-custom-op", [x], ["y"]))


def spooled(service: Service) -> list[Path]:
    return list((service.data_dir / "objects" / "spool").iterdir())


def stored(service: Service) -> int:
    return len(list((service.data_dir / "objects").glob("??/*")))


def test_every_operator_is_told(service: Service) -> None:
    content = model()
    answer = service.http.post("/v1/analyze", content=content)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["status"] == "ready"
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["size_bytes"] == len(content)
    assert (found["target"], found["compiler"]) == ("edgetpu", "16.0")
    assert (found["mapped"], found["cpu"], found["subgraphs"]) == (1, 2, 1)
    reasons = [op["reason"] for op in found["ops"]]
    assert reasons == ["mapped", "unsupported_operation", "after_cpu"]
    assert found["advice"][0]["operator"] == "LEAKY_RELU"
    assert found["memory"]["on_chip_bytes"] > 0
    assert found["failure"] is None
    assert found["error"] is None
    assert answer.headers["location"] == f"/v1/analyses/{found['id']}"
    assert service.http.get(answer.headers["location"]).json() == found


def test_the_same_file_and_options_are_one_analysis(service: Service) -> None:
    content = model("again")
    first = service.http.put("/v1/analyze", content=content).json()
    assert service.http.post("/v1/analyze", content=content).json() == first
    form = service.http.post("/v1/analyze", files={"file": ("m.tflite", content)})
    assert form.json() == first
    several = service.http.post(
        "/v1/analyze", files={"file": content}, data={"multiple_subgraphs": "true"}
    ).json()
    assert several["id"] != first["id"]
    assert (several["mapped"], several["subgraphs"]) == (2, 2)
    query = {"multiple_subgraphs": "true", "target": "edgetpu"}
    asked = service.http.post("/v1/analyze", content=content, params=query)
    assert asked.json() == several
    older = service.http.post("/v1/analyze", content=content, params={"compiler": "14.1"})
    assert older.json()["compiler"] == "14.1"


def test_a_file_that_a_job_made_is_analyzed_by_its_id(
    service: Service, finished: dict[str, Any]
) -> None:
    made = {variant["name"]: variant["artifacts"] for variant in finished["variants"]}
    ids = {a["kind"]: a["id"] for a in made["int8"]}
    found = service.http.post("/v1/analyze", json={"artifact": ids["tflite"]})
    assert found.status_code == 200, found.text
    assert found.json()["sha256"] == next(
        a["sha256"] for a in made["int8"] if a["kind"] == "tflite"
    )
    manifest = service.http.post("/v1/analyze", json={"artifact": ids["manifest"]})
    assert "manifest" in problem(manifest, 415, "unsupported_format")["detail"]
    float16 = next(a["id"] for a in made["float16"] if a["kind"] == "tflite")
    problem(service.http.post("/v1/analyze", json={"artifact": float16}), 422, "not_quantized")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"[1", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[]", 422, "validation_error"),
        (b"{}", 422, "validation_error"),
        (b'{"artifact": "art_0"}', 422, "unknown_artifact"),
        (b'{"artifact": "a\\u0000"}', 422, "validation_error"),
        (b'{"artifact": "art_0", "target": "cpu"}', 422, "validation_error"),
        (b'{"artifact": "art_0", "multiple_subgraphs": 1}', 422, "validation_error"),
        (b'{"artifact": "art_0", "files": 1}', 422, "validation_error"),
    ],
)
def test_json_that_names_no_file_is_refused(
    service: Service, body: bytes, status: int, code: str
) -> None:
    answer = service.http.post(
        "/v1/analyze", content=body, headers={"content-type": "application/json"}
    )
    problem(answer, status, code)


def test_what_cannot_be_analyzed_is_told_with_the_cause(service: Service, files: Files) -> None:
    whole = model("cut")
    refused = {
        "not_quantized": [files.tflite.read_bytes()],
        "already_compiled": [compiled()],
        "corrupt_file": [
            whole[: len(whole) // 2],
            whole[:40],
            b"\x1c\0\0\0TFL3" + bytes(200),
            b"\xff\xff\xff\xffTFL3" + b"\xff" * 200,
            b"TFL3" * 50,
        ],
    }
    for code, contents in refused.items():
        for content in contents:
            answer = service.http.post("/v1/analyze", content=content)
            body = problem(answer, 422, code)
            assert body["hint"]
            kept = service.http.get(answer.headers["location"]).json()
            assert (kept["status"], kept["error"]["code"]) == ("invalid", code)
            assert kept["ops"] is None
    # Sent again, it is looked at again, and the answer is the same.
    problem(service.http.post("/v1/analyze", content=compiled()), 422, "already_compiled")


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04 no zip", b"\0", b"\x89HDF\r\n\x1a\n"])
def test_what_is_no_tflite_is_415_and_leaves_nothing(service: Service, content: bytes) -> None:
    before = stored(service)
    body = problem(service.http.post("/v1/analyze", content=content), 415, "unsupported_format")
    assert ".tflite" in body["hint"]
    assert (stored(service), spooled(service)) == (before, [])


def test_requests_without_a_file_or_with_unknown_options_are_refused(service: Service) -> None:
    before = stored(service)
    post = service.http.post
    problem(post("/v1/analyze", content=b""), 422, "empty_upload")
    problem(post("/v1/analyze", files={"other": model("refused")}), 422, "missing_file")
    for params in ({"target": "cpu"}, {"compiler": "new"}, {"wait": "601"}, {"wait": "-1"}):
        answer = post("/v1/analyze", content=model("refused"), params=params)
        problem(answer, 422, "validation_error")
        if "wait" not in params:
            form = post("/v1/analyze", files={"file": model("refused")}, data=params)
            problem(form, 422, "validation_error")
    unknown = post("/v1/analyze", files={"file": model("refused")}, data={"speed": "fast"})
    assert problem(unknown, 422, "validation_error")["errors"][0]["field"] == "speed"
    assert (stored(service), spooled(service)) == (before, [])


def test_too_large_is_413(service: Service) -> None:
    content = b"\x1c\0\0\0TFL3" + bytes(MAX_UPLOAD_BYTES)
    problem(service.http.post("/v1/analyze", content=content), 413, "too_large")
    problem(service.http.post("/v1/analyze", files={"file": content}), 413, "too_large")
    assert spooled(service) == []


def test_a_broken_upload_leaves_nothing(service: Service) -> None:
    before = stored(service)
    parts = urlsplit(service.url)
    connection = socket.create_connection((parts.hostname, parts.port))
    head = "POST /v1/analyze HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7000000\r\n\r\n"
    connection.sendall(head.encode() + b"\x1c\0\0\0TFL3" + bytes(6_000_000))
    until(lambda: spooled(service), "the upload is being spooled")
    # Reset, not closed: the service learns it at once.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: not spooled(service), "the spool is empty")
    assert stored(service) == before


def test_what_takes_longer_is_202_and_found_later(service: Service) -> None:
    until(lambda: "litesmith_tasks{" not in service.http.get("/metrics").text, "nothing is due")
    child = service.spare()
    child.suspend()
    answer = service.http.post("/v1/analyze?wait=0", content=model("slow"))
    assert answer.status_code == 202
    found = answer.json()
    assert (found["status"], found["ops"]) == ("analyzing", None)
    path = answer.headers["location"]
    assert service.http.get(path, params={"wait": 0.1}).json()["status"] == "analyzing"
    child.resume()
    assert service.http.get(path, params={"wait": 60}, timeout=70).json()["status"] == "ready"
    problem(service.http.get("/v1/analyses/ana_0"), 404, "not_found")


def test_the_same_idempotency_key_gives_the_first_analysis(service: Service) -> None:
    headers = {"idempotency-key": "analysis-1"}
    first = service.http.post("/v1/analyze", content=model("key"), headers=headers)
    again = service.http.post("/v1/analyze", content=model("key"), headers=headers)
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json() == again.json()
    other = service.http.post("/v1/analyze", content=model("other key"), headers=headers)
    problem(other, 422, "idempotency_key_reused")
    query = {"multiple_subgraphs": "true"}
    other = service.http.post("/v1/analyze", content=model("key"), params=query, headers=headers)
    problem(other, 422, "idempotency_key_reused")


def test_names_from_the_file_are_text_that_can_be_kept(service: Service) -> None:
    found = service.http.post("/v1/analyze", content=model("a\0b")).json()
    assert found["ops"][0]["layer"].startswith("firsta�b")
