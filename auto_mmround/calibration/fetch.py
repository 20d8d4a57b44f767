"""One file from the web, for media that are named by URL: only with leave, only from public
addresses, within bounds.

The address that a name resolves to is checked, and the connection goes to that very address, so a
name that answers otherwise a moment later leads nowhere else. Every redirect is checked anew.
Proxies of the environment are not used: they would look names up themselves.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import suppress

TIMEOUT = 15.0  # seconds without a byte
DEADLINE = 120.0  # seconds for one file, redirects included
REDIRECTS = 5
PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], Sequence[str]]
Permitted = Callable[[str], bool]


class FetchError(Exception):
    """A URL can't or may not be fetched: the message says why."""


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises OSError for an unknown one."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in answers))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; those that carry another inside are
    judged by that one."""
    try:
        place = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(place, ipaddress.IPv6Address):
        inner = place.ipv4_mapped or place.sixtofour or (place.teredo[1] if place.teredo else None)
        if inner is None and place in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(place) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    bad = (
        place.is_private
        or place.is_multicast
        or place.is_reserved
        or place.is_link_local
        or place.is_unspecified
    )
    return place.is_global and not bad


def fetch(
    url: str,
    limit: int,
    *,
    resolve: Resolve = resolve,
    permitted: Permitted = is_public,
    deadline: float = DEADLINE,
    context: ssl.SSLContext | None = None,
) -> bytes:
    """The content of an http(s) URL, at most `limit` bytes, within `deadline` seconds, redirects
    included.

    resolve: host, port to addresses. permitted: which addresses may be connected to. context: of
    TLS, the system's authorities without one. Raises FetchError.
    """
    end = time.monotonic() + deadline
    for _ in range(REDIRECTS + 1):
        host, port, secure, target = _parts(url)
        line = _dial(host, port, resolve, permitted)
        # However slowly a server drips, in the handshake, the head or the body, the line is cut at
        # the end.
        cut = line.dup()
        timer = threading.Timer(max(end - time.monotonic(), 0), _shut, [cut])
        timer.daemon = True
        timer.start()
        try:
            if secure:
                context = context or ssl.create_default_context()
                line = context.wrap_socket(line, server_hostname=host)
            answer = _answer(http.client.HTTPConnection(host, port), line, target, limit)
            if isinstance(answer, str):
                url = urllib.parse.urljoin(url, answer)
                continue
            if time.monotonic() < end:
                return answer
            raise FetchError(_late(deadline))
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = _late(deadline) if time.monotonic() >= end else str(error)
            raise FetchError(f"the connection failed: {why or type(error).__name__}") from error
        finally:
            timer.cancel()
            cut.close()
            line.close()
    raise FetchError(f"more than {REDIRECTS} redirects")


def _late(deadline: float) -> str:
    return f"it takes longer than {deadline:.0f} seconds"


def _answer(
    connection: http.client.HTTPConnection, line: socket.socket, target: str, limit: int
) -> bytes | str:
    """The content, or where a redirect leads."""
    connection.sock = line
    headers = {"User-Agent": "auto_mmround", "Connection": "close"}
    connection.request("GET", target, headers=headers)
    answer = connection.getresponse()
    if answer.status in (301, 302, 303, 307, 308):
        return answer.getheader("Location") or ""
    if answer.status != 200:
        raise FetchError(f"the server answers {answer.status}")
    data = answer.read(limit + 1)
    if len(data) > limit:
        raise FetchError(f"it is larger than {limit >> 20} MiB")
    return data


def _parts(url: str) -> tuple[str, int, bool, str]:
    """Host, port, whether by TLS, and what to ask for."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError(f"this is no URL: {error}") from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise FetchError("only http and https are fetched")
    target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    target += (
        f"?{urllib.parse.quote(parts.query, safe='/%:@!$&()*+,;=~?-._')}" if parts.query else ""
    )
    return parts.hostname, port or PORTS[parts.scheme], parts.scheme == "https", target


def _dial(host: str, port: int, resolve: Resolve, permitted: Permitted) -> socket.socket:
    """A connection to a checked address of the host."""
    try:
        addresses = resolve(host, port)
    except (OSError, ValueError) as error:
        raise FetchError(f"the host {host} is unknown: {error}") from error
    refused = [address for address in addresses if not permitted(address)]
    # one bad address condemns the name, whichever would be tried first
    if refused or not addresses:
        raise FetchError(
            f"{host} is at {refused[0] if refused else 'no address'}, which is not on the public"
            " internet"
        )
    try:
        return socket.create_connection((addresses[0], port), TIMEOUT)
    except OSError as error:
        raise FetchError(f"{host} takes no connection: {error}") from error


def _shut(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
