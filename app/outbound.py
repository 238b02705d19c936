"""HTTP to addresses that users chose, without opening the network behind the service to them
(server-side request forgery).

The name is resolved once, every address that it has is checked, and the connection goes to a
checked address, under the right Host and TLS name: a name that is pointed elsewhere afterwards (DNS
rebinding) gains nothing. Redirects are not followed, proxies of the environment not used.
"""

import asyncio
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

import httpx

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
# Global by their numbers, but they answer with credentials inside a cloud (Azure, Oracle).
METADATA = (ip_network("168.63.129.16/32"), ip_network("192.0.0.0/24"))
# All that IANA has given out; site-local, NAT64 and what else may come are outside of it.
UNICAST = ip_network("2000::/3")
EXCERPT_BYTES = 1024
MOST_ADDRESSES = 4


class NotAllowed(Exception):
    """The URL may not be called; the text says why, and no more of the network than that."""


@dataclass(frozen=True)
class Answer:
    """The status, and the beginning of what the receiver said."""

    status: int
    excerpt: str


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet, whatever it is wrapped in."""
    if isinstance(address, IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(found is not None and not is_public(found) for found in inner):
            return False
        if address.ipv4_mapped is not None:
            return True
        if address not in UNICAST:
            return False
    odd = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not odd and not _within(address, METADATA)


def networks(texts: Iterable[str]) -> list[Network]:
    """ValueError where one is no network."""
    return [ip_network(text) for text in texts]


def _within(address: Address, allowed: Iterable[Network]) -> bool:
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in allowed)


def addresses_of(url: str, allowed: Iterable[Network]) -> list[Address]:
    """The addresses behind a URL, each public or in one of the `allowed` networks. Raises
    NotAllowed. Blocks while the name is resolved."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise NotAllowed(f"it is no URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise NotAllowed("it must begin with https:// and a host name")
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise NotAllowed(f"there is no port {parsed.port}")
    if parsed.userinfo:
        raise NotAllowed("it must not hold a user name or password")
    try:
        # The port matters not to the answer, but a name of more than 63 letters does.
        found = socket.getaddrinfo(parsed.raw_host.decode(), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NotAllowed(f"the name '{parsed.host}' has no address") from None
    addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
    inside = [_within(address, allowed) for address in addresses]
    if not all(ok or is_public(address) for address, ok in zip(addresses, inside, strict=True)):
        raise NotAllowed(
            f"'{parsed.host}' leads to a private, loopback, link-local or reserved address"
        )
    if parsed.scheme == "http" and not all(inside):
        raise NotAllowed("on the public internet it must begin with https://")
    return addresses[:MOST_ADDRESSES]


@cache
def _tls() -> ssl.SSLContext:
    """The usual certificate authorities, or those of SSL_CERT_FILE."""
    return httpx.create_ssl_context()


async def post(
    url: str, headers: Mapping[str, str], body: str, allowed: Iterable[Network], timeout_s: float
) -> Answer:
    """POST to a URL that a user chose. `timeout_s` is for all of it; of the answer no more than
    EXCERPT_BYTES are read. Raises NotAllowed, TimeoutError, httpx.HTTPError."""
    async with asyncio.timeout(timeout_s):
        addresses = await asyncio.to_thread(addresses_of, url, allowed)
        async with httpx.AsyncClient(verify=_tls(), trust_env=False, timeout=timeout_s) as client:
            for last, address in enumerate(addresses, 1 - len(addresses)):
                try:
                    return await _post_to(client, address, httpx.URL(url), headers, body)
                except httpx.ConnectError:
                    # Nothing was sent; another address of the name may answer.
                    if last == 0:
                        raise
    raise AssertionError("a name that resolves has an address")


async def _post_to(
    client: httpx.AsyncClient,
    address: Address,
    url: httpx.URL,
    headers: Mapping[str, str],
    body: str,
) -> Answer:
    request = client.build_request(
        "POST",
        url.copy_with(host=str(address)),
        headers={**headers, "Host": url.netloc.decode(), "Accept-Encoding": "identity"},
        content=body.encode(),
        extensions={"sni_hostname": url.raw_host.decode()},
    )
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        excerpt = b""
        # As it came: what was packed small may unpack to gigabytes.
        async for chunk in response.aiter_raw():
            excerpt += chunk
            if len(excerpt) >= EXCERPT_BYTES:
                break
    finally:
        await response.aclose()
    return Answer(response.status_code, excerpt[:EXCERPT_BYTES].decode("utf-8", "replace"))
