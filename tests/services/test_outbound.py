"""Where a URL that a user chose may lead: nowhere behind the service."""

import asyncio
import datetime
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from receiver import receiving

from app import outbound
from app.outbound import NotAllowed, addresses_of, is_public, networks

LOOPBACK = networks(["127.0.0.0/8"])
Resolve = Callable[..., list[list[str]]]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "0.0.0.0", "2130706433", "0x7f000001", "017700000001", "localhost",
        "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]",
        "169.254.169.254", "[::ffff:169.254.169.254]", "[fd00:ec2::254]", "168.63.129.16",
        "100.100.100.200", "192.0.0.192",
        "10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1", "198.18.0.1", "192.0.2.1",
        "[fe80::1]", "[fc00::1]", "[fec0::1]", "[2001:db8::1]", "[ff02::1]", "224.0.0.1",
        "240.0.0.1", "255.255.255.255",
        "[2002:7f00:1::]", "[2002:a00:1::]", "[64:ff9b::7f00:1]", "[64:ff9b:1::a00:1]",
        "[2001:0:7f00:1::]",
    ],
)  # fmt: skip
def test_addresses_inside_are_refused(host: str) -> None:
    with pytest.raises(NotAllowed):
        addresses_of(f"https://{host}:8443/path", [])


@pytest.mark.parametrize("text", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_addresses_of_the_internet_are_public(text: str) -> None:
    assert is_public(ip_address(text))
    assert is_public(ip_address("::ffff:93.184.215.14"))


@pytest.mark.parametrize(
    "url",
    [
        "", "example", "ftp://example.com", "file:///etc/passwd", "https://", "https://[::1",
        "https://user:secret@example.com/", "gopher://127.0.0.1:6379/_", "unix:///run/x.sock",
        "https://exa mple.com", f"https://{'a' * 70}.example/", "https://\0/",
        "http://127.0.0.1:99999/", "http://127.0.0.1:0/",
    ],
)  # fmt: skip
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(NotAllowed):
        addresses_of(url, LOOPBACK)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Makes every name resolve to what is named, one list a call; returns the lists left."""

    def to(*answers: list[str]) -> list[list[str]]:
        left = list(answers)

        def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
            family = socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (text, 0)) for text in left.pop(0)]

        monkeypatch.setattr(outbound.socket, "getaddrinfo", getaddrinfo)
        return left

    return to


def test_one_private_address_among_public_ones_is_enough(resolve: Resolve) -> None:
    resolve(["93.184.215.14", "10.0.0.1"])
    with pytest.raises(NotAllowed) as caught:
        addresses_of("https://hooks.example/", [])
    # Not a word of where it leads.
    assert "10.0.0.1" not in str(caught.value)


def test_plain_http_is_for_allowed_networks_alone(resolve: Resolve) -> None:
    resolve(["93.184.215.14"], ["93.184.215.14"], ["127.0.0.1"], ["127.0.0.1", "93.184.215.14"])
    with pytest.raises(NotAllowed, match="https"):
        addresses_of("http://hooks.example/", LOOPBACK)
    assert addresses_of("https://hooks.example/", []) == [ip_address("93.184.215.14")]
    assert addresses_of("http://hooks.example/", LOOPBACK) == [ip_address("127.0.0.1")]
    with pytest.raises(NotAllowed, match="https"):
        addresses_of("http://hooks.example/", LOOPBACK)


def test_allowing_a_network_allows_no_other() -> None:
    assert addresses_of("http://127.0.0.1/", LOOPBACK)
    assert addresses_of("http://[::ffff:127.0.0.1]/", LOOPBACK)
    for url in ("http://169.254.169.254/", "http://10.0.0.1/", "http://[::1]/"):
        with pytest.raises(NotAllowed):
            addresses_of(url, LOOPBACK)


def post(url: str, allowed: Any = LOOPBACK) -> outbound.Answer:
    return asyncio.run(outbound.post(url, {"x": "y"}, "{}", allowed, 5))


def test_the_connection_goes_to_the_address_that_was_checked(resolve: Resolve) -> None:
    """A name that leads elsewhere at a second look (DNS rebinding) is not looked at twice."""
    with receiving() as receiver:
        left = resolve(["127.0.0.1"], ["127.0.0.2"])
        answer = post(f"http://hooks.example:{receiver.port}/a?b=c")
        assert answer == outbound.Answer(200, "thanks")
        assert left == [["127.0.0.2"]]
        assert receiver.messages[0].headers["Host"] == f"hooks.example:{receiver.port}"


def test_another_address_of_the_name_is_tried(resolve: Resolve) -> None:
    with receiving() as receiver:
        # Nothing listens at the first.
        resolve(["127.0.0.9", "127.0.0.1"])
        assert post(f"http://hooks.example:{receiver.port}/").status == 200


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for a name, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    at = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(at - datetime.timedelta(days=1))
        .not_valid_after(at + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, secret = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert, secret


def test_the_certificate_must_be_of_the_name_not_of_the_address(
    resolve: Resolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, secret = certificate(tmp_path, "hooks.example")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, secret)
    asked: list[str | None] = []
    server.sni_callback = lambda _, name, __: asked.append(name)
    monkeypatch.setattr(outbound, "_tls", lambda: ssl.create_default_context(cafile=str(cert)))
    with receiving(server) as receiver:
        resolve(["127.0.0.1"], ["127.0.0.1"])
        assert post(f"https://hooks.example:{receiver.port}/").status == 200
        with pytest.raises(httpx.ConnectError, match="certificate"):
            post(f"https://other.example:{receiver.port}/")
    assert asked == ["hooks.example", "other.example"]
    assert len(receiver.messages) == 1
